"""reproduce.py and paper.py: what is run, what is taken as it is, what is said of the numbers.

    python -m pytest tests/test_reproduce.py
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import distill
import evaluate
import paper
import rectify
import reproduce
import runs
from clip.download import sha256
from conftest import ROOT
from helpers import refusal, run, write_voc_tree
from paper import CLAIMS, FIGURES, SYSTEMS, TABLES, Claim, Row, Table
from reproduce import Job

CELL, OTHER = ("reclip++", "rectify", "miou"), ("no-bias", "rectify", "miou")


@pytest.fixture
def voc(place, tiny_clip):
    write_voc_tree(place / "data")
    return ["--data", "voc", "--clip", tiny_clip, "--jobs", "1"]


def reproduction(*flags, data: str = "voc") -> reproduce.Reproduction:
    """As main() has it before it opens images, words and CLIP."""
    return reproduce.Reproduction(reproduce.flags().parse_args([*map(str, flags), "--data", data]))


def results() -> dict:
    return json.loads(Path("runs/reproduce/voc/results.json").read_text())


def checkpoints() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("runs/reproduce").rglob("checkpoint.pt")}


# ------------------------------------------------------------------------------------------ what the paper says

def test_nine_tables_and_four_figures_can_be_asked_for():
    assert {f"table{number}" for number in range(1, 10)} <= set(TABLES)
    assert {"figure1", "figure3", "figure4", "figure5"} == set(FIGURES) and set(reproduce.WHAT) == {*TABLES, *FIGURES}


@pytest.mark.parametrize("name, system", SYSTEMS.items())
def test_flags_of_every_system_are_those_of_the_scripts(name, system):
    """And a student has a teacher, a system something to train."""
    for script in (rectify, distill):
        if (flags := getattr(system, script.__name__)) is not None:
            script.flags().parse_args(flags)
    assert system.rectify is not None or system.distill is not None
    assert system.teacher is None or SYSTEMS[system.teacher].rectify == () and system.rectify is None
    assert re.fullmatch(r"[\w+=.-]+", name), "a folder's name on every system"


def test_every_ablation_is_a_system_of_some_table():
    """But `entangled`, another name for one of them."""
    given = {flags[1] for system in SYSTEMS.values() for flags in (system.rectify, system.distill)
             if flags and flags[0] == "--ablation"}
    assert given == {*rectify.ABLATIONS, *distill.ABLATIONS} - {"entangled"}
    shown = {row.cell[0] for table in TABLES.values() for row in table.rows}
    assert shown == set(SYSTEMS)


def test_every_cell_can_be_measured():
    """Its stage is one that its system trains, or one of CLIP's own."""
    for system, stage, measure in reproduce.cells_of(list(reproduce.WHAT), list(CLAIMS)):
        of = SYSTEMS[system]
        assert {"rectify": of.rectify, "distill": of.distill}.get(stage, ()) is not None, (system, stage)
        assert measure in ("miou", "probe", "class_preference", "space_preference")
    assert all(claim.source in reproduce.WHAT for claim in CLAIMS)
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS) >= 12


def test_papers_own_numbers_bear_out_every_claim():
    """Where the paper gives both numbers, its difference is positive: no claim is stated the wrong way round."""
    known = [(claim, reproduce.in_paper(claim, data)) for claim in CLAIMS for data in ("toyland", "voc")]
    assert len({claim.text for claim, said in known if said}) >= 20
    assert [claim.text for claim, said in known if said.startswith("−")] == []


def test_claim_that_the_paper_denies_on_a_dataset_is_not_asked_there(voc):
    """ReCLIP is below MaskCLIP on Cityscapes: to find it there, too, is no failure."""
    asked = {data: {claim.text for claim in CLAIMS if reproduction(*voc, data=data).asks(claim)} for data in reproduce.NAMES}
    denied = {"ReCLIP's rectification is better than MaskCLIP", "ReCLIP's student is better than MaskCLIP+"}
    assert len(asked["voc"]) == len(CLAIMS) and asked["voc"] - asked["cityscapes"] == denied
    assert all(asked[data] == asked["voc"] for data in ("context", "ade", "coco"))


