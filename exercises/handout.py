"""Make the hand-out: a copy of the project without the solutions of its exercises.

    python exercises/handout.py OUT                all exercises
    python exercises/handout.py OUT --only 3 5     some of them; the functions of the others stay as they are

Copies what git tracks, not the history. The functions of exercises/ladder.py keep their head and docstring
and raise NotImplementedError. Left out are the folders and files that solve exercises or mark them
(LEFT_OUT). What else has a piece of a solution in it, under whatever names, is found by reading: a function
is blanked too, any other place is an error. Two runs give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)                                     # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("out", type=common.path, metavar="OUT", help="a folder that does not exist yet, or "
                                                                     "is empty")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises (default: all)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()

import ast
import json
import re
import shutil
import subprocess

from exercises import ladder, sources

# The tests hold slow loops of every equation, benchmarks/plain.py is the method once more, and .ci runs both.
LEFT_OUT = ("tests/", "benchmarks/", ".ci/")
# Of this folder only what a student needs; added even before git tracks it.
KEPT = ("__init__.py", "check.py", "checks.py", "ladder.py", "probes.py", "report.py", "sources.py",
        "README.md", "lecture.md")
GIVES_AWAY = "this would give the solution of an exercise away. The full project has it"
WELCOME = """> This is a hand-out: some functions are empty. [exercises/README.md](exercises/README.md) says
> how to write them. Until then the scripts below end with the name of the exercise that is missing.

"""
# A link into a folder that is left out: its words stay.
DEAD_LINK = re.compile(rf"\[([^]]*)\]\((?:\.\./)*(?:{'|'.join(map(re.escape, LEFT_OUT))})[^)]*\)")
LECTURERS = "<!-- for lecturers: not in a hand-out -->"        # README.md ends here in a hand-out


def tracked() -> list[str]:
    """Paths of the files that git tracks and that exist. Raises ValueError where there is no git."""
    try:
        said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{ROOT}: expected a clone of the project, whose files git can list; found none "
                         f"({error}). Clone it with git.") from None
    return [name for name in said.decode().split("\0") if name and (ROOT / name).is_file()]


def files_to_copy() -> list[str]:
    kept = {f"exercises/{name}" for name in KEPT if (ROOT / "exercises" / name).exists()}
    pictures = {str(path.relative_to(ROOT)) for path in (ROOT / "exercises" / "lecture").glob("*.png")}
    others = {name for name in tracked() if not name.startswith((*LEFT_OUT, "exercises/"))}
    return sorted(others | kept | pictures)


def blanked(texts: dict[str, str], exercises: list[ladder.Exercise]) -> dict[str, str]:
    """The texts of all files without the solutions of these exercises. Raises ValueError where one is left.
    """
    messages, tales = {}, {}
    for one in exercises:
        for function in one.functions:
            file, name = sources.split(function)
            node = sources.found_or_raise(texts[file], name)
            messages.setdefault(file, {})[name] = ladder.message(one, function, ast.get_docstring(node))
            tales[one.number, function] = telltales(sources.body_of(texts[file], name))
        for file, name in map(sources.split, ladder.ALIKE.get(one.number, ())):
            messages.setdefault(file, {})[name] = GIVES_AWAY
    texts = texts | {file: sources.blank(texts[file], of_file) for file, of_file in messages.items()}
    return {file: without_restatements(file, text, tales) for file, text in texts.items()}


def telltales(body: str) -> dict[str, str]:
    return {words: piece for words, piece in sources.telltales(body).items() if piece not in ladder.HARMLESS}


def without_restatements(file: str, text: str, tales: dict) -> str:
    """A text in which functions that restate a solution are blanked too. Elsewhere a piece of one is an
    error."""
    if file in ("exercises/ladder.py",):                        # names the harmless pieces
        return text
    for (number, function), of_function in tales.items():
        if not sources.given_away(text, of_function):
            continue
        if file.endswith(".py"):
            again = {name: GIVES_AWAY for name in functions_of(text)
                     if sources.given_away(sources.body_of(text, name), of_function)}
            text = sources.blank(text, again)
        if left := sources.given_away(text, of_function):
            raise ValueError(f"{file}: expected nothing of {function}, exercise {number}; found {left[0]!r} "
                             "outside of a function. Say it otherwise there, or add it to HARMLESS in "
                             "ladder.py.")
    return text


def functions_of(text: str) -> list[str]:
    """Functions at the top level and methods, by their names as `sources.find` takes them."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, sources.FUNCTIONS):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{one.name}" for one in node.body if isinstance(one, sources.FUNCTIONS)]
    return [name for name in found if has_body(text, name)]


def has_body(text: str, name: str) -> bool:
    try:
        sources.body_of(text, name)
    except ValueError:
        return False
    return True


def already() -> dict[str, list[str]]:
    """What the open exercises add to: the systems and the classes that the project has. Read, not run."""
    systems = ast.parse((ROOT / "paper" / "systems.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(systems) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)]
    names = [call.args[0].value for call in calls if call.func.id in ("other", "student")
             and call.args and isinstance(call.args[0], ast.Constant)]
    world = ast.parse((ROOT / "toyland" / "world.py").read_text(encoding="utf-8"))
    classes = [key.value for node in world.body if isinstance(node, ast.Assign)
               and isinstance(node.value, ast.Dict)
               and node.targets[0].id in ("STUFF", "THINGS") for key in node.value.keys]
    return {"systems": ["reclip++", *names], "classes": classes}


def main(args: argparse.Namespace) -> None:
    out, exercises = Path(args.out), ladder.chosen(args.only)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a folder that does not exist yet, or is empty; found something "
                         "there. Name another one.")
    ladder.refuse_missing(exercises)
    texts, others = {}, []
    for name in files_to_copy():
        try:
            texts[name] = (ROOT / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            others.append(name)
    readme = texts["exercises/README.md"].partition(LECTURERS)[0]
    texts["exercises/README.md"] = ladder.with_page(readme, exercises).rstrip() + "\n"
    texts = {name: DEAD_LINK.sub(r"\1", text) if name.endswith(".md") else text
             for name, text in blanked(texts, exercises).items()}
    texts["README.md"] = WELCOME + texts["README.md"]
    texts[ladder.HANDOUT] = json.dumps({"exercises": [one.number for one in exercises]} | already(),
                                       indent=2) + "\n"
    for name, text in texts.items():
        write(out / name, text.encode("utf-8"))
    for name in others:
        write(out / name, (ROOT / name).read_bytes())
    functions = sum(len(one.functions) for one in exercises)
    print(f"Wrote {out}/: {len(texts) + len(others)} files, {len(exercises)} exercises, {functions} "
          "functions to write.\n"
          "A student starts with: python exercises/check.py")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    shutil.copymode(Path(__file__), path)


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
