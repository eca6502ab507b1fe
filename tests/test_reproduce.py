"""paper/reproduce.py, tables.py and reported.py: what is run, what is taken as it is, what is said of the
numbers.

    python -m pytest tests/test_reproduce.py

Commands run in this process, whose recipes are the tests', but for the last section.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import rectify
from clip.download import sha256
from conftest import ROOT
from harness import errors, files
from helpers import refusal, run, write_voc_tree
from paper import bias, maft, reproduce, run as paper_run, systems, tables
from paper.reported import (CLAIMS, FIGURES, MEASURES, OF_MAFT, SWEEPS, TABLES, WHAT, Claim, Row, Table,
                            stage_1)
from paper.reproduce import Job

CELL, OTHER = ("reclip++", "rectify", "miou"), ("no-bias", "rectify", "miou")
REAL_START = reproduce.start


def in_this_process(command: list[str], log: Path, environment: dict) -> SimpleNamespace:
    """In the place of `reproduce.start`: the command is run to its end, and looks like a process that has
    ended."""
    (script, *words), code = command, 0
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with errors.one_paragraph():
                run(reproduce.SCRIPTS[script], *words)
        except SystemExit as stop:
            code = stop.code
    return ended_with(code)


def ended_with(code: int) -> SimpleNamespace:
    return SimpleNamespace(returncode=code, poll=lambda: code)


@pytest.fixture
def voc(place, tiny_clip, monkeypatch):
    write_voc_tree(place / "data")
    monkeypatch.setattr(reproduce, "start", in_this_process)
    for name in ("maskclip+",):                 # 44 epochs on VOC
        system = systems.SYSTEMS[name]
        numbers = {"any": system.student_numbers["any"]}
        monkeypatch.setitem(systems.SYSTEMS, name, replace(system, student_numbers=numbers))
    return ["--data", "voc", "--clip", tiny_clip, "--jobs", "1"]


def reproduction(*flags, data: str = "voc") -> reproduce.Reproduction:
    """As main() has it before it opens images, words and CLIP."""
    return reproduce.Reproduction(reproduce.flags().parse_args([*map(str, flags), "--data", data]))


def results() -> dict:
    return json.loads(Path("runs/reproduce/voc/results.json").read_text())


def checkpoints() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path("runs/reproduce").rglob("checkpoint.pt")}


# ---------------------------------------------------------------------------- what the paper says

def test_nine_tables_and_four_figures_can_be_asked_for():
    assert {f"table{number}" for number in range(1, 10)} <= set(TABLES)
    assert {"figure1", "figure3", "figure4", "figure5"} == set(FIGURES) and set(WHAT) == {*TABLES, *FIGURES}


@pytest.mark.parametrize("name", [*systems.SYSTEMS, *SWEEPS, *reproduce.ALONE])
def test_commands_of_every_run_are_those_of_the_scripts(name):
    """Their flags are known, a stage that it does not have is not asked of it, its folder's name is one
    everywhere."""
    made = reproduction("--epochs", "3", data="toyland")
    cells = [] if reproduce.system_of(name).teacher else [(name, "rectify", "miou")]
    cells += [] if name in SWEEPS else [(name, "distill", "miou")]
    cells = [(name, name.replace("-", "_"), "miou")] if name in reproduce.ALONE else cells
    for cell in cells:
        for job in reproduce.jobs_of(cell, seed=1):
            script, *words = made.command(job)
            args = reproduce.SCRIPTS[script].flags().parse_args(words)
            assert (args.seed, args.epochs, args.resume) == (1, 3, True)
            if script == "paper/run.py":
                paper_run.refuse_unread(args, systems.SYSTEMS[args.system], [args.stage])
    assert re.fullmatch(r"[\w+=.-]+", name), "a folder's name on every system"


def test_every_system_is_in_some_table():
    """And no table has one that is not there."""
    shown = {row.cell[0] for table in TABLES.values() for row in table.rows if row.cell}
    assert shown == {*systems.SYSTEMS, *SWEEPS, *reproduce.ALONE, "maft"}


def test_every_cell_can_be_measured():
    """Its stage is one that its run has, or one of CLIP's own."""
    for name, stage, measure in reproduce.cells_of(list(WHAT), list(CLAIMS)):
        if name == "maft":
            assert stage in ("frozen", "tuned") and measure in OF_MAFT, (name, stage, measure)
            continue
        system = reproduce.system_of(name)
        if name in reproduce.ALONE:
            assert stage in reproduce.TRAINING and measure in ("miou", "miou_text")
            continue
        assert stage in evaluate.STAGES and measure in MEASURES, (name, stage, measure)
        assert stage != "rectify" or not system.teacher, "a student has no stage 1 of its own"
        assert stage != "distill" or name not in SWEEPS
    assert all(claim.source in WHAT for claim in CLAIMS)
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS) == 48
    assert sum(claim.text.startswith("ours:") for claim in CLAIMS) == 10


