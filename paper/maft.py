"""MAFT (Jiao et al., NeurIPS 2023): fine-tune CLIP so that it tells the mask proposals of an image apart.

    python paper/maft.py                       Toyland: 12 seen and 4 unseen classes, a few minutes on two cores
    python paper/maft.py --data voc            15 seen and 5 unseen classes; so context, ade, cityscapes, coco

**This file trains on labels.** It is zero-shot segmentation, not unsupervised: it needs the true masks of the
*seen* classes of the training images, and is measured on classes that it never saw. It stands apart: nothing
that trains without labels may import it (tests/test_house.py), and its numbers have a table of their own.

Who segments first and asks CLIP afterwards what each piece is finds that CLIP answers nearly the same for all
pieces of an image: its class token looks at the whole. Here each proposal has a class token of its own, which
looks at its patches alone, and a little training makes it say how well the proposal fits a class.

    image ─┬─ segmenter, superpixels ── N masks ──┐
           └─ CLIP, blocks 0..L−1 ────────────────┴─ blocks L..: N class tokens ── A (N, C) ── Σ A·mask ── classes
    seen classes' true masks ── soft IoU, 0 to 1 ── mask-aware loss on A;   frozen CLIP ── self-distillation

Writes runs/<data>/maft/: checkpoint.pt, metrics.json (frozen CLIP and tuned: seen, unseen, harmonic mean).

    N proposals · K seen classes in an image · C classes · D joint dimension · E ViT width · T tokens
    H,W pixels of the image · h,w patches · n = h·w · p,q pixels of a mask: half as many as the image's a side
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "training")
    parser.add_argument_group("proposals").add_argument(
        "--proposals", type=common.path, default="maskclip", metavar="maskclip|rectify|DIR",
        help="regions of MaskCLIP's or of the run's rectified segmentation, each with superpixels; or your own "
             "masks, DIR/<image id>/*.png, white where a mask is, of training and validation images (default: "
             "maskclip)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

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
from datasets import images as image_files, is_folder, labels as ground_truth
from harness import files, machine, runs
from toyland import world

SYSTEM = SimpleNamespace(name="maft", command="python paper/maft.py")

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of MAFT, with its source."""
    split: int = 8                          # [paper] L: the first block with a class token for each proposal
    distillation_weight: float = 1.0        # [paper] λ; the released code has 0.1
    short_side: int = 480                   # [paper: 480×480; ours: the image keeps its shape]
    superpixels: tuple[int, ...] = (16, 64)     # [ours] how many in an image, once for each number
    batch_size: int = 16                    # [paper]
    learning_rate: float = 1e-5             # [paper] AdamW
    poly_power: float = 0.9                 # [paper]
    gradient_clip: float = 0.01             # [paper] norm of all gradients together
    epochs: int = 1                         # [paper] VOC 100 steps: 1,464 images are 91


RECIPES = {
    "voc": Recipe(),
    "context": Recipe(epochs=3), "ade": Recipe(epochs=4), "cityscapes": Recipe(epochs=5),   # [ours] ADE: 5,052
    "coco": Recipe(),                                                   # [paper] 1,000 steps; ours 7,392
    "folder": Recipe(),
    # [ours] A CLIP of two blocks: the second has a class token for each proposal. Weights of this size move
    # with larger steps.
    "toyland": Recipe(split=1, short_side=144, batch_size=8, learning_rate=3e-4, epochs=4),
}
RECIPES["context-voc-first"] = RECIPES["context"]


def seen_classes(classes: int) -> int:
    """How many classes are seen: the first three quarters of the list; the last quarter is unseen. [ours]

    On VOC these are the 15 and 5 of the literature (unseen: potted plant, sheep, sofa, train, tv monitor), in
    Toyland 12 and 4 (cloud, flower, fish, balloon).
    """
    return classes - classes // 4


# ------------------------------------------------------------------------------------------ proposals


def connected_regions(classes: Tensor) -> Tensor:
    """Numbers 0, 1, … of the regions of equal class, neighbours being above, below, left, right. (p, q) int.

    [ours] Every pixel takes the lowest number among itself and its equal neighbours, then the number which
    the pixel of that number has, until nothing changes.
    """
    region = torch.arange(classes.numel(), device=classes.device).view_as(classes)
    while True:
        before = region.clone()
        for here, there in (((slice(1, None),), (slice(-1),)), ((slice(None), slice(1, None)),
                                                                (slice(None), slice(-1)))):
            lower = torch.minimum(region[here], region[there])
            equal = classes[here] == classes[there]
            region[here] = torch.where(equal, lower, region[here])
            region[there] = torch.where(equal, torch.minimum(region[there], lower), region[there])
        region = region.flatten()[region]
        if region.equal(before):
            return region.unique(return_inverse=True)[1].view_as(classes)


