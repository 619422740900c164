"""Configuration: a script's own globals, overridden by Python config files and --key=value.

    LEARNING = 1                                (not a key: keys are lower case)
    learning_rate = 6e-4  # peak learning rate  (a key, its default, and the line --help prints)
    compile: bool | str = "auto"                (an annotation widens the types a key accepts)
    add_keys(globals(), GPTConfig)              (every other field of a dataclass is a key too)

    if __name__ == "__main__":
        with short_errors():
            configure(globals())
            main()

Arguments are taken in order and later ones win: `python train.py config/baby_cpu.py --batch_size=4`.
A config file is ordinary Python and may compute from the values set before it. Run only files you trust.
"""

import ast
import atexit
import contextlib
import difflib
import errno
import gc
import importlib.util
import os
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPT = Path(sys.argv[0])  # one of this folder, or a program that may have no torch, such as Airflow
if SCRIPT.suffix == ".py" and SCRIPT.resolve().parent == HERE:
    # The scripts import this file before torch.
    if importlib.util.find_spec("torch") is None:  # a forgotten `activate` is one line
        print(f"error: {sys.executable} has no torch: activate your environment, or pip install -e .", file=sys.stderr)
        raise SystemExit(2)
    # Modules stay until the end: searching them for garbage again and again is a fifth of a short run (BENCHMARKS.md).
    gc.set_threshold(100_000)  # new objects between two searches, not 700
    atexit.register(gc.freeze)  # nothing is searched at exit
TEXTS = {"start", "stop", "system", "sample_prompt"}  # keys whose value is no path


class UserError(Exception):
    """An error the user can mend: one short message that names the flag to change, exit code 2, no traceback."""


# -----------------------------------------------------------------------------
# The keys of a script


def add_keys(namespace: dict, config_class: type, skip: tuple[str, ...] = ()) -> None:
    """Make every field of a dataclass a key of the script, with the field's default, unless the script sets it itself."""
    for field in fields(config_class):
        if field.name not in skip and field.name not in namespace:
            namespace[field.name] = field.default
            namespace.setdefault("__annotations__", {})[field.name] = field.type


def read_keys(script: str | Path) -> dict[str, str]:
    """Key name -> comment, read from a script's source: the lower-case assignments before its first def or class.

    A comment on its own line starts a group and is kept as an entry "# title" -> "". The fields that add_keys() adds are
    read from the source of their class, which the script imports from a file beside it.
    """
    source = Path(script).read_text(encoding="utf-8")
    lines, keys, imported_from, assigned, added = source.splitlines(), {}, {}, {}, {}
    first_def = len(lines) + 1
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            imported_from |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.With)):
            first_def = node.lineno
            break
        elif isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", "") == "add_keys":
            added[node.lineno] = node.value
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
                assigned[node.lineno] = target.id
    first_key, last_key = min(assigned, default=first_def), max([*assigned, *added], default=0)
    for number, line in enumerate(lines[:last_key], 1):
        if number in assigned:
            keys[assigned[number]] = line.partition("  # ")[2].strip()
        elif number in added:
            class_name = added[number].args[1].id
            skip = next((ast.literal_eval(k.value) for k in added[number].keywords if k.arg == "skip"), ())
            own = read_fields(Path(script).parent / f"{imported_from[class_name].replace('.', '/')}.py", class_name)
            keys |= {name: comment for name, comment in own.items() if name not in (*skip, *assigned.values())}
        elif line.startswith("# ") and number > first_key - 2:
            keys[line] = ""
    return keys


def read_fields(module: Path, class_name: str) -> dict[str, str]:
    """Field name -> comment of a dataclass, read from its source."""
    source = module.read_text(encoding="utf-8")
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name]
    fields_ = [n for n in found.body if isinstance(n, ast.AnnAssign)]
    return {n.target.id: source.splitlines()[n.lineno - 1].partition("  # ")[2].strip() for n in fields_}


