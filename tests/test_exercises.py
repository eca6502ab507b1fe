"""exercises/: the hand-out holds no solution, the checks tell right from wrong, the marking survives hostile
work.

    python -m pytest tests/test_exercises.py

Solutions are pasted and mistakes are made by text, in the hand-out's files. Wrong bodies are the original
ones with one piece replaced; where the piece is no longer there, the test says so.
"""

import functools
import importlib
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from exercises import check, checks, grade, handout, hidden, ladder, lecture, report, sources, worker
from helpers import write_photos

CLOSED = [one for one in ladder.LADDER if not one.open]
FUNCTIONS = [function for one in CLOSED for function in one.functions]
ALONE = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")


def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The hand-out, as a student opens it."""
    out = tmp_path_factory.mktemp("student") / "project"
    handout.main(handout.flags().parse_args([str(out)]))
    return out


def python(folder: Path, *command: str, seconds: int = 300):
    return subprocess.run([sys.executable, *command], cwd=folder, env=ALONE, capture_output=True, text=True,
                          timeout=seconds)


# ------------------------------------------------------------------------------------------ the list

def test_the_list_names_functions_that_exist_and_each_has_checks_of_both_kinds():
    ladder.refuse_missing(ladder.LADDER)
    assert [one.number
            for one in ladder.LADDER] == list(range(1, len(ladder.LADDER) + 1)) and len(ladder.LADDER) >= 10
    assert len(set(FUNCTIONS)) == len(FUNCTIONS)
    assert set(checks.CHECKS) == set(FUNCTIONS) == {case.function for case in hidden.cases()}
    assert set(checks.OPEN) == {one.number for one in ladder.LADDER if one.open}


def test_a_function_that_no_longer_exists_is_an_error():
    gone = ladder.Exercise(7, "x", ("rectify.py:contrast",), 1, 1, "", "", "")
    with pytest.raises(ValueError, match="exercise 7, rectify.py: expected a function contrast, found none"):
        ladder.refuse_missing([gone])
    with pytest.raises(ValueError, match="expected the file loss.py"):
        ladder.refuse_missing([ladder.Exercise(7, "x", ("loss.py:f",), 1, 1, "", "", "")])


def test_the_readme_is_what_the_list_says():
    readme = text_of("exercises/README.md")
    assert ladder.with_page(readme) == readme, "run python exercises/ladder.py"


def test_help_answers_without_torch():
    for name in ("handout", "check", "grade", "lecture", "ladder"):
        code = ("import sys, runpy; sys.argv = [%r, '--help']\n"
                "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
                "except SystemExit: print('torch' in sys.modules)")
        said = python(Path("/"), "-c", code % str(ROOT / "exercises" / f"{name}.py"))
        assert said.stdout.startswith("usage:") and said.stdout.rstrip().endswith("False"), said.stderr


# ------------------------------------------------------------------------------------------ the hand-out

def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


def test_no_solution_is_in_the_hand_out(student):
    """Neither a body nor a statement of one, names and spacing aside, in code or prose."""
    tales = {function: handout.telltales(sources.body_of(text_of(sources.split(function)[0]),
                                                         sources.split(function)[1]))
                                                         for function in FUNCTIONS}
    assert all(tales.values())
    for name, content in everything(student).items():
        text = content.decode("utf-8", errors="replace") if not name.endswith((".png", ".pt", ".gz")) else ""
        for function, of_function in tales.items():
            if name != "exercises/ladder.py":
                left = sources.given_away(text, of_function)
                assert not left, f"{name} gives {function} away: {left[0]}"
    left_out = ("tests", "benchmarks", ".git", ".ci", "runs", "data", "exercises/hidden.py",
                "exercises/grade.py",
                "exercises/handout.py", "exercises/worker.py", "exercises/lecture.py")
    assert not [name for name in left_out if (student / name).exists()]
    assert "lecturers" not in (student / "exercises" / "README.md").read_text(encoding="utf-8").lower()


def test_the_search_finds_a_solution_under_other_names():
    body = sources.body_of(text_of("rectify.py"), "contrastive_loss")
    other = body.replace("pooled", "z").replace("log_probability", "lp").replace("  ", " ")
    assert sources.given_away(f"Some prose, then\n{textwrap.dedent(other)}\nand more.",
                              handout.telltales(body))
    short = sources.body_of(text_of("rectify.py"), "subtract_bias")
    assert sources.given_away("def f():\n    return   query-bias", handout.telltales(short))
    assert not sources.given_away(text_of("harness/files.py"), handout.telltales(body))


def test_a_solution_in_prose_or_in_another_function_is_noticed():
    one, = (one for one in CLOSED if one.number == 7)
    texts = {"rectify.py": text_of("rectify.py"),
             "extra.py": "def again(features, masks, query, hypothesis, scale):\n"
             + sources.body_of(text_of("rectify.py"), "contrastive_loss") + "\n"}
    blank = handout.blanked(texts, [one])
    assert "NotImplementedError" in blank["extra.py"]
    assert "log_softmax" not in blank["extra.py"] + blank["rectify.py"]
    with pytest.raises(ValueError, match="notes.md: expected nothing of rectify.py:contrastive_loss, "
                                         "exercise 7"):
        handout.blanked({**texts, "notes.md": texts["extra.py"]}, [one])


def test_functions_that_say_a_solution_in_other_words_are_blank_with_it(student, tmp_path):
    handout.main(handout.flags().parse_args([str(tmp_path / "some"), "--only", "5"]))
    for number, functions in ladder.ALIKE.items():
        for file, name in map(sources.split, functions):
            assert handout.GIVES_AWAY in sources.body_of((student / file).read_text(), name), (number, name)
            assert (tmp_path / "some" / file).read_text() == text_of(file)


def test_no_link_of_a_hand_out_leads_nowhere(student):
    """Folders that are left out are named there, not linked."""
    pages = [path for path in student.rglob("*.md") if ".git" not in path.parts]
    links = [(page, link) for page in pages
             for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))]
    assert len(links) > 50
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
    assert "[`benchmarks/`]" not in (student / "README.md").read_text() and "`benchmarks/`" in (
        student / "README.md").read_text()


def test_two_runs_give_the_same_bytes_and_only_some_exercises_may_be_chosen(student, tmp_path):
    handout.main(handout.flags().parse_args([str(tmp_path / "again")]))
    assert everything(tmp_path / "again") == everything(student)
    handout.main(handout.flags().parse_args([str(tmp_path / "some"), "--only", "10", "5"]))
    files = everything(tmp_path / "some")
    assert files["rectify.py"].count(b"raise NotImplementedError(") == 1
    assert files["evaluate.py"].count(b"raise NotImplementedError(") == 2
    assert files["clip/model.py"] == (ROOT / "clip/model.py").read_bytes()
    assert b"### 5." in files["exercises/README.md"] and b"### 6." not in files["exercises/README.md"]
    with pytest.raises(ValueError, match="a folder that does not exist yet"):
        handout.main(handout.flags().parse_args([str(tmp_path / "some")]))
    with pytest.raises(ValueError, match="exercise 99"):
        handout.main(handout.flags().parse_args([str(tmp_path / "none"), "--only", "99"]))


def test_every_blank_keeps_its_head_and_docstring_and_names_its_exercise(student):
    for one in CLOSED:
        for function in one.functions:
            file, name = sources.split(function)
            blank = sources.find((student / file).read_text(encoding="utf-8"), name)
            whole = sources.find(text_of(file), name)
            for part in ("args", "returns", "decorator_list"):
                assert dumped(getattr(blank, part)) == dumped(getattr(whole, part))
            assert dumped(whole.body[0]) == dumped(blank.body[0]) and len(blank.body) == 2
            assert f"exercise {one.number}: write {name}" in sources.ast.unparse(blank.body[1])


def dumped(node) -> str:
    nodes = node if isinstance(node, list) else [node]
    return "".join(sources.ast.dump(one) for one in nodes if one is not None)


# ------------------------------------------------------------------------------------------ right solutions

# Runs in a hand-out: for each step, files are replaced and all modules read anew; prints what is red with its
# reason.
DRIVER = """
import json, sys
sys.path.insert(0, ".")
sys.dont_write_bytecode = True
from pathlib import Path
for step in json.load(open(sys.argv[1])):
    for name, text in step["files"].items():
        Path(name).write_text(text, encoding="utf-8")
    for name in [name for name in sys.modules if name.split(".")[0] in (
            "exercises", "clip", "datasets", "toyland", "harness", "paper", "data", "rectify", "distill",
            "evaluate")]:
        del sys.modules[name]
    from exercises import check, ladder
    results = [check.result_of(one) for one in ladder.chosen(step["only"])]
    print("RESULT", json.dumps({one.number: one.reason for one in results if not one.passed}))
