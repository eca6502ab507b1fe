"""Which images there are, and how a file becomes an RGB picture. For training and measuring; knows no label
path.

Every listing goes through `files_below` and every name through `kind_of`, so that no mask can be taken for a
photograph. Both look at names alone. Where names leave it open, `index_pictures` reads headers, no pixel.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from datasets import DATASETS, is_drawn, is_folder
from toyland.world import draw_dataset

# Of the lists that earlier work hands out together (IIC, PiCIE, STEGO), the one that it measures 27 classes
# on.
CURATED_LIST = "Coco164kFull_Stuff_Coarse_7.txt"

# ---------------------------------------------------------------------------- what a name says

# Formats that Pillow opens and that hold no photograph: icons, stubs, drawings, films.
NO_PHOTOS = {"BUFR", "CUR", "DCX", "EPS", "FITS", "FLI", "GBR", "GRIB", "HDF5", "ICNS", "ICO", "IMT", "IPTC",
             "MCIDAS", "MPEG", "PCD", "PIXAR", "WMF", "XBM", "XPM", "XVTHUMB"}
# What cameras write and Pillow does not read.
CONVERT = {".heic", ".heif", ".hif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf",
           ".rw2"}
LOSSY = {".jpg", ".jpeg", ".jpe", ".jfif"}              # what cameras write, and what no mask is kept in
# How exports call masks (CVAT, labelme, Roboflow, VOC, ADE20K, Cityscapes, CamVid, COCO-Stuff): a word of a
# folder's name, SegmentationClass and train_masks alike, or the last or first word of a file's name.
MASK_WORD = (r"masks?|masked|seg[a-z]?|segs|segmaps?|segmasks?|segment(?:s|ed|ation[a-z]*)|annot|annots|"
             r"annotations?|annotated|gt(?:fine|coarse)?|ground[\W_]?truths?|truths?|semantics?|instances?|"
             r"panoptic|trimaps?|stuffthingmaps?|pixelmaps?|label[a-z]*")
MASK_FOLDER = re.compile(rf"(?:^|[\W\d_])(?:{MASK_WORD})(?=$|[\W\d_])|(?:annot|masks|labels)$", re.IGNORECASE)
MASK_NAME = re.compile(
    rf"(?:^|[\W_])(?:{MASK_WORD}|parts?_?\d|gt[a-z0-9]*|instance_?[a-z]*ids|ground_?truth)"
    r"(?:[\W_]*\d+|[\W_]+(?:colou?r(?:s|ed)?|rgb|raw|vis\w*|truth|[a-z]*ids|masks?|maps?|[a-z]))*$"
    r"|^instance_\d+_|^(?:masks?|seg|labels?|gt)[\W_]*\d+$", re.IGNORECASE)
# Ends that say "mask" only beside a photograph that is called so without them: 0001.jpg and 0001_L.png.
WEAK_END = re.compile(r"[\W_](?:l|p|colou?r(?:ed)?|vis|overlay|bin|sem|inst|pseudo)$|"
                      r"^(?:masks?|seg|labels?|gt)[\W_]+", re.IGNORECASE)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The file endings that this Pillow can open as a photograph."""
    known = Image.registered_extensions()
    return frozenset(end for end, kind in known.items() if kind in Image.OPEN and kind not in NO_PHOTOS)


def kind_of(path: Path) -> str:
    """What a file is by its relative path: "image", "mask", or its ending (".heic", ".txt", "no ending")."""
    if path.suffix.lower() not in image_suffixes():
        return path.suffix.lower() or "no ending"
    folders = (re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part) for part in path.parts[:-1])      # SegmentationClass
    if MASK_NAME.search(path.stem) or any(MASK_FOLDER.search(part) for part in folders):
        return "mask"
    return "image"


def same_name(name: str) -> str:
    """What two spellings of a file name have in common: not letter case, nor how an accent is put
    together."""
    return unicodedata.normalize("NFC", name).casefold()


