"""The paper's tables, figures and claims: runs what they need, and shows ours beside the paper's.

    python paper/reproduce.py                              all of it in Toyland
    python paper/reproduce.py table2 figure1 --data voc    these alone, for a real dataset, on a GPU
    python paper/reproduce.py table2 --data ade --plan     the commands and the paper's numbers, no training

Everything is made by the scripts of this project, each a process of its own in a folder of its own. What is
finished is taken as it is, so that a reproduction can be stopped (Ctrl-C) and continued by the same command.
Writes runs/reproduce/<data>/: results.md and results.json, of what was asked for last, and the figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(PROJECT)              # modules are named from the project's folder

from harness import errors, flags as common
from paper.reported import (FIGURES, MEASURES, OF_MAFT, RATIOS, SWEEPS, TABLES, THRESHOLDS, WHAT, Cell, Claim,
                            stage_1)


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(WHAT)} (default: all of them)")
    extra = parser.add_argument_group("reproduction")
    extra.add_argument("--seeds", type=common.whole(1), default=3, metavar="N",
                       help="use the seeds 0..N−1 (default: 3)")
    extra.add_argument("--epochs", type=common.whole(1), metavar="N",
                       help="of every training, to be done sooner (default: the recipes')")
    extra.add_argument("--jobs", type=common.whole(1), metavar="N",
                       help="commands at a time, which share the cores (default: one beside a GPU, else one "
                            "a core, at most 8)")
    extra.add_argument("--plan", action="store_true",
                       help="run nothing: list the commands, and show what is there (CLIP is opened)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import contextlib
import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import data
import distill
import evaluate
import rectify
from clip.download import sha256
from datasets import DATASETS, is_folder, labels as ground_truth
from harness import files, machine, runs
from paper import clip_s4, figures, maft, run, scores, systems, tables

TRAINING = {"rectify": rectify, "distill": distill, clip_s4.STAGE: clip_s4}
MEASURING = {"evaluate": "evaluate/metrics.json", "scores": "scores/scores.json",
             "probe": "scores/scores.json", "maft": "maft/metrics.json"}      # maft trains, too
SCRIPTS = {"rectify.py": rectify, "distill.py": distill, "evaluate.py": evaluate, "paper/run.py": run,
           "paper/scores.py": scores, "paper/clip_s4.py": clip_s4, "paper/maft.py": maft}
ALONE = {clip_s4.SYSTEM.name: clip_s4.SYSTEM}       # systems with a script, and one stage, of their own

# ---------------------------------------------------------------------------- what has to be run


@dataclass(frozen=True)
class Job:
    """One command: a stage of a run, with one seed."""
    run: str                            # a system, or a point of a sweep
    stage: str                          # rectify, distill, clip_s4, evaluate, scores, probe: scores --probe
    seed: int

    def __str__(self) -> str:
        return f"{self.run}, {self.stage}, seed {self.seed}"


def system_of(name: str) -> distill.System:
    """The system of a run: a point of a sweep is ReCLIP++ with flags of its own."""
    return ALONE.get(name) or systems.SYSTEMS["reclip++" if name in SWEEPS else name]


def teacher_of(name: str) -> str:
    """The run whose rectification a student learns from: its own, or that of ReCLIP++."""
    teacher = system_of(name).teacher
    return teacher.name if teacher else name


def jobs_of(cell: Cell, seed: int) -> list[Job]:
    """What has to be run, in this order, for one number."""
    name, stage, measure = cell
    if name in ALONE or name == "maft":
        return [Job(name, "maft" if name == "maft" else stage, seed)]
    jobs = []
    if stage in TRAINING and not run.trains_nothing(system_of(name)):
        jobs.append(Job(teacher_of(name), "rectify", seed))
    if stage == "distill":
        jobs.append(Job(name, "distill", seed))
    if measure != "miou":
        return [*jobs, Job(name, "probe" if measure == "probe" else "scores", seed)]
    return jobs if stage in TRAINING else [*jobs, Job(name, "evaluate", seed)]


def plan(cells: list[Cell], seeds: int) -> list[Job]:
    """All jobs for the cells, seed by seed, the stages of a run together; measuring follows its trainings."""
    wanted = {job for seed in range(seeds) for cell in cells for job in jobs_of(cell, seed)}
    wanted -= {replace(job, stage="scores") for job in wanted if job.stage == "probe"}      # it has them too
    order, stages = [*systems.SYSTEMS, *SWEEPS, *ALONE, "maft"], [*TRAINING, *MEASURING]
    return sorted(wanted, key=lambda job: (job.seed, order.index(job.run), stages.index(job.stage)))


def waits_for(job: Job, jobs: list[Job]) -> list[Job]:
    """The jobs that must be finished before: a student's teacher; for what measures, all that is trained."""
    before = {"rectify": (), "distill": ("rectify",)}.get(job.stage, ("rectify", "distill"))
    owners = (job.run, teacher_of(job.run)) if job.stage == "distill" else (job.run,)
    return [other for other in jobs
            if other.seed == job.seed and other.run in owners and other.stage in before]


