"""Look a dataset through before anything is trained on it: is all there, can it be read, do the labels fit?

    python datasets/check.py --data ade --root DIR      decodes every image, and every label that is measured
    python datasets/check.py --data coco --quick        counts everything, decodes a sample
    python datasets/check.py --data photos --classes names.txt --labels photo_labels

Says what is wrong and how to mend it; changes no file. Exit code 0: all is well, 2: something must be mended.

It opens labels, as evaluation does, and is therefore imported by no other script: what it finds can reach no
training. Labels of training images are counted, not opened.

    H,W pixels
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors
from harness import flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--data", type=common.path, metavar="NAME|FOLDER", default="toyland",
                        help="toyland, toyland-things, voc, context, ade, cityscapes, coco, "
                             "context-voc-first (all that this folder describes), or a folder of your own "
                             "images (default: toyland)")
    parser.add_argument("--root", type=common.path, metavar="DIR", default="data",
                        help="where datasets lie (default: data)")
    parser.add_argument("--classes", type=common.path, metavar="FILE",
                        help="one class name a line, synonyms after commas; needed for a folder of your own")
    parser.add_argument("--labels", type=common.path, metavar="DIR",
                        help="index pictures of a folder of your own images")
    parser.add_argument("--quick", action="store_true", help="decode 200 images of each split instead of all")
    parser.add_argument("--seed", type=common.whole(0), metavar="N", default=0,
                        help="of the sample that --quick decodes (default: 0)")
    parser.add_argument("--workers", type=common.whole(0), metavar="N", default=4,
                        help="threads that decode (default: 4)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import filecmp
import itertools
import random
import shlex
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from datasets import DATASETS, IGNORE, is_folder
from datasets import images as images_of
from datasets import labels as ground_truth
from datasets import words as class_lists

SAMPLE = 200                                # images that --quick decodes of each split
SHOWN = 5                                   # files that are named of many with a fault

# ------------------------------------------------------------------------------------------ what is there


def splits_of(name: str, root: str, labels: str | None) -> tuple[dict, dict, list[str]]:
    """Images and labels of each split, both split → id → path, and what is wrong with lists and folders.

    A folder of your own has one split, "all". Raises FileNotFoundError when the tree itself is not there.
    """
    if is_folder(name):
        images = {"all": images_of.training_images(name, root)}
        found = ground_truth.true_label_files(name, root, "all", list(images["all"]), labels)
        return images, {"all": found}, []
    images, found, problems = {}, {}, []
    for split in DATASETS[name].splits:
        try:
            images[split] = images_of.image_files(name, root, split)
        except (ValueError, OSError) as error:
            problems.append(f"{split}: {error}")
            continue
        found[split] = ground_truth.label_files(name, root, split, list(images[split]))
    return images, found, problems


def wrong_counts(name: str, root: str, images: dict, labels: dict) -> list[str]:
    """Splits with another number of images than the dataset is given out with, or that share an image;
    missing labels."""
    problems = []
    for split in images:
        if name in DATASETS:
            dataset, used = DATASETS[name], images_of.list_of(name, images_of.find(name, root), split)
            expected = (dataset.curated_counts if dataset.curated and used else dataset.counts)[split]
            if len(images[split]) != expected:
                problems.append(f"{split}: expected {expected} images{f' in {used}' if used else ''}, found "
                                f"{len(images[split])}. Unpack again: {dataset.archive}. (A part on purpose "
                                "can be trained on and measured, but its numbers stand beside nobody's.)")
        without = [image for image in images[split] if image not in labels.get(split, {})]
        if split != "train" and labels.get(split) and without:
            problems.append(f"{split}: expected a label for each of {len(images[split])} images, found none "
                            f"for {len(without)} ({some(without)}). Unpack the labels again, else "
                            "evaluate.py measures the other images alone.")
        if split != "train" and name in DATASETS and not labels[split]:
            patterns = " or ".join(DATASETS[name].labels.values())
            pattern = patterns.replace("{split}", DATASETS[name].splits[split])
            problems.append(f"{split}: expected labels {pattern}, found none. Training needs none; "
                            f"evaluate.py does. Unpack: {DATASETS[name].archive}.")
    for one, other in itertools.combinations(images, 2):                # Toyland counts each split from 0000
        if both := [image for image, path in images[one].items() if image in images[other]
                    and filecmp.cmp(path, images[other][image], shallow=False)]:
            problems.append(f"expected no image in both {one} and {other}, found {len(both)} ({some(both)}). "
                            "Mend the lists.")
    return problems


def labels_without_images(name: str, root: str, images: dict, labels_folder: str | None) -> list[str]:
    """Label files to which no image belongs: half of an archive is missing, or files were renamed."""
    if name in DATASETS:
        dataset, base, problems = DATASETS[name], images_of.find(name, root), []
        seen = {(pattern.replace("{split}", folder), dataset.images.replace("{split}", folder))
                for folder in dataset.splits.values() for pattern in dataset.labels.values()}
        pairs = [(base / pattern, images_of.fitting(base, pattern), images_of.fitting(base, of_images))
                 for pattern, of_images in sorted(seen)]
    elif labels_folder is not None:
        problems = []
        pairs = [(Path(labels_folder, "{id}.png"), images_of.fitting(Path(labels_folder), "{id}.png"),
                  images["all"])]
    else:
        return []
    for pattern, labels, known in pairs:
        # A conversion that lies beside its source (<id>_labelTrainIds.png) belongs to an image too, and is
        # passed over.
        there = set(map(images_of.same_name, known))
        alone = [label for label in labels if not {images_of.same_name(label), images_of.same_name(
            label.rpartition("_")[0])} & there]
        if alone:
            problems.append(f"{pattern}: expected an image for each label, found none for {len(alone)} "
                            f"({some(alone)}). Unpack the images again, or remove these labels.")
    return problems


def other_class_order(name: str, root: str) -> list[str]:
    """ADE20K comes with a list of its classes, with synonyms: are they ours, in our order?"""
    path = images_of.find(name, root) / "objectInfo150.txt" if name == "ade" else None
    if path is None or not path.is_file():
        return []
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    official = {int(row[0]): [part.strip() for part in row[-1].split(",")] for row in rows
                if row[0].strip().isdecimal()}
    for number, ours in enumerate(DATASETS["ade"].names, start=1):
        if ours not in official.get(number, []):
            found = ", ".join(official.get(number, ["no such line"]))
            return [f"{path}: expected class {number} to be {ours}, found {found}. This is not "
                    "ADEChallengeData2016, or not its order of classes: unpack that archive."]
    return []


# --------------------------------------------------------------------------------------- what is in the files


def look_at(image: Path, label: Path | None, read_label) -> tuple[str | None, np.ndarray | None]:
    """Decode an image and, where there is one, its label: what is wrong, and the pixels of each class, (256,)
    int64."""
    try:
        picture = images_of.read_image(image)
        if label is None:
            return None, None
        classes = read_label(label, size=(picture.height, picture.width))
    except (ValueError, OSError) as error:
        return str(error), None
    return None, np.bincount(classes.ravel(), minlength=256)


def look_at_all(split: str, images: dict[str, Path], labels: dict[str, Path], read_label,
                workers: int) -> tuple[list[str], np.ndarray]:
    """All of a split, in threads (decoding leaves Python's lock): the faults, and (labels, 256) pixels of
    each class."""
    faults, counts = [], [np.zeros((0, 256), dtype=np.int64)]
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        looks = pool.map(lambda name: look_at(images[name], labels.get(name), read_label), images)
        for fault, of_label in tqdm(looks, total=len(images), desc=split, unit="image"):
            faults += [fault] if fault else []
            counts += [of_label[None]] if of_label is not None else []
    finally:
        pool.shutdown(cancel_futures=True)          # Ctrl-C should not wait for a hundred thousand images
    return faults, np.concatenate(counts)


def print_classes(names: list[str], counts: np.ndarray) -> None:
    """How much of the counted pixels each class has, and how many images show it; counts (labels, 256)."""
    pixels, shown = counts.sum(axis=0), (counts > 0).sum(axis=0)
    counted = max(1, pixels[:len(names)].sum())
    print(f"\n{'class':24}{'pixels':>14}{'percent':>9}{'images':>8}")
    for number, name in enumerate(names):
        if pixels[number]:
            print(f"{name:24}{pixels[number]:14d}{100 * pixels[number] / counted:9.2f}{shown[number]:8d}")
    print(f"{'(ignored)':24}{pixels[IGNORE]:14d}{'':9}{shown[IGNORE]:8d}")
    if never := [name for number, name in enumerate(names) if not pixels[number]]:
        print(f"In none of these {len(counts)} labels: {', '.join(never)}")


MUCH = 0.2                              # share of ignored pixels from which a class without any is suspicious


def own_labels(images: dict[str, Path], labels: dict[str, Path], names: list[str],
               counts: np.ndarray) -> tuple[list[str], list[str]]:
    """Of a user's labels: what their files do not tell, and what must be mended. counts (labels, 256)."""
    pixels = counts.sum(axis=0)
    never = [name for number, name in enumerate(names) if not pixels[number]]
    unknown, problems = [], []
    if turned := images_of.turned(images):
        unknown.append(f"{turned} of {len(images)} photographs are turned by their EXIF orientation. Labels "
                       "are taken as upright, as a viewer shows the photograph; whether they were drawn so "
                       "shows in no file.")
    unknown.append("which value is which class: nothing in the files says it. They are read in the order of "
                   f"--classes, 0 is {names[0]}.")
    try:
        ground_truth.refuse_binary_masks(labels, len(names))
    except ValueError as error:
        problems.append(str(error))
    ignored = pixels[IGNORE] / max(1, pixels.sum())
    if never and ignored > MUCH and not problems:
        problems.append("expected pixels of every class, or few that are ignored; found none of "
                        f"{some(never)}, and {ignored:.0%} of all pixels ignored (255). Does 255 stand for a "
                        "class?")
    elif never:
        unknown.append(f"whether {some(never)} should occur: no label has a pixel of "
                       f"{'it' if len(never) == 1 else 'them'}.")
    return unknown, problems


def print_both_orders(name: str, counts: np.ndarray, most: int = 8) -> None:
    """PASCAL Context: the commonest classes, were the labels in this order and were they in the other."""
    names, pixels = DATASETS[name].names, counts.sum(axis=0)
    values = {number: value for order in DATASETS[name].labels
              for value, number in DATASETS[name].label_values(order)[0].items()}
    print("\nThe commonest classes in either order. Photographs show more sky and grass than mice and cups:")
    for order, reader in ground_truth.context_orders().items():
        class_of, _ = DATASETS[reader].label_values(order)
        read = sorted(((pixels[number], names[class_of[value]]) for number, value in values.items()),
                      reverse=True)[:most]
        shares = ", ".join(f"{other} {100 * count / max(1, pixels[:len(names)].sum()):.0f} %"
                           for count, other in read)
        print(f"{order + (' (declared)' if reader == name else ''):24}{shares}")


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


# ------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace) -> list[str]:
    """Print what is there and what is wrong with it; return the latter, empty when all is well."""
    name, words = args.data, class_lists.vocabulary(args.data, args.classes)
    images, labels, problems = splits_of(name, args.root, args.labels)
    print(f"{name}: {len(words)} classes" + (f", {DATASETS[name].title}, in {images_of.find(name, args.root)}"
                                             if name in DATASETS else ""))
    for split in images:
        note = "  (not opened: no training reads a label)" if split == "train" else ""
        print(f"{split:>9}{len(images[split]):9d} images{len(labels.get(split, {})):9d} labels{note}")
    problems += wrong_counts(name, args.root, images, labels)
    problems += labels_without_images(name, args.root, images, args.labels)
    problems += other_class_order(name, args.root)
    unknown: list[str] = []
    labels.pop("train", None)
    if not ground_truth.labels_fit(name, words.names):
        print(f"Labels of {name} speak of its own classes, not of those in --classes: not opened.")
        labels = {}
    for found in labels.values() if name in DATASETS else ():
        try:
            if found and (said := ground_truth.how_labels_are_read(name, args.root, found)):
                print(said)
        except ValueError as error:
            problems.append(str(error))
    for split, found in images.items():
        if args.quick and len(found) > SAMPLE:
            chosen = sorted(random.Random(args.seed).sample(list(found), SAMPLE))
            found = {image: found[image] for image in chosen}
        of_split = labels.get(split, {})
        faults, counts = look_at_all(split, found, of_split, ground_truth.LabelReader(name, len(words)),
                                     args.workers)
        problems += faults[:SHOWN]
        if len(faults) > SHOWN:
            problems.append(f"{split}: {len(faults) - SHOWN} more files of {len(found)} have such faults.")
        if len(counts):
            print_classes(words.names, counts)
            if not counts[:, :len(words)].any():
                problems.append(f"{split}: expected labels that name a class, found ignored pixels alone.")
            if is_folder(name):
                doubts, wrong = own_labels(found, of_split, words.names, counts)
                unknown += doubts
                problems += wrong
            if name in ground_truth.context_orders().values():
                print_both_orders(name, counts)
    if unknown:
        print("\nNot known:")
        for doubt in unknown:
            print(f"  - {doubt}")
    if problems:
        print(f"\n{len(problems)} to mend:")
        for number, problem in enumerate(problems, start=1):
            print(f"{number:3d}. {problem}")
    else:
        given = [("--root", args.root, "data"), ("--classes", args.classes, None)]
        repeated = "".join(f" {flag} {shlex.quote(value)}" for flag, value, default in given
                           if value != default)
        where = " in what was compared" if unknown else ""
        print("\n"
              f"All is well{where}{' in this sample' if args.quick else ''}. Next: python rectify.py --data "
              f"{shlex.quote(name)}{repeated}")
    return problems


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        raise SystemExit(2 if main(FLAGS) else 0)