def files_below(folder: Path) -> list[Path]:
    """All files under a folder, relative to it, sorted; through linked folders too, each folder once, and
    never above where the walk began. No hidden ones. Raises OSError for a folder that cannot be read."""
    def refuse(error: OSError):
        raise error                                     # os.walk would pass over it without a word

    if not folder.is_dir():
        return []
    found, seen, top = [], set(), os.path.realpath(folder)
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen or real != top and Path(top).is_relative_to(real):      # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name).relative_to(folder) for name in names if not name.startswith(".")]
    return sorted(found)


def existing(path: Path) -> Path | None:
    """The file of this name, or of another spelling of it (`same_name`); None if there is none."""
    if path.is_file() or not path.parent.is_dir():
        return path if path.is_file() else None
    return spellings(path.parent, path.parent.stat().st_mtime_ns).get(same_name(path.name))


@functools.lru_cache(maxsize=8)
def spellings(folder: Path, _changed: int) -> dict[str, Path]:
    return {same_name(path.name): path for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------- a folder of one's own


def images_in(folder: Path) -> dict[str, Path]:
    """All photographs under a folder, also in its sub-folders: id (relative path without its ending) → path.

    Prints what it left out: masks, which no training may look at, and files that are no photographs.
    """
    refuse_missing_folder(folder)
    kinds = {path: kind_of(path) if (folder / path).exists() else "dangling link"
             for path in files_below(folder)}
    find_masks_of_photographs(kinds)
    for path in index_pictures(folder, [path for path, kind in kinds.items() if kind == "image"]):
        kinds[path] = "mask"
    refuse_two_folders_alike(folder, [path for path, kind in kinds.items() if kind == "image"])
    photos = [path for path, kind in kinds.items() if kind == "image"]
    said = left_out(kinds)
    if not photos:
        raise ValueError(f"--data {folder}: expected photographs (.jpg, .png, …) in this folder, found "
                         f"none. {said}".strip())
    found: dict[str, Path] = {}
    for path in photos:
        name = path.with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"--data {folder}: expected every name once, since results are kept by name; "
                             f"found {found[name].name} and {path.name}, which differ only in their suffix. "
                             "Rename one, or keep masks in a folder of their own and name it to evaluate.py "
                             "--labels.")
        found[name] = folder / path
    if said:
        print(f"{folder}: {len(found)} photographs. {said}")
    return found


def find_masks_of_photographs(kinds: dict[Path, str]) -> None:
    """Call mask what is one by the photographs that lie there: pictures/1.png or 1_L.png of photos/1.jpg."""
    cameras: dict[str, set[Path]] = {}                  # a photograph's name → the folders that hold one
    for path, kind in kinds.items():
        if kind == "image" and path.suffix.lower() in LOSSY:
            cameras.setdefault(same_name(path.stem), set()).add(path.parent)
    for path, kind in kinds.items():
        if kind != "image" or path.suffix.lower() in LOSSY:
            continue
        name = same_name(path.stem)
        of_another = WEAK_END.sub("", name) in cameras.keys() - {name}
        if path.parent not in cameras.get(name, {path.parent}) or of_another:
            kinds[path] = "mask"


def index_pictures(folder: Path, paths: list[Path]) -> list[Path]:
    """Of pictures of one name in several folders, those that hold numbers where another holds colours:
    out/1.png is a mask of in/1.png. Here names do not tell, and headers are read, no pixel."""
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        if path.suffix.lower() not in LOSSY:
            by_name.setdefault(same_name(path.stem), []).append(path)
    found = []
    for same in by_name.values():
        modes = {path: mode_of(folder / path) for path in same} if len(same) > 1 else {}
        if any(mode in ("RGB", "RGBA") for mode in modes.values()):
            found += [path for path, mode in modes.items() if mode in ("P", "L", "1", "I", "I;16")]
    return found