"""


def driven(folder: Path, steps: list[dict]) -> list[dict[int, str]]:
    """Per step: the exercises that are red, and why."""
    (folder.parent / "driver.py").write_text(DRIVER)
    (folder.parent / "steps.json").write_text(json.dumps(steps))
    said = python(folder, str(folder.parent / "driver.py"), str(folder.parent / "steps.json"))
    lines = [line.partition(" ")[2] for line in said.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == len(steps), said.stderr[-2000:]
    return [{int(number): reason for number, reason in json.loads(line).items()} for line in lines]


def pasted(texts: dict[str, str], exercise: ladder.Exercise) -> dict[str, str]:
    """The files of an exercise with the original functions pasted over the blank ones."""
    found = dict(texts)
    for function in exercise.functions:
        file, name = sources.split(function)
        found[file] = sources.transplant(found[file], text_of(file), [name])
    return found


def blank_texts(folder: Path) -> dict[str, str]:
    return {file: (folder / file).read_text(encoding="utf-8")
            for file in {sources.split(one)[0] for one in FUNCTIONS}}


@pytest.mark.slow
def test_each_exercise_alone_turns_green_and_all_of_them_in_any_order(student):
    blank, numbers = blank_texts(student), [one.number for one in CLOSED]
    steps = [{"files": pasted(blank, one), "only": numbers} for one in CLOSED]
    order, texts = CLOSED.copy(), blank
    random.Random(1).shuffle(order)
    for one in order:
        texts = pasted(texts, one)
        steps.append({"files": texts, "only": numbers})
    red = driven(student, [*steps, {"files": blank, "only": numbers}])
    for one, left in zip(CLOSED, red):
        assert set(left) == set(numbers) - {one.number}, left
    for done, left in enumerate(red[len(CLOSED):-1], start=1):
        assert set(left) == set(numbers) - {one.number for one in order[:done]}, left
    assert set(red[-1]) == set(numbers)
    assert all("not written yet (exercise" in reason for reason in red[-1].values())


@pytest.mark.slow
def test_everything_that_is_not_blank_runs(student):
    code = ("import data, rectify, distill, evaluate, segment, clip, paper.run, paper.reproduce, "
            "datasets.labels, toyland.pretrain, toyland.world as w; w.scene('val', 0); "
            "clip.tokenize(['cat']); from exercises.probes import tiny_clip; import torch; "
            "tiny_clip().encode_image(torch.zeros(1, 3, 32, 32))")
    said = python(student, "-c", code)
    assert said.returncode == 0, said.stderr
    write_photos(student.parent / "photos", "a.png", "b.png")
    (student.parent / "names.txt").write_text("cat\nsky\n")
    said = python(student, "rectify.py", "--device", "cpu", "--data", str(student.parent / "photos"),
                  "--classes",
                  str(student.parent / "names.txt"), "--clip", "toyland", "--out",
                  str(student.parent / "runs"))
    assert "error: exercise 2: write query_features." in said.stderr, said.stderr
    assert said.returncode == 2 and "Traceback" not in said.stderr


def test_the_check_prints_a_table_and_gradescopes_file(student, tmp_path):
    said = python(Path("/"), str(student / "exercises" / "check.py"), "--only", "9", "10", "--json",
                  str(tmp_path / "results.json"))
    assert re.search(r"9 +Distillation.* FAILED +0/10 +mask_loss: not written yet \(exercise 9: write "
                     r"mask_loss",
                     said.stdout), said.stdout + said.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == 0 and [test["max_score"] for test in found["tests"]] == [10, 5]
    assert all({"name", "number", "status", "output", "score"} <= set(test) for test in found["tests"])


def test_in_the_full_project_all_are_green(capsys, tmp_path):
    results = check.main(check.flags().parse_args(["--json", str(tmp_path / "results.json")]))
    assert not [one.reason for one in results if not one.passed]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == sum(one.marks for one in CLOSED)
    assert all("score" not in test for test in found["tests"][-2:])  # open: for a person to mark
    assert "and 20 that a person gives" in capsys.readouterr().out


@pytest.mark.slow
def test_the_open_exercises_turn_green_for_a_system_and_a_class_of_ones_own(student):
    """A system that takes half the bias, a class beside the others; nothing else is written but exercises 1
    to 8."""
    texts = blank_texts(student)
    for one in CLOSED:
        texts = pasted(texts, one)
    systems = (student / "paper/systems.py").read_text(encoding="utf-8")
    own = ("\n\nclass HalfBias(Rectifier):\n    def subtract(self, features, query, bias):\n"
           "        return super().subtract(features, query, 0.5 * bias)\n\n\n"
           "SYSTEMS['half'] = other('half', rectifier=HalfBias)\n")
    world = (student / "toyland/world.py").read_text(encoding="utf-8")
    moon = world.replace('"balloon": ((170', '"moon": ((250, 250, 200), ("sky",)), "balloon": ((170',
                         1).replace(
        "DRAWINGS = dict(", "DRAWINGS = dict(moon=sun, ", 1)
    assert moon.count("moon") == 2
    red = driven(student, [
        {"files": {**texts, "paper/systems.py": systems + own, "toyland/world.py": moon}, "only": [11, 12]},
        {"files": {"paper/systems.py": systems + "\n\nSYSTEMS['same'] = other('same')\n"}, "only": [11]},
        {"files": {"paper/systems.py": systems, "toyland/world.py": world} | blank_texts(student),
         "only": [11, 12]}])
    assert red[0] == {} and "it has the parts and the numbers of ReCLIP++" in red[1][11]
    assert "no system of your own" in red[2][11] and "no class of your own" in red[2][12]


# ------------------------------------------------------------------------------------------ wrong solutions

# exercise: function, piece of its body, what stands there instead, a word of the public check's reason
WRONG = {
    1: [("values", "2 * E:], self.in_proj_bias[2 * E:]", "E:2 * E], self.in_proj_bias[E:2 * E]", "single "
                                                                                                 "token"),
        ("values", "self.out_proj(F.linear(x, self.in_proj_weight[2 * E:], self.in_proj_bias[2 * E:]))",
         "F.linear(x, self.in_proj_weight[2 * E:], self.in_proj_bias[2 * E:])", "single token"),
        ("dense", "return self.ln_post(x) @ self.proj", "return x @ self.proj", "path")],
    2: [("query_features", "F.normalize(features, dim=-1).mean", "features.mean", "weighs alike"),
        ("query_features", "F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1)",
         "F.normalize(features, dim=-1).mean(dim=0)", "not normalised"),
        ("query_logits", '"bdhw,cd->bchw"', '"bdhw,cd->bcwh"', "(1, 4, 2, 3)")],
    3: [("encode_prompt", "self.positional_embedding[place]", "self.positional_embedding[:len(place)]",
         "sentence"),
        ("reference_features", "reference.norm()", "reference.norm(dim=-1, keepdim=True)",
         "not each row"),
        ("reference_features", "reference.norm()", "reference.norm().detach()", "detached"),
        ("encode_prompt", "prompt])", "prompt.detach()])", "gradient"),
        ("encode_prompt", "if P + longest >", "if P + longest >=", "fill the 77"),
        ("bias_logits", '"dhw,cd->chw"', '"dhw,cd->cwh"', "(3, 2, 3)")],
    4: [("subtract_bias", "query - bias", "query + bias", "bias"),
        ("forward", "[features, logits]", "[logits, features]", "channel"),
        ("forward", "self.norm(self.conv(torch.cat([features, logits], dim=1)))",
         "self.conv(torch.cat([features, logits], dim=1))", "mean 0")],
    5: [("rectified_masks", "gumbel = -exponential.log()", "gumbel = exponential.log()", "sign"),
        ("rectified_masks", "softmax(dim=1)", "softmax(dim=-1)", "softmax"),
        ("rectified_masks", "return hard + (soft - soft.detach())", "return hard", "no gradient"),
        ("rectified_masks", "uniform.clamp(min=1e-10)", "torch.rand_like(uniform)", "only randomness"),
        ("rectified_masks", "uniform.clamp(min=1e-10)", "uniform.clamp(0.01, 0.99)", "clamp less"),
        ("rectified_masks", "uniform.clamp(min=1e-10)", "uniform.clamp_(max=0.99)", "in place"),
        ("rectified_masks", "soft - soft.detach()",
         "(scale * decoded).softmax(dim=1) - (scale * decoded).softmax(dim=1).detach()", "has decided")],
    6: [("windows", "for top in tops for left in lefts", "for left in lefts for top in tops", "row by row"),
        ("window_votes", "mean(dim=-2)", "mean(dim=-1)", "shape"),
        ("multi_label_hypothesis", "(votes > threshold) | best", "(votes >= threshold) | best", "equal")],
    7: [("contrastive_loss", "return -(", "return (", "ln"),
        ("contrastive_loss", "log_softmax(dim=-1)", "log_softmax(dim=-2)", "softmax is over"),
        ("contrastive_loss", " / masks[0, 0].numel()", " / masks.sum(dim=(2, 3)).clamp(min=1)[..., None]",
         "mask's own area"),
        ("contrastive_loss", "hypothesis.sum(dim=-1)", "hypothesis.shape[-1]", "divided by C")],
    8: [("train_step", "rectifier.decoder(features, logits)", "logits", "Eq. 4"),
        ("train_step", "recipe.mask_scale", "recipe.loss_scale", "mask_scale"),
        ("train_step", "processes.uniform((len(features), len(query), *features.shape[-2:]), noise)",
         "torch.rand(len(features), len(query), *features.shape[-2:])", "generator")],
    9: [("mask_loss", "student_logits.float(), pseudo_label", "-student_logits.float(), pseudo_label",
         "sure"),
        ("feature_loss", "resized(teacher_features, student_features.shape[-2:]))",
         "resized(teacher_features, student_features.shape[-2:]), reduction='sum')", "mean"),
        ("total_loss", "alpha * feature + beta * text", "beta * feature + alpha * text", "0.25")],
    10: [("confusion_matrix", "true_label[counted].long() * classes + predicted[counted].long()",
          "predicted[counted].long() * classes + true_label[counted].long()", "row"),
         ("confusion_matrix", "true_label != IGNORE", "true_label < 10 ** 6", ""),
         ("class_iou", " - intersection", "", "3 of 3")],
}


def with_mistake(exercise: ladder.Exercise, name: str, old: str, new: str) -> tuple[str, str]:
    """(file, name in it) and the whole file with one mistake in one function."""
    function, = (one for one in exercise.functions if one.endswith(f":{name}") or one.endswith(f".{name}"))
    file, whole = sources.split(function)
    right = sources.text_of(text_of(file), whole)
    head, mark, body = right.rpartition('"""')
    assert old in body, f"{function}: the piece to be replaced is no longer there: {old}"
    return file, text_of(file).replace(right, head + mark + body.replace(old, new))


