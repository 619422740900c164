import builtins
import os
import re
import subprocess
import sys

from conftest import ROOT

from configurator import UserError, check_bounds, check_choice, configure, read_keys, short_errors

import pytest

SCRIPT = '''"""A script of the tests."""
import os
import re
from settings import Settings
from configurator import add_keys
# Run
out_dir = "out"  # where
batch_size = 12  # sequences
learning_rate = 6e-4  # peak
compile: bool | str = "auto"  # or not
top_k: int | None = None  # most likely ids
flag = False  # on or off
CONSTANT = 3
_hidden = 4
# More
add_keys(globals(), Settings, skip=("internal",))
max_iters = 100  # steps
max_epochs = 0.0  # passes

# Not a group: no key follows
LIMITS = ("max_iters", "max_epochs")

def work():
    local = 1
'''
SETTINGS = """from dataclasses import dataclass


@dataclass
class Settings:
    depth: int = 0  # blocks
    flag: bool = True  # the script has a default of its own
    internal: int = 5  # set by the script
    norm: str = "layernorm"  # layernorm | rmsnorm
"""
KEYS = "out_dir batch_size learning_rate compile top_k flag depth norm max_iters max_epochs".split()


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The globals of a script in a folder of its own, beside the module that has its dataclass."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "settings.py").write_text(SETTINGS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    space = {"__file__": str(script), "__name__": "script"}
    exec(SCRIPT, space)
    return space


def config_file(tmp_path, text):
    path = tmp_path / "conf.py"
    path.write_text(text)
    return str(path)


def test_later_arguments_win_and_an_int_is_accepted_for_a_float(namespace, tmp_path):
    path = config_file(tmp_path, "batch_size = 4\nlearning_rate = 1\n")
    config = configure(namespace, ["--batch-size=2", path, "--out_dir=a=b"])
    assert config["batch_size"] == namespace["batch_size"] == 4
    assert config["learning_rate"] == 1.0 and type(config["learning_rate"]) is float
    assert config["out_dir"] == "a=b"
    assert list(config) == KEYS


def test_a_config_file_computes_from_what_is_set_before_it(namespace, tmp_path):
    path = config_file(tmp_path, "import time\nbatch_size = batch_size * 2\n_note = time.time()\n")
    assert configure(namespace, ["--batch_size=5", path])["batch_size"] == 10


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--flag", "flag", True),
        ("--flag=true", "flag", True),
        ("--compile=False", "compile", False),
        ("--compile=auto", "compile", "auto"),
        ("--top_k=5", "top_k", 5),
        ("--top_k=None", "top_k", None),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=6e-4", "learning_rate", 6e-4),
        ("--out_dir=123", "out_dir", "123"),
        ("--out_dir=", "out_dir", ""),
    ],
)
def test_values_take_the_type_of_their_key(namespace, argument, key, value):
    found = configure(namespace, [argument])[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--bach_size=3", ["bach_size", "did you mean batch_size", "command line"]),
        ("--batch_size=many", ["batch_size takes int", "'many'"]),
        ("--batch_size=1.5", ["batch_size takes int"]),
        ("--batch_size=True", ["batch_size takes int"]),
        ("--flag=3", ["flag takes bool"]),
        ("--learning_rate=fast", ["learning_rate takes float"]),
        ("--batch_size=None", ["batch_size takes int"]),
        ("--batch_size", ["--batch_size needs a value"]),
        ("nowhere.py", ["nowhere.py: no such config file"]),
        ("--CONSTANT=4", ["CONSTANT"]),
        ("--local=4", ["unknown key local"]),
        ("--internal=4", ["unknown key internal"]),
    ],
)
def test_a_bad_argument_is_refused_by_key_and_place(namespace, argument, words):
    with pytest.raises(UserError) as error:
        configure(namespace, [argument])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1e-3\n", ["conf.py", "did you mean learning_rate"]),
        ("batch_size = '12'\n", ["conf.py", "batch_size takes int, not str '12'"]),
        ("out_dir = 'x'\nbatch_size = 1 / 0\n", ["conf.py, line 2", "ZeroDivisionError"]),
        ("out_dir = = 3\n", ["conf.py, line 1", "SyntaxError"]),
    ],
)
def test_an_error_in_a_config_file_names_the_file_and_line(namespace, tmp_path, text, words):
    with pytest.raises(UserError) as error:
        configure(namespace, [config_file(tmp_path, text)])
    for word in words:
        assert word in str(error.value)