def _types_of(default: object, annotation: object) -> tuple[type, ...]:
    return typing.get_args(annotation) or (annotation or type(default),)


def _type_names(default: object, annotation: object) -> str:
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in _types_of(default, annotation))


def check_type(value: object, default: object, annotation: object) -> object:
    """The value as the key's type, or TypeError. An int is accepted for a float; None only where the default is None."""
    if value is None and default is None:
        return None
    if annotation is None and default is None:
        return value
    wanted = _types_of(default, annotation)
    if type(value) in wanted:
        return value
    if type(value) is int and float in wanted:
        return float(value)
    raise TypeError


def parse(text: str, default: object, annotation: object) -> object:
    """The value of --key=text: a Python literal where the key accepts one, otherwise the text itself."""
    wanted = _types_of(default, annotation)
    if wanted == (str,):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
        return check_type(value, default, annotation)
    except (ValueError, SyntaxError, TypeError):
        if str in wanted or (default is None and annotation is None):
            return text
        raise TypeError from None


# -----------------------------------------------------------------------------
# configure()


class Overrides:
    """Sets keys in a script's globals. levels[key] says when: whole numbers for config files, halves for flags after them."""

    def __init__(self, namespace: dict, aliases: dict[str, str]):
        self.namespace, self.aliases = namespace, aliases
        self.script = namespace["__file__"]
        self.comments = read_keys(self.script)
        self.annotations = namespace.get("__annotations__", {})
        self.defaults = {k: namespace[k] for k in self.comments if not k.startswith("#")}
        self.levels: dict[str, float] = {}
        self.flags: dict[str, object] = {}  # key -> its value before the first flag

    def set(self, key: str, value: object, where: str, level: float) -> None:
        key = self.aliases.get(key, key)
        default, annotation = self.default_of(key, where)
        if isinstance(value, str) and value.startswith("~/") and key not in TEXTS:  # a shell expands only a leading ~
            value = str(Path(value).expanduser())
        try:
            self.namespace[key] = check_type(value, default, annotation)
        except TypeError:
            expected = _type_names(default, annotation)
            raise UserError(f"{where}: {key} takes {expected}, not {type(value).__name__} {value!r}") from None
        self.levels[key] = level

    def default_of(self, key: str, where: str) -> tuple:
        """A key's default and annotation. Raises UserError for an unknown key."""
        if key not in self.defaults:
            close = difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            if key in read_keys(HERE / "train.py"):
                hint = " (it is a key of train.py)"
            raise UserError(f"{where}: unknown key {key}{hint}; --help lists the keys of {Path(self.script).name}")
        return self.defaults[key], self.annotations.get(key)

    def set_flag(self, argument: str, next_argument: str, level: float) -> None:
        """--key=value, or --key alone for True."""
        key, has_value, text = argument.removeprefix("--").partition("=")
        key = self.aliases.get(key.replace("-", "_"), key.replace("-", "_"))
        default, annotation = self.default_of(key, "command line")
        if not has_value and bool not in _types_of(default, annotation):
            shown = next_argument if next_argument and not next_argument.startswith("-") else default
            raise UserError(f"command line: --{key} needs a value: --{key}={shown}")
        try:
            value = parse(text, default, annotation) if has_value else True
        except TypeError:
            expected = _type_names(default, annotation)
            raise UserError(f"command line: --{key} takes {expected}, not {text!r}") from None
        if self.levels.get(key, 0.0) % 1 != 0.5:  # not set by a flag before
            self.flags[key] = self.namespace[key]
        self.set(key, value, "command line", level)

    def turn_dial(self, dial: str, derive) -> list[tuple[str, dict]]:
        """Set the keys of the decisions that derive(all keys, explicit keys) returns, except explicit ones. Returns the rest.

        A decision is a sentence and the keys that follow from it. Explicit keys are those of the command line and of config
        files after the one that set the dial.
        """
        level = self.levels[dial]
        explicit = {k for k, when in self.levels.items() if k in self.flags or when >= level}
        decisions = derive({k: self.namespace[k] for k in self.defaults}, explicit)
        decisions = [(why, {k: v for k, v in derived.items() if k not in explicit}) for why, derived in decisions]
        for _, derived in decisions:
            for key, value in derived.items():
                self.set(key, value, f"--{dial}", level - 0.1)
        for key in explicit:  # a flag before the file that set the dial is no older than what the dial set
            self.levels[key] = max(self.levels[key], level)
        return decisions

    def clear_alternatives(self, group: tuple[str, ...]) -> None:
        """Of the keys that are not 0, keep those with the highest level; the others become 0."""
        highest = max((self.levels.get(key, 0.0) for key in group if self.namespace[key]), default=0.0)
        for key in group:
            if self.levels.get(key, 0.0) < highest:
                self.namespace[key] = type(self.defaults[key])(0)
                self.levels.pop(key, None)  # not printed as set


