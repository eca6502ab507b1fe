"""Stage 1 of ReCLIP++ (Sec. III-B to III-D): learn CLIP's bias without a label, subtract it, decode rectified masks.

    python rectify.py                          Toyland: offline, two minutes on a laptop
    python rectify.py --data voc               PASCAL VOC 2012 under ./data, on a GPU; so context, ade, cityscapes, coco
    python rectify.py --data photos --classes names.txt      your own images and words

Reads images, class names and a frozen CLIP. Trains three things: 73 prompt vectors (which classes CLIP prefers), a
projection of the positional embedding (where it prefers them), and a small decoder. Sees no label of any kind: labels,
where they exist, are opened after training, by evaluate.py. Writes runs/<data>/rectify/.

The data flow, which is also the order of this file:

    image ──CLIP──► features Z ──── query logits M_q ──(−)── M ── decoder ── M_o ── Gumbel-Softmax ── masks
    class names ──► query W_q ───────────┘              │Eq. 3    Eq. 4              Eq. 5             │
    73 vectors + class names ──► reference W_r ┐ Eq. 1  │                                              │
    positional embedding ──► projection W_p ───┴─ bias logits M_b  Eq. 2                                 │
    windows of the image ──CLIP──► hypothesis H  Eq. 6 ─────────────────── contrastive loss  Eq. 7 ◄───┘

    B images · C classes · D joint dimension (512) · E ViT width (768) · Et text width (512)
    H,W pixels · h,w patches · n = h·w · L learned prompt vectors (73)
"""

from __future__ import annotations

import argparse
import math

import runs

ABLATIONS = ("without-decoder", "whole-image", "entangled", "learnable-query", "addition", "fine-tuned", "no-bias",
             "loss-cosine", "loss-area", "no-bias+loss-cosine", "no-bias+loss-area", "reclip", "reclip+decoder",
             "reclip+decoder+windows")                                          # see ablations.py


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__)
    parser.add_argument_group("ablation").add_argument(
        "--ablation", choices=("none", *ABLATIONS), metavar="NAME", default=argparse.SUPPRESS,
        help=f"train ReCLIP++ with one part replaced, or ReCLIP: {', '.join(ABLATIONS)} (default: none)")
    hypothesis = parser.add_argument_group("hypothesis (Eq. 6)")
    hypothesis.add_argument("--vote-threshold", type=runs.share, metavar="T", default=argparse.SUPPRESS,
                            help="t: a class needs more than this share of an image's windows. 0: one window is enough "
                                 "(default: the dataset's recipe)")
    hypothesis.add_argument("--window-ratio", type=runs.ratio, metavar="R", default=argparse.SUPPRESS,
                            help="r: a window's share of the image's height and width; cost grows as 1/r² (default: the "
                                 "dataset's recipe)")
    parser.add_argument_group("speed").add_argument(
        "--cache-features", type=runs.gigabytes, metavar="GB", default=argparse.SUPPRESS,
        help="let CLIP look at every image once, under one augmentation, and keep what it sees in at most so many GB of memory "
             "and disk. Another training, with less variety")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import data
