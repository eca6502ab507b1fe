"""Mark a submission with the hidden tests.

    python exercises/grade.py SUBMISSION                   a folder as it was handed in
    python exercises/grade.py SUBMISSION --json results.json --seconds 60

Takes the text of the named functions out of the submission, and helpers that stand at the top level of the
same file. All else comes from this project. The functions run in a process of their own for each exercise,
with a time limit, in a copy of the project where the other exercises are blank. That process is given inputs
and returns outputs. This one, which never runs a line of the submission, compares them with what the
project's own functions return. exercises/README.md says what is not defended.
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
    parser.add_argument("submission", type=common.path, metavar="SUBMISSION", help="a folder")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises (default: all)")
    parser.add_argument("--json", type=common.path, metavar="FILE",
                        help="write the results there, as Gradescope's autograder reads them (default: no "
                             "file)")
    parser.add_argument("--seconds", type=common.whole(1), default=60, metavar="N",
                        help="time for each exercise; starting takes about five of them (default: 60)")
    parser.add_argument("--seed", type=common.whole(0), default=0, metavar="N",
                        help="of the hidden inputs (default: 0)")
    parser.add_argument("--user", metavar="NAME",
                        help="who runs the submission, where this is started as root; self: root too "
                             "(default: nobody, if nobody can read this Python)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import contextlib
import ctypes
import hashlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import time

os.environ["TQDM_DISABLE"] = "1"            # read when tqdm is imported

from exercises import hidden, ladder, report, sources, worker
from exercises.probes import differs

LARGEST = 2 ** 20                   # bytes of a submitted file
MOST = 2 ** 26                      # bytes of answers that are read
# What the functions need to run: no tests, no solutions, no weights.
ROOM = ("*.py", "clip/*.py", "clip/*.txt.gz", "harness/*.py", "toyland/*.py", "datasets/*.py",
        "datasets/*.json", "datasets/*.txt", "exercises/__init__.py", "exercises/probes.py",
        "exercises/worker.py")

# ----------------------------------------------------------------------------------------- what was handed in


def top_of(folder: Path) -> Path:
    """The folder itself, or the only folder in it: archives often have one around them."""
    inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    lone = inside[0] if len(inside) == 1 else folder
    return lone if lone.is_dir() and not lone.is_symlink() else folder


def submitted(folder: Path, file: str) -> str:
    """The text of a submitted file. Raises ValueError for anything but a regular file inside the folder."""
    path = folder / file
    parts = [folder.joinpath(*Path(file).parts[:count]) for count in range(1, len(Path(file).parts) + 1)]
    if any(part.is_symlink() for part in parts):
        raise ValueError(f"{file}: expected a file, found a link")
    try:
        what = os.lstat(path)
    except OSError:
        raise ValueError(f"{file}: it is not in the submission") from None
    if not stat.S_ISREG(what.st_mode) or what.st_size > LARGEST:
        raise ValueError(f"{file}: expected a file of at most {LARGEST // 2 ** 20} MB")
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{file}: expected UTF-8 text") from None


def with_solution(texts: dict[str, str], exercise: ladder.Exercise, folder: Path) -> dict[str, str]:
    """The files of an exercise with the submitted functions in them. Raises ValueError with a reason."""
    names: dict[str, list[str]] = {}
    for function in exercise.functions:
        file, name = sources.split(function)
        names.setdefault(file, []).append(name)
    found = {}
    for file, of_file in names.items():
        theirs = submitted(folder, file)
        try:
            found[file] = sources.transplant(texts[file], theirs, of_file)
        except SyntaxError as error:
            raise ValueError(f"{file}: Python cannot read it, line {error.lineno}: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        except (RecursionError, MemoryError):
            raise ValueError(f"{file}: Python cannot read it") from None
    return found


# ------------------------------------------------------------------------------------------ the process


def blank_project() -> dict[str, str]:
    """The texts of the Python files of a room, every exercise blank."""
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
             for pattern in ROOM for path in sorted(ROOT.glob(pattern)) if path.suffix == ".py"}
    messages: dict[str, dict[str, str]] = {}
    for one in ladder.LADDER:
        for function in one.functions:
            file, name = sources.split(function)
            messages.setdefault(file, {})[name] = f"exercise {one.number} is another exercise"
    return texts | {file: sources.blank(texts[file], of_file) for file, of_file in messages.items()}


@contextlib.contextmanager
def a_room(texts: dict[str, str], for_all: bool):
    """A fresh copy of the project, and a folder to work in; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as top:
        room, work = Path(top, "project"), Path(top, "work")
        for name, text in texts.items():
            (room / name).parent.mkdir(parents=True, exist_ok=True)
            (room / name).write_text(text, encoding="utf-8")
        for pattern in ROOM:
            for path in ROOT.glob(pattern):
                if path.suffix != ".py":
                    shutil.copyfile(path, room / path.relative_to(ROOT))
        work.mkdir()
        if for_all:                                     # another user reads the copy, and writes beside it
            os.chmod(top, 0o755)
            os.chmod(work, 0o777)
        yield room, work