def mode_of(path: Path) -> str | None:
    """Pillow's mode of an image file by its header; None for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.mode
    except Exception:                                   # whoever needs its pixels will say what is wrong
        return None


def refuse_two_folders_alike(folder: Path, paths: list[Path]) -> None:
    """Raise ValueError for two folders whose files, no JPEGs, have the same names: one may hold masks in
    colours. More than two are taken as they are: frames of several films."""
    names_in: dict[Path, set[str]] = {}
    for path in paths:
        if path.suffix.lower() not in LOSSY:
            names_in.setdefault(path.parent, set()).add(same_name(path.stem))
    alike: dict[frozenset[str], list[Path]] = {}
    for place, names in names_in.items():
        alike.setdefault(frozenset(names), []).append(place)
    for names, (first, *others) in alike.items():
        if len(others) == 1:
            raise ValueError(f"--data {folder}: expected photographs alone; found {len(names)} files in "
                             f"{first} and as many of the same names in {others[0]}, {min(names)} first. If "
                             "one of the two holds masks, name the folder of the photographs to --data; if "
                             "both are photographs, rename one file.")


def left_out(kinds: dict[Path, str]) -> str:
    """What a listing passed over, in a sentence; "" if nothing."""
    masks = [str(path) for path, kind in kinds.items() if kind == "mask"]
    counts = Counter(kind for kind in kinds.values() if kind not in ("image", "mask"))
    more = ", …" if len(masks) > 2 else ""
    parts = [f"{len(masks)} masks ({', '.join(masks[:2])}{more})"] if masks else []
    parts += [f"{count} {kind}{' (convert to JPEG)' if kind in CONVERT else ''}"
              for kind, count in sorted(counts.items())]
    return f"Left out: {', '.join(parts)}." if parts else ""


def refuse_missing_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: expected toyland, voc, or a folder of images (also known: "
                                f"{', '.join(name for name in DATASETS if name not in ('toyland', 'voc'))}); "
                                "found no folder of that name.")


# ---------------------------------------------------------------------------- a dataset


def training_images(data: str, root: str) -> dict[str, Path]:
    """The training images of a dataset or folder: id → path, sorted by id. Opens no label."""
    return images_in(Path(data)) if is_folder(data) else image_files(data, root, "train")


def training_order(data: str, root: str) -> list[str]:
    """The ids of the training images in the order of the dataset's own list; where it has none, sorted."""
    found = training_images(data, root)
    if is_folder(data) or (path := list_of(data, find(data, root), "train")) is None:
        return list(found)
    return ids_of(path, found.get)


def stamps_of(images: dict[str, Path]) -> list[tuple[str, int, int]]:
    """What tells whether an image file is still the one that something was made from."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in images.items()]


def how_to_get(name: str) -> str:
    dataset = DATASETS[name]
    fetch = "It cannot be fetched here: unpack"
    if name == "voc":
        fetch = "Add --download to fetch it (1.9 GB), or unpack"
    return f"{fetch} {dataset.archive} ({dataset.page}), or point --root at your copy."


def find(name: str, root: str) -> Path:
    """The folder under `root` where the dataset's tree begins. Raises FileNotFoundError, saying what to get
    where."""
    dataset = DATASETS[name]
    folders = dict.fromkeys(dataset.images.replace("{split}", split).split("{id}")[0].rstrip("/")
                            for split in dataset.splits.values())
    tried = [Path(root, place) for place in dataset.places]
    for base in tried:
        if any((base / folder).is_dir() for folder in folders):
            return base
    raise FileNotFoundError(f"--data {name}: expected {dataset.tree} under {root}; found no "
                            f"{' or '.join(folders)} in {', '.join(map(str, tried))}. {how_to_get(name)}")


def image_files(name: str, root: str, split: str) -> dict[str, Path]:
    """The images of the split "train", "val" or "test": id → path, sorted by id. Raises FileNotFoundError,
    ValueError."""
    if is_drawn(name):
        draw_dataset(Path(root))
    dataset, base = DATASETS[name], find(name, root)
    pattern = dataset.images.replace("{split}", dataset.splits[split])
    if (path := list_of(name, base, split)) is not None:
        return listed(path, base, pattern, dataset.tree)
    kinds: dict[Path, str] = {}
    found = fitting(base, pattern, [one.replace("{split}", dataset.splits[split])
                                    for one in dataset.labels.values()], kinds)
    said = left_out(kinds)
    if not found:
        raise FileNotFoundError(f"--data {name}: expected images {base / pattern.replace('{id}', '*')}, "
                                f"found none. {said + ' ' if said else ''}The tree should be {dataset.tree}. "
                                f"{how_to_get(name)}")
    if said:
        print(f"{name}, {split}: {len(found)} photographs. {said}")
    return found


def list_of(name: str, base: Path, split: str) -> Path | None:
    """The list that says which images a split holds: the dataset's own, or a curated one if it lies there."""
    dataset = DATASETS[name]
    if dataset.lists:
        return base / dataset.lists.replace("{split}", dataset.splits[split])
    if not dataset.curated:
        return None
    found = sorted(base.glob(dataset.curated.replace("{split}", dataset.splits[split])))
    chosen = [path for path in found if path.name == CURATED_LIST] or found
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0].parent}: expected one list of images, or {CURATED_LIST} among them, "
                         f"found {', '.join(path.name for path in chosen)}. Leave the one there that is "
                         "meant.")
    return chosen[0] if chosen else None


