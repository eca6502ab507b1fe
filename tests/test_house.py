"""The laws of the house: arrows run down, the main path knows nothing that was built on it, labels are out of
reach.

    python -m pytest tests/test_house.py

Imports are read from the source, also those inside functions, so that a law holds for lines that no test
runs. For each law a house is built that breaks it: else it could be a law that nothing can break.
"""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import data
import distill
import evaluate
import rectify
import segment
from conftest import ROOT
from harness import errors, runs
from helpers import python_files, refusal, run, toy_setup, write_label, write_photos
from paper.systems import SYSTEMS

# Every room and its floor. A file may import from its own room and from rooms on lower floors; two rooms of
# one floor do not know each other.
FLOORS = {"clip": 0, "harness": 0, "toyland": 1, "datasets": 2, "data": 3, "rectify": 4, "distill": 5,
          "evaluate": 6, "segment": 7, "paper": 7, "benchmarks": 8, "exercises": 8}
# What a person who reads the method opens. No system of the paper but ReCLIP++ is named there.
MAIN_PATH = ["data.py", "rectify.py", "distill.py", "evaluate.py", "segment.py", "harness"]
# their last lines, as a script, import evaluate
MEASURED_AFTERWARDS = {"rectify.py", "distill.py", "paper/clip_s4.py"}


# ---------------------------------------------------------------------------------------- reading the imports

@dataclass(frozen=True)
class Arrow:
    """`source` imports `target`: files of the house, as paths from its root."""
    source: str
    target: str
    line: int


