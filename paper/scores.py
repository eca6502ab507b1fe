"""The paper's measures beside mIoU: class and space preference (Table VII, Figure 1), linear probe (Table I).

    python paper/scores.py                    the two preferences of all stages of the newest run
    python paper/scores.py --probe            the linear probe too
    python paper/scores.py --hypotheses       how right the hypotheses of the training images are (Eq. 6)
    python paper/scores.py --data photos --classes names.txt --labels photo_labels

Here labels train something, and nowhere else: the classifier of the linear probe, which asks how much a
frozen model's pixel embeddings know. It stands outside the method and no stage ever reads it. The probe and
--hypotheses alone open training labels of the public datasets. Toyland has none on disk: their truth is drawn
again, in memory. Everything else opens labels of the split that is measured, as evaluate.py does. Reads the
checkpoints of one run, writes runs/<data>/scores/*.json.

    B images · C classes · D channels of an embedding · H,W pixels of an image's own label
    h,w a stage's grid · N objects, or patches that the probe learns from · K bins of distance
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "labels", "seed")
    extra = parser.add_argument_group("evaluation")
    extra.add_argument("--probe", action="store_true",
                       help="for each stage: teach a linear classifier with labels, and measure it")
    extra.add_argument("--hypotheses", action="store_true",
                       help="compare the hypotheses of the training images with their labels")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import distill
import evaluate
import rectify
from datasets import IGNORE, is_drawn, is_folder, labels as ground_truth
from distill import System
from evaluate import Predictor
from harness import files, machine, runs
from paper import systems
from toyland import world as toyland

# ---------------------------------------------------------------------------- class preference


def row_shares(confusion: Tensor) -> Tensor:
    """Of the pixels of class i (row), the share that is called j (column): (C, C) float64. Figure 1.

    confusion: counts as of `evaluate.confusion_matrix`. Rows sum to one; the row of a class that the truth
    does not hold is NaN.
    """
    return confusion.double() / confusion.sum(dim=1, keepdim=True)              # 0 / 0 is NaN, on purpose


def class_preference(confusion: Tensor) -> float:
    """By how much a class is preferred to its strongest rival, in [−1, 1], higher is better. Table VII.

    confusion (C, C), counts, truth in rows. In each row of `row_shares`: the diagonal minus the largest other
    entry. So 1 where a class is always recognised, 0 where it is called another as often, −1 where it always
    is called one other. The mean over the classes that occur in the truth: NaN when none does.
    """
    shares = row_shares(confusion)
    itself = torch.eye(len(shares), dtype=torch.bool, device=shares.device)
    rival = shares.masked_fill(itself, 0).amax(dim=1)                                           # (C,)
    return (shares.diagonal() - rival).nanmean().item()


# ---------------------------------------------------------------------------- space preference

BINS = 10                       # [ours] of equal width, from the centre (0) to a corner (1)


def connected_pieces(values: Tensor) -> Tensor:
    """The number of the connected piece that each pixel belongs to: (H, W) → (H, W) int64 in 0..N−1.

    A piece is pixels of one value that touch along a side (a corner is not enough). Numbers follow reading
    order. Runs of equal pixels in a row are found first, and each points to itself. Where two runs touch that
    point to different ones, the later of these points to the earlier, and every run points on to where its
    target points, until all runs of a piece point to its first.
    """
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    run = begins.flatten().cumsum(dim=0).view(values.shape) - 1                                 # (H, W)
    # Two runs that overlap do so first where one of them begins: every pair is found once.
    meet = (values[1:] == values[:-1]) & (begins[1:] | begins[:-1])
    pairs = torch.stack([run[:-1][meet], run[1:][meet]])                                        # (2, pairs)
    first = torch.arange(int(run[-1, -1]) + 1, device=values.device)
    while not torch.equal(*(ends := first[pairs])):
        first.scatter_reduce_(0, ends.amax(dim=0), ends.amin(dim=0), reduce="amin")
        first = first[first]
    return first.unique(return_inverse=True)[1][run]


def objects(true_label: Tensor) -> tuple[Tensor, Tensor]:
    """The objects of a label, and how far from the middle each lies: `(number (H, W), distance (N,))`.

    true_label (H, W): classes, 255 ignored. An object is a connected piece of one class (`connected_pieces`);
    ignored pixels belong to none, number −1. Labels here know classes, not instances: two cars that touch are
    one object, one car behind a pole is two. To take all pixels of a class in an image for one object would
    be worse: of a car left and a car right the centroid lies in the middle, where there is none.

    distance, float64: from the object's centroid to the image's centre, in halves of the image's diagonal: 0
    is the centre, a corner is 1. So it is the same for an image at any size.
    """
    H, W = true_label.shape
    piece, counted = connected_pieces(true_label), true_label != IGNORE
    is_object = torch.zeros(int(piece.max()) + 1, dtype=torch.bool, device=piece.device)
    is_object[piece[counted]] = True
    # without gaps where ignored pieces were
    number = torch.where(is_object, is_object.cumsum(dim=0) - 1, -1)[piece]
    rows, columns = torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2             # 0 is the centre
    y, x = (axis.double().to(number.device)[counted] for axis in torch.meshgrid(rows, columns, indexing="ij"))
    pixels = torch.bincount(number[counted])                                                    # (N,)
    centroid = (torch.bincount(number[counted], weights=axis) / pixels for axis in (y, x))
    return number, torch.hypot(*centroid) / ((H * H + W * W) ** 0.5 / 2)


def bin_of(distance: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal parts of [0, 1] a distance lies in. A boundary belongs to the outer neighbour."""
    return (distance * bins + 1e-9).long().clamp(max=bins - 1)      # a distance's last bits must not decide


