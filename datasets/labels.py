"""Ground truth: the one file that reads label pictures. For evaluation, after all training is done.

Imported by what measures (evaluate.py, paper/, datasets/check.py), not by rectify.py, distill.py or what these import:
what is read here can reach no training. Label files differ in what their values mean; `lookup_table` says it for each
dataset, and a value that it lacks is an error.

    C classes · H,W pixels
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import DATASETS, IGNORE, is_folder
from datasets.images import find

# ------------------------------------------------------------------------------------------ which files


def true_label_files(data: str, root: str, ids: list[str], labels: str | None = None) -> dict[str, Path]:
    """id → label file of those validation images that have one. May be empty.

    `labels` is the folder of index pictures that belongs to a user's own images (same stems, .png). Where a public dataset's
    labels could be read in two ways, prints which is taken; raises ValueError when that is seen to be the wrong one.
    """
    if data in DATASETS:
        found = label_files(data, root, "val", ids)
        if found and (said := how_labels_are_read(data, root, found)):
            print(said)
    elif labels is not None:
        if not Path(labels).is_dir():
            raise FileNotFoundError(f"--labels {labels}: expected a folder of index pictures, found none.")
        found = {name: Path(labels) / f"{name}.png" for name in ids}
        if not any(path.exists() for path in found.values()):
            raise ValueError(f"--labels {labels}: expected PNG files with the images' names ({ids[0]}.png, …), found none "
                             "of them.")
    else:
        found = {}
    return {name: path for name, path in found.items() if path.exists()}


# ------------------------------------------------------------------------------------------ what their values mean


def lookup_table(data: str, classes: int) -> np.ndarray | dict[str, np.ndarray]:
    """value in a label file → class, (256,) int16. 255: ignored; −1: may not occur.

    Of a dataset whose label files come in several encodings (Cityscapes): one such table for each end of a file's name.
    """
    if data not in DATASETS:
        return table_of(dict(enumerate(range(classes))), ignored=[])
    tables = {end: table_of(*DATASETS[data].label_values(encoding))
              for end, encoding in endings(data).items()}
    return tables if len(tables) > 1 else next(iter(tables.values()))


def table_of(class_of: dict[int, int], ignored: list[int]) -> np.ndarray:
    """Value → class as a table, (256,) int16, with −1 for what is neither a class nor ignored."""
    table = np.full(256, -1, dtype=np.int16)
    table[list(class_of)] = list(class_of.values())
    table[[*ignored, IGNORE]] = IGNORE
    return table


def labels_fit(data: str, names: list[str]) -> bool:
    """Whether a dataset's labels can be read with these classes: a known one's speak of its own alone, in its order.

    A class may go by another name ("plane"), but not by that of another class.
    """
    own = DATASETS[data].names if data in DATASETS else names
    return len(names) == len(own) and all(name not in own or own.index(name) == place for place, name in enumerate(names))


def refuse_other_classes(data: str, names: list[str]) -> None:
    """Raise ValueError when a known dataset's labels are to be read with classes that are not its own."""
    if not labels_fit(data, names):
        raise ValueError(f"the labels of {data} speak of its own {len(DATASETS[data].names)} classes: expected as many, in its "
                         f"order, found {len(names)} in --classes: {', '.join(names[:8])}, … Other classes can be looked at "
                         "(segment.py), not measured.")


# ------------------------------------------------------------------------------------------ files → classes


