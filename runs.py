"""What all scripts share around the method: the common flags, the run folder, checkpoints, errors.

A stage writes to `<out>/<data>/<stage>/`:

    checkpoint.pt   the trained weights, recipe, classes and CLIP's fingerprint
    recipe.json     every number that the run used          log.jsonl      one line per log interval
    metrics.json    mIoU and friends, with a fingerprint    preview.png    a picture sheet
    unfinished/     recipe.json and log.jsonl of a run that has not ended, with resume.pt: weights, optimiser and step;
                    mark: a number for its settings

so that what stands beside a checkpoint is of the same run, and a run that is killed costs nothing of the one before it.
This module imports torch only inside the functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path

from public_datasets import DATASETS

# ------------------------------------------------------------------------------------------ flags


def common_flags(description: str, training: bool = True, seed: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that mean the same in every script."""
    parser = argparse.ArgumentParser(description=description.strip().split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_argument_group("what to work on")
    what.add_argument("--data", metavar="NAME|FOLDER", default=argparse.SUPPRESS,
                      help=f"toyland, {', '.join(DATASETS)}, or a folder of your own images, ./voc if it is named so "
                           "(default: that of the newest run in --out that this stage can continue, else toyland)")
    what.add_argument("--root", metavar="DIR", default=argparse.SUPPRESS, help="where datasets lie (default: data)")
    what.add_argument("--download", action="store_true", help="fetch the dataset if it is missing (voc alone)")
    what.add_argument("--classes", metavar="FILE", default=argparse.SUPPRESS,
                      help="one class name a line, synonyms after commas; needed for a folder of your own")
    what.add_argument("--clip", metavar="NAME|PATH", default=argparse.SUPPRESS,
                      help="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, toyland, or a weights file "
                           "(default: toyland for toyland, else ViT-B/16, fetched once into ~/.cache/clip)")
    where = parser.add_argument_group("where and how")
    where.add_argument("--out", metavar="DIR", default="runs", help="results go to DIR/<data>/<stage>/")
    where.add_argument("--device", metavar="D", default=argparse.SUPPRESS,
                       help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    where.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                       help="bf16 is autocast: faster on a GPU, slow on most laptops' CPUs")
    where.add_argument("--compile", action="store_true",
                       help="torch.compile the blocks of CLIP's image tower but the last: a start of half a minute, for a GPU")
    where.add_argument("--workers", type=not_negative, metavar="N", default=argparse.SUPPRESS,
                       help="processes that decode images (default: 4 beside a GPU, else 0). Changes no result")
    where.add_argument("--cache", metavar="DIR", default=argparse.SUPPRESS,
                       help="where hypotheses and other things that are slow to make are kept, under a key of all they depend on: "
                            "name one for runs with another --out that may share them (default: DIR/<data>/cache in --out)")
    where.add_argument("--skip-broken", action="store_true",
                       help="leave out images that cannot be read, and list them (default: the first one is an error)")
    if seed:
        where.add_argument("--seed", type=not_negative, metavar="N", default=0, help="of every random draw")
    if training:
        train = parser.add_argument_group("training")
        train.add_argument("--epochs", type=positive, metavar="N", default=argparse.SUPPRESS,
                           help="passes over the training images (default: the dataset's recipe)")
        train.add_argument("--batch-size", type=positive, metavar="N", default=argparse.SUPPRESS,
                           help="images per step (default: the dataset's recipe). The learning rate goes with it, linearly")
        train.add_argument("--resume", action="store_true", help="continue an unfinished run where it stopped")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text or 'nothing'}")
    return int(text)


def not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, found {text or 'nothing'}")
    return int(text)


def gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of gigabytes, found {text or 'nothing'}")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text or 'nothing'}")
    return value


