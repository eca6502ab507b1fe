"""MAFT (NeurIPS 2023): fine-tune CLIP so that it tells the mask proposals of an image apart.

    python paper/maft.py                 Toyland, 12 seen and 4 unseen classes: three minutes on two cores
    python paper/maft.py --data voc      15 seen and 5 unseen classes; so context, ade, cityscapes, coco

**This file trains on labels.** It is zero-shot segmentation, not unsupervised: it needs the true masks of
the *seen* classes of the training images, and asks what they give on unseen classes. So it stands apart:
nothing that trains without labels can import it (tests/test_maft.py), and its numbers have their own table.

Who cuts an image into pieces first and asks CLIP about them afterwards gets nearly the same answer for all of
them: the class token looks at the whole. Here each proposal has a class token of its own, which looks at its
patches alone, and a little training makes it say how well the proposal fits a class.

    image ─┬─ segmenter, superpixels ── masks ─┐
           └─ CLIP, blocks before L ───────────┴─ blocks from L on: N class tokens ── A ── Σ A · mask
    true masks of seen classes ── soft IoU ── mask-aware loss on A;     frozen CLIP ── self-distillation

Writes runs/<data>/maft/: checkpoint.pt, and metrics.json with frozen and tuned CLIP side by side.

    B images · N proposals · K seen classes in an image · C classes · D joint dimension · E ViT width
    H,W pixels of an image · p,q pixels of a mask: half of H and W · h,w patches · n = h·w
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "training", "split")
    group = parser.add_argument_group("proposals")
    group.add_argument("--proposals", type=common.path, default="maskclip", metavar="maskclip|rectify|DIR",
                       help="superpixels and the regions of MaskCLIP or of this run's rectification; or your "
                            "own masks, DIR/<image id>/*.png, white inside (default: maskclip)")
    group.add_argument("--train-on", choices=("truth", "proposals"),
                       help="which masks the class tokens look at in training (default: truth, see Recipe)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import data
import evaluate
import rectify
from clip.download import sha256
from clip.model import VisionTransformer
from datasets import images as image_files, is_drawn, is_folder, labels as ground_truth
from harness import files, machine, runs
from toyland import world

SYSTEM = SimpleNamespace(name="maft", command="python paper/maft.py")

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of MAFT, with its source."""
    first_block: int = 8                    # [paper] L: the first block with a class token for each proposal
    # [ours] The paper's proposals come from a network that was trained on the seen classes' masks, and are
    # nearly those on training images. Ours are fragments: the loss gives them to classes that are not there.
    train_on: Literal["truth", "proposals"] = "truth"
    distillation_weight: float = 1.0        # [paper] λ; the released code has 0.1
    short_side: int = 480                   # [paper] 480×480; [ours] an image keeps its shape
    superpixels: tuple[int, ...] = (16, 64)     # [ours] an image is cut up once for each of these numbers
    batch_size: int = 16                    # [paper]
    learning_rate: float = 1e-5             # [paper] AdamW
    poly_power: float = 0.9                 # [paper]
    gradient_clip: float = 0.01             # [paper] norm of all gradients together
    epochs: int = 1             # [ours] VOC 91 steps, ADE20K 5,052, COCO 7,392; [paper] 100, 5,000, 1,000


RECIPES = {
    **dict.fromkeys(("voc", "coco", "folder"), Recipe()),
    **dict.fromkeys(("context", "context-voc-first", "ade", "cityscapes"), Recipe(epochs=4)),   # [ours]
    # [ours] A CLIP of two blocks, the second with a class token for each proposal. So small, it needs larger
    # steps: harmonic mean 39.6, 45.1, 38.6 with 1e-4, 3e-4, 1e-3 (one trial on 400 scenes, seed 0).
    "toyland": Recipe(first_block=1, short_side=144, batch_size=8, learning_rate=3e-4, epochs=3),
}
RECIPES["toyland-things"] = RECIPES["toyland"]


