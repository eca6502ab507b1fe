"""Run folders, checkpoints, and the frame around a training loop.

A stage writes to `<out>/<data>/<stage>/`:

    checkpoint.pt   the trained weights, and `settings`: system, recipe, classes, CLIP's fingerprint, seed, …
    recipe.json     every number that the run used          log.jsonl      one line per log interval
    metrics.json    mIoU and friends, with a fingerprint    preview.png    a picture sheet
    unfinished/     a run that has not ended: its recipe, its log, and state.pt (with optimiser and step)

A run is unfinished as long as `unfinished/state.pt` is there, from its first step on; it is finished when
`checkpoint.pt` is there without it. So what stands beside a checkpoint is of the same run, and a killed run
costs nothing of the one before it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
import typing
from pathlib import Path

from harness import processes
from harness.files import locked, read, refuse_folders, save, write_atomically, write_json
from harness.machine import RANK

# ------------------------------------------------------------------------------------------ run folders


def run_folder(out: str, data: str, stage: str) -> Path:
    """`<out>/<data>/<stage>`; a folder of images gives its own name."""
    return Path(out) / os.path.basename(os.path.abspath(data)) / stage


def find(out: str, data: str | None, *stages: str) -> dict | None:
    """The checkpoint that is meant: in the run of `data`, else in the newest run under `out`, of the first of
    `stages` that was trained there. None if there is none."""
    of_data = [Path(run_folder(out, data, stage), "checkpoint.pt") for stage in stages] if data else \
        [path for stage in stages for path in Path(out).glob(f"*/{stage}/checkpoint.pt")]
    if not (there := [path for path in of_data if path.exists()]):
        return None
    run = max(there, key=lambda path: path.stat().st_mtime_ns).parent.parent
    stage = next(stage for stage in stages if (run / stage / "checkpoint.pt").exists())
    return load(run / stage / "checkpoint.pt", stage)


# ------------------------------------------------------------------------------------------ checkpoints

SETTINGS = {"system": dict, "data": str, "root": str, "clip_name": str, "clip": str, "synonyms": list,
            "recipe": dict, "activation": str, "seed": int, "precision": str, "images": list}


def load(path: Path, stage: str, needs: dict[str, type] = SETTINGS) -> dict:
    """A checkpoint of `stage` whose settings have what it `needs`, with its "path". Raises FileNotFoundError,
    or ValueError when it is damaged, of another stage or of another version of this project."""
    command = f"python {stage}.py" if stage in ("rectify", "distill") else "the command that made it"
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none. Make it with: {command}")
    again = f"Remove it and make it again with: {command}"
    try:
        content = read(path)
    except Exception as error:
        raise ValueError(f"{path}: expected a checkpoint, found a damaged file ({type(error).__name__}). "
                         f"{again}") from error
    found = content.get("stage") if isinstance(content, dict) else type(content).__name__
    if found != stage:
        raise ValueError(f"{path}: expected a checkpoint of the stage {stage!r}, found {found!r}. {again}")
    settings, weights = content.get("settings"), content.get("weights")
    if not isinstance(settings, dict) or not isinstance(weights, dict):
        raise ValueError(f"{path}: expected settings and weights in the checkpoint, found none. {again}")
    wrong = [name for name, kind in needs.items() if not isinstance(settings.get(name), kind)]
    if wrong:
        raise ValueError(f"{path}: expected a checkpoint as this version writes it, found no "
                         f"{', '.join(wrong)} of the expected kind. {again}")
    not_finite = [str(name) for name, tensor in weights.items()
                  if not hasattr(tensor, "isfinite") or not tensor.isfinite().all()]
    if not_finite:
        raise ValueError(f"{path}: expected tensors of finite weights, found others, NaN or infinity in "
                         f"{', '.join(not_finite[:4])}. {again}")
    return content | {"path": path}


def load_weights(module, checkpoint: dict) -> None:
    """Put a checkpoint's weights into a module, strictly. Raises ValueError when they are not those of such a
    module."""
    try:
        module.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        raise ValueError(f"{checkpoint['path']}: expected the weights of {type(module).__name__} for these "
                         f"classes and this CLIP, found others ({' '.join(str(error).split())[:300]}). Train "
                         "it again.") from error


def recipe_in(checkpoint: dict, kind: type, key: str = "recipe"):
    """The recipe that a checkpoint was trained with, as the dataclass `kind`. Raises ValueError for one with
    more or fewer fields, and for a word that a Literal field does not know."""
    recipe, kinds = checkpoint["settings"].get(key), typing.get_type_hints(kind)
    other = sorted(set(recipe) ^ set(kinds)) if isinstance(recipe, dict) else [key]
    if not other:
        other = [name for name, of in kinds.items()
                 if typing.get_origin(of) is typing.Literal and recipe[name] not in typing.get_args(of)]
    if other:
        raise ValueError(f"{checkpoint['path']}: expected the recipe of this version, found another one, "
                         f"with other fields or words: {', '.join(other)}. Train it again.")
    return kind(**{name: tuple(value) if isinstance(value, list) else value
                   for name, value in recipe.items()})


def refuse_other_system(checkpoint: dict, name: str) -> None:
    """Raise ValueError, with the command to use, when a checkpoint was made by another system than `name`."""
    made_by = checkpoint["settings"]["system"]
    if made_by.get("name") != name:
        raise ValueError(f"{checkpoint['path']}: expected a checkpoint of {name}, found one of "
                         f"{made_by.get('name')}, whose parts are not known here. Use: "
                         f"{made_by.get('command')}; or keep both, with another --out.")


def refuse_unless(path: Path, what: str, expected, found) -> None:
    """Raise ValueError when a checkpoint was made with another `what` (class list, CLIP, recipe, …)."""
    if found == expected:
        return
    if isinstance(expected, dict) and isinstance(found, dict):            # only what differs is worth reading
        keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        expected, found = ({key: side.get(key) for key in keys} for side in (expected, found))
    short = [str(value) if len(str(value)) < 300 else f"{str(value)[:300]}…" for value in (expected, found)]
    raise ValueError(f"{path} was made with another {what}. Expected {short[0]}; found {short[1]}. Use the "
                     "settings it was made with, or train it again (another --out keeps both).")


def plain(content):
    """Tuples as lists, keys as strings: what JSON and a checkpoint give back, so that both compare equal."""
    return json.loads(json.dumps(content))


# ------------------------------------------------------------------------------- the frame of a training loop


class Training:
    """The frame around a training loop: header, progress bar, log, saving, stopping, resuming.

        with Training(folder, stage, settings, header, model, optimizer, ...) as training:
            for step in range(training.first_step, steps):
                loss = …
                training.descend(loss, rate, ids)
                training.done(loss=loss)

    When the block ends the run is finished. It is saved before the first step, after every epoch, every
    `save_every` minutes, and on Ctrl-C (which is taken between two steps, never inside one). `also` names
    what else has a state beside model and optimizer: anything with `state_dict` and `load_state_dict`.
    """

    def __init__(self, folder: Path, stage: str, settings: dict, header: dict, model, optimizer, *,
                 steps: int, steps_per_epoch: int, resume: bool, save_every: float = 10.0,
                 also: dict | None = None):
        self.folder, self.stage, self.settings, self.header = folder, stage, plain(settings), plain(header)
        self.model, self.optimizer, self.also = model, optimizer, also or {}
        self.steps, self.per_epoch, self.resume = steps, steps_per_epoch, resume
        self.save_every = 60 * save_every
        self.unseen = []                        # (step, its loss, rate, ids) since the last look at them
        self.look_every = 1 if optimizer.param_groups[0]["params"][0].device.type == "cpu" else 50
        self.unfinished, self.first_step, self.log, self.stop_asked = folder / "unfinished", 0, [], False
        self.open = contextlib.ExitStack()

    def __enter__(self):
        from tqdm import tqdm
        refuse_folders(self.folder, "checkpoint.pt", "recipe.json", "log.jsonl", "metrics.json",
                       "preview.png")
        refuse_folders(self.unfinished, "state.pt", "checkpoint.pt", "recipe.json", "log.jsonl")
        state = self.unfinished / "state.pt"
        if self.resume:
            self.load(state if state.exists() else self.folder / "checkpoint.pt")
        self.step, self.was_finished = self.first_step, self.is_finished()
        processes.wait()                        # until all have read what the first will replace
        if self.was_finished:
            if self.unfinished.exists() and RANK == 0:      # killed between the last two lines of `finish`
                with locked(self.unfinished / "lock", wait=False):
                    shutil.rmtree(self.unfinished)
            return self
        if RANK == 0:
            self.begin()
        self.bar = self.open.enter_context(tqdm(total=self.steps, initial=self.first_step, unit="step",
                                                desc=self.stage))
        ask = self.ask_to_stop if RANK == 0 else signal.SIG_IGN         # the first saves, and ends for all
        self.open.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, ask))
        self.started = time.monotonic()
        return self

    def begin(self) -> None:
        """Take the folder, say what will be done, and save the first state."""
        state = self.unfinished / "state.pt"
        self.unfinished.mkdir(parents=True, exist_ok=True)
        self.open.enter_context(locked(self.unfinished / "lock", wait=False))
        if state.exists() and not self.resume:
            print(f"An unfinished run is given up, and a new one begun: {self.unfinished}")
        if (self.folder / "checkpoint.pt").exists():
            print(f"{self.folder}/checkpoint.pt is of an earlier run, and is replaced when this one ends. "
                  "Another --out keeps both.")
        for name, value in self.header.items():
            print(f"{name:>10}  {value}")
        write_json(self.unfinished / "recipe.json", self.header)
        write_atomically(self.unfinished / "log.jsonl",
                         lambda file: file.write("".join(json.dumps(line) + "\n"
                                                         for line in self.log).encode()))
        self.save("state.pt")

    def load(self, path: Path) -> None:
        """Go on from `path`. Raises ValueError when it was made with other settings, or does not fit."""
        if not path.exists():
            print(f"Nothing to resume in {self.folder}: starting from the beginning.")
            return
        content = load(path, self.stage, needs={})      # all of its settings are compared
        for name, value in self.settings.items():
            refuse_unless(path, name, expected=value, found=content["settings"].get(name))
        load_weights(self.model, content)
        self.first_step = self.steps
        if path.name == "checkpoint.pt":
            print(f"{path} is finished already.")
            return
        try:
            self.first_step, self.log = int(content["step"]), list(content["log"])
            self.optimizer.load_state_dict(content["optimizer"])
            for name, owner in self.also.items():
                owner.load_state_dict(content["also"][name])
            fits = 0 <= self.first_step <= self.steps and all(
                tensor.shape == parameter.shape for parameter, state in self.optimizer.state.items()
                for tensor in state.values() if tensor is not None and tensor.ndim)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError(f"{path}: expected the state of an unfinished run of {self.steps} steps, found "
                             "another content. Remove it and train again.")

    def is_finished(self) -> bool:
        return self.first_step == self.steps and not (self.unfinished / "state.pt").exists()

    def ask_to_stop(self, *_) -> None:
        if self.stop_asked:                     # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt("With --resume the same command goes on from what was saved last.")
        self.stop_asked = True

    def descend(self, loss, rate: float | None, ids) -> None:
        """One step of the optimiser at a learning rate (None: as it is set). `ids` names the images that the
        loss came from."""
        self.unseen.append((self.step, loss.detach(), rate, ids))
        if len(self.unseen) >= self.look_every:
            self.look()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def look(self) -> None:
        """Raise ValueError for a step whose loss was NaN or infinite. Reading a number waits for the GPU, so
        there it is done every 50 steps and before every save: what is saved is good. A CPU looks at every
        loss, before it can touch a weight."""
        import torch
        losses = torch.stack([loss for _, loss, _, _ in self.unseen]).tolist()
        for (step, _, rate, ids), loss in zip(self.unseen, losses):
            if not math.isfinite(loss):
                smaller = "with a smaller one in the optimizer of this script" if rate is None else \
                    f"with --learning-rate {rate / 10:.1g}"
                raise ValueError(
                    f"the loss of step {step} is {loss}, expected a finite number. The images were "
                    f"{', '.join(ids)}. The last good state stays in {self.unfinished}. A smaller learning "
                    f"rate usually mends it: start anew {smaller} and another --out, which keeps this run.")
        self.unseen.clear()

    def done(self, **losses) -> None:
        """Book a finished step, losses as tensors: log it, and save where it is time to."""
        self.bar.update()
        if self.step % max(1, self.steps // 200) == 0 or self.step + 1 == self.steps:
            losses = {name: processes.mean(loss).item() for name, loss in losses.items()}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            self.log.append({"step": self.step, **losses, "rate": self.optimizer.param_groups[0]["lr"],
                             "seconds": round(time.monotonic() - self.started, 1)})
            if RANK == 0:
                with open(self.unfinished / "log.jsonl", "a") as file:
                    file.write(json.dumps(self.log[-1]) + "\n")
        self.step += 1
        late = RANK == 0 and time.monotonic() - self.saved > self.save_every
        if self.step % self.per_epoch == 0 or self.stop_asked or late:
            self.save("state.pt")
        if self.stop_asked:
            raise KeyboardInterrupt(f"Saved after step {self.step} of {self.steps}: the same command and "
                                    "--resume goes on.")

    def save(self, name: str) -> None:
        if self.unseen:
            self.look()
        if RANK > 0:
            return
        content = {"stage": self.stage, "settings": self.settings, "step": self.step,
                   "weights": self.model.state_dict()}
        if name == "state.pt":
            content |= {"optimizer": self.optimizer.state_dict(), "log": self.log,
                        "also": {name: owner.state_dict() for name, owner in self.also.items()}}
        save(self.unfinished / name, content)
        self.saved = time.monotonic()

    def __exit__(self, kind, *_) -> None:
        with self.open:                         # whatever happens, signal, bar and lock are given back
            if kind is None and not self.was_finished:
                self.save("checkpoint.pt")
                if RANK == 0:
                    self.finish()
                processes.wait()                # what comes next reads the checkpoint

    def finish(self) -> None:
        """Put checkpoint, recipe and log of this run in the place of the earlier one's."""
        for name in ("metrics.json", "preview.png"):            # of the checkpoint that is replaced
            (self.folder / name).unlink(missing_ok=True)
        for name in ("checkpoint.pt", "recipe.json", "log.jsonl"):
            os.replace(self.unfinished / name, self.folder / name)
        (self.unfinished / "state.pt").unlink()                 # from here on the run is finished
        shutil.rmtree(self.unfinished)