def configure(
    namespace: dict, argv: list[str] | None = None, dial: tuple | None = None, one_of: tuple = (), aliases: dict | None = None,
    part_of: dict | None = None,
) -> dict:  # fmt: skip
    """Override `namespace` (a script's globals()) by argv and return all keys as a dict.

    Printed on stderr: what flags changed of a config file, and what follows from the dial, decision by decision.

    dial: a key and a function derive(all keys, explicit keys) -> [(sentence, dict of keys that follow)].
    one_of: groups of numeric keys that set the same quantity. The one set last wins (a config file over the defaults, the
    command line over the file) and the others become 0; keys set together all stay. A key set to 0 is off and wins nothing.
    aliases: old spelling -> key.
    part_of: a key -> the key it belongs to: {"sample_prompt": "dataset"} resets a config file's prompt for another dataset.
    `--help` prints every key with its default and comment, and exits.
    Raises UserError for an unknown key, a wrong type, or a config file that is missing or fails.
    """
    argv = sys.argv[1:] if argv is None else argv
    keys = Overrides(namespace, aliases or {})
    if "--help" in argv or "-h" in argv:
        print_help(namespace, keys.comments, keys.defaults)
        sys.exit(0)
    level = 1.0  # config files are at whole levels, the flags after one at the next half
    for place, argument in enumerate(argv):
        if argument.startswith("-"):
            keys.set_flag(argument, (argv[place + 1 :] or [""])[0], level + 0.5)
        else:
            level += 1
            for key, value in run_file(argument, {k: namespace[k] for k in keys.defaults}).items():
                keys.set(key, value, argument, level)
    decisions = keys.turn_dial(*dial) if dial and namespace[dial[0]] else []
    for group in one_of:
        keys.clear_alternatives(group)
    for key, owner in (part_of or {}).items():
        if 0 < keys.levels.get(key, 0.0) < keys.levels.get(owner, 0.0):
            namespace[key] = keys.defaults[key]
    config = {k: namespace[k] for k in keys.defaults}
    if int(os.environ.get("RANK", 0)) == 0:
        files = [argument for argument in argv if not argument.startswith("-")]
        by_flag = {k: was for k, was in keys.flags.items() if files and keys.levels.get(k, 0.0) % 1 == 0.5}
        changed = [f"{k}={config[k]!r} (was {was!r})" for k, was in by_flag.items() if config[k] != was]
        lines = [(f"flags over {''.join(files[-1:])}", changed)] if changed else []
        for number, (why, derived) in enumerate(decisions, 1):
            kept = [(k, v) for k, v in derived.items() if config[k] == v]
            shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in kept]
            lines.append((f"--{dial[0]}, {number}. {why}", shown))
        for title, parts in lines:
            print(
                textwrap.fill(f"{title}: " + "  ".join(parts or ["as given"]), 110, subsequent_indent="  "),
                file=sys.stderr,
            )
    return config


