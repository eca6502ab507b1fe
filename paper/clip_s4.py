"""CLIP-S4 (He et al., CVPR 2023): a network whose pixels are points of CLIP's space, taught without labels.

    python paper/clip_s4.py                    Toyland: offline, four minutes of one core
    python paper/clip_s4.py --data voc         PASCAL VOC 2012 under ./data; so context, ade, cityscapes, coco

No code of it was released. What its paper leaves open, or we do not know of it, is marked [ours]: a number
of ours is that of a re-implementation with our schedule. Reads images, class names and a frozen CLIP, no
label of any kind. Writes runs/<data>/clip_s4/.

    image ──► regions (superpixels) ─────────────┐
      ├──CLIP──► features Z ──┐  two views:      ▼
      │                       ├─ crop, flip ──► c_s of a segment s ── nearest prototype: its pseudo-label
      └───────────────────────┴─ + colours ──► network ──► z_p ── segments v_s         │ L_semantic
                                                            └─ L_contrast   └─ L_embedding (c_s)

    z_p: unit vector of a pixel · v_s: normalised mean of z_p over a segment · c_s: the same of CLIP's Z
    B images · V = 2B views · S segments of all views · P pixels of all views · C known classes · U unknown
    D joint dimension (512) · H,W pixels of a crop · h,w the network's grid (H/8, W/8): its places are the
    pixels of the losses
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    return common.parser(__doc__, "training", "split")


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import rectify
from distill import DeepLabV2, System
from harness import files, machine, runs
from rectify import query_logits

STAGE = "clip_s4"
SYSTEM = System(name="clip-s4", command="python paper/clip_s4.py")      # as a checkpoint remembers it

# ---------------------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number: those of photographs, with their sources. [hsg]: as in HSG and SPML, its family."""
    dense_path: Literal["value", "residual", "vanilla"] = "residual"    # of Z; see CLIP.encode_dense
    backbone: Literal["small", "resnet50", "resnet101"] = "resnet50"    # [hsg]; DeepLab V2's head is [ours]
    regions: tuple[int, int] = (6, 6)       # [ours] superpixels of an image: rows, columns at the start
    region_colour: float = 0.25             # [ours] weight of colour beside place in a superpixel
    clusters: tuple[int, int] = (4, 4)      # [hsg] of a view's pixels
    cluster_place: float = 0.5              # [ours] weight of place beside z in a cluster
    iterations: int = 15                    # [hsg] of k-means
    view_scale: tuple[float, float] = (0.5, 0.85)   # [ours] a view's share of the crop's height and width
    view: tuple[int, int] = (336, 336)      # [ours] a view's pixels: about as large as the share it shows
    jitter: float = 0.4                     # [ours] strength of the change of colours in a view
    contrast_scale: float = 16.0            # [hsg] κ
    semantic_scale: float = 100.0           # [ours] 1/τ, as CLIP's own
    contrast_weight: float = 0.01           # [ours] embedding consistency has weight 1. The scales stand in
    semantic_weight: float = 0.01           # [ours] the gradients too, so these count 16 and 100 times
    most_similar: int = 32                  # [ours] m: segments whose mean is the prototype of a known class
    unknown: int = 128                      # [ours] U: prototypes of unknown classes
    prototype_rate: float = 0.01            # [ours] how far an unknown one is pulled in a step
    prototype_images: int = 2000            # [ours] images whose segments are looked at for prototypes
    short_side: int = 512                   # [ours] pixels
    crop: tuple[int, int] = (512, 512)      # [ours] height, width: no larger, so that nothing is padded
    batch_size: int = 8                     # [ours] images, each in two views
    learning_rate: float = 0.03             # [ours]
    momentum: float = 0.9                   # [hsg] SGD
    weight_decay: float = 5e-4              # [hsg]
    poly_power: float = 0.9                 # [hsg]
    epochs: int = 20                        # [ours]


RECIPES = {name: Recipe() for name in ("voc", "context", "context-voc-first", "ade", "cityscapes", "coco",
                                       "folder")}
RECIPES["toyland"] = Recipe(dense_path="value", backbone="small", regions=(4, 4), short_side=144,
                            crop=(144, 192), view=(96, 128), epochs=4)
RECIPES["toyland-things"] = RECIPES["toyland"]