def test_cited_systems_have_numbers_and_nothing_to_run():
    """Tables I and II are whole: twelve rows in each beside what the paper does not have."""
    for name, cited in (("table1", ["IIC", "SegSort", "DSM", "HSG", "ACSeg", "MaskContrast", "EAGLE",
                                    "DepthSeg"]),
                        ("table2", ["CLIPpy", "ReCo", "ReCo without context elimination"])):
        rows = TABLES[name].rows
        assert [row.title for row in rows if row.cell is None] == cited
        assert all(row.paper for row in rows if row.cell is None or "not in the paper" not in row.title)
        assert all(not row.paper for row in rows if "not in the paper" in row.title)
    lines = tables.table_lines(TABLES["table1"], {}, "coco")
    assert "| ReCLIP++ rectified | 21.2 |  |  |" in lines
    assert "21.2 here and 20.9 in Table II" in " ".join(" ".join(lines).split())


def test_table_vii_compares_the_rectification_stage():
    """As the paper does; its own definition stands beside its numbers, ours and the students' have none."""
    rows = TABLES["table7"].rows
    of_paper = {row.cell: row.paper for row in rows if row.paper}
    assert of_paper == {
        ("reclip++", "maskclip", "class_preference"): {"context": .29},
        ("maskclip+", "distill", "class_preference"): {"context": .31},
        ("reclip", "rectify", "class_preference"): {"context": .33},
        ("reclip++", "rectify", "class_preference"): {"context": .37},
        ("reclip++", "maskclip", "space_preference"): {"voc": -.50},
        ("maskclip+", "distill", "space_preference"): {"voc": -.48},
        ("reclip", "rectify", "space_preference"): {"voc": -.41},
        ("reclip++", "rectify", "space_preference"): {"voc": -.29}}
    assert all("not in the paper" in row.title for row in rows if not row.paper)
    assert {row.cell[2] for row in rows if not row.paper} == {"class_preference", "space_preference",
                                                              "space_slope"}
    for claim in CLAIMS:
        if claim.source == "table7":
            assert {claim.better, *claim.worse} <= of_paper.keys()


def test_papers_own_numbers_bear_out_every_claim():
    """Where the paper gives both numbers, its difference is positive: no claim is stated the wrong way
    round."""
    known = [(claim, tables.in_paper(claim, data)) for claim in CLAIMS for data in ("toyland", "voc")]
    assert len({claim.text for claim, said in known if said}) >= 20
    assert [claim.text for claim, said in known if said.startswith("−")] == []


def test_claim_that_the_paper_denies_on_a_dataset_is_not_asked_there():
    """ReCLIP is below MaskCLIP on Cityscapes: to find it there, too, is no failure."""
    asked = {data: {claim.text for claim in tables.asked(CLAIMS, data, {})} for data in tables.NAMES}
    denied = {"ReCLIP's rectification is better than MaskCLIP", "ReCLIP's student is better than MaskCLIP+"}
    assert len(asked["voc"]) == len(CLAIMS) and asked["voc"] - asked["cityscapes"] == denied
    assert all(asked[data] == asked["voc"] for data in ("context", "ade", "coco"))


def test_sweep_that_ends_at_the_recipe_has_no_claim_of_a_bell():
    [of_r] = [claim for claim in CLAIMS if "over r" in claim.text]
    assert tables.asked([of_r], "voc", {"r=0.25": "reclip++"}) == [of_r]
    assert tables.asked([of_r], "voc", {"r=0.125": "reclip++"}) == []


def test_figure_3_has_the_recipes_own_point():
    """Wherever the recipe's t and r lie: VOC's t of 7 % is none of the sweep's."""
    values = {CELL: [70.0, 72.0], stage_1("t=0"): [60.0, 60.0], stage_1("r=0.167"): [70.0, 72.0]}
    points = reproduce.points_of_figure_3(values, rectify.Recipe(vote_threshold=0.07, window_ratio=1 / 6))
    assert [x for x, *_ in points["t"]] == [0.07, 0.0] and points["t"][0][1] == 71
    assert [x for x, *_ in points["r"]] == [1 / 6], "one point, not two"