def test_a_value_after_a_space_is_refused_with_the_right_spelling(namespace):
    with pytest.raises(UserError, match="--batch_size needs a value: --batch_size=7"):
        configure(namespace, ["--batch_size", "7"])


def test_a_file_can_set_a_key_back_to_its_default(namespace, tmp_path):
    path = config_file(tmp_path, "flag = False\n")
    assert configure(namespace, ["--flag", path])["flag"] is False


# --- keys of a dataclass


def test_the_fields_of_a_dataclass_are_keys_unless_the_script_skips_or_sets_them(namespace):
    assert namespace["depth"] == 0 and namespace["norm"] == "layernorm"
    assert namespace["flag"] is False and "internal" not in namespace
    config = configure(namespace, ["--norm=rmsnorm", "--depth=3"])
    assert config["norm"] == namespace["norm"] == "rmsnorm" and config["depth"] == 3


def test_read_keys_gives_keys_comments_and_groups_in_order(namespace):
    keys = read_keys(namespace["__file__"])
    assert [k for k in keys if not k.startswith("#")] == KEYS
    assert [*keys].index("# More") == [*keys].index("depth") - 1 and [*keys][0] == "# Run"
    assert [*keys][-1] == "max_epochs"
    assert keys["depth"] == "blocks" and keys["norm"] == "layernorm | rmsnorm"
    assert keys["flag"] == "on or off" and keys["compile"] == "or not"


def test_help_lists_the_fields_of_a_dataclass(namespace, capsys):
    with pytest.raises(SystemExit) as end:
        configure(namespace, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "\nMore\n" in shown and "--internal" not in shown
    assert "--norm='layernorm'" in shown and "layernorm | rmsnorm" in shown and "--flag=False" in shown


# --- aliases, alternatives, the dial


def test_an_alias_sets_the_key_it_stands_for(namespace, tmp_path):
    aliases = {"steps": "max_iters", "fast": "flag"}
    path = config_file(tmp_path, "steps = 5\n")
    assert configure(dict(namespace), [path], aliases=aliases)["max_iters"] == 5
    config = configure(dict(namespace), [path, "--steps=7", "--fast"], aliases=aliases)
    assert config["max_iters"] == 7 and config["flag"] is True and "steps" not in config
    with pytest.raises(UserError, match="max_iters takes int"):
        configure(dict(namespace), ["--steps=x"], aliases=aliases)


LIMITS = (("max_iters", "max_epochs"),)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("", [], (100, 0.0)),
        ("", ["--max_epochs=2"], (0, 2.0)),  # the command line over the default
        ("max_epochs = 2.0\n", [], (0, 2.0)),  # a file over the default
        ("max_iters = 50\n", ["--max_epochs=2"], (0, 2.0)),  # the command line over a file
        ("max_epochs = 2.0\n", ["--max_iters=50"], (50, 0.0)),
        ("max_iters = 50\nmax_epochs = 2.0\n", [], (50, 2.0)),  # set together, all stay
        ("", ["--max_epochs=2", "--max_iters=50"], (50, 2.0)),
        ("max_iters = 50\nmax_epochs = 2.0\n", ["--max_epochs=3"], (0, 3.0)),
        ("", ["--max_epochs=0"], (100, 0.0)),  # set to nothing, it replaces nothing
        ("max_epochs = 2.0\n", ["--max_epochs=0"], (100, 0.0)),
    ],
)
def test_of_alternative_keys_those_set_last_win(namespace, tmp_path, text, arguments, expected):
    config = configure(namespace, [config_file(tmp_path, text), *arguments], one_of=LIMITS)
    assert (config["max_iters"], config["max_epochs"]) == expected
    assert type(config["max_iters"]) is int and type(config["max_epochs"]) is float


