"""A field added to GPTConfig is a key of train.py, of its help, its resume check and export.py, without another list."""

import json
import shutil

from conftest import ROOT, SMALL, TEXT, Script, call, make_nanogpt_chars

import pytest
import torch


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository whose GPTConfig has one field more, and a run with that field set."""
    folder = tmp_path_factory.mktemp("copy")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "model.py").read_text(encoding="utf-8")
    last = next(line for line in source.splitlines() if line.startswith("    lora_alpha: float"))
    added = source.replace(last, last + "\n    my_switch: bool = False  # a switch of this test")
    (folder / "model.py").write_text(added, encoding="utf-8")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "warm.py", folder / "tests")
    make_nanogpt_chars(folder / "data" / "chars", TEXT)
    yield folder
    Script.servers.pop(folder).terminate()


def script(folder, *argv, code=0):
    """Run a script of the copy; returns its output."""
    done = call(*argv, cwd=folder, root=folder, env={"COLUMNS": "100"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def trained(copy):
    script(copy, "train.py", *SMALL, "--dataset=chars", "--my_switch=True")
    return copy


def test_help_lists_it_with_its_comment(copy):
    lines = script(copy, "train.py", "--help").splitlines()
    (line,) = [line for line in lines if "my_switch" in line]
    assert line.split(maxsplit=1) == ["--my_switch=False", "a switch of this test"]


def test_a_wrong_type_is_refused(copy):
    message = script(copy, "train.py", *SMALL, "--dataset=chars", "--my_switch=3", code=2)
    assert "--my_switch takes bool, not '3'" in message


def test_a_run_records_it(trained):
    assert json.loads((trained / "out" / "config.json").read_text())["my_switch"] is True
    checkpoint = torch.load(trained / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"]["my_switch"] is True


def test_a_resumed_run_continues_with_the_same_value_and_refuses_another(trained):
    resume = [*SMALL, "--dataset=chars", "--resume", "--max_iters=8"]
    message = script(trained, "train.py", *resume, code=2)
    assert message.splitlines()[-1].startswith("error: --my_switch=False: the run to resume had True; keep it, or")
    assert " 8/8 " in script(trained, "train.py", *resume, "--my_switch=True")


def test_a_run_from_before_the_field_resumes_with_its_default_only(trained):
    checkpoint = torch.load(trained / "out" / "ckpt.pt", weights_only=True)
    for keys in ("model_args", "config", "requested"):
        del checkpoint[keys]["my_switch"]
    (trained / "older").mkdir()
    torch.save(checkpoint, trained / "older" / "ckpt.pt")
    resume = [*SMALL, "--dataset=chars", "--resume", "--out_dir=older", f"--max_iters={checkpoint['step'] + 1}"]
    assert "--my_switch=True: the run to resume had False" in script(
        trained, "train.py", *resume, "--my_switch=True", code=2
    )
    script(trained, "train.py", *resume)


def test_export_refuses_it_by_name_and_its_default_is_exported(trained):
    script(trained, "train.py", *SMALL, "--dataset=chars", "--max_iters=2", "--out_dir=plain")
    message = script(trained, "export.py", "--out_dir=out", code=2)
    assert "no model class with my_switch=True: the closest, GPT-2, lacks it" in message
    assert not (trained / "out" / "export").exists()
    script(trained, "export.py", "--out_dir=plain")