def seen_classes(classes: int) -> int:
    """How many classes are seen: the first three quarters of the list; the last quarter is unseen. [ours]

    On VOC those are the 15 and 5 of the literature, in Toyland 12 and 4 (cloud, flower, fish, balloon).
    """
    return classes - classes // 4


# ------------------------------------------------------------------------------------------ proposals


def connected_regions(classes: Tensor) -> Tensor:
    """The number of each pixel's connected region of equal class, by 4 neighbours: (p, q) → (p, q). [ours]

    Every pixel takes the lowest number of its equal neighbours, then the number at that number's place, until
    nothing changes.
    """
    region = torch.arange(classes.numel(), device=classes.device).view_as(classes)
    while True:
        before = region.clone()
        for dim, size in enumerate(classes.shape):
            equal = classes.narrow(dim, 0, size - 1) == classes.narrow(dim, 1, size - 1)
            here, there = region.narrow(dim, 0, size - 1), region.narrow(dim, 1, size - 1)      # views
            lower = torch.minimum(here, there)[equal]
            here[equal] = lower
            there[equal] = torch.minimum(there[equal], lower)   # `here` has changed some of them already
        region = region.flatten()[region]
        if region.equal(before):
            return region.unique(return_inverse=True)[1]


def superpixels(image: Tensor, count: int, compactness: float = 0.5, rounds: int = 8) -> Tensor:
    """About `count` pieces of one colour and place: image (3, p, q) → the number of each pixel's, (p, q).

    k-means on [colour; place] from a grid: SLIC [Achanta et al. 2012] in small. [ours] Every centre is
    compared with every pixel, and a piece may fall apart. A grid cell is as far as `compactness` in colour.
    """
    _, p, q = image.shape
    rows = max(1, round((count * p / q) ** 0.5))
    columns = max(1, round(count / rows))
    y, x = torch.meshgrid(torch.linspace(0, rows, p), torch.linspace(0, columns, q), indexing="ij")
    place = compactness * torch.stack([y, x]).to(image.device)                                  # (2, p, q)
    pixels = torch.cat([image, place])                                                          # (5, p, q)
    centres = F.adaptive_avg_pool2d(pixels, (rows, columns)).flatten(start_dim=1).T             # (count, 5)
    pixels = pixels.flatten(start_dim=1).T                                                      # (p·q, 5)
    for _ in range(rounds):
        nearest = torch.cdist(pixels, centres).argmin(dim=1)                                    # (p·q,)
        total = torch.zeros_like(centres).index_add_(0, nearest, pixels)
        size = nearest.bincount(minlength=len(centres))[:, None]
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)     # one without pixels stays
    return nearest.view(p, q)


def mask_size(image: Tensor) -> tuple[int, int]:
    """p, q: half of H and W. [ours] Finer than patches, and a quarter of the pixels."""
    return image.shape[-2] // 2, image.shape[-1] // 2


def as_masks(pieces: Tensor, least: int) -> Tensor:
    """The pieces (p, q) that have at least `least` pixels, each as a mask: (N, p, q) bool. [ours]"""
    numbers = (pieces.flatten().bincount() >= least).nonzero()                                  # (N, 1)
    return pieces == numbers[..., None]


