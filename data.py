"""Datasets: where images lie, what the classes are called, and how images become tensors.

No label is read here: `TrainingImages` yields images and ids and has no way to a label. ground_truth.py, for evaluation
alone, is another file.

A dataset is known by name (`toyland`, or one of public_datasets.py) or is a folder of your own images with a file of class
names. This file holds what is the same for all of them.

    B images · C classes · H,W pixels
"""

from __future__ import annotations

import contextlib
import functools
import signal
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

import public_datasets
import toyland
from public_datasets import DATASETS
from runs import seed_of

IGNORE = 255                                            # a pixel that no measure counts
MEAN = (0.48145466, 0.4578275, 0.40821073)              # CLIP's, for every network here: ImageNet's would shift
STD = (0.26862954, 0.26130258, 0.27577711)              # the colours that CLIP was trained on
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}

# ------------------------------------------------------------------------------------------ classes

# Of every dataset known by name: its classes as the prompts say them, and their colours.
KNOWN = {"toyland": (toyland.CLASSES, toyland.PALETTE),
         **{name: public_datasets.names_and_colours(name) for name in DATASETS}}
VOC_CLASSES, VOC_PALETTE = KNOWN["voc"]

# The 85 sentences that MaskCLIP and ReCLIP average for a class's query (OpenAI's 80 for ImageNet and five more).
QUERY_TEMPLATES = """
a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. | a photo of the hard to see {}. | a low
resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad photo of the {}. | a cropped photo
of the {}. | a tattoo of a {}. | the embroidered {}. | a photo of a hard to see {}. | a bright photo of a {}. | a
photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. | a drawing of a {}. | a photo of my {}. |
the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. | a black and white photo of the {}. | a
painting of the {}. | a painting of a {}. | a pixelated photo of the {}. | a sculpture of the {}. | a bright photo
of the {}. | a cropped photo of a {}. | a plastic {}. | a photo of the dirty {}. | a jpeg corrupted photo of a {}.
| a blurry photo of the {}. | a photo of the {}. | a good photo of the {}. | a rendering of the {}. | a {} in a
video game. | a photo of one {}. | a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the
origami {}. | the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. | a low resolution
photo of a {}. | the toy {}. | a rendition of the {}. | a photo of the clean {}. | a photo of a large {}. | a
rendition of a {}. | a photo of a nice {}. | a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. |
art of a {}. | a sketch of the {}. | a embroidered {}. | a pixelated photo of a {}. | itap of the {}. | a jpeg
corrupted photo of the {}. | a good photo of a {}. | a plushie {}. | a photo of the nice {}. | a photo of the
small {}. | a photo of the weird {}. | the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the
large {}. | a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. | graffiti
of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. | a photo of a small {}. | a tattoo of the {}. |
there is a {} in the scene. | there is the {} in the scene. | this is a {} in the scene. | this is the {} in the
scene. | this is one {} in the scene.
""".replace("\n", " ").strip().split(" | ")


@dataclass(frozen=True)
class Vocabulary:
    """What can be named: for each class its names (the first is shown, all are averaged) and its colour."""
    synonyms: tuple[tuple[str, ...], ...]
    palette: tuple[tuple[int, int, int], ...]
    templates: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [names[0] for names in self.synonyms]

    def __len__(self) -> int:
        return len(self.synonyms)


def vocabulary(data: str, classes_file: str | None = None) -> Vocabulary:
    """The classes of a dataset, or those of `classes_file` in its place. Raises ValueError, FileNotFoundError."""
    if classes_file is not None:
        return vocabulary_of(data, read_classes(Path(classes_file)))
    if data in KNOWN:
        return vocabulary_of(data, tuple((name,) for name in KNOWN[data][0]))
    raise ValueError(f"--data {data}: expected {', '.join(KNOWN)}, or a folder of your own images together with --classes "
                     "FILE, a text file with one class name a line (synonyms after commas); found no --classes.")


def vocabulary_of(data: str, synonyms: tuple[tuple[str, ...], ...]) -> Vocabulary:
    """Names with colours and query templates. A dataset's own classes keep its official colours."""
    names, palette = KNOWN.get(data, ((), ()))
    if [first for first, *_ in synonyms] != list(names):
        palette = distinct_colours(len(synonyms))
    return Vocabulary(synonyms, tuple(palette), tuple(toyland.TEMPLATES if data == "toyland" else QUERY_TEMPLATES))


