"""Ground truth: the one file that reads label pictures. For evaluation, after all training is done.

Imported by what measures (evaluate.py, paper/, exercises/lecture.py, datasets/check.py), not by rectify.py,
distill.py or what these import before their last lines, when training is done: what is read here can reach no
training (tests/test_house.py, tests/test_scripts.py). Label files differ in what their values mean;
`lookup_table` says it for each dataset, and a value that it lacks is an error. `LabelReader` is the one place
where a file becomes classes.

    C classes · H,W pixels
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets import DATASETS, IGNORE, is_folder
from datasets.images import existing, files_below, find, same_name

# ---------------------------------------------------------------------------- which files


def true_label_files(data: str, root: str, split: str, ids: list[str],
                     labels: str | None = None) -> dict[str, Path]:
    """id → label file of those images of a split that have one. May be empty. Prints how many have none.

    `labels` is the folder of index pictures that belongs to a user's own images (same names, .png). Where a
    public dataset's labels could be read in two ways, prints which is taken; raises ValueError when that is
    seen to be wrong.
    """
    if is_folder(data):
        found = labels_in(Path(labels), ids) if labels is not None else {}
    else:
        found = label_files(data, root, split, ids)
        if found and (said := how_labels_are_read(data, root, found)):
            print(said)
    if found and len(found) < len(ids):
        print(f"{len(found)} of {len(ids)} images have a label; the others are not measured.")
    return found


def labels_in(folder: Path, ids: list[str]) -> dict[str, Path]:
    """The index pictures of a user's folder, id → path. Letter case and the spelling of accents are
    nothing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--labels {folder}: expected a folder of index pictures, found none.")
    there: dict[str, Path] = {}
    files = files_below(folder)
    kinds = Counter(path.suffix.lower() or "no ending" for path in files)
    for path in files:
        if path.suffix.lower() == ".png":
            name = same_name(path.with_suffix("").as_posix())
            if name in there:
                raise ValueError(f"--labels {folder}: expected every name once, found {there[name]} and "
                                 f"{path}. Remove one of them.")
            there[name] = path
    alike = Counter(map(same_name, ids))
    if twice := [name for name in ids if alike[same_name(name)] > 1 and same_name(name) in there]:
        raise ValueError(f"--labels {folder}: expected images whose names differ in more than letter case; "
                         f"found {' and '.join(twice[:2])} for one label, {there[same_name(twice[0])]}. "
                         "Rename one.")
    found = {name: folder / there[same_name(name)] for name in ids if same_name(name) in there}
    if not found:
        raise ValueError(f"--labels {folder}: expected PNG files with the images' names ({ids[0]}.png, …), "
                         "found none of "
                         f"them{f' among {len(there)}, as {next(iter(there.values()))}' if there else ''}"
                         f"{others(kinds)}.")
    return found


def others(kinds: Counter) -> str:
    """What lies in a folder of labels beside PNG files, in words."""
    said = [f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != ".png"]
    return f"; there are {', '.join(said)}" if said else ""


def label_files(name: str, root: str, split: str, ids: list[str]) -> dict[str, Path]:
    """id → label file, of those ids that have one, in the first encoding that is there."""
    dataset, base = DATASETS[name], find(name, root)
    patterns = [pattern.replace("{split}", dataset.splits[split]) for pattern in dataset.labels.values()]
    found = {}
    for image in ids:
        candidates = (existing(base / pattern.replace("{id}", image)) for pattern in patterns)
        if (path := next(filter(None, candidates), None)) is not None:
            found[image] = path
    return found


def endings(name: str) -> dict[str, str]:
    """How the name of a label file ends → its encoding. Ends of one dataset differ."""
    return {pattern.split("{id}")[1]: encoding for encoding, pattern in DATASETS[name].labels.items()}


# ---------------------------------------------------------------------------- what their values mean


