"""Hypotheses from a file, in the place of windows: which classes each training image may contain. For
--hypotheses FILE of rectify.py and distill.py.

    a list a line   [8, 11]: class numbers from 0; line n is of image n of the dataset's own training list,
                    and where there is no list, of its images in the order of their names. So the authors of
                    ReCLIP++ gave out theirs
    by image id     {"2007_000032": [0, 14], …}: one JSON object. Images that are not trained on may be in it

Reads the file and the training list, no image and no label. A hypothesis is believed: whoever makes the file
from labels trains with labels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from clip.download import sha256
from datasets import images as image_files


def votes(marked: str, data: str, root: str, images: list[str], classes: int) -> Tensor:
    """The hypotheses of a file as votes (images, C): 1 for each of an image's classes, which passes any
    threshold t of Eq. 6 below 1, and 0 for the others.

    marked: FILE#MARK, as the flag gives it. Says which form the file has, and for how many images. Raises
    FileNotFoundError, and ValueError for another content than when it was marked and for what `read` refuses.
    """
    name, _, mark = marked.rpartition("#")
    if not Path(name).is_file():
        raise FileNotFoundError(f"--hypotheses {name}: expected the file that this run began with, found "
                                "none. Bring it back, or train again with another --out.")
    if sha256(Path(name))[:16] != mark:
        raise ValueError(f"--hypotheses {name}: expected the content that this run began with, found another "
                         "one. Bring it back, or train again with another --out.")
    order = image_files.training_order(data, root)
    form, of_image = read(Path(name), order, classes)
    if missing := [image for image in images if image not in of_image]:
        raise ValueError(f"--hypotheses {name}: expected classes for each of {len(images)} training images, "
                         f"found none for {len(missing)}, the first of which is {missing[0]}. Add a list of "
                         "class numbers for each of them.")
    print(f"--hypotheses {name}: {form}, for {len(images)} training images.")
    found = torch.zeros(len(images), classes)
    for row, image in enumerate(images):
        found[row, of_image[image]] = 1.0
    return found


def read(path: Path, order: list[str], classes: int) -> tuple[str, dict[str, list[int]]]:
    """What form a file has, and image id → class numbers. `order`: the ids of the training list.

    Raises ValueError for what is no JSON, for another number of lines than of images, and for a list that is
    empty or holds anything but class numbers.
    """
    said = f"--hypotheses {path}"
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        by_id = json.loads(text) if text.startswith("{") else None
    except ValueError as error:                                 # of UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{said}: expected JSON, image id → list of class numbers, or such a list a line; "
                         f"found no JSON ({error}).") from error
    if by_id is not None:
        return "by image id", {image: class_numbers(found, classes, f"{said}: image {image}")
                               for image, found in by_id.items()}
    lines = text.splitlines()
    if len(lines) != len(order):
        raise ValueError(f"{said}: expected {len(order)} lines, one for each image of the training list, "
                         f"found {len(lines)}. Take the file that belongs to this dataset and list, or one "
                         "by image id.")
    return "one list a line", {
        image: class_numbers(line, classes, f"{said}: line {number}")
        for number, (image, line) in enumerate(zip(order, lines), start=1)}


def class_numbers(found: object, classes: int, where: str) -> list[int]:
    """A list of class numbers, or its JSON. Raises ValueError unless there is one or more, in 0..C−1."""
    try:
        numbers = json.loads(found) if isinstance(found, str) else found
    except ValueError:
        numbers = None
    if not (isinstance(numbers, list) and numbers
            and all(type(number) is int and 0 <= number < classes for number in numbers)):
        raise ValueError(f"{where}: expected a JSON list of one class number or more, from 0 to "
                         f"{classes - 1}, found {str(found)[:80]}. The numbers are places in the class list, "
                         "counted from 0.")
    return numbers