def test_sweep_that_ends_at_the_recipe_has_no_claim_of_a_bell(voc):
    [of_r] = [claim for claim in CLAIMS if "over r" in claim.text]
    made = reproduction(*voc)
    made.same = {"r=0.25": "reclip++"}
    assert made.asks(of_r)
    made.same = {"r=0.125": "reclip++"}
    assert not made.asks(of_r)


def test_figure_3_has_the_recipes_own_point(voc):
    """Wherever the recipe's t and r lie: VOC's t of 7 % is none of the sweep's."""
    values = {CELL: [70.0, 72.0], ("t=0", "rectify", "miou"): [60.0, 60.0], ("r=0.167", "rectify", "miou"): [70.0, 72.0]}
    points = reproduce.points_of_figure_3(values, rectify.Recipe(vote_threshold=0.07, window_ratio=1 / 6))
    assert [x for x, *_ in points["t"]] == [0.07, 0.0] and points["t"][0][1] == 71
    assert [x for x, *_ in points["r"]] == [1 / 6], "one point, not two"


# ------------------------------------------------------------------------------------------ what has to be run

def test_one_number_needs_its_trainings_in_order():
    assert reproduce.jobs_of(("own-head", "distill", "miou"), 3) == [Job("reclip++", "rectify", 3), Job("own-head", "distill", 3)]
    assert reproduce.jobs_of(("reclip", "distill", "class_preference"), 0) == [
        Job("reclip", "rectify", 0), Job("reclip", "distill", 0), Job("reclip", "scores", 0)]
    assert reproduce.jobs_of(("maskclip+", "distill", "miou"), 0) == [Job("maskclip+", "distill", 0)]
    assert Job("reclip++", "evaluate", 0) in reproduce.jobs_of(("reclip++", "maskclip", "miou"), 0)


def test_plan_has_every_job_once_and_measures_after_training():
    cells = reproduce.cells_of(list(reproduce.WHAT), list(CLAIMS))
    jobs = reproduce.plan(cells, seeds=2)
    assert len(jobs) == len(set(jobs)) and {job.seed for job in jobs} == {0, 1}
    for job in jobs:
        assert all(jobs.index(other) < jobs.index(job) for other in reproduce.waits_for(job, jobs)), job
    assert Job("reclip++", "rectify", 1) in reproduce.waits_for(Job("own-head", "distill", 1), jobs)
    assert Job("reclip++", "rectify", 0) not in reproduce.waits_for(Job("own-head", "distill", 1), jobs)
    assert {job.script for job in jobs if job.system == "reclip++"} == {"rectify", "distill", "evaluate", "probe"}    # no second scores


# ------------------------------------------------------------------------------------------ what is said

@pytest.mark.parametrize("difference, said", [
    ([1.0, 2.0, 3.0], "held"), ([2.0], "held"), ([-1.0, 2.0, 0.5], "not held: within the spread"), ([0.0], "not held: no difference"),
    ([-1.0, -2.0, -3.0], "not held: reversed"), ([1.0, -1.0], "not held: no difference"), ([1.0, 1.0, 1.0], "held"),
    ([0.04, 0.04], "not held: no difference"), ([-0.04], "not held: no difference")])
def test_claim_holds_when_its_mean_is_above_its_spread(difference, said):
    assert reproduce.verdict(difference) == said
    assert reproduce.verdict([0.04, 0.04], digits=2) == "held"


def test_difference_is_to_the_best_rival_seed_by_seed():
    third = ("addition", "rectify", "miou")
    values = {CELL: [10.0, 20.0], OTHER: [9.0, 19.5], third: [9.5, 1.0]}
    assert reproduce.differences(Claim("bias", "", CELL, (OTHER, third)), values) == [0.5, 0.5]
    assert reproduce.differences(Claim("bias", "", None, (OTHER,)), values) == [-9.0, -19.5]
    assert reproduce.differences(Claim("bias", "", CELL, (("reclip", "rectify", "miou"),)), values) == []


