"""The paper's tables, figures and claims: runs what they need, and shows ours beside the paper's.

    python paper/reproduce.py                              all of it in Toyland; with --seeds 2 --epochs 4 in 67 minutes on two cores
    python paper/reproduce.py table2 figure1 --data voc    these alone, for a real dataset, on a GPU
    python paper/reproduce.py table2 --data ade --plan     the commands and the paper's numbers; trains nothing

Everything is made by the scripts of this project, each run in a folder of its own. What is finished is taken as it is, so
that a reproduction can be stopped (Ctrl-C) and continued by the same command. Writes runs/reproduce/<data>/: results.md and
results.json, of what was asked for last, and the figures. What the paper says stands in numbers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors
from harness import flags as common
from paper.numbers import CLAIMS, FIGURES, RATIOS, RECTIFIED, RUNS, TABLES, THRESHOLDS, Cell, Claim, Table, stage_1

WHAT = (*TABLES, *(name for name in FIGURES if name not in TABLES))


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(WHAT)} (default: all of them)")
    extra = parser.add_argument_group("reproduction")
    extra.add_argument("--seeds", type=common.whole(1), default=3, metavar="N", help="use the seeds 0..N−1")
    extra.add_argument("--epochs", type=common.whole(1), metavar="N",
                       help="of every training, to be done sooner (default: the recipes')")
    extra.add_argument("--jobs", type=common.whole(1), metavar="N",
                       help="trainings at a time, which share the cores (default: one beside a GPU, else one a core, at most 8)")
    extra.add_argument("--plan", action="store_true",
                       help="train and measure nothing: list the commands, and show what is there (CLIP is opened)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import numpy as np

import data
import distill
import evaluate
import rectify
from clip.download import sha256
from datasets import DATASETS, is_folder
from datasets import labels as ground_truth
from harness import files, machine, runs
from paper import figures, run, systems

STAGES = ("rectify", "distill")

# ------------------------------------------------------------------------------------------ what has to be run


@dataclass(frozen=True)
class Job:
    """One command: a stage or a measure of a run, with one seed. `probe` is scores.py with --probe."""
    run: str                                # a name in RUNS
    script: str                             # rectify, distill, evaluate, scores, probe
    seed: int

    def __str__(self) -> str:
        return f"{self.run}, {self.script}, seed {self.seed}"


def jobs_of(cell: Cell, seed: int) -> list[Job]:
    """What has to be run, in this order, for one number."""
    name, stage, measure = cell
    jobs = [Job(RUNS[name].teacher, "rectify", seed)] if RUNS[name].teacher else []
    if "rectify" in RUNS[name].stages and stage in STAGES:
        jobs.append(Job(name, "rectify", seed))
    if stage == "distill":
        jobs.append(Job(name, "distill", seed))
    if measure == "probe":
        return [*jobs, Job(name, "probe", seed)]
    if measure != "miou":
        return [*jobs, Job(name, "scores", seed)]
    return jobs if stage in STAGES else [*jobs, Job(name, "evaluate", seed)]


def plan(cells: list[Cell], seeds: int) -> list[Job]:
    """All jobs for the cells, seed by seed, trainings of the same run together; measuring comes after its trainings."""
    wanted = {job for seed in range(seeds) for cell in cells for job in jobs_of(cell, seed)}
    wanted -= {replace(job, script="scores") for job in wanted if job.script == "probe"}          # the probe has them too
    order, scripts = list(RUNS), ("rectify", "distill", "evaluate", "scores", "probe")
    return sorted(wanted, key=lambda job: (job.seed, order.index(job.run), scripts.index(job.script)))


def waits_for(job: Job, jobs: list[Job]) -> list[Job]:
    """The jobs that must be finished before: a student's teacher, and for what measures all that is trained."""
    before = {"rectify": (), "distill": ("rectify",)}.get(job.script, ("rectify", "distill"))
    owners = (job.run, RUNS[job.run].teacher) if job.script == "distill" else (job.run,)
    return [other for other in jobs
            if other.seed == job.seed and other.run in owners and other.script in before]