from world import World, open_world, recipe_for, refuse_another_folder, stamps_of

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of stage 1. The defaults are those of VOC, with their sources; RECIPES says what differs."""
    dense_path: str = "residual"            # [code] the way through CLIP's last block (see CLIP.encode_dense)
    prompt_length: int = 73                 # [paper] 77 = start + 73 + two name tokens + end
    window_ratio: float = 1 / 6             # [paper] r of Eq. 6
    vote_threshold: float = 0.07            # [paper] t of Eq. 6
    mask_scale: float = 100.0               # [code] factor on M_o before Gumbel-Softmax
    mask_tau: float = 1.0                   # [code] τ1 of Eq. 5
    loss_scale: float = 100.0               # [code] 1/τ of Eq. 7: exp(logit_scale), which is 100 in OpenAI's CLIPs
    short_side: int = 336                   # [code] pixels
    crop: tuple[int, int] = (336, 336)      # [code] height, width
    scale: tuple[float, float] = (0.5, 2.0)   # [code] random scale of the short side
    distort: bool = True                    # [code] photometric distortion
    batch_size: int = 1                     # [code]
    learning_rate: float = 0.01             # [paper]
    momentum: float = 0.9                   # [paper]
    weight_decay: float = 5e-4              # [paper]
    poly_power: float = 0.9                 # [paper]
    horizon: int = 200                      # [code] epochs at which the poly schedule would reach zero
    epochs: int = 50                        # [code] epochs after which training stops
    augment_once: bool = False              # [ours] --cache-features: one augmentation of an image for the whole training
    ablation: str = "none"                  # what is replaced by what ablations.py has in its place; none: ReCLIP++


RECIPES = {
    "voc": Recipe(),
    # [paper] t; [code] horizon, epochs, short side and crop, and for Cityscapes batch and rate. All else as for VOC.
    "context": Recipe(vote_threshold=0.0, short_side=448, crop=(480, 480), horizon=400, epochs=50),
    "ade": Recipe(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=600, epochs=100),
    "cityscapes": Recipe(vote_threshold=0.07, short_side=448, crop=(512, 512), batch_size=16, learning_rate=0.16,
                         horizon=300, epochs=50),
    "coco": Recipe(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=800, epochs=100),
    # [ours] Images of unknown kind: VOC's numbers, but any class that wins one window may be there.
    "folder": Recipe(vote_threshold=0.0),
    # [ours] Toyland's scenes at 1.5 times their size, larger windows and batches, to fit two cores. The scales of masks
    # and loss are smaller than with OpenAI's CLIP, whose logit_scale ended at 100 (the small one's: 18). With mask_scale=3 or
    # more a class that loses to its neighbour early (car to bus) is never drawn again and dies; with loss_scale=20 or
    # more large stuffs are sure of themselves too soon and leave their doubtful patches to things.
    "toyland": Recipe(dense_path="value", window_ratio=1 / 4, vote_threshold=0.05, mask_scale=2.0, loss_scale=12.0,
                      short_side=144, crop=(144, 192), scale=(1.0, 1.0), distort=False, batch_size=8, learning_rate=0.1,
                      horizon=8, epochs=8),
}
RECIPES["context-voc-first"] = RECIPES["context"]           # the same images; only the label files number classes otherwise

# ------------------------------------------------------------------------------------------ what CLIP says


@torch.no_grad()
def query_features(clip_model: clip.CLIP, vocabulary: data.Vocabulary) -> Tensor:
    """W_q: what CLIP expects each class to look like. (C, D), unit rows. Sec. III-A.

    Every name of a class in every template is encoded and normalised; their mean, normalised again, is the query.
    """
    rows = []
    for names in tqdm(vocabulary.synonyms, desc="query features", unit="class", leave=False):
        sentences = [template.format(name) for name in names for template in vocabulary.templates]
        features = clip_model.encode_text(clip.tokenize(sentences).to(clip_model.device)).float()    # (templates, D)
        rows.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


@runs.in_float32
def query_logits(features: Tensor, query: Tensor) -> Tensor:
    """M_q = Z W_qᵀ: cosine of every patch with every class, MaskCLIP's prediction. Sec. III-A.

    features (B, D, h, w) and query (C, D), both of unit length → (B, C, h, w) in [−1, 1].
    """
    return torch.einsum("bdhw,cd->bchw", features, query)


# ------------------------------------------------------------------------------------------ bias extraction


def reference_features(clip_model: clip.CLIP, prompt: Tensor, class_names: list[str]) -> Tensor:
    """W_r: the text features of `[v_1]…[v_L][CLS]`, what CLIP is drawn to when no picture speaks. Eq. 1, Sec. III-B.

    prompt (L, Et), learned and shared by all classes → (C, D). Divided by the norm of the whole matrix, not row by row,
    as the released code does: rows keep their relative length, and all together have length one. The choice sets the
    scale of the bias; weights trained with one are worthless under the other (a third party measured 84.5 → 28.4 mIoU).
    """
    reference = clip_model.encode_prompt(prompt, class_names).float()
    return reference / reference.norm()


@runs.in_float32
def bias_logits(positions: Tensor, projection: nn.Conv2d, reference: Tensor) -> Tensor:
    """M_b = W_p W_rᵀ: how much too often CLIP says a class at a place, whatever the picture. Eq. 2, Sec. III-B.

    positions (E, h, w): CLIP's positional embedding on the image's grid; projection: a 1×1 convolution E → D that makes
    it W_p; reference (C, D) = W_r → (C, h, w). It depends on parameters and grid alone: at test it is computed once.
    """
    return torch.einsum("dhw,cd->chw", projection(positions[None])[0], reference)


# ------------------------------------------------------------------------------------------ rectified masks


def subtract_bias(query: Tensor, bias: Tensor) -> Tensor:
    """M = M_q − M_b: what is left when the bias is taken away. Eq. 3, Sec. III-C. (B, C, h, w), (C, h, w) → (B, C, h, w)."""
    return query - bias


class Decoder(nn.Module):
    """M_o = BN(conv5×5(Z ‖ M)): smooths logits over a neighbourhood, with the features as a guide. Eq. 4, Sec. III-C."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(dim + classes, classes, kernel_size=5, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(classes)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")               # [code]; no ReLU follows

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """features (B, D, h, w), logits (B, C, h, w) → M_o (B, C, h, w)."""
        return self.norm(self.conv(torch.cat([features, logits], dim=1)))


