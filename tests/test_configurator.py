import os
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure

SCRIPT = '''"""A script of the tests."""
import os
# Run
out_dir = "out"  # where
batch_size = 12  # sequences
learning_rate = 6e-4  # peak
compile: bool | str = "auto"  # or not
top_k: int | None = None  # likeliest ids
flag = False  # on or off
CONSTANT = 3
_hidden = 4


def work():
    local = 1
'''


@pytest.fixture
def namespace(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    space = {"__file__": str(script), "__name__": "script"}
    exec(SCRIPT, space)
    return space


def config_file(tmp_path, text):
    path = tmp_path / "conf.py"
    path.write_text(text)
    return str(path)


def test_later_arguments_win_and_an_int_is_taken_for_a_float(namespace, tmp_path):
    path = config_file(tmp_path, "batch_size = 4\nlearning_rate = 1\n")
    config = configure(namespace, ["--batch-size=2", path, "--out_dir=a=b"])
    assert config["batch_size"] == namespace["batch_size"] == 4
    assert config["learning_rate"] == 1.0 and type(config["learning_rate"]) is float
    assert config["out_dir"] == "a=b"
    assert list(config) == ["out_dir", "batch_size", "learning_rate", "compile", "top_k", "flag"]


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
    ],
)
def test_a_bad_argument_says_what_where_and_which_key(namespace, argument, words):
    with pytest.raises(ValueError) as error:
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
def test_a_bad_config_file_is_named_with_the_place(namespace, tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        configure(namespace, [config_file(tmp_path, text)])
    for word in words:
        assert word in str(error.value)


def test_a_value_behind_a_space_is_shown_as_it_is_written(namespace):
    with pytest.raises(ValueError, match="--batch_size needs a value: --batch_size=7"):
        configure(namespace, ["--batch_size", "7"])


def test_a_value_that_a_file_sets_back_to_the_default_counts(namespace, tmp_path):
    path = config_file(tmp_path, "flag = False\n")
    assert configure(namespace, ["--flag", path])["flag"] is False


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_text.py", "prepare_tinystories.py"])
def test_help_prints_every_key_with_default_and_comment(script, tmp_path):
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, root / script, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    described = done.stdout.partition("Keys, with their defaults:")[2].splitlines()
    keys = [n for n, line in enumerate(described) if line.startswith("  --")]
    assert len(keys) >= 8
    for n in keys:  # a long default has its comment below it
        line = described[n]
        assert "=" in line.split()[0] and (len(line.split()) > 1 or described[n + 1].startswith(" " * 35)), line
    seed = next(line for line in done.stdout.splitlines() if line.startswith("  --seed="))
    assert "1337" in seed and len(seed.split()) > 3
    assert max(map(len, described)) <= 100