# ---------------------------------------------------------------------------- what has to be run

def test_one_number_needs_its_trainings_in_order():
    jobs_of = reproduce.jobs_of
    assert jobs_of(("own-head", "distill", "miou"), 3) == [Job("reclip++", "rectify", 3),
                                                           Job("own-head", "distill", 3)]
    assert jobs_of(("reclip", "distill", "class_preference"), 0) == [
        Job("reclip", "rectify", 0), Job("reclip", "distill", 0), Job("reclip", "scores", 0)]
    assert jobs_of(("maskclip+", "distill", "miou"), 0) == [Job("maskclip+", "distill", 0)]
    assert jobs_of(stage_1("t=0.2"), 0) == [Job("t=0.2", "rectify", 0)]
    assert jobs_of(("reclip++", "maskclip", "miou"), 0) == [Job("reclip++", "evaluate", 0)]


def test_plan_has_every_job_once_and_measures_after_training():
    cells = reproduce.cells_of(list(WHAT), list(CLAIMS))
    jobs = reproduce.plan(cells, seeds=2)
    assert len(jobs) == len(set(jobs)) and {job.seed for job in jobs} == {0, 1}
    for job in jobs:
        assert all(jobs.index(other) < jobs.index(job) for other in reproduce.waits_for(job, jobs)), job
    assert Job("reclip++", "rectify", 1) in reproduce.waits_for(Job("own-head", "distill", 1), jobs)
    assert Job("reclip++", "rectify", 0) not in reproduce.waits_for(Job("own-head", "distill", 1), jobs)
    stages = {job.stage for job in jobs if job.run == "reclip++"}
    assert stages == {"rectify", "distill", "evaluate", "probe"}, "no second scores"


# ---------------------------------------------------------------------------- what is said

@pytest.mark.parametrize("difference, said", [
    ([1.0, 2.0, 3.0], "held"), ([2.0], "held"), ([-1.0, 2.0, 0.5], "not held: within the spread"),
    ([0.0], "not held: no difference"), ([-1.0, -2.0, -3.0], "not held: reversed"),
    ([1.0, -1.0], "not held: no difference"), ([1.0, 1.0, 1.0], "held"),
    ([0.04, 0.04], "not held: no difference"), ([-0.04], "not held: no difference")])
def test_claim_holds_when_its_mean_is_above_its_spread(difference, said):
    assert tables.verdict(difference) == said
    assert tables.verdict([0.04, 0.04], digits=2) == "held"


def test_difference_is_to_the_best_rival_seed_by_seed():
    third = stage_1("addition")
    values = {CELL: [10.0, 20.0], OTHER: [9.0, 19.5], third: [9.5, 1.0]}
    assert tables.differences(Claim("bias", "", CELL, (OTHER, third)), values) == [0.5, 0.5]
    assert tables.differences(Claim("bias", "", None, (OTHER,)), values) == [-9.0, -19.5]
    assert tables.differences(Claim("bias", "", CELL, (stage_1("reclip"),)), values) == []


def test_table_shows_paper_and_ours_side_by_side():
    rows = (Row("one", CELL, {"voc": 73.5, "context": 34.0}), Row("two", OTHER, {"voc": 1.0}),
            Row("cited", None, {"voc": 2.0}))
    table = Table("T", rows)
    *_, head, _, one, two, cited, _ = tables.table_lines(table, {CELL: [1.0, 2.0], OTHER: [-3.0]}, "toyland")
    assert head == "| | VOC (paper) | Context (paper) | toyland (ours) | each seed |"
    assert one == "| one | 73.5 | 34.0 | 1.5 ± 0.7 | 1.0 2.0 |" and two == "| two | 1.0 |  | −3.0 |  |"
    assert cited == "| cited | 2.0 |  |  |  |"
    *_, head, _, one, two, cited, _ = tables.table_lines(table, {}, "context-voc-first")
    assert head == "| | Context (paper) | context-voc-first (ours) | each seed |"
    assert one == "| one | 34.0 |  |  |"


def test_numbers_of_others_are_not_called_the_papers():
    _, _, head, *rows = tables.table_lines(TABLES["release"], {}, "voc")
    assert head == "| | VOC (reported) | voc (ours) | each seed |"
    assert "| the authors' later release | 85.4 |  |  |" in rows


