"""What all scripts share around the method: the common flags, the run folder, checkpoints, errors.

A stage writes to `<out>/<data>/<stage>/`:

    checkpoint.pt   the trained weights, recipe, classes and CLIP's fingerprint      (finished runs only)
    resume.pt       weights, optimiser and step of a run that is not finished        (gone when it is)
    recipe.json     every number that the run used          log.jsonl      one line per log interval
    metrics.json    mIoU and friends, with a fingerprint    preview.png    a picture sheet

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
import signal
import sys
import tempfile
import time
from pathlib import Path

from public_datasets import DATASETS

# ------------------------------------------------------------------------------------------ flags


def common_flags(description: str, training: bool = True) -> argparse.ArgumentParser:
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
    where.add_argument("--workers", type=int, metavar="N", default=argparse.SUPPRESS,
                       help="processes that decode images (default: 4 beside a GPU, else 0). Changes no result")
    where.add_argument("--seed", type=int, metavar="N", default=0, help="of every random draw")
    if training:
        train = parser.add_argument_group("training")
        train.add_argument("--epochs", type=positive, metavar="N", default=argparse.SUPPRESS,
                           help="passes over the training images (default: the dataset's recipe)")
        train.add_argument("--batch-size", type=positive, metavar="N", default=argparse.SUPPRESS,
                           help="images per step; scale the learning rate with it (default: the dataset's recipe)")
        train.add_argument("--resume", action="store_true", help="continue an unfinished run where it stopped")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text}")
    return int(text)


def device_of(args: argparse.Namespace):
    """The torch device of `--device`. Raises ValueError for one that this machine lacks."""
    import torch
    name = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"--device {name}: expected a device of this machine, found none by that name ({reason}). "
                         "Try --device cpu.") from error
    return device


def workers_of(args: argparse.Namespace, device) -> int:
    """Worker processes for decoding; at most the machine's cores."""
    return getattr(args, "workers", 0 if device.type == "cpu" else min(4, os.cpu_count() or 1))


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
    except (ValueError, OSError) as error:
        text = str(error) or type(error).__name__
        if "Original Traceback" in text:        # from a worker process: torch puts the traceback before the message
            text = text.strip().rpartition(f"{type(error).__name__}: ")[2]
        if isinstance(error, OSError) and error.errno:
            text = f"expected to use {error.filename or 'the run folder'}, found: {error.strerror}. Check the path, its " \
                   "permissions and the free space; what was saved before is untouched."
        print(f"\nerror: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped. Training continues with the same command and --resume.", file=sys.stderr)
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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
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


def write_json(path: Path, content) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def save(path: Path, content: dict) -> None:
    """A dict of tensors, numbers and strings → a file that `torch.load(weights_only=True)` reads."""
    import torch

    def write(file) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:       # behind a full disk torch's zip writer raises an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_atomically(path, write)


def load(path: Path, stage: str) -> dict:
    """A checkpoint of `stage`. Raises FileNotFoundError, or ValueError when it is damaged or of another stage."""
    import torch
    if not Path(path).exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none. Make it with: python {stage}.py")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}). Remove it and make it again with: "
                         f"python {stage}.py") from error
    found = content.get("stage") if isinstance(content, dict) else type(content).__name__
    if found != stage:
        raise ValueError(f"{path}: expected a checkpoint of the stage {stage!r}, found {found!r}.")
    return content


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