def read_classes(path: Path) -> tuple[tuple[str, ...], ...]:
    """A text file with one class a line, synonyms after commas. Empty lines and lines from # on are passed over."""
    if not path.is_file():
        raise FileNotFoundError(f"--classes {path}: expected a text file with one class name a line, found no such file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path}: expected a UTF-8 text file, found other bytes ({error.reason}). "
                         "Save it as UTF-8.") from error
    return parse_classes([line for line in lines if line.strip() and not line.lstrip().startswith("#")],
                         source=f"--classes {path}")


def parse_classes(lines: list[str], source: str) -> tuple[tuple[str, ...], ...]:
    """Lines of comma-separated synonyms → names per class. Raises ValueError unless there are 2 to 255 different ones."""
    synonyms = tuple(tuple(name for name in (part.strip() for part in line.split(",")) if name) for line in lines)
    if len(synonyms) < 2:
        raise ValueError(f"{source}: expected at least two classes, found {len(synonyms)}. A class is told from the others: "
                         "with one there is nothing to decide. Add what else is in the images (wall, grass, sky, …).")
    if len(synonyms) > IGNORE:
        raise ValueError(f"{source}: expected at most {IGNORE} classes (a label picture has 256 values), found {len(synonyms)}.")
    seen: dict[tuple[int, ...], tuple[str, int]] = {}       # by what CLIP reads: letter case and extra spaces are nothing
    for number, names in enumerate(synonyms, start=1):
        if not names:
            raise ValueError(f"{source}: expected a name for class {number}, found only commas. Name it or remove the line.")
        for name in names:
            tokens = tokens_of_name(name, source)
            if tokens in seen:
                other, where = seen[tokens]
                same = "" if other.lower() == name.lower() else f": to CLIP it is the same as {other!r}"
                raise ValueError(f"{source}: expected every name once, found {name!r} at class {where} and at class {number}"
                                 f"{same}. Remove one of them.")
            seen[tokens] = name, number
    return synonyms


def tokens_of_name(name: str, source: str) -> tuple[int, ...]:
    """CLIP's tokens of a class name. Raises ValueError for one that cannot be said inside CLIP's 77 tokens."""
    import clip
    room = 77 - 2 - longest_template()
    if any(unicodedata.category(letter) == "Cc" for letter in name) or "<|" in name:
        raise ValueError(f"{source}: expected names in plain words, found {name[:80]!r} with control characters or one of CLIP's "
                         "own marks in it.")
    tokens = tuple(clip.encode(name)) if len(name) <= 500 else None             # the tokenizer is slow with endless words
    if tokens is None or len(tokens) > room:
        found = f"{len(name)} characters" if tokens is None else len(tokens)
        raise ValueError(f"{source}: expected class names of at most {room} tokens, which fit into CLIP's 77 with a sentence "
                         f"around them; found {found} in {name[:80]!r}. Shorten it.")
    if not tokens:
        raise ValueError(f"{source}: expected names that can be read, found {name!r} without a readable character.")
    return tokens


