"""Measure every stage that exists, side by side: vanilla CLIP, MaskCLIP, rectified, distilled.

    python evaluate.py                         all stages of the newest run
    python evaluate.py --data photos --classes names.txt --labels photo_labels

Opens labels (through ground_truth.py), after all training is done: the training scripts end by calling it. Reads the
checkpoints of one run, writes runs/<data>/evaluate/metrics.json and a picture sheet, preview.png.

    B images · C classes · H,W pixels of an image's own label · h,w a stage's grid
"""

from __future__ import annotations

import argparse
import functools

import runs


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__, training=False)
    extra = parser.add_argument_group("evaluation")
    extra.add_argument("--labels", metavar="DIR", default=None,
                       help="index pictures of a folder of your own images: same names, .png, value = class, 255 ignored")
    extra.add_argument("--prompt-denoising", type=runs.share, metavar="P", default=0.0,
                       help="refinement, 0 is off: a class whose highest probability in an image stays under P is left out "
                            "there. The released ReCLIP++ uses it with another P for every dataset")
    extra.add_argument("--key-smoothing", type=runs.share, metavar="P", default=argparse.SUPPRESS,
                       help="refinement, 0 is off: a patch whose best probability is under P takes over those of patches "
                            "that CLIP's last block finds alike; not for the student, which has no CLIP (default: 0)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import distill
import ground_truth
import rectify
from clip.download import sha256
from rectify import cached_query, query_logits
from world import World, open_world

STAGES = {"vanilla": "vanilla CLIP", "maskclip": "MaskCLIP", "rectify": "ReCLIP++ rectified", "distill": "ReCLIP++ distilled"}

# ------------------------------------------------------------------------------------------ measures


def confusion_matrix(true_label: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of class i (row) were called j (column): (C, C) int64. Pixels of value 255 are not counted.

    true_label and predicted: integers of one shape, predictions in 0..C−1. Matrices of many images simply add up, so that
    a dataset is measured image by image and no prediction is kept.
    """
    counted = true_label != data.IGNORE
    pairs = true_label[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class, (C,) in [0, 1]; NaN for a class in neither truth nor prediction."""
    intersection = confusion.diagonal().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return intersection / union                                                 # 0 / 0 is NaN, on purpose


def measures(confusion: Tensor, names: list[str]) -> dict:
    """What a confusion matrix says, in percent.

    miou: mean over the classes that occur in truth or prediction. miou_absent_zero: the others count as 0.
    pixel_accuracy: the share of counted pixels that are right. Raises ValueError when no pixel was counted.
    """
    if not confusion.any():
        raise ValueError("expected labels that name a class in at least one pixel, found ignored pixels (255) alone.")
    iou = class_iou(confusion)
    percent = [None if value.isnan() else round(100 * value.item(), 2) for value in iou]
    return {"miou": round(100 * iou.nanmean().item(), 2),
            "miou_absent_zero": round(100 * iou.nan_to_num(0).mean().item(), 2),
            "pixel_accuracy": round(100 * (confusion.diagonal().sum() / confusion.sum()).item(), 2),
            "per_class_iou": dict(zip(names, percent))}


# ------------------------------------------------------------------------------------------ stages


@dataclass
class Predictor:
    """A stage at test time: what it makes of an image, and how large it wants to see it."""
    logits: Callable[[Tensor], Tensor]      # what `path` names → (B, C, h, w)
    short_side: int                         # as in its own training
    path: str | None                        # of CLIP's dense features (B, D, h, w); None: of the images (B, 3, H, W)
    ablation: str = "none"                  # of the recipe that it was trained with


kept_per_grid = functools.lru_cache(maxsize=64)     # for bias maps, which no image changes; photographs have many shapes


def predictors(world: World, query: Tensor, stages: list[str]) -> dict[str, Predictor]:
    """One predictor for each of the named stages; trained ones are read from their checkpoints."""
    found: dict[str, Predictor] = {}
    recipe = rectify.recipe_of(world)
    for stage in stages:
        if stage in ("vanilla", "maskclip"):
            path = "vanilla" if stage == "vanilla" else recipe.dense_path
            found[stage] = Predictor(lambda features: query_logits(features, query), recipe.short_side, path)
        elif stage == "rectify":
            found[stage] = rectified(world, query)
        elif stage == "distill":
            student_recipe, student = distill.load_student(world, query)
            student.inherited.bias = kept_per_grid(student.inherited.bias)
            found[stage] = Predictor(student.logits, student_recipe.short_side, None, student_recipe.ablation)
    return found


def logits_of_all(world: World, found: dict[str, Predictor], image: Tensor) -> dict[str, Tensor]:
    """Each stage's logits (1, C, h, w) of one image (1, 3, H, W). CLIP's image tower runs once for all of them."""
    paths = {predictor.path for predictor in found.values()} - {None}
    seen = world.clip_model.encode_dense_paths(image, paths) if paths else {}
    return {stage: predictor.logits(seen.get(predictor.path, image)).float() for stage, predictor in found.items()}


def title(stage: str, ablation: str = "none") -> str:
    return STAGES[stage] if ablation == "none" else f"{STAGES[stage].split()[-1]}, {ablation}"


def titled(found: dict[str, Predictor]) -> dict[str, Predictor]:
    """Predictors of stages under what stands above their columns."""
    return {title(stage, predictor.ablation): predictor for stage, predictor in found.items()}


def rectified(world: World, query: Tensor) -> Predictor:
    """Stage 1's logits of features. The bias map depends on the grid alone: it is computed once for every image size."""
    path = world.folder("rectify") / "checkpoint.pt"
    recipe, rectifier = rectify.load_rectifier(world, rectify.load_checkpoint(path, "rectify"))
    reference = rectify.reference_features(world.clip_model, rectifier.prompt, world.vocabulary.names)

    @kept_per_grid
    def bias_of(h: int, w: int) -> Tensor:
        return rectifier.bias(world.clip_model.visual.patch_positions(h, w), reference)

    def logits(features: Tensor) -> Tensor:
        return rectifier(features, query, reference, bias_of(*features.shape[-2:]))

    if not rectifier.frozen_clip:                   # an ablation with an image tower of its own
        return Predictor(lambda images: logits(rectifier.encode(world.clip_model, images, recipe.dense_path)),
                         recipe.short_side, None, recipe.ablation)

    return Predictor(logits, recipe.short_side, recipe.dense_path, recipe.ablation)


def existing_stages(world: World) -> list[str]:
    """vanilla and maskclip always; rectify where its checkpoint is; distill if it is the student of that very teacher."""
    teacher, student = (world.folder(stage) / "checkpoint.pt" for stage in ("rectify", "distill"))
    stages = ["vanilla", "maskclip"] + (["rectify"] if teacher.exists() else [])
    if not student.exists():
        return stages
    checkpoint = rectify.load_checkpoint(student, "distill")
    settings, other = checkpoint["settings"], list(world.misfits(checkpoint))
    with runs.reading(student):
        of_clip = settings["recipe"]["ablation"] == "maskclip+"             # a student that needs no rectification
    if not other and not of_clip and teacher.exists() \
            and settings["teacher"] != distill.teacher_of(rectify.load_checkpoint(teacher, "rectify")):
        other = [f"rectification than {teacher}"]
    if other:
        print(f"{student} was made with another {' and another '.join(other)}: left out. Make it anew with: python distill.py")
        return stages
    return [*stages, "distill"]


def predict(logits: Tensor, size: tuple[int, int], denoising: float = 0.0, scale: float = 1.0,
            smoothing: float = 0.0, keys: Tensor | None = None) -> Tensor:
    """Logits (1, C, h, w) → class per pixel (H, W): bilinear up-sampling to the image's own size, then argmax. Sec. III-A.

    `denoising` > 0 leaves out the classes whose highest probability, softmax(scale · logits), stays under it anywhere in
    the image, but never the best one. `smoothing` > 0, with keys (1, E, h, w): see `smooth`.
    """
    if denoising > 0:
        best = (scale * logits).softmax(dim=1).amax(dim=(2, 3), keepdim=True)                     # (1, C, 1, 1)
        absent = (best < denoising) & (best < best.amax(dim=1, keepdim=True))
        logits = logits.masked_fill(absent, -1e9)                       # not −∞: times a weight of 0 it would be NaN
    if smoothing > 0 and keys is not None:
        logits = smooth((scale * logits).softmax(dim=1), keys, smoothing)
    return best_class(logits, size)[0]


def smooth(probability: Tensor, keys: Tensor, threshold: float) -> Tensor:
    """MaskCLIP's key smoothing, its Eq. 5: pred_i ← Σ_j cos(k_i, k_j) pred_j where the best of pred_i is under `threshold`.

    probability (B, C, h, w), keys (B, E, h, w) of unit length → (B, C, h, w). Other patches keep their very numbers.
    """
    mixed = torch.einsum("bcj,bij->bci", probability.flatten(2), keys.flatten(2).mT @ keys.flatten(2))
    unsure = probability.amax(dim=1, keepdim=True) < threshold                                    # (B, 1, h, w)
    return torch.where(unsure, mixed.view_as(probability), probability)


def best_class(logits: Tensor, size: tuple[int, int], scale: float | None = None, at_once: int = 16):
    """Logits (1, C, h, w) → the best class of every pixel and, with a `scale`, its softmax(scale · logits): both (H, W).

    Up-sampled `at_once` classes at a time, which changes nothing but the memory: 150 classes at 2048×1024 pixels would be
    1.2 GiB, and as much again for every step of a softmax.
    """
    best = torch.zeros(size, dtype=torch.int64, device=logits.device)
    highest, total = (torch.full(size, -torch.inf, device=logits.device) for _ in range(2))
    for first in range(0, logits.shape[1], at_once):
        up = F.interpolate(logits[:, first:first + at_once], size=size, mode="bilinear", align_corners=False)[0]
        value, which = up.max(dim=0)                                                              # (H, W) both
        best = torch.where(value > highest, first + which, best)            # of equals the first, as argmax has it
        highest = torch.maximum(highest, value)
        if scale is not None:
            total = torch.logaddexp(total, (scale * up).logsumexp(dim=0))
    return best, None if scale is None else (scale * highest - total).exp()


# What [code] multiplies logits with before it asks how probable a class is: cosines by 100, the decoder's output by 10.
DENOISING_SCALE = {"vanilla": 100.0, "maskclip": 100.0, "rectify": 10.0, "distill": 10.0}


@torch.no_grad()
def predictions(world: World, found: dict[str, Predictor], labels: dict[str, Path], denoising: float = 0.0,
                smoothing: float = 0.0) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Labelled validation images one by one: `(true_label (H, W), {stage: predicted (H, W)})`.

    An image comes once for all stages of one short side, so twice where the student has another than CLIP.
    """
    ground_truth.refuse_other_classes(world.name, world.vocabulary.names)
    table, patch = ground_truth.lookup_table(world.name, len(world.vocabulary)), world.clip_model.visual.patch_size
    for short_side in sorted({predictor.short_side for predictor in found.values()}):
        of_size = {stage: predictor for stage, predictor in found.items() if predictor.short_side == short_side}
        dataset = ground_truth.LabelledImages(world.validation_images, labels, table, short_side, patch)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=world.workers)
        for _, image, true_label in tqdm(loader, desc="evaluating", unit="image"):
            image, true_label = image[None].to(world.device), true_label.to(world.device)
            with runs.autocast(world.device, world.precision):
                logits = logits_of_all(world, of_size, image)
            keys = world.clip_model.encode_keys(image) if smoothing > 0 else None
            yield true_label, {stage: predict(one, tuple(true_label.shape), denoising, DENOISING_SCALE[stage], smoothing,
                                              None if stage == "distill" else keys) for stage, one in logits.items()}


@torch.no_grad()
def measure(world: World, found: dict[str, Predictor], labels: dict[str, Path], denoising: float = 0.0,
            smoothing: float = 0.0) -> dict:
    """Metrics of each stage on the labelled validation images."""
    classes = len(world.vocabulary)
    confusion = {stage: torch.zeros(classes, classes, dtype=torch.int64, device=world.device) for stage in found}
    for true_label, of_stages in predictions(world, found, labels, denoising, smoothing):
        for stage, predicted in of_stages.items():
            confusion[stage] += confusion_matrix(true_label, predicted, classes)
    recipe, metrics = rectify.recipe_of(world), {}
    for stage in found:
        checkpoint = world.folder(stage) / "checkpoint.pt"
        refinements = {"prompt_denoising": denoising}
        if smoothing > 0 and stage != "distill":
            refinements["key_smoothing"] = smoothing
        metrics[stage] = measures(confusion[stage].cpu(), world.vocabulary.names) | {"fingerprint": {
            "stage": stage, "data": world.name, "images": len(labels), "classes": world.vocabulary.names,
            "short_side": found[stage].short_side, "refinements": refinements, "ablation": found[stage].ablation,
            "precision": world.precision, "clip": world.fingerprint, "dense_path": recipe.dense_path,
            "weights": sha256(checkpoint)[:16] if checkpoint.exists() else None}}
    return metrics


def after_training(world: World, stages: list[str], trained: str, query: Tensor) -> None:
    """What a training script ends with: metrics.json and preview.png of its own stage; numbers if there are labels."""
    labels = ground_truth.true_label_files(world.name, world.root, list(world.validation_images)) \
        if ground_truth.labels_fit(world.name, world.vocabulary.names) else {}
    folder, found = world.folder(trained), predictors(world, query, stages)
    if labels:
        metrics = measure(world, found, labels)
        print_table(metrics)
        runs.write_json(folder / "metrics.json", metrics[trained])
    else:
        print(f"No labels of {world.name} for these classes found: nothing to measure, which hindered no training.")
    picture_sheet(world, titled(found), labels, folder / "preview.png")
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, {'metrics.json, ' if labels else ''}preview.png")


def print_table(metrics: dict, per_class: bool = False) -> None:
    """The stages as rows; with `per_class` also every class's IoU, stages as columns."""
    one = next(iter(metrics.values()))["fingerprint"]
    sides = " and ".join(map(str, sorted({stage["fingerprint"]["short_side"] for stage in metrics.values()})))
    print(f"\n{one['data']}: {one['images']} images, {len(one['classes'])} classes, short side {sides}, "
          f"prompt denoising {one['refinements']['prompt_denoising'] or 'off'}, "
          + (f"key smoothing {smoothing}, " if (smoothing := one["refinements"].get("key_smoothing")) else "")
          + one["precision"])
    titles = {stage: title(stage, found["fingerprint"].get("ablation", "none")) for stage, found in metrics.items()}
    width = max(20, *map(len, titles.values())) + 2
    print(f"{'':{width}}{'mIoU':>7}{'absent = 0':>12}{'pixel accuracy':>16}   (percent)")
    for stage, found in metrics.items():
        print(f"{titles[stage]:{width}}{found['miou']:7.1f}{found['miou_absent_zero']:12.1f}{found['pixel_accuracy']:16.1f}")
    if per_class:
        print("\nIoU per class".ljust(23) + "".join(f"{stage:>10}" for stage in metrics))
        for name in one["classes"]:
            row = [found["per_class_iou"][name] for found in metrics.values()]
            print(f"{name:22}" + "".join(f"{'–' if value is None else f'{value:.1f}':>10}" for value in row))


# ------------------------------------------------------------------------------------------ pictures


def colour(classes: Tensor, palette) -> Image.Image:
    """Class per pixel (H, W) → colour picture; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:len(palette)] = palette
    return Image.fromarray(table[classes.cpu().numpy().astype(np.uint8)])


@torch.no_grad()
def picture_sheet(world: World, columns: dict[str, Predictor], labels: dict[str, Path], path: Path,
                  rows: int = 6, height: int = 144) -> None:
    """A row for each of some validation images: the image, every column's classes under its title, the truth if known; below,
    a legend."""
    images = world.validation_images
    chosen = list(images)[::max(1, len(images) // rows)][:rows]
    palette = world.vocabulary.palette
    table = ground_truth.lookup_table(world.name, len(world.vocabulary)) if labels else None
    patch, strips = world.clip_model.visual.patch_size, []
    for name in chosen:
        image = data.read_image(images[name])
        size = (image.height, image.width)
        logits = {}
        for short_side in {predictor.short_side for predictor in columns.values()}:
            of_size = {column: predictor for column, predictor in columns.items() if predictor.short_side == short_side}
            tensor = data.to_tensor(data.short_side_to(image, short_side, patch))[None].to(world.device)
            with runs.autocast(world.device, world.precision):
                logits |= logits_of_all(world, of_size, tensor)
        tiles = [image, *(colour(predict(logits[column], size), palette) for column in columns)]
        if labels:
            truth = ground_truth.read_label(labels[name], table, size) if name in labels else np.full(size, data.IGNORE)
            tiles.append(colour(torch.from_numpy(truth), palette))
        strips.append(tiles)
    titles = ["image", *columns, *(["truth"] if labels else [])]
    runs.write_atomically(path, lambda file: sheet(strips, titles, world.vocabulary, height).save(file, format="PNG"))


def sheet(strips: list[list[Image.Image]], titles: list[str], vocabulary: data.Vocabulary, height: int) -> Image.Image:
    """Rows of pictures of one height under their titles, with a legend of all classes at the foot."""
    font, gap = ImageFont.load_default(13), 6

    def shown(tile: Image.Image) -> tuple[int, int]:            # a panorama is made less high, so that the page stays a page
        scale = min(height / tile.height, 4 * height / tile.width)
        return max(1, round(scale * tile.width)), max(1, round(scale * tile.height))

    widths = [max(max(shown(strip[k])[0] for strip in strips), round(font.getlength(titles[k])) + 4)
              for k in range(len(titles))]
    width = sum(widths) + gap * (len(widths) + 1)
    entries, x, y = [], gap, 0                                  # the legend, broken into lines
    for name, rgb in zip(vocabulary.names, vocabulary.palette):
        length = 20 + round(font.getlength(name)) + 14
        if x + length > width and x > gap:
            x, y = gap, y + 20
        entries.append((x, y, name, rgb))
        x += length
    top, foot = 24, 24 + len(strips) * (height + gap) + 4
    page = Image.new("RGB", (width, foot + y + 26), "white")
    pen = ImageDraw.Draw(page)
    x = gap
    for k, title in enumerate(titles):
        pen.text((x, 5), title, fill="black", font=font)
        for row, strip in enumerate(strips):
            tile = strip[k]
            resample = Image.Resampling.BILINEAR if k == 0 else Image.Resampling.NEAREST
            page.paste(tile.resize(shown(tile), resample), (x, top + row * (height + gap)))
        x += widths[k] + gap
    for x, y, name, rgb in entries:
        pen.rectangle((x, foot + y + 2, x + 14, foot + y + 16), fill=tuple(rgb), outline="gray")
        pen.text((x + 19, foot + y), name, fill="black", font=font)
    return page


# ------------------------------------------------------------------------------------------ the run


def refuse_labels_of(world: World, labels: str | None) -> None:
    """Raise ValueError for `--labels` beside a dataset that has labels of its own."""
    if labels is not None and not runs.is_folder(world.name):
        raise ValueError(f"--labels {labels}: expected --data FOLDER, your own images; found {world.name}, which has labels of "
                         "its own. Leave --labels out.")


def main(args: argparse.Namespace) -> dict:
    """Measure all stages of the newest run (or of `--data`), write metrics.json and preview.png, return the metrics."""
    world = open_world(args, rectify.newest_run(args))
    refuse_labels_of(world, args.labels)
    runs.refuse_folders(world.folder("evaluate"), "metrics.json", "preview.png")
    query = cached_query(world)
    labels = ground_truth.true_label_files(world.name, world.root, list(world.validation_images), args.labels)
    if not labels:
        raise ValueError(f"{world.name}: expected labels of its validation images to measure against, found none. For a "
                         "folder of your own pass --labels DIR; to see results without labels use segment.py.")
    stages = existing_stages(world)
    for stage in ("rectify", "distill"):
        if not (world.folder(stage) / "checkpoint.pt").exists():
            print(f"No checkpoint of {stage} in {world.folder(stage)}: left out. Make it with: python {stage}.py "
                  f"--data {world.name}{runs.repeated(args)}")
    found = predictors(world, query, stages)
    metrics = measure(world, found, labels, args.prompt_denoising, getattr(args, "key_smoothing", 0.0))
    print_table(metrics, per_class=True)
    folder = world.folder("evaluate")
    runs.write_json(folder / "metrics.json", metrics)
    picture_sheet(world, titled(found), labels, folder / "preview.png")
    print(f"\nWrote {folder}/: metrics.json, preview.png\nNext: python segment.py YOUR_PHOTO.jpg{runs.repeated(args)}")
    return metrics


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
