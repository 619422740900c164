"""Other programs: their command lines, their output, and the signals to pass on to them."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from configurator import UserError, error_in

ROOT = Path(__file__).resolve().parent.parent


def split_command(text: str, key: str) -> list[str]:
    """The words of a command line. Raises UserError, naming its key, if a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{key}={text}: {e}") from None


def run_script(script: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a script of this repository. Returns what it printed; raises UserError with its error message if it fails.

    launcher: arguments of Python before the script.
    """
    command = [sys.executable, *launcher, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        message = error_in(done.stderr).removeprefix("error: ") or f"exit code {done.returncode}"
        raise UserError(f"{script}: {message}")
    return done.stdout


def catch_signals() -> list[int]:
    """From now on SIGINT and SIGTERM only append their number to the list that is returned."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received