class Training:
    """The frame around a training loop: header, progress bar, `log.jsonl`, saving, stopping, resuming.

        with Training(folder, ...) as run:
            for step, batch in enumerate(batches, start=run.first_step):
                ...
                run.done(step, losses, rate)
        path = run.finish()

    `resume.pt` is written after every epoch and on Ctrl-C (which is taken between two steps, never inside one).
    """

    def __init__(self, folder: Path, stage: str, settings: dict, header: dict, model, optimizer, *, steps: int,
                 steps_per_epoch: int, resume: bool):
        self.folder, self.stage, self.settings = folder, stage, plain(settings)
        self.model, self.optimizer, self.steps, self.per_epoch = model, optimizer, steps, steps_per_epoch
        self.stop_asked = False
        folder.mkdir(parents=True, exist_ok=True)
        self.first_step = self.load() if resume else 0
        for name, value in header.items():
            print(f"{name:>10}  {value}")
        write_json(folder / "recipe.json", plain(header))
        lines = (folder / "log.jsonl").read_text().splitlines() \
            if self.first_step and (folder / "log.jsonl").exists() else []
        kept = [line for line in lines if logged_step(line) < self.first_step]
        write_atomically(folder / "log.jsonl", lambda file: file.write("".join(line + "\n" for line in kept).encode()))

    def load(self) -> int:
        """The step to go on with; 0 when nothing was saved yet. Raises ValueError when the settings differ."""
        unfinished, finished = self.folder / "resume.pt", self.folder / "checkpoint.pt"
        if not unfinished.exists() and not finished.exists():
            print(f"Nothing to resume in {self.folder}: starting from the beginning.")
            return 0
        path = unfinished if unfinished.exists() else finished
        content = load(path, self.stage)
        for name, value in self.settings.items():
            refuse_unless(path, name, expected=value, found=content["settings"].get(name))
        self.model.load_state_dict(content["weights"])
        if path == finished:
            print(f"{finished} is finished already.")
            return self.steps
        self.optimizer.load_state_dict(content["optimizer"])
        return content["step"]

    def __enter__(self):
        from tqdm import tqdm
        self.bar = tqdm(total=self.steps, initial=self.first_step, unit="step", desc=self.stage)
        self.started = time.monotonic()
        self.old_handler = signal.signal(signal.SIGINT, self.ask_to_stop)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.old_handler)
        self.bar.close()

    def ask_to_stop(self, *_):
        if self.stop_asked:                     # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.stop_asked = True

    def done(self, step: int, losses: dict[str, float], rate: float) -> None:
        """Book a finished optimiser step; save when an epoch ends or when asked to stop."""
        self.bar.update()
        if step % max(1, self.steps // 200) == 0 or step + 1 == self.steps:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **losses, "rate": rate,
                                       "seconds": round(time.monotonic() - self.started, 1)}) + "\n")
        if self.stop_asked or (step + 1) % self.per_epoch == 0 and step + 1 < self.steps:
            save(self.folder / "resume.pt", {
                "stage": self.stage, "settings": self.settings, "step": step + 1,
                "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        if self.stop_asked:
            raise KeyboardInterrupt

    def refuse_non_finite(self, loss, step: int, ids) -> None:
        """Raise ValueError when the loss is NaN or infinite; what was saved before stays."""
        if not loss.isfinite():
            raise ValueError(f"the loss of step {step} is {loss.item()}, expected a finite number. The images were "
                             f"{', '.join(ids)}. The last good state is kept in {self.folder}; a smaller learning rate or "
                             "--precision fp32 usually mends it.")

    def finish(self) -> Path:
        """Write `checkpoint.pt` (weights, no optimiser) and remove `resume.pt`."""
        path = self.folder / "checkpoint.pt"
        save(path, {"stage": self.stage, "settings": self.settings, "step": self.steps,
                    "weights": self.model.state_dict()})
        (self.folder / "resume.pt").unlink(missing_ok=True)
        return path


def logged_step(line: str) -> float:
    """The step of a line of `log.jsonl`; infinity for a line that a killed run did not finish."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def cached(folder: Path, name: str, key, make):
    """`make()`, stored in `folder` under a key of everything it depends on; what cannot be read is made again."""
    import torch
    path = Path(folder) / f"{name}-{seed_of(key):016x}.pt"
    if path.exists():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            print(f"{path} is damaged ({type(error).__name__}): making it again.")
    content = make()
    save(path, content)
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