def test_table_shows_paper_and_ours_side_by_side():
    table = Table("T", (Row("one", CELL, {"voc": 73.5, "context": 34.0}), Row("two", OTHER, {"voc": 1.0})))
    *_, head, _, one, two, _ = reproduce.table_lines(table, {CELL: [1.0, 2.0], OTHER: [-3.0]}, "toyland")
    assert head == "| | VOC (paper) | Context (paper) | toyland (ours) | each seed |"
    assert one == "| one | 73.5 | 34.0 | 1.5 ± 0.7 | 1.0 2.0 |" and two == "| two | 1.0 |  | −3.0 |  |"
    *_, head, _, one, two, _ = reproduce.table_lines(table, {}, "context-voc-first")
    assert head == "| | Context (paper) | context-voc-first (ours) | each seed |" and one == "| one | 34.0 |  |  |"


# ------------------------------------------------------------------------------------------ from nothing, and again

@pytest.mark.slow
def test_tables_and_claims_from_nothing_and_nothing_twice(voc, capsys):
    """Numbers are those of the stages' own files; the second call trains nothing; a lost checkpoint is made again alone."""
    values = run(reproduce, "table5", "table9", *voc, "--seeds", "2")
    said = capsys.readouterr().out
    for cell, found in values.items():
        system, stage, _ = cell
        expected = [json.loads(Path("runs/reproduce/voc", system, str(seed), "voc", stage, "metrics.json").read_text())["miou"]
                    for seed in range(2)]
        assert found == expected == results()["values"]["/".join(cell)]
    of_v, *_ = [claim for claim in CLAIMS if claim.source == "table5"]
    expected = np.subtract(values["reclip++", "rectify", "miou"], values["addition", "rectify", "miou"])
    [found] = [claim for claim in results()["claims"] if claim["claim"] == of_v.text]
    assert np.allclose(found["differences"], expected) and f"| {of_v.text} | +1.1 (VOC) |" in said
    assert Path("runs/reproduce/voc/results.md").read_text() in said
    before = checkpoints()
    assert len(before) == 2 * (2 + 1 + 3 * 2)           # ReCLIP++ in two stages, addition, three heads with their teacher
    assert run(reproduce, "table5", "table9", *voc, "--seeds", "2") == values and checkpoints() == before
    lost = Path("runs/reproduce/voc/addition/1/voc/rectify/checkpoint.pt")
    lost.unlink()
    assert run(reproduce, "table5", "table9", *voc, "--seeds", "2") == values
    assert {path for path, time in checkpoints().items() if before[path] != time} == {str(lost)}


@pytest.mark.slow
def test_point_of_a_sweep_that_is_the_recipe_has_no_run_of_its_own(voc, monkeypatch, capsys):
    monkeypatch.setattr(paper, "THRESHOLDS", ())
    values = run(reproduce, "figure3", *voc, "--seeds", "1")
    assert not Path("runs/reproduce/voc/r=0.5").exists() and Path("runs/reproduce/voc/r=1").exists()
    assert values["r=0.5", "rectify", "miou"] == values["reclip++", "rectify", "miou"]
    assert Path("runs/reproduce/voc/figure3_hypothesis.png").stat().st_size > 1000
    recipe = json.loads(Path("runs/reproduce/voc/t=0.2/0/voc/rectify/recipe.json").read_text())["recipe"]
    assert recipe["vote_threshold"] == 0.2 and recipe["ablation"] == "none"
    assert len(list(Path("runs/reproduce/voc/cache").glob("hypotheses-*.pt"))) == 6          # one for each r, for all runs