def modules_named(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """What a statement or a call imports, dotted. `from a import b` may mean the module a.b as well as a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[:len(package) - node.level + 1] if node.level else ()
        base = ".".join((*above, *([node.module] if node.module else [])))
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def file_of(root: Path, module: str) -> str | None:
    """The file of the house that a dotted name means, if it is one."""
    path = root / Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.relative_to(root).as_posix()
    return None


def arrows_of(root: Path, file: Path) -> list[Arrow]:
    """Every import in a file, wherever it stands. `from a import b` of a module b is an arrow to b alone.
    (That a package is run before its modules is Python's doing.)"""
    source, tree = file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8"))
    if source in MEASURED_AFTERWARDS:
        tree.body = without_measuring(tree.body)
    package, found = Path(source).parent.parts, []
    for node in ast.walk(tree):
        names = modules_named(node, package)
        if isinstance(node, ast.ImportFrom):
            base, *members = names
            modules = [name for name in members if file_of(root, name)]
            names = modules + ([base] if len(modules) < len(members) else [])
        found += [Arrow(source, target, node.lineno) for name in names if (target := file_of(root, name))]
    return found


def without_measuring(body: list[ast.stmt]) -> list[ast.stmt]:
    """A module without `import evaluate` in its last statement, which is run as a script alone. No other
    file and no other place is excused."""
    last = body[-1]
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        class Excused(ast.NodeTransformer):
            def visit_Import(self, node):
                return None if [alias.name for alias in node.names] == ["evaluate"] else node

        return [*body[:-1], Excused().visit(last)]
    return body


def all_arrows(root: Path) -> list[Arrow]:
    return [arrow for file in python_files(root) for arrow in arrows_of(root, file)]


def room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def circles(arrows: list[Arrow]) -> list[list[str]]:
    """Files that import each other, one after the other back to the first."""
    targets: dict[str, list[str]] = {}
    for arrow in arrows:
        targets.setdefault(arrow.source, []).append(arrow.target)
    found, done = [], set()

    def follow(file: str, path: list[str]) -> None:
        if file in path:
            found.append([*path[path.index(file):], file])
        elif file not in done:
            for target in targets.get(file, []):
                follow(target, [*path, file])
            done.add(file)

    for file in targets:
        follow(file, [])
    return found


def faults(root: Path) -> list[str]:
    """Every import that breaks a law, as a line that says where it is."""
    arrows, said = all_arrows(root), []
    for file in python_files(root):
        if room(file.relative_to(root).as_posix()) not in FLOORS:
            said.append(f"{file.relative_to(root)} is in no room of the house")
    for arrow in arrows:
        here, there = FLOORS.get(room(arrow.source), 99), FLOORS.get(room(arrow.target), 99)
        if room(arrow.source) != room(arrow.target) and there >= here:
            said.append(f"{arrow.source}:{arrow.line} imports {arrow.target}, which is not below it")
    return said + [f"a circle: {' imports '.join(circle)}" for circle in circles(arrows)]


def reached(arrows: list[Arrow], *files: str) -> set[str]:
    """All files that are run when these are imported. A package's first file is run before its modules."""
    found, new = set(), list(files)
    while new:
        file = new.pop()
        if file in found:
            continue
        found.add(file)
        new += [arrow.target for arrow in arrows if arrow.source == file]
        if len(Path(file).parts) > 1:
            new.append(f"{Path(file).parts[0]}/__init__.py")
    return found


# ----------------------------------------------------------------------------------------- 1. arrows run down

def test_no_arrow_runs_up_and_none_in_a_circle():
    assert faults(ROOT) == []


def test_the_imports_are_seen():
    """The reader of imports is not blind: some arrows that are certainly there, and every file at the top."""
    arrows = {(arrow.source, arrow.target) for arrow in all_arrows(ROOT)}
    assert arrows >= {("rectify.py", "data.py"), ("distill.py", "rectify.py"), ("segment.py", "evaluate.py"),
                      ("evaluate.py", "datasets/labels.py"), ("data.py", "harness/runs.py"),
                      ("clip/load.py", "clip/model.py"), ("data.py", "datasets/words.py"),
                      ("paper/systems.py", "distill.py")}
    assert {path.name for path in ROOT.glob("*.py")} <= {source for source, _ in arrows}


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of all sources, to plant an import in."""
    for file in python_files(ROOT):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    assert faults(tmp_path) == []
    return tmp_path


PLANTED = {
    "an upward import": ("data.py", "import rectify", "data.py:{line} imports rectify.py"),
    "of one name": ("rectify.py", "from distill import Student", "rectify.py:{line} imports distill.py"),
    "inside a function": ("datasets/words.py", "def late():\n    import data",
                          "datasets/words.py:{line} imports data.py"),
    "inside a class's method": ("clip/model.py",
                                "class Late:\n    def run(self):\n        from harness import files",
                                "clip/model.py:{line} imports harness/files.py"),
    "by its name as text": ("harness/files.py",
                            "import importlib\nimportlib.import_module('datasets.labels')",
                            "harness/files.py:{line} imports datasets/labels.py"),
    "of a neighbour": ("segment.py", "from paper import systems",
                       "segment.py:{line} imports paper/systems.py"),
    "in the last lines of another script": ("evaluate.py", "if __name__ == '__main__':\n    import segment",
                                            "evaluate.py:{line} imports segment.py"),
    "of the paper by the method": ("distill.py", "def main():\n    import paper.systems",
                                   "distill.py:{line} imports paper/systems.py"),
    "of a benchmark": ("paper/run.py", "from benchmarks import benchmark",
                       "paper/run.py:{line} imports benchmarks/"),
}


@pytest.mark.parametrize("file, lines, expected", PLANTED.values(), ids=PLANTED)
def test_planted_import_is_found_wherever_it_stands(house, file, lines, expected):
    path = house / file
    text = path.read_text(encoding="utf-8").rstrip("\n")
    path.write_text(f"{text}\n\n\n{lines}\n", encoding="utf-8")
    expected = expected.format(line=len(text.splitlines()) + 2 + len(lines.splitlines()))
    assert [said for said in faults(house) if said.startswith(expected)]


@pytest.mark.parametrize("file", sorted(MEASURED_AFTERWARDS))
@pytest.mark.parametrize("where", ["before", "another"])
def test_only_the_last_lines_may_import_what_measures_and_that_alone(house, file, where):
    """`import evaluate` at the top, or another module in the last lines, is not excused."""
    text = (house / file).read_text(encoding="utf-8")
    assert "        import evaluate" in text.splitlines()[-2]
    if where == "before":
        text = text.replace("\nimport data\n", "\nimport data\nimport evaluate\n")
    else:
        text += "        import segment\n"
    (house / file).write_text(text, encoding="utf-8")
    # in paper/, which is above what measures, it is the way to the labels that is found
    assert any(said.startswith(file) and "not below it" in said for said in faults(house)) \
        or "datasets/labels.py" in reached(all_arrows(house), file)


def test_circle_between_files_of_one_room_is_found(house):
    for file, other in (("toyland/world.py", "networks"), ("toyland/networks.py", "world")):
        path = house / file
        path.write_text(path.read_text() + f"\n\ndef late():\n    from toyland import {other}\n")
    assert [said for said in faults(house) if said.startswith("a circle: ") and "toyland/world.py" in said]


def test_circle_of_three_files_through_relative_imports_is_found(house):
    for file, other in (("tokenizer", "model"), ("model", "load"), ("load", "tokenizer")):
        path = house / f"clip/{file}.py"
        path.write_text(path.read_text() + f"\nfrom .{other} import x\n")
    assert [said for said in faults(house) if said.startswith("a circle: ") and "clip/tokenizer.py" in said]


def test_file_in_no_room_is_found(house):
    (house / "utils.py").write_text("import data\n")
    assert "utils.py is in no room of the house" in faults(house)


# -------------------------------------------------------------- 2. the main path knows nothing built on it

WORDS = r"(?i:\bablations?\b)|\bchosen\b|\bimport paper\b|\bfrom paper\b"
OTHER_SYSTEMS = [name for name in SYSTEMS if name != "reclip++"]


def named(text: str) -> list[str]:
    """What a text names that it should not know: ablations, paper/ as a module, another system. "ReCLIP++"
    and "in-addition" are none of these."""
    return re.findall(WORDS, text) + [name for name in OTHER_SYSTEMS
                                      if re.search(rf"(?<![\w+-]){re.escape(name)}(?![\w+-])", text)]


@pytest.mark.parametrize("path", MAIN_PATH)
def test_no_script_of_the_main_path_names_another_system(path):
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("*.py"))
    assert files and {file.name: named(file.read_text(encoding="utf-8")) for file in files} \
        == {file.name: [] for file in files}


def test_another_system_would_be_noticed():
    assert named('system = SYSTEMS["no-bias"]  # an ablation') == ["ablation", "no-bias"]
    assert named('parser.add_argument("--ablation")') == named("Ablation".lower()) == ["ablation"]
    assert named("from paper.systems import SYSTEMS as ABLATIONS") == ["from paper", "ABLATIONS"]
    assert named("# ReCLIP++ in-addition; paper/systems.py hands in others") == []


def test_no_parser_has_a_flag_for_another_system():
    for script in (rectify, distill, evaluate, segment):
        flags = {option for action in script.flags()._actions for option in action.option_strings}
        assert not flags & {"--ablation", "--system", "--loss", "--head"}
        assert named(script.flags().format_help()) == []


def test_flags_default_to_none_and_nothing_asks_whether_one_exists():
    """No argparse.SUPPRESS, no hasattr(args, …): a flag that was not given is None."""
    for file in python_files(ROOT):
        text = file.read_text(encoding="utf-8")
        assert "SUPPRESS" not in text and not re.search(r"(has|get)attr\((self\.)?args, \"", text), file


def test_nothing_is_patched_at_run_time():
    """Law 6: what varies is an argument. No module's insides are exchanged, and no method of an object. (The
    checks of the exercises put stand-ins in the place of what a student has not written yet.)"""
    for file in python_files(ROOT, leave_out=("benchmarks", "exercises")):
        text = file.read_text(encoding="utf-8")
        assert "_modules[" not in text and "setattr(" not in text.replace("object.__setattr__", ""), file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                assert not any(isinstance(target, ast.Attribute) for target in node.targets), file


# ---------------------------------------------------------------------------- 3. labels are out of reach

TRAINING = ["data.py", "rectify.py", "distill.py", "toyland/__init__.py", "toyland/world.py",
            "toyland/networks.py", "toyland/pretrain.py", "paper/systems.py", "paper/clip_s4.py"]


def test_nothing_that_trains_can_reach_what_reads_labels():
    """Not in one import nor over several. What measures can."""
    arrows = all_arrows(ROOT)
    assert {file for file in reached(arrows, *TRAINING) if file.startswith("datasets/")} \
        == {"datasets/__init__.py", "datasets/hypotheses.py", "datasets/images.py", "datasets/words.py"}
    assert set(TRAINING) >= {file.relative_to(ROOT).as_posix() for file in (ROOT / "toyland").glob("*.py")}
    assert "datasets/labels.py" in reached(arrows, "evaluate.py")
    # The check opens labels too: nothing imports it.
    assert not [arrow for arrow in arrows if arrow.target == "datasets/check.py"]


@pytest.mark.parametrize("file", ["datasets/images.py", "datasets/words.py", "harness/files.py",
                                  "toyland/networks.py"])
def test_a_way_to_the_labels_would_be_found(house, file):
    path = house / file
    path.write_text(path.read_text() + "\n\ndef late():\n    from datasets import labels\n")
    assert "datasets/labels.py" in reached(all_arrows(house), *TRAINING)


@pytest.mark.slow
def test_training_does_not_import_what_reads_labels():
    """Seen from the interpreter: both stages, all that they import, and the other systems."""
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n" \
              "import rectify, distill, data, toyland.world, toyland.networks, toyland.pretrain\n" \
              "import paper.systems\nprint(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = ended.stdout.split()
    assert "rectify" in modules and "data" in modules and "datasets.images" in modules
    assert not {"datasets.labels", "datasets.check", "evaluate"} & set(modules)


# ------------------------------------------------------------------------------------------ 4. seven lines

# Which function implements an equation; the rectifier's parts are named by what holds them.
EQUATIONS = {1: "reference_features", 2: "rectifier.bias", 3: "rectifier.subtract", 4: "rectifier.decoder",
             5: "rectified_masks", 6: "multi_label_hypothesis", 7: "loss"}


def equation_lines(file: Path, function: str) -> list[tuple[int, str]]:
    """The statements of a function that carry "Eq. n" in a comment: (n, what is called), in their order."""
    text = file.read_text(encoding="utf-8")
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    [body] = [node.body for node in ast.parse(text).body
              if isinstance(node, ast.FunctionDef) and node.name == function]
    found = []
    for statement in body:
        numbers = range(statement.lineno, statement.end_lineno + 1)
        of_statement = "".join(comments.get(number, "") for number in numbers)
        called = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
        found += [(int(number), ast.unparse(called.func) if isinstance(called, ast.Call) else "")
                  for number in re.findall(r"Eq\. (\d+)", of_statement)]
    return found


def test_train_step_is_the_list_of_equations():
    """Seven statements, Eq. 1 to Eq. 7 in this order, each a call of what implements it."""
    assert equation_lines(ROOT / "rectify.py", "train_step") == list(EQUATIONS.items())


def test_each_equation_has_its_number_where_it_is_implemented():
    implemented = [rectify.reference_features, rectify.bias_logits, rectify.subtract_bias, rectify.Decoder,
                   rectify.rectified_masks, rectify.multi_label_hypothesis, rectify.contrastive_loss,
                   distill.mask_loss, distill.feature_loss, distill.total_loss]
    for number, function in enumerate(implemented, start=1):
        assert re.search(rf"Eq\. {number}\b", function.__doc__), function


def test_stage_2_has_equations_5_to_10_in_order():
    numbers = [number for number, _ in equation_lines(ROOT / "distill.py", "train_step")]
    assert numbers == [5, 6, 8, 9, 10]


def test_an_equation_that_hides_would_be_noticed(tmp_path):
    """In the docstring, two on one line, or without a call: none of it counts as a line of its own."""
    (tmp_path / "a.py").write_text('def train_step(x):\n    """Eq. 1."""\n    y = x         # Eq. 2\n'
                                   '    z = f(g(y))   # Eq. 3 and Eq. 4\n    return h(z)   # Eq. 5\n')
    assert equation_lines(tmp_path / "a.py", "train_step") == [(2, ""), (3, "f"), (4, "f"), (5, "h")]


# ---------------------------------------------------------------------------- 5. the shape of the house

LONGEST = 110


def test_no_line_is_longer_than_110_characters():
    long = []
    for file in [*python_files(ROOT), *sorted((ROOT / "tests").glob("*.py"))]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if len(line) > LONGEST:
                long.append(f"{file.relative_to(ROOT)}:{number} has {len(line)}")
    assert long == []


def test_every_script_ends_in_one_paragraph_and_knows_debug():
    """The last statement of every script: `with errors.one_paragraph(FLAGS.debug): …`"""
    scripts = [file for file in python_files(ROOT, leave_out=("benchmarks", "exercises"))
               if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    assert len(scripts) >= 10
    for file in scripts:
        last = ast.parse(file.read_text(encoding="utf-8")).body[-1]
        assert isinstance(last, ast.If) and isinstance(last.body[0], ast.With), file
        around = ast.unparse(last.body[0].items[0].context_expr)
        assert around.startswith("errors.one_paragraph(") and around.endswith(".debug)"), file


# What the picture in README.md shows at the top; dotfiles are for tools.
PICTURE = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "clip", "data.py", "rectify.py",
           "distill.py", "evaluate.py", "segment.py", "datasets", "toyland", "paper", "harness", "tests",
           "benchmarks", "exercises"}


def test_everything_at_the_top_is_in_the_picture():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= PICTURE
    assert PICTURE - top <= {"exercises"}


# ---------------------------------------------------------------------------------- 6. the trap is shut

OTHER = "python paper/run.py other"


def test_a_part_that_nothing_looks_up_raises():
    """An entry that a system does not have was ignored once, and trained plain ReCLIP++."""
    for kind in (rectify.System, distill.System):
        for wrong in (dict(Decoder=rectify.Decoder), dict(decoder=rectify.Decoder), dict(hypothesis=len)):
            with pytest.raises(TypeError, match=next(iter(wrong))):
                kind(**wrong)
    with pytest.raises(TypeError):
        replace(distill.System(), Loss=len)


def test_a_number_that_no_recipe_has_raises(tmp_path):
    setup = toy_setup(tmp_path)
    setup.training_images = {"a": Path("a.png"), "b": Path("b.png")}
    for numbers, error, named in (({"any": {"no_such_number": 1}}, TypeError, "no_such_number"),
                                  ({"folder": {"no_such_number": 1}}, TypeError, "no_such_number"),
                                  ({"vco": {"epochs": 3}}, ValueError, "numbers for vco")):
        with pytest.raises(error, match=named):
            rectify.recipe_of(setup, rectify.System(numbers=numbers))
        with pytest.raises(error, match=named):
            data.recipe_for(setup, distill.RECIPES, distill.System(student_numbers=numbers).student_numbers)
    found = rectify.recipe_of(setup, rectify.System(numbers={"any": {"epochs": 3}, "voc": {"epochs": 4}}))
    assert found == replace(rectify.RECIPES["folder"], epochs=3)


def test_a_typo_in_a_systems_code_keeps_its_type_and_blames_no_checkpoint(trained_voc, capsys):
    """When weights are read and when the rectifier is built: NameError; no word of removing a good file."""
    class Misspelt(rectify.Rectifier):
        def load_state_dict(self, weights):
            return super().load_state_dict(wieghts)                                         # noqa: F821

    class Unbuilt(rectify.Rectifier):
        def __init__(self, *args):
            super().__init__(*arguments)                                                    # noqa: F821

    setup = data.open_setup(evaluate.flags().parse_args(["--data", "voc", "--device", "cpu"]),
                            runs.find("runs", "voc", "rectify"))
    checkpoint = runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")
    before = checkpoint["path"].read_bytes()
    for rectifier in (Misspelt, Unbuilt):
        system = rectify.System(rectifier=rectifier)
        with pytest.raises(NameError), errors.one_paragraph():
            rectify.load_rectifier(setup, checkpoint, system)
    with pytest.raises(NameError), errors.one_paragraph():
        args = rectify.flags().parse_args(["--data", "voc", "--device", "cpu", "--out", "other"])
        args.clip = checkpoint["settings"]["clip_name"]
        rectify.main(args, rectify.System(rectifier=Unbuilt))
    assert "Remove it" not in capsys.readouterr().err and checkpoint["path"].read_bytes() == before


@pytest.fixture
def other_system(place, tiny_clip, monkeypatch):
    """A rectification and a student of another system in runs/photos."""
    write_photos(place / "photos", "a.jpg", "b.jpg", "c.jpg")
    Path("names.txt").write_text("cat\nsofa\nwall\n")
    system = distill.System(name="other", command=OTHER)
    given = ["--data", "photos", "--classes", "names.txt", "--clip", str(tiny_clip), "--device", "cpu"]
    for script in (rectify, distill):
        script.main(script.flags().parse_args(given), system)
    return system


@pytest.mark.parametrize("script, flags", [
    (rectify, ["--data", "photos", "--classes", "names.txt", "--resume"]), (distill, []),
    (evaluate, ["--labels", "truth"]), (segment, ["photos/a.jpg"])],
    ids=["rectify --resume", "distill", "evaluate", "segment"])
def test_checkpoint_of_another_system_names_its_command(other_system, tiny_clip, capsys, script, flags):
    """Which script knows the parts is said; none of them takes the weights for ReCLIP++'s."""
    write_label(Path("truth/a.png"), np.zeros((40, 56)))
    before = {path: path.read_bytes() for path in Path("runs").rglob("*.pt")}
    flags = [*flags, "--clip", tiny_clip] if script is rectify else flags
    said = refusal(capsys, script, *flags)
    assert OTHER in said and "other" in said and "checkpoint.pt" in said, said
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.pt")} == before


def test_student_of_another_system_names_its_command_too(other_system, tiny_clip, capsys):
    """The teacher is ReCLIP++'s, the student another: evaluate and segment say so."""
    given = ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip]
    run(rectify, *given)
    system = distill.System(name="other", command=OTHER, teacher=rectify.System())
    distill.main(distill.flags().parse_args(["--device", "cpu"]), system)
    said = refusal(capsys, segment, "photos/a.jpg")
    assert "distill/checkpoint.pt" in said and OTHER in said


def test_who_knows_the_system_can_read_its_checkpoint(other_system):
    """The same parts under the same name: no refusal."""
    setup = data.open_setup(evaluate.flags().parse_args(["--device", "cpu"]),
                            runs.find("runs", None, "rectify", "distill"))
    found = evaluate.predictors(setup, rectify.query_of(setup), ["rectify", "distill"], other_system)
    assert {predictor.system for predictor in found.values()} == {"other"}
