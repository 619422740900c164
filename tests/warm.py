"""Runs scripts in forks of a process that has imported torch already, which saves seconds per script.

Reads one JSON request per line from stdin and answers each with one line. {"argv", "cwd", "env", "limits", "preload", "in",
"out", "err"} starts a script, after the import of the modules in "preload": its pid. {"wait": pid}: its exit status;
{"poll": pid}: the same, or "running". A script behaves as under `python script ...`, including its exit
code, exit handlers and threads. The Python scripts that it starts are forked from it in turn. One difference: loss.png, a fifth
of the time of a small run, is drawn only with DRAW in its environment.
"""

import atexit
import concurrent.futures.thread
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

streams = []  # of the processes before: deleting one would write its buffered text once more


def child(request: dict) -> None:
    try:
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        os.dup2(os.open(request["in"], os.O_RDONLY), 0)
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.chdir(request["cwd"])
        if "DRAW" not in request["env"]:
            from common import logger

            logger.plot_losses = lambda folder: None
        run_script(request["argv"], os.environ | request["env"])
    finally:
        os._exit(1)


def run_script(argv: list[str], env: dict[str, str]) -> None:
    """Become `python argv...`, with the standard streams 0, 1 and 2, in this fork. Does not return."""
    code = 1
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if env is not os.environ:
            os.environ.clear()
            os.environ.update(env)
        if "RANK" in env:  # /proc shows the environment of the first process only
            Path("/proc/self/comm").write_text(f"rank {env['RANK']}")
        if "TORCH_LOGS" in env:  # torch reads it when it is imported
            sys.modules["torch"]._logging._init_logs()
        streams.extend((sys.stdin, sys.stdout, sys.stderr))
        sys.stdin, sys.stdout = (open(n, m, encoding="utf-8") for n, m in ((0, "r"), (1, "w")))
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1)
        sys.argv = argv
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


class Popen(subprocess.Popen):
    """subprocess.Popen, where [sys.executable, script, ...] forks this process and runs the script there, without exec."""

    def __init__(self, args, *more, **options):
        if isinstance(args, (list, tuple)) and args[0] == sys.executable and args[1] == "-u":  # torchrun's ranks
            args = [args[0], *args[2:]]
        if isinstance(args, list) and args[0] == sys.executable and str(args[1]).endswith(".py"):
            env = options.get("env") or os.environ

            def run() -> None:
                os.closerange(3, 1024)  # of them the pipe on which the other side waits for exec
                atexit._clear()  # what the process before would do at its end, and its threads
                concurrent.futures.thread._threads_queues.clear()
                run_script([str(word) for word in args[1:]], env)

            options["preexec_fn"] = run
        super().__init__(args, *more, **options)


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "research")]
    subprocess.Popen = Popen  # before the modules that import it by its name
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
    import scipy.optimize  # noqa: F401  (of research/)
    import scipy.stats  # noqa: F401
    import torch.distributed.run  # noqa: F401
    import tqdm  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()  # and frozen before each fork: the scripts search their own objects only
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else "running"
        else:
            for name in request["preload"]:
                importlib.import_module(name)
            gc.freeze()
            answer = os.fork()
            if answer == 0:
                child(request)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
