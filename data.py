"""What a stage works on: images as tensors, in batches, and beside them the words and the frozen CLIP.

No label is read here: `TrainingImages` yields images and row numbers and has no way to a label. Where files
lie is told by datasets/images.py, what the classes are called by datasets/words.py; labels are read by
datasets/labels.py, which nothing imports here.

One image's way to the loss (VOC's recipes, ViT-B/16), stage 1:

    a file           datasets/images.py  read_image        RGB, upright, any size
    a training image data.py  augmentation                 (3, 336, 336), CLIP's mean and std
    a batch          data.py  training_batches             (B, 3, 336, 336), rows
    features Z       clip/model.py  encode_dense           (B, 512, 21, 21), unit vectors
    its hypothesis H rectify.py  count_votes, Eq. 6        (B, 20), f from 121 windows, counted once; f > t
    M_q, M, M_o      rectify.py  train_step, Eq. 1 to 4    (B, 20, 21, 21)
    masks            Eq. 5                                 (B, 20, 21, 21), one 1 a patch
    the loss         Eq. 7                                 a number

stage 2, where B images of 512×512 go through teacher and student:

    teacher's M_o    distill.py  teach                     (B, 20, 32, 32), from Z (B, 512, 32, 32)
    student's Ẑ      distill.py  DeepLabV2                 (B, 512, 64, 64)
    student's M^D    distill.py  Inherited                 (B, 20, 64, 64)
    three losses     distill.py  train_step, Eq. 8 to 10   numbers; the teacher's maps resized to 64×64
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

import clip
from clip import MEAN, STD              # for every network: ImageNet's are not what CLIP was trained with
from datasets import images as image_files, is_drawn, is_folder, split_to_measure, words
from harness import files, machine, processes, runs
from harness.flags import with_flags
from harness.machine import seed_of
from toyland.networks import small_clip

# ------------------------------------------------------------------------------------------ images → tensors

NORMALISE = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
LONGEST_SIDE = 2048                                  # [code] in pixels; a panorama stays below the short side


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → normalised (3, H, W) float32."""
    return NORMALISE(image).as_subclass(Tensor)


def short_side_to(image: Image.Image, size: int, multiple: int = 1) -> Image.Image:
    """Resize so that the shorter side has `size` pixels, bilinear with antialiasing, as at training and test.

    Both sides are rounded to a `multiple`, at least one of it: where that is the patch, no image is padded,
    and a patch's prediction lies where the patch is. No side becomes longer than LONGEST_SIDE pixels.
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


def augmentation(short_side: int, crop: tuple[int, int], scale: tuple[float, float],
                 distort: bool) -> v2.Transform:
    """The recipe's augmentation: PIL image → normalised (3, *crop). torchvision's transforms throughout.

    Random scale (short side × U(scale)), photometric distortion, random flip, random crop. What the crop
    lacks is filled after normalisation with zeros, that is with CLIP's mean colour.
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


class WholeImages(torch.utils.data.Dataset):
    """Images as they are, resized to one short side: `(id, image (3, h, w))`. No labels, no augmentation."""

    def __init__(self, images: dict[str, Path], short_side: int):
        self.ids, self.paths, self.short_side = list(images), list(images.values()), short_side

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        image = short_side_to(image_files.read_image(self.paths[index]), self.short_side)
        return self.ids[index], to_tensor(image)


# ------------------------------------------------------------------------------------------ batches


class TrainingImages(torch.utils.data.Dataset):
    """Augmented images and the numbers of their rows. It is given image paths alone and has no way to a
    label.

    An item is asked for as `(epoch, index)` (see `training_batches`): its augmentation depends on seed, epoch
    and index only, so neither the number of workers nor an interruption changes it.
    """

    def __init__(self, images: dict[str, Path], transform: v2.Transform, seed: int):
        self.paths, self.transform, self.seed = list(images.values()), transform, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, when: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = when
        image = image_files.read_image(self.paths[index])
        with random_state(seed_of(self.seed, "augmentation", epoch, index)):
            return self.transform(image).as_subclass(Tensor), index


