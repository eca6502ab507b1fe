"""What checks and hidden tests come out with: a table to read, and results.json for Gradescope."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Result:
    """Of one exercise. `marks` None: given by a person."""
    number: int
    title: str
    passed: bool
    marks: float | None
    most: int
    reason: str = ""            # the first one, where something failed


def one_line(text: str, longest: int = 240) -> str:
    """Text that may come from anywhere, in one line that a terminal can show."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:2000]).split())
    return text if len(text) <= longest else text[:longest - 1] + "…"


def table(results: list[Result]) -> str:
    width = max(len(one.title) for one in results) + 2
    lines = []
    for one in results:
        marks = f"–/{one.most}" if one.marks is None else f"{one.marks:g}/{one.most}"
        lines.append(f"{one.number:>3}  {one.title:{width}}{'passed' if one.passed else 'FAILED':8}{marks:>8}"
                     + (f"  {one.reason}" if one.reason else ""))
    marked = [one for one in results if one.marks is not None]
    total = f"{sum(one.marks for one in marked):g}/{sum(one.most for one in marked)}"
    by_hand = sum(one.most for one in results if one.marks is None)
    lines.append(f"{'':5}{'together':{width}}{'':8}{total:>8}"
                 + (f"  and {by_hand} that a person gives" if by_hand else ""))
    return "\n".join(lines)


def gradescope(results: list[Result], seconds: float) -> dict:
    """results.json as Gradescope's autograder reads it. Open exercises are shown without marks."""
    tests = []
    for one in results:
        test = {"name": one.title, "number": str(one.number), "status": "passed" if one.passed else "failed",
                "output": one.reason or ("" if one.passed else "failed"), "visibility": "visible"}
        if one.marks is not None:
            test |= {"score": one.marks, "max_score": one.most}
        tests.append(test)
    return {"score": sum(one.marks for one in results if one.marks is not None),
            "execution_time": round(seconds, 1),
            "visibility": "visible", "tests": tests}


def write(path: Path, results: list[Result], seconds: float) -> None:
    """Written beside the place and then renamed: whatever stands there, a link or a folder's file, is
    replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.write_text(json.dumps(gradescope(results, seconds), indent=2) + "\n", encoding="utf-8")
    part.replace(path)