def cells_of(wanted: list[str], claims: list[Claim]) -> list[Cell]:
    """Every number that the wanted tables, figures and claims need, each once."""
    of_tables = [row.cell for name in wanted if name in TABLES for row in TABLES[name].rows]
    of_figures = [cell for name in wanted for cell in FIGURES.get(name, ())]
    of_claims = [cell for claim in claims for cell in (claim.better, *claim.worse) if cell is not None]
    return list(dict.fromkeys([*of_tables, *of_figures, *of_claims]))


# ------------------------------------------------------------------------------------------ processes


class Children:
    """Processes that are asked to stop, once, when this one is stopped: so each saves before it ends.

    They run in sessions of their own: the terminal's Ctrl-C would reach them beside ours, and the second one does not wait.
    `kill` and a closed terminal stop like Ctrl-C, the latter not under nohup.
    """

    def __init__(self):
        self.running: list[subprocess.Popen] = []
        self.stopping, self.lock = False, threading.Lock()

    def run(self, command: list[str], output, environment: dict) -> int:
        """Run a command to its end and return its exit code; for several threads at a time."""
        with self.lock:                         # no process starts between the last signal and the end
            if self.stopping:
                return 130
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment,
                                       start_new_session=True)
            self.running.append(process)
        code = process.wait()
        with self.lock:
            self.running.remove(process)
        return code

    def __enter__(self) -> Children:
        signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.old = {one: signal.signal(one, signal.default_int_handler) for one in signals
                    if signal.getsignal(one) is not signal.SIG_IGN}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # begun with `&` in a script; the processes would inherit it
            self.old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        return self

    def __exit__(self, kind, *_) -> None:
        for one, handler in self.old.items():
            signal.signal(one, handler)
        if kind is None:
            return
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):      # nobody may read it any more
            print("Stopping: waiting for what still runs to save.", flush=True)


# ------------------------------------------------------------------------------------------ one reproduction


