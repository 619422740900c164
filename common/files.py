"""Files: written whole or not at all, hashed, downloaded."""

import contextlib
import hashlib
import os
import re
import shutil
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
    """A binary file to write. It gets its name only when it is complete and synced; on any error nothing changes."""
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


def atomic_write(path: Path, data: str | bytes) -> None:
    with atomic_file(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    path.parent.mkdir(parents=True, exist_ok=True)
    on_hub = re.fullmatch(rf"{HUB}/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url)
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
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{url} cannot be downloaded ({reason}); try the same command again") from None
    if sha256 and (got := file_sha256(path)) != sha256:
        path.unlink()
        raise UserError(f"{url}: sha256 mismatch: got {got}, expected {sha256}")


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