# ---------------------------------------------------------------------------- regions, views, segments


def spherical_kmeans(vectors: Tensor, grid: tuple[int, int], iterations: int) -> Tensor:
    """Nearest centre of every place, by cosine: (B, K, h, w) → (B, h, w) int64 in 0..rows·columns − 1.

    The centres start as means over a grid of (rows, columns) and are means of their places after every
    iteration. One that loses all of its places has cosine 0 with every place from then on.
    """
    points = F.normalize(vectors.float(), dim=1).flatten(2)                                 # (B, K, hw)
    centres = F.adaptive_avg_pool2d(vectors.float(), grid).flatten(2)                       # (B, K, n)
    for _ in range(iterations):
        nearest = torch.einsum("bkp,bkn->bpn", points, F.normalize(centres, dim=1)).argmax(dim=2)   # (B, hw)
        centres = points @ F.one_hot(nearest, centres.shape[2]).to(points)                  # (B, K, n)
    return nearest.view(-1, *vectors.shape[-2:])


def place(like: Tensor) -> Tensor:
    """xy: where a place lies in its image, −1 to 1 along both sides. (B, …, h, w) → (B, 2, h, w)."""
    y, x = (torch.linspace(-1, 1, side, device=like.device) for side in like.shape[-2:])
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(len(like), 2, -1, -1)


def regions_of(images: Tensor, recipe: Recipe) -> Tensor:
    """Superpixels: visually coherent regions, k-means of [colour; xy; 2]. (B, 3, H, W) → (B, H/4, W/4) int64.

    [ours] The paper's family takes regions from a hierarchy of contours. The constant keeps what
    normalisation would lose, the length of the rest. No two images share a region.
    """
    colour = recipe.region_colour * F.avg_pool2d(images, 4)                                 # (B, 3, H/4, W/4)
    vectors = torch.cat([colour, place(colour), torch.full_like(colour[:, :1], 2.0)], dim=1)
    regions = spherical_kmeans(vectors, recipe.regions, recipe.iterations)
    return regions + math.prod(recipe.regions) * torch.arange(len(images)).to(regions)[:, None, None]


def draw_views(count: int, scale: tuple[float, float], noise: torch.Generator) -> Tensor:
    """Random crops and flips as affine maps of view places into the image's: (count, 2, 3)."""
    draw = torch.rand(count, 4, generator=noise, device=noise.device)
    size = scale[0] + (scale[1] - scale[0]) * draw[:, 0]                        # a side's share
    x, y = ((2 * draw[:, i] - 1) * (1 - size) for i in (1, 2))                  # the crop's centre
    flip, none = torch.where(draw[:, 3] < 0.5, -1.0, 1.0), torch.zeros_like(x)
    return torch.stack([size * flip, none, x, none, size, y], dim=1).view(count, 2, 3)