def superpixels(image: Tensor, count: int, compactness: float = 0.5, rounds: int = 8) -> Tensor:
    """About `count` pieces of one colour and place: k-means on [colour; place], from a grid. (p, q) int.

    SLIC [Achanta et al. 2012] in small [ours: every centre is compared with every pixel, and pieces may fall
    apart]. image (3, p, q), normalised; a distance of one cell weighs as much as `compactness` in colour.
    """
    _, p, q = image.shape
    rows = max(1, round((count * p / q) ** 0.5))
    columns = max(1, round(count / rows))
    y = torch.linspace(0, rows, p, device=image.device)[:, None].expand(p, q)
    x = torch.linspace(0, columns, q, device=image.device).expand(p, q)
    pixels = torch.cat([image, compactness * torch.stack([y, x])])                              # (5, p, q)
    centres = F.adaptive_avg_pool2d(pixels, (rows, columns)).flatten(start_dim=1).T             # (count, 5)
    pixels = pixels.flatten(start_dim=1).T                                                      # (p·q, 5)
    for _ in range(rounds):
        nearest = torch.cdist(pixels, centres).argmin(dim=1)                                    # (p·q,)
        total = torch.zeros_like(centres).index_add_(0, nearest, pixels)
        size = nearest.bincount(minlength=len(centres))[:, None]
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)     # one without pixels stays
    return nearest.view(p, q)


def as_masks(partition: Tensor, least: int = 1) -> Tensor:
    """Numbered pieces (p, q) → one mask for each that has at least `least` pixels: (N, p, q) bool."""
    masks = F.one_hot(partition).permute(2, 0, 1).bool()
    return masks[masks.flatten(start_dim=1).sum(dim=1) >= least]


def mask_size(image: Tensor) -> tuple[int, int]:
    """p, q: a mask is half as high and wide as the image that CLIP sees. [ours] Four times fewer pixels."""
    return image.shape[-2] // 2, image.shape[-1] // 2


