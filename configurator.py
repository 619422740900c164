"""Configuration: a script's own globals, overridden by Python config files and --key=value.

    LEARNING = 1                               (not a key: keys are lower case)
    learning_rate = 6e-4  # peak learning rate  (a key, its default, and the line --help prints)
    compile: bool | str = "auto"  # an annotation widens what a key accepts

    if __name__ == "__main__":
        with short_errors():
            config = configure(globals())

Arguments are taken in order and later ones win: `python train.py config/baby_cpu.py --batch_size=4`.
A config file is Python, run as it stands, and may compute from the values set before it; run only files you trust.
"""

import ast
import difflib
import linecache
import os
import shutil
import sys
import textwrap
import traceback
import types
import typing
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read_keys(script: str) -> dict[str, str]:
    """Key name -> comment, read from a script's source: the lower-case assignments before its first def or class.

    A comment on its own line starts a group and is kept as an entry "# title" -> "".
    """
    source = Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    first_work = len(lines) + 1
    assigned = {}  # line number -> name
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.With)):
            first_work = node.lineno
            break
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
                assigned[node.lineno] = target.id
    keys: dict[str, str] = {}
    for number in range(min(assigned, default=1), first_work):
        line = lines[number - 1]
        if number in assigned:
            keys[assigned[number]] = line.partition("  # ")[2].strip()
        elif line.startswith("# ") and number > min(assigned) - 2:
            keys[line] = ""
    return keys


def check_type(value: object, default: object, annotation: object) -> object:
    """The value as the key's type, or TypeError. An int is taken for a float; None only where the default is None."""
    if value is None and default is None:
        return None
    if annotation is None and default is None:
        return value
    wanted = typing.get_args(annotation) or (annotation or type(default),)
    if type(value) in wanted:
        return value
    if type(value) is int and float in wanted:
        return float(value)
    raise TypeError


def parse(text: str, default: object, annotation: object) -> object:
    """The value of --key=text: a Python literal where the key takes one, else the text itself."""
    wanted = typing.get_args(annotation) or (annotation or type(default),)
    if wanted == (str,):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
        return check_type(value, default, annotation)
    except (ValueError, SyntaxError, TypeError):
        if str in wanted or (default is None and annotation is None):
            return text
        raise TypeError from None


def type_name(default: object, annotation: object) -> str:
    wanted = typing.get_args(annotation) or (annotation or type(default),)
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in wanted)


def configure(namespace: dict, argv: list[str] | None = None, dial: tuple | None = None) -> dict:
    """Override `namespace` (a script's globals()) by argv, print what resulted on stderr, and return it as a dict.

    dial: a key and a function that derives other keys from it, of (all keys, those that were given) -> dict. What was given
    stands, but for what a config file had said before the dial was set.
    Raises ValueError for an unknown key (with the closest known one), a wrong type, a file that is missing or fails.
    `--help` prints every key with its default and comment, and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = namespace["__file__"]
    comments = read_keys(script)
    keys = [k for k in comments if not k.startswith("#")]
    annotations = namespace.get("__annotations__", {})
    defaults = {k: namespace[k] for k in keys}
    if "--help" in argv or "-h" in argv:
        print_help(namespace, comments, defaults)
        sys.exit(0)

    given, in_files = set(), set()

    def assign(key: str, value: object, where: str) -> None:
        if key not in defaults:
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{where}: unknown key {key}{hint}; --help lists the keys of {Path(script).name}")
        try:
            namespace[key] = check_type(value, defaults[key], annotations.get(key))
        except TypeError:
            expected = type_name(defaults[key], annotations.get(key))
            raise ValueError(f"{where}: {key} takes {expected}, not {type(value).__name__} {value!r}") from None

    for place, argument in enumerate(argv):
        if not argument.startswith("-"):
            found = run_file(argument, {k: namespace[k] for k in keys})
            if dial and dial[0] in found:
                in_files = set()
            for key, value in found.items():
                assign(key, value, argument)
            in_files |= found.keys()
            continue
        key, has_value, text = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        default, annotation = defaults.get(key), annotations.get(key)
        if key not in defaults:
            assign(key, text, "command line")
        elif not has_value and bool not in (typing.get_args(annotation) or (annotation or type(default),)):
            after = argv[place + 1 : place + 2]
            shown = after[0] if after and not after[0].startswith("-") else default
            raise ValueError(f"command line: --{key} needs a value: --{key}={shown}")
        else:
            try:
                value = parse(text, default, annotation) if has_value else True
            except TypeError:
                raise ValueError(
                    f"command line: --{key} takes {type_name(default, annotation)}, not {text!r}"
                ) from None
            assign(key, value, "command line")
            given.add(key)
            if dial and key == dial[0]:
                in_files = set()

    derived = {}
    if dial and namespace[dial[0]]:
        given |= in_files
        found = dial[1]({k: namespace[k] for k in keys}, given)
        derived = {k: v for k, v in found.items() if k not in given}
        for key, value in derived.items():
            assign(key, value, f"--{dial[0]}")
    config = {k: namespace[k] for k in keys}
    if int(os.environ.get("RANK", 0)) == 0:
        changed = [f"{k}={v!r}" for k, v in config.items() if v != defaults[k] and k not in derived]
        rest = [f"{k}={v!r}" for k, v in config.items() if v == defaults[k] and k not in derived]
        by_dial = [f"{k}={v!r}" for k, v in derived.items()]
        for title, pairs in (("set", changed), (f"of --{dial[0]}" if dial else "", by_dial), ("default", rest)):
            if pairs:
                print(textwrap.fill(f"{title}: " + "  ".join(pairs), 110, subsequent_indent="  "), file=sys.stderr)
    return config


def error_of(text: str) -> str:
    """The first error that short_errors told on a child's stderr, or its last line."""
    lines = text.splitlines() or [""]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])