class Reproduction:
    """The runs of one dataset below `<out>/reproduce/<data>/`: what is there, and the commands for what is not."""

    def __init__(self, args: argparse.Namespace):
        self.data = args.data or "toyland"
        if is_folder(self.data):
            raise ValueError(f"--data {self.data}: expected a dataset whose labels are known, {', '.join(DATASETS)}; found "
                             "a folder. For one of your own run rectify.py, distill.py and evaluate.py --labels DIR.")
        self.args, self.root = args, Path(args.out) / "reproduce" / self.data
        self.cache = args.cache or str(self.root / "cache")
        self.setup: data.Setup | None = None
        self.same: dict[str, str] = {}      # a point of a sweep that is the recipe itself: no run of its own

    def open(self) -> None:
        """Open images, words and CLIP: to know whether a run was made with the numbers that would be used now."""
        self.setup = data.open_setup(argparse.Namespace(**vars(self.args) | {"data": self.data, "cache": self.cache}))
        setup, made_of = self.setup, {
            name: (run.system, rectify.recipe_of(self.setup_of(Job(name, "rectify", 0)), systems.SYSTEMS[run.system]))
            for name, run in RUNS.items() if "rectify" in run.stages}
        self.recipe = made_of["reclip++"][1]
        self.labels = len(ground_truth.true_label_files(setup.data, setup.root, list(setup.validation_images)))
        self.same = {name: "reclip++" for name in made_of if name != "reclip++" and made_of[name] == made_of["reclip++"]}

    def measured_as(self, cell: Cell) -> Cell:
        """The cell itself, or that of the recipe where its run is no other."""
        name, stage, measure = cell
        return self.same.get(name, name), stage, measure

    def asks(self, claim: Claim) -> bool:
        """Whether a claim can be asked of this dataset.

        Not where the paper's own numbers deny it (ReCLIP's on Cityscapes), nor where the recipe's t or r is itself an end of
        the sweep: then nothing lies on its other side.
        """
        better, *worse = [cell and self.measured_as(cell) for cell in (claim.better, *claim.worse)]
        return better not in worse and not in_paper(claim, self.data).startswith("−")

    def out(self, job: Job) -> Path:
        return self.root / job.run / str(job.seed)

    def folder(self, job: Job) -> Path:
        return runs.run_folder(str(self.out(job)), self.data, "scores" if job.script == "probe" else job.script)

    def setup_of(self, job: Job) -> data.Setup:
        """What a job works on: the images and the CLIP that are open here, with its own flags."""
        script, *arguments = self.command(job)
        own = replace(self.setup, args=run.flags().parse_args(arguments) if script == "paper/run.py" else
                      {"rectify.py": rectify, "distill.py": distill}[script].flags().parse_args(arguments))
        own.training_images, own.fingerprint = self.setup.training_images, self.setup.fingerprint
        return own

    def command(self, job: Job) -> list[str]:
        """Script and flags of a job: ReCLIP++ by its own scripts, other systems by paper/run.py."""
        of_run = RUNS[job.run]
        given = ["--data", self.data, "--out", str(self.out(job)), "--cache", self.cache]
        for name in ("root", "clip", "classes", "device", "workers", "activation"):
            if getattr(self.args, name) is not None:
                given += [f"--{name}", str(getattr(self.args, name))]
        if self.args.precision != "fp32":
            given += ["--precision", self.args.precision]
        given += [f"--{name.replace('_', '-')}" for name in ("compile", "skip_broken") if getattr(self.args, name)]
        if job.script in ("scores", "probe"):
            return ["paper/scores.py", *given, "--seed", str(job.seed), *["--probe"] * (job.script == "probe")]
        if job.script in STAGES:
            given += ["--seed", str(job.seed), "--resume"]
            if self.args.epochs is not None:
                given += ["--epochs", str(self.args.epochs)]
        if of_run.system != "reclip++":
            return ["paper/run.py", of_run.system, "--stage", job.script, *given]
        return [f"{job.script}.py", *given, *(of_run.flags if job.script == "rectify" else ())]

    def commands(self, job: Job) -> list[str]:
        """A job as it is typed: its command, and before that of a student the copy of a teacher from another folder."""
        taken = []
        if job.script == "distill" and (teacher := RUNS[job.run].teacher):
            source, target = (self.folder(Job(name, "rectify", job.seed)) for name in (teacher, job.run))
            taken = [shlex.join(["mkdir", "-p", str(target.parent)]), shlex.join(["cp", "-r", str(source), str(target)])]
        return [*taken, f"python {shlex.join(self.command(job))}"]

    # -------------------------------------------------------------------------------------- what is there

    def finished(self, job: Job) -> bool:
        """Whether a job's result is there. Raises ValueError for a training that was made with other numbers."""
        return self.result(job) is not None

    def result(self, job: Job) -> dict | None:
        """What a finished job measured: the metrics of a trained stage, or those of every stage; None if it is not there."""
        if job.script not in STAGES:
            return self.measured(job)
        folder = self.folder(job)
        path = folder / "checkpoint.pt"
        if not path.exists() or (folder / "unfinished").exists():
            return None
        made, setup, system = runs.load(path, job.script), self.setup_of(job), systems.SYSTEMS[RUNS[job.run].system]
        setup.refuse_misfit(made)
        recipe = rectify.recipe_of(setup, system) if job.script == "rectify" else \
            data.recipe_for(setup, distill.RECIPES, system.student_numbers)
        of_run, expected = made["settings"], setup.settings(system, recipe)
        runs.refuse_other_system(made, system.name)
        for name in ("recipe", "precision", "seed"):
            runs.refuse_unless(path, name, expected=runs.plain(expected[name]), found=of_run[name])
        if of_run["images"] != expected["images"]:      # told by their number: there are thousands
            runs.refuse_unless(path, "list of training images", expected=f"{len(expected['images'])} images",
                               found=f"{len(of_run['images'])}, not the same ones")
        teacher = self.folder(Job(RUNS[job.run].teacher or job.run, "rectify", job.seed)) / "checkpoint.pt"
        if job.script == "distill" and teacher.exists():
            runs.refuse_unless(path, "teacher", expected=distill.teacher_number(runs.load(teacher, "rectify")),
                               found=of_run["teacher"])
        metrics = read_json(folder / "metrics.json")
        return metrics if self.fits(metrics, path) else None

    def measured(self, job: Job) -> dict | None:
        """What evaluate.py or scores.py wrote, if it is of these very checkpoints."""
        found = read_json(self.folder(job) / ("metrics.json" if job.script == "evaluate" else "scores.json"))
        for stage in ("maskclip", *STAGES):
            folder, of_stage = runs.run_folder(str(self.out(job)), self.data, stage), found.get(stage)
            checkpoint = folder / "checkpoint.pt"
            if stage in STAGES and not checkpoint.exists():
                continue
            if not self.fits(of_stage, checkpoint) or job.script == "probe" and "probe" not in of_stage:
                return None
        return found

    def fits(self, metrics, checkpoint: Path) -> bool:
        """Whether metrics are of this checkpoint, CLIP, classes and as many labels, in this precision, without refinements."""
        setup = self.setup
        try:
            made = metrics["fingerprint"]
            expected = {"weights": sha256(checkpoint)[:16] if checkpoint.exists() else None, "precision": setup.precision,
                        "clip": setup.fingerprint, "classes": setup.vocabulary.names, "images": self.labels}
            refined = any(made.get("refinements", {}).values())
            return not refined and all(made[name] == value for name, value in expected.items())
        except (TypeError, KeyError, AttributeError):
            return False

    def value(self, cell: Cell, seed: int) -> float | None:
        """One number; None where it has not been measured."""
        _, stage, measure = cell
        *_, job = jobs_of(self.measured_as(cell), seed)
        if (result := self.result(job)) is None:
            return None
        of_stage = result if job.script in STAGES else result[stage]
        return of_stage["probe"]["miou"] if measure == "probe" else of_stage[measure]

    # -------------------------------------------------------------------------------------- what is not there

    def missing(self, cells: list[Cell]) -> list[Job]:
        cells = [self.measured_as(cell) for cell in cells]
        missing: list[Job] = []
        for job in plan(cells, self.args.seeds):        # what was measured before a training is measured again behind it
            if not self.finished(job) or job.script not in STAGES and waits_for(job, missing):
                missing.append(job)
        return missing

    def run(self, jobs: list[Job]) -> list[str]:
        """Run all jobs; returns what those that failed said. Whatever needs one of these is left out, all else is run."""
        # Before hours of training: is there anything to measure against?
        ground_truth.refuse_other_classes(self.setup.data, self.setup.vocabulary.names)
        if not self.labels:
            raise ValueError(f"--data {self.data}: expected labels of its validation images to measure against, found none. "
                             f"python datasets/check.py --data {self.data} says what is missing.")
        at_once = self.args.jobs or (1 if self.setup.device.type != "cpu" else min(8, os.cpu_count() or 1))
        print(f"{len(jobs)} commands to run, {at_once} at a time; what they print goes to {self.root}/*/*/*.log")
        started, failed = time.monotonic(), {}
        for job, outcome in self.in_processes(jobs, at_once):
            before = f"{clock(time.monotonic() - started):>7}  {job}"
            if isinstance(outcome, ValueError):
                failed[job] = str(outcome)
                print(f"{before}: failed", flush=True)
            else:
                said = f": {self.result(job)['miou']:.1f}" if job.script in STAGES else ""
                print(f"{before} ({clock(outcome)}){said}", flush=True)
        return list(failed.values())

    def in_processes(self, jobs: list[Job], at_once: int) -> Iterator[tuple[Job, float | ValueError]]:
        """Run several at a time, each as soon as what it needs is there: yields each with its seconds, or what went wrong."""
        threads = str(max(1, (os.cpu_count() or 1) // at_once))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}
        waiting, running, failed = list(jobs), {}, []
        with ThreadPoolExecutor(at_once) as pool, Children() as children:       # first asked to stop, then waited for
            while waiting or running:
                for job in [job for job in waiting if waits_for(job, failed)]:
                    waiting.remove(job)
                    failed.append(job)
                unfinished = [*waiting, *running.values()]
                for job in [job for job in waiting if not waits_for(job, unfinished)][:at_once - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(self.in_a_process, job, environment, children)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except ValueError as error:
                        failed.append(job)
                        yield job, error

    def in_a_process(self, job: Job, environment: dict, children: Children) -> float:
        """Run one command to its end and return its seconds. Raises ValueError with its last words when it fails."""
        script, *arguments = self.command(job)
        log, started = self.prepare(job), time.monotonic()
        with open(log, "wb") as file:
            code = children.run([sys.executable, str(Path(__file__).parents[1] / script), *arguments], file, environment)
        if code:
            text = log.read_text(errors="replace").strip()
            last_words = " ".join(text[text.rfind("error: ") if "error: " in text else -500:].split())
            raise ValueError(f"{job}: expected the command to succeed, found exit code {code}: {last_words} All it said is in {log}. "
                             f"The command was: python {shlex.join([script, *arguments])}")
        self.refuse_unfinished(job)
        return time.monotonic() - started

    def prepare(self, job: Job) -> Path:
        """The job's folder, with the teacher that its student takes over; returns the path of its log."""
        self.out(job).mkdir(parents=True, exist_ok=True)
        if job.script == "distill" and (teacher := RUNS[job.run].teacher):
            take_over(self.folder(Job(teacher, "rectify", job.seed)), self.folder(replace(job, script="rectify")))
        return self.out(job) / f"{job.script}.log"

    def refuse_unfinished(self, job: Job) -> None:
        if not self.finished(job):
            raise ValueError(f"{job}: expected numbers in {self.folder(job)}, found none. Are there labels of {self.data} to "
                             f"measure against? See {self.out(job) / job.script}.log.")


def take_over(source: Path, target: Path) -> None:
    """Copy a finished stage, unless it is there already."""
    if (target / "checkpoint.pt").exists() and sha256(target / "checkpoint.pt") == sha256(source / "checkpoint.pt"):
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


# ------------------------------------------------------------------------------------------ what is shown

NAMES = {"voc": "VOC", "context": "Context", "ade": "ADE20K", "cityscapes": "Cityscapes", "coco": "COCO-Stuff 27"}


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """`46.7 ± 1.2`: mean and standard deviation over seeds; the number alone where there is one."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}".replace("-", "−")


def table_lines(table: Table, values: dict[Cell, list[float]], data: str) -> list[str]:
    """A table as Markdown: the paper's columns (of `data`, in Toyland of all datasets that the table knows) and ours."""
    of_paper = "context" if data == "context-voc-first" else data
    columns = [name for name in NAMES if any(name in row.paper for row in table.rows) and of_paper in ("toyland", name)]
    lines = [f"### {table.title}", "",
             "| | " + " | ".join([f"{NAMES[name]} (paper)" for name in columns] + [f"{data} (ours)", "each seed"]) + " |",
             "|---" * (3 + len(columns)) + "|"]
    for row in table.rows:
        cells = [f"{row.paper[name]:.{table.digits}f}".replace("-", "−") if name in row.paper else "" for name in columns]
        ours = values.get(row.cell, [])
        each = " ".join(f"{value:.{table.digits}f}".replace("-", "−") for value in ours) if len(ours) > 1 else ""
        lines.append("| " + " | ".join([row.title, *cells, mean_and_spread(ours, table.digits) if ours else "", each]) + " |")
    return [*lines, ""]


def differences(claim: Claim, values: dict[Cell, list[float]]) -> list[float]:
    """For each seed, by how much `better` is above the best of `worse`; empty where a number is missing."""
    cells = [claim.better, *claim.worse]
    if not all(cell is None or cell in values for cell in cells):
        return []
    seeds = max(len(values[cell]) for cell in cells if cell is not None)
    better, *worse = [[0.0] * seeds if cell is None else values[cell] for cell in cells]
    return [high - max(low) for high, *low in zip(better, *worse)]


def digits_of(claim: Claim) -> int:
    return TABLES[claim.source].digits if claim.source in TABLES else 2


def verdict(difference: list[float], digits: int = 1) -> str:
    """held: the mean difference, with as many digits as are shown, is above zero and above its own spread over seeds."""
    mean, spread = round(np.mean(difference), digits), np.std(difference, ddof=1) if len(difference) > 1 else 0.0
    if mean == 0:
        return "not held: no difference"
    if mean > spread:
        return "held"
    return "not held: reversed" if mean < -spread else "not held: within the spread"


def in_paper(claim: Claim, data: str) -> str:
    """The paper's own difference where it gives both numbers: of `data`, in Toyland of VOC, else of Context."""
    rows = {row.cell: row.paper for row in TABLES[claim.source].rows} if claim.source in TABLES else {}
    for name in ("voc", "context") if data == "toyland" else (data.removesuffix("-voc-first"),):
        cells = [rows.get(cell, {}).get(name) for cell in (claim.better, *claim.worse)]
        if None not in cells:
            digits = digits_of(claim)
            return f"{cells[0] - max(cells[1:]):+.{digits}f} ({NAMES[name]})".replace("-", "−")
    return ""


def claim_lines(claims: list[Claim], values: dict[Cell, list[float]], data: str) -> list[str]:
    if not claims:
        return []
    lines = ["### Claims", "",
             "The difference that a claim says is above zero, for each seed. Held: its mean, as it is shown, is above zero and "
             "above its spread (standard deviation over seeds). Left out are claims that the paper's own numbers deny on this "
             "dataset, and the shape of a sweep that ends at the recipe's own value.", "",
             f"| | claim | paper | {data}: mean ± spread | each seed | |", "|---|---|---|---|---|---|"]
    verdicts = []
    for claim in claims:
        difference, digits = differences(claim, values), digits_of(claim)
        if difference:
            verdicts.append(verdict(difference, digits))
        each = " ".join(f"{value:+.{digits}f}".replace("-", "−") for value in difference)
        lines.append("| " + " | ".join([claim.source, claim.text, in_paper(claim, data),
                                        mean_and_spread(difference, digits) if difference else "", each,
                                        verdicts[-1] if difference else "not run"]) + " |")
    return [*lines, "", f"{verdicts.count('held')} of {len(verdicts)} held." if verdicts else "Nothing has been run.", ""]


def points_of_figure_3(values: dict[Cell, list[float]], recipe: rectify.Recipe) -> dict:
    """What figures.py draws figure 3 from: means over seeds, with their spread. The recipe's own point is in both curves."""
    where = {f"t={t:g}": [("t", t)] for t in THRESHOLDS} | {f"r={r:.3g}": [("r", r)] for r in RATIOS}
    where["reclip++"] = [("t", recipe.vote_threshold), ("r", recipe.window_ratio)]
    measured: dict = {"t": {}, "r": {}}
    for row in TABLES["figure3"].rows:
        if found := values.get(row.cell):
            for name, x in where.get(row.cell[0], []):
                measured[name][x] = [float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0]
    points = {name: [[x, *point] for x, point in of_name.items()] for name, of_name in measured.items()}
    if found := values.get(stage_1("whole-image")):
        points["whole image"] = float(np.mean(found))
    return points


def draw(reproduction: Reproduction, wanted: list[str], values: dict[Cell, list[float]]) -> list[str]:
    """Draw the wanted figures, of seed 0 but figure 3, and return their file names below the reproduction's folder."""
    wanted = [name for name in wanted if all(cell in values for cell in FIGURES[name])]
    paths = []
    if only := [int(name[-1]) for name in ("figure1", "figure4") if name in wanted]:
        known = vars(reproduction.setup.args) | {"out": str(reproduction.out(Job("reclip++", "rectify", 0))), "only": only,
                                             "labels": None, "show": None, "points": None}
        paths = figures.main(argparse.Namespace(**known))
    drawn = {path.name: path.read_bytes() for path in paths}
    if "figure3" in wanted and (points := points_of_figure_3(values, reproduction.recipe))["t"] and points["r"]:
        drawn["figure3_hypothesis.png"] = figures.png(figures.hypothesis_figure(points))
    if "figure5" in wanted:
        drawn["figure5_results.png"] = figure_5(reproduction)
    for name, content in drawn.items():
        content = figures.small_enough(content, figures.LARGEST)
        files.write_atomically(reproduction.root / name, lambda file: file.write(content))
    return sorted(drawn)


def figure_5(reproduction: Reproduction) -> bytes:
    """Image, MaskCLIP, ReCLIP, ReCLIP++, distilled, truth: the stages of two runs side by side. PNG."""
    setup, of_other = (reproduction.setup_of(Job(name, "rectify", 0)) for name in ("reclip++", "reclip"))
    query = rectify.query_of(reproduction.setup)
    of_reclip = evaluate.predictors(of_other, query, ["rectify"], systems.SYSTEMS["reclip"])
    ours = evaluate.predictors(setup, query, ["maskclip", "rectify", "distill"])
    columns = {"MaskCLIP": ours["maskclip"], "ReCLIP rectified": of_reclip["rectify"], "ReCLIP++ rectified": ours["rectify"],
               "ReCLIP++ distilled": ours["distill"]}
    labels = ground_truth.true_label_files(setup.data, setup.root, list(setup.validation_images))
    path = setup.folder("figures") / "figure5_results.png"
    evaluate.picture_sheet(setup, columns, labels, path, rows=8, height=192)
    return path.read_bytes()


# ------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace) -> dict[Cell, list[float]]:
    """Run what is missing for `args.what`, write and print the results, return every cell's numbers."""
    if unknown := [name for name in args.what if name not in WHAT]:
        raise ValueError(f"expected one or more of {', '.join(WHAT)}, found {', '.join(unknown)}.")
    wanted = [name for name in WHAT if name in args.what or not args.what]
    reproduction = Reproduction(args)
    runs.refuse_folders(reproduction.root, "results.md", "results.json")
    reproduction.open()
    claims = [claim for claim in CLAIMS if claim.source in wanted and reproduction.asks(claim)]
    cells = cells_of(wanted, claims)
    jobs = reproduction.missing(cells)
    if args.plan:
        for job in jobs:
            print(*reproduction.commands(job), sep="\n")
    failed = reproduction.run(jobs) if jobs and not args.plan else []
    values = {}
    for cell in cells:
        found = [reproduction.value(cell, seed) for seed in range(args.seeds)]
        if None not in found:
            values[cell] = found
    drawn = [] if args.plan else draw(reproduction, [name for name in wanted if name in FIGURES], values)
    lines = [f"## {reproduction.data}: ours beside the paper's", "",
             f"Seeds: {args.seeds}; epochs: {args.epochs or 'as in the recipes'}; {args.precision}; "
             f"{machine.versions()}. ± is the standard deviation over seeds. mIoU in percent unless a row says otherwise.", ""]
    for name in wanted:
        if name in TABLES:
            lines += table_lines(TABLES[name], values, reproduction.data)
    lines += claim_lines(claims, values, reproduction.data)
    text = "\n".join(lines)
    if not args.plan:
        pictures = "".join(f"\n![{name.removesuffix('.png').replace('_', ': ')}]({name})\n" for name in drawn)
        files.write_atomically(reproduction.root / "results.md", lambda file: file.write((text + pictures).encode()))
        files.write_json(reproduction.root / "results.json", {
            "versions": machine.versions(), "seeds": args.seeds, "epochs": args.epochs,
            "precision": args.precision, "values": {"/".join(cell): found for cell, found in values.items()},
            "claims": [{"source": claim.source, "claim": claim.text, "differences": difference,
                        "verdict": verdict(difference, digits_of(claim))}
                       for claim in claims if (difference := differences(claim, values))]})
    print(f"\n{text}")
    if not args.plan:
        print(f"Wrote {reproduction.root}/: results.md, results.json{''.join(f', {name}' for name in drawn)}")
    if failed:
        raise ValueError(f"expected {len(jobs)} commands to succeed, found {len(failed)} that failed; all that needs none of "
                         f"them is done, and the same command tries them again. The first was {failed[0]}")
    return values


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