@pytest.fixture(scope="module")
def answers_to():
    """The hidden cases, and what is expected for each of them."""
    cases = hidden.cases()
    return cases, [worker.perform(case.function, case.arguments, case.gradients) for case in cases]


class Wrongly:
    """This process's functions with others in their place, for a moment: as if a room had them."""

    def __init__(self, file: str, text: str, names: list[str]):
        self.module, self.text, self.names = importlib.import_module(file[:-3].replace("/", ".")), text, names

    def __enter__(self):
        self.before = {}
        for name in self.names:
            *classes, last = name.split(".")
            owner = functools.reduce(getattr, classes, self.module)
            self.before[owner, last] = owner.__dict__[last] if classes else getattr(owner, last)
            scope = {}
            exec(textwrap.dedent(sources.text_of(self.text, name)), vars(self.module), scope)
            setattr(owner, last, scope[last])

    def __exit__(self, *_):
        for (owner, last), one in self.before.items():
            setattr(owner, last, one)


def hidden_result(exercise: ladder.Exercise, answers_to) -> report.Result:
    """The lecturer's judgement of what this process's functions are now, answers through text and back."""
    cases, expected = answers_to
    mine = [number for number, case in enumerate(cases) if case.function in exercise.functions]
    answers = {}
    for place, number in enumerate(mine):
        case = cases[number]
        try:
            given = worker.from_text(json.loads(json.dumps(worker.to_text(case.arguments))))
            answer = worker.to_text(worker.perform(case.function, given, case.gradients))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers[place] = worker.from_text(json.loads(json.dumps(answer)))
    return grade.judged(exercise, [cases[number] for number in mine], answers,
                        [expected[number] for number in mine])