def ratio(text: str) -> float:
    if not 0.05 <= (value := share(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0.05 to 1, found {text or 'nothing'}")
    return value


def device_of(args: argparse.Namespace):
    """The torch device of `--device`. Raises ValueError for one that this machine lacks."""
    import torch
    name = getattr(args, "device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"--device {name}: expected a device of this machine, found none by that name ({reason}). "
                         "Try --device cpu.") from error
    return device


def workers_of(args: argparse.Namespace, device) -> int:
    """Worker processes for decoding; at most the machine's cores. None beside a CPU, which decodes an image in a fiftieth of
    the time of its step: another process would take from the step what it saves."""
    return min(getattr(args, "workers", 0 if device.type == "cpu" else 4), os.cpu_count() or 1)


def autocast(device, precision: str):
    """float32 is the truth; `bf16` runs matrix products and convolutions in bfloat16."""
    import torch
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def in_float32(function):
    """Decorator: autocast does not reach into `function`, whose first argument is a tensor.

    For cosines that are multiplied by 1/τ = 100: bfloat16 has eight bits, and would move those logits by half a unit.
    """
    @functools.wraps(function)
    def wrapped(tensor, *args, **kwargs):
        import torch
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def errors_in_one_paragraph():
    """What a user can cause ends as one paragraph on stderr and exit code 2; Ctrl-C as exit code 130.

    Our own mistakes (AssertionError, TypeError, …) keep their traceback.
    """
    try:
        yield
    except BrokenPipeError:                     # `| head` has read enough: no error, and nothing to say at the last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        text = str(error) or type(error).__name__
        if "Original Traceback" in text:        # from a worker process: torch puts the traceback before the message
            text = text.strip().rpartition(f"{type(error).__name__}: ")[2]
        if isinstance(error, OSError) and error.errno:
            file = error.filename2 or error.filename or "the run folder"
            text = f"expected to use {file}, found: {error.strerror}. Check the path, its permissions and the free space; " \
                   "what was saved before is untouched."
        print(f"\nerror: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {stop}", file=sys.stderr)
        raise SystemExit(130) from None


# ------------------------------------------------------------------------------------------ run folders

def stage_folder(out: str | Path, data: str, stage: str) -> Path:
    """`<out>/<data>/<stage>`; a folder of images gives its own name."""
    return Path(out) / (Path(data).resolve().name if is_folder(data) else data) / stage


def is_folder(data: str) -> bool:
    """A dataset that is no known name is meant as a path."""
    return data != "toyland" and data not in DATASETS


def newest(out: str | Path, stage: str) -> Path | None:
    """The checkpoint of `stage` that was written last under `out`, whatever the dataset; None if there is none."""
    found = Path(out).glob(f"*/{stage}/checkpoint.pt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def write_atomically(path: Path, write, flush: bool = True) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, then give it the name.

    Whenever a run is killed there is either the old file or the new one, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name[:50], suffix=f".{os.getpid()}.part")     # it may be long
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if flush:                       # not for thousands of small files that are quickly made again
                os.fsync(file.fileno())
        os.chmod(name, 0o644)               # mkstemp's files are for the owner alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def refuse_folders(folder: Path, *names: str) -> None:
    """Raise ValueError when a folder stands where a file is to be written: before hours of work, not after."""
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name}: expected a file, or nothing yet; found a folder. Move it away.")


def write_json(path: Path, content) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def save(path: Path, content: dict, shared: bool = False) -> None:
    """A dict of tensors, numbers and strings → a file that `torch.load(weights_only=True)` reads.

    shared: other processes may be writing the same file, so that what looks like a leftover may be theirs.
    """
    import torch

    def write(file) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:       # behind a full disk torch's zip writer raises an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    remove_leftovers(path.parent, path.name, spare_living=shared)
    write_atomically(path, write)


def remove_leftovers(folder: Path, of: str = "", spare_living: bool = False) -> None:
    """Delete what runs that were killed while they wrote left behind, of all files in a folder or of one.

    spare_living: not what belongs to a process that still lives, which may be writing it.
    """
    for leftover in folder.glob(f"{of}*.part"):
        if not (spare_living and is_alive(leftover.name.split(".")[-2])):
            leftover.unlink(missing_ok=True)


def is_alive(process: str) -> bool:
    """Whether a process has this number; on Windows, where asking would end it, always."""
    if not process.isdecimal() or os.name != "posix":
        return os.name != "posix"
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:                     # somebody else's
        pass
    return True


def read(path: Path):
    """What `save` wrote. Raises an error of some kind when a single bit of it is another: torch reads such a file as it is,
    but its zip format holds a checksum of every tensor."""
    import zipfile

    import torch
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path, stage: str) -> dict:
    """A checkpoint of `stage`. Raises FileNotFoundError, or ValueError when it is damaged or of another stage."""
    if not Path(path).exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none. Make it with: python {stage}.py")
    try:
        content = read(path)
    except Exception as error:
        raise ValueError(f"{path}: expected a checkpoint, found a damaged file ({type(error).__name__}). Remove it and make "
                         f"it again with: python {stage}.py") from error
    found = content.get("stage") if isinstance(content, dict) else type(content).__name__
    if found != stage:
        raise ValueError(f"{path}: expected a checkpoint of the stage {stage!r}, found {found!r}.")
    with reading(path):
        not_finite = [name for name, tensor in content["weights"].items() if not tensor.isfinite().all()]
    if not_finite:
        raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {', '.join(not_finite[:4])}. Train it "
                         f"again with: python {stage}.py")
    return content