def ask(room: Path, work: Path, cases: list, seconds: int, user: dict) -> tuple[dict[int, object], str]:
    """What the worker answers, by the number of the case; and why it did not answer all, if it did not."""
    given = json.dumps([{"function": case.function, "arguments": worker.to_text(case.arguments),
                         "gradients": case.gradients} for case in cases])
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(work), "TMPDIR": str(work),
                   "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(work), "TQDM_DISABLE": "1"}
    before, deadline = descendants(), time.monotonic() + seconds
    with open(work.parent / "said.txt", "w+b") as said:
        process = subprocess.Popen([sys.executable, "-I", "-B", room / "exercises" / "worker.py", room,
                                    str(seconds)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, cwd=work,
                                   env=environment, start_new_session=True, **user)
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(given.encode() + b"\n")
                process.stdin.close()
            data, end = listened(process, deadline)
        finally:
            end_all(process, before)
        said.seek(0)
        started = said.read(10000).decode(errors="replace").strip().split("\n")[-1]
    answers = {}
    for line in data.split(b"\n"):
        try:
            answer = json.loads(line)
            answers[int(answer["case"])] = worker.from_text(answer["answer"])
        except Exception:               # whatever a submission may have written
            continue
    if end is None and len(answers) < len(cases):
        end = f"the process ended before it had answered ({ending(process.returncode)}" \
              + (f"; {started})" if started else ")")
    return answers, end or ""


def ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def listened(process: subprocess.Popen, deadline: float) -> tuple[bytes, str | None]:
    """What comes through the pipe until it closes, the process ends, or time or room are used up."""
    data, pipe = bytearray(), process.stdout.fileno()
    while True:
        over = process.poll() is not None  # asked before reading: what it wrote last is still read
        left = deadline - time.monotonic()
        if left <= 0:
            return bytes(data), "the time was over: is there a loop without an end?"
        if select.select([pipe], [], [], 0 if over else min(left, 0.2))[0]:
            piece = os.read(pipe, 2 ** 16)
            if not piece:                               # closed; it may still sleep
                if process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=max(0.01, min(left, 1)))
                return bytes(data), None
            data += piece
            if len(data) > MOST:
                return b"", f"it sent more than {MOST // 2 ** 20} MB"
        elif over:                                      # what it forked may hold the pipe open for ever
            return bytes(data), None