def cells_of(wanted: list[str], claims: list[Claim]) -> list[Cell]:
    """Every number that the wanted tables, figures and claims need, each once."""
    of_tables = [row.cell for name in wanted if name in TABLES for row in TABLES[name].rows]
    of_figures = [cell for name in wanted for cell in FIGURES.get(name, ())]
    of_claims = [cell for claim in claims for cell in (claim.better, *claim.worse)]
    return [cell for cell in dict.fromkeys([*of_tables, *of_figures, *of_claims]) if cell is not None]


# ---------------------------------------------------------------------------- processes


def start(command: list[str], log: Path, environment: dict) -> subprocess.Popen:
    """A script of this project as a process that writes to `log`.

    In a session of its own: the terminal's Ctrl-C would reach it beside ours, and a second one does not wait.
    """
    with open(log, "wb") as output:
        return subprocess.Popen([sys.executable, str(PROJECT / command[0]), *command[1:]], stdout=output,
                                stderr=subprocess.STDOUT, env=environment, start_new_session=True)


@contextlib.contextmanager
def stop_signals():
    """A list that is filled when this process is to stop: by Ctrl-C, `kill`, or a terminal that closes.

    A signal only leaves its mark, so that none falls between a process's start and the moment we know of it.
    What was ignored stays so (by nohup, or Ctrl-C behind `&`), but the processes must not inherit the latter:
    they are asked to stop by it.
    """
    asked: list[int] = []
    old = {}
    for one in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
        ignored = signal.getsignal(one) is signal.SIG_IGN
        if not ignored or one == signal.SIGINT:
            old[one] = signal.signal(one, (lambda *_: None) if ignored else lambda *_: asked.append(1))
    try:
        yield asked
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask processes to stop, once, so that each saves before it ends, and wait for them."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    if processes:
        with contextlib.suppress(OSError):      # nobody may read it any more
            print("Stopping: waiting for what still runs to save.", flush=True)
    for process in processes:
        process.wait()


# ---------------------------------------------------------------------------- one reproduction


