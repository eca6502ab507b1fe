"""Check the exercises: which are right so far, and what is wrong with the others.

    python exercises/check.py                  all exercises of this hand-out
    python exercises/check.py --only 5 7       some of them
    python exercises/check.py --json FILE      also results.json, as Gradescope reads it

In the full project all are green. A function counts when all its checks pass; an exercise's marks are divided
evenly among its functions. The lecturer's check (grade.py) has other inputs and is stricter.
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
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises (default: all)")
    parser.add_argument("--json", type=common.path, metavar="FILE", nargs="?", const="results.json",
                        help="write the results there, as Gradescope's autograder reads them (default: no "
                             "file; without a name, results.json)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every failed check")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import contextlib
import io
import os
import time
import traceback

os.environ["TQDM_DISABLE"] = "1"            # read when tqdm is imported: no bars in the table

from exercises import ladder, report, sources


def failure(check, debug: bool = False) -> str | None:
    """What a check found wrong, in one line; None if it passed."""
    from exercises.checks import Wrong
    try:
        with contextlib.redirect_stdout(io.StringIO()):         # a function may print while it is written
            check()
    except Wrong as wrong:
        return report.one_line(str(wrong))
    except NotImplementedError as error:
        return report.one_line(f"not written yet ({error})", 110)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report.one_line(raised(error))
    return None


def raised(error: Exception) -> str:
    """An exception with the place in the project where it came up, the last one outside exercises/."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "exercises"):
            place = f", {path.relative_to(ROOT)} line {frame.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        place = f", {Path(error.filename).name} line {error.lineno}"
    return f"{type(error).__name__}: {error}{place}"


def result_of(exercise: ladder.Exercise, debug: bool = False) -> report.Result:
    """The public checks of one exercise."""
    from exercises import checks
    if exercise.open:
        check, already = checks.OPEN[exercise.number]
        reason = failure(lambda: check(ladder.said_by_handout()[already]), debug)
        return report.Result(exercise.number, exercise.title, reason is None, None, exercise.marks, reason
                             or "")
    right, first = 0, ""
    for function in exercise.functions:
        reason = next(filter(None, (failure(check, debug) for check in checks.CHECKS[function])), None)
        right += reason is None
        first = first or (f"{sources.split(function)[1]}: {reason}" if reason else "")
    marks = round(exercise.marks * right / len(exercise.functions), 1)
    return report.Result(exercise.number, exercise.title, not first, marks, exercise.marks, first)


def main(args: argparse.Namespace) -> list[report.Result]:
    started, exercises = time.perf_counter(), ladder.chosen(args.only)
    results = [result_of(exercise, args.debug) for exercise in exercises]
    print(report.table(results))
    if args.json:
        report.write(Path(args.json), results, time.perf_counter() - started)
        print(f"Wrote {args.json}")
    return results


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