def fitting(base: Path, pattern: str, labels: list[str] | None = None,
            kinds: dict[Path, str] | None = None) -> dict[str, Path]:
    """All files under `base` that fit a pattern: id → path, sorted by id. Letter case of the ending is
    nothing. Raises ValueError where two files have one id.

    An id is what stands for {id}, sub-folders and all: "leftImg8bit/val/{id}_leftImg8bit.png" gives
    aachen/aachen_0. So it is unique, and the same in the patterns of images and of labels. In a pattern of
    images, which is given those of `labels`, no mask fits. What does not fit is put into `kinds`.
    """
    before, after = pattern.split("{id}")
    found: dict[str, Path] = {}
    for path in files_below(base / before):
        name = path.as_posix()
        one, fits = name[:len(name) - len(after)], name.lower().endswith(after.lower())
        masked = labels is not None and (kind_of(Path(one + path.suffix)) == "mask" or any(
            closer(label, pattern) and belongs(before + name, label) for label in labels))
        if not fits or masked:
            if kinds is not None:
                kinds[path] = "mask" if masked else path.suffix.lower() or "no ending"
        elif one in found:
            raise ValueError(f"{base / before}: expected every name once, found {found[one].name} and "
                             f"{path.name}. Remove one of them.")
        else:
            found[one] = base / before / path
    return dict(sorted(found.items()))


def belongs(name: str, pattern: str) -> bool:
    before, after = pattern.split("{id}")
    return name.startswith(before) and name.lower().endswith(after.lower())


def closer(label: str, image: str) -> bool:
    """Whether a pattern of labels says more than that of the images: 0001_L.png fits {id}.png too."""
    return len(label) > len(image)


def ids_of(path: Path, image_of: Callable) -> list[str]:
    """The ids in a list, each once, in their order. `image_of` gives an id's image, or None.

    A second column is passed over, unless the space belongs to the name. What is no text names no image.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    return list(dict.fromkeys(line if " " in line and image_of(line) else line.split()[0]
                              for line in lines if line))


def listed(path: Path, base: Path, pattern: str, tree: str) -> dict[str, Path]:
    """The images that the list `path` names, one id a line. Raises naming the first that is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the list {path}, found none. The tree should be {tree}; a "
                                "dataset without lists leaves out the key \"lists\" of its description.")
    def image_of(one: str) -> Path | None:
        return existing(base / pattern.replace("{id}", one))

    ids = sorted(ids_of(path, image_of))
    if not ids:
        raise ValueError(f"{path}: expected image ids, one a line; found an empty list.")
    found = {name: image_of(name) for name in ids}
    if wrong := [name for name, image in found.items() if image is None
                 and (Path(name).suffix.lower() in image_suffixes() or "/" in name or "\\" in name)]:
        alone = re.split(r"[/\\]", wrong[0])[-1]
        alone = Path(alone).stem if Path(alone).suffix.lower() in image_suffixes() else alone
        raise ValueError(f"{path}: expected ids alone, one a line (as {alone}); found a path or a file name: "
                         f"{wrong[0]}. Take folders and endings away.")
    if masks := [name for name in ids if kind_of(Path(f"{name}.png")) == "mask"]:
        raise ValueError(f"{path}: expected ids of photographs, found {masks[0]}, which is called like a "
                         "mask. Take it out of the list.")
    if missing := [base / pattern.replace("{id}", name) for name, image in found.items() if image is None]:
        raise FileNotFoundError(f"{path} names {len(ids)} images: expected all of them in "
                                f"{missing[0].parent}, found {len(missing)} missing; the first is "
                                f"{missing[0]}. Unpack the archive again or mend the list.")
    return found


