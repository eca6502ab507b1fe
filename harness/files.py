"""Files that are whole or not there, files that say when they are damaged, and the cache."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from pathlib import Path

from harness.machine import RANK, seed_of


def write_atomically(path: Path, write, flush: bool = True) -> None:
    """Call `write(file)` on `<path>.part`, flush it to the disk, then give it the name.

    Whenever a run is killed there is either the old file or the new one, whole. What a killed run left as
    `.part` is overwritten by whoever writes the file next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name[:200]}.part")         # a name may be as long as the file system allows
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            if flush:                       # not for thousands of small files that are quickly made again
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """A file of a run folder: of several processes one writes it."""
    if RANK == 0:
        write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def save(path: Path, content) -> None:
    """Tensors, numbers and strings → a file that `read` gives back."""
    import torch

    def write(file) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:       # behind a full disk torch's zip writer raises an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    write_atomically(path, write)


def read(path: Path):
    """What `save` wrote. Raises an error of some kind when a single bit is another: torch would read such a
    file as it is, but its zip format holds a checksum of every tensor."""
    import torch
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def cached(folder: Path, name: str, key, shape: tuple[int, ...], make):
    """The tensor of `make()`, stored in `folder` under a key of everything it depends on.

    A file that cannot be read, or holds no finite tensor of that shape, is made again. Two commands that want
    the same tensor make it once: the second waits. The processes of one command make it together, each its
    share or the same.
    """
    from harness import processes
    path = Path(folder) / f"{name}-{seed_of(key):016x}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")) if RANK == 0 else contextlib.nullcontext():
        content = stored(path, shape) if RANK == 0 else None
        if processes.agreed(content is not None):
            return content if RANK == 0 else read(path)
        content = make()
        if RANK == 0:
            save(path, content)
    return content


def stored(path: Path, shape: tuple[int, ...]):
    """The tensor in a file of the cache; None if there is none, or another content."""
    if not path.exists():
        return None
    try:
        content = read(path)
        if content.shape == shape and bool(content.isfinite().all()):
            return content
        reason = "another content"
    except Exception as error:              # whatever is in it
        reason = type(error).__name__
    print(f"{path} is damaged ({reason}): making it again.")
    return None


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold the lock file `path`: no other process gets it before this block ends or this process dies.

    Raises ValueError where another has it and we do not wait. A record lock, since those are not inherited:
    workers that outlive a killed run for a moment hold nothing. Windows has none, and no protection.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        file = open(path, "ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"{path.parent}: expected no other process that works there, found one. Wait "
                             "until it has ended, stop it, or use another --out.") from None
        except OSError:                     # a file system without locks
            pass
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()                        # who held it has removed it meanwhile: take the new one
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_folders(folder: Path, *names: str) -> None:
    """Raise ValueError when a folder stands where a file is to be written: before hours of work, not
    after."""
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name}: expected a file, or nothing yet; found a folder. Move it "
                             "away.")