def lookup_table(data: str, classes: int) -> np.ndarray | dict[str, np.ndarray]:
    """Value in a label file → class, (256,) int16. 255: ignored; −1: may not occur.

    Of a dataset whose label files come in several encodings (Cityscapes): one table for each end of a file's
    name.
    """
    if is_folder(data):
        return table_of(dict(enumerate(range(classes))), ignored=[IGNORE])
    tables = {end: table_of(*DATASETS[data].label_values(encoding))
              for end, encoding in endings(data).items()}
    return tables if len(tables) > 1 else next(iter(tables.values()))


def table_of(class_of: dict[int, int], ignored: list[int]) -> np.ndarray:
    """Value → class as a table, (256,) int16, with −1 for what is neither a class nor ignored."""
    table = np.full(256, -1, dtype=np.int16)
    table[list(class_of)] = list(class_of.values())
    table[ignored] = IGNORE
    return table


def labels_fit(data: str, names: list[str]) -> bool:
    """Whether a dataset's labels can be read with these classes: a known one's speak of its own alone, in its
    order.

    A class may go by another name ("plane"), but not by that of another class.
    """
    own = names if is_folder(data) else DATASETS[data].names
    return len(names) == len(own) and all(name not in own or own.index(name) == place
                                          for place, name in enumerate(names))


def refuse_other_classes(data: str, names: list[str]) -> None:
    """Raise ValueError when a known dataset's labels are to be read with classes that are not its own."""
    if not labels_fit(data, names):
        raise ValueError(f"the labels of {data} speak of its own {len(DATASETS[data].names)} classes: "
                         f"expected as many, in its order, found {len(names)} in --classes: "
                         f"{', '.join(names[:8])}, … Other classes can be looked at (segment.py), not "
                         "measured.")


# ---------------------------------------------------------------------------- files → classes

# And WebP, where its first chunk says so. Not GIF: those who write it sort the palette anew.
# Not PGM: readers stretch its values where the header's greatest is not 255.
LOSSLESS = {"PNG", "TIFF", "BMP", "TGA"}


OFFICIAL = "the dataset's own colours"


class LabelReader:
    """The label files of one dataset → classes. Remembers the colour of every value: a palette that a tool
    has sorted anew makes one value two colours, and the classes behind it others."""

    def __init__(self, data: str, classes: int):
        self.data, self.table, self.colours = data, lookup_table(data, classes), {}
        dataset = DATASETS.get(data)
        if dataset is not None and dataset.palette_is_official:
            [encoding] = dataset.labels
            self.colours = {value: (dataset.palette[number], OFFICIAL)
                            for value, number in dataset.label_values(encoding)[0].items()}

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """A label file → classes (H, W) int64.

        Raises ValueError, naming the file, when a value is not in the table, the size (H, W) is not the
        image's, or the file shows that its values mean something else.
        """
        table, (values, palette) = table_for(path, self.table), label_picture(path)
        if values.shape != size:
            turned = ""
            if values.shape == size[::-1]:
                turned = (" The sides are swapped: was the photograph turned by its EXIF orientation? "
                          "Labels are taken as upright.")
            raise ValueError(f"{path}: expected a label of {size[0]}×{size[1]} pixels, as its image; found "
                             f"{values.shape[0]}×{values.shape[1]}.{turned}")
        classes, there = table[values], np.unique(values)
        if unknown := [int(value) for value in there if table[value] < 0]:
            hint = DATASETS[self.data].other_values if self.data in DATASETS else ""
            raise ValueError(f"{path}: expected the values {describe(table)}; found {unknown}. "
                             + (hint or "The label was made for another class list, or is a colour picture."))
        self.refuse_sorted_palette(path, there, palette)
        return classes.astype(np.int64)

    def refuse_sorted_palette(self, path: Path, values: np.ndarray,
                              palette: list[tuple[int, int, int]]) -> None:
        """Raise ValueError when a value has another colour here than before. A palette of greys says
        nothing."""
        shown = {int(value): palette[value] for value in values if value < len(palette)}
        if all(colour == (value,) * 3 for value, colour in shown.items()):
            return
        greys = {red for red, green, blue in shown.values() if red == green == blue}
        known = table_for(path, self.table)
        if len(greys) == len(shown) and greys - {0, IGNORE} and all(known[grey] >= 0 for grey in greys):
            raise ValueError(f"{path}: expected values that say the classes; found a palette of the greys "
                             f"{sorted(greys)} behind the values {sorted(shown)}: a program has numbered the "
                             "greys anew. Open it, convert(\"L\"), and save it as PNG.")
        official = {colour: value for value, (colour, where) in self.colours.items()
                    if where == OFFICIAL}
        if wrong := [value for value, colour in shown.items() if official.get(colour, value) != value]:
            raise ValueError(f"{path}: expected the colour {shown[wrong[0]]} at the value "
                             f"{official[shown[wrong[0]]]}, as in {OFFICIAL}, found it at {wrong[0]}. A "
                             "program has sorted the palette anew: take the files as they were before it "
                             "saved them.")
        for value, colour in shown.items():
            before, where = self.colours.setdefault(value, (colour, path))
            if colour != before and value != IGNORE:
                raise ValueError(f"{path}: expected the value {value} to have the colour {before} as in "
                                 f"{where}, found {colour}. A program has sorted the palette anew, so that "
                                 "values mean other classes: take the files as they were before it saved "
                                 "them.")