@pytest.mark.parametrize("exercise", CLOSED, ids=lambda one: str(one.number))
def test_wrong_bodies_are_red_in_both_checks_with_a_reason_that_helps(exercise, answers_to):
    assert check.result_of(exercise).passed and hidden_result(exercise, answers_to).passed
    assert len(WRONG[exercise.number]) >= 3
    for name, old, new, word in WRONG[exercise.number]:
        file, text = with_mistake(exercise, name, old, new)
        whole, = (sources.split(one)[1] for one in exercise.functions if re.search(rf"[:.]{name}$", one))
        with Wrongly(file, text, [whole]):
            public, marked = check.result_of(exercise), hidden_result(exercise, answers_to)
        for result in (public, marked):
            assert not result.passed and result.marks < result.most, (name, new)
            assert whole in result.reason and "\n" not in result.reason
            assert len(result.reason) > len(whole) + 20
            assert "Traceback" not in result.reason
        assert word in public.reason, public.reason


@pytest.mark.parametrize("exercise", CLOSED, ids=lambda one: str(one.number))
def test_empty_bodies_are_red_in_both_checks(exercise, answers_to):
    """With the hand-out's exception, and with `pass`."""
    for function in exercise.functions:
        file, name = sources.split(function)
        for text in (sources.blank(text_of(file), {name: f"exercise {exercise.number}: write {name}"}),
                     sources.blank(text_of(file), {name: "x"}).replace('raise NotImplementedError(\n',
                                                                       "(").replace(
                         '"x")', 'None)')):
            with Wrongly(file, text, [name]):
                public, marked = check.result_of(exercise), hidden_result(exercise, answers_to)
            for result in (public, marked):
                assert not result.passed and name in result.reason, (function, result)