def proposer(setup: data.Setup, query: Tensor, recipe: Recipe, source: str) -> Callable:
    """What proposes masks: (id, image (3, H, W)) → (N, p, q) bool, overlapping as it may be. [ours]

    The segmenter knows the names of all classes, those of unseen ones too, and has seen no label.
    """
    if source not in ("maskclip", "rectify"):
        return lambda name, image: masks_of_user(Path(source), name, mask_size(image)).to(image.device)
    found = evaluate.predictors(setup, query, [source])
    patch = (setup.clip_model.visual.patch_size // 2) ** 2      # pixels: what is smaller, no class token sees

    def propose(name: str, image: Tensor) -> Tensor:
        small = F.interpolate(image[None], size=mask_size(image), mode="area")[0]               # (3, p, q)
        logits = evaluate.logits_of_all(setup, found, image[None])[source]                      # (1, C, h, w)
        regions = connected_regions(evaluate.predict(logits, mask_size(image)))
        pieces = [as_masks(superpixels(small, count)) for count in recipe.superpixels]
        return torch.cat([as_masks(regions, least=patch), *pieces])
    return propose


def masks_of_user(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    """The masks folder/<id>/*.png, and last what none of them covers: (N, p, q) bool. FileNotFoundError."""
    if not (paths := sorted((folder / name).glob("*.png"))):
        raise FileNotFoundError(f"--proposals {folder}: expected maskclip, rectify, or a folder with masks of "
                                f"every image, found none in {folder / name}. Put one PNG for each mask there, "
                                "white where the mask is.")
    masks = []
    for path in paths:
        mask = image_files.open_image(path).convert("L").resize(size[::-1], Image.Resampling.BOX)
        masks.append(pil_to_tensor(mask)[0] > 127)
    masks = torch.stack(masks)
    return torch.cat([masks, ~masks.any(dim=0, keepdim=True)])


# ------------------------------------------------------------------------------------------ IP-CLIP encoder


def who_sees_whom(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which token (row) attends to which from block L on: (B, 1, N + n, N + n) bool. IP-CLIP encoder.

    masks (B, N, p, q), N class tokens, then n patches. Class token i: itself and the patches where its mask,
    resized bilinearly to the grid (h, w), is at least 0.5. Patches: all patches and no class token. No row is
    empty, so that an empty mask gives no NaN.
    """
    B, N = masks.shape[:2]
    n = grid[0] * grid[1]
    inside = F.interpolate(masks.float(), size=grid, mode="bilinear", align_corners=False) >= 0.5
    seen = torch.zeros(B, N + n, N + n, dtype=torch.bool, device=masks.device)
    seen[:, :N, :N] = torch.eye(N, dtype=torch.bool, device=masks.device)
    seen[:, :N, N:] = inside.flatten(start_dim=2)
    seen[:, N:, N:] = True
    return seen[:, None]


def encode_proposals(visual: VisionTransformer, images: Tensor, masks: Tensor, split: int) -> Tensor:
    """z: what CLIP sees of every proposal, in one pass: (B, N, D), not normalised. IP-CLIP encoder.

    images (B, 3, H, W); masks (B, N, p, q), any N; split = L, from 0 to the last block. Blocks before L are
    CLIP's own. At L the class token is repeated for every proposal. With masks of the whole image and L at
    the last block this is CLIP's own class token; with an earlier L patches no longer see that.
    """
    *blocks, last = visual.transformer.resblocks
    x = visual.embed(images)                                                                    # (B, 1 + n, E)
    for block in blocks[:split]:
        x = block(x)
    N, size = masks.shape[1], visual.patch_size
    grid = (-(-images.shape[-2] // size), -(-images.shape[-1] // size))
    seen = who_sees_whom(masks, grid)                                                           # (B, 1, T, T)
    x = torch.cat([x[:, :1].expand(-1, N, -1), x[:, 1:]], dim=1)                                # (B, N + n, E)
    for block in blocks[split:]:
        x = block(x, seen=seen)
    x = last.only(x[:, :N], x, seen[:, :, :N])                  # exact: its other outputs are never read
    return visual.ln_post(x) @ visual.proj                                                      # (B, N, D)


@machine.in_float32
def class_scores(features: Tensor, query: Tensor, scale: float) -> Tensor:
    """A = softmax(scale · z_n · t_c): the class probabilities of every proposal. (N, D), (C, D) → (N, C).

    `scale` is that of CLIP, exp(logit_scale): 100 for OpenAI's, as in the paper.
    """
    return (scale * F.normalize(features.float(), dim=-1) @ query.T).softmax(dim=-1)


def score_spread(scores: Tensor) -> float:
    """How differently two proposals of an image are scored: 0 all alike, 1 each sure of another class. [ours]

    scores A (N, C) → the mean over all pairs of proposals of ½ Σ_c |A_i − A_j|, total variation.
    """
    pairs = len(scores) * (len(scores) - 1)
    return (torch.cdist(scores, scores, p=1).sum() / 2 / max(1, pairs)).item()


# ------------------------------------------------------------------------------------------ losses


def soft_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Σ m·t / Σ (m + t − m·t) of every proposal with every true mask: (N, p, q), (K, p, q) → (K, N) in [0, 1].

    Mask-aware loss. What belongs to no seen class (unseen, background, unlabelled) is outside every true mask.
    """
    masks, truth = masks.flatten(start_dim=1).float(), truth.flatten(start_dim=1).float()
    both = truth @ masks.T                                                                      # (K, N)
    return both / (truth.sum(dim=1)[:, None] + masks.sum(dim=1) - both).clamp(min=1e-6)


def min_max(quality: Tensor) -> Tensor:
    """Of each class the worst proposal becomes 0 and the best 1: (K, N) → (K, N). All equal: all 0."""
    low, high = quality.amin(dim=1, keepdim=True), quality.amax(dim=1, keepdim=True)
    return (quality - low) / (high - low).clamp(min=1e-6)


def mask_aware_loss(scores: Tensor, quality: Tensor) -> Tensor:
    """A proposal's score of class k should be how well it fits k's true mask. Mask-aware loss, SmoothL1.

    scores (K, N): A's columns of the K classes that are there; quality (K, N): their soft IoU, which is
    normalised by `min_max` and has no gradient. The paper normalises both sides. We follow the released code:
    the IoU alone, so that a score of 1 is asked for and not merely the largest one. K = 0: the loss is 0.
    """
    loss = F.smooth_l1_loss(scores, min_max(quality).detach(), reduction="sum")
    return loss / max(1, scores.numel())


def self_distillation(whole: Tensor, frozen: Tensor) -> Tensor:
    """Of the whole image the tuned CLIP should say what the frozen one says. SmoothL1 of two (1, C) softmaxes."""
    return F.smooth_l1_loss(whole, frozen.detach())


def total_loss(mask_aware: Tensor, distillation: Tensor, weight: float) -> Tensor:
    """L = L_ma + λ L_dis."""
    return mask_aware + weight * distillation


# ------------------------------------------------------------------------------------------ training


def learned(visual: VisionTransformer) -> list[torch.nn.Parameter]:
    """What trains: attention, ln_1 and ln_2 of every block, and ln_post; it is the one thing with a gradient."""
    parts = [part for block in visual.transformer.resblocks for part in (block.attn, block.ln_1, block.ln_2)]
    visual.requires_grad_(False)
    return [one.requires_grad_(True) for part in (*parts, visual.ln_post) for one in part.parameters()]


def true_masks(label: Tensor, seen: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The seen classes of a label (H, W), and their masks: (K,), (K, p, q) bool. Unseen ones are left out."""
    small = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    there = small.unique()
    there = there[there < seen]
    return there, small == there[:, None, None]


def train_step(tuned: VisionTransformer, frozen: VisionTransformer, image: Tensor, masks: Tensor, label: Tensor,
               query: Tensor, scale: float, recipe: Recipe) -> dict[str, Tensor]:
    """The losses of one image (3, H, W) with masks (N, p, q) and label; query (seen classes, D)."""
    classes, truth = true_masks(label, len(query), masks.shape[-2:])                            # (K,), (K, p, q)
    features = encode_proposals(tuned, image[None], masks[None], recipe.split)[0]               # z (N, D)
    scores = class_scores(features, query, scale)                                               # A (N, C)
    mask_aware = mask_aware_loss(scores[:, classes].T, soft_iou(masks, truth))                  # L_ma
    with torch.no_grad():
        of_frozen = class_scores(frozen(image[None]), query, scale)                             # (1, C)
    distillation = self_distillation(class_scores(tuned(image[None]), query, scale), of_frozen)     # L_dis
    return {"loss": total_loss(mask_aware, distillation, recipe.distillation_weight),
            "mask_aware": mask_aware, "distillation": distillation}


# ------------------------------------------------------------------------------------------ at test


def semantic_scores(scores: Tensor, masks: Tensor) -> Tensor:
    """semseg[c] = Σ_n A[n, c] · mask_n: (N, C), (N, p, q) → (C, p, q). Inference."""
    return torch.einsum("nc,npq->cpq", scores, masks.to(scores.dtype))


def seen_and_unseen(confusion: Tensor, seen: int) -> dict[str, float]:
    """mIoU of the seen and of the unseen classes and their harmonic mean, in percent. Pixels of all classes
    may be called by any class's name: a confusion matrix (C, C)."""
    iou = 100 * evaluate.class_iou(confusion)
    of_seen, of_unseen = iou[:seen].nanmean().item(), iou[seen:].nanmean().item()
    harmonic = 2 * of_seen * of_unseen / max(of_seen + of_unseen, 1e-9)
    return {"seen": round(of_seen, 2), "unseen": round(of_unseen, 2), "harmonic": round(harmonic, 2)}


@torch.no_grad()
def measure(setup: data.Setup, towers: dict[str, VisionTransformer], dataset, query: Tensor, propose: Callable,
            recipe: Recipe) -> dict[str, dict]:
    """Every tower's numbers over a dataset of labelled images, with the same proposals."""
    classes, scale = len(query), setup.clip_model.logit_scale.exp().item()
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in towers}
    spread, count = dict.fromkeys(towers, 0.0), 0
    for name, image, label in tqdm(torch.utils.data.DataLoader(dataset, batch_size=None,
                                                               num_workers=setup.workers), desc="measuring"):
        image = image.to(setup.device)
        masks = propose(name, image)
        count += len(masks)
        for tower, visual in towers.items():
            with machine.autocast(setup.device, setup.precision):
                features = encode_proposals(visual, image[None], masks[None], recipe.split)[0]
            scores = class_scores(features, query, scale)
            spread[tower] += score_spread(scores) / len(dataset)
            predicted = evaluate.predict(semantic_scores(scores, masks)[None], tuple(label.shape))
            confusion[tower] += evaluate.confusion_matrix(label, predicted.cpu(), classes)
    iou = {tower: (100 * evaluate.class_iou(one)).tolist() for tower, one in confusion.items()}
    return {tower: seen_and_unseen(one, seen_classes(classes)) | {
        "spread": round(spread[tower], 4), "proposals": round(count / len(dataset), 1),
        "per_class_iou": {name: None if value != value else round(value, 2)
                          for name, value in zip(setup.vocabulary.names, iou[tower])}}
            for tower, one in confusion.items()}


# ------------------------------------------------------------------------------------------ the run


def labelled(setup: data.Setup, split: str, recipe: Recipe) -> evaluate.LabelledImages:
    """The labelled images of a split. Toyland's training scenes have no label on disk: it is drawn anew."""
    images = setup.training_images if split == "train" else setup.validation_images
    labels, read_label = images, lambda path, size: world.scene("train", int(path.stem))[1].astype("int64")
    if setup.data != "toyland" or split == "val":
        labels = ground_truth.label_files(setup.data, setup.root, split, list(images))
        read_label = ground_truth.LabelReader(setup.data, len(setup.vocabulary))
    if not labels:
        raise ValueError(f"--data {setup.data}: expected labels of its {split} images, found none. python "
                         f"datasets/check.py --data {setup.data} says what is missing.")
    return evaluate.LabelledImages(images, labels, read_label, recipe.short_side,
                                   setup.clip_model.visual.patch_size)


def main(args: argparse.Namespace) -> dict[str, dict]:
    """Tune, measure frozen and tuned CLIP on validation images, write and print the numbers."""
    if args.data and is_folder(args.data):
        raise ValueError(f"--data {args.data}: expected a dataset whose labels are known, found a folder.")
    setup = data.open_setup(args)
    ground_truth.refuse_other_classes(setup.data, setup.vocabulary.names)
    recipe, query = data.recipe_for(setup, RECIPES, {}), rectify.query_of(setup)
    seen, scale = seen_classes(len(query)), setup.clip_model.logit_scale.exp().item()
    train, validation = labelled(setup, "train", recipe), labelled(setup, "val", recipe)
    propose, folder = proposer(setup, query, recipe, args.proposals), setup.folder("maft")
    frozen = setup.clip_model.visual
    tuned = copy.deepcopy(frozen)
    parameters = learned(tuned)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)

    def clip_gradients(*_) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)

    optimizer.register_step_pre_hook(clip_gradients)
    per_epoch = data.steps_per_epoch(len(train), recipe.batch_size)
    steps = recipe.epochs * per_epoch
    settings = setup.settings(SYSTEM, recipe) | {"proposals": args.proposals}
    header = setup.header("maft", SYSTEM, recipe) | {"unseen": ", ".join(setup.vocabulary.names[seen:])}
    with runs.Training(folder, "paper/maft", settings, header, tuned, optimizer, steps=steps,
                       steps_per_epoch=per_epoch, resume=args.resume, save_every=args.save_every) as training:
        for step, rows in enumerate(data.Batches(len(train), recipe.batch_size, training.first_step, steps,
                                                 args.seed), start=training.first_step):
            losses = []
            for epoch, row in rows:                 # one by one: every image has its own shape and number of masks
                name, image, label = train[row]
                image, label = image.to(setup.device), label.to(setup.device)
                masks = propose(name, image)
                if machine.seed_of(args.seed, "flip", epoch, row) % 2:
                    image, masks, label = image.flip(-1), masks.flip(-1), label.flip(-1)
                with machine.autocast(setup.device, setup.precision):
                    losses.append(train_step(tuned, frozen, image, masks, label, query[:seen], scale, recipe))
            mean = {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
            training.descend(mean["loss"], recipe.learning_rate * (1 - step / steps) ** recipe.poly_power,
                             [train.items[row][0] for _, row in rows])
            training.done(**{name: loss.item() for name, loss in mean.items()})
    metrics = measure(setup, {"frozen": frozen, "tuned": tuned.eval()}, validation, query, propose, recipe)
    for tower, numbers in metrics.items():
        numbers["fingerprint"] = {
            "stage": tower, "system": SYSTEM.name, "data": setup.data, "images": len(validation),
            "classes": setup.vocabulary.names, "precision": setup.precision, "clip": setup.fingerprint,
            "proposals": args.proposals, "weights": sha256(folder / "checkpoint.pt")[:16]}
    files.write_json(folder / "metrics.json", metrics)
    print(f"\n{setup.data}: {len(validation)} images, {seen} seen and {len(query) - seen} unseen classes, "
          f"{metrics['tuned']['proposals']:.0f} proposals an image ({args.proposals})\n"
          f"{'':14}{'seen':>8}{'unseen':>8}{'harmonic':>10}{'spread of scores':>18}   (mIoU in percent)")
    for tower, one in metrics.items():
        print(f"{tower + ' CLIP':14}{one['seen']:8.1f}{one['unseen']:8.1f}{one['harmonic']:10.1f}"
              f"{one['spread']:18.3f}")
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, metrics.json")
    return metrics


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
