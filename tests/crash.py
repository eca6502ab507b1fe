"""The crash test: trainings are killed (SIGKILL) and resumed, and must end with the same weights as if not.

    python tests/crash.py       54 kills at random moments, and one before every fifth write to the run folder

The three trainings (rectify, distill, toyland/pretrain) run in Toyland at its smallest, through the scripts'
own `main` and the measuring that follows, each in a process of its own. These are forked from this one, so
that none waits for torch to be imported: half of the random moments would otherwise hit the import. Nothing
is computed in this process (a fork does not inherit threads).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}     # read when torch and tqdm are imported
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import distill
import evaluate
import rectify
from harness import runs
from toyland import networks, pretrain, world

TRAININGS = {
    "rectify": (rectify, ["--data", "toyland"], ["toyland/rectify"]),
    "distill": (distill, ["--data", "toyland"], ["toyland/distill"]),
    "pretrain": (pretrain, ["--pictures", "32", "--epochs", "3"],
                 ["toyland/pretrain", "toyland/pretrain_resnet"]),
}
# What changes the run folder, by the names of Python's audit events. An `open` counts when it may write.
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def make_small() -> None:
    """A dozen scenes, pictures of 32 pixels, three epochs of a few steps, and a CLIP of the least size."""
    world.TRAIN_SCENES, world.VAL_SCENES, world.TEST_SCENES, pretrain.BATCH = 8, 4, 4, 8
    pretrain.SMALL_CLIP = networks.SMALL_CLIP | dict(
        embed_dim=16, vision_width=64, vision_layers=1, transformer_width=64, transformer_heads=1,
        transformer_layers=1)
    small = dict(short_side=32, crop=(32, 40), batch_size=2, epochs=3)
    rectify.RECIPES["toyland"] = replace(rectify.RECIPES["toyland"], window_ratio=1 / 2, **small)
    distill.RECIPES["toyland"] = replace(distill.RECIPES["toyland"], **small)


def child(name: str, out: Path, log: Path, resume: bool, die_before: int | None = None) -> int:
    """Start a training in a process of its own and return its number. It ends with exit code 0 when it is
    done: trained, and (rectify, distill) measured, as the last lines of the scripts do.

    `die_before`: it kills itself before that write to the run folder, counted from 0.
    """
    if number := os.fork():
        return number
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        if die_before is not None:
            count = itertools.count()

            def before(event, args):
                if event not in WRITES or not str(args[0]).startswith(str(out)):
                    return
                if (event != "open" or may_write(args[1], args[2])) and next(count) == die_before:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(before)
        script, flags, _ = TRAININGS[name]
        flags = [*flags, "--out", str(out), *["--resume"] * resume]
        flags += ["--weights", str(out / "weights")] if name == "pretrain" else ["--device", "cpu"]
        ended = script.main(script.flags().parse_args(flags))
        if name != "pretrain":
            evaluate.after_training(ended, name)
        os._exit(0)
    except BaseException:
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        os._exit(1)


def may_write(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if mode is None else bool(set(mode) & set("wax+"))


def ended(number: int) -> str:
    """Wait for a child: "done", "killed" or "failed"."""
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    return {0: "done", -signal.SIGKILL: "killed"}.get(code, "failed")


def weights(name: str, out: Path) -> dict:
    found = {}
    for folder in TRAININGS[name][2]:
        content = runs.load(out / folder / "checkpoint.pt", Path(folder).name, needs={})
        found |= {f"{folder}/{key}": tensor for key, tensor in content["weights"].items()}
    return found


def files_of(name: str, out: Path) -> list[str]:
    """What a training has made, by names; the shared cache of a distillation is its teacher's."""
    cache = out / "toyland/cache"
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*")
                  if path.is_file() and (name != "distill" or not path.is_relative_to(cache)))


def left_running(place: Path, seconds: int = 15) -> list[str]:
    """Processes that a killed training has left in its folder, after some time to notice it (Linux alone)."""
    for _ in range(seconds):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int(process.name) != os.getpid() and os.readlink(process / "cwd") == str(place):
                    found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
            except OSError:                     # it has ended meanwhile, or is somebody else's
                continue
        if not found:
            break
        time.sleep(1)
    return found


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(tensor.equal(found[key])
                                                   for key, tensor in expected.items())


def prepare(name: str, out: Path, teacher: Path | None) -> Path:
    """A run folder to start in: empty, or with the rectification that a distillation continues from."""
    out.mkdir(parents=True)
    if name == "distill":
        (out / "toyland").mkdir()
        (out / "toyland/rectify").symlink_to(teacher / "toyland/rectify")
        (out / "toyland/cache").symlink_to(teacher / "toyland/cache")
    return out


def crash(kills: int, writes: int, seed: int) -> dict:
    """Kill each training `kills` times at random moments, then once before every so many `writes`."""
    make_small()
    chance, found = random.Random(seed), {}
    place = Path(tempfile.mkdtemp(prefix="crash"))              # stays where it is if anything went wrong
    os.chdir(place)                                             # data/toyland is drawn here
    for name in TRAININGS:
        whole, log = prepare(name, place / name / "whole", place / "rectify/whole"), place / f"{name}.log"
        for _ in range(2):              # the first draws the scenes; the second tells how long a run takes
            start = time.monotonic()
            if ended(child(name, whole, log, resume=False)) != "done":
                raise SystemExit(log.read_text())
            seconds = time.monotonic() - start
        expected, files = weights(name, whole), files_of(name, whole)
        counts = {"seconds": round(seconds, 2), "killed": 0, "resumed to other bits": 0,
                  "killed before a write": 0}
        for case in itertools.count():
            if counts["killed"] >= kills and not writes:
                break
            out = prepare(name, place / name / str(case), place / "rectify/whole")
            if counts["killed"] < kills:        # once or twice at any moment from the first to the last
                for again in range(chance.choice((1, 2))):
                    number = child(name, out, log, resume=again > 0)
                    time.sleep(chance.uniform(0, seconds))
                    os.kill(number, signal.SIGKILL)
                    counts["killed"] += ended(number) == "killed"
            else:
                next_write = writes * counts["killed before a write"]
                end = ended(child(name, out, log, resume=False, die_before=next_write))
                if end == "done":               # there are not more writes than that
                    break
                counts["killed before a write"] += end == "killed"
            end = ended(child(name, out, log, resume=True))
            leftovers = [*out.rglob("*.part"), *out.rglob("unfinished"), *out.rglob("*lock")]
            if end != "done" or not same(weights(name, out), expected) or leftovers \
                    or files_of(name, out) != files:
                counts["resumed to other bits"] += 1
                print(f"{name}, case {case}: {end}, left over {leftovers}; see {log}", file=sys.stderr)
        found[name] = counts
    if left := left_running(place):
        raise SystemExit(f"killed trainings have left processes: {left}")
    if not any(counts["resumed to other bits"] for counts in found.values()):
        shutil.rmtree(place)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=18, help="of each training, at random moments")
    parser.add_argument("--writes", type=int, default=5, metavar="N",
                        help="also kill once before every N-th write to the run folder; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    print(json.dumps(crash(arguments.kills, arguments.writes, arguments.seed), indent=2))
