"""Ours beside the paper's: tables, and what became of the claims. Trains and measures nothing.

    python paper/tables.py paper/results/toyland.json      writes the verdicts in it, and toyland.md, anew

For when reported.py has got another row or claim; reproduce.py ends with the same functions. The JSON has
"values", for each cell one number a seed, and how they were made.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from statistics import fmean, stdev

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, files, flags as common
from paper.reported import CLAIMS, TABLES, Cell, Claim, Table

NAMES = {"voc": "VOC", "context": "Context", "ade": "ADE20K", "cityscapes": "Cityscapes",
         "coco": "COCO-Stuff 27"}


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("results", type=common.path, metavar="FILE", help="a results.json of reproduce.py")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


# ---------------------------------------------------------------------------- numbers as text


def shown(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """`46.7 ± 1.2`: mean and standard deviation over seeds; the number alone where there is one."""
    return shown(fmean(values), digits) + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def prose(text: str) -> str:
    return textwrap.fill(text, 110, break_on_hyphens=False)


# ---------------------------------------------------------------------------- tables


def table_lines(table: Table, values: dict[Cell, list[float]], data: str) -> list[str]:
    """A table as Markdown: the paper's columns (of `data`; if it lacks that, all it has) and ours."""
    of_paper = data.removesuffix("-voc-first")
    columns = [name for name in ([of_paper] if of_paper in NAMES else NAMES)
               if any(name in row.paper for row in table.rows)]
    head = [f"{NAMES[name]} ({table.source})" for name in columns] + [f"{data} (ours)", "each seed"]
    lines = [f"### {table.title}", "", f"| {line(head)}", "|---" * (1 + len(head)) + "|"]
    for row in table.rows:
        cells = [shown(row.paper[name], table.digits) if name in row.paper else "" for name in columns]
        ours = values.get(row.cell, [])
        each = " ".join(shown(value, table.digits) for value in ours) if len(ours) > 1 else ""
        lines.append(line([row.title, *cells, mean_and_spread(ours, table.digits) if ours else "", each]))
    return [*lines, *(["", prose(table.note)] if table.note else []), ""]


# ---------------------------------------------------------------------------- claims


def asked(claims: list[Claim], data: str, same: dict[str, str]) -> list[Claim]:
    """The claims that can be asked of a dataset.

    Not those that the paper's own numbers deny (of ReCLIP on Cityscapes). Nor the shape of a sweep that ends
    at the recipe's own value: nothing lies on its other side. same: sweep points that are the recipe itself.
    """
    return [claim for claim in claims if not in_paper(claim, data).startswith("−")
            and measured_as(claim.better, same) not in [measured_as(cell, same) for cell in claim.worse]]


def measured_as(cell: Cell | None, same: dict[str, str]) -> Cell | None:
    """The cell itself, or that of the recipe where its run is no other."""
    return cell and (same.get(cell[0], cell[0]), *cell[1:])


def differences(claim: Claim, values: dict[Cell, list[float]]) -> list[float]:
    """For each seed, by how much `better` is above the best of `worse`; empty where a number is missing."""
    cells = [claim.better, *claim.worse]
    if not all(cell is None or cell in values for cell in cells):
        return []
    seeds = max(len(values[cell]) for cell in cells if cell is not None)
    better, *worse = [[0.0] * seeds if cell is None else values[cell] for cell in cells]
    return [high - max(low) for high, *low in zip(better, *worse)]


def verdict(difference: list[float], digits: int = 1) -> str:
    """held: the mean, with as many digits as are shown, is above zero and above its own spread over seeds."""
    mean, spread = round(fmean(difference), digits), stdev(difference) if len(difference) > 1 else 0.0
    if mean == 0:
        return "not held: no difference"
    if mean > spread:
        return "held"
    return "not held: reversed" if mean < -spread else "not held: within the spread"


def digits_of(claim: Claim) -> int:
    return TABLES[claim.source].digits if claim.source in TABLES else 2


def in_paper(claim: Claim, data: str) -> str:
    """The paper's own difference where it gives both numbers: of `data`; if it lacks that, of VOC, else
    Context."""
    rows = {row.cell: row.paper for row in TABLES[claim.source].rows} if claim.source in TABLES else {}
    of_paper = data.removesuffix("-voc-first")
    for name in (of_paper,) if of_paper in NAMES else ("voc", "context"):
        numbers = [rows.get(cell, {}).get(name) for cell in (claim.better, *claim.worse)]
        if None not in numbers:
            return f"{shown(numbers[0] - max(numbers[1:]), digits_of(claim), '+')} ({NAMES[name]})"
    return ""


