"""What the scripts share."""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(sys.argv[0])  # of this folder, or a program that has no torch, such as Airflow
if SCRIPT.suffix == ".py" and SCRIPT.resolve().parent == Path(__file__).resolve().parents[1]:
    if importlib.util.find_spec("torch") is None:  # a forgotten `activate`: one line instead of a traceback
        print(f"error: {sys.executable} has no torch: activate your environment, or pip install -e .", file=sys.stderr)
        raise SystemExit(2)