def test_claims_are_counted_the_papers_and_ours_apart():
    values = {CELL: [2.0], OTHER: [1.0], stage_1("addition"): [3.0]}
    claims = [Claim("bias", "ours: a", CELL, (OTHER,)), Claim("bias", "b", OTHER, (CELL,)),
              Claim("bias", "c", CELL, (OTHER,)), Claim("bias", "d", CELL, (stage_1("reclip"),))]
    *_, count, _ = tables.claim_lines(claims, values, "toyland")
    assert count == "2 of 3 held: 1 of 2 of the paper's, 1 of 1 of ours. 1 have not been run."
    assert tables.claim_lines(claims, {}, "toyland")[-2] == "Nothing has been run."
    assert tables.claim_lines([], {}, "x") == []


@pytest.mark.parametrize("name", ["toyland", "ours"])
def test_results_of_toyland_are_those_that_tables_py_writes(tmp_path, name):
    """paper/results/toyland.md and the verdicts in toyland.json are of these numbers and of today's claims;
    so are ours.md and ours.json, which have no figures."""
    folder = ROOT / "paper/results"
    for path in (folder / f"{name}.json", *(folder.glob("figure*.png") if name == "toyland" else ())):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tables.main(tables.flags().parse_args([str(tmp_path / f"{name}.json")]))
    for file in (f"{name}.json", f"{name}.md"):
        assert (tmp_path / file).read_text() == (folder / file).read_text(), \
            f"python paper/tables.py paper/results/{name}.json"
    known = {"/".join(cell) for cell in reproduce.cells_of(list(WHAT), list(CLAIMS))}
    assert set(json.loads((folder / f"{name}.json").read_text())["values"]) <= known
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="expected the results.json of a reproduction"):
        tables.main(tables.flags().parse_args([str(tmp_path / "other.json")]))


# ---------------------------------------------------------------------------- from nothing, and again

@pytest.mark.slow
def test_tables_and_claims_from_nothing_and_nothing_twice(voc, capsys):
    """Numbers are those of the stages' own files; the second call trains nothing; a lost checkpoint is made
    again."""
    values = run(reproduce, "table5", "table9", *voc, "--seeds", "2")
    said = capsys.readouterr().out
    for cell, found in values.items():
        name, stage, _ = cell
        expected = [json.loads(Path("runs/reproduce/voc", name, str(seed), "voc", stage,
                                    "metrics.json").read_text())["miou"]
                    for seed in range(2)]
        assert found == expected == results()["values"]["/".join(cell)]
    of_v, *_ = [claim for claim in CLAIMS if claim.source == "table5"]
    expected = np.subtract(values["reclip++", "rectify", "miou"], values["addition", "rectify", "miou"])
    [found] = [claim for claim in results()["claims"] if claim["claim"] == of_v.text]
    assert np.allclose(found["differences"], expected) and f"| {of_v.text} | +1.1 (VOC) |" in said
    assert Path("runs/reproduce/voc/results.md").read_text() in said
    before = checkpoints()
    # ReCLIP++ in two stages, addition, three heads with their teacher
    assert len(before) == 2 * (2 + 1 + 3 * 2)
    assert run(reproduce, "table5", "table9", *voc, "--seeds", "2") == values and checkpoints() == before
    lost = Path("runs/reproduce/voc/addition/1/voc/rectify/checkpoint.pt")
    lost.unlink()
    assert run(reproduce, "table5", "table9", *voc, "--seeds", "2") == values
    assert {path for path, time in checkpoints().items() if before[path] != time} == {str(lost)}


@pytest.mark.slow
def test_point_of_a_sweep_that_is_the_recipe_has_no_run_of_its_own(voc):
    values = run(reproduce, "figure3", *voc, "--seeds", "1")
    assert not Path("runs/reproduce/voc/r=0.5").exists() and Path("runs/reproduce/voc/r=1").exists()
    assert values["r=0.5", "rectify", "miou"] == values["reclip++", "rectify", "miou"]
    assert results()["same"] == {"r=0.5": "reclip++", "path=residual": "reclip++"}
    assert Path("runs/reproduce/voc/figure3_hypothesis.png").stat().st_size > 1000
    recipe = json.loads(Path("runs/reproduce/voc/t=0.2/0/voc/rectify/recipe.json").read_text())
    assert recipe["recipe"]["vote_threshold"] == 0.2 and recipe["system"] == "reclip++"
    votes = list(Path("runs/reproduce/voc/cache").glob("votes-*.pt"))
    assert len(votes) == 6 + 1                          # one for each r, for all runs, and ReCLIP's rule


