"""Fetching a file once, so that a broken one is never used and never left in the way."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, target: Path, expected_sha256: str) -> Path:
    """The file of `url`, at `target`: from there if it is whole, else fetched, checked and put there.

    The bytes go to a temporary file beside the target, which takes the target's name only when the SHA-256
    is right. On any failure, also Ctrl-C, the temporary file is removed. A file at `target` with another
    SHA-256 is replaced.
    Raises OSError when the server cannot be reached or breaks off, ValueError for a wrong SHA-256.
    """
    target = Path(target)
    if target.exists():
        if sha256(target) == expected_sha256:
            return target
        print(f"{target} is damaged (its SHA-256 is wrong): fetching it again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            fetch(url, file, target.name)
        found = sha256(partial)
        if found != expected_sha256:
            raise ValueError(f"{url}: expected a file with SHA-256 {expected_sha256}, found {found}. The "
                             "download was discarded. Try again; if it happens twice, something between you "
                             "and the server changes the file.")
        os.chmod(partial, 0o644)                        # mkstemp's files are for the owner alone
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def fetch(url: str, file, title: str) -> None:
    """Copy a URL into an open file, with a progress bar. Raises OSError naming the URL and what to do."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length", 0))
            received = 0
            with tqdm(total=size or None, desc=title, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:               # URLError is an OSError
        raise OSError(f"{url}: the download failed ({error}). Check the connection and try again, or fetch "
                      "the file by other means and pass its path instead of its name.") from error
    if received < size:
        raise OSError(f"{url}: expected {size} bytes, the connection broke off after {received}. Try again.")