def judged(claims: list[Claim], values: dict[Cell, list[float]]) -> list[dict]:
    """The claims that have been run, with their differences and verdicts."""
    return [{"source": claim.source, "claim": claim.text, "differences": difference,
             "verdict": verdict(difference, digits_of(claim))}
            for claim in claims if (difference := differences(claim, values))]


def claim_lines(claims: list[Claim], values: dict[Cell, list[float]], data: str) -> list[str]:
    if not claims:
        return []
    said = prose(
        "The difference that a claim says is above zero, for each seed. Held: its mean, as it is shown, is "
        "above zero and above its spread (standard deviation over seeds). Left out are claims that the "
        "paper's own numbers deny on this dataset, and the shape of a sweep that ends at the recipe's own "
        "value.")
    lines = ["### Claims", "", said, "", f"| | claim | paper | {data}: mean ± spread | each seed | |",
             "|---|---|---|---|---|---|"]
    found = {one["claim"]: one for one in judged(claims, values)}
    for claim in claims:
        cells, digits = [claim.source, claim.text, in_paper(claim, data)], digits_of(claim)
        if one := found.get(claim.text):
            each = " ".join(shown(value, digits, "+") for value in one["differences"])
            cells += [mean_and_spread(one["differences"], digits), each, one["verdict"]]
        else:
            cells += ["", "", "not run"]
        lines.append(line(cells))
    return [*lines, "", count(claims, list(found.values())), ""]


def count(claims: list[Claim], found: list[dict]) -> str:
    """How many claims held, the paper's and ours."""
    if not found:
        return "Nothing has been run."
    def of(some: list[dict]) -> str:
        return f"{sum(one['verdict'] == 'held' for one in some)} of {len(some)}"
    ours = [one for one in found if one["claim"].startswith("ours:")]
    papers = [one for one in found if one not in ours]
    not_run = f" {len(claims) - len(found)} have not been run." if len(found) < len(claims) else ""
    return f"{of(found)} held: {of(papers)} of the paper's, {of(ours)} of ours.{not_run}"


# ---------------------------------------------------------------------------- a page

MADE = ("data", "what", "seeds", "epochs", "precision", "versions", "same")     # how the values were made


def page(made: dict, values: dict[Cell, list[float]]) -> str:
    """Tables and claims of what was asked for, under a line that says how the numbers were made."""
    lines = [f"## {made['data']}: ours beside the paper's", "", prose(
        f"Seeds: {made['seeds']}; epochs: {made['epochs'] or 'as in the recipes'}; {made['precision']}; "
        f"{made['versions']}. ± is the standard deviation over seeds. mIoU in percent unless a row says "
        "otherwise."), ""]
    for name in made["what"]:
        if name in TABLES:
            lines += table_lines(TABLES[name], values, made["data"])
    return "\n".join([*lines, *claim_lines(claims_of(made), values, made["data"])])


def claims_of(made: dict) -> list[Claim]:
    return asked([claim for claim in CLAIMS if claim.source in made["what"]], made["data"], made["same"])


def write(path: Path, made: dict, values: dict[Cell, list[float]], pictures: list[str]) -> None:
    """The results as JSON, and the page as Markdown beside it, with the pictures that lie there."""
    stored = {"/".join(cell): found for cell, found in values.items()}
    files.write_json(path, made | {"values": stored, "claims": judged(claims_of(made), values)})
    below = [f"\n![{name.removesuffix('.png').replace('_', ': ')}]({name})\n" for name in pictures]
    text = page(made, values) + "".join(below)
    files.write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))


def main(args: argparse.Namespace) -> None:
    path = Path(args.results)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {tuple(cell.split("/")): found for cell, found in content["values"].items()}
        made = {name: content[name] for name in MADE}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected the results.json of a reproduction, found something else "
                         f"({error}). python paper/reproduce.py writes one.") from error
    write(path, made, values, sorted(one.name for one in path.parent.glob("figure*.png")))
    print(page(made, values))


if __name__ == "__main__":
    with errors.one_paragraph((FLAGS := flags().parse_args()).debug):
        main(FLAGS)
