"""Measure every stage that exists, side by side: vanilla CLIP, MaskCLIP, rectified, distilled.

    python evaluate.py                         all stages of the newest run
    python evaluate.py --data photos --classes names.txt --labels photo_labels

This is the one file that opens labels, after all training is done (the training scripts end by calling it). Reads the checkpoints of one run, writes
runs/<data>/evaluate/metrics.json and a picture sheet, preview.png.

    B images · C classes · H,W pixels of an image's own label · h,w a stage's grid
"""

from __future__ import annotations

import argparse

import runs


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__, training=False)
    extra = parser.add_argument_group("evaluation")
    extra.add_argument("--labels", metavar="DIR", default=None,
                       help="index pictures of a folder of your own images: same names, .png, value = class, 255 ignored")
    extra.add_argument("--prompt-denoising", type=float, metavar="P", default=0.0,
                       help="refinement, 0 is off: a class whose highest probability in an image stays under P is left out "
                            "there. The released ReCLIP++ uses it with another P for every dataset")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import distill
import rectify
from clip.download import sha256
from rectify import World, cached_query, open_world, query_logits

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


Predictor = Callable[[Tensor], Tensor]      # normalised images (B, 3, H, W) → logits (B, C, h, w)


def predictors(world: World, query: Tensor, stages: list[str]) -> dict[str, Predictor]:
    """One predictor for each of the named stages; trained ones are read from their checkpoints."""
    found: dict[str, Predictor] = {}
    for stage in stages:
        if stage == "vanilla":
            found[stage] = lambda images: query_logits(world.clip_model.encode_dense(images, path="vanilla"), query)
        elif stage == "maskclip":
            path = rectify.recipe_of(world).dense_path
            found[stage] = lambda images, path=path: query_logits(world.clip_model.encode_dense(images, path=path), query)
        elif stage == "rectify":
            found[stage] = rectified_predictor(world, query)
        elif stage == "distill":
            found[stage] = distill.load_student(world, query).logits
    return found


def rectified_predictor(world: World, query: Tensor) -> Predictor:
    """Stage 1 at test time. The bias map depends on the grid alone: it is computed once for every image size."""
    path = world.folder("rectify") / "checkpoint.pt"
    recipe, rectifier = rectify.load_rectifier(world, runs.load(path, "rectify"))
    reference = rectify.reference_features(world.clip_model, rectifier.prompt, world.vocabulary.names)
    bias_of_grid: dict[tuple[int, int], Tensor] = {}

    def logits(images: Tensor) -> Tensor:
        features = world.clip_model.encode_dense(images, path=recipe.dense_path)
        grid = tuple(features.shape[-2:])
        if grid not in bias_of_grid:
            bias_of_grid[grid] = rectify.bias_logits(world.clip_model.visual.patch_positions(*grid), rectifier.projection,
                                                     reference)
        return rectify.rectified_logits(rectifier, features, query, bias_of_grid[grid])

    return logits


def existing_stages(world: World) -> list[str]:
    """vanilla and maskclip always; rectify where its checkpoint is; distill if it is the student of that very teacher."""
    teacher, student = (world.folder(stage) / "checkpoint.pt" for stage in ("rectify", "distill"))
    stages = ["vanilla", "maskclip"] + (["rectify"] if teacher.exists() else [])
    if not student.exists():
        return stages
    settings = runs.load(student, "distill")["settings"]
    fits = all(settings["world"][field] == world.described()[field] for field in ("synonyms", "clip"))    # else it is refused
    if fits and teacher.exists() and settings["teacher"] != distill.teacher_of(runs.load(teacher, "rectify")):
        print(f"{student} was distilled from another rectification than {teacher}: left out. Make it anew with: "
              "python distill.py")
        return stages
    return [*stages, "distill"]