class Reproduction:
    """The runs of one dataset below `<out>/reproduce/<data>/`: what is there, and commands for the rest."""

    def __init__(self, args: argparse.Namespace):
        self.data = args.data or "toyland"
        if is_folder(self.data):
            raise ValueError(f"--data {self.data}: expected toyland or another whose labels are known, "
                             f"{', '.join(DATASETS)}; found a folder. For one of your own run rectify.py, "
                             "distill.py and evaluate.py --labels DIR.")
        self.root = Path(args.out) / "reproduce" / self.data
        known = {"data": self.data, "cache": args.cache or str(self.root / "cache")}
        self.args, self.same = argparse.Namespace(**vars(args) | known), {}

    def open(self) -> None:
        """Open images, words and CLIP: needed to know whether a run was made as it would be made now."""
        self.setup = setup = data.open_setup(self.args)
        self.labels = ground_truth.true_label_files(setup.data, setup.root, setup.split,
                                                    list(setup.evaluation_images))
        recipes = {name: self.recipe_of(Job(name, "rectify", 0)) for name in ("reclip++", *SWEEPS)}
        self.recipe = recipes["reclip++"]
        # a point of a sweep that is the recipe itself needs no run of its own
        self.same = {name: "reclip++" for name in SWEEPS if recipes[name] == self.recipe}

    # ------------------------------------------------------------------------ commands

    def out(self, job: Job) -> Path:
        """What --out names; the run's stages lie in `folder`."""
        return self.root / job.run / str(job.seed)

    def folder(self, job: Job) -> Path:
        return self.out(job) / self.data

    def command(self, job: Job) -> list[str]:
        """A job's script with its flags."""
        given = {"data": self.data, "out": self.out(job), "cache": self.args.cache}
        given |= {name: getattr(self.args, name)
                  for name in ("root", "clip", "activation", "classes", "device", "workers", "precision")}
        trains = job.stage in (*TRAINING, "maft")
        if trains:
            given["epochs"] = self.args.epochs
        if job.stage != "evaluate":
            given["seed"] = job.seed
        words = [word for name, value in given.items() if value is not None
                 for word in (f"--{name}", str(value))]
        words += ["--compile"] * self.args.compile + ["--skip-broken"] * self.args.skip_broken
        words += ["--resume"] * trains + ["--probe"] * (job.stage == "probe")
        if job.stage == "maft":
            return ["paper/maft.py", *words]
        if job.stage in ("scores", "probe"):
            return ["paper/scores.py", *words]
        if job.run in ALONE:
            return [f"paper/{job.stage}.py", *words]
        if system_of(job.run).name == "reclip++":
            return [f"{job.stage}.py", *words, *SWEEPS.get(job.run, ()) * (job.stage == "rectify")]
        return ["paper/run.py", job.run, "--stage", job.stage, *words]

    def typed(self, job: Job) -> str:
        """A job as it is typed: its command; before that of a student, the copy of another run's teacher."""
        commands = [["python", *self.command(job)]]
        if teaching := self.borrowed(job):
            source, target = map(str, teaching)
            commands = [["mkdir", "-p", os.path.dirname(target)], ["cp", "-r", source, target], *commands]
        return "\n".join(map(shlex.join, commands))

    def borrowed(self, job: Job) -> tuple[Path, Path] | None:
        """Of a student whose teacher was trained as another run: where that lies, where it is expected."""
        if job.stage == "distill" and (teacher := teacher_of(job.run)) != job.run:
            return self.folder(replace(job, run=teacher)) / "rectify", self.folder(job) / "rectify"
        return None

    # ------------------------------------------------------------------------ what is there

    def setup_of(self, job: Job) -> data.Setup:
        """The one setup, with the flags of a job."""
        script, *words = self.command(job)
        setup = copy.copy(self.setup)               # with the lists of images that it has made already
        setup.args = SCRIPTS[script].flags().parse_args(words)
        return setup

    def recipe_of(self, job: Job):
        """The recipe that a training would use now."""
        setup, system = self.setup_of(job), system_of(job.run)
        if job.stage != "rectify":
            return data.recipe_for(setup, TRAINING[job.stage].RECIPES, system.student_numbers)
        return rectify.recipe_of(setup, system)

    def settings_of(self, job: Job) -> dict:
        """What a checkpoint must say it was made with, were the training run now."""
        system = system_of(job.run)
        if job.stage == "rectify":
            system = systems.rectification_of(system)
        settings = self.setup_of(job).settings(system, self.recipe_of(job))
        teacher = self.folder(replace(job, run=teacher_of(job.run))) / "rectify/checkpoint.pt"
        if job.stage == "distill" and teacher.exists():
            settings["teacher"] = distill.teacher_number(runs.load(teacher, "rectify"))
        return runs.plain(settings)

    def result(self, job: Job) -> dict[str, dict] | None:
        """What a job has measured, stage → numbers. None where it is not there, or of other checkpoints.

        Raises ValueError for a training that was made with other settings: a folder never mixes two.
        """
        folder = self.folder(job)
        if job.stage == "maft":
            return self.result_of_maft(job, folder / "maft")
        checkpoints = {stage: folder / stage / "checkpoint.pt" for stage in TRAINING}
        if job.stage in TRAINING:
            path = checkpoints[job.stage]
            if not path.exists() or (folder / job.stage / "unfinished").exists():
                return None
            made = runs.load(path, job.stage)["settings"]
            for name, expected in self.settings_of(job).items():
                runs.refuse_unless(path, name, expected, made.get(name))
            found, stages = {job.stage: read_json(folder / job.stage / "metrics.json")}, [job.stage]
        else:
            found = read_json(folder / MEASURING[job.stage])
            stages = ["maskclip", *(stage for stage, path in checkpoints.items() if path.exists())]
        measures = {"scores": MEASURES[2:], "probe": MEASURES[1:]}.get(job.stage, MEASURES[:1])
        fits = all(self.fits(found.get(stage), measures, checkpoints.get(stage)) for stage in stages)
        return found if fits else None

    def result_of_maft(self, job: Job, folder: Path) -> dict[str, dict] | None:
        """The same for the job that trains and measures in one."""
        path, setup = folder / "checkpoint.pt", self.setup_of(job)
        if not path.exists() or (folder / "unfinished").exists():
            return None
        expected, made = runs.plain(maft.settings_of(setup)), runs.load(path, "paper/maft")["settings"]
        for name in expected:
            runs.refuse_unless(path, name, expected[name], made.get(name))
        found = read_json(folder / "metrics.json")
        return found if all(self.fits(found.get(one), tuple(OF_MAFT), path) for one in ("frozen", "tuned")) \
            else None

    def fits(self, numbers, measures: tuple[str, ...], checkpoint: Path | None) -> bool:
        """Whether numbers are of this checkpoint, CLIP, precision, classes, labels and split, unrefined."""
        expected = {"weights": None if checkpoint is None else sha256(checkpoint)[:16],
                    "precision": self.setup.precision, "clip": self.setup.fingerprint,
                    "classes": self.setup.vocabulary.names, "split": self.setup.split,
                    "images": len(self.labels)}
        try:
            made = numbers["fingerprint"]
            return set(measures) <= set(numbers) and not any(made.get("refinements", {}).values()) \
                and all(made[name] == value for name, value in expected.items())
        except (TypeError, KeyError, AttributeError):       # whatever is in the file
            return False

    def values(self, cells: list[Cell], seeds: int) -> dict[Cell, list[float]]:
        """The numbers of every cell that has been measured with every seed."""
        values, results = {}, {}
        for cell in cells:
            of_seeds = []
            for seed in range(seeds):
                name, stage, measure = tables.measured_as(cell, self.same)
                *_, job = jobs_of((name, stage, measure), seed)
                if job not in results:
                    results[job] = self.result(job) or {}
                numbers = results[job].get(stage, {})
                if measure == "probe":
                    numbers, measure = numbers.get("probe", {}), "miou"
                of_seeds.append(numbers.get(measure))
            if None not in of_seeds:
                values[cell] = of_seeds
        return values

    # ------------------------------------------------------------------------ what is not there

    def missing(self, cells: list[Cell], seeds: int) -> list[Job]:
        missing: list[Job] = []
        for job in plan([tables.measured_as(cell, self.same) for cell in cells], seeds):
            # what was measured before a training is measured again behind it
            if self.result(job) is None or job.stage in MEASURING and waits_for(job, missing):
                missing.append(job)
        return missing

    def run(self, jobs: list[Job]) -> list[str]:
        """Run all jobs, each as soon as what it needs is there. Returns what those said that failed.

        What needs one of these is left out, all else is run.
        """
        ground_truth.refuse_other_classes(self.data, self.setup.vocabulary.names)
        if not self.labels:                                 # said before hours of training, not after
            raise ValueError(f"--data {self.data}: expected labels of its {self.setup.split} images to "
                             f"measure against, found none. python datasets/check.py --data {self.data} says "
                             "what is missing.")
        cores = os.cpu_count() or 1
        at_once = self.args.jobs or (1 if self.setup.device.type != "cpu" else min(8, cores))
        environment = {"OMP_NUM_THREADS": str(max(1, cores // at_once)), **os.environ, "TQDM_DISABLE": "1"}
        print(f"{len(jobs)} commands to run, {at_once} at a time; their output goes to {self.root}/*/*/*.log")
        waiting, running, lost, failed, begun = list(jobs), {}, [], [], time.monotonic()
        try:
            with stop_signals() as asked:
                while waiting or running:
                    for job in list(waiting):           # in the order of `plan`: what needs it comes later
                        if waits_for(job, lost):
                            waiting.remove(job)
                            lost.append(job)
                    ready = [job for job in waiting if not waits_for(job, [*waiting, *running])]
                    for job in ready[:at_once - len(running)]:
                        waiting.remove(job)
                        running[job] = start(self.command(job), self.prepare(job), environment)
                    for job in [job for job, process in running.items() if process.poll() is not None]:
                        said, error = self.outcome(job, running.pop(job).returncode)
                        print(f"{clock(time.monotonic() - begun):>7}  {job}: {said}", flush=True)
                        if error:
                            lost.append(job)
                            failed.append(error)
                    if asked:
                        raise KeyboardInterrupt("The same command goes on.")
                    time.sleep(0.05)
        finally:
            stop(list(running.values()))
        return failed

    def prepare(self, job: Job) -> Path:
        """The job's folder, with the teacher that its student takes over; returns the path of its log."""
        self.out(job).mkdir(parents=True, exist_ok=True)
        if teaching := self.borrowed(job):
            take_over(*teaching)
        return self.out(job) / f"{job.stage}.log"

    def outcome(self, job: Job, code: int) -> tuple[str, str]:
        """What to say of a command that has ended, and its error ("" where there is none)."""
        log = self.out(job) / f"{job.stage}.log"
        if code:
            text = log.read_text(errors="replace").strip()
            last = " ".join(text[text.rfind("error: ") if "error: " in text else -500:].split())
            return "failed", (f"{job}: expected the command to succeed, found exit code {code}: {last} All "
                              f"it said is in {log}. The command was: python {shlex.join(self.command(job))}")
        if (result := self.result(job)) is None:
            return "failed", (f"{job}: expected numbers of it in {self.folder(job)}, found none. Are there "
                              f"labels of {self.data} to measure against? See {log}.")
        return f"{result[job.stage]['miou']:.1f}" if job.stage in TRAINING else "done", ""


def take_over(source: Path, target: Path) -> None:
    """Copy a finished stage, unless it is there already."""
    there, wanted = target / "checkpoint.pt", source / "checkpoint.pt"
    if there.exists() and sha256(there) == sha256(wanted):
        return
    part = target.with_name(f"{target.name}.part")
    for folder in (part, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, part)
    os.replace(part, target)


def read_json(path: Path) -> dict:
    """{} for a file that is not there or not JSON: it is measured again."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------- figures


def points_of_figure_3(values: dict[Cell, list[float]], recipe: rectify.Recipe) -> dict:
    """What figure 3 is drawn from: means over seeds, with their spread. The recipe is in both curves."""
    where = {f"t={t:g}": [("t", t)] for t in THRESHOLDS} | {f"r={r:.3g}": [("r", r)] for r in RATIOS}
    where["reclip++"] = [("t", recipe.vote_threshold), ("r", recipe.window_ratio)]
    measured: dict = {"t": {}, "r": {}}
    for row in TABLES["figure3"].rows:
        if found := values.get(row.cell):
            for name, x in where.get(row.cell[0], []):
                measured[name][x] = [fmean(found), stdev(found) if len(found) > 1 else 0.0]
    points = {name: [[x, *point] for x, point in of_name.items()] for name, of_name in measured.items()}
    if found := values.get(stage_1("whole-image")):
        points["whole image"] = fmean(found)
    return points


def draw(reproduction: Reproduction, wanted: list[str], values: dict[Cell, list[float]]) -> list[str]:
    """Draw the wanted figures into the reproduction's folder, of seed 0 but figure 3. Returns file names."""
    wanted = [name for name in wanted if all(cell in values for cell in FIGURES[name])]
    ours, reclip = (reproduction.setup_of(Job(name, "rectify", 0)) for name in ("reclip++", "reclip"))
    query, drawn = rectify.query_of(ours), {}
    if "figure1" in wanted:
        stages = evaluate.existing_stages(ours)
        drawn |= figures.figure_1(ours, evaluate.predictors(ours, query, stages), reproduction.labels)
    if "figure3" in wanted:
        points = points_of_figure_3(values, reproduction.recipe)
        if points["t"] and points["r"]:
            drawn["figure3_hypothesis"] = figures.png(figures.hypothesis_figure(points))
    if "figure4" in wanted:
        drawn["figure4_logits"] = figures.figure_4(ours, query, figures.telling_pairs(ours, query))
    if "figure5" in wanted:                                         # the stages of two runs side by side
        columns = evaluate.titled(evaluate.predictors(ours, query, ["maskclip", "rectify", "distill"]))
        [of_reclip] = evaluate.predictors(reclip, query, ["rectify"], systems.SYSTEMS["reclip"]).values()
        order = ["MaskCLIP", "ReCLIP rectified", *list(columns)[1:]]
        columns["ReCLIP rectified"] = of_reclip
        drawn["figure5_results"] = figures.figure_5(ours, {name: columns[name] for name in order},
                                                    reproduction.labels)
    for name, content in drawn.items():
        figures.write(reproduction.root / f"{name}.png", content)
    return sorted(f"{name}.png" for name in drawn)


# ---------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> dict[Cell, list[float]]:
    """Run what is missing for `args.what`, write and print the results, return every cell's numbers."""
    if unknown := [name for name in args.what if name not in WHAT]:
        raise ValueError(f"expected one or more of {', '.join(WHAT)}, found {', '.join(unknown)}.")
    reproduction = Reproduction(args)
    files.refuse_folders(reproduction.root, "results.md", "results.json")
    reproduction.open()
    made = {"data": reproduction.data, "what": [name for name in WHAT if name in args.what or not args.what],
            "seeds": args.seeds, "epochs": args.epochs, "precision": args.precision,
            "versions": machine.versions(), "same": reproduction.same}
    cells = cells_of(made["what"], tables.claims_of(made))
    jobs, failed, drawn = reproduction.missing(cells, args.seeds), [], []
    if args.plan:
        print(*map(reproduction.typed, jobs), sep="\n")
    elif jobs:
        failed = reproduction.run(jobs)
    values = reproduction.values(cells, args.seeds)
    if not args.plan:
        drawn = draw(reproduction, [name for name in made["what"] if name in FIGURES], values)
        tables.write(reproduction.root / "results.json", made, values, drawn)
    print(f"\n{tables.page(made, values)}")
    if not args.plan:
        print(f"Wrote {reproduction.root}/: {', '.join(['results.md', 'results.json', *drawn])}")
    if failed:
        raise ValueError(f"expected {len(jobs)} commands to succeed, found {len(failed)} that failed; all "
                         "that needs none of them is done, and the same command tries them again. The first "
                         f"was {failed[0]}")
    return values


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