def bins_of_pixels(true_label: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """In which bin each pixel counts, and the objects of each bin: `(place (H, W), counts (K,))`, int64.

    A pixel's bin is that of the object it belongs to in truth, wherever the pixel itself lies; −1 for ignored
    pixels.
    """
    number, distance = objects(true_label)
    of_object = bin_of(distance, bins)                                                          # (N,)
    place = torch.full_like(number, -1)
    place[number >= 0] = of_object[number[number >= 0]]
    return place, torch.bincount(of_object, minlength=bins)


def confusion_by_distance(true_label: Tensor, place: Tensor, predicted: Tensor, classes: int,
                          bins: int) -> Tensor:
    """One confusion matrix for each bin of distance: (K, C, C) int64, truth in rows.

    true_label, place (of `bins_of_pixels`) and predicted: (H, W). Every counted pixel is in one bin, so the
    sum over the bins is `evaluate.confusion_matrix`, and the matrices of many images add up.
    """
    return torch.stack([evaluate.confusion_matrix(true_label[place == k], predicted[place == k], classes)
                        for k in range(bins)])


def distance_curve(confusion: Tensor) -> Tensor:
    """mIoU of the objects at each distance: (K, C, C) → (K,) in [0, 1], NaN without objects. Figure 1.

    With I pixels of class k's objects found, out of G, and F pixels that are called k and are not, IoU is I /
    (G + F). I and G belong to objects, so to bins. F belongs to no object of k: every bin gets the part of F
    that it has of G. Then a class that is found equally well everywhere has its own IoU in every bin, and for
    any class the mean over the bins, weighted by G, is its IoU. A bin's mIoU is the mean over the classes
    that occur in its truth.

    To charge F where the pixels' true objects lie would be another measure: wide stuff (sky, road) has its
    centroid near the centre and is where most false cars are, so that cars in the centre would seem worst. In
    Toyland that alone makes a slope of +0.57 for the things of MaskCLIP, where this curve has +0.04.
    """
    G = confusion.sum(dim=2).double()                                                           # (K, C)
    found = confusion.diagonal(dim1=1, dim2=2).double()                                         # I  (K, C)
    false = confusion.sum(dim=(0, 1)) - found.sum(dim=0)                                        # F  (C,)
    iou = found / (G + false * G / G.sum(dim=0))        # 0 / 0 is NaN: a class that is not in the bin's truth
    return iou.nanmean(dim=1)


def bin_middles(bins: int) -> Tensor:
    """The distance that stands for each bin: 0.05, 0.15, … 0.95 for ten. (K,) float64."""
    return (torch.arange(bins, dtype=torch.float64) + 0.5) / bins


def space_preference(curve: Tensor) -> float:
    """The mean of the curve's slopes between neighbouring distances, as the paper words it. Table VII.

    curve (K,) as of `distance_curve`, NaN where there are no objects: such a bin is passed over, and the
    slope is taken across it. In mIoU (0 to 1) per half diagonal; below 0 where what lies outside is
    recognised less, 0 is even-handed, higher is better. NaN for a curve of fewer than two points.

    The appendix that draws it is not at hand. With equal distances the mean is the difference of the curve's
    two ends over the way between them: it hangs on the first and the last bin, which hold few objects.
    """
    held = ~curve.isnan()
    x, y = bin_middles(len(curve)).to(curve.device)[held], curve[held]
    return (y.diff() / x.diff()).mean().item()              # of none: NaN


def space_slope(curve: Tensor, counts: Tensor) -> float:
    """Ours beside it: the slope of the least-squares line through the curve. Every object counts once.

    curve (K,) as of `distance_curve`, counts (K,) objects in each bin, the weights. Same unit and same sign
    as `space_preference`. NaN when fewer than two bins hold objects.
    """
    held = counts > 0
    x, y, weight = bin_middles(len(curve)).to(curve.device)[held], curve[held], counts[held].double()
    x = x - (weight * x).sum() / weight.sum()
    return ((weight * x * y).sum() / (weight * x * x).sum()).item() if len(x) > 1 else float("nan")


# ---------------------------------------------------------------------------- over a dataset


def confusions(setup: data.Setup, found: dict[str, Predictor], labels: dict[str, Path],
               bins: int = BINS) -> dict[str, tuple[Tensor, Tensor]]:
    """For each stage: a confusion matrix for every bin of distance (K, C, C), and the bin's objects (K,)."""
    C = len(setup.vocabulary)
    total = {stage: (torch.zeros(bins, C, C, dtype=torch.int64), torch.zeros(bins, dtype=torch.int64))
             for stage in found}
    for true_label, of_stages in evaluate.predictions(setup, found, labels):
        place, objects_in = bins_of_pixels(true_label, bins)
        for stage, predicted in of_stages.items():
            confusion, counts = total[stage]
            confusion += confusion_by_distance(true_label, place, predicted, C, bins).cpu()
            counts += objects_in.cpu()
    return total


def preferences(confusion: Tensor, counts: Tensor) -> dict:
    """Scores and curve, of a stage's matrices (K, C, C) and objects (K,), as scores.json holds them."""
    curve = distance_curve(confusion)
    return {"class_preference": rounded(class_preference(confusion.sum(dim=0))),
            "space_preference": rounded(space_preference(curve)),
            "space_slope": rounded(space_slope(curve, counts)),
            "curve": {"distance": [rounded(x) for x in bin_middles(len(curve)).tolist()],
                      "miou": [rounded(100 * y, 2) for y in curve.tolist()], "objects": counts.tolist()}}


def rounded(value: float, digits: int = 4) -> float | None:
    """JSON has no NaN: what cannot be said is null."""
    return None if value != value else round(value, digits)


# ---------------------------------------------------------------------------- the linear probe


@dataclass(frozen=True)
class ProbeRecipe:
    """Every number of the linear probe; the paper gives none. [ours]"""
    images: int = 2000          # at most so many training images, evenly spaced: all of VOC, not all of COCO
    patches: int = 100          # of each, drawn at random; neighbours say nearly the same
    decay: float = 1e-4         # weight of ½‖W‖², of standardised channels: makes the optimum one point
    steps: int = 200            # of L-BFGS, at most


def embeddings(setup: data.Setup, query: Tensor, stages: list[str], system: System) -> dict[str, Predictor]:
    """What each stage makes of a pixel before it is given a class: (B, D, h, w) in the place of logits.

    vanilla, maskclip   CLIP's dense features: through the attention of the last block, and past it (Z).
    rectify             the decoder's output M_o, C channels. Stage 1 leaves Z as it is: a probe of Z would
                        measure MaskCLIP a second time. M_o is all that rectification adds to a pixel. With
                        fewer channels than Z (C for D) it may know less: it shows what the decoder keeps.
    distill             the student's Ẑ: what Table I calls (LP), the features after both stages.
    """
    found = evaluate.predictors(setup, query, stages, system)
    for stage, predictor in found.items():
        if stage in ("vanilla", "maskclip"):
            found[stage] = replace(predictor, logits=lambda features: features)
        elif stage == "distill":
            found[stage] = replace(predictor, logits=distill.load_student(setup, query, system)[1].network)
    return found


def fit_linear(features: Tensor, true_label: Tensor, classes: int, decay: float,
               steps: int) -> tuple[Tensor, Tensor]:
    """The linear classifier that explains labels best: (N, D), (N,) → weight (C, D), bias (C,).

    Softmax regression on channels of mean 0 and variance 1 (so that stages of other scales meet the same
    decay): the minimum of the mean cross-entropy plus decay · ½‖W‖². The problem is strictly convex in W: the
    result depends on no learning rate, no order and no seed. L-BFGS from zero on all N at once. The
    standardisation is folded into weight and bias.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)         # (D,) both
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), true_label) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


class DrawnScenes(torch.utils.data.Dataset):
    """Toyland's training scenes with their truth, as `evaluate.LabelledImages` would give them.

    The truth of these scenes is on no disk, so that nothing that trains could read it. A scene is a function
    of its number, though: here both are drawn again and forgotten. `class_of`: number in the drawing → class,
    as in label files (`datasets.labels.lookup_table`).
    """

    def __init__(self, ids: list[str], class_of: np.ndarray, short_side: int, multiple: int):
        self.ids, self.class_of, self.short_side, self.multiple = ids, class_of, short_side, multiple

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        image, truth = toyland.scene("train", int(self.ids[index]))
        image = data.short_side_to(Image.fromarray(image), self.short_side, self.multiple)
        return self.ids[index], data.to_tensor(image), torch.from_numpy(self.class_of[truth].astype(np.int64))


def labelled_training_images(setup: data.Setup, short_side: int, most: int,
                             flag: str) -> torch.utils.data.Dataset:
    """For what `flag` asks for: at most `most` training images, evenly spaced, with their true labels.

    Raises ValueError for a folder of one's own images, which has no second part to measure on, and when there
    are no labels.
    """
    if is_folder(setup.data):
        raise ValueError(f"{flag} --data {setup.data}: expected a dataset with labels for training and "
                         f"others to measure on; found a folder of your own images. Leave {flag} out.")
    patch, images = setup.clip_model.visual.patch_size, setup.training_images
    if is_drawn(setup.data):
        class_of = ground_truth.lookup_table(setup.data, len(setup.vocabulary))
        return DrawnScenes(evenly_spaced(list(images), most), class_of, short_side, patch)
    labels = ground_truth.label_files(setup.data, setup.root, "train", list(images))
    if not labels:
        raise ValueError(f"{flag} --data {setup.data}: expected labels of its training images, found none. "
                         f"Unpack them, or leave {flag} out.")
    chosen = {name: labels[name] for name in evenly_spaced(list(labels), most)}
    read_label = ground_truth.LabelReader(setup.data, len(setup.vocabulary))
    return evaluate.LabelledImages(images, chosen, read_label, short_side, patch)


def evenly_spaced(items: list, most: int) -> list:
    """At most `most` of the items, in their order, as evenly spaced as whole numbers allow."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def label_at_centres(true_label: Tensor, h: int, w: int) -> Tensor:
    """The label of the pixel in the middle of each cell of a grid: (H, W) → (h, w).

    The probe learns patches and is measured on pixels: at the centre of a patch, up-sampling leaves its
    logits as they are.
    """
    H, W = true_label.shape
    rows, columns = ((torch.arange(cells) * 2 + 1) * side // (2 * cells) for cells, side in ((h, H), (w, W)))
    return true_label[rows][:, columns]


@torch.no_grad()
def labelled_patches(setup: data.Setup, found: dict[str, Predictor], recipe: ProbeRecipe,
                     seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What each stage's probe learns from: embeddings (N, D) of patches of training images, and classes (N,).

    Stages of one grid get the same patches; which they are depends on seed and image alone.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {stage: [] for stage in found}
    for short_side in sorted({embed.short_side for embed in found.values()}):
        of_size = {stage: embed for stage, embed in found.items() if embed.short_side == short_side}
        dataset = labelled_training_images(setup, short_side, recipe.images, "--probe")
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=setup.workers)
        for name, image, true_label in tqdm(loader, desc="embedding", unit="image"):
            with machine.autocast(setup.device, setup.precision):
                embedded = evaluate.logits_of_all(setup, of_size, image[None].to(setup.device))
            for stage, (dense,) in embedded.items():                                            # (D, h, w)
                label = label_at_centres(true_label, *dense.shape[-2:]).flatten()               # (h·w,)
                generator = torch.Generator().manual_seed(machine.seed_of(seed, "probe", name))
                chosen = torch.randperm(len(label), generator=generator)[:recipe.patches]
                chosen, patches = chosen[label[chosen] != IGNORE], dense.flatten(start_dim=1).T
                parts[stage].append((patches[chosen.to(dense.device)], label[chosen].to(dense.device)))
    whole = {stage: tuple(map(torch.cat, zip(*of_stage))) for stage, of_stage in parts.items()}
    if not all(len(classes) for _, classes in whole.values()):
        raise ValueError(f"--probe --data {setup.data}: expected training labels that name a class, found "
                         "ignored pixels (255) alone.")
    return whole


def linear_probes(setup: data.Setup, query: Tensor, stages: list[str], labels: dict[str, Path],
                  recipe: ProbeRecipe, seed: int, system: System) -> dict[str, dict]:
    """Train a linear classifier on each stage's frozen embeddings, measure it on the split. Table I.

    Returns what `evaluate.measures` says of the predictions (mIoU and friends, in percent), with the
    number of patches that the probe learned from.
    """
    found, C = embeddings(setup, query, stages, system), len(setup.vocabulary)
    patches, probes = labelled_patches(setup, found, recipe, seed), {}
    for stage, (features, classes) in patches.items():
        weight, bias = fit_linear(features, classes, C, recipe.decay, recipe.steps)
        probes[stage] = replace(found[stage], logits=probe_on(found[stage].logits, weight, bias))
    return {stage: evaluate.measures(confusion.sum(dim=0), setup.vocabulary.names)
            | {"patches": len(patches[stage][1])}
            for stage, (confusion, _) in confusions(setup, probes, labels, bins=1).items()}


def probe_on(embed: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """A stage with the probe in the place of its own head: what `embed` takes → logits (B, C, h, w)."""
    return lambda seen: rectify.query_logits(embed(seen).float(), weight) + bias[:, None, None]


# ---------------------------------------------------------------------------- the hypotheses

LEAST = 0.001                   # [ours] of the pixels that have a label: a class is in an image from here on


def precision_and_recall(hypothesis: Tensor, truth: Tensor) -> tuple[float | None, float | None]:
    """Of what is named the share that is there, and of what is there the share that is named. Both bool.

    None for 0 / 0.
    """
    right, named, there = ((hypothesis & truth).sum().item(), hypothesis.sum().item(), truth.sum().item())
    return tuple(round(right / count, 4) if count else None for count in (named, there))


def hypothesis_scores(setup: data.Setup, query: Tensor, system: System) -> dict:
    """How right H of Eq. 6 is about the training images, as the run's recipe and its system's votes have it.

    A class is in an image if it has a thousandth of the pixels that have a label. classes: of an H, on
    average; precision and recall over all pairs of image and class, and of every class.
    """
    recipe, images, C = evaluate.stage_1_recipe(setup), setup.training_images, len(setup.vocabulary)
    labelled, rows = labelled_training_images(setup, recipe.short_side, len(images), "--hypotheses"), {}
    loader = torch.utils.data.DataLoader(labelled, batch_size=None, num_workers=setup.workers)
    for name, _, true_label in tqdm(loader, desc="labels", unit="image"):
        pixels = torch.bincount(true_label[true_label != IGNORE].flatten(), minlength=C)
        rows[name] = pixels > LEAST * pixels.sum()
    of_stage_1 = systems.rectification_of(system)
    votes = rectify.votes_of(setup, query, recipe, of_stage_1)
    H = rectify.multi_label_hypothesis(votes, recipe.vote_threshold)
    H = H[[number for number, name in enumerate(images) if name in rows]]     # of those with a label
    truth = torch.stack(list(rows.values()))
    precision, recall = precision_and_recall(H, truth)
    return {"images": len(H), "classes": round(H.sum(dim=1).float().mean().item(), 2),
            "precision": precision, "recall": recall,
            "per_class": {name: precision_and_recall(H[:, k], truth[:, k])
                          for k, name in enumerate(setup.vocabulary.names)},
            "window_ratio": recipe.window_ratio, "vote_threshold": recipe.vote_threshold,
            "system": of_stage_1.name}


def print_hypotheses(found: dict) -> None:
    print("\n"
          f"Hypotheses of {found['images']} training images, {found['classes']:.1f} classes each\n"
          f"{'':22}{'precision':>10}{'recall':>10}")
    rows = {"all": (found["precision"], found["recall"]), **found["per_class"]}
    for name, (precision, recall) in rows.items():
        print(f"{name:22}{shown(precision, 2):>10}{shown(recall, 2):>10}")


# ---------------------------------------------------------------------------- the run


def open_measured(args: argparse.Namespace) -> tuple[data.Setup, Tensor, dict[str, Path], list[str], System]:
    """The newest run, or that of `--data`: its setup, query, labels (or none), stages, system."""
    setup = data.open_setup(args, runs.find(args.out, args.data, "rectify", "distill"), split=args.split)
    evaluate.refuse_labels_of(setup, args.labels)
    labels = {}
    if ground_truth.labels_fit(setup.data, setup.vocabulary.names):
        ids = list(setup.evaluation_images)
        labels = ground_truth.true_label_files(setup.data, setup.root, setup.split, ids, args.labels)
    *_, last = stages = evaluate.existing_stages(setup)
    system = System()                           # the furthest stage says which system it is of
    if last in ("rectify", "distill"):
        system = systems.of(runs.load(setup.folder(last) / "checkpoint.pt", last))
    return setup, rectify.query_of(setup), labels, stages, system


def print_scores(scores: dict) -> None:
    """The stages as rows; below, the curve of each."""
    one = next(iter(scores.values()))
    made, objects_in = one["fingerprint"], one["curve"]["objects"]
    print("\n"
          f"{made['data']}: {evaluate.images_measured(made)}, {sum(objects_in)} objects, "
          f"{len(made['classes'])} classes, {made['precision']}")
    titles = {stage: evaluate.title(stage, found["fingerprint"]["system"]) for stage, found in scores.items()}
    width = max(20, *map(len, titles.values())) + 2
    print(f"{'':{width}}{'class preference':>18}{'space preference':>18}{'space slope':>13}"
          + f"{'linear probe, mIoU':>20}" * ("probe" in one))
    for stage, found in scores.items():
        print(f"{titles[stage]:{width}}{shown(found['class_preference'], 3):>18}"
              f"{shown(found['space_preference'], 3):>18}{shown(found['space_slope'], 3):>13}"
              + (f"{found['probe']['miou']:20.1f}" if "probe" in one else ""))
    print("\nmIoU (percent) by the distance of an object from the centre, in half diagonals")
    print(f"{'':{width}}" + "".join(f"{x:7.2f}" for x in one["curve"]["distance"]))
    for stage, found in scores.items():
        print(f"{titles[stage]:{width}}" + "".join(f"{shown(y, 1):>7}" for y in found["curve"]["miou"]))
    print(f"{'objects':{width}}" + "".join(f"{count:7}" for count in objects_in))


def shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main(args: argparse.Namespace) -> dict:
    """Score all stages of the newest run (or of `--data`), write scores.json, return the scores."""
    setup, query, labels, stages, system = open_measured(args)
    folder = setup.folder("scores")
    files.refuse_folders(folder, "scores.json", "hypotheses.json")
    ground_truth.refuse_other_classes(setup.data, setup.vocabulary.names)
    if not labels:
        raise ValueError(f"{setup.data}: expected labels of the images to measure, found none. For a folder "
                         "of your own pass --labels DIR.")
    found, scores = evaluate.predictors(setup, query, stages, system), {}
    for stage, (confusion, counts) in confusions(setup, found, labels).items():
        measured_as = evaluate.fingerprint(setup, stage, found[stage], len(labels)) | {"bins": BINS}
        scores[stage] = preferences(confusion, counts) | {"fingerprint": measured_as}
    if args.probe:
        recipe = ProbeRecipe()
        probes = linear_probes(setup, query, stages, labels, recipe, args.seed, system)
        for stage, measured in probes.items():
            scores[stage]["probe"] = measured | {"recipe": asdict(recipe), "seed": args.seed}
    print_scores(scores)
    if args.hypotheses:
        hypotheses = hypothesis_scores(setup, query, system)
        print_hypotheses(hypotheses)
        files.write_json(folder / "hypotheses.json", hypotheses)
    files.write_json(folder / "scores.json", scores)
    print(f"\nWrote {folder}/scores.json\nNext: python paper/figures.py{common.repeated(args)}")
    return scores


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