def test_a_later_config_file_wins_over_an_earlier_one_among_alternatives(namespace, tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("max_epochs = 2.0\n")
    second.write_text("max_iters = 50\n")
    config = configure(namespace, [str(first), str(second)], one_of=LIMITS)
    assert (config["max_iters"], config["max_epochs"]) == (50, 0.0)


def derive(keys, explicit):
    """A dial that sets the steps and, from them or an explicit number of them, the batch size."""
    steps = keys["max_iters"] if "max_iters" in explicit else 10 * keys["depth"]
    return [
        ("ten steps per block", {"max_iters": steps}),
        ("the rest", {"batch_size": 1 + steps, "learning_rate": 1.0}),
    ]


DIAL = ("depth", derive)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("", ["--depth=4"], dict(max_iters=40, batch_size=41, max_epochs=0.0)),
        ("", ["--depth=4", "--max_iters=7"], dict(max_iters=7, batch_size=8)),  # explicit keys enter the formulas
        ("", ["--batch_size=3", "--depth=4"], dict(max_iters=40, batch_size=3)),  # before the dial too
        ("batch_size = 3\n", ["--depth=4"], dict(max_iters=40, batch_size=41)),  # but not those of a file before it
        ("depth = 4\nbatch_size = 3\n", [], dict(max_iters=40, batch_size=3)),  # of the same file
        ("depth = 4\n", ["--depth=0"], dict(max_iters=100, batch_size=12, learning_rate=6e-4)),  # off again
        ("", ["--depth=4", "--max_epochs=2"], dict(max_iters=0, max_epochs=2.0)),  # an explicit alternative wins
        ("max_epochs = 2.0\n", ["--depth=4"], dict(max_iters=40, max_epochs=0.0)),  # the dial over a file before it
        ("depth = 4\nmax_epochs = 2.0\n", [], dict(max_iters=0, max_epochs=2.0)),
    ],
)
def test_the_dial_sets_all_but_explicit_keys_and_their_alternatives(namespace, tmp_path, text, arguments, expected):
    config = configure(namespace, [config_file(tmp_path, text), *arguments], dial=DIAL, one_of=LIMITS)
    assert {k: config[k] for k in expected} == expected


def test_a_flag_before_the_file_that_sets_the_dial_is_explicit_too(namespace, tmp_path):
    path = config_file(tmp_path, "depth = 4\n")
    config = configure(namespace, ["--max_epochs=2", "--batch_size=3", path], dial=DIAL, one_of=LIMITS)
    assert (config["max_iters"], config["max_epochs"], config["batch_size"]) == (0, 2.0, 3)


def test_a_key_that_belongs_to_another_is_reset_with_it(namespace, tmp_path):
    path = config_file(tmp_path, "norm = 'rmsnorm'\nout_dir = 'there'\n")
    for flags, expected in (
        ([], "rmsnorm"), (["--out_dir=here"], namespace["norm"]), (["--norm=rmsnorm", "--out_dir=here"], "rmsnorm"),
    ):  # fmt: skip
        assert configure(dict(namespace), [path, *flags], part_of={"norm": "out_dir"})["norm"] == expected
    assert namespace["norm"] != "rmsnorm"


def test_only_what_flags_change_in_a_file_or_what_is_derived_is_printed(namespace, tmp_path, capsys):
    path = config_file(tmp_path, "norm = 'rmsnorm'\nbatch_size = 12\n")
    configure(dict(namespace), [path, "--out_dir=here", "--norm=rmsnorm"])  # the latter is what the file says
    captured = capsys.readouterr()
    assert captured.out == "" and " ".join(captured.err.split()) == f"flags over {path}: out_dir='here' (was 'out')"
    configure(dict(namespace), ["--depth=2", "--max_iters=5"], dial=DIAL)
    printed = capsys.readouterr().err
    assert printed == "--depth, 1. ten steps per block: as given\n--depth, 2. the rest: batch_size=6  learning_rate=1\n"
    for argv in ([], [path], ["--out_dir=here"]):
        configure(dict(namespace), argv)
        assert capsys.readouterr().err == ""


def test_a_key_of_another_script_is_named_so(refused):
    assert "unknown key n_layer (it is a key of train.py)" in refused("sample.py", "--n_layer=4")