@pytest.mark.slow
def test_figures_come_with_their_tables(voc):
    run(reproduce, "table1", "table7", "figure1", "figure4", "figure5", *voc, "--seeds", "1")
    folder = Path("runs/reproduce/voc")
    names = ["figure1_confusion.png", "figure1_distance.png", "figure4_logits.png", "figure5_results.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    text = (folder / "results.md").read_text()
    assert all(f"]({name})" in text for name in names) and "not run" not in text
    assert "probe" in json.loads((folder / "reclip++/0/voc/scores/scores.json").read_text())["distill"]
    values = results()["values"]
    assert "reclip++/distill/probe" in values and "maskclip+/distill/space_preference" in values
    assert {f"{name}/rectify/{measure}" for name in ("reclip", "reclip++")
            for measure in MEASURES[2:]} <= values.keys()


def test_run_with_other_numbers_is_refused(voc, capsys):
    """A folder never mixes two recipes; --out keeps both."""
    run(reproduce, "table5", *voc, "--seeds", "1")
    said = refusal(capsys, reproduce, "table5", *voc, "--seeds", "1", "--epochs", "1")
    assert "'epochs': 1" in said and "'epochs': 2" in said and "--out" in said
    assert "expected one or more of stages, table1" in refusal(capsys, reproduce, "table10", *voc)
    said = refusal(capsys, reproduce, "--data", "photos")
    assert "expected toyland or another whose labels are known" in said


def typed(said: str) -> None:
    """Run what --plan prints, line by line, as somebody would."""
    for line in re.findall(r"^(?:python|mkdir|cp) .*", said, flags=re.M):
        command, *words = shlex.split(line)
        if command == "python":
            assert in_this_process(words, Path(os.devnull), {}).returncode == 0, line
        else:
            subprocess.run([command, *words], check=True)


def test_plan_runs_nothing_and_names_commands_that_work(voc, capsys):
    run(reproduce, "table5", *voc, "--seeds", "1", "--plan")
    said = capsys.readouterr().out
    assert not Path("runs").exists()
    assert re.findall(r"^python (\S+)", said, flags=re.M) == ["rectify.py", "paper/run.py"]
    assert "paper/run.py addition --stage rectify" in said
    typed(said)
    before = checkpoints()
    values = run(reproduce, "table5", *voc, "--seeds", "1")
    assert len(values) == 2 and "| subtraction | 73.5 |" in said and checkpoints() == before


def test_plan_of_a_student_copies_its_teacher(voc, capsys):
    """Typed one after another the commands give what a reproduction gives, which then has nothing left to
    do."""
    run(reproduce, "table8", *voc, "--seeds", "1", "--epochs", "1", "--plan")
    typed(capsys.readouterr().out)
    before = checkpoints()
    assert len(before) == 6 and len(run(reproduce, "table8", *voc, "--seeds", "1", "--epochs", "1")) == 3
    assert "commands to run" not in capsys.readouterr().out and checkpoints() == before


def test_table_asked_for_later_costs_no_number_of_an_earlier_one(voc):
    """What was measured beside fewer stages is measured again behind the training of the next one."""
    run(reproduce, "table6", *voc, "--seeds", "1")
    values = run(reproduce, "stages", "table6", *voc, "--seeds", "1")
    assert len(values) == 5 and len(results()["claims"]) == 2


@pytest.mark.parametrize("change, said", [("teacher", "another teacher"), ("images", "another images")])
def test_student_of_another_teacher_and_run_on_other_images_are_refused(voc, capsys, change, said):
    run(reproduce, "table8", *voc, "--seeds", "1")
    if change == "images":
        path = Path("data/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    else:
        path = Path("runs/reproduce/voc/loss-mask/0/voc/distill/checkpoint.pt")
        files.save(path, files.read(path) | {"settings": files.read(path)["settings"] | {"teacher": 1}})
        metrics = json.loads(path.with_name("metrics.json").read_text())
        metrics["fingerprint"]["weights"] = sha256(path)[:16]  # measured, and all is well but for the teacher
        path.with_name("metrics.json").write_text(json.dumps(metrics))
    assert said in refusal(capsys, reproduce, "table8", *voc, "--seeds", "1")


@pytest.mark.parametrize("change", ["weights", "images", "precision", "split", "refinements", "not JSON",
                                    "no such measure"])
def test_numbers_of_something_else_are_measured_again(voc, change):
    """metrics.json says what it is of; what is not of this checkpoint and these labels does not count."""
    run(reproduce, "table5", *voc, "--seeds", "1")
    path = Path("runs/reproduce/voc/addition/0/voc/rectify/metrics.json")
    made, job = reproduction(*voc), Job("addition", "rectify", 0)
    made.open()
    metrics = json.loads(path.read_text())
    assert made.result(job) == {"rectify": metrics}
    if change == "no such measure":
        del metrics["miou"]
    else:
        metrics["fingerprint"][change] = {"refinements": {"prompt_denoising": 0.5}}.get(change, 7)
    path.write_text("{" if change == "not JSON" else json.dumps(metrics))
    assert made.result(job) is None and made.missing([stage_1("addition")], 1) == [job]


def test_missing_labels_are_told_before_anything_is_trained(voc, capsys):
    for path in Path("data/VOCdevkit/VOC2012/SegmentationClass").iterdir():
        path.unlink()
    assert "expected labels" in refusal(capsys, reproduce, "table5", *voc) and not checkpoints()


def test_training_that_fails_is_told_with_its_name(voc, capsys, monkeypatch):
    """And with its last words, and the command to try."""
    def main(args, system=rectify.System()):
        raise_on_purpose()
    monkeypatch.setattr(rectify, "main", main)
    monkeypatch.setattr(errors, "raised_on_purpose", lambda error: True)
    said = refusal(capsys, reproduce, "table5", *voc, "--seeds", "1")
    assert "2 that failed" in said and "reclip++, rectify, seed 0: expected the command to succeed" in said
    assert "expected a finite number, found nan" in said and "python rectify.py --data voc" in said


def raise_on_purpose():
    raise ValueError("expected a finite number, found nan.")


@pytest.mark.slow
def test_failure_stops_nothing_but_what_needs_it(voc, monkeypatch, capsys):
    """The rest is run and written; the failure is told at the end; the same command tries it again, and
    nothing else."""
    def step(*args):
        raise_on_purpose()

    broken = replace(systems.SYSTEMS["reclip"], loss=step)
    monkeypatch.setattr(errors, "raised_on_purpose", lambda error: True)
    with monkeypatch.context() as patched:
        patched.setitem(systems.SYSTEMS, "reclip", broken)
        said = refusal(capsys, reproduce, "table2", "table5", *voc, "--seeds", "1")
    assert "1 that failed" in said and "reclip, rectify, seed 0" in said and "found nan" in said
    assert "reclip++/distill/miou" in results()["values"] and "addition/rectify/miou" in results()["values"]
    assert not any(cell.startswith("reclip/") for cell in results()["values"])
    before = checkpoints()
    values = run(reproduce, "table2", "table5", *voc, "--seeds", "1")
    assert ("reclip", "distill", "miou") in values and before.items() < checkpoints().items()


def test_what_needs_what_needs_a_failure_is_left_out_too(voc, monkeypatch):
    """A teacher fails: neither its student nor what measures that is started."""
    started = []
    def start(command, log, environment):
        started.append(command)
        log.write_text("error: no")
        return ended_with(2)
    monkeypatch.setattr(reproduce, "start", start)
    made = reproduction(*voc)
    made.open()
    jobs = reproduce.plan([("own-head", "distill", "class_preference"), stage_1("addition")], 1)
    assert len(jobs) == 4 and len(made.run(jobs)) == 2
    assert [command[:2] for command in started] == [["rectify.py", "--data"], ["paper/run.py", "addition"]]


# ---------------------------------------------------------------------------- real processes

def test_processes_are_stopped_when_nobody_reads_what_is_printed(voc, monkeypatch):
    """`reproduce.py | head`: what runs beside the job that has just ended must not go on for hours."""
    made, said, processes = reproduction(*voc[:-1], "2"), [], []
    made.open()

    def start(command, log, environment):
        seconds = 30 if processes else 0
        processes.append(subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"]))
        return processes[-1]

    def print_until_closed(*words, **_) -> None:
        said.append(words)
        if len(said) > 1:                               # after the line that says how many there are
            raise BrokenPipeError

    monkeypatch.setattr(reproduce, "start", start)
    monkeypatch.setattr(made, "outcome", lambda job, code: ("done", ""))
    monkeypatch.setattr(reproduce, "print", print_until_closed, raising=False)
    with pytest.raises(BrokenPipeError):
        made.run([Job("reclip++", "evaluate", 0), Job("reclip++", "evaluate", 1)])
    assert len(processes) == 2 and processes[1].returncode not in (0, None)


@pytest.mark.slow
def test_processes_give_what_one_process_gives(voc, capsys, monkeypatch):
    """Measured by two processes at a time after the trainings were made in this one, whose recipes are the
    tests'."""
    values = run(reproduce, "stages", "table7", *voc, "--seeds", "1")
    for name in ("evaluate/metrics.json", "scores/scores.json"):
        for path in Path("runs/reproduce/voc").glob(f"*/0/voc/{name}"):
            path.unlink()
    before = checkpoints()
    monkeypatch.setattr(reproduce, "start", REAL_START)
    assert run(reproduce, "stages", "table7", *voc[:-1], "2", "--seeds", "1") == values
    assert checkpoints() == before and "4 commands to run, 2 at a time" in capsys.readouterr().out


@pytest.mark.slow
def test_command_that_fails_is_told_with_its_last_words(voc, capsys, monkeypatch):
    run(reproduce, "stages", *voc, "--seeds", "1")
    Path("runs/reproduce/voc/reclip++/0/voc/evaluate/metrics.json").unlink()
    label = next(Path("data/VOCdevkit/VOC2012/SegmentationClass").glob("2007_000033.png"))
    label.write_bytes(b"no picture")
    monkeypatch.setattr(reproduce, "start", REAL_START)
    said = refusal(capsys, reproduce, "stages", *voc[:-1], "2", "--seeds", "1")
    assert "reclip++, evaluate, seed 0" in said and "exit code 2" in said
    assert label.name in said and "evaluate.py --data voc" in said


WAITING = """
import subprocess, sys
sys.path.insert(0, {root!r})
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)        # whatever the tests were started with
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pathlib import Path
from paper import reproduce
flags = ["--data", "voc", "--out", {out!r}, "--jobs", "1"]
made = reproduce.Reproduction(reproduce.flags().parse_args(flags))
made.setup = type("Setup", (), dict(device=type("D", (), dict(type="cpu")), vocabulary=type("V", (), dict(
    names=reproduce.DATASETS["voc"].names))))
made.labels = ["one"]
made.command = lambda job: [{child!r}]
jobs = [reproduce.Job("reclip++", "evaluate", seed) for seed in (0, 1)]
made.run(jobs)
"""
CHILD = """
import sys, time
from pathlib import Path
try:
    Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    Path("saved").touch()
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopping_asks_every_process_once_and_waits_for_it(how, tmp_path):
    """It saves before it ends, and nothing is started any more."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    code = WAITING.format(root=str(ROOT), out=str(tmp_path / "runs"), child=str(child))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    parent.send_signal(getattr(signal, how))
    said, _ = parent.communicate(timeout=30)
    assert "Stopping: waiting for what still runs to save." in said and parent.returncode != 0
    assert "The same command goes on." in said and (tmp_path / "saved").exists()
    logs = [path.parent.name for path in (tmp_path / "runs").rglob("evaluate.log")]
    assert logs == ["0"], "the second job was not begun"


@pytest.mark.slow
def test_what_the_bias_says_is_told_of_every_run(voc, capsys):
    """paper/bias.py: with the bias left out of a run without a decoder, MaskCLIP is left."""
    run(rectify, *voc[:-2])
    run(paper_run, "without-decoder", *voc[:-2], "--stage", "rectify", "--out", "no decoder")
    expected = run(paper_run, "without-decoder", "--stage", "evaluate", "--out", "no decoder")
    capsys.readouterr()
    found = bias.main(bias.flags().parse_args(["runs", "no decoder"]))
    *_, ours, without = capsys.readouterr().out.strip().splitlines()
    assert found["no decoder"][-2:] == [expected["rectify"]["miou"], expected["maskclip"]["miou"]]
    assert without.split()[-2:] == [f"{value:.1f}" for value in found["no decoder"][-2:]]
    assert -1 <= found["runs"][0] <= 1 and len(ours.split()) == 7
    done = subprocess.run([sys.executable, ROOT / "paper/bias.py", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a run folder with a rectification" in done.stderr
    with pytest.raises(ValueError, match="--split test: expected a dataset with that split"):
        bias.main(bias.flags().parse_args(["runs", "--split", "test"]))


def test_bias_that_is_no_map_of_its_own_is_refused(voc, capsys):
    """ReCLIP's depends on the image."""
    run(paper_run, "reclip", *voc[:-2], "--stage", "rectify")
    capsys.readouterr()
    with pytest.raises(ValueError, match="expected a system with a bias map and a frozen CLIP, found reclip"):
        bias.main(bias.flags().parse_args(["runs"]))


# ---------------------------------------------------------------------------- the page of the real datasets

def rows_of_real_datasets() -> list[str]:
    """A line for every number that the paper gives: table, row, paper's, ours (nothing), the command that
    fills it."""
    lines = []
    for data, title in tables.NAMES.items():
        lines += [f"### {title}", "", "| table | | paper | ours | command |", "|---|---|---|---|---|"]
        for name, table in TABLES.items():
            for row in table.rows if name != "stages" and table.source == "paper" else ():
                if data in row.paper:
                    number = tables.shown(row.paper[data], table.digits)
                    command = f"`python paper/reproduce.py {name} --data {data}`" if row.cell else "–"
                    title = table.title.split(":")[0]
                    lines.append(f"| {title} | {row.title} | {number} | | {command} |")
        lines.append("")
    return lines


def test_page_of_real_datasets_has_a_row_and_a_command_for_every_number_of_the_paper():
    """paper/results/real.md; where it differs, its tables are to be replaced by what this prints."""
    text = (ROOT / "paper/results/real.md").read_text(encoding="utf-8")
    expected = "\n".join(rows_of_real_datasets())
    assert expected.strip() in text, expected


def test_page_of_the_room_has_the_papers_table_ii_and_todays_count():
    """paper/README.md: Table II cell by cell, every system by name, and as many claims as toyland.md says."""
    text = (ROOT / "paper/README.md").read_text(encoding="utf-8")
    for row in TABLES["table2"].rows:
        if row.paper:
            title, ours = (row.title, " / –") if row.cell else (f"{row.title}, cited", "")
            cells = [f"{row.paper[data]:.1f}{ours}" if data in row.paper else "–" for data in tables.NAMES]
            assert tables.line([title, *cells]) in text
    named = set(re.findall(r"`([\w+-]+)`", text))
    assert set(systems.SYSTEMS) - {"reclip++", "no-bias+loss-cosine", "no-bias+loss-area"} <= named
    assert set(WHAT) - {f"table{number}" for number in range(2, 9)} <= named
    [(held, judged, papers, of_papers, ours, of_ours)] = re.findall(
        r"^(\d+) of (\d+) held: (\d+) of (\d+) of the paper's, (\d+) of (\d+) of ours\.",
        (ROOT / "paper/results/toyland.md").read_text(), flags=re.M)
    page = " ".join(text.split())
    assert int(judged) == int(of_papers) + int(of_ours) <= len(CLAIMS)
    assert f"In Toyland **{held} held**, {papers} of the paper's and {ours} of ours" in page
    of_paper = sum(not claim.text.startswith("ours:") for claim in CLAIMS)
    assert (f"Of the {len(CLAIMS)} claims, {of_paper} are the paper's and {len(CLAIMS) - of_paper} are "
            "ours.") in page
    stages = json.loads((ROOT / "paper/results/stages.json").read_text())["stages"]
    for name in ("rectify", "distill"):
        assert f"| {stages[name]['title']} | {tables.mean_and_spread(stages[name]['miou'])} | " in text


# ---------------------------------------------------------------------------- MAFT's table

def test_mafts_table_is_made_by_the_same_command_and_taken_as_it_is(voc, monkeypatch, capsys):
    """Its published numbers beside ours; another recipe is refused, numbers of another checkpoint are not
    taken."""
    small = replace(maft.Recipe(), first_block=1, short_side=32, superpixels=(4,), batch_size=2)
    monkeypatch.setitem(maft.RECIPES, "voc", small)
    values = run(reproduce, "maft", *voc, "--seeds", "2")
    assert set(values) == {("maft", tower, measure) for tower in ("frozen", "tuned") for measure in OF_MAFT}
    assert all(len(of_seeds) == 2 for of_seeds in values.values())
    said = capsys.readouterr().out
    assert re.search(r"unseen classes: frozen CLIP \| 78\.6 \|", said)
    assert re.search(r"unseen classes: tuned CLIP \| 81\.8 \|", said) and "2 commands to run" in said
    before = checkpoints()
    assert run(reproduce, "maft", *voc, "--seeds", "2") == values
    assert checkpoints() == before and "commands to run" not in capsys.readouterr().out
    path = Path("runs/reproduce/voc/maft/0/voc/maft/metrics.json")
    metrics = json.loads(path.read_text())
    metrics["tuned"]["fingerprint"]["weights"] = "another"
    files.write_json(path, metrics)
    run(reproduce, "maft", *voc, "--seeds", "2")
    assert "1 commands to run" in capsys.readouterr().out and checkpoints() == before
    assert "another recipe" in refusal(capsys, reproduce, "maft", *voc, "--epochs", "2")
