"""The paper's numbers, written down a second time from the tables: no cell of paper/reported.py differs.

    python -m pytest tests/test_reported.py

Each line: a key of TABLES, the row's title there, its numbers in the order of the columns; – is an empty
cell.
"""

import pytest

from paper.reported import CLAIMS, TABLES

COLUMNS = {"table1": ["voc", "cityscapes", "coco"], "table7": ["context", "voc"]}
ALL = ["voc", "context", "ade", "cityscapes", "coco"]

SECOND = """
table1 | IIC | 9.8 6.4 6.7
table1 | SegSort | 11.7 – 16.4
table1 | DSM | 37.2 – –
table1 | HSG | 41.9 – 23.8
table1 | ACSeg | 47.1 – 16.4
table1 | MaskContrast | 49.6 – –
table1 | EAGLE | – 22.1 27.2
table1 | DepthSeg | – 23.1 29.0
table1 | ReCLIP (LP) | 76.1 49.3 26.2
table1 | ReCLIP++ rectified | 73.5 21.7 21.2
table1 | ReCLIP++ distilled | 79.2 26.9 23.2
table1 | ReCLIP++ (LP) | 80.3 54.1 29.5
table2 | CLIPpy | 54.6 – 13.5 22.3 –
table2 | ReCo | 55.2 26.2 – 19.3 26.3
table2 | ReCo without context elimination | 54.8 23.1 – 18.2 20.8
table2 | CLIP-S4 | 72.0 33.6 – – –
table2 | MaskCLIP | 49.5 21.7 9.5 19.8 13.6
table2 | MaskCLIP+ | 70.0 31.1 12.2 25.2 19.5
table2 | ReCLIP rectified | 58.5 25.8 11.1 16.2 14.6
table2 | ReCLIP distilled | 75.8 33.8 14.3 19.9 20.3
table2 | ReCLIP++ rectified | 73.5 34.0 13.5 21.7 20.9
table2 | ReCLIP++ distilled | 79.2 34.5 14.5 26.9 23.2
table3 | ReCLIP | 58.5 25.8
table3 | + decoder | 68.6 27.8
table3 | + multi-label hypothesis from windows | 70.4 33.1
table3 | + independent encoding = ReCLIP++ | 73.5 34.0
table4 | learnable | 71.6 32.1
table4 | fixed | 73.5 34.0
table5 | element-wise addition | 72.4 32.9
table5 | subtraction | 73.5 34.0
table6 | fine-tuned | 1.2 0.4
table6 | frozen | 73.5 34.0
table7 | class preference: MaskCLIP | .29 –
table7 | class preference: MaskCLIP+ | .31 –
table7 | class preference: ReCLIP rectified | .33 –
table7 | class preference: ReCLIP++ rectified | .37 –
table7 | space preference: MaskCLIP | – -.50
table7 | space preference: MaskCLIP+ | – -.48
table7 | space preference: ReCLIP rectified | – -.41
table7 | space preference: ReCLIP++ rectified | – -.29
table8 | masks | 77.7
table8 | + features | 78.9
table8 | + text | 79.2
table9 | its own | 76.2
table9 | query | 48.3
table9 | query, bias | 50.6
table9 | query, bias, rectified mask generation | 79.2
stages | MaskCLIP | 49.5 21.7 9.5 19.8 13.6
stages | ReCLIP++ rectified | 73.5 34.0 13.5 21.7 20.9
stages | ReCLIP++ distilled | 79.2 34.5 14.5 26.9 23.2
"""


def second() -> dict[tuple[str, str, str], float]:
    found = {}
    for line in SECOND.strip().splitlines():
        table, row, numbers = (part.strip() for part in line.split("|"))
        for dataset, number in zip(COLUMNS.get(table, ALL), numbers.split()):
            if number != "–":
                found[table, row, dataset] = float(number)
    return found


def reported() -> dict[tuple[str, str, str], float]:
    return {(name, row.title, dataset): value for name, table in TABLES.items() if table.source == "paper"
            for row in table.rows for dataset, value in row.paper.items()}


def test_no_cell_differs():
    """Row by row, with table and dataset; no number is in one of the two alone."""
    assert reported() == second()


@pytest.mark.parametrize("row, stage", [
    ("MaskCLIP", "maskclip"), ("MaskCLIP+", "distill"), ("ReCLIP rectified", "rectify"),
    ("ReCLIP++ rectified", "rectify")])
@pytest.mark.parametrize("kind", ["class", "space"])
def test_table_7_compares_the_stages_that_the_paper_compares(row, stage, kind):
    """ReCLIP's and ReCLIP++'s are those of the rectification, (rec.); MaskCLIP+ is a student."""
    [found] = [one for one in TABLES["table7"].rows if one.title == f"{kind} preference: {row}"]
    assert found.cell[1] == stage and found.cell[2] == f"{kind}_preference" and found.paper


def test_students_have_no_number_of_the_paper_in_table_7():
    students = [row for row in TABLES["table7"].rows if row.cell and row.cell[1] == "distill"
                and row.cell[0] != "maskclip+"]
    assert students and not any(row.paper for row in students)
    claims = [claim for claim in CLAIMS if claim.source == "table7"]
    judged = {cell[:2] for claim in claims for cell in (claim.better, *claim.worse) if cell}
    assert judged == {("reclip++", "maskclip"), ("maskclip+", "distill"), ("reclip", "rectify"),
                      ("reclip++", "rectify")}
