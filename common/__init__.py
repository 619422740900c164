"""What the scripts share."""

import importlib.util
import sys
from pathlib import Path

IS_SCRIPT = (
    Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]
)  # Airflow reads files here without torch
if IS_SCRIPT and importlib.util.find_spec("torch") is None:  # a forgotten `activate`: one line instead of a traceback
    print(f"error: {sys.executable} has no torch: activate your environment, or pip install -e .", file=sys.stderr)
    raise SystemExit(2)