def predict(logits: Tensor, size: tuple[int, int], denoising: float = 0.0, scale: float = 1.0) -> Tensor:
    """Logits (1, C, h, w) → class per pixel (H, W): bilinear up-sampling to the image's own size, then argmax. Sec. III-A.

    `denoising` > 0 leaves out the classes whose highest probability, softmax(scale · logits), stays under it anywhere in
    the image, but never the best one.
    """
    if denoising > 0:
        best = (scale * logits).softmax(dim=1).amax(dim=(2, 3), keepdim=True)                     # (1, C, 1, 1)
        absent = (best < denoising) & (best < best.amax(dim=1, keepdim=True))
        logits = logits.masked_fill(absent, -1e9)               # not −∞, of which up-sampling would make NaN
    return largest(logits, size)


def largest(logits: Tensor, size: tuple[int, int], chunk: int = 16) -> Tensor:
    """The class of the largest up-sampled logit per pixel: (1, C, h, w) → (H, W) int64. Among equals the first.

    Some classes at a time, keeping the best so far: 150 maps of a 2048×1024 image would be 1.2 GB. The same bits as all at
    once, since every map is up-sampled alone, and faster, since a few maps stay near the processor.
    """
    best = highest = None
    for first in range(0, logits.shape[1], chunk):
        up = F.interpolate(logits[:, first:first + chunk], size=size, mode="bilinear", align_corners=False)
        value, number = up[0].max(dim=0)                                        # (H, W), both
        if best is None:
            best, highest = number, value
        else:
            better = value > highest
            best, highest = torch.where(better, first + number, best), torch.where(better, value, highest)
    return best


# What [code] multiplies logits with before it asks how probable a class is: cosines by 100, the decoder's output by 10.
DENOISING_SCALE = {"vanilla": 100.0, "maskclip": 100.0, "rectify": 10.0, "distill": 10.0}


@torch.no_grad()
def measure(world: World, query: Tensor, stages: list[str], labels: dict[str, Path], denoising: float = 0.0) -> dict:
    """Metrics of each stage on the labelled validation images, all stages in one pass over the images."""
    images = data.validation_images(world.name, world.root)
    recipe = rectify.recipe_of(world)
    dataset = data.LabelledImages(images, labels, data.lookup_table(world.name, len(world.vocabulary)), recipe.short_side)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=world.workers)
    found = predictors(world, query, stages)
    classes = len(world.vocabulary)
    confusion = {stage: torch.zeros(classes, classes, dtype=torch.int64, device=world.device) for stage in stages}
    for _, image, true_label in tqdm(loader, desc="evaluating", unit="image"):
        image, true_label = image[None].to(world.device), true_label.to(world.device)
        for stage, logits_of in found.items():
            with runs.autocast(world.device, world.precision):
                logits = logits_of(image).float()
            predicted = predict(logits, tuple(true_label.shape), denoising, DENOISING_SCALE[stage])
            confusion[stage] += confusion_matrix(true_label, predicted, classes)
    metrics = {}
    for stage in stages:
        checkpoint = world.folder(stage) / "checkpoint.pt"
        metrics[stage] = measures(confusion[stage].cpu(), world.vocabulary.names) | {"fingerprint": {
            "stage": stage, "data": world.name, "images": len(dataset), "classes": world.vocabulary.names,
            "short_side": recipe.short_side, "refinements": {"prompt_denoising": denoising},
            "precision": world.precision, "clip": world.fingerprint, "dense_path": recipe.dense_path,
            "weights": sha256(checkpoint)[:16] if checkpoint.exists() else None}}
    return metrics


def after_training(world: World, stages: list[str], trained: str, query: Tensor) -> None:
    """What a training script ends with: metrics.json and preview.png of its own stage; numbers if there are labels."""
    images = data.validation_images(world.name, world.root)
    labels = data.true_label_files(world.name, world.root, list(images)) \
        if data.labels_fit(world.name, len(world.vocabulary)) else {}
    folder = world.folder(trained)
    if labels:
        metrics = measure(world, query, stages, labels)
        print_table(metrics)
        runs.write_json(folder / "metrics.json", metrics[trained])
    else:
        print(f"No labels of {world.name} for these classes found: nothing to measure, which hindered no training.")
    picture_sheet(world, query, stages, labels, folder / "preview.png")
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, {'metrics.json, ' if labels else ''}preview.png")