def read_label(path: Path, table: np.ndarray | dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """a label file → classes (H, W) int64 by the look-up table (see `lookup_table`).

    Raises ValueError, naming file and values, when a value is not in the table or the size (H, W) is not the image's.
    """
    table = table_for(path, table)
    values = label_picture(path)
    if values.shape != size:
        raise ValueError(f"{path}: expected a label of {size[0]}×{size[1]} pixels, as its image; found {values.shape[0]}×"
                         f"{values.shape[1]}.")
    classes = table[values]
    if (classes < 0).any():
        unknown = np.unique(values[classes < 0]).tolist()
        raise ValueError(f"{path}: expected the values {describe(table)}; found {unknown}. The label was made for another "
                         "class list, or is a colour picture.")
    return classes.astype(np.int64)


def label_picture(path: Path) -> np.ndarray:
    """the values of a label file, (H, W) uint8. Raises ValueError naming one that cannot be used."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"expected an index picture (mode P or L), found mode {image.mode}")
            return np.asarray(image, dtype=np.uint8)
    except Exception as error:
        raise ValueError(f"{path}: expected a label, found a file that cannot be used as one ({error}). Mend or replace "
                         "it.") from error


def table_for(path: Path, table: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """the table of one label file; among several the end of the file's name decides."""
    if not isinstance(table, dict):
        return table
    return next(one for end, one in table.items() if path.name.endswith(end))


def describe(table: np.ndarray) -> str:
    known = np.flatnonzero(table >= 0)
    return f"{known[0]}..{known[-2]} and 255"



def label_files(name: str, root: str, split: str, ids: list[str]) -> dict[str, Path]:
    """For evaluation alone: id → label file, of those ids that have one, in the first encoding that is there."""
    dataset, base = DATASETS[name], find(name, root)
    patterns = [pattern.replace("{split}", dataset.splits[split]) for pattern in dataset.labels.values()]
    candidates = {image: [base / pattern.replace("{id}", image) for pattern in patterns] for image in ids}
    first = {image: next((path for path in paths if path.exists()), None) for image, paths in candidates.items()}
    return {image: path for image, path in first.items() if path is not None}


def endings(name: str) -> dict[str, str]:
    """For evaluation alone: how the name of a label file ends → its encoding. Ends of one dataset differ."""
    return {pattern.split("{id}")[1]: encoding for encoding, pattern in DATASETS[name].labels.items()}


# ------------------------------------------------------------------------------------------ labels that could be read in two ways


def how_labels_are_read(data: str, root: str, labels: dict[str, Path]) -> str:
    """where a dataset's labels could be read in two ways, which is taken and why; else "".

    Raises ValueError when PASCAL Context's labels are seen to be in the other order than the dataset's name says.
    """
    ends = endings(data)
    if len(ends) > 1:
        taken = {end: sum(path.name.endswith(end) for path in labels.values()) for end in ends}
        return f"Labels of {data}: " + ", ".join(f"{count} *{end}" for end, count in taken.items() if count)
    if "context" not in data:
        return ""
    [declared], name_of = DATASETS[data].labels, context_orders()
    agreement, pixels = context_agreement(find(data, root), labels)
    best = max(agreement, key=agreement.get)
    seen = f"of {pixels} pixels that PASCAL VOC's labels name too, {agreement[declared]:.0%} have the same class"
    if agreement[best] < 0.5:
        why = seen if pixels else "no labels of PASCAL VOC for these images lie beside them"
        return f"Labels of {data}: read in the order {declared}. Nothing proves it: {why}. If it is wrong, mIoU is near 0."
    if best != declared:
        raise ValueError(f"--data {data}: expected labels in the order {declared}, found them in the order {best}: {seen}, "
                         f"read as {best} {agreement[best]:.0%}. Use --data {name_of[best]}. What was trained saw no label "
                         f"and stays right: rename its folder {data} to {name_of[best]}.")
    return f"Labels of {data}: read in the order {declared}, rightly: {seen}."


def context_orders() -> dict[str, str]:
    """each order in which PASCAL Context's labels circulate → the dataset's name that declares it."""
    return {order: name for name, dataset in DATASETS.items() if name.startswith("context") for order in dataset.labels}


def context_agreement(base: Path, labels: dict[str, Path], most: int = 50) -> tuple[dict[str, float], int]:
    """the share of pixels to which Context and VOC give the same class, for each order of Context's.

    Where VOC's own labels of the same images lie beside (in VOC2010 or VOC2012), up to `most` of them are compared, on the
    classes that both have without the airplane, whose value is 1 in both orders. Returns shares and the number of pixels.
    """
    beside = [base / "SegmentationClass", base.parent / "VOC2012" / "SegmentationClass"]
    pairs = ((path, folder / f"{name}.png") for name, path in labels.items() for folder in beside
             if (folder / f"{name}.png").exists())
    names = DATASETS["context"].names
    class_of = {value: names.index("table" if name == "dining table" else name)
                for value, name in enumerate(DATASETS["voc"].names[1:], start=2)}
    voc = table_of(class_of, ignored=[0, 1])
    tables = {order: lookup_table(name, len(names)) for order, name in context_orders().items()}
    agree, pixels = dict.fromkeys(tables, 0), 0
    for context_path, voc_path in itertools.islice(pairs, most):
        values, expected = label_picture(context_path), voc[label_picture(voc_path)]
        if values.shape == expected.shape:
            both = (expected != IGNORE) & (tables["alphabetical"][values] != IGNORE)
            pixels += int(both.sum())
            for order, table in tables.items():
                agree[order] += int((table[values] == expected)[both].sum())
    return {order: count / max(1, pixels) for order, count in agree.items()}, pixels