@contextlib.contextmanager
def random_state(seed: int):
    """torch's global generator, which torchvision's transforms draw from, seeded inside and as before
    outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class StoredFeatures(torch.utils.data.Dataset):
    """CLIP's features in the place of augmented images: `(Z (D, h, w) float32, row)`. For --cache-features.

    CLIP looks at every image once, under its augmentation of epoch 0, and what it sees is kept as float16.
    Another training: the pictures no longer vary. Raises ValueError where Z needs more room than the recipe
    allows.
    """

    def __init__(self, setup: Setup, images: TrainingImages, recipe):
        visual, room = setup.clip_model.visual, recipe.cache_features
        shape = (len(images), visual.proj.shape[1], *(-(-side // visual.patch_size) for side in recipe.crop))
        if (needed := 2 * math.prod(shape) / 1e9) > room:
            raise ValueError(f"--cache-features {room:g}: expected room for {needed:.1f} GB, the features of "
                             f"{len(images)} images, found {room:g}. Allow more, or leave the flag out.")
        self.features = setup.kept(
            "features", shape, lambda: self.look(setup, images, recipe.dense_path, shape),
            images.seed, recipe.dense_path, recipe.short_side, recipe.crop, recipe.scale, recipe.distort,
            image_files.stamps_of(setup.training_images))

    @torch.no_grad()
    def look(self, setup: Setup, images: TrainingImages, path: str, shape: tuple[int, ...]) -> Tensor:
        features = torch.empty(shape, dtype=torch.float16)
        loader = torch.utils.data.DataLoader(images, batch_size=16,
                                             sampler=[(0, row) for row in range(len(images))],
                                             num_workers=setup.workers)
        for batch, rows in tqdm(loader, desc="features", unit="×16"):
            with machine.autocast(setup.device, setup.precision):
                features[rows] = setup.clip_model.encode_dense(batch.to(setup.device), path).half().cpu()
        return features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, when: tuple[int, int]) -> tuple[Tensor, int]:
        _, index = when
        return self.features[index].float(), index


def training_batches(dataset: TrainingImages | StoredFeatures, *, batch_size: int, first_step: int,
                     steps: int, seed: int, workers: int = 0):
    """Batches `(images (B, 3, H, W), rows (B,))` for the steps first_step..steps−1.

    Every epoch is a fresh permutation; a last batch that is not full is dropped (unless it is the only one).
    """
    batches = Batches(len(dataset), batch_size, first_step, steps, seed)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                       worker_init_fn=ignore_ctrl_c, pin_memory=torch.cuda.is_available())


def ignore_ctrl_c(_worker: int) -> None:
    """Ctrl-C reaches every process of a run. A worker that died of it would keep the step from ending and
    being saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def steps_per_epoch(images: int, batch_size: int) -> int:
    return max(1, images // batch_size)


class Batches:
    """Which image comes when: lists of (epoch, index), a function of the seed and the step alone. Of several
    processes each gets its rows."""

    def __init__(self, images: int, batch_size: int, first_step: int, steps: int, seed: int):
        self.images, self.batch_size, self.first_step = images, batch_size, first_step
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self):
        per_epoch, order_of = steps_per_epoch(self.images, self.batch_size), None
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if order_of != epoch:
                order = np.random.default_rng(seed_of(self.seed, "order", epoch)).permutation(self.images)
                order_of = epoch
            batch = order[place * self.batch_size:(place + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch[processes.share(len(batch))]]


# ---------------------------------------------------------------------------------------- what a run works on


@dataclass
class Setup:
    """What a run works on: images, words, and the frozen CLIP. Made by `open_setup`."""
    data: str                               # a name that datasets/ knows, or a folder's path
    root: str                               # where datasets lie
    vocabulary: words.Vocabulary
    clip_model: clip.CLIP                   # frozen, on the device
    clip_name: str
    args: argparse.Namespace                # --out --cache --precision --workers --skip-broken --seed
    split: str                              # that is measured and shown: "test" or "val"; of a folder "all"
    skipped: list[str] = field(default_factory=list)        # ids of images that --skip-broken left out

    @property
    def device(self) -> torch.device:
        return self.clip_model.device

    @property
    def precision(self) -> str:
        return self.args.precision

    @property
    def workers(self) -> int:
        return machine.workers_of(self.args.workers, self.device)

    @functools.cached_property
    def fingerprint(self) -> str:
        return clip.fingerprint(self.clip_model)

    def folder(self, stage: str) -> Path:
        return runs.run_folder(self.args.out, self.data, stage)

    @property
    def cache(self) -> Path:
        """Where query, votes and features are kept that another run would have to make again."""
        return Path(self.args.cache) if self.args.cache else self.folder("cache")

    def kept(self, name: str, shape: tuple[int, ...], make, *depends_on) -> Tensor:
        """What `make` gives, from the cache if it was made there for the same words, weights and precision,
        and with the same of whatever else it `depends_on`."""
        key = (name, self.fingerprint, self.vocabulary.synonyms, self.vocabulary.templates, self.precision,
               *depends_on)
        return files.cached(self.cache, name, key, shape, make)

    @functools.cached_property
    def training_images(self) -> dict[str, Path]:
        """id → path; without those that cannot be read if `--skip-broken` says so."""
        return self.without_broken(image_files.training_images(self.data, self.root))

    @functools.cached_property
    def evaluation_images(self) -> dict[str, Path]:
        """Those of `split`: id → path."""
        if is_folder(self.data):                        # a folder of your own has one set of images
            return self.training_images
        return self.without_broken(image_files.image_files(self.data, self.root, self.split))

    def share(self) -> Setup:
        """The same with this process's share of the training images; with one process, all of them."""
        part, images = replace(self), list(self.training_images.items())
        part.training_images = dict(images[processes.share(len(images))])
        return part

    def without_broken(self, images: dict[str, Path]) -> dict[str, Path]:
        if not self.args.skip_broken:
            return images
        good, broken = image_files.readable(images)
        self.skipped = list(broken)
        print(f"--skip-broken: {len(broken)} of {len(images)} images are left out.")
        for reason in broken.values():
            print(f"  {reason}")
        if not good:
            raise ValueError(f"--data {self.data}: expected images, found none of {len(images)} that can be "
                             "read.")
        return good

    def settings(self, system, recipe) -> dict:
        """What the weights of a training depend on: a checkpoint holds it, and a run with other settings is
        not resumed."""
        return {"system": {"name": system.name, "command": system.command}, "data": self.data,
                "root": self.root, "synonyms": [list(names) for names in self.vocabulary.synonyms],
                "clip_name": self.clip_name, "clip": self.fingerprint,
                "activation": self.clip_model.activation, "recipe": asdict(recipe), "seed": self.args.seed,
                "precision": self.precision, "images": list(self.training_images)}

    def header(self, stage: str, system, recipe) -> dict:
        """What a training prints before it starts and keeps as recipe.json."""
        return {"stage": stage, "system": system.name, "data": self.data, "images": len(self.training_images),
                "skipped": self.skipped, "classes": len(self.vocabulary),
                "clip": f"{self.clip_name} ({self.fingerprint}, {self.clip_model.activation})",
                "device": str(self.device), "precision": self.precision, "seed": self.args.seed,
                "versions": machine.versions(), "recipe": asdict(recipe)}

    def misfits(self, checkpoint: dict) -> dict[str, tuple]:
        """What a checkpoint was made for that is another here: "class list" or "CLIP" → (expected, found)."""
        synonyms, found = [list(names) for names in self.vocabulary.synonyms], checkpoint["settings"]
        both = {"class list": (synonyms, found["synonyms"]), "CLIP": (self.fingerprint, found["clip"])}
        return {what: pair for what, pair in both.items() if pair[0] != pair[1]}

    def refuse_misfit(self, checkpoint: dict) -> None:
        """Raise ValueError when a checkpoint was made for another class list or another CLIP."""
        for what, (expected, found) in self.misfits(checkpoint).items():
            runs.refuse_unless(checkpoint["path"], what, expected, found)


def open_setup(args: argparse.Namespace, checkpoint: dict | None = None,
               vocabulary: words.Vocabulary | None = None, split: str | None = None) -> Setup:
    """What the flags name; what they leave open is as in `checkpoint`, else Toyland.

    `vocabulary` replaces the flags' classes; `split` is what to measure, as --split has it. Raises ValueError
    or FileNotFoundError, also when the class list or CLIP's weights are not those of the checkpoint.
    """
    known = checkpoint["settings"] if checkpoint else {}
    without_run = "toyland" if vocabulary is None else "photo"      # own words are not Toyland's
    name = args.data or known.get("data", without_run)
    split = split_to_measure(name, split)
    if vocabulary is None and known and args.classes is None:
        vocabulary = words.vocabulary_of(name, tuple(tuple(names) for names in known["synonyms"]))
    if vocabulary is None:
        vocabulary = words.vocabulary(name, args.classes)
    if foreign := [name for name in vocabulary.names if not name.isascii()]:
        print(f"CLIP learned from English captions: it may not know {', '.join(foreign[:3])}.")
    device, root = machine.device_of(args.device), args.root or known.get("root", "data")
    clip_name = args.clip or known.get("clip_name", "toyland" if is_drawn(name) else "ViT-B/16")
    processes.begin(device)
    if args.precision == "bf16" and machine.lacks_bfloat16(device):
        print("--precision bf16: this processor has no instruction for it, and will be slower than in fp32.")
    if args.download:
        image_files.download(name, root)
    activation = args.activation or (known.get("activation") if clip_name == known.get("clip_name") else None)
    model = small_clip().to(device) if clip_name == "toyland" else clip.load(clip_name, device, activation)[0]
    if (tokens := model.token_embedding.num_embeddings) != clip.VOCABULARY:
        raise ValueError(f"--clip {clip_name}: expected CLIP's vocabulary of {clip.VOCABULARY} tokens, found "
                         f"{tokens}.")
    model.requires_grad_(False)                                # frozen for ever: no gradient is even recorded
    if args.compile:
        for block in model.visual.transformer.resblocks[:-1]:
            block.compile()
    setup = Setup(name, root, vocabulary, model, clip_name, args, split)
    refuse_another_folder(setup)
    if checkpoint:
        setup.refuse_misfit(checkpoint)
    return setup


def recipe_for(setup: Setup, recipes: dict, numbers: dict[str, dict]):
    """The recipe of a dataset (of "folder" for a folder), with a system's numbers, then with the flags'.

    `numbers`: dataset → field of the recipe → value; under "any" for every dataset.
    """
    name = setup.data
    if not is_folder(name) and name not in recipes:
        stage = sys.modules[type(recipes["folder"]).__module__]       # "__main__" where it runs as a script
        raise ValueError(f"--data {name}: expected a recipe for it in {Path(stage.__file__).name}, found "
                         f"{', '.join(recipes)}. Add a line to RECIPES there.")
    if unknown := numbers.keys() - {"any", *recipes}:
        raise ValueError(f"expected a system's numbers for any, {', '.join(recipes)}; found numbers for "
                         f"{', '.join(sorted(unknown))}.")
    key = "folder" if is_folder(name) else name
    recipe = replace(recipes[key], **numbers.get("any", {}) | numbers.get(key, {}))
    recipe = with_flags(recipe, setup.args, most=len(setup.training_images))
    processes.refuse_uneven(min(recipe.batch_size, len(setup.training_images)), recipe.learning_rate)
    return recipe


def refuse_another_folder(setup: Setup) -> None:
    """Raise ValueError when the run folder holds what was trained on another folder of images with the same
    name."""
    for stage in ("rectify", "distill"):
        path = setup.folder(stage) / "checkpoint.pt"
        if not path.exists():
            continue
        if is_folder(setup.data):
            image_files.refuse_missing_folder(Path(setup.data))
        known = runs.load(path, stage)["settings"]["data"]
        if is_folder(setup.data) or is_folder(known):            # two public datasets have names of their own
            expected, found = (str(Path(one).resolve()) if is_folder(one) else one
                               for one in (setup.data, known))
            runs.refuse_unless(path, "folder of images", expected=expected, found=found)
