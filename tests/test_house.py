"""The laws of the house: which way imports run, what the main path knows, what can read a label, how long
lines are.

    python -m pytest tests/test_house.py

    clip, harness → toyland → datasets → data → rectify → distill → evaluate → segment, paper
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill
import evaluate
import rectify
import segment
from conftest import ROOT
from helpers import refusal, run, write_voc_tree
from paper import systems

# From below to above; of one line none imports another. What may import everything is imported by nothing.
FLOORS = [{"clip", "harness"}, {"toyland"}, {"datasets"}, {"data"}, {"rectify"}, {"distill"}, {"evaluate"},
          {"segment", "paper"}, {"benchmarks", "exercises"}]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAIN_PATH = ["data.py", "rectify.py", "distill.py", "evaluate.py", "segment.py"]


def sources(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] in
             {*FLOOR, *(f"{name}.py" for name in FLOOR)}]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def imports(path: Path, root: Path, with_main: bool = False) -> set[str]:
    """Dotted names of this project that a file imports, also inside functions; without what stands in its
    last lines under `if __name__ == "__main__"`."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    if not with_main:
        tree.body = [node for node in tree.body
                     if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*path.relative_to(root).parts[:-node.level],
                             *([node.module] if node.module else [])]) \
                if node.level else node.module
            names |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return {name for name in names if name.split(".")[0] in FLOOR}


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def modules(root: Path) -> dict[str, Path]:
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sources(root)}


def faults(root: Path) -> list[str]:
    """Arrows that run up, and circles between files."""
    found, known = [], modules(root)
    edges = {}
    for name, path in known.items():
        room = room_of(path, root)
        wanted = imports(path, root)
        for other in sorted(wanted):
            to = other.split(".")[0]
            if to != room and FLOOR[to] >= FLOOR[room]:
                found.append(f"{path.relative_to(root)} imports {other}, which is not below it")
        edges[name] = {other for other in wanted if other in known and other != name}
    found += [f"circle through {name}" for name in known if reaches(name, name, edges)]
    return found


def reaches(start: str, goal: str, edges: dict[str, set[str]]) -> bool:
    """Whether a walk along imports leads from start to goal. A package's own __init__ is no station between
    its files."""
    seen, waiting = set(), list(edges[start])
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    return False


def test_arrows_run_down_and_there_is_no_circle():
    assert len(sources(ROOT)) > 25
    assert faults(ROOT) == []


def test_only_the_training_scripts_measure_in_their_last_lines():
    """What the rule above leaves out: `python rectify.py` and `python distill.py` end by calling evaluate."""
    upward = {path.name: sorted(imports(path, ROOT, with_main=True) - imports(path, ROOT))
              for path in sources(ROOT)
              if any(FLOOR[name.split(".")[0]] > FLOOR[room_of(path, ROOT)]
                     for name in imports(path, ROOT, with_main=True))}
    assert upward == {"rectify.py": ["evaluate"], "distill.py": ["evaluate"]}


@pytest.mark.parametrize("file, line, said", [
    ("rectify.py", "import distill", "rectify.py imports distill"),
    ("harness/files.py", "def late():\n    from data import Setup", "harness/files.py imports data"),
    ("clip/model.py", "from harness import files", "clip/model.py imports harness"),
    ("datasets/images.py", "from datasets import labels\nimport datasets.labels", "circle")])
