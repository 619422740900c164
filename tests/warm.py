"""Runs scripts in forks of a process that has imported torch already, which saves seconds per script.

Reads one JSON request per line from stdin and answers each with one line. {"argv", "cwd", "env", "limits", "in", "out", "err"}
starts a script: its pid. {"wait": pid}: its exit status. A script behaves as under `python script ...`, including its exit
code, exit handlers and threads.
"""

import atexit
import json
import os
import resource
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path


def child(request: dict) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        os.dup2(os.open(request["in"], os.O_RDONLY), 0)
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdin, sys.stdout = (open(n, m, encoding="utf-8") for n, m in ((0, "r"), (1, "w")))
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1)
        sys.argv = request["argv"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import build_fineweb_shards  # noqa: F401
    import prepare_text  # noqa: F401
    import prepare_tinystories  # noqa: F401
    import sample  # noqa: F401
    import train  # noqa: F401

    import matplotlib.backends.backend_agg  # noqa: F401  (of loss.png)
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401  (of `datasets`, which itself reads the environment at import)
    import pyarrow.dataset  # noqa: F401
    import requests  # noqa: F401
    import tqdm  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