# ---------------------------------------------------------------------------- files → pictures


def read_image(path: Path) -> Image.Image:
    """An image as RGB, as a viewer shows it: upright, and white where it is transparent. Raises ValueError
    naming a file that cannot be read."""
    return to_rgb(open_image(path), path)


def open_image(path: Path) -> Image.Image:
    """An image, decoded and turned upright if the camera says so, in its own mode."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
            return upright
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: expected at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, "
                         f"Pillow's limit for a picture that fits into memory; found more ({error}). Scale "
                         "it down.") from error
    except MemoryError:
        raise
    except Exception as error:                          # Pillow raises nearly anything for a broken file
        raise ValueError(f"{path}: expected an image, found a file that cannot be read ({error}). It may be "
                         "truncated: fetch it again, take it out of the list, or add "
                         "--skip-broken.") from error


def to_rgb(image: Image.Image, name: Path | str = "the image") -> Image.Image:
    """Any mode → RGB. Transparent pixels become white; 16 bits are scaled to 8. Raises ValueError for other
    numbers."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F" or image.mode == "I" and not (values.min() >= 0 and 255 < values.max() <= 65535):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{name}: expected 8 or 16 bits, found {kind} numbers from {values.min()} to "
                         f"{values.max()}: nothing says which of them is white. Convert it.")
    # 16-bit grey: Pillow's own conversion would make all above 255 white.
    return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")


def see_through(image: Image.Image) -> np.ndarray | None:
    """Which pixels are wholly transparent: (H, W) bool, or None where none can be."""
    return np.asarray(image.convert("RGBA"))[..., 3] == 0 if image.has_transparency_data else None


def turned(images: dict[str, Path]) -> int:
    """How many photographs carry an EXIF orientation by which they are turned."""
    count = 0
    for path in images.values():
        try:
            with Image.open(path) as image:
                count += image.getexif().get(0x0112, 1) not in (0, 1)
        except Exception:                               # whoever needs its pixels will say what is wrong
            pass
    return count


def readable(images: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The images that can be decoded to their last byte, and of the others id → reason. For
    `--skip-broken`."""
    broken: dict[str, str] = {}
    for name, path in tqdm(images.items(), desc="looking for broken images", unit="image"):
        try:
            read_image(path)
        except (ValueError, OSError) as error:
            broken[name] = str(error)
    return {name: path for name, path in images.items() if name not in broken}, broken


# ---------------------------------------------------------------------------- a download


def download(data: str, root: str) -> None:
    """Fetch PASCAL VOC 2012 under `root` unless it is there. Raises ValueError for the others, OSError when
    it fails.

    The other public datasets ask for a registration or lie on slow mirrors: the error says what to unpack
    where.
    """
    if is_folder(data):
        raise ValueError("--download: expected --data voc, the one dataset that can be fetched here; found "
                         f"{data}.")
    if is_drawn(data):
        return
    try:
        find(data, root)
        return
    except FileNotFoundError as missing:
        if data != "voc":
            raise ValueError("--download: expected --data voc, the one dataset that can be fetched here; "
                             f"found {data}. {missing}") from None
    from torchvision.datasets import VOCSegmentation
    try:
        VOCSegmentation(root, year="2012", image_set="train", download=True)
    except RuntimeError as error:
        raise OSError(f"PASCAL VOC 2012 could not be fetched ({error}). Try again, or unpack "
                      f"{DATASETS['voc'].archive} under {root} yourself.") from error
