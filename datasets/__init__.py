"""Datasets: what they are called, where their files lie, what their labels mean.

    *.json        one description a dataset: its tree, its classes, the values in its label files. No code
    images.py     which images there are, and how a file becomes an RGB picture       training and measuring
    words.py      class lists and the sentences around them                           training and measuring
    hypotheses.py which classes an image may contain, from a file (--hypotheses)      training and measuring
    labels.py     the one reader of labels                                            measuring alone
    check.py      looks a dataset through: python datasets/check.py --data voc

A description that is dropped into this folder adds a dataset; README.md says how. This file reads
descriptions, never an image or a label.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from harness import errors
from toyland import world as toyland

IGNORE = 255                                # a label value, and a class, that no measure counts


@dataclass(frozen=True)
class Dataset:
    """One dataset as people have it on disk. In patterns {split} is the split's folder or list, {id} any
    image."""
    title: str
    places: list[str]                # under --root; the first that holds images is taken, "" is --root itself
    tree: str                           # as error messages show it
    archive: str                        # what to unpack
    page: str                           # of the project that gives it out
    counts: dict[str, int]              # images of the splits "train", "val" and, if there is one, "test"
    splits: dict[str, str]              # what {split} stands for in them
    images: str
    labels: dict[str, str]              # for evaluation alone: encoding → pattern, the preferred one first
    classes: list[dict]             # name (as prompts say it), colour, and for each encoding its label values
    ignored: dict[str, list[int]]       # for each encoding the label values that no measure counts
    lists: str = ""                     # a file of ids for each split; "": a split is all images that fit
    curated: str = ""                 # lists that narrow a split down where such a file lies in the tree, and
    curated_counts: dict[str, int] = field(default_factory=dict)    # how many images are then left
    palette_is_official: bool = False   # label files carry the classes' colours as their palette
    drawn: bool = False                 # by toyland/world.py, when it is missing; its CLIP is the small one
    other_values: str = ""              # said of a label value that is neither a class's nor ignored
    about: str = ""                     # where names, colours and values come from

    @property
    def names(self) -> list[str]:
        return [one["name"] for one in self.classes]

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return [tuple(one["colour"]) for one in self.classes]

    def label_values(self, encoding: str) -> tuple[dict[int, int], list[int]]:
        """For evaluation alone: what the values of a label file mean, value → class, and which are
        ignored."""
        return ({value: number for number, one in enumerate(self.classes) for value in one[encoding]},
                self.ignored[encoding])


def described(path: Path) -> Dataset:
    """The dataset of a JSON file. {"like": NAME, …} takes what it does not say from NAME.json. Raises
    ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "like" in content:
            like = json.loads(path.with_name(f"{content.pop('like')}.json").read_text(encoding="utf-8"))
            content = like | content
        dataset = Dataset(**content)
        if not {"train", "val"} <= set(dataset.counts) == set(dataset.splits) <= {"train", "val", "test"}:
            raise ValueError("counts and splits are those of train and val, and of test if there is one")
        for encoding in dataset.labels:
            dataset.label_values(encoding)
        dataset.names, dataset.palette
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        needed = [one.name for one in dataclasses.fields(Dataset) if one.default is dataclasses.MISSING
                  and one.default_factory is dataclasses.MISSING]
        raise ValueError(f"{path}: expected a dataset's description with {', '.join(needed)}, as voc.json "
                         f"has them; found: {error}") from error
    return dataset


# One world with two lists of classes. The second leaves the stuffs out, as VOC its background.
TOYLAND = Dataset(
    title="Toyland", drawn=True, places=["toyland"], tree="toyland/{images,labels}",
    archive="nothing: it is drawn", page="toyland/README.md",
    counts={"train": toyland.TRAIN_SCENES, "val": toyland.VAL_SCENES, "test": toyland.TEST_SCENES},
    splits={"train": "train", "val": "val", "test": "test"}, images="images/{split}/{id}.png",
    labels={"indices": "labels/{split}/{id}.png"}, ignored={"indices": [IGNORE]},
    classes=[{"name": name, "colour": list(colour), "indices": [number]}
             for number, (name, colour) in enumerate(zip(toyland.CLASSES, toyland.PALETTE))])
THINGS = dataclasses.replace(
    TOYLAND, title="Toyland, its things alone",
    classes=[one for one in TOYLAND.classes if one["name"] in toyland.THINGS],
    ignored={"indices": [IGNORE, *(toyland.CLASSES.index(name) for name in toyland.STUFF)]})

with errors.one_paragraph():                # read at import: no script's own frame is there yet
    DATASETS = {"toyland": TOYLAND, "toyland-things": THINGS,
                **{path.stem: described(path) for path in sorted(Path(__file__).parent.glob("*.json"))}}


def is_folder(data: str) -> bool:
    """A dataset that is no known name is meant as a path."""
    return data not in DATASETS


def is_drawn(data: str) -> bool:
    """Whether the pictures are scenes of Toyland, with either list of classes."""
    return data in DATASETS and DATASETS[data].drawn


def split_to_measure(data: str, wanted: str | None = None) -> str:
    """The split that is measured and shown: `wanted` (--split), else "val".

    A folder of your own has one set of images, "all". Raises ValueError for a split that is not there.
    """
    splits = ["all"] if is_folder(data) else [split for split in DATASETS[data].splits if split != "train"]
    if wanted not in (None, *splits):
        there = "a folder, all of which is measured" if is_folder(data) else f"with {' and '.join(splits)}"
        raise ValueError(f"--split {wanted}: expected a dataset with that split and its labels, found "
                         f"{data}, {there}. Leave --split out.")
    return wanted or ("val" if "val" in splits else "all")