# ---------------------------------------------------------------------------------------- hostile submissions

def submission(folder: Path, body: str, exercise: int = 4, top: str = "") -> Path:
    """The full project's file with one function's body replaced, and more at the top level."""
    one, = (one for one in CLOSED if one.number == exercise)
    file, name = sources.split(one.functions[0])
    text = sources.blank(text_of(file), {name: "x"})
    text = re.sub(r'raise NotImplementedError\(\n\s+"x"\)', lambda _: body.replace("\n", "\n    "), text)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text + "\n\n" + top)
    return folder


def marked(folder: Path, *more: str, exercise: int = 4) -> tuple[dict, float]:
    """The one exercise's entry of results.json, and the seconds it took."""
    path, started = folder.parent / "results.json", time.monotonic()
    grade.main(grade.flags().parse_args([str(folder), "--only", str(exercise), "--json", str(path), *more]))
    found = json.loads(path.read_text())
    assert found["score"] == found["tests"][0]["score"]
    return found["tests"][0], time.monotonic() - started


def test_the_right_solution_gets_full_marks_from_a_process_of_its_own(tmp_path):
    """Also with a helper at the top level, and inside one more folder, as archives have it."""
    folder = submission(tmp_path / "in" / "their project", "return less(query, bias)",
                        top="def less(a, b):\n    print('x' * 10 ** 7)\n    return a - b\n")
    test, _ = marked(folder.parent)
    assert test["status"] == "passed" and test["score"] == 5, test


