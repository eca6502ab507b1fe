"""The public datasets of the paper: where images and labels lie, how many there are, and where to get them.

Each is one `Dataset`, a description without code. What its classes are called and what the values in its label files mean
stands in classes.json. Another dataset needs a description here, its classes there, and a recipe in both stages.

Opens lists of names, never an image or a label. Training asks `image_files` alone, which knows no label path.
Imports neither torch nor numpy: runs.py asks for the names, and `--help` answers at once.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Dataset:
    """One dataset as people have it on disk. In patterns {split} is the split's folder or list, {id} any image."""
    title: str
    places: tuple[str, ...]             # under --root; the first that holds images is taken, "" is --root itself
    tree: str                           # as error messages show it
    archive: str                        # what to unpack
    page: str                           # of the project that gives it out
    counts: dict[str, int]              # images of the splits "train" and "val"
    splits: dict[str, str]              # what {split} stands for in them
    images: str
    labels: dict[str, str]              # for evaluation alone: encoding (see classes.json) → pattern, the preferred first
    lists: str = ""                     # a file of ids for each split; "": a split is all images that fit
    curated: str = ""                   # lists that narrow a split down where such a file lies in the tree, and
    curated_counts: dict[str, int] = field(default_factory=dict)    # how many images are then left
    classes: str = ""                   # key in classes.json, where it is not the dataset's name


CONTEXT = dict(
    title="PASCAL Context", places=("VOCdevkit/VOC2010", "VOC2010", ""), classes="context",
    tree="VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext/{train,val}.txt}",
    archive="VOCtrainval_03-May-2010.tar (the images) and PNG labels of values 0 to 59 with their two lists, which "
            "mmsegmentation's converter makes from trainval_merged.json",
    page="https://cs.stanford.edu/~roozbeh/pascal-context",
    counts={"train": 4996, "val": 5104}, splits={"train": "train", "val": "val"},
    images="JPEGImages/{id}.jpg", lists="ImageSets/SegmentationContext/{split}.txt")
CONTEXT_LABELS = "SegmentationClassContext/{id}.png"

DATASETS = {
    "voc": Dataset(
        title="PASCAL VOC 2012", places=("VOCdevkit/VOC2012", "VOC2012", ""),
        tree="VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/{train,val}.txt}",
        archive="VOCtrainval_11-May-2012.tar", page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        counts={"train": 1464, "val": 1449}, splits={"train": "train", "val": "val"},
        images="JPEGImages/{id}.jpg", lists="ImageSets/Segmentation/{split}.txt",
        labels={"indices": "SegmentationClass/{id}.png"}),
    # The same images; PNG labels circulate in two orders of classes, under the same file names. Whoever reads one as the
    # other measures an mIoU near 0: so the order is part of the name, and `how_labels_are_read` in ground_truth.py checks it.
    "context": Dataset(labels={"alphabetical": CONTEXT_LABELS}, **CONTEXT),
    "context-voc-first": Dataset(labels={"voc-first": CONTEXT_LABELS}, **CONTEXT),
    "ade": Dataset(
        title="ADE20K for scene parsing", places=("ADEChallengeData2016", "ade/ADEChallengeData2016", ""),
        tree="ADEChallengeData2016/{images,annotations}/{training,validation}",
        archive="ADEChallengeData2016.zip", page="http://sceneparsing.csail.mit.edu",
        counts={"train": 20_210, "val": 2_000}, splits={"train": "training", "val": "validation"},
        images="images/{split}/{id}.jpg", labels={"indices": "annotations/{split}/{id}.png"}),
    "cityscapes": Dataset(
        title="Cityscapes, fine labels", places=("cityscapes", ""),
        tree="cityscapes/{leftImg8bit,gtFine}/{train,val}/<city>",
        archive="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip", page="https://www.cityscapes-dataset.com",
        counts={"train": 2_975, "val": 500}, splits={"train": "train", "val": "val"},
        images="leftImg8bit/{split}/{id}_leftImg8bit.png",
        labels={"labelTrainIds": "gtFine/{split}/{id}_gtFine_labelTrainIds.png",       # made by cityscapesScripts
                "labelIds": "gtFine/{split}/{id}_gtFine_labelIds.png"}),               # in every download
    "coco": Dataset(
        title="COCO-Stuff 164k", places=("coco_stuff164k", "cocostuff", "coco", ""),
        tree="coco_stuff164k/{images,annotations}/{train2017,val2017}",
        archive="train2017.zip and val2017.zip of https://cocodataset.org into images/, and into annotations/ "
                "stuffthingmaps_trainval2017.zip", page="https://github.com/nightrome/cocostuff",
        counts={"train": 118_287, "val": 5_000}, splits={"train": "train2017", "val": "val2017"},
        images="images/{split}/{id}.jpg", labels={"indices": "annotations/{split}/{id}.png"},
        curated="curated/{split}/*.txt", curated_counts={"train": 49_629, "val": 2_175}),
}
# Of the lists that earlier work hands out together (IIC, PiCIE, STEGO), the one that it trains and measures 27 classes on.
CURATED_LIST = "Coco164kFull_Stuff_Coarse_7.txt"