def run_file(path: str, current: dict) -> dict:
    """The assignments a config file makes when run with the current values in scope. Raises UserError if it cannot run."""
    file = Path(path)
    if not file.is_file():
        known = {p.stem: p for p in (HERE / "config").rglob("*.py")}
        near = known.get(next(iter(difflib.get_close_matches(file.stem, known, n=1)), ""))
        shown = near and (near.relative_to(HERE) if Path().resolve() == HERE else near)
        hint = f"; did you mean {shown}?" if near else "; options are written --key=value"
        raise UserError(f"{path}: no such config file{hint}")
    scope = dict(current, __file__=str(file), __name__="config")
    try:
        source = file.read_text(encoding="utf-8")
        stored = {name.id for name in module_level_names(ast.parse(source, path)) if isinstance(name.ctx, ast.Store)}
        exec(compile(source, path, "exec"), scope)
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(e, "lineno", None)
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    found = {}
    for key, value in scope.items():
        plain = not (key.startswith("_") or callable(value) or isinstance(value, types.ModuleType))
        if plain and (key not in current or value is not current[key] or key in stored):
            found[key] = value
    return found


def module_level_names(node: ast.AST) -> Iterator[ast.Name]:
    """The names in a module, without those inside of its functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from module_level_names(child)


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
        else:
            print(flag.ljust(column) + lines.pop(0))
        for line in lines:
            print(" " * column + line)


# -----------------------------------------------------------------------------
# Errors


def check_bounds(namespace: dict, **bounds: str) -> None:
    """Raise UserError for a key outside its range. bounds: at_least_0, at_least_1 or below_1="key key ..."."""
    for bound, keys in bounds.items():
        low, high = (0, 1) if bound == "below_1" else (int(bound[-1]), float("inf"))
        for key in keys.split():
            if not low <= namespace[key] < high:
                most = " and less than 1" if high == 1 else ""
                raise UserError(f"--{key}={namespace[key]}: must be at least {low}{most}")


def check_choice(key: str, value: object, choices) -> None:
    """Raise UserError unless the value of a key is one of the choices."""
    if value not in choices:
        raise UserError(f"--{key}={value}: choose one of {', '.join(str(c) or 'nothing' for c in choices)}")


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def error_in(stderr: str) -> str:
    """The error message in a child script's stderr: its "error: ..." line, or its last line."""
    lines = stderr.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])


class Console:
    """stdout or stderr for a script: printing never ends it, nor keeps it from saving its work.

    A character that the stream cannot encode becomes "?". Text that finds the disk full is lost. When the reader is gone,
    the stream falls silent, and `broken` becomes true.
    """

    def __init__(self, stream):
        self.stream, self.broken = stream, False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)  # lines appear at once, in a file too

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except (OSError, ValueError) as e:
            if getattr(e, "errno", None) != errno.ENOSPC:
                self.silence()

    def silence(self) -> None:
        self.broken = True
        with contextlib.suppress(OSError, ValueError):  # what is still buffered goes there too
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def finish(self) -> None:
        """Flush; what cannot be written would change the exit code, so it is dropped."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()


@contextlib.contextmanager
def consoles():
    """Within the block stdout and stderr are Consoles. Closed ones are opened: a file must not take their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    own = [Console(stream or open(n, "w")) for n, stream in enumerate(before, 1)]
    sys.stdin = sys.stdin or open(0)
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:
        for console in own:
            console.finish()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def short_errors():
    """A UserError, or a file that cannot be read or written, ends the script with one line and exit code 2.

    Everything else keeps its traceback. GPT_TRACEBACK=1 shows the traceback of a UserError too. Printing is safe inside.
    """
    with consoles():
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (UserError, OSError) as e:
            if os.environ.get("GPT_TRACEBACK") or not (isinstance(e, UserError) or e.filename):
                raise
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