# body, top level → what the reason says; each function of Exercise 4 but the first is right and gets its half
HOSTILE = {
    "exit": ("exit()", "", "ended before it had answered"),
    "os._exit": ("import os\nos._exit(0)", "", "ended before it had answered"),
    "crash": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "", "killed by signal"),
    "megabytes": ("import os\nwhile True:\n    for fd in range(3, 9):\n        try:\n"
                  "            os.write(fd, b'x' * 2 ** 20)\n        except OSError:\n            pass", "",
                  "more than 64 MB"),
    "patches": ("import builtins, json, sys, torch\nmain = sys.modules['__main__']\n"
                "main.to_text = lambda value: {'the result': 'right', 'passed': True}\n"
                "torch.equal = torch.allclose = lambda *a, **b: True\n"
                "main.perform = lambda *a: {'the result': torch.ones(())}\n"
                "return query", "", "subtract_bias:"),
    "forged": ("import json, os, sys\n"
               "for name in ('results.json', '../results.json', '../../results.json', "
               "os.environ['RESULTS']):\n"
               "    try:\n        open(name, 'w').write(json.dumps({'score': 100, 'tests': []}))\n"
               "    except OSError:\n        pass\n"
               "for fd in range(3, 9):\n    try:\n"
               "        os.write(fd, json.dumps({'score': 5, 'passed': True}).encode() + b'\\n')\n"
               "    except OSError:\n        pass\nreturn query", "", "subtract_bias:"),
}