def label_picture(path: Path) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """The values of a label file, (H, W) uint8, and its palette, [] if it has none. Raises ValueError naming
    one that cannot be used."""
    try:
        with Image.open(path) as image:
            squeezed = image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")       # inside a TIFF
            lossless = image.format in LOSSLESS or image.format == "WEBP" and is_lossless_webp(path)
            if squeezed or not lossless:
                raise ValueError(f"expected a lossless file, found {image.format}, which changes values: "
                                 "save labels as PNG from their source")
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"expected one picture, found {pages} in one file: nothing says which of "
                                 "them holds the classes")
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"expected an index picture (mode P or L), found mode {image.mode}. Colours "
                                 "must become class numbers: write one number a pixel, by a table from "
                                 "colour to class, and save it as an 8-bit PNG; convert(\"P\") would number "
                                 "the colours anew")
            if (raw := raw_mode(image)).startswith("L;") or raw == "1;I":
                raise ValueError(f"expected 8 bits a pixel, found greys stored as {raw}, whose values "
                                 "readers scale differently. Save the classes as an 8-bit PNG")
            image = ImageOps.exif_transpose(image)              # as the photograph: what a viewer shows
            channels = (image.getpalette() or []) if image.mode == "P" else []
            return np.array(image, dtype=np.uint8), list(zip(channels[::3], channels[1::3], channels[2::3]))
    except Exception as error:
        raise ValueError(f"{path}: expected a label, found a file that cannot be used as one ({error}). Mend "
                         "or replace it.") from error


def raw_mode(image: Image.Image) -> str:
    """How the pixels are stored in an opened file: "L", or "L;4" for four bits, which Pillow stretches to
    0..255."""
    stored = image.tile[0][3] if image.tile else ""
    return str(stored[0] if isinstance(stored, tuple) and stored else stored)