@contextlib.contextmanager
def reading(path: Path):
    """What cannot be read inside is the file's fault: ValueError in place of KeyError, TypeError, and torch's RuntimeError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: expected a checkpoint as this version writes it for these classes and this CLIP, found "
                         f"another content ({reason[:300]}). Remove it and train again.") from error


def refuse_unless(path: Path, what: str, expected, found) -> None:
    """Raise ValueError when a checkpoint was made with another `what` (class list, CLIP, recipe, …)."""
    if found != expected:
        if isinstance(expected, dict) and isinstance(found, dict):         # only what differs is worth reading
            keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
            expected, found = ({key: side.get(key) for key in keys} for side in (expected, found))
        short = [str(value) if len(str(value)) < 300 else f"{str(value)[:300]}…" for value in (expected, found)]
        raise ValueError(f"{path} was made with another {what}. Expected {short[0]}; found {short[1]}. Use the settings it "
                         "was made with, or train it again (another --out keeps both).")


def seed_of(*parts) -> int:
    """A 63-bit seed from anything: every random draw of a run is a function of (seed, what for, when).

    So a resumed run needs no random states, and the number of workers changes nothing.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def hold(owner, folder: Path, patience: float = 10) -> weakref.finalize:
    """Keep other processes from training in `folder` until what is returned is called, `owner` is gone or this process ends.

    Raises ValueError when one trains there: two would write over each other's states. Not on Windows, which has no such lock.
    patience: seconds, for the workers of a run that has just been killed, which notice it a moment later.
    """
    try:
        import fcntl
    except ImportError:
        return weakref.finalize(owner, int)
    handle, started = os.open(folder, os.O_RDONLY), time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - started < patience:
                time.sleep(0.2)
                continue
            os.close(handle)
            raise ValueError(f"{folder}: expected no other process that trains there, found one. Wait until it has ended, stop "
                             "it, or use another --out.") from None
        except OSError:                         # a file system without locks
            pass
        return weakref.finalize(owner, os.close, handle)