@pytest.mark.parametrize("name",
                         ["os._exit", "patches", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                                            ("exit", "crash", "megabytes", "forged"))])
def test_a_hostile_submission_gets_no_full_marks_and_ends(name, tmp_path):
    body, top, reason = HOSTILE[name]
    body = body.replace("os.environ['RESULTS']", repr(str(tmp_path / "results.json")))
    test, seconds = marked(submission(tmp_path / "in", body, top=top))
    assert test["status"] == "failed" and test["score"] < 5 and reason in test["output"], test
    assert seconds < 60


@pytest.mark.slow
def test_hostile_code_at_the_top_level_is_not_run_and_not_believed(tmp_path):
    """What is no definition, import or constant is left behind; a constant's value runs in the process of its
    own."""
    top = "import os\nos._exit(0)\nX = os._exit(0)\n"
    test, _ = marked(submission(tmp_path / "in", "return query", top=top))
    assert test["score"] == 0 and "ended before it had answered" in test["output"]


@pytest.mark.slow
def test_an_endless_loop_ends_when_the_time_is_over(tmp_path):
    test, seconds = marked(submission(tmp_path / "in", "while True:\n    pass"), "--seconds", "6")
    assert test["score"] == 0 and "the time was over" in test["output"], test
    assert seconds < 60


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
def test_a_fork_that_lives_on_is_ended(tmp_path):
    """It leaves its group and holds the answers' pipe open; neither keeps the grader waiting."""
    mark = f"left-{os.getpid()}-{time.time_ns()}"
    body = ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            f"        os.execvp('sleep', ['{mark}', '600'])\n    os._exit(0)\nreturn query")
    test, seconds = marked(submission(tmp_path / "in", body))
    assert test["score"] < 5 and seconds < 60, test
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in quietly(path)]
    assert not left


