"""Which images there are, and how a file becomes an RGB picture. For training and measuring; knows no label path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from datasets import DATASETS, is_folder
from toyland.world import draw_dataset

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
# Of the lists that earlier work hands out together (IIC, PiCIE, STEGO), the one that it measures 27 classes on.
CURATED_LIST = "Coco164kFull_Stuff_Coarse_7.txt"

# ------------------------------------------------------------------------------------------ which images


def training_images(data: str, root: str) -> dict[str, Path]:
    """The training images of a dataset or folder: id → path, sorted by id. Opens no label."""
    return images_in(Path(data)) if is_folder(data) else image_files(data, root, "train")


def validation_images(data: str, root: str) -> dict[str, Path]:
    """The images that results are measured or shown on: id → path. A folder of your own: all of its images."""
    return images_in(Path(data)) if is_folder(data) else image_files(data, root, "val")


def stamps_of(images: dict[str, Path]) -> list[tuple[str, int, int]]:
    """What tells whether an image file is still the one that something was made from."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in images.items()]


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
    if name == "toyland":
        draw_dataset(Path(root))
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



def images_in(folder: Path) -> dict[str, Path]:
    """All images under a folder, also in its sub-folders: id (relative path without suffix) → path."""
    refuse_missing_folder(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))    # ._a.jpg, .thumbnails
    if not paths:
        raise ValueError(f"--data {folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder, found none.")
    found: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"--data {folder}: expected every name once, since results are kept by name; found "
                             f"{found[name].name} and {path.name}, which differ only in their suffix. Rename one.")
        found[name] = path
    refuse_labels_among(found, folder)
    return found


def refuse_missing_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: expected toyland, voc, or a folder of images (also known: "
                                f"{', '.join(list(DATASETS)[1:])}); found no folder of that name.")


def refuse_labels_among(images: dict[str, Path], folder: Path) -> None:
    """Raise ValueError for an index picture with the name of another image: a label, which no training may look at."""
    by_stem: dict[str, list[Path]] = {}
    for path in images.values():
        by_stem.setdefault(path.stem, []).append(path)
    for same in by_stem.values():
        for path in same if len(same) > 1 else []:
            if path.suffix.lower() == ".png" and mode_of(path) in ("P", "L", "1", "I;16", "I"):
                other = next(other for other in same if other != path)
                raise ValueError(f"--data {folder}: expected photographs alone, found {path}, an index picture with the name "
                                 f"of {other}. It looks like a label: labels lie in a folder of their own, outside of this "
                                 "one, and are named by evaluate.py --labels.")


def mode_of(path: Path) -> str | None:
    """Pillow's mode of an image file by its header; None for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.mode
    except Exception:                                   # whoever needs its pixels will say what is wrong
        return None


def readable(images: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The images that can be decoded to their last byte, and of the others id → reason. For `--skip-broken`."""
    broken: dict[str, str] = {}
    for name, path in tqdm(images.items(), desc="looking for broken images", unit="image"):
        try:
            read_image(path)
        except (ValueError, OSError) as error:
            broken[name] = str(error)
    return {name: path for name, path in images.items() if name not in broken}, broken


# ------------------------------------------------------------------------------------------ files → pictures


def read_image(path: Path) -> Image.Image:
    """An image as RGB, turned upright if the camera says so. Raises ValueError naming a file that cannot be read."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode[0] not in "IF":
                return upright.convert("RGB")
            values, mode = np.asarray(upright), upright.mode
    except FileNotFoundError:
        raise
    except Exception as error:                          # Pillow raises nearly anything for a broken file
        raise ValueError(f"{path}: expected an image, found a file that cannot be read ({error}). It may be "
                         "truncated: fetch it again, take it out of the list, or add --skip-broken.") from error
    if mode == "F" or mode == "I" and not (values.min() >= 0 and 255 < values.max() <= 65535):
        raise ValueError(f"{path}: expected 8 or 16 bits, found {'floating-point' if mode == 'F' else '32-bit'} numbers from "
                         f"{values.min()} to {values.max()}: nothing says which of them is white. Convert it.")
    # 16-bit grey: Pillow's own conversion would make all above 255 white.
    return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")


# ------------------------------------------------------------------------------------------ a download


def download(data: str, root: str) -> None:
    """Fetch PASCAL VOC 2012 under `root` unless it is there. Raises ValueError for the others, OSError when it fails.

    The other public datasets ask for a registration or lie on slow mirrors: the error says what to unpack where.
    """
    if data not in DATASETS:
        raise ValueError(f"--download: expected --data voc, the one dataset that can be fetched here; found {data}.")
    try:
        find(data, root)
        return
    except FileNotFoundError as missing:
        if data != "voc":
            raise ValueError(f"--download: expected --data voc, the one dataset that can be fetched here; found {data}. "
                             f"{missing}") from None
    from torchvision.datasets import VOCSegmentation
    try:
        VOCSegmentation(root, year="2012", image_set="train", download=True)
    except RuntimeError as error:
        raise OSError(f"PASCAL VOC 2012 could not be fetched ({error}). Try again, or unpack {DATASETS['voc'].archive} "
                      f"under {root} yourself.") from error