# ------------------------------------------------------------------------------------------ classes


@functools.cache
def read_classes() -> dict:
    return json.loads(Path(__file__).with_name("classes.json").read_text(encoding="utf-8"))


def names_and_colours(name: str) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Of a dataset's classes, in their order: the name that the prompts say, and (red, green, blue)."""
    classes = read_classes()[DATASETS[name].classes or name]["classes"]
    return [one["name"] for one in classes], [tuple(one["colour"]) for one in classes]


def label_values(name: str, encoding: str) -> tuple[dict[int, int], list[int]]:
    """For evaluation alone: what the values of a label file mean, value → class, and which are ignored."""
    known = read_classes()[DATASETS[name].classes or name]
    return ({value: number for number, one in enumerate(known["classes"]) for value in one[encoding]},
            known["ignored"][encoding])


# ------------------------------------------------------------------------------------------ images


def how_to_get(name: str) -> str:
    dataset = DATASETS[name]
    fetch = "Add --download to fetch it (1.9 GB), or unpack" if name == "voc" else "It cannot be fetched here: unpack"
    return f"{fetch} {dataset.archive} ({dataset.page}), or point --root at your copy."


def find(name: str, root: str) -> Path:
    """The folder under `root` where the dataset's tree begins. Raises FileNotFoundError, saying what to get from where."""
    dataset = DATASETS[name]
    folders = dict.fromkeys(dataset.images.replace("{split}", split).split("{id}")[0].rstrip("/")
                            for split in dataset.splits.values())
    tried = [Path(root, place) for place in dataset.places]
    for base in tried:
        if any((base / folder).is_dir() for folder in folders):
            return base
    raise FileNotFoundError(f"--data {name}: expected {dataset.tree} under {root}; found no {' or '.join(folders)} in "
                            f"{', '.join(map(str, tried))}. {how_to_get(name)}")


def image_files(name: str, root: str, split: str) -> dict[str, Path]:
    """The images of the split "train" or "val": id → path, sorted by id. Raises FileNotFoundError, ValueError."""
    dataset, base = DATASETS[name], find(name, root)
    pattern = dataset.images.replace("{split}", dataset.splits[split])
    if (path := list_of(name, base, split)) is not None:
        return listed(path, base, pattern, dataset.tree)
    found = fitting(base, pattern)
    if not found:
        raise FileNotFoundError(f"--data {name}: expected images {base / pattern.replace('{id}', '*')}, found none. "
                                f"The tree should be {dataset.tree}. {how_to_get(name)}")
    return found


def list_of(name: str, base: Path, split: str) -> Path | None:
    """The list that says which images a split holds: one that belongs to the dataset, or a curated one if it lies there."""
    dataset = DATASETS[name]
    if dataset.lists:
        return base / dataset.lists.replace("{split}", dataset.splits[split])
    if not dataset.curated:
        return None
    found = sorted(base.glob(dataset.curated.replace("{split}", dataset.splits[split])))
    chosen = [path for path in found if path.name == CURATED_LIST] or found
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0].parent}: expected one list of images, or {CURATED_LIST} among them, found "
                         f"{', '.join(path.name for path in chosen)}. Leave the one there that is meant.")
    return chosen[0] if chosen else None


def fitting(base: Path, pattern: str) -> dict[str, Path]:
    """All files under `base` that fit a pattern: id → path, sorted by id.

    An id is what stands for {id}, sub-folders and all: "leftImg8bit/val/{id}_leftImg8bit.png" gives aachen/aachen_0. So
    it is unique, and the same in the patterns of images and of labels. Hidden files are no images (macOS packs some).
    """
    before, after = pattern.split("{id}")
    paths = (path for path in (base / before).rglob(f"*{after}") if not path.name.startswith("."))
    return dict(sorted((path.relative_to(base / before).as_posix().removesuffix(after), path) for path in paths))


def listed(path: Path, base: Path, pattern: str, tree: str) -> dict[str, Path]:
    """The images that the list `path` names, one id a line. Raises naming the first that is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the list {path}, found none. The tree should be {tree}.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()     # what is no text names no image
    ids = sorted({line.split()[0] for line in lines if line.strip()})
    if not ids:
        raise ValueError(f"{path}: expected image ids, one a line; found an empty list.")
    found = {name: base / pattern.replace("{id}", name) for name in ids}
    missing = [image for image in found.values() if not image.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(ids)} images: expected all of them in {missing[0].parent}, found "
                                f"{len(missing)} missing; the first is {missing[0]}. Unpack the archive again or mend the "
                                "list.")
    return found


# ------------------------------------------------------------------------------------------ labels


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
