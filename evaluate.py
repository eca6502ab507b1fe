"""Measure every stage that exists, side by side: vanilla CLIP, MaskCLIP, rectified, distilled.

    python evaluate.py                         all stages of the newest run
    python evaluate.py --data photos --classes names.txt --labels photo_labels

Opens labels (through datasets/labels.py), after all training is done: rectify.py and distill.py end by
calling it. Reads the checkpoints of one run, writes runs/<data>/evaluate/metrics.json and a picture sheet,
preview.png.

    B images · C classes · H,W pixels of an image's own label · h,w a stage's grid
"""

from __future__ import annotations

import argparse

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "labels")
    refinements = parser.add_argument_group("refinements, 0 is off")
    refinements.add_argument("--prompt-denoising", type=common.real(0, 1), metavar="P", default=0.0,
                             help="a class whose highest probability in an image stays under P is left out "
                                  "there. The released ReCLIP++ uses it with another P for every dataset "
                                  "(default: 0)")
    refinements.add_argument("--key-smoothing", type=common.real(0, 1), metavar="P", default=0.0,
                             help="a patch whose best probability is under P takes over those of patches "
                                  "that CLIP's last block finds alike; not for the student, which has no "
                                  "CLIP (default: 0)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import data
import distill
import rectify
from clip.download import sha256
from datasets import IGNORE, images as image_files, is_folder, labels as ground_truth
from datasets.words import Vocabulary
from harness import files, machine, processes, runs
from rectify import query_logits

STAGES = {"vanilla": "vanilla CLIP", "maskclip": "MaskCLIP", "rectify": "ReCLIP++ rectified",
          "distill": "ReCLIP++ distilled"}
ReCLIPpp = distill.System()                     # the only system that is known here; paper/ hands in others

# ------------------------------------------------------------------------------------------ measures


def confusion_matrix(true_label: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of class i (row) were called j (column): (C, C) int64. Pixels of value 255 are not
    counted.

    true_label and predicted: integers of one shape, predictions in 0..C−1. Matrices of many images simply add
    up, so that a dataset is measured image by image and no prediction is kept.
    """
    counted = true_label != IGNORE
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
        raise ValueError("expected labels that name a class in at least one pixel, found ignored pixels "
                         "(255) alone.")
    iou = class_iou(confusion)
    percent = [None if value.isnan() else round(100 * value.item(), 2) for value in iou]
    return {"miou": round(100 * iou.nanmean().item(), 2),
            "miou_absent_zero": round(100 * iou.nan_to_num(0).mean().item(), 2),
            "pixel_accuracy": round(100 * (confusion.diagonal().sum() / confusion.sum()).item(), 2),
            "per_class_iou": dict(zip(names, percent))}


# ------------------------------------------------------------------------------------------ stages


@dataclass(frozen=True)
class Predictor:
    """A stage at test time: what it makes of an image, and how large it wants to see it."""
    logits: Callable[[Tensor], Tensor]      # what `path` names → (B, C, h, w)
    short_side: int                         # as in its own training
    path: str | None                 # of CLIP's dense features (B, D, h, w); None: of the images (B, 3, H, W)
    system: str = "reclip++"                # which it was trained as


def predictors(setup: data.Setup, query: Tensor, stages: list[str],
               system: distill.System = ReCLIPpp) -> dict[str, Predictor]:
    """One predictor for each of the named stages; trained ones are read from their checkpoints."""
    found, recipe = {}, stage_1_recipe(setup)
    for stage in stages:
        if stage == "vanilla" or stage == "maskclip":
            path = recipe.dense_path if stage == "maskclip" else "vanilla"
            found[stage] = Predictor(lambda features: query_logits(features, query), recipe.short_side, path)
        elif stage == "rectify":
            found[stage] = rectified(setup, query, system)
        elif stage == "distill":
            of_student, student = distill.load_student(setup, query, system)
            found[stage] = Predictor(student.logits, of_student.short_side, None, system.name)
    return found


def stage_1_recipe(setup: data.Setup) -> rectify.Recipe:
    """The recipe of the run's rectification; where none was trained, the dataset's."""
    path = setup.folder("rectify") / "checkpoint.pt"
    if path.exists():
        return runs.recipe_in(runs.load(path, "rectify"), rectify.Recipe)
    return rectify.RECIPES.get(setup.data, rectify.RECIPES["folder"])


def rectified(setup: data.Setup, query: Tensor, system: distill.System) -> Predictor:
    """Stage 1's logits of features. The bias map is made once for every image size."""
    checkpoint = runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")
    part = system.teacher or system
    recipe, rectifier = rectify.load_rectifier(setup, checkpoint, part)
    with torch.no_grad():
        reference = rectify.reference_features(setup.clip_model, rectifier.prompt, setup.vocabulary.names)

    @functools.lru_cache(maxsize=64)            # photographs have many shapes
    def bias_at(h: int, w: int):
        return rectifier.bias(setup.clip_model.visual.patch_positions(h, w), reference)

    def of_features(features: Tensor) -> Tensor:
        return rectifier(features, query, bias_at(*features.shape[-2:]))

    def of_images(images: Tensor) -> Tensor:
        return of_features(rectifier.encode(setup.clip_model, images, recipe.dense_path))

    if rectifier.frozen_clip:
        return Predictor(of_features, recipe.short_side, recipe.dense_path, part.name)
    return Predictor(of_images, recipe.short_side, None, part.name)


def logits_of_all(setup: data.Setup, found: dict[str, Predictor], image: Tensor) -> dict[str, Tensor]:
    """Each stage's logits (1, C, h, w) of one image (1, 3, H, W). CLIP's image tower runs once for all."""
    paths = {predictor.path for predictor in found.values()} - {None}
    seen = setup.clip_model.encode_dense_paths(image, paths) if paths else {}
    return {stage: predictor.logits(seen.get(predictor.path, image)).float()
            for stage, predictor in found.items()}


def command(stage: str, system: distill.System) -> str:
    """What makes a stage of a system. Stage 1 of a student of ReCLIP++ is ReCLIP++'s."""
    made_by = system.teacher or system if stage == "rectify" else system
    return f"python {stage}.py" if made_by.name == ReCLIPpp.name else f"{made_by.command} --stage {stage}"


def title(stage: str, system: str) -> str:
    return STAGES[stage] if system == ReCLIPpp.name else f"{STAGES[stage].split()[-1]}, {system}"


def titled(found: dict[str, Predictor]) -> dict[str, Predictor]:
    """Predictors of stages under what stands above their columns."""
    return {title(stage, predictor.system): predictor for stage, predictor in found.items()}


def existing_stages(setup: data.Setup, system: distill.System = ReCLIPpp) -> list[str]:
    """vanilla and maskclip always; rectify where its checkpoint is; distill if it is the student of that
    teacher."""
    teacher, student = (setup.folder(stage) / "checkpoint.pt" for stage in ("rectify", "distill"))
    stages = ["vanilla", "maskclip"] + (["rectify"] if teacher.exists() else [])
    if not student.exists():
        return stages
    checkpoint = runs.load(student, "distill", distill.SETTINGS)
    other = list(setup.misfits(checkpoint))
    if not other and teacher.exists() and checkpoint["settings"].get("teacher") != \
            distill.teacher_number(runs.load(teacher, "rectify")):
        other = [f"rectification than {teacher}"]
    if other:
        print(f"{student} was made with another {' and another '.join(other)}: left out. Make it anew with: "
              f"{command('distill', system)}")
        return stages
    return [*stages, "distill"]


# ------------------------------------------------------------------------------------------ logits → classes


def predict(logits: Tensor, size: tuple[int, int], denoising: float = 0.0, scale: float = 1.0,
            smoothing: float = 0.0, keys: Tensor | None = None) -> Tensor:
    """Logits (1, C, h, w) → class per pixel (H, W): bilinear up-sampling to the image's own size, then
    argmax.

    `denoising` > 0 leaves out the classes whose highest probability, softmax(scale · logits), stays under it
    anywhere in the image, but never the best one. `smoothing` > 0, with keys (1, E, h, w): see `smooth`.
    """
    if denoising > 0:
        best = (scale * logits).softmax(dim=1).amax(dim=(2, 3), keepdim=True)                   # (1, C, 1, 1)
        absent = (best < denoising) & (best < best.amax(dim=1, keepdim=True))
        logits = logits.masked_fill(absent, -1e9)                # not −∞: times a weight of 0 it would be NaN
    if smoothing > 0 and keys is not None:
        logits = smooth((scale * logits).softmax(dim=1), keys, smoothing)
    return best_class(logits, size)[0]


def smooth(probability: Tensor, keys: Tensor, threshold: float) -> Tensor:
    """MaskCLIP's key smoothing, its Eq. 5: pred_i ← Σ_j cos(k_i, k_j) pred_j where the best of pred_i is
    under `threshold`.

    probability (B, C, h, w), keys (B, E, h, w) of unit length → (B, C, h, w). Other patches keep their very
    numbers.
    """
    mixed = torch.einsum("bcj,bij->bci", probability.flatten(2), keys.flatten(2).mT @ keys.flatten(2))
    unsure = probability.amax(dim=1, keepdim=True) < threshold                                  # (B, 1, h, w)
    return torch.where(unsure, mixed.view_as(probability), probability)


BUDGET = 2 ** 25                # numbers of an up-sampled map that are held at a time: 128 MiB


def best_class(logits: Tensor, size: tuple[int, int],
               scale: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits (1, C, h, w), at most 255 classes → the best class of every pixel, uint8, and, with a `scale`,
    its softmax(scale · logits): both (H, W).

    A few classes at a time are up-sampled, which changes nothing but the memory: all 20 classes of a
    photograph of 50 megapixels would be 4 GB, and as much again for every step of a softmax.
    """
    at_once = max(1, BUDGET // (size[0] * size[1]))
    best = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    highest = torch.full(size, -torch.inf, device=logits.device)
    total = None if scale is None else highest.clone()
    for first in range(0, logits.shape[1], at_once):
        few = logits[:, first:first + at_once]
        up = F.interpolate(few, size=size, mode="bilinear", align_corners=False)[0]
        value, which = up.max(dim=0)                                                             # (H, W) both
        better = value > highest                                # where two are equal the first one stays
        best = torch.where(better, which.to(torch.uint8) + first, best)
        highest = torch.maximum(highest, value)
        if scale is not None:
            total = torch.logaddexp(total, (scale * up).logsumexp(dim=0))
    return best, None if scale is None else (scale * highest - total).exp()


# What [code] multiplies logits with before it asks how probable a class is: cosines by 100, decoder outputs
# by 10.
DENOISING_SCALE = {"vanilla": 100.0, "maskclip": 100.0, "rectify": 10.0, "distill": 10.0}

# ------------------------------------------------------------------------------------------ over a dataset


class LabelledImages(torch.utils.data.Dataset):
    """`(id, image (3, h, w), true_label (H, W) int64)` of the images that have a label, which keeps its own
    size."""

    def __init__(self, images: dict[str, Path], labels: dict[str, Path], read_label: ground_truth.LabelReader,
                 short_side: int, multiple: int = 1):
        self.items = [(name, images[name], labels[name]) for name in images if name in labels]
        self.read_label, self.short_side, self.multiple = read_label, short_side, multiple

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        name, image_path, label_path = self.items[index]
        image = image_files.read_image(image_path)
        label = self.read_label(label_path, size=(image.height, image.width))
        image = data.short_side_to(image, self.short_side, self.multiple)
        return name, data.to_tensor(image), torch.from_numpy(label)


@torch.no_grad()
def predictions(setup: data.Setup, found: dict[str, Predictor], labels: dict[str, Path],
                denoising: float = 0.0, smoothing: float = 0.0) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Labelled images of the split one by one: `(true_label (H, W), {stage: predicted (H, W)})`.

    An image comes once for all stages of one short side, so twice where the student has another than CLIP.
    """
    ground_truth.refuse_other_classes(setup.data, setup.vocabulary.names)
    read_label = ground_truth.LabelReader(setup.data, len(setup.vocabulary))
    for short_side in sorted({predictor.short_side for predictor in found.values()}):
        of_size = {stage: predictor for stage, predictor in found.items()
                   if predictor.short_side == short_side}
        dataset = LabelledImages(setup.evaluation_images, labels, read_label, short_side,
                                 setup.clip_model.visual.patch_size)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=setup.workers)
        for _, image, true_label in tqdm(loader, desc="evaluating", unit="image"):
            image, true_label = image[None].to(setup.device), true_label.to(setup.device)
            with machine.autocast(setup.device, setup.precision):
                logits = logits_of_all(setup, of_size, image)
            keys = setup.clip_model.encode_keys(image) if smoothing > 0 else None
            size = tuple(true_label.shape)
            yield true_label, {stage: predict(one, size, denoising, DENOISING_SCALE[stage], smoothing,
                                              None if stage == "distill" else keys)
                               for stage, one in logits.items()}


def measure(setup: data.Setup, found: dict[str, Predictor], labels: dict[str, Path], denoising: float = 0.0,
            smoothing: float = 0.0) -> dict:
    """Metrics of each stage on the labelled images of the split, with a fingerprint of what was measured."""
    classes = len(setup.vocabulary)
    confusion = {stage: torch.zeros(classes, classes, dtype=torch.int64, device=setup.device)
                 for stage in found}
    of_this_process = dict(list(labels.items())[processes.share(len(labels))])
    for true_label, of_stages in predictions(setup, found, of_this_process, denoising, smoothing):
        for stage, predicted in of_stages.items():
            confusion[stage] += confusion_matrix(true_label, predicted, classes)
    metrics = {}
    for stage, predictor in found.items():
        refinements = {"prompt_denoising": denoising}
        if smoothing > 0 and stage != "distill":
            refinements["key_smoothing"] = smoothing
        measured_as = fingerprint(setup, stage, predictor, len(labels)) | {"refinements": refinements}
        metrics[stage] = measures(processes.total(confusion[stage]).cpu(),
                                  setup.vocabulary.names) | {"fingerprint": measured_as}
    return metrics


def fingerprint(setup: data.Setup, stage: str, predictor: Predictor, images: int) -> dict:
    """What a stage's numbers depend on besides the code."""
    checkpoint = setup.folder(stage) / "checkpoint.pt"
    return {"stage": stage, "system": predictor.system, "data": setup.data, "split": setup.split,
            "images": images, "of": len(setup.evaluation_images), "classes": setup.vocabulary.names,
            "short_side": predictor.short_side, "precision": setup.precision, "clip": setup.fingerprint,
            "dense_path": stage_1_recipe(setup).dense_path,
            "weights": sha256(checkpoint)[:16] if checkpoint.exists() else None}


def after_training(setup: data.Setup, stage: str, system: distill.System = ReCLIPpp) -> None:
    """What a training script ends with: metrics.json (if there are labels) and preview.png of its stage."""
    query, folder = rectify.query_of(setup), setup.folder(stage)
    stages = ["maskclip", "rectify"] if stage == "rectify" else ["rectify", "distill"]
    found = predictors(setup, query, stages, system)
    labels = ground_truth.true_label_files(setup.data, setup.root, setup.split,
                                           list(setup.evaluation_images)) \
        if ground_truth.labels_fit(setup.data, setup.vocabulary.names) else {}
    if labels:
        metrics = measure(setup, found, labels)
        print_table(metrics)
        files.write_json(folder / "metrics.json", metrics[stage])
    else:
        print(f"There are no labels of {setup.data} for these classes, so nothing is measured. Training "
              "needed none.")
    picture_sheet(setup, titled(found), labels, folder / "preview.png")
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, "
          f"{'metrics.json, ' if labels else ''}preview.png")
    following = command("distill" if stage == "rectify" else "evaluate", system)
    print(f"\nNext: {following}{common.repeated(setup.args)}")


def images_measured(made: dict) -> str:
    """What a fingerprint says of the images: "500 test images"; "3 of 5 images" of a folder with 3 labels."""
    part = f" of {made['of']}" if made["of"] != made["images"] else ""
    return f"{made['images']}{part} {'' if made['split'] == 'all' else made['split'] + ' '}images"


def print_table(metrics: dict, per_class: bool = False) -> None:
    """The stages as rows; with `per_class` also every class's IoU, stages as columns."""
    prints = [found["fingerprint"] for found in metrics.values()]
    sides = " and ".join(map(str, sorted({one["short_side"] for one in prints})))
    smoothing = prints[0]["refinements"].get("key_smoothing")
    print(f"\n{prints[0]['data']}: {images_measured(prints[0])}, {len(prints[0]['classes'])} classes, "
          f"short side {sides}, prompt denoising {prints[0]['refinements']['prompt_denoising'] or 'off'}, "
          + (f"key smoothing {smoothing}, " if smoothing else "") + prints[0]["precision"])
    titles = {stage: title(stage, one["system"]) for stage, one in zip(metrics, prints)}
    width = max(20, *map(len, titles.values())) + 2
    print(f"{'':{width}}{'mIoU':>7}{'absent = 0':>12}{'pixel accuracy':>16}   (percent)")
    for stage, found in metrics.items():
        print(f"{titles[stage]:{width}}{found['miou']:7.1f}{found['miou_absent_zero']:12.1f}"
              f"{found['pixel_accuracy']:16.1f}")
    if per_class:
        print("\nIoU per class".ljust(23) + "".join(f"{stage:>10}" for stage in metrics))
        for name in prints[0]["classes"]:
            row = [found["per_class_iou"][name] for found in metrics.values()]
            print(f"{name:22}" + "".join(f"{'–' if value is None else f'{value:.1f}':>10}" for value in row))


# ------------------------------------------------------------------------------------------ pictures


def colour(classes: Tensor, palette) -> Image.Image:
    """Class per pixel (H, W) → colour picture; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:len(palette)] = palette
    return Image.fromarray(table[classes.cpu().numpy().astype(np.uint8)])


@torch.no_grad()
def picture_sheet(setup: data.Setup, columns: dict[str, Predictor], labels: dict[str, Path], path: Path,
                  rows: int = 6, height: int = 144) -> None:
    """A row for each of some images of the split: the image, every column's classes under its title, the
    truth if known; below, a legend. Of several processes one draws it."""
    if machine.RANK > 0:
        return
    images, palette = setup.evaluation_images, setup.vocabulary.palette
    patch = setup.clip_model.visual.patch_size
    read_label = ground_truth.LabelReader(setup.data, len(setup.vocabulary))
    strips = []
    for name in list(images)[::max(1, len(images) // rows)][:rows]:
        image = image_files.read_image(images[name])
        size, logits = (image.height, image.width), {}
        for short_side in {predictor.short_side for predictor in columns.values()}:
            of_size = {column: one for column, one in columns.items() if one.short_side == short_side}
            tensor = data.to_tensor(data.short_side_to(image, short_side, patch))[None].to(setup.device)
            with machine.autocast(setup.device, setup.precision):
                logits |= logits_of_all(setup, of_size, tensor)
        tiles = [image, *(colour(predict(logits[column], size), palette) for column in columns)]
        if labels:
            truth = np.full(size, IGNORE)
            if name in labels:
                truth = read_label(labels[name], size)
            tiles.append(colour(torch.from_numpy(truth), palette))
        strips.append(tiles)
    page = sheet(strips, ["image", *columns, *(["truth"] if labels else [])], setup.vocabulary, height)
    files.write_atomically(path, lambda file: page.save(file, format="PNG"))


FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")    # Latin, Greek, Cyrillic and more


def drawable(names: list[str]) -> list[str]:
    """Names as a legend can show them: one in a script that the font lacks becomes "class 3", counted from
    0."""
    known = FT2Font(str(FONT)).get_charmap()
    return [name if all(ord(letter) in known for letter in name) else f"class {number}"
            for number, name in enumerate(names)]


def sheet(strips: list[list[Image.Image]], titles: list[str], vocabulary: Vocabulary,
          height: int) -> Image.Image:
    """Rows of pictures of one height under their titles, with a legend of all classes at the foot."""
    font, gap = ImageFont.truetype(str(FONT), 12), 6

    # a panorama is made less high, so that the page stays a page
    def shown(tile: Image.Image) -> tuple[int, int]:
        scale = min(height / tile.height, 4 * height / tile.width)
        return max(1, round(scale * tile.width)), max(1, round(scale * tile.height))

    widths = [max(max(shown(strip[k])[0] for strip in strips), round(font.getlength(titles[k])) + 4)
              for k in range(len(titles))]
    width = sum(widths) + gap * (len(widths) + 1)
    entries, x, y = [], gap, 0                                  # the legend, broken into lines
    for name, rgb in zip(drawable(vocabulary.names), vocabulary.palette):
        length = 20 + round(font.getlength(name)) + 14
        if x + length > width and x > gap:
            x, y = gap, y + 20
        entries.append((x, y, name, rgb))
        x += length
    top, foot = 24, 24 + len(strips) * (height + gap) + 4
    page = Image.new("RGB", (width, foot + y + 26), "white")
    pen = ImageDraw.Draw(page)
    x = gap
    for k, title_above in enumerate(titles):
        pen.text((x, 5), title_above, fill="black", font=font)
        for row, strip in enumerate(strips):
            resample = Image.Resampling.BILINEAR if k == 0 else Image.Resampling.NEAREST
            page.paste(strip[k].resize(shown(strip[k]), resample), (x, top + row * (height + gap)))
        x += widths[k] + gap
    for x, y, name, rgb in entries:
        pen.rectangle((x, foot + y + 2, x + 14, foot + y + 16), fill=tuple(rgb), outline="gray")
        pen.text((x + 19, foot + y + 1), name, fill="black", font=font)
    return page


# ------------------------------------------------------------------------------------------ the run


def refuse_labels_of(setup: data.Setup, labels: str | None) -> None:
    """Raise ValueError for `--labels` beside a dataset that has labels of its own."""
    if labels is not None and not is_folder(setup.data):
        raise ValueError(f"--labels {labels}: expected --data FOLDER, your own images; found {setup.data}, "
                         "which has labels of its own. Leave --labels out.")


def main(args: argparse.Namespace, system: distill.System = ReCLIPpp) -> dict:
    """Measure all stages of the newest run (or of `--data`), write and return the metrics."""
    setup = data.open_setup(args, runs.find(args.out, args.data, "rectify", "distill"), split=args.split)
    refuse_labels_of(setup, args.labels)
    folder, query = setup.folder("evaluate"), rectify.query_of(setup)
    files.refuse_folders(folder, "metrics.json", "preview.png")
    labels = ground_truth.true_label_files(setup.data, setup.root, setup.split, list(setup.evaluation_images),
                                           args.labels)
    if not labels:
        raise ValueError(f"{setup.data}: expected labels of the images to measure, found none. For a folder "
                         "of your own pass --labels DIR; to see results without labels use segment.py.")
    if is_folder(setup.data):
        ground_truth.refuse_binary_masks(labels, len(setup.vocabulary))
        if turned := image_files.turned(setup.evaluation_images):
            print(f"{turned} of {len(setup.evaluation_images)} photographs are turned by their EXIF "
                  "orientation. Labels are taken as upright, as a viewer shows the photograph.")
    for stage in ("rectify", "distill"):
        if not (setup.folder(stage) / "checkpoint.pt").exists():
            print(f"No checkpoint of {stage} in {setup.folder(stage)}: left out. Make it with: "
                  f"{command(stage, system)} --data {setup.data}{common.repeated(args)}")
    found = predictors(setup, query, existing_stages(setup, system), system)
    metrics = measure(setup, found, labels, args.prompt_denoising, args.key_smoothing)
    print_table(metrics, per_class=True)
    files.write_json(folder / "metrics.json", metrics)
    picture_sheet(setup, titled(found), labels, folder / "preview.png")
    print(f"\nWrote {folder}/: metrics.json, preview.png")
    if system.name == ReCLIPpp.name:
        print(f"Next: python segment.py YOUR_PHOTO.jpg{common.repeated(args)}")
    return metrics


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