def masks_of_user(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    """The masks folder/<id>/*.png, and last what none of them covers: (N, p, q) bool. FileNotFoundError."""
    paths = sorted((folder / name).glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"--proposals {folder}: expected maskclip, rectify, or a folder of masks, "
                                f"found none in {folder / name}. Put a PNG for each mask there.")
    opened = [image_files.open_image(path).convert("L").resize(size[::-1], Image.Resampling.BOX)
              for path in paths]
    masks = torch.cat([pil_to_tensor(one) > 127 for one in opened])
    return torch.cat([masks, ~masks.any(dim=0, keepdim=True)])


def proposer(setup: data.Setup, query: Tensor, recipe: Recipe, source: str) -> Callable:
    """What proposes masks: (id, image (3, H, W)) → (N, p, q) bool, which may overlap. [ours]

    The segmenter knows the names of all classes, also of the unseen ones; it has seen no label.
    """
    own = source in ("maskclip", "rectify")
    found = evaluate.predictors(setup, query, [source] if own else [])
    least = (setup.clip_model.visual.patch_size // 2) ** 2      # a patch: nothing smaller is seen by a token

    def propose(name: str, image: Tensor) -> Tensor:
        size = mask_size(image)
        if not own:
            return masks_of_user(Path(source), name, size).to(image.device)
        logits = evaluate.logits_of_all(setup, found, image[None])[source]                      # (1, C, h, w)
        small = F.interpolate(image[None], size=size, mode="area")[0]                           # (3, p, q)
        return torch.cat([as_masks(connected_regions(evaluate.predict(logits, size)), least),
                          *(as_masks(superpixels(small, count), 1) for count in recipe.superpixels)])
    return propose


# ------------------------------------------------------------------------------------------ IP-CLIP encoder


def who_sees_whom(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which token (row) attends to which from block L on: (B, 1, N + n, N + n) bool. Sec. "IP-CLIP encoder".

    masks (B, N, p, q); N class tokens stand before the patches. A class token: itself and the patches where
    its mask, resized bilinearly to the grid (h, w), is at least 0.5. A patch: all patches, no class token. No
    row is empty, so that an empty mask gives no NaN.
    """
    B, N, n = *masks.shape[:2], grid[0] * grid[1]
    seen = torch.eye(N + n, dtype=torch.bool, device=masks.device).repeat(B, 1, 1)
    seen[:, N:, N:] = True
    if N:
        inside = F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False) >= 0.5
        seen[:, :N, N:] = inside.flatten(start_dim=2)
    return seen[:, None]


def encode_proposals(visual: VisionTransformer, images: Tensor, masks: Tensor, first_block: int) -> Tensor:
    """z_n: what CLIP sees of every proposal, all in one pass: (B, N, D). Sec. "IP-CLIP encoder".

    images (B, 3, H, W); masks (B, N, p, q), any N; first_block = L, at most the last. Blocks before L are
    CLIP's own; at L the class token is repeated N times. For a full mask and L at the last block z_n is
    CLIP's class token. With an earlier L it is not: CLIP's patches attend to the class token, these do not.
    """
    *blocks, last = visual.transformer.resblocks
    N, grid = masks.shape[1], [-(-side // visual.patch_size) for side in images.shape[-2:]]
    seen = who_sees_whom(masks, grid)                                               # (B, 1, N + n, N + n)
    x = visual.embed(images)                                                        # (B, 1 + n, E)
    for block in blocks[:first_block]:
        x = block(x)
    x = torch.cat([x[:, :1].expand(-1, N, -1), x[:, 1:]], dim=1)                    # (B, N + n, E)
    for block in blocks[first_block:]:
        x = block(x, seen=seen)
    x = last.only(x[:, :N], x, seen[:, :, :N])                  # exact: its other outputs are never read
    return visual.ln_post(x) @ visual.proj                                          # (B, N, D)


@machine.in_float32
def class_scores(features: Tensor, query: Tensor, scale: float) -> Tensor:
    """A = softmax(scale · cos(z_n, t_c)): (N, D) and unit rows (C, D) → (N, C). scale: CLIP's, 100 in the
    paper."""
    return (scale * F.normalize(features.float(), dim=-1) @ query.T).softmax(dim=-1)


def score_spread(scores: Tensor, pairs: Tensor) -> float:
    """How differently two proposals are scored, in percent: 0 alike, 100 each sure of another class. [ours]

    ½ Σ_c |A_i − A_j|, total variation of two rows of A (N, C); its mean over `pairs` (N, N) bool.
    """
    return 50 * torch.cdist(scores, scores, p=1)[pairs].mean().item()


# ------------------------------------------------------------------------------------------ losses


def soft_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Σ m·t / Σ (m + t − m·t) of each proposal and each true mask: (N, p, q), (K, p, q) → (K, N) in [0, 1].

    Sec. "mask-aware loss". A pixel of no seen class (unseen, unlabelled) is outside every true mask.
    """
    masks, truth = masks.flatten(start_dim=1).float(), truth.flatten(start_dim=1).float()
    both = truth @ masks.T                                                                      # (K, N)
    return both / (truth.sum(dim=1, keepdim=True) + masks.sum(dim=1) - both).clamp(min=1e-6)


def min_max(quality: Tensor) -> Tensor:
    """(K, N) → (K, N): of every class the worst proposal becomes 0, the best 1; all alike stay so."""
    low, high = quality.amin(dim=1, keepdim=True), quality.amax(dim=1, keepdim=True)
    return torch.where(high > low, (quality - low) / (high - low).clamp(min=1e-6), quality)


def mask_aware_loss(scores: Tensor, quality: Tensor) -> Tensor:
    """L_ma: a proposal's score of a class should be how well it fits that class's true mask. SmoothL1.

    scores (K, N): A's columns of the K classes that are there; quality (K, N): soft IoU, which `min_max`
    stretches and which has no gradient. The paper stretches both sides. We follow the released code: the IoU
    alone. No class or no proposal: 0.
    """
    if not scores.numel():
        return scores.sum()
    return F.smooth_l1_loss(scores, min_max(quality).detach())


def self_distillation(tuned: Tensor, frozen: Tensor) -> Tensor:
    """L_dis: of the whole image, tuned CLIP should say what frozen CLIP says. SmoothL1 of scores (1, C)."""
    return F.smooth_l1_loss(tuned, frozen.detach())


def total_loss(mask_aware: Tensor, distillation: Tensor, weight: float) -> Tensor:
    """L = L_ma + λ L_dis."""
    return mask_aware + weight * distillation


# ------------------------------------------------------------------------------------------ training


def learned(visual: VisionTransformer) -> list[torch.nn.Parameter]:
    """Let attention, ln_1 and ln_2 of every block and ln_post have a gradient, and nothing else. [paper]"""
    visual.requires_grad_(False)
    parts = [part for block in visual.transformer.resblocks for part in (block.attn, block.ln_1, block.ln_2)]
    return [one.requires_grad_(True) for part in (*parts, visual.ln_post) for one in part.parameters()]


def true_masks(label: Tensor, seen: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The classes of a label (H, W) with a number below `seen`, and their masks: (K,), (K, p, q) bool."""
    small = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    classes = small.unique()
    classes = classes[classes < seen]
    return classes, small == classes[:, None, None]


def train_step(tuned: VisionTransformer, frozen: VisionTransformer, image: Tensor, masks: Tensor,
               classes: Tensor, truth: Tensor, query: Tensor, scale: float,
               recipe: Recipe) -> dict[str, Tensor]:
    """The losses of one image (3, H, W): proposals (N, p, q), true masks (K, p, q), seen classes' query."""
    features = encode_proposals(tuned, image[None], masks[None], recipe.first_block)[0]         # z (N, D)
    scores = class_scores(features, query, scale)                                               # A (N, C)
    quality = soft_iou(masks, truth)                                                            # (K, N)
    whole, of_frozen = (class_scores(visual(image[None]), query, scale) for visual in (tuned, frozen))
    mask_aware = mask_aware_loss(scores[:, classes].T, quality)                                 # L_ma
    distillation = self_distillation(whole, of_frozen)                                          # L_dis
    total = total_loss(mask_aware, distillation, recipe.distillation_weight)                    # L
    return {"loss": total, "mask_aware": mask_aware, "distillation": distillation}


# ------------------------------------------------------------------------------------------ measuring


def semantic_scores(scores: Tensor, masks: Tensor) -> Tensor:
    """semseg[c] = Σ_n A[n, c] · mask_n: (N, C), (N, p, q) → (C, p, q). Sec. "inference"."""
    return torch.einsum("nc,npq->cpq", scores, masks.to(scores.dtype))


def seen_and_unseen(confusion: Tensor, seen: int) -> dict[str, float]:
    """mIoU of seen and of unseen classes and their harmonic mean, in percent, from a confusion matrix (C, C).
    Any pixel may be called any class."""
    iou = 100 * evaluate.class_iou(confusion)
    one, other = iou[:seen].nanmean().item(), iou[seen:].nanmean().item()
    return {"seen": one, "unseen": other, "harmonic": 2 * one * other / max(one + other, 1e-9)}


def class_of(masks: Tensor, label: Tensor, classes: int) -> Tensor:
    """The class of most labelled pixels of a proposal; `classes` where none is labelled: (N,). [ours]"""
    small = F.interpolate(label[None, None].float(), size=masks.shape[-2:], mode="nearest-exact")[0, 0]
    truth = small == torch.arange(classes, device=label.device)[:, None, None]                  # (C, p, q)
    inside = truth.flatten(start_dim=1).float() @ masks.flatten(start_dim=1).float().T          # (C, N)
    return inside.argmax(dim=0).masked_fill(inside.sum(dim=0) == 0, classes)


@torch.no_grad()
def measure(setup: data.Setup, towers: dict[str, VisionTransformer], images: evaluate.LabelledImages,
            query: Tensor, propose: Callable, first_block: int) -> dict[str, dict[str, float]]:
    """mIoU of every tower, and the spread of scores over pairs of proposals: all, of one class, of two."""
    C, scale = len(query), setup.clip_model.logit_scale.exp().item()
    confusion = {tower: torch.zeros(C, C, dtype=torch.int64) for tower in towers}
    rows: dict[str, list] = {tower: [] for tower in towers}
    for name, image, label in tqdm(torch.utils.data.DataLoader(images, batch_size=None,
                                                               num_workers=setup.workers), desc="measuring"):
        image, label = image.to(setup.device), label.to(setup.device)
        masks = propose(name, image)
        own = class_of(masks, label, C)
        two = ~torch.eye(len(masks), dtype=torch.bool, device=setup.device)             # no pair with itself
        known, same = (own < C) & (own < C)[:, None], own == own[:, None]
        for tower, visual in towers.items():
            with machine.autocast(setup.device, setup.precision):
                features = encode_proposals(visual, image[None], masks[None], first_block)[0]   # (N, D)
            scores = class_scores(features, query, scale)                                       # (N, C)
            predicted = evaluate.predict(semantic_scores(scores, masks)[None], tuple(label.shape))
            confusion[tower] += evaluate.confusion_matrix(label, predicted, C).cpu()
            spreads = [score_spread(scores, pairs) for pairs in (two, two & known & same, known & ~same)]
            rows[tower].append([*spreads, len(masks)])
    metrics = {}
    for tower, of_images in rows.items():
        means = torch.tensor(of_images).nanmean(dim=0).tolist()
        numbers = seen_and_unseen(confusion[tower], seen_classes(C))
        numbers |= dict(zip(("spread", "spread_same", "spread_other", "proposals"), means))
        metrics[tower] = {name: round(value, 2) for name, value in numbers.items()}
    return metrics


# ------------------------------------------------------------------------------------------ the run


def labelled(setup: data.Setup, split: str, short_side: int) -> evaluate.LabelledImages:
    """The labelled images of a split. The labels of Toyland's training scenes are on no disk: drawn again."""
    images, C = setup.training_images if split == "train" else setup.evaluation_images, len(setup.vocabulary)
    if split == "train" and is_drawn(setup.data):
        labels, class_of = images, ground_truth.lookup_table(setup.data, C)

        def reader(path: Path, size: tuple[int, int]) -> np.ndarray:
            return class_of[world.scene("train", int(path.stem))[1]].astype(np.int64)
    else:
        labels = ground_truth.label_files(setup.data, setup.root, split, list(images))
        reader = ground_truth.LabelReader(setup.data, C)
    if not labels:
        raise ValueError(f"--data {setup.data}: expected labels of its {split} images, found none. python "
                         f"datasets/check.py --data {setup.data} says what is missing.")
    return evaluate.LabelledImages(images, labels, reader, short_side, setup.clip_model.visual.patch_size)


def settings_of(setup: data.Setup) -> dict:
    """What the weights depend on, as a checkpoint remembers it."""
    return setup.settings(SYSTEM, data.recipe_for(setup, RECIPES, {})) | {"proposals": setup.args.proposals}


def main(args: argparse.Namespace) -> dict[str, dict]:
    """Tune CLIP; measure it and the frozen one; write, print and return the numbers."""
    if args.data and is_folder(args.data):
        raise ValueError(f"--data {args.data}: expected a dataset whose labels are known, found a folder.")
    setup = data.open_setup(args, split=args.split)
    ground_truth.refuse_other_classes(setup.data, setup.vocabulary.names)
    recipe, query = data.recipe_for(setup, RECIPES, {}), rectify.query_of(setup)
    seen, scale = seen_classes(len(query)), setup.clip_model.logit_scale.exp().item()
    images, to_measure = (labelled(setup, split, recipe.short_side) for split in ("train", setup.split))
    propose, folder = proposer(setup, query, recipe, args.proposals), setup.folder("maft")
    frozen = setup.clip_model.visual
    tuned = copy.deepcopy(frozen)
    parameters = learned(tuned)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)

    def clip_gradients(*_) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)

    optimizer.register_step_pre_hook(clip_gradients)
    per_epoch = data.steps_per_epoch(len(images), recipe.batch_size)
    steps = recipe.epochs * per_epoch
    header = setup.header("maft", SYSTEM, recipe) | {"unseen": ", ".join(setup.vocabulary.names[seen:])}
    with runs.Training(folder, "paper/maft", settings_of(setup), header, tuned, optimizer,
                       steps=steps, steps_per_epoch=per_epoch, resume=args.resume,
                       save_every=args.save_every) as training:
        batches = data.Batches(len(images), recipe.batch_size, training.first_step, steps, args.seed)
        for step, batch in enumerate(batches, start=training.first_step):
            losses = []
            for epoch, row in batch:        # one by one: each has a shape and a number of masks of its own
                name, image, label = images[row]
                image, label = image.to(setup.device), label.to(setup.device)
                classes, truth = true_masks(label, seen, mask_size(image))
                masks = truth if recipe.train_on == "truth" else propose(name, image)
                if machine.seed_of(args.seed, "flip", epoch, row) % 2:
                    image, masks, truth = image.flip(-1), masks.flip(-1), truth.flip(-1)
                with machine.autocast(setup.device, setup.precision):
                    losses.append(train_step(tuned, frozen, image, masks, classes, truth, query[:seen], scale,
                                             recipe))
            mean = {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
            training.descend(mean["loss"], recipe.learning_rate * (1 - step / steps) ** recipe.poly_power,
                             [images.items[row][0] for _, row in batch])
            training.done(**mean)

    metrics = measure(setup, {"frozen": frozen, "tuned": tuned}, to_measure, query, propose,
                      recipe.first_block)
    print(f"\n{setup.data}: {len(to_measure)} {setup.split} images, {seen} seen and {len(query) - seen} "
          f"unseen classes, {metrics['tuned']['proposals']:.0f} proposals an image ({args.proposals})\n"
          f"{'':12}{'seen':>8}{'unseen':>8}{'harmonic':>10}   spread of scores: {'all':>5}{'one class':>11}"
          f"{'two classes':>13}   (percent)")
    made = {"system": SYSTEM.name, "data": setup.data, "split": setup.split, "images": len(to_measure),
            "proposals": args.proposals, "classes": setup.vocabulary.names, "precision": setup.precision,
            "clip": setup.fingerprint, "weights": sha256(folder / "checkpoint.pt")[:16]}
    for tower, one in metrics.items():
        print(f"{tower + ' CLIP':12}{one['seen']:8.1f}{one['unseen']:8.1f}{one['harmonic']:10.1f}"
              f"{one['spread']:26.1f}{one['spread_same']:11.1f}{one['spread_other']:13.1f}")
        one["fingerprint"] = made
    files.write_json(folder / "metrics.json", metrics)
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, metrics.json")
    return metrics


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