class Training:
    """The frame around a training loop: header, progress bar, `log.jsonl`, saving, stopping, resuming.

        with Training(folder, ...) as run:
            for step, batch in enumerate(batches, start=run.first_step):
                ...
                run.done(step, losses, rate)
        path = run.finish()

    `unfinished/resume.pt` is written after every epoch and on Ctrl-C (which is taken between two steps, never inside one).
    `also` names what else has a state beside model and optimizer: anything with `state_dict` and `load_state_dict`.
    """

    def __init__(self, folder: Path, stage: str, settings: dict, header: dict, model, optimizer, *, steps: int,
                 steps_per_epoch: int, resume: bool, also: dict | None = None):
        self.folder, self.stage, self.settings = folder, stage, plain(settings)
        self.model, self.optimizer, self.also = model, optimizer, also or {}
        self.steps, self.per_epoch = steps, steps_per_epoch
        self.unfinished = folder / "unfinished"
        self.stop_asked = False
        refuse_folders(folder, "checkpoint.pt", "recipe.json", "log.jsonl", "metrics.json", "preview.png")
        refuse_folders(self.unfinished, "resume.pt", "recipe.json", "log.jsonl")
        self.first_step = self.load() if resume else 0
        self.unfinished.mkdir(parents=True, exist_ok=True)
        hold(self, folder)()                    # refused before anything is written; held while it trains
        if not resume and not self.is_begun() and (self.unfinished / "resume.pt").exists():
            print(f"An unfinished run with other settings is given up: {self.unfinished}")
            (self.unfinished / "resume.pt").unlink()
        remove_leftovers(folder)
        remove_leftovers(self.unfinished)
        for name, value in header.items():
            print(f"{name:>10}  {value}")
        if self.is_finished():                  # nothing to do: what stands in the folder stays as it is
            shutil.rmtree(self.unfinished)
            return
        write_json(self.unfinished / "recipe.json", plain(header))
        write_atomically(self.unfinished / "mark", lambda file: file.write(self.mark()))
        log = next((path for path in (self.unfinished / "log.jsonl", folder / "log.jsonl") if path.exists()), None)
        lines = log.read_text(errors="replace").splitlines() if self.first_step and log else []
        kept = [line for line in lines if logged_step(line) < self.first_step]
        write_atomically(self.unfinished / "log.jsonl",
                         lambda file: file.write("".join(line + "\n" for line in kept).encode()))

    def load(self) -> int:
        """The step to go on with; 0 when nothing was saved yet. Raises ValueError when the settings differ."""
        unfinished, finished = self.unfinished / "resume.pt", self.folder / "checkpoint.pt"
        path = next((path for path in (unfinished, finished) if path.exists()), None)
        content = load(path, self.stage) if path else None
        if path is None or path == finished and self.is_begun() and content.get("settings") != self.settings:
            # Nothing is there but an earlier run's checkpoint: this run was stopped before its first epoch ended.
            print(f"Nothing to resume in {self.folder}: starting from the beginning.")
            return 0
        with reading(path):
            for name, value in self.settings.items():
                refuse_unless(path, name, expected=value, found=content["settings"].get(name))
            self.model.load_state_dict(content["weights"])
            if path == finished:
                print(f"{finished} is finished already.")
                return self.steps
            self.optimizer.load_state_dict(content["optimizer"])
            for parameter, state in self.optimizer.state.items():
                for name, tensor in state.items():
                    if tensor is not None and tensor.ndim and tensor.shape != parameter.shape:
                        raise RuntimeError(f"{name} of shape {tuple(tensor.shape)} for {tuple(parameter.shape)}")
            for name, owner in self.also.items():
                owner.load_state_dict(content["also"][name])
            if not 0 < content["step"] <= self.steps:
                raise ValueError(f"{path}: expected a step from 1 to {self.steps}, found {content['step']}. Remove it and train "
                                 "again.")
            return content["step"]

    def mark(self) -> bytes:
        """A number for the settings: whose `unfinished/` it is."""
        return f"{seed_of(self.settings):016x}".encode()

    def is_begun(self) -> bool:
        """Whether `unfinished/` belongs to a run with these settings."""
        path = self.unfinished / "mark"
        return path.is_file() and path.read_bytes() == self.mark()

    def is_finished(self) -> bool:
        """Whether --resume found this very run at its end. Not if it was killed between its checkpoint and its last file:
        then resume.pt or its whole log is still in `unfinished/` (and of one begun again and killed early, a stump)."""
        log = self.unfinished / "log.jsonl"
        last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
        ending = (self.unfinished / "resume.pt").exists() or [logged_step(line) for line in last] == [self.steps - 1]
        return self.first_step == self.steps and not ending

    def __enter__(self):
        from tqdm import tqdm
        self.release = hold(self, self.folder)
        self.bar = tqdm(total=self.steps, initial=self.first_step, unit="step", desc=self.stage)
        self.started = time.monotonic()
        self.old_handler = signal.signal(signal.SIGINT, self.ask_to_stop)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.old_handler)
        self.bar.close()
        self.release()

    def ask_to_stop(self, *_):
        if self.stop_asked:                     # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt("With --resume the same command goes on from what was saved last.")
        self.stop_asked = True

    def done(self, step: int, losses: dict[str, float], rate: float) -> None:
        """Book a finished optimiser step; save when an epoch ends or when asked to stop."""
        self.bar.update()
        if step % max(1, self.steps // 200) == 0 or step + 1 == self.steps:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            with open(self.unfinished / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **losses, "rate": rate,
                                       "seconds": round(time.monotonic() - self.started, 1)}) + "\n")
        if self.stop_asked or (step + 1) % self.per_epoch == 0 and step + 1 < self.steps:
            save(self.unfinished / "resume.pt", {
                "stage": self.stage, "settings": self.settings, "step": step + 1,
                "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "also": {name: owner.state_dict() for name, owner in self.also.items()}})
        if self.stop_asked:
            raise KeyboardInterrupt(f"Saved after step {step + 1} of {self.steps}: the same command and --resume goes on.")

    def refuse_non_finite(self, loss, step: int, ids) -> None:
        """Raise ValueError when the loss is NaN or infinite; what was saved before stays."""
        if not loss.isfinite():
            kept = "The last good state is kept in" if (self.unfinished / "resume.pt").exists() else "Nothing is saved yet in"
            raise ValueError(f"the loss of step {step} is {loss.item()}, expected a finite number. The images were "
                             f"{', '.join(ids)}. {kept} {self.folder}; a smaller learning rate or --precision fp32 usually "
                             "mends it.")

    def finish(self) -> Path:
        """Write `checkpoint.pt` (weights, no optimiser), put recipe and log beside it, remove `unfinished/`."""
        path = self.folder / "checkpoint.pt"
        if not self.unfinished.exists():
            return path
        for name in ("metrics.json", "preview.png"):            # of the checkpoint that is replaced
            (self.folder / name).unlink(missing_ok=True)
        save(path, {"stage": self.stage, "settings": self.settings, "step": self.steps,
                    "weights": self.model.state_dict()})
        for name in ("recipe.json", "log.jsonl"):
            os.replace(self.unfinished / name, self.folder / name)
        shutil.rmtree(self.unfinished)          # last: until here a killed run could be ended again with --resume
        return path


def logged_step(line: str) -> float:
    """The step of a line of `log.jsonl`; infinity for a line that a killed run did not finish."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def cached(folder: Path, name: str, key, make, fits=lambda content: True):
    """`make()`, stored in `folder` under a key of everything it depends on.

    What cannot be read, or does not fit (`fits(content)` is False or raises), is made again.
    """
    path = Path(folder) / f"{name}-{seed_of(key):016x}.pt"
    if path.exists():
        try:
            content = read(path)
            if fits(content):
                return content
            reason = "another content"
        except Exception as error:              # whatever is in it
            reason = type(error).__name__
        print(f"{path} is damaged ({reason}): making it again.")
    content = make()
    save(path, content, shared=True)
    return content


def plain(content):
    """Tuples as lists, keys as strings: what JSON and a checkpoint give back, so that both compare equal."""
    return json.loads(json.dumps(content))


def repeated(args: argparse.Namespace) -> str:
    """The flags that the next stage needs to find what this one made."""
    given = [f" --out {shlex.quote(args.out)}"] if args.out != "runs" else []
    return "".join(given)


def versions() -> str:
    import platform

    import torch
    import torchvision
    return f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