def rectified_masks(decoded: Tensor, scale: float, tau: float, uniform: Tensor) -> Tensor:
    """M̂ = Gumbel-Softmax(M_o, τ1): one class per patch, drawn at random, yet with a gradient. Eq. 5, Sec. III-C.

    decoded (B, C, h, w); uniform: numbers in [0, 1) of the same shape, the only randomness. Returns (B, C, h, w), exactly
    one 1 per patch along dim 1; in the backward pass it behaves like the soft distribution (straight-through).
    Written out instead of `F.gumbel_softmax`, which draws its noise from the global generator: here the caller draws it,
    as a function of (seed, step), so that a resumed run repeats it.
    """
    exponential = (-uniform.clamp(min=1e-10).log()).clamp(min=1e-10)           # the clamps keep both logarithms finite
    gumbel = -exponential.log()
    soft = ((scale * decoded.float() + gumbel) / tau).softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(dim=1, index=soft.argmax(dim=1, keepdim=True), value=1.0)
    return hard + (soft - soft.detach())                    # value of hard (the bracket is exactly 0), gradient of soft


# ------------------------------------------------------------------------------------------ the hypothesis


def windows(image: Tensor, ratio: float) -> Tensor:
    """Sliding windows of `ratio` times the image's height and width, half a window apart. Eq. 6, Sec. III-D.

    image (3, H, W) → (k², 3, H·ratio, W·ratio), k = 2/ratio − 1 places a side: 11 × 11 for ratio 1/6. Ratio 1 gives the image.
    """
    _, H, W = image.shape
    places = 1 if ratio >= 1 else max(2, round(2 / ratio) - 1)
    height, width = max(1, round(H * ratio)), max(1, round(W * ratio))
    tops = [round(i * (H - height) / max(1, places - 1)) for i in range(places)]
    lefts = [round(i * (W - width) / max(1, places - 1)) for i in range(places)]
    return torch.stack([image[:, top:top + height, left:left + width] for top in tops for left in lefts])


def window_votes(window_features: Tensor, query: Tensor) -> Tensor:
    """f(k): the share of an image's windows whose best class is k. Eq. 6, Sec. III-D.

    window_features (..., k², D) from CLIP's global encoder, any length; query (C, D) → (..., C), sums to one.
    """
    best = (window_features @ query.T).argmax(dim=-1)                           # (..., k²)
    return F.one_hot(best, len(query)).float().mean(dim=-2)


def multi_label_hypothesis(votes: Tensor, threshold: float) -> Tensor:
    """H = {k : f(k) > t}: the classes that an image may contain. Eq. 6, Sec. III-D.

    votes (B, C), rows summing to one → (B, C) bool. Where no class passes, the one with most votes stands alone.
    """
    best = F.one_hot(votes.argmax(dim=-1), votes.shape[-1]).bool()
    return (votes > threshold) | best                                           # if any class passes, the best one does