def print_table(metrics: dict, per_class: bool = False) -> None:
    """The stages as rows; with `per_class` also every class's IoU, stages as columns."""
    one = next(iter(metrics.values()))["fingerprint"]
    print(f"\n{one['data']}: {one['images']} images, {len(one['classes'])} classes, short side {one['short_side']}, "
          f"prompt denoising {one['refinements']['prompt_denoising'] or 'off'}, {one['precision']}")
    print(f"{'':22}{'mIoU':>7}{'absent = 0':>12}{'pixel accuracy':>16}   (percent)")
    for stage, found in metrics.items():
        print(f"{STAGES[stage]:22}{found['miou']:7.1f}{found['miou_absent_zero']:12.1f}{found['pixel_accuracy']:16.1f}")
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
def picture_sheet(world: World, query: Tensor, stages: list[str], labels: dict[str, Path], path: Path,
                  rows: int = 6, height: int = 144) -> None:
    """A row for each of some validation images: the image, every stage's classes, the truth if known; below, a legend."""
    images = data.validation_images(world.name, world.root)
    chosen = list(images)[::max(1, len(images) // rows)][:rows]
    found, palette, table = predictors(world, query, stages), world.vocabulary.palette, None
    short_side = rectify.recipe_of(world).short_side
    strips = []
    for name in chosen:
        image = data.read_image(images[name])
        size = (image.height, image.width)
        tensor = data.to_tensor(data.short_side_to(image, short_side))[None].to(world.device)
        tiles = [image] + [colour(predict(logits_of(tensor).float(), size), palette) for logits_of in found.values()]
        if labels:
            truth = data.read_label(labels[name], data.lookup_table(world.name, len(world.vocabulary)), size) \
                if name in labels else np.full(size, data.IGNORE)
            tiles.append(colour(torch.from_numpy(truth), palette))
        strips.append(tiles)
    titles = ["image", *(STAGES[stage] for stage in stages), *(["truth"] if labels else [])]
    runs.write_atomically(path, lambda file: sheet(strips, titles, world.vocabulary, height).save(file, format="PNG"))


def sheet(strips: list[list[Image.Image]], titles: list[str], vocabulary: data.Vocabulary, height: int) -> Image.Image:
    """Rows of pictures of one height under their titles, with a legend of all classes at the foot."""
    font, gap = ImageFont.load_default(13), 6
    widths = [max(max(round(height * tile.width / tile.height) for tile in (strip[k] for strip in strips)),
                  round(font.getlength(titles[k])) + 4) for k in range(len(titles))]
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
            page.paste(tile.resize((max(1, round(height * tile.width / tile.height)), height), resample),
                       (x, top + row * (height + gap)))
        x += widths[k] + gap
    for x, y, name, rgb in entries:
        pen.rectangle((x, foot + y + 2, x + 14, foot + y + 16), fill=tuple(rgb), outline="gray")
        pen.text((x + 19, foot + y), name, fill="black", font=font)
    return page


# ------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace) -> dict:
    """Measure all stages of the newest run (or of `--data`), write metrics.json and preview.png, return the metrics."""
    checkpoint = rectify.find_checkpoint(args, "rectify")
    world = open_world(args, checkpoint)
    query = cached_query(world)
    images = data.validation_images(world.name, world.root)
    labels = data.true_label_files(world.name, world.root, list(images), args.labels)
    if not labels:
        raise ValueError(f"{world.name}: expected labels of its validation images to measure against, found none. For a "
                         "folder of your own pass --labels DIR; to see results without labels use segment.py.")
    stages = existing_stages(world)
    for stage in ("rectify", "distill"):
        if stage not in stages:
            print(f"No checkpoint of {stage} in {world.folder(stage)}: left out. Make it with: python {stage}.py")
    metrics = measure(world, query, stages, labels, args.prompt_denoising)
    print_table(metrics, per_class=True)
    folder = world.folder("evaluate")
    runs.write_json(folder / "metrics.json", metrics)
    picture_sheet(world, query, stages, labels, folder / "preview.png")
    print(f"\nWrote {folder}/: metrics.json, preview.png\nNext: python segment.py YOUR_PHOTO.jpg{runs.repeated(args)}")
    return metrics


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
