"""Files: written whole or not at all, read as JSON, hashed, downloaded; the lock of a run's folder."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from configurator import UserError, first_line

HUB = "https://huggingface.co"


@contextlib.contextmanager
def named_disk_errors(path):
    """A disk error inside the block names the file, as an error of open() does."""
    try:
        yield
    except OSError as e:
        if e.errno and not e.filename:
            message = f"{e.strerror}; free some space and give the same command again"
            raise OSError(e.errno, message, str(path)) from None
        raise


@contextlib.contextmanager
def atomic_file(path: Path):
    """A binary file to write. It gets its name only when it is complete and synced; on any error nothing changes.

    A link stays, and its target is replaced. Through what is no regular file (a device, a pipe) the data is written at the
    end of the block.
    """
    if writes_through(path):
        data = io.BytesIO()
        yield data
        with open(path, "wb") as f:
            f.write(data.getvalue())
        return
    path = path.resolve()
    part = path.with_name(path.name + ".part")
    try:
        with named_disk_errors(path), open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def writes_through(path: Path) -> bool:
    """Whether the path is no regular file, or names an open file (/dev/fd/5): another file must not take its place."""
    names_open_file = str(path.absolute()).startswith(("/dev/fd/", "/dev/std", "/proc/"))
    return path.exists() and not path.is_dir() and (names_open_file or not path.is_file())


def check_writable(key: str, name: str, make_folders: bool = False) -> None:
    """Raise UserError, before the work, if the file that --key names cannot be written."""
    path = Path(name)
    folder = path.resolve().parent
    if make_folders:
        folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if path.is_dir():
        raise UserError(f"--{key}={name} is a folder")
    if not folder.is_dir():
        raise UserError(f"--{key}={name}: there is no folder {path.parent}")
    if not os.access(path if writes_through(path) else folder, os.W_OK):
        raise UserError(f"--{key}={name} cannot be written: permission denied")


def atomic_write(path: Path, data: str | bytes) -> None:
    with atomic_file(path) as f:
        f.write(data.encode(errors="replace") if isinstance(data, str) else data)


def parse_json(text: str | bytes):
    """json.loads, with a ValueError where the text is nested too deeply for it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict:
    """The object of a JSON file; {} if the file is missing or holds anything else."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(run: Path) -> list[dict]:
    """The entries of a run's metrics.jsonl, each with a step, without damaged lines and one that is not complete."""
    entries = []
    with open(run / "metrics.jsonl", encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                entry = parse_json(line)
                if line.endswith("\n") and isinstance(entry, dict) and type(entry.get("step")) is int:
                    entries.append(entry)
    return entries


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def code_hash() -> str:
    """Twelve hex digits that change with the code that trains: train.py, what it imports, and common/."""
    root = Path(__file__).resolve().parents[1]
    names = ("train.py", "model.py", "configurator.py", "eval_hellaswag.py", "prepare_tinystories.py")
    digest = hashlib.sha256()
    for path in [*(root / name for name in names), *sorted((root / "common").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_disk_space(folder: Path, need: float, advice: str = "") -> None:
    """Raise UserError if the disk has less than `need` bytes free, minus what the folder's shards already take."""
    need -= sum(p.stat().st_size for p in folder.glob("*.npy*"))
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise UserError(f"{folder}: needs about {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free{advice}")


def download(url: str, path: Path, sha256: str = "") -> None:
    """Fetch a file to `path`, unless it exists. Raises UserError if that fails or the file has another sha256.

    Files on the Hugging Face hub go through huggingface_hub, which resumes, retries, and honours $HF_ENDPOINT.
    """
    on_hub = re.fullmatch(rf"{HUB}/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url)
    if not path.exists():
        check_network(os.environ.get("HF_ENDPOINT", url) if on_hub else url, url)
    is_new_folder = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if on_hub and not path.exists():
            from huggingface_hub import hf_hub_download

            kind = "dataset" if on_hub[1] else "model"
            found = hf_hub_download(on_hub[2], on_hub[4], repo_type=kind, revision=on_hub[3], local_dir=path.parent)
            os.replace(found, path)
        elif not path.exists():
            fetch(url, path)
    except Exception as e:  # huggingface_hub passes on httpx's errors, which have no other base class
        if isinstance(e, OSError) and e.errno and e.filename:
            raise
        with contextlib.suppress(OSError):
            if is_new_folder:
                path.parent.rmdir()  # a folder without its file would be taken for a dataset
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{url} cannot be downloaded ({reason}); try the same command again") from None
    if sha256 and (got := file_sha256(path)) != sha256:
        path.unlink()
        raise UserError(f"{url}: sha256 mismatch: got {got}, expected {sha256}")


def check_network(url: str, what: str) -> None:
    """Raise UserError at once where the host's name is not known, as without a network: a download would retry for a minute."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        if host and not urllib.request.getproxies():
            socket.getaddrinfo(host, None)
    except socket.gaierror:
        raise UserError(f"{what} cannot be downloaded: there is no network, or it does not know {host}") from None


def fetch(url: str, path: Path) -> None:
    """Fetch a file in one piece, with retries."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    retry = Retry(5, backoff_factor=1, status_forcelist=(408, 429, 500, 502, 503, 504), raise_on_status=False)
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        with session.get(url, stream=True, timeout=(20, 60), headers={"Accept-Encoding": "identity"}) as r:
            r.raise_for_status()
            size = int(r.headers.get("Content-Length", 0))
            with atomic_file(path) as f:
                f.writelines(r.iter_content(1 << 16))
                if size and f.tell() != size:
                    raise requests.ConnectionError(f"ended after {f.tell():,} of {size:,} bytes")


held_locks: dict[Path, object] = {}  # they end with this process, however it ends


def lock_run(folder: Path) -> None:
    """Keep other runs out of a folder, if it exists, from now on. Raises UserError if one is writing there."""
    if not folder.is_dir() or folder.resolve() in held_locks:
        return
    try:
        lock = try_lock(folder / ".lock")
    except OSError as e:
        raise UserError(f"--out_dir={folder} cannot be written: {e.strerror}") from None
    if lock is None:
        advice = "wait for its end, or choose another --out_dir"
        raise UserError(f"--out_dir={folder}: another run is writing there: {advice}")
    held_locks[folder.resolve()] = lock


def try_lock(path: Path):
    """A lock with release(), which also ends with this process; None if another process or thread has it.

    On a file system without locks everybody gets it.
    """
    from filelock import FileLock, Timeout  # Airflow reads this file in an environment without it

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise
    return lock