@torch.no_grad()
def count_votes(clip_model: clip.CLIP, query: Tensor, images: dict[str, Path], short_side: int, ratio: float,
                precision: str, workers: int, windows_per_batch: int | None = None) -> dict[str, Tensor]:
    """f(k) of every image: id → (C,). One pass over the training images; windows of small images share a batch, those of an
    image that has more than `windows_per_batch` come in several."""
    device, size = clip_model.device, clip_model.visual.input_resolution
    if windows_per_batch is None:                   # a CPU is faster while all of it lies in its cache; what fills a GPU
        windows_per_batch = 32 if device.type == "cpu" else 1024
    loader = torch.utils.data.DataLoader(WholeImages(images, short_side), batch_size=None, num_workers=workers)
    votes: dict[str, Tensor] = {}
    waiting: list[tuple[str, Tensor]] = []

    def vote() -> None:
        together = torch.cat([resized for _, resized in waiting])
        pieces = together.chunk(-(-len(together) // windows_per_batch))
        with runs.autocast(device, precision):
            features = torch.cat([clip_model.encode_image(piece) for piece in pieces]).float()
        counts = [len(resized) for _, resized in waiting]
        for (name, _), of_image in zip(waiting, features.split(counts)):
            votes[name] = window_votes(of_image, query).cpu()
        waiting.clear()

    for name, image in tqdm(loader, total=len(images), desc="hypotheses", unit="image"):
        resized = F.interpolate(windows(image.to(device), ratio), size=(size, size), mode="bicubic", antialias=True)
        waiting.append((name, resized))
        if len(waiting) * len(resized) >= windows_per_batch:
            vote()
    if waiting:
        vote()
    return votes


class WholeImages(torch.utils.data.Dataset):
    """Images as they are, resized to one short side: `(id, image (3, h, w))`. No labels, no augmentation."""

    def __init__(self, images: dict[str, Path], short_side: int):
        self.ids, self.paths, self.short_side = list(images), list(images.values()), short_side

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        image = data.short_side_to(data.read_image(self.paths[index]), self.short_side)
        return self.ids[index], data.to_tensor(image)


# ------------------------------------------------------------------------------------------ the loss


@runs.in_float32
def contrastive_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """What the mask of class k covers should look like k to CLIP, and like no other class. Eq. 7, Sec. III-D.

    features (B, D, h, w) of unit length; masks (B, C, h, w), 1 where a patch is the class's; query (C, D) of unit length;
    hypothesis (B, C) bool, at least one class per image; scale = 1/τ. Returns a scalar.

    Z_g = mean over all n patches of mask × feature, (B, C, D); S = Z_g W_qᵀ (B, C, C); the loss is the cross-entropy of
    row k of scale·S against k, averaged over k ∈ H, then over images.
    The paper writes S as a cosine. We follow the released code, which divides by n but does not normalise Z_g again, so
    that a logit grows with the mask's area: an empty mask then says nothing (all logits 0, cross-entropy ln C) and still
    has a finite gradient that draws the most fitting patches in, where the cosine of a zero vector has none of use.
    """
    pooled = torch.einsum("bchw,bdhw->bcd", masks, features) / masks[0, 0].numel()                # Z_g (B, C, D)
    log_probability = (scale * pooled @ query.T).log_softmax(dim=-1)                              # (B, C, C)
    of_itself = log_probability.diagonal(dim1=-2, dim2=-1)                                        # (B, C)
    return -((of_itself * hypothesis).sum(dim=-1) / hypothesis.sum(dim=-1)).mean()


# ------------------------------------------------------------------------------------------ training


class Rectifier(nn.Module):
    """All that stage 1 trains: the Reference prompt, the projection of positions, the decoder. Nothing else."""

    frozen_clip = True                          # its features are those of the one CLIP that is shared

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__()
        _, width = clip_model.visual.positional_embedding.shape
        dim = clip_model.visual.proj.shape[1]
        # [code] All vectors start at the embedding of token 0; their positions make them differ at once.
        start = clip_model.token_embedding.weight[0].detach().cpu()
        self.prompt = nn.Parameter(start.repeat(prompt_length, 1))                                # (L, Et)
        self.projection = nn.Conv2d(width, dim, kernel_size=1)
        self.decoder = Decoder(dim, classes)

    @torch.no_grad()
    def encode(self, clip_model: clip.CLIP, images: Tensor, path: str) -> Tensor:
        """Z: what the frozen CLIP sees of images (B, 3, H, W) → (B, D, h, w). Sec. III-A."""
        return clip_model.encode_dense(images, path=path)

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        """M_b: positions (E, h, w), reference (C, D) → (C, h, w). Eq. 2; the same for every image of one grid."""
        return bias_logits(positions, self.projection, reference)

    def forward(self, features: Tensor, query: Tensor, reference: Tensor, bias: Tensor) -> Tensor:
        """M_o: features (B, D, h, w), query and reference (C, D), bias (C, h, w) → (B, C, h, w). Eq. 3 and 4.

        For training, test and student alike. ReCLIP++ needs the reference in its bias alone; ReCLIP (ablations.py) here.
        """
        return self.decoder(features, subtract_bias(query_logits(features, query), bias))


def train_step(rectifier: Rectifier, clip_model: clip.CLIP, images: Tensor, hypothesis: Tensor, query: Tensor,
               class_names: list[str], recipe: Recipe, noise: torch.Generator) -> Tensor:
    """The loss of one batch: images (B, 3, H, W), hypothesis (B, C) bool, query (C, D). Sec. III-B to III-D in order."""
    features = rectifier.encode(clip_model, images, recipe.dense_path)                            # Z (B, D, h, w)
    positions = clip_model.visual.patch_positions(*features.shape[-2:]).detach()                  # PE (E, h, w)
    reference = reference_features(clip_model, rectifier.prompt, class_names)                     # W_r (C, D)     Eq. 1
    bias = rectifier.bias(positions, reference)                                                   # M_b (C, h, w)  Eq. 2
    decoded = rectifier(features, query, reference, bias)                                         # M_o            Eq. 3, 4
    uniform = torch.rand(decoded.shape, generator=noise, device=decoded.device)
    masks = rectified_masks(decoded, recipe.mask_scale, recipe.mask_tau, uniform)                 # M̂              Eq. 5
    loss = chosen(recipe, contrastive_loss)                             # this very function, unless --ablation has another
    return loss(features, masks, query, hypothesis, recipe.loss_scale)                            #                Eq. 7


def poly_rate(rate: float, step: int, horizon: int, power: float) -> float:
    """rate · (1 − step / horizon)^power. Training may stop before the horizon, as the released code does."""
    return rate * (1 - step / horizon) ** power


def chosen(recipe, original):
    """`original`, a class or function; only where the recipe names an ablation, what ablations.py has in its place."""
    if recipe.ablation == "none":
        return original
    import ablations
    return ablations.in_place_of(original, recipe.ablation)


# ------------------------------------------------------------------------------------------ checkpoints and caches


def load_checkpoint(path: Path, stage: str) -> dict:
    """The checkpoint of stage 1 or 2. Raises ValueError when its settings lack what `described` and a recipe have."""
    content = runs.load(path, stage)
    with runs.reading(path):
        known = content["settings"]["world"]
        for name, kind in (("data", str), ("root", str), ("clip_name", str), ("clip", str), ("synonyms", list)):
            if not isinstance(known[name], kind):
                raise TypeError(f"{name} is {known[name]!r}")
        if not all(isinstance(name, str) for names in known["synonyms"] for name in names):
            raise TypeError(f"synonyms are {known['synonyms']!r}")
        if stage == "distill":
            content["settings"]["teacher"]
        elif (path_taken := saved_recipe(content).dense_path) not in clip.DENSE_PATHS:
            raise TypeError(f"dense_path is {path_taken!r}")
    return content


def recipe_of(world: World) -> Recipe:
    """The recipe of the world's rectification; where none was trained, the dataset's."""
    path = world.folder("rectify") / "checkpoint.pt"
    if path.exists():                               # the numbers alone: the weights may be for other classes
        return saved_recipe(load_checkpoint(path, "rectify"))
    return RECIPES.get(world.name, RECIPES["folder"])


def saved_recipe(checkpoint: dict, of: str = "recipe") -> Recipe:
    """The recipe that a stage-1 checkpoint was trained with, or the `teacher_recipe` of a student."""
    saved = checkpoint["settings"][of]
    return Recipe(**{name: tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
                     for name in {**asdict(Recipe()), **saved}})                # all of its fields and no other


def find_checkpoint(args: argparse.Namespace, stage: str) -> dict | None:
    """The stage's checkpoint of `--data`, without `--data` the newest one; None if there is none."""
    path = runs.stage_folder(args.out, args.data, stage) / "checkpoint.pt" if hasattr(args, "data") \
        else runs.newest(args.out, stage)
    return load_checkpoint(path, stage) if path is not None and path.exists() else None


def newest_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint that says which run is meant: of `--data`, else the newest. A student's where stage 1 has none
    (MaskCLIP+); None if there is none at all."""
    if hasattr(args, "data"):
        return find_checkpoint(args, "rectify") or find_checkpoint(args, "distill")
    found = [path for path in (runs.newest(args.out, stage) for stage in ("rectify", "distill")) if path is not None]
    if not found:
        return None
    run = max(found, key=lambda path: path.stat().st_mtime_ns).parent.parent
    stage = next(stage for stage in ("rectify", "distill") if (run / stage / "checkpoint.pt").exists())
    return load_checkpoint(run / stage / "checkpoint.pt", stage)


def cached_query(world: World) -> Tensor:
    """W_q (C, D), from `cache/` beside the stages if it was made for the same words and weights."""
    key = ("query", world.fingerprint, world.vocabulary.synonyms, world.vocabulary.templates)
    shape = (len(world.vocabulary), world.clip_model.visual.proj.shape[1])
    return runs.cached(world.cache, "query", key, lambda: query_features(world.clip_model, world.vocabulary),
                       fits=lambda query: query.shape == shape and bool(query.isfinite().all())).to(world.device)


def cached_votes(world: World, query: Tensor, images: dict[str, Path], recipe: Recipe) -> Tensor:
    """f(k) of all training images, (images, C), in the order of `images`; stored under a key of all it depends on."""
    key = ("votes", world.fingerprint, world.vocabulary.synonyms, world.vocabulary.templates, recipe.window_ratio,
           recipe.short_side, world.precision, stamps_of(images))

    def make() -> dict[str, Tensor]:
        return count_votes(world.clip_model, query, images, recipe.short_side, recipe.window_ratio, world.precision,
                           world.workers)

    def fits(votes: dict[str, Tensor]) -> bool:
        return all(votes[name].shape == (len(query),) and bool(votes[name].isfinite().all()) for name in images)

    votes = runs.cached(world.cache, "hypotheses", key, make, fits)
    return torch.stack([votes[name] for name in images])


def cached_hypotheses(world: World, query: Tensor, images: dict[str, Path], recipe: Recipe) -> Tensor:
    """H of all training images, (images, C) bool, in the order of `images`. Eq. 6."""
    return multi_label_hypothesis(cached_votes(world, query, images, recipe), recipe.vote_threshold)


def cached_features(world: World, rectifier: Rectifier, dataset: data.TrainingImages, recipe: Recipe,
                    gigabytes: float) -> Tensor:
    """Z of every training image under one augmentation, (images, D, h, w) float16, at most `gigabytes` in memory and on disk.

    For `--cache-features`: CLIP then looks at an image once, and not once in every epoch. Not the same training: the pictures
    no longer vary. Raises ValueError where Z needs more room, and for an ablation whose CLIP is not frozen.
    """
    if not rectifier.frozen_clip:
        raise ValueError(f"--cache-features: expected a frozen CLIP, found --ablation {recipe.ablation}, which trains it.")
    patch, dim = world.clip_model.visual.patch_size, world.clip_model.visual.proj.shape[1]
    shape = (len(dataset), dim, *(-(-side // patch) for side in recipe.crop))
    needed = 2 * math.prod(shape) / 1e9
    if needed > gigabytes:
        raise ValueError(f"--cache-features {gigabytes:g}: expected room for {needed:.1f} GB, the features of {len(dataset)} "
                         f"images, found {gigabytes:g}. Allow more, or leave the flag out.")

    def make() -> Tensor:
        features = torch.empty(shape, dtype=torch.float16)
        loader = torch.utils.data.DataLoader(dataset, batch_size=16, sampler=[(0, index) for index in range(len(dataset))],
                                             num_workers=world.workers)
        for number, (images, _) in enumerate(tqdm(loader, desc="features", unit="×16")):
            with runs.autocast(world.device, world.precision):
                found = rectifier.encode(world.clip_model, images.to(world.device), recipe.dense_path)
            features[16 * number:16 * number + len(images)] = found.half().cpu()
        return features

    key = ("features", world.fingerprint, world.precision, dataset.seed, stamps_of(world.training_images), recipe.dense_path,
           recipe.short_side, recipe.crop, recipe.scale, recipe.distort)
    for other in () if world.shared_cache else world.cache.glob("features-*.pt"):       # of another seed or recipe: they are large
        if other.name != f"features-{runs.seed_of(key):016x}.pt":
            other.unlink()
    return runs.cached(world.cache, "features", key, make,
                       fits=lambda found: found.shape == shape and found.dtype == torch.float16 and bool(found.isfinite().all()))


def build_rectifier(world: World, recipe: Recipe) -> Rectifier:
    """A rectifier in its initial state: that of ReCLIP++, or of the recipe's ablation."""
    kind = chosen(recipe, Rectifier)
    return kind(world.clip_model, len(world.vocabulary), recipe.prompt_length).to(world.device)


def load_rectifier(world: World, checkpoint: dict) -> tuple[Recipe, Rectifier]:
    """Recipe and trained weights of a stage-1 checkpoint; the rectifier is frozen and in eval mode."""
    recipe = saved_recipe(checkpoint)
    with runs.reading(world.folder("rectify") / "checkpoint.pt"):
        rectifier = build_rectifier(world, recipe)
        rectifier.load_state_dict(checkpoint["weights"])
    return recipe, rectifier.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ the run


def resolved(world: World, args: argparse.Namespace) -> Recipe:
    """The dataset's recipe with what the flags say put in, and no more learned vectors than the class names leave room for."""
    recipe = recipe_for(world, args, RECIPES)
    room = world.clip_model.prompt_room(world.vocabulary.names)             # the end token is never lost: the context gives way
    return replace(recipe, prompt_length=min(room, recipe.prompt_length))


def main(args: argparse.Namespace) -> Path:
    """Train stage 1, measure it where labels exist, and return the checkpoint's path."""
    world = open_world(args)
    refuse_another_folder(world)
    recipe = resolved(world, args)
    if recipe.prompt_length < (usual := recipe_for(world, args, RECIPES).prompt_length):
        print(f"The longest class name leaves room for {recipe.prompt_length} learned vectors instead of {usual}.")
    images = world.training_images
    per_epoch = data.steps_per_epoch(len(images), recipe.batch_size)
    steps, horizon = recipe.epochs * per_epoch, recipe.horizon * per_epoch
    query = cached_query(world)
    hypotheses = chosen(recipe, cached_hypotheses)(world, query, images, recipe)
    row = {name: number for number, name in enumerate(images)}

    torch.manual_seed(runs.seed_of(args.seed, "rectifier"))
    rectifier = build_rectifier(world, recipe)
    dataset = data.TrainingImages(images, data.augmentation(recipe.short_side, recipe.crop, recipe.scale, recipe.distort),
                                  args.seed)
    if recipe.augment_once:
        dataset = data.StoredFeatures(images, cached_features(world, rectifier, dataset, recipe, args.cache_features))
        rectifier.encode = lambda _clip, features, _path: features          # what the batches hold is Z already
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
                                weight_decay=recipe.weight_decay)
    run = runs.Training(world.folder("rectify"), "rectify", world.settings(recipe, args.seed),
                        world.header("rectify", recipe, args.seed), rectifier, optimizer, steps=steps,
                        steps_per_epoch=per_epoch, resume=args.resume)
    batches = data.training_batches(dataset, batch_size=recipe.batch_size, first_step=run.first_step, steps=steps,
                                    seed=args.seed, workers=world.workers)
    noise = torch.Generator(world.device)
    rectifier.train()
    with run:
        for step, (batch, ids) in enumerate(batches, start=run.first_step):
            noise.manual_seed(runs.seed_of(args.seed, "gumbel", step))
            hypothesis = hypotheses[[row[name] for name in ids]].to(world.device)
            with runs.autocast(world.device, world.precision):
                loss = train_step(rectifier, world.clip_model, batch.to(world.device, non_blocking=True), hypothesis, query,
                                  world.vocabulary.names, recipe, noise)
            run.refuse_non_finite(loss, step, ids)
            for group in optimizer.param_groups:
                group["lr"] = poly_rate(recipe.learning_rate, step, horizon, recipe.poly_power)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.done(step, {"loss": loss.item()}, group["lr"])
    path = run.finish()

    import evaluate                                 # after training, and not before: it may open labels
    evaluate.after_training(world, ["maskclip", "rectify"], "rectify", query)
    print(f"\nNext: python distill.py{runs.repeated(args)}")
    return path


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