def adopt() -> None:
    """Processes that lose their parent become ours, so that they can be found and ended (Linux alone)."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)                                     # PR_SET_CHILD_SUBREAPER


def descendants() -> set[int]:
    """Our children, by process id (Linux alone; elsewhere none)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def end_all(process: subprocess.Popen, before: set[int]) -> None:
    """End the process, its group, and all that it left to us, until nothing is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(200):
        left = descendants() - before
        if not left:
            return
        for number in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)
        time.sleep(0.01)


def other_user(name: str | None) -> dict:
    """What makes Popen run as somebody else. Empty: as ourselves, since only root can do otherwise."""
    if name == "self" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        if name not in (None, "self"):
            raise ValueError(f"--user {name}: expected to be started as root, found another user.")
        return {}
    import pwd
    try:
        who = pwd.getpwnam(name or "nobody")
    except KeyError:
        if name is None:
            return {}
        raise ValueError(f"--user {name}: expected a user of this machine, found none.") from None
    as_user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
    code = "import importlib.util as u; open(u.find_spec('torch').origin).close()"
    try:
        able = subprocess.run([sys.executable, "-I", "-B", "-c", code], capture_output=True, cwd="/",
                              **as_user)
        if able.returncode == 0:
            return as_user
    except OSError:
        pass
    if name:
        raise ValueError(f"--user {name}: expected a user who can read this Python and its torch, found one "
                         "who cannot.")
    return {}


def readable_by(user: dict) -> bool:
    """Whether the other user can read the solutions in this project."""
    code = f"open({str(ROOT / 'rectify.py')!r}).close()"
    return subprocess.run([sys.executable, "-I", "-B", "-c", code], capture_output=True, cwd="/",
                          **user).returncode == 0


# ------------------------------------------------------------------------------------------ marks


def wrong_with(case: hidden.Case, expected: dict, answer) -> str | None:
    """What is wrong with an answer, in words that help; None if nothing is."""
    if not isinstance(answer, dict):
        return "it gave no answer that can be read"
    if "error" in answer:
        return str(answer["error"])
    if "raises" in expected:
        right = answer.get("raises") == expected["raises"]
        return None if right else f"expected {expected['raises']}, found a result"
    if "raises" in answer:
        return f"it raised ValueError: {answer.get('says')}"
    for name, value in expected.items():
        found = answer.get(name)
        if said := found if isinstance(found, str) else differs(found, value):
            return said if name == "the result" else f"{name}: {said}"
    more = next((name for name in answer if name not in expected), None)
    if more is None:
        return None
    return f"{more}: {answer[more] if isinstance(answer[more], str) else 'unexpected'}"


def judged(exercise: ladder.Exercise, cases: list[hidden.Case], answers: dict, expected: list[dict],
           end: str = "") -> report.Result:
    """Marks for answers: a function counts when all its cases are right."""
    first, right = "", 0
    for function in exercise.functions:
        reason = ""
        for number, case in enumerate(cases):
            if case.function == function and not reason:
                if number not in answers:
                    reason = end or "it gave no answer"
                elif said := wrong_with(case, expected[number], answers[number]):
                    reason = f"{case.title}: {said}"
        right += not reason
        first = first or (f"{sources.split(function)[1]}: {reason}" if reason else "")
    marks = round(exercise.marks * right / len(exercise.functions), 1)
    return report.Result(exercise.number, exercise.title, not first, marks, exercise.marks,
                         report.one_line(first))


def nothing(exercise: ladder.Exercise, reason: str) -> report.Result:
    return report.Result(exercise.number, exercise.title, False, 0.0, exercise.marks, report.one_line(reason))


def stamp() -> str:
    """A number for the files that judge: a submission that changes them on the disk is found out."""
    files = {*ROOT.glob("exercises/*.py"), *(ROOT / sources.split(function)[0]
                                             for one in ladder.LADDER for function in one.functions)}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def grade(folder: Path, exercises: list[ladder.Exercise], seconds: int, seed: int,
          user: dict) -> list[report.Result]:
    """The results of a submission, one for each exercise that is not open."""
    blank, all_cases, results, before = blank_project(), hidden.cases(seed), [], stamp()
    for exercise in exercises:
        cases = [case for case in all_cases if case.function in exercise.functions]
        expected = [worker.perform(case.function, case.arguments, case.gradients) for case in cases]
        try:
            texts = blank | with_solution(blank, exercise, folder)
        except ValueError as error:
            results.append(nothing(exercise, str(error)))
            continue
        with a_room(texts, for_all=bool(user)) as (room, work):
            answers, end = ask(room, work, cases, seconds, user)
        results.append(judged(exercise, cases, answers, expected, end))
    if stamp() != before:
        print("The submission changed files of this project! Restore them (git checkout) before you go on.",
              file=sys.stderr)
        return [nothing(exercise, "the submission changed the lecturer's files") for exercise in exercises]
    return results


def main(args: argparse.Namespace) -> list[report.Result]:
    folder, started = Path(args.submission), time.perf_counter()
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a submission, found none.")
    exercises = [one for one in ladder.chosen(args.only) if not one.open]
    ladder.refuse_missing(exercises)
    adopt()
    user = other_user(args.user)
    if not user and args.user != "self" and getattr(os, "geteuid", lambda: 1)() == 0:
        print("Note: submissions run as root, for the user nobody cannot read this Python.",
              file=sys.stderr)
    if user and readable_by(user):
        print(f"Note: a submission could read the solutions in {ROOT}. Close it: chmod 700 {ROOT}",
              file=sys.stderr)
    results = grade(top_of(folder), exercises, args.seconds, args.seed, user)
    print(report.table(results))
    if args.json:
        report.write(Path(args.json), results, time.perf_counter() - started)
        print(f"Wrote {args.json}")
    return results


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