@pytest.mark.slow
def test_figures_come_with_their_tables(voc):
    run(reproduce, "table1", "table7", "figure1", "figure4", "figure5", *voc, "--seeds", "1")
    folder = Path("runs/reproduce/voc")
    names = ["figure1_confusion.png", "figure1_distance.png", "figure4_logits.png", "figure5_results.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    text = (folder / "results.md").read_text()
    assert all(f"]({name})" in text for name in names)
    assert "probe" in json.loads((folder / "reclip++/0/voc/scores/scores.json").read_text())["distill"]
    assert "reclip++/distill/probe" in results()["values"] and "maskclip+/distill/space_preference" in results()["values"]


def test_run_with_other_numbers_is_refused(voc, capsys):
    """A folder never mixes two recipes; --out keeps both."""
    run(reproduce, "table5", *voc, "--seeds", "1")
    said = refusal(capsys, reproduce, "table5", *voc, "--seeds", "1", "--epochs", "1")
    assert "'epochs': 1" in said and "'epochs': 2" in said and "--out" in said
    assert "expected one or more of stages, table1" in refusal(capsys, reproduce, "table10", *voc)
    assert "expected toyland or another whose labels are known" in refusal(capsys, reproduce, "--data", "photos")


def test_plan_runs_nothing_and_names_commands_that_work(voc, capsys):
    run(reproduce, "table5", *voc, "--seeds", "1", "--plan")
    said = capsys.readouterr().out
    assert not Path("runs").exists()
    commands = re.findall(r"^python (\w+)\.py (.*)$", said, flags=re.M)
    assert [name for name, _ in commands] == ["rectify", "rectify"] and "--ablation addition" in commands[1][1]
    for _, flags in commands:
        run(rectify, *flags.split())
    values = run(reproduce, "table5", *voc, "--seeds", "1")
    assert len(values) == 2 and "| subtraction | 73.5 |" in said


def test_plan_of_a_student_copies_its_teacher(voc, capsys):
    """Typed one after another the commands give what a reproduction gives, which then has nothing left to do."""
    run(reproduce, "table8", *voc, "--seeds", "1", "--epochs", "1", "--plan")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("python ", "mkdir ", "cp "))]
    for line in lines:
        command, *flags = line.removeprefix("python ").split()
        if command.endswith(".py"):
            run({"rectify.py": rectify, "distill.py": distill}[command], *flags)
        else:
            subprocess.run([command, *flags], check=True)
    before = checkpoints()
    assert len(before) == 6 and len(run(reproduce, "table8", *voc, "--seeds", "1", "--epochs", "1")) == 3
    assert "commands to run" not in capsys.readouterr().out and checkpoints() == before


def test_table_asked_for_later_costs_no_number_of_an_earlier_one(voc):
    """What was measured beside fewer stages is measured again behind the training of the next one."""
    run(reproduce, "table6", *voc, "--seeds", "1")
    values = run(reproduce, "stages", "table6", *voc, "--seeds", "1")
    assert len(values) == 5 and len(results()["claims"]) == 2