def quietly(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_overwritten_checkers_and_tests_are_not_read(tmp_path):
    folder = submission(tmp_path / "in", "return query + bias")
    for name in ("exercises/check.py", "exercises/checks.py", "exercises/grade.py", "exercises/hidden.py",
                 "exercises/worker.py", "exercises/probes.py", "tests/test_rectify.py", "pytest.py",
                 "torch.py",
                 "conftest.py", "sitecustomize.py", "json.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os\nos._exit(0)\n")
    test, _ = marked(folder)
    assert test["score"] == 2.5 and "subtract_bias" in test["output"], test


def reason_of(folder: Path, exercise: int) -> str:
    one, = (one for one in CLOSED if one.number == exercise)
    with pytest.raises(ValueError) as error:
        grade.with_solution(grade.blank_project(), one, folder)
    return str(error.value)


def test_what_is_no_file_with_the_function_gets_a_reason(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    assert "rectify.py: it is not in the submission" in reason_of(folder, 7)
    (folder / "rectify.py").symlink_to(ROOT / "rectify.py")
    assert "rectify.py: expected a file, found a link" in reason_of(folder, 7)
    (folder / "clip").symlink_to(ROOT / "clip")
    assert "found a link" in reason_of(folder, 1)
    (folder / "rectify.py").unlink()
    os.mkfifo(folder / "rectify.py")
    assert "expected a file" in reason_of(folder, 7)
    (folder / "rectify.py").unlink()
    for content, reason in ((b"def f(:\n", "cannot read it, line 1"),
                            (b"x = 1\n", "expected a function contrastive_loss"),
                            (b"\xff\xfe", "expected UTF-8"), (b"x" * 2 ** 21, "at most 1 MB"),
                            (b"(" * 10 ** 5, "cannot read it"), (b"a\0b", "")):
        (folder / "rectify.py").write_bytes(content)
        assert reason in reason_of(folder, 7)


def test_answers_are_read_without_trust():
    case = hidden.Case("rectify.py:subtract_bias", "a case", {}, [])
    expected = {"the result": torch.ones(2, 3)}
    for answer, reason in ((None, "no answer"), ([1], "no answer"), ({}, "expected a tensor"),
                           ({"the result": torch.full((2, 3), torch.nan)}, "NaN"),
                           ({"the result": "right"}, "right"),
                           ({"the result": torch.ones(3, 2)}, "swapped"),
                           ({"the result": torch.ones(1)}, "shape"),
                           ({"the result": -torch.ones(2, 3)}, "sign"),
                           ({"the result": 2 * torch.ones(2, 3)}, "2 times"),
                           ({"the result": torch.ones(2, 3, dtype=torch.int64)}, "kind"),
                           ({"raises": "ValueError"}, "raised"), ({"passed": True}, "expected a tensor")):
        assert reason in grade.wrong_with(case, expected, answer)
    assert grade.wrong_with(case, expected, {"the result": torch.ones(2, 3)}) is None
    for forged in ({"tensor": "AAAA", "dtype": "object", "shape": [1]},
                   {"tensor": "AAAA", "dtype": "int64", "shape": [9]},
                   {"tensor": "!", "dtype": "int64", "shape": []}):
        with pytest.raises(Exception):
            worker.from_text(forged)
    for value in (torch.tensor([True, False]), torch.randn(2, 0, 3), torch.tensor(3),
                  torch.tensor([1.5, torch.nan])):
        back = worker.from_text(json.loads(json.dumps(worker.to_text({"x": [value, "s", 1, None]}))))["x"]
        assert back[0].dtype == value.dtype and torch.equal(back[0].nan_to_num(), value.nan_to_num())
        assert back[1:] == ["s", 1, None]


def test_a_line_of_a_report_cannot_disturb_the_terminal():
    assert report.one_line("a\n\x1b[31mb\tc" + "d" * 1000) == report.one_line("a [31mb c" + "d" * 1000)
    assert len(report.one_line("d" * 1000)) == 240


@pytest.mark.slow
def test_the_marking_of_the_whole_project_and_of_the_whole_hand_out(student, tmp_path):
    for folder, score in ((ROOT, 100), (student, 0)):
        said = python(tmp_path, str(ROOT / "exercises" / "grade.py"), str(folder), "--json", "r.json",
                      "--seed", "3")
        assert json.loads((tmp_path / "r.json").read_text())["score"] == score, said.stdout + said.stderr


# ------------------------------------------------------------------------------------------ the lecture page

def test_the_lecture_page_and_its_pictures_fit_together():
    text = text_of("exercises/lecture.md")
    pictures = sorted((ROOT / "exercises" / "lecture").glob("*.png"))
    assert sorted(re.findall(r"\(lecture/(\w+\.png)\)", text)) == [path.name for path in pictures]
    assert sum(path.stat().st_size for path in pictures) < 600_000
    in_order = re.findall(r"^## .*\(Eq\. (.*)\)$", text, re.MULTILINE)
    assert in_order == ["1 and 2", "3 and 4", "5", "6", "7", "8 to 10"]
    assert all(len(line) <= 110 for line in text.splitlines() if not line.startswith("|"))
    assert lecture.PAGE == ROOT / "exercises" / "lecture.md"