def test_the_test_above_can_fail(tmp_path, file, line, said):
    """A planted arrow upwards, one inside a function, one between neighbours, and a circle."""
    for path in sources(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert faults(tmp_path) == []
    with open(tmp_path / file, "a") as source:
        source.write(f"\n{line}\n")
    assert any(said in fault for fault in faults(tmp_path)), faults(tmp_path)


def test_main_path_names_no_other_system():
    """No ablation, no name of paper/systems.py but ReCLIP++'s own, and no import of paper/."""
    others = [name for name in systems.SYSTEMS if name != "reclip++" and name not in ("addition", "reclip")]
    words = re.compile(r"\bablat|\bABLATIONS\b|\bchosen\(|import paper|from paper|"
                       + "|".join(re.escape(f'"{name}"') for name in others), re.IGNORECASE)
    for name in [*MAIN_PATH, *(str(path.relative_to(ROOT)) for path in (ROOT / "harness").glob("*.py"))]:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not words.search(text), (name, words.search(text)[0])


def test_nothing_that_trains_can_reach_the_reader_of_labels():
    """By imports as they are written, and as they happen in a fresh process."""
    known = modules(ROOT)
    edges = {name: {other for other in imports(path, ROOT) if other in known} for name, path in known.items()}
    for name in ("data", "rectify", "distill", "toyland.pretrain", "datasets.images", "datasets.words",
                 "paper.systems"):
        assert not reaches(name, "datasets.labels", edges), name
    assert reaches("evaluate", "datasets.labels", edges)                            # the walk does find it
    program = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nimport rectify, distill, toyland.pretrain, "
               "paper.systems\nprint(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            check=True).stdout.split()
    assert "rectify" in loaded and "datasets.labels" not in loaded


def test_train_step_is_seven_visible_lines():
    """Eq. 1 to Eq. 7, one statement each, in order, each a call."""
    text = (ROOT / "rectify.py").read_text(encoding="utf-8")
    [step] = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
              and node.name == "train_step"]
    lines = text.splitlines()
    numbered = [(node, re.findall(r"Eq\. (\d)", lines[node.end_lineno - 1])) for node in step.body]
    numbered = [(node, numbers) for node, numbers in numbered if numbers and not isinstance(node, ast.Expr)]
    assert [numbers for _, numbers in numbered] == [[str(number)] for number in range(1, 8)]
    assert all(node.lineno == node.end_lineno and isinstance(node.value, ast.Call) for node, _ in numbered)


def test_lines_hold():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in ROOT.rglob("*.py")
            if not {".git", "__pycache__", ".venv", "venv", "data",
                    "runs"} & set(path.relative_to(ROOT).parts)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 110]
    assert long == []


def test_top_level_is_the_picture():
    """Every entry is one that README's map names."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "README.md", "LICENSE", "requirements.txt", "pyproject.toml", *MAIN_PATH, "clip", "datasets",
                                                                  "toyland", "paper",
        "harness", "tests", "benchmarks", "exercises"}


# ------------------------------------------------------------------------------------------ the trap

def test_part_that_nothing_looks_up_raises():
    with pytest.raises(TypeError, match="Decoder"):
        distill.System(name="mine", Decoder=object)
    with pytest.raises(TypeError, match="decoder"):
        rectify.System(name="mine", decoder=object)


def test_number_that_no_recipe_has_raises(place, tiny_clip):
    write_voc_tree(place / "data")
    args = rectify.flags().parse_args(["--data", "voc", "--clip", str(tiny_clip), "--device", "cpu"])
    for numbers in ({"any": {"no_such_number": 1}}, {"voc": {"learning_rat": 1}}):
        with pytest.raises(TypeError, match="no_such_number|learning_rat"):
            rectify.main(args, rectify.System(name="mine", numbers=numbers))


def test_typo_in_a_system_keeps_its_traceback_and_blames_no_checkpoint(trained_voc):
    class Misspelt(rectify.Rectifier):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = tensor_of_one                                              # noqa: F821

    mine = distill.System(name="reclip++", rectifier=Misspelt)
    with pytest.raises(NameError):
        distill.main(distill.flags().parse_args(["--device", "cpu"]), mine)


def test_script_that_does_not_know_a_system_says_which_command_does(place, tiny_clip, capsys):
    write_voc_tree(place / "data")
    args = rectify.flags().parse_args(["--data", "voc", "--clip", str(tiny_clip), "--device", "cpu"])
    rectify.main(args, systems.SYSTEMS["no-bias"])
    for script, flags in ((distill, []), (evaluate, []),
                          (segment, ["data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg"])):
        said = refusal(capsys, script, *flags)
        assert "found one of no-bias" in said and "python paper/run.py no-bias" in said
    run(rectify, "--data", "voc", "--clip", tiny_clip)