@pytest.mark.parametrize("change, said", [("teacher", "another teacher"), ("images", "another list of training images")])
def test_student_of_another_teacher_and_run_on_other_images_are_refused(voc, capsys, change, said):
    run(reproduce, "table8", *voc, "--seeds", "1")
    if change == "images":
        path = Path("data/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    else:
        path = Path("runs/reproduce/voc/loss-mask/0/voc/distill/checkpoint.pt")
        runs.save(path, runs.read(path) | {"settings": runs.read(path)["settings"] | {"teacher": 1}})
        metrics = json.loads(path.with_name("metrics.json").read_text())
        metrics["fingerprint"]["weights"] = sha256(path)[:16]           # measured, and all is well but for the teacher
        path.with_name("metrics.json").write_text(json.dumps(metrics))
    assert said in refusal(capsys, reproduce, "table8", *voc, "--seeds", "1")


def test_missing_labels_are_told_before_anything_is_trained(voc, capsys):
    for path in Path("data/VOCdevkit/VOC2012/SegmentationClass").iterdir():
        path.unlink()
    assert "expected labels" in refusal(capsys, reproduce, "table5", *voc) and not checkpoints()


def test_training_that_fails_or_stops_is_told_with_its_name(voc, capsys, monkeypatch):
    def ended_by(error: BaseException) -> None:
        def main(_args):
            raise error
        monkeypatch.setattr(rectify, "main", main)

    ended_by(ValueError("expected a finite number, found nan."))
    said = refusal(capsys, reproduce, "table5", *voc)
    assert "reclip++, rectify, seed 0: expected a finite" in said and "python rectify.py --data voc" in said
    ended_by(KeyboardInterrupt("the same command and --resume goes on"))
    with pytest.raises(KeyboardInterrupt, match="same command goes on with reclip"):
        run(reproduce, "table5", *voc)


@pytest.mark.slow
def test_failure_stops_nothing_but_what_needs_it(voc, monkeypatch, capsys):
    """The rest is run and written; the failure is told at the end; the same command tries it again, and nothing else."""
    step = rectify.train_step

    def sometimes(rectifier, clip_model, images, hypothesis, query, names, recipe, noise):
        if recipe.ablation == "reclip":
            raise ValueError("expected a finite loss, found NaN")
        return step(rectifier, clip_model, images, hypothesis, query, names, recipe, noise)

    monkeypatch.setattr(rectify, "train_step", sometimes)
    said = refusal(capsys, reproduce, "table2", "table5", *voc, "--seeds", "1")
    assert "1 that failed" in said and "reclip, rectify, seed 0" in said and "found NaN" in said
    assert "reclip++/distill/miou" in results()["values"] and "addition/rectify/miou" in results()["values"]
    assert not any(cell.startswith("reclip/") for cell in results()["values"])
    before = checkpoints()
    monkeypatch.setattr(rectify, "train_step", step)
    values = run(reproduce, "table2", "table5", *voc, "--seeds", "1")
    assert ("reclip", "distill", "miou") in values and before.items() < checkpoints().items()


# ------------------------------------------------------------------------------------------ several processes

def test_processes_are_stopped_when_nobody_reads_what_is_printed(voc, monkeypatch):
    """`reproduce.py | head`: what runs beside the job that has just ended must not go on for hours."""
    made, said, ended = reproduction(*voc[:-1], "2"), [], []
    made.open()

    def in_a_process(job: Job, environment: dict, children: reproduce.Children) -> float:
        if job.seed == 1:
            ended.append(children.run([sys.executable, "-c", "import time; time.sleep(30)"], None, environment))
        while not children.running and not ended:       # the other job ends as soon as this one has begun
            time.sleep(0.05)
        return 0.0

    def print_until_closed(*words, **_) -> None:
        said.append(words)
        if len(said) > 1:                               # after the line that says how many there are
            raise BrokenPipeError

    monkeypatch.setattr(made, "in_a_process", in_a_process)
    monkeypatch.setattr(made, "refuse_unfinished", lambda job: None)
    monkeypatch.setattr(reproduce, "print", print_until_closed, raising=False)
    with pytest.raises(BrokenPipeError):
        made.run([Job("reclip++", "evaluate", 0), Job("reclip++", "evaluate", 1)])
    assert ended and ended[0] != 0


@pytest.mark.slow
def test_processes_give_what_one_process_gives(voc, capsys):
    """Measured by two processes at a time after the trainings were made in this one, whose recipes are the tests'."""
    values = run(reproduce, "stages", "table7", *voc, "--seeds", "1")
    for name in ("evaluate/metrics.json", "scores/scores.json"):
        for path in Path("runs/reproduce/voc").glob(f"*/0/voc/{name}"):
            path.unlink()
    before = checkpoints()
    assert run(reproduce, "stages", "table7", *voc[:-1], "2", "--seeds", "1") == values
    assert checkpoints() == before and "4 commands to run, 2 at a time" in capsys.readouterr().out


@pytest.mark.slow
def test_command_that_fails_is_told_with_its_last_words(voc, capsys):
    run(reproduce, "stages", *voc, "--seeds", "1")
    Path("runs/reproduce/voc/reclip++/0/voc/evaluate/metrics.json").unlink()
    label = next(Path("data/VOCdevkit/VOC2012/SegmentationClass").glob("2007_000033.png"))
    label.write_bytes(b"no picture")
    said = refusal(capsys, reproduce, "stages", *voc[:-1], "2", "--seeds", "1")
    assert "reclip++, evaluate, seed 0" in said and "exit code 2" in said and label.name in said and "evaluate.py --data voc" in said


WAITING = """
import os, signal, sys, threading, time, reproduce
signal.signal(signal.SIGINT, signal.default_int_handler)        # whatever the tests were started with
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ended = []
def run():
    ended.append(children.run([sys.executable, "-c", {child!r}], None, os.environ))
with reproduce.Children() as children:
    thread = threading.Thread(target=run)
    thread.start()
    print("started", flush=True)
    try:
        time.sleep(60)
    except BaseException:
        threading.Timer(0.3, lambda: (thread.join(), print("child:", ended, children.run(["nothing"], None, os.environ),
                                                           flush=True))).start()
        raise
"""
CHILD = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopping_asks_every_process_once_and_waits_for_it(how, tmp_path):
    import signal
    parent = subprocess.Popen([sys.executable, "-c", WAITING.format(child=CHILD)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, cwd=Path(reproduce.__file__).parent, start_new_session=True)
    assert parent.stdout.readline() == "started\n"
    time.sleep(1)                           # the child's interpreter has started
    parent.send_signal(getattr(signal, how))
    said, _ = parent.communicate(timeout=30)
    assert "child: [7] 130" in said and parent.returncode != 0          # nothing is started any more


@pytest.mark.slow
def test_what_the_bias_says_is_told_of_every_run(trained_voc):
    """results/bias.py: with the bias left out of a run without a decoder, MaskCLIP is left."""
    run(rectify, "--data", "voc", "--clip", rectify.find_checkpoint(
        rectify.flags().parse_args([]), "rectify")["settings"]["world"]["clip_name"], "--ablation", "without-decoder", "--out", "no decoder")
    expected = run(evaluate, "--out", "no decoder")
    said = subprocess.run([sys.executable, str(ROOT / "results/bias.py"), "runs", "no decoder"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    _, ours, without = said.stdout.strip().splitlines()
    assert float(without.split()[-2]) == pytest.approx(expected["rectify"]["miou"], abs=0.051)
    assert float(without.split()[-1]) == pytest.approx(expected["maskclip"]["miou"], abs=0.051)
    assert -1 <= float(ours.split()[1]) <= 1 and len(ours.split()) == 7
    assert subprocess.run([sys.executable, str(ROOT / "results/bias.py"), "nowhere"], capture_output=True).returncode == 2


# ------------------------------------------------------------------------------------------ the page of the real datasets

def rows_of_real_datasets() -> list[str]:
    """A line for every number that the paper gives: table, row, paper's, ours (nothing), the command that fills it."""
    lines = []
    for data, title in reproduce.NAMES.items():
        lines += [f"### {title}", "", "| table | | paper | ours | command |", "|---|---|---|---|---|"]
        for name, table in TABLES.items():
            for row in table.rows if name != "stages" else ():
                if data in row.paper:
                    number = f"{row.paper[data]:.{table.digits}f}".replace("-", "−")
                    lines.append(f"| {table.title.split(':')[0]} | {row.title} | {number} | | "
                                 f"`python reproduce.py {name} --data {data}` |")
        lines.append("")
    return lines


def test_page_of_real_datasets_has_a_row_and_a_command_for_every_number_of_the_paper():
    """results/real.md; where it differs, its tables are to be replaced by what this prints."""
    text = (Path(reproduce.__file__).parent / "results/real.md").read_text(encoding="utf-8")
    expected = "\n".join(rows_of_real_datasets())
    assert expected.strip() in text, expected