@functools.cache
def longest_template() -> int:
    """How many tokens the longest of the query's sentences has without a name."""
    import clip
    return max(len(clip.encode(template)) for template in QUERY_TEMPLATES) - 1


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for a user's own classes: hues by the golden angle, in three shades."""
    import colorsys
    return [tuple(round(255 * value) for value in colorsys.hsv_to_rgb(i * 0.618 % 1, (0.85, 0.55, 0.95)[i % 3],
                                                                       (0.95, 0.85, 0.6)[i // 2 % 3]))
            for i in range(count)]


# ------------------------------------------------------------------------------------------ where things lie

def training_images(data: str, root: str) -> dict[str, Path]:
    """The training images of a dataset: id → path, sorted by id. Opens no label.

    Toyland is drawn first where it is not there, its validation scenes and their labels included.
    """
    if data == "toyland":
        folder = toyland.draw_dataset(Path(root)) / "images" / "train"
        return {f"train/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    if data in DATASETS:
        return public_datasets.image_files(data, root, "train")
    return images_in(Path(data))


def validation_images(data: str, root: str) -> dict[str, Path]:
    """The images that results are measured or shown on: id → path. A folder of your own: all of its images."""
    if data == "toyland":
        folder = toyland.draw_dataset(Path(root)) / "images" / "val"
        return {f"val/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    if data in DATASETS:
        return public_datasets.image_files(data, root, "val")
    return images_in(Path(data))


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


# ------------------------------------------------------------------------------------------ files → tensors

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


NORMALISE = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → normalised (3, H, W) float32."""
    return NORMALISE(image).as_subclass(Tensor)


LONGEST_SIDE = 2048                                     # [code] in pixels; a panorama of more stays below the short side


def short_side_to(image: Image.Image, size: int, multiple: int = 1) -> Image.Image:
    """Resize so that the shorter side has `size` pixels, bilinear with antialiasing, as at training and test.

    Both sides are rounded to a `multiple`, at least one of it: where that is the patch, no image is padded, and a patch's
    prediction lies where the patch is. A side of more than LONGEST_SIDE pixels is made that long, whatever the other is.
    """
    scale = min(size / min(image.size), LONGEST_SIDE / max(image.size))
    H, W = (multiple * max(1, round(scale * side / multiple)) for side in (image.height, image.width))
    return v2.functional.resize(image, [H, W], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


class RandomShortSide:
    """Resize to a short side between `low` and `high` pixels, both included."""

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.low if self.low == self.high else int(torch.randint(self.low, self.high + 1, ()))
        return short_side_to(image, size)


def augmentation(short_side: int, crop: int | tuple[int, int], scale: tuple[float, float], distort: bool) -> v2.Transform:
    """The recipe's augmentation: PIL image → normalised (3, crop, crop). torchvision's transforms throughout.

    Random scale (short side × U(scale)), photometric distortion, random flip, random crop. What the crop lacks is filled
    after normalisation with zeros, that is with CLIP's mean colour.
    """
    low, high = (max(1, round(short_side * ratio)) for ratio in scale)
    return v2.Compose([
        RandomShortSide(low, high),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        *([v2.RandomPhotometricDistort()] if distort else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.RandomCrop(crop, pad_if_needed=True, fill=0),
    ])


class TrainingImages(torch.utils.data.Dataset):
    """Augmented images and their ids. It is given image paths alone and has no way to a label.

    An item is asked for as `(epoch, index)` (see `training_batches`): its augmentation depends on seed, epoch and index
    only, so neither the number of workers nor an interruption changes it.
    """

    def __init__(self, images: dict[str, Path], transform: v2.Transform, seed: int):
        self.ids, self.paths = list(images), list(images.values())
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, when: tuple[int, int]) -> tuple[Tensor, str]:
        epoch, index = when
        image = read_image(self.paths[index])
        with random_state(seed_of(self.seed, "augmentation", epoch, index)):
            return self.transform(image).as_subclass(Tensor), self.ids[index]


@contextlib.contextmanager
def random_state(seed: int):
    """torch's global generator, which torchvision's transforms draw from, seeded inside and as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class StoredFeatures(torch.utils.data.Dataset):
    """CLIP's features in the place of augmented images, the same in every epoch: `(Z (D, h, w) float32, id)`."""

    def __init__(self, images: dict[str, Path], features: Tensor):
        self.ids, self.features = list(images), features

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, when: tuple[int, int]) -> tuple[Tensor, str]:
        _, index = when
        return self.features[index].float(), self.ids[index]


def training_batches(dataset: TrainingImages | StoredFeatures, *, batch_size: int, first_step: int, steps: int, seed: int,
                     workers: int = 0):
    """Batches `(images (B, 3, H, W), ids)` for the steps first_step..steps−1.

    Every epoch is a fresh permutation; a last batch that is not full is dropped (unless it is the only one).
    """
    batches = Batches(len(dataset), batch_size, first_step, steps, seed)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_ctrl_c,
                                       pin_memory=torch.cuda.is_available(), persistent_workers=False)


def ignore_ctrl_c(_worker: int) -> None:
    """Ctrl-C reaches every process of a run. A worker that died of it would keep the step from ending and being saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def steps_per_epoch(images: int, batch_size: int) -> int:
    return max(1, images // batch_size)


class Batches:
    """Which image comes when: lists of (epoch, index), a function of the seed and the step alone."""

    def __init__(self, images: int, batch_size: int, first_step: int, steps: int, seed: int):
        self.images, self.batch_size, self.first_step, self.steps, self.seed = images, batch_size, first_step, steps, seed

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self):
        per_epoch, order_of = steps_per_epoch(self.images, self.batch_size), None
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if order_of != epoch:
                order = np.random.default_rng(seed_of(self.seed, "order", epoch)).permutation(self.images)
                order_of = epoch
            yield [(epoch, int(index)) for index in order[place * self.batch_size:(place + 1) * self.batch_size]]


# ------------------------------------------------------------------------------------------ a download

def download(data: str, root: str) -> None:
    """Fetch PASCAL VOC 2012 under `root` unless it is there. Raises ValueError for the others, OSError when it fails.

    The other public datasets ask for a registration or lie on slow mirrors: the error says what to unpack where.
    """
    if data not in DATASETS:
        raise ValueError(f"--download: expected --data voc, the one dataset that can be fetched here; found {data}.")
    try:
        public_datasets.find(data, root)
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