def run_file(path: str, current: dict) -> dict:
    """The assignments a config file makes, run with the current values in sight. Raises ValueError if it cannot run."""
    file = Path(path)
    if not file.is_file():
        known = {p.stem: p for p in (HERE / "config").rglob("*.py")}
        near = known.get(next(iter(difflib.get_close_matches(file.stem, known, n=1)), ""))
        shown = near and (near.relative_to(HERE) if Path().resolve() == HERE else near)
        hint = f"; there is {shown}" if near else "; options are written --key=value"
        raise ValueError(f"{path}: no such config file{hint}")
    scope = dict(current, __file__=str(file), __name__="config")
    try:
        source = file.read_text(encoding="utf-8")
        names = [n for n in ast.walk(ast.parse(source, path)) if isinstance(n, ast.Name)]
        stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        exec(compile(source, path, "exec"), scope)
    except Exception as e:
        seen = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path] + [
            getattr(e, "lineno", None)
        ]
        raise ValueError(f"{path}, line {seen[-1] or seen[0]}: {type(e).__name__}: {e}") from None
    found = {}
    for key, value in scope.items():
        plain = not (key.startswith("_") or callable(value) or isinstance(value, types.ModuleType))
        if plain and (key not in current or value is not current[key] or key in stored):
            found[key] = value
    return found


def print_help(namespace: dict, comments: dict[str, str], defaults: dict) -> None:
    print((namespace.get("__doc__") or "").strip() + "\n\nKeys, with their defaults:")
    width, column = max(60, min(110, shutil.get_terminal_size((100, 24)).columns)), 35
    for key, comment in comments.items():
        if key.startswith("#"):
            print(f"\n{key[2:]}")
            continue
        flag = f"  --{key}={defaults[key]!r} "
        lines = textwrap.wrap(comment, width - column)
        if len(flag) > column or not lines:
            print(flag.rstrip())
        elif lines:
            print(flag.ljust(column) + lines.pop(0))
        for line in lines:
            print(" " * column + line)


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


@contextmanager
def short_errors():
    """What a user can mend ends the script with one message and exit code 2; a bug keeps its traceback.

    Mendable is an exception one of our files raised on purpose (a `raise` statement of its own), and a file that
    cannot be opened or written. GPT_TRACEBACK=1 shows the traceback all the same.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        ours = Path(last.filename).resolve().is_relative_to(HERE) and "site-packages" not in last.filename
        on_purpose = ours and linecache.getline(last.filename, last.lineno).lstrip().startswith("raise")
        if os.environ.get("GPT_TRACEBACK") or not (on_purpose or (isinstance(e, OSError) and e.filename)):
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