def test_a_python_without_torch_is_one_line(tmp_path):
    for script in ("train.py", "sample.py", "prepare_text.py", "bench.py", "demo.py", "evaluate.py", "export.py"):
        done = subprocess.run([sys.executable, "-S", str(ROOT / script)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "", script
        assert re.fullmatch(r"error: \S+ has no torch: activate your environment, or pip install -e \.\n", done.stderr)


def test_only_rank_0_prints_what_was_set(namespace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    configure(namespace, [config_file(tmp_path, "batch_size = 12\n"), "--batch_size=3"])
    assert capsys.readouterr().err == ""


# --- errors


def end_of(error, capsys) -> tuple[int, str]:
    """The exit code and the message of a script that raises an error."""
    with pytest.raises(SystemExit) as end, short_errors():
        raise error
    return end.value.code, capsys.readouterr().err


def test_errors_of_the_user_and_of_files_are_one_line_and_others_keep_their_traceback(capsys, monkeypatch):
    assert end_of(UserError("--seed=-1: must be at least 0"), capsys) == (2, "error: --seed=-1: must be at least 0\n")
    code, message = end_of(FileNotFoundError(2, "No such file or directory", "gone.txt"), capsys)
    assert code == 2 and message == "error: [Errno 2] No such file or directory: 'gone.txt'\n"
    assert end_of(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    for error in (ValueError("a bug"), OSError("without a file"), RuntimeError("a bug")):
        with pytest.raises(type(error)), short_errors():
            raise error
    monkeypatch.setenv("GPT_TRACEBACK", "1")
    with pytest.raises(UserError), short_errors():
        raise UserError("with its traceback")


def test_values_out_of_range_are_refused_by_key():
    keys = dict(steps=0, rate=-0.5, momentum=1.0)
    check_bounds(keys, at_least_0="steps", below_1="steps")
    for bounds, message in (
        (dict(at_least_1="steps"), "--steps=0: must be at least 1"),
        (dict(at_least_0="steps rate"), "--rate=-0.5: must be at least 0"),
        (dict(below_1="momentum"), "--momentum=1.0: must be at least 0 and less than 1"),
    ):
        with pytest.raises(UserError, match=message):
            check_bounds(keys, **bounds)
    check_choice("split", "val", ("train", "val"))
    with pytest.raises(UserError, match="--split=test: choose one of nothing, val"):
        check_choice("split", "test", ("", "val"))


# --- the scripts


FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("research/*.py")])
SCRIPTS = [p for p in FILES if "configure(globals()" in p.read_text() and p.name != "configurator.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_key_has_a_comment_and_shadows_no_builtin(script):
    keys = {k: comment for k, comment in read_keys(script).items() if not k.startswith("#")}
    assert keys and not [k for k, comment in keys.items() if not comment]
    shadowing = {k for k in keys if hasattr(builtins, k)}
    assert shadowing <= {"compile"}, shadowing  # nanoGPT's name


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_text.py", "prepare_tinystories.py"])
def test_help_prints_every_key_with_default_and_comment(script, tmp_path):
    command, env = [sys.executable, ROOT / script, "--help"], {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0, done.stderr
    described = done.stdout.partition("Keys, with their defaults:")[2].splitlines()
    keys = [n for n, line in enumerate(described) if line.startswith("  --")]
    assert len(keys) >= 8
    for n in keys:  # the comment of a long default is below it
        line = described[n]
        assert "=" in line.split()[0] and (len(line.split()) > 1 or described[n + 1].startswith(" " * 35)), line
    seed = next(line for line in done.stdout.splitlines() if line.startswith("  --seed="))
    assert "1337" in seed and len(seed.split()) > 3
    assert max(map(len, described)) <= 100


def test_a_home_folder_is_expanded_where_the_shell_does_not(namespace, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configure(namespace, ["--out_dir=~/x"])["out_dir"] == f"{tmp_path}/x"
    assert configure(namespace, [config_file(tmp_path, "out_dir = '~/y'")])["out_dir"] == f"{tmp_path}/y"
    assert configure(namespace, ["--out_dir=a~/x"])["out_dir"] == "a~/x"


def test_names_inside_of_a_function_are_no_keys(namespace, tmp_path):
    path = config_file(tmp_path, "def helper():\n    max_iters = 1\n    batch_size = 2\n    return max_iters\n")
    config = configure(namespace, ["--depth=4", path], dial=DIAL, one_of=LIMITS)
    assert (config["max_iters"], config["batch_size"]) == (40, 41)