def is_lossless_webp(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"VP8L" in file.read(64)


def table_for(path: Path, table: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """The table of one label file; among several the end of the file's name decides."""
    if not isinstance(table, dict):
        return table
    return next(one for end, one in table.items() if path.name.lower().endswith(end.lower()))


def describe(table: np.ndarray) -> str:
    """The values that may occur, as "0..20 and 255"."""
    known = np.flatnonzero(table >= 0)
    pieces = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    said = [f"{piece[0]}..{piece[-1]}" if len(piece) > 1 else str(piece[0]) for piece in pieces]
    return ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]


def refuse_binary_masks(labels: dict[str, Path], classes: int) -> None:
    """Raise ValueError for a user's masks of 0 and 255 alone: 255 is "ignored", so the second class would
    have none."""
    values = set()
    for path in labels.values():
        values |= set(np.unique(label_picture(path)[0]).tolist())
        if values - {0, IGNORE}:
            return
    if values == {0, IGNORE}:
        raise ValueError(f"--labels {next(iter(labels.values())).parent}: expected class numbers 0 to "
                         f"{classes - 1}, and 255 for pixels that no measure counts; found 0 and 255 alone. "
                         "Masks of an editor have 255 for the second class: write 1 instead.")


# ---------------------------------------------------------------------- labels that could be read in two ways


def how_labels_are_read(data: str, root: str, labels: dict[str, Path]) -> str:
    """where a dataset's labels could be read in two ways, which is taken and why; else "".

    Raises ValueError when PASCAL Context's labels are seen to be in the other order than the dataset's name
    says.
    """
    ends = endings(data)
    if len(ends) > 1:
        taken = {end: sum(path.name.endswith(end) for path in labels.values()) for end in ends}
        return f"Labels of {data}: " + ", ".join(f"{count} *{end}" for end, count in taken.items() if count)
    if data not in context_orders().values():
        return ""
    [declared], name_of = DATASETS[data].labels, context_orders()
    agreement, pixels = context_agreement(find(data, root), labels)
    best = max(agreement, key=agreement.get)
    seen = (f"of {pixels} pixels that PASCAL VOC's labels name too, {agreement[declared]:.0%} have the same "
            "class")
    if agreement[best] < 0.5:
        why = seen if pixels else "no labels of PASCAL VOC for these images lie beside them"
        return (f"Labels of {data}: read in the order {declared}. Nothing proves it: {why}. If it is wrong, "
                "mIoU is near 0.")
    if best != declared:
        raise ValueError(f"--data {data}: expected labels in the order {declared}, found them in the order "
                         f"{best}: {seen}, read as {best} {agreement[best]:.0%}. Use --data {name_of[best]}. "
                         f"What was trained saw no label and stays right: rename its folder {data} to "
                         f"{name_of[best]}.")
    return f"Labels of {data}: read in the order {declared}, rightly: {seen}."


def context_orders() -> dict[str, str]:
    """each order in which PASCAL Context's labels circulate → the dataset's name that declares it."""
    return {order: name for name, dataset in DATASETS.items()
            if name in ("context", "context-voc-first") for order in dataset.labels}


def context_agreement(base: Path, labels: dict[str, Path], most: int = 50) -> tuple[dict[str, float], int]:
    """the share of pixels to which Context and VOC give the same class, for each order of Context's.

    Where VOC's own labels of the same images lie beside (in VOC2010 or VOC2012), up to `most` of them are
    compared, on the classes that both have without the airplane, whose value is 1 in both orders. Returns
    shares and the number of pixels.
    """
    beside = [base / "SegmentationClass", base.parent / "VOC2012" / "SegmentationClass"]
    pairs = ((path, folder / f"{name}.png") for name, path in labels.items() for folder in beside
             if (folder / f"{name}.png").exists())
    names = DATASETS["context"].names
    class_of = {value: names.index("table" if name == "dining table" else name)
                for value, name in enumerate(DATASETS["voc"].names[1:], start=2)}
    voc = table_of(class_of, ignored=[0, 1, IGNORE])
    tables = {order: lookup_table(name, len(names)) for order, name in context_orders().items()}
    agree, pixels = dict.fromkeys(tables, 0), 0
    for context_path, voc_path in itertools.islice(pairs, most):
        values, expected = label_picture(context_path)[0], voc[label_picture(voc_path)[0]]
        if values.shape == expected.shape:
            both = (expected != IGNORE) & (tables["alphabetical"][values] != IGNORE)
            pixels += int(both.sum())
            for order, table in tables.items():
                agree[order] += int((table[values] == expected)[both].sum())
    return {order: count / max(1, pixels) for order, count in agree.items()}, pixels