def seen_through(views: Tensor, maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Maps of whole images (V, K, h', w'), of any grid, cut out and turned as views (V, 2, 3): (V, K, *size).

    So CLIP looks at the image as it is, and what it sees goes through the view's transform.
    """
    grid = F.affine_grid(views, [len(views), 1, *size], align_corners=False)                # (V, *size, 2)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="border", align_corners=False)


def recoloured(images: Tensor, strength: float, noise: torch.Generator) -> Tensor:
    """Other contrast and, channel by channel, other brightness for every image. (V, 3, H, W), normalised."""
    draw = 2 * torch.rand(len(images), 4, 1, 1, generator=noise, device=noise.device) - 1
    return images * (1 + strength * draw[:, :1]) + strength * draw[:, 1:]


@torch.no_grad()
@machine.in_float32
def segments_of(embeddings: Tensor, regions: Tensor, recipe: Recipe) -> Tensor:
    """Segments: k-means of [z; xy] in every view, split where regions meet.

    embeddings (V, D, h, w); regions (V, h, w) int64 → (V, h, w) int64 in 0..S−1, none of them empty.
    """
    vectors = torch.cat([embeddings, recipe.cluster_place * place(embeddings)], dim=1)
    cluster = spherical_kmeans(vectors, recipe.clusters, recipe.iterations)                 # (V, h, w)
    view = torch.arange(len(cluster)).to(cluster)[:, None, None]
    own = (view * math.prod(recipe.clusters) + cluster) * (regions.max() + 1) + regions
    return own.unique(return_inverse=True)[1]


def segment_means(embeddings: Tensor, segments: Tensor) -> Tensor:
    """v_s, or c_s: the normalised mean over every segment. (P, D), (P,) int64 in 0..S−1 → (S, D)."""
    sums = embeddings.new_zeros(int(segments.max()) + 1, embeddings.shape[1])
    return F.normalize(sums.index_add(0, segments, embeddings), dim=1)


# ---------------------------------------------------------------------------- the losses


@machine.in_float32
def contrastive_loss(pixels: Tensor, means: Tensor, pixel_regions: Tensor, segment_regions: Tensor,
                     scale: float) -> Tensor:
    """A pixel is like the segments of its own region, and unlike all others of the batch.

        − log Σ_{s ∈ S+} exp(κ z_p·v_s) / Σ_{s ∈ S+ ∪ S−} exp(κ z_p·v_s), the mean over pixels p

    pixels z (P, D) and means v (S, D) of unit length; pixel_regions (P,) and segment_regions (S,): the region
    of the image, the same in both of its views. S+ are the segments of p's region, also in the other view;
    S− are all other segments. κ = scale. As a difference of two log-sum-exps nothing overflows.
    """
    logits = scale * pixels @ means.T                                                       # (P, S)
    others = pixel_regions[:, None] != segment_regions                                      # (P, S)
    own = logits.masked_fill(others, -torch.inf)                # its own segment is always left
    return (logits.logsumexp(dim=1) - own.logsumexp(dim=1)).mean()


@machine.in_float32
def embedding_loss(means: Tensor, clip_means: Tensor) -> Tensor:
    """A segment stays where CLIP sees it: 1 − cos(v_s, c_s), the mean over segments [ours: the distance].

    Both (S, D), unit length. The gradient reaches the network alone: CLIP is frozen.
    """
    return 1 - (means * clip_means).sum(dim=1).mean()


@machine.in_float32
def nearest_prototype(clip_means: Tensor, prototypes: Tensor) -> Tensor:
    """Pseudo-label of a segment: the prototype most like c_s, known (0..C−1) or not. (S, D) → (S,) int64."""
    return (clip_means @ prototypes.T).argmax(dim=1)


@machine.in_float32
def semantic_loss(means: Tensor, prototypes: Tensor, pseudo_label: Tensor, scale: float) -> Tensor:
    """Cross-entropy of 1/τ v·prototype over all prototypes. scale = 1/τ [ours: 100, as CLIP's own].

    means v (S, D), prototypes (C + U, D), pseudo_label (S,) → a scalar.
    """
    return F.cross_entropy(scale * means @ prototypes.T, pseudo_label)


# ---------------------------------------------------------------------------- prototypes


def known_prototypes(segments: Tensor, query: Tensor, most_similar: int) -> Tensor:
    """Of each class, the mean of the m segments that are most like its text; fixed for the whole training.

    segments (N, D), query W_q (C, D), unit length → (C, D), unit length. The text itself lies too far from
    what CLIP sees in pixels.
    """
    best = (segments @ query.T).topk(min(most_similar, len(segments)), dim=0).indices       # (m, C)
    return F.normalize(segments[best].mean(dim=0), dim=1)


@machine.in_float32
def pulled(prototypes: Tensor, clip_means: Tensor, pseudo_label: Tensor, known: int, rate: float) -> Tensor:
    """Unknown prototypes, each pulled towards the mean of the segments that have it as their pseudo-label.

    prototypes (C + U, D), of which the first `known` = C stay; rows without a segment stay too. [ours: a
    moving mean of CLIP's c_s] Rows keep length one.
    """
    members = F.one_hot(pseudo_label, len(prototypes)).to(clip_means)                       # (S, C + U)
    mean = F.normalize(members.T @ clip_means, dim=1)                                   # zeros where empty
    moves = members.any(dim=0) & (torch.arange(len(prototypes), device=mean.device) >= known)
    towards = F.normalize((1 - rate) * prototypes + rate * mean, dim=1)
    return torch.where(moves[:, None], towards, prototypes)


@torch.no_grad()
def first_prototypes(setup: data.Setup, query: Tensor, recipe: Recipe, dataset: data.TrainingImages,
                     seed: int) -> Tensor:
    """The prototypes at the start: known ones, and U segments of the training images. (C + U, D).

    Segments of CLIP's own features, since the network has not learned any yet [ours]; no more than those of
    `prototype_images` images.
    """
    draw, found = torch.Generator().manual_seed(machine.seed_of(seed, "prototypes")), []
    rows = torch.randperm(len(dataset), generator=draw)[:recipe.prototype_images].tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=recipe.batch_size, num_workers=setup.workers,
                                         sampler=[(0, row) for row in rows])
    for images, _ in loader:
        images = images.to(setup.device)
        with machine.autocast(setup.device, setup.precision):
            features = setup.clip_model.encode_dense(images, recipe.dense_path)             # (B, D, h', w')
        regions = F.interpolate(regions_of(images, recipe)[:, None].float(), features.shape[-2:])[:, 0]
        segments = segments_of(features, regions.long(), recipe)
        found.append(segment_means(rows_of(features), segments.flatten()))
    found = torch.cat(found)                                                                # (N, D)
    some = torch.randint(len(found), (recipe.unknown,), generator=draw)
    return torch.cat([known_prototypes(found, query, recipe.most_similar), found[some.to(found.device)]])


def rows_of(maps: Tensor) -> Tensor:
    """(V, D, h, w) → (P, D), the places of all views one after the other."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


# ---------------------------------------------------------------------------- training


class Embedder(DeepLabV2):
    """The network of distill.py, images (B, 3, H, W) → z (B, D, h, w), and the prototypes (C + U, D)."""

    def __init__(self, backbone: str, prototypes: Tensor, pretrained: bool = True):
        super().__init__(backbone, prototypes.shape[1], pretrained)
        self.register_buffer("prototypes", prototypes)


def train_step(model: Embedder, features: Tensor, images: Tensor, known: int, recipe: Recipe,
               noise: torch.Generator) -> dict[str, Tensor]:
    """The losses of one batch, images (B, 3, H, W) with CLIP's features Z (B, D, h', w'): "loss" is the
    total. Pulls the unknown prototypes."""
    regions = regions_of(images, recipe)                                                    # (B, H/4, W/4)
    views = draw_views(2 * len(images), recipe.view_scale, noise)                           # (V, 2, 3)
    images, features, regions = (one.repeat(2, 1, 1, 1) for one in (images, features, regions[:, None]))
    seen = recoloured(seen_through(views, images, recipe.view), recipe.jitter, noise)

    embeddings = model(seen)                                                                # z (V, D, h, w)
    grid = embeddings.shape[-2:]
    clip_seen = rows_of(seen_through(views, features.float(), grid))                        # (P, D)
    regions = seen_through(views, regions.float(), grid, "nearest")[:, 0].long()           # (V, h, w)
    segments, regions = segments_of(embeddings, regions, recipe).flatten(), regions.flatten()   # (P,)
    pixels = rows_of(embeddings)                                                            # z (P, D)
    means, clip_means = segment_means(pixels, segments), segment_means(clip_seen, segments)     # v, c (S, D)
    segment_regions = regions.new_zeros(len(means)).scatter(0, segments, regions)           # (S,)

    contrast = contrastive_loss(pixels, means, regions, segment_regions, recipe.contrast_scale)
    embedding = embedding_loss(means, clip_means)
    pseudo_label = nearest_prototype(clip_means, model.prototypes)                          # (S,)
    semantic = semantic_loss(means, model.prototypes, pseudo_label, recipe.semantic_scale)
    model.prototypes = pulled(model.prototypes, clip_means, pseudo_label, known, recipe.prototype_rate)
    total = recipe.contrast_weight * contrast + embedding + recipe.semantic_weight * semantic
    return {"loss": total, "contrast": contrast, "embedding": embedding, "semantic": semantic}


def main(args: argparse.Namespace) -> data.Setup:
    """Train; the result lies in `folder("clip_s4")` of the returned setup."""
    setup = data.open_setup(args, split=args.split)
    recipe, query = data.recipe_for(setup, RECIPES, {}), rectify.query_of(setup)
    ids = list(setup.training_images)
    per_epoch = data.steps_per_epoch(len(ids), recipe.batch_size)
    steps = recipe.epochs * per_epoch
    augment = data.augmentation(recipe.short_side, recipe.crop, scale=(1.0, 1.0), distort=False)
    dataset = data.TrainingImages(setup.training_images, augment, args.seed)
    torch.manual_seed(machine.seed_of(args.seed, STAGE))
    model = Embedder(recipe.backbone, first_prototypes(setup, query, recipe, dataset, args.seed))
    model = model.to(setup.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
                                weight_decay=recipe.weight_decay)
    noise = torch.Generator(setup.device)
    with runs.Training(setup.folder(STAGE), STAGE, setup.settings(SYSTEM, recipe),
                       setup.header(STAGE, SYSTEM, recipe), model, optimizer, steps=steps,
                       steps_per_epoch=per_epoch, resume=args.resume, save_every=args.save_every) as training:
        batches = data.training_batches(dataset, batch_size=recipe.batch_size, first_step=training.first_step,
                                        steps=steps, seed=args.seed, workers=setup.workers)
        for step, (images, rows) in enumerate(batches, start=training.first_step):
            noise.manual_seed(machine.seed_of(args.seed, "views", step))
            images = images.to(setup.device, non_blocking=True)
            with machine.autocast(setup.device, setup.precision):
                with torch.no_grad():
                    features = setup.clip_model.encode_dense(images, recipe.dense_path)             # Z
                losses = train_step(model, features, images, len(query), recipe, noise)
            rate = recipe.learning_rate * (1 - step / steps) ** recipe.poly_power
            training.descend(losses["loss"], rate, [ids[row] for row in rows])
            training.done(**losses)
    return setup


# ---------------------------------------------------------------------------- inference, measuring


def predictors(setup: data.Setup, evaluate) -> dict:
    """Inference: the best class of a pixel by cosine with the words, or with the known classes' prototypes.

    By the name of its row, beside MaskCLIP. Every class that is measured is a known one here, since it has a
    name: no unknown prototype has to be matched with it.
    """
    checkpoint = runs.load(setup.folder(STAGE) / "checkpoint.pt", STAGE)
    recipe, query = runs.recipe_in(checkpoint, Recipe), rectify.query_of(setup)
    model = Embedder(recipe.backbone, torch.empty_like(checkpoint["weights"]["prototypes"]), pretrained=False)
    runs.load_weights(model, checkpoint)
    model = model.to(setup.device).eval()
    text, prototypes = (evaluate.Predictor(lambda images, rows=rows: query_logits(model(images), rows),
                                           recipe.short_side, None, SYSTEM.name)
                        for rows in (query, model.prototypes[:len(query)]))
    return {"MaskCLIP": evaluate.predictors(setup, query, ["maskclip"])["maskclip"],
            "CLIP-S4 by text": text, "CLIP-S4 by prototype": prototypes}


def report(setup: data.Setup, evaluate) -> None:
    """Measure both ways of inference beside MaskCLIP; write metrics.json (if there are labels), preview.png.

    The module `evaluate`, which reads labels, is handed in: nothing that this file imports can.
    """
    folder, found, truth = setup.folder(STAGE), predictors(setup, evaluate), evaluate.ground_truth
    labels = truth.true_label_files(setup.data, setup.root, setup.split, list(setup.evaluation_images)) \
        if truth.labels_fit(setup.data, setup.vocabulary.names) else {}
    if labels:
        measured = {name: evaluate.measure(setup, {"distill": one}, labels)["distill"]      # as any student
                    for name, one in found.items()}
        made_by = evaluate.fingerprint(setup, STAGE, found["CLIP-S4 by prototype"], len(labels))
        print(f"\n{setup.data}: {evaluate.images_measured(made_by)}\n"
              f"{'':22}   mIoU  pixel accuracy   (percent)")
        for name, numbers in measured.items():
            print(f"{name:22}{numbers['miou']:7.1f}{numbers['pixel_accuracy']:16.1f}")
        _, text, prototypes = measured.values()
        files.write_json(folder / "metrics.json",
                         prototypes | {"miou_text": text["miou"], "fingerprint": made_by})
    evaluate.picture_sheet(setup, found, labels, folder / "preview.png")
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json, log.jsonl, "
          f"{'metrics.json, ' if labels else ''}preview.png")


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        finished = main(FLAGS)
        import evaluate                   # measuring opens labels: after training, and in no file that trains
        report(finished, evaluate)
