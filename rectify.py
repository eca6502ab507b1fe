"""Stage 1 of ReCLIP++ (Sec. III-B to III-D): learn CLIP's bias without a label, subtract it, decode rectified
masks.

    python rectify.py                          Toyland: offline, two minutes on a laptop
    python rectify.py --data voc               PASCAL VOC 2012 under ./data; so context, ade, cityscapes, coco
    python rectify.py --data photos --classes names.txt      your own images and words

Reads images, class names and a frozen CLIP. Trains three things: 73 prompt vectors (which classes CLIP
prefers), a projection of the positional embedding (where it prefers them), and a small decoder. Reads no
label of any kind. Writes runs/<data>/rectify/.

The data flow, which is also the order of this file:

    image ──CLIP──► features Z ──── query logits M_q ──(−)── M ── decoder ── M_o ── Gumbel-Softmax ── masks
    class names ──► query W_q ───────────┘              │Eq. 3    Eq. 4              Eq. 5             │
    73 vectors + class names ──► reference W_r ┐ Eq. 1  │                                              │
    positional embedding ──► projection W_p ───┴─ bias logits M_b  Eq. 2                               │
    windows of the image ──CLIP──► votes ── hypothesis H  Eq. 6 ──────────── contrastive loss  Eq. 7 ◄─┘

    B images · C classes · D joint dimension (512) · E ViT width (768) · Et text width (512)
    H,W pixels · h,w patches · n = h·w · L learned prompt vectors (73)
"""

from __future__ import annotations

import argparse

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    return common.parser(__doc__, "training", "rectify")


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import data
from datasets import hypotheses
from datasets.images import stamps_of
from datasets.words import Vocabulary
from harness import machine, processes, runs

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of stage 1: those of VOC, with their sources. RECIPES says what differs."""
    dense_path: Literal[clip.DENSE_PATHS] = "residual"      # [code] see CLIP.encode_dense
    prompt_length: int = 73                 # [paper] 77 = start + 73 + two name tokens + end
    window_ratio: float = 1 / 6             # [paper] r of Eq. 6
    vote_threshold: float = 0.07            # [paper] t of Eq. 6
    mask_scale: float = 100.0               # [code] factor on M_o in Eq. 5 (see rectified_masks)
    loss_scale: float = 100.0               # [code] 1/τ of Eq. 7: exp(logit_scale), 100 in OpenAI's CLIPs
    short_side: int = 336                   # [code] pixels
    crop: tuple[int, int] = (336, 336)      # [code] height, width
    scale: tuple[float, float] = (0.5, 2.0)  # [code] random scale of the short side
    distort: bool = True                    # [code] photometric distortion
    batch_size: int = 1                     # [code]
    learning_rate: float = 0.01             # [paper]
    momentum: float = 0.9                   # [paper]
    weight_decay: float = 5e-4              # [paper]
    poly_power: float = 0.9                 # [paper]
    horizon: int = 200                      # [code] epochs at which the poly schedule would reach zero
    epochs: int = 50                        # [code] epochs after which training stops
    hypotheses: str = ""                    # [ours] a file in the place of windows; "": windows vote
    cache_features: float = 0.0             # [ours] GB: one look of CLIP at every image; 0: a look each epoch


RECIPES = {
    "voc": Recipe(),
    # [paper] t; [code] horizon, epochs, short side and crop, and for Cityscapes batch and rate. All else as
    # for VOC.
    "context": Recipe(vote_threshold=0.0, short_side=448, crop=(480, 480), horizon=400, epochs=50),
    "ade": Recipe(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=600, epochs=100),
    "cityscapes": Recipe(vote_threshold=0.07, short_side=448, crop=(512, 512), batch_size=16,
                         learning_rate=0.16, horizon=300, epochs=50),
    "coco": Recipe(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=800, epochs=100),
    # [ours] Images of unknown kind: VOC's numbers, but any class that wins one window may be there.
    "folder": Recipe(vote_threshold=0.0),
    # [ours] Toyland's scenes at 1.5 times their size, larger windows and batches, to fit two cores. The
    # scales of masks and loss are smaller than with OpenAI's CLIP, whose logit_scale ended at 100 (the small
    # one's: 18). With mask_scale=3 or more a class that loses to its neighbour early (car to bus) is never
    # drawn again and dies; with loss_scale=20 or more large stuffs are sure of themselves too soon and leave
    # their doubtful patches to things.
    "toyland": Recipe(dense_path="value", window_ratio=1 / 4, vote_threshold=0.05, mask_scale=2.0,
                      loss_scale=12.0, short_side=144, crop=(144, 192), scale=(1.0, 1.0), distort=False,
                      batch_size=8, learning_rate=0.1, horizon=8, epochs=8),
}
RECIPES["context-voc-first"] = RECIPES["context"]     # the same images: only the labels' numbering is another
# [ours] A class's logit in Eq. 7 grows with its area, and things are small: with 12 their softmax is next to
# flat, and the boat dies (56.6 mIoU on val; with 60 it has an IoU of 36, all together 61.8; seed 0).
RECIPES["toyland-things"] = replace(RECIPES["toyland"], loss_scale=60.0)

# ------------------------------------------------------------------------------------------ what CLIP says


@torch.no_grad()
def query_features(clip_model: clip.CLIP, vocabulary: Vocabulary) -> Tensor:
    """W_q: what CLIP expects each class to look like. (C, D), unit rows. Sec. III-A.

    Every name of a class in every template is encoded and normalised; their mean, normalised again, is the
    query.
    """
    rows = []
    for names in tqdm(vocabulary.synonyms, desc="query features", unit="class", leave=False):
        sentences = [template.format(name) for name in names for template in vocabulary.templates]
        # (sentences, D)
        features = clip_model.encode_text(clip.tokenize(sentences).to(clip_model.device)).float()
        rows.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


@machine.in_float32
def query_logits(features: Tensor, query: Tensor) -> Tensor:
    """M_q = Z W_qᵀ: cosine of every patch with every class, MaskCLIP's prediction. Sec. III-A.

    features (B, D, h, w) and query (C, D), both of unit length → (B, C, h, w) in [−1, 1].
    """
    return torch.einsum("bdhw,cd->bchw", features, query)


# ------------------------------------------------------------------------------------------ bias extraction


def reference_features(clip_model: clip.CLIP, prompt: Tensor, class_names: list[str]) -> Tensor:
    """W_r: the text features of `[v_1]…[v_L][CLS]`, what CLIP is drawn to when no picture speaks. Eq. 1, Sec.
    III-B.

    prompt (L, Et), learned and shared by all classes → (C, D). The paper says nothing of a normalisation. The
    released code divides by the norm of the whole matrix, and so do we: rows keep their relative length, and
    all together have length one, so that M_b starts small beside the cosines of M_q whatever CLIP's text
    features measure. The choice sets the scale of the bias; weights trained with one are worthless under the
    other (a third party normalised row by row at test: 84.5 → 28.4 mIoU).
    """
    reference = clip_model.encode_prompt(prompt, class_names).float()
    return reference / reference.norm()


@machine.in_float32
def bias_logits(positions: Tensor, projection: nn.Conv2d, reference: Tensor) -> Tensor:
    """M_b = W_p W_rᵀ: how much too often CLIP says a class at a place, whatever the picture. Eq. 2, Sec.
    III-B.

    positions (E, h, w): CLIP's positional embedding on the image's grid; projection: a 1×1 convolution E → D
    that makes it W_p; reference (C, D) = W_r → (C, h, w). It depends on parameters and grid alone: at test it
    is computed once.
    """
    return torch.einsum("dhw,cd->chw", projection(positions[None])[0], reference)


# ------------------------------------------------------------------------------------------ rectified masks


def subtract_bias(query: Tensor, bias: Tensor) -> Tensor:
    """M = M_q − M_b: what is left without the bias. Eq. 3. (B, C, h, w), (C, h, w) → (B, C, h, w)."""
    return query - bias


class Decoder(nn.Module):
    """M_o = BN(conv5×5(Z ‖ M)): smooths logits over a neighbourhood, guided by the features. Eq. 4."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(dim + classes, classes, kernel_size=5, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(classes)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")               # [code]; no ReLU follows

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """features (B, D, h, w), logits (B, C, h, w) → M_o (B, C, h, w)."""
        return self.norm(self.conv(torch.cat([features, logits], dim=1)))


def rectified_masks(decoded: Tensor, scale: float, uniform: Tensor) -> Tensor:
    """M̂ = Gumbel-Softmax(M_o): one class per patch, drawn at random, yet with a gradient. Eq. 5, Sec. III-C.

    decoded (B, C, h, w); uniform: numbers in [0, 1) of the same shape, the only randomness. Returns (B, C, h,
    w), exactly one 1 per patch along dim 1; in the backward pass it behaves like the soft distribution
    (straight-through).

    `scale` multiplies M_o before the noise is added; it is 1/τ1, the one knob of the draw (the released code
    has a second one, at 1). BatchNorm makes M_o of unit size and Gumbel noise has a spread of 1.3: with the
    released code's 100 the noise hardly ever changes the winner and the mask is an argmax; with 1 every other
    patch is drawn anew in every step, so that a class which is losing is still tried. The noise is written
    out, and not left to `F.gumbel_softmax`, which takes it from the global generator: here the caller draws
    it as a function of (seed, step), so that a resumed run repeats it.
    """
    exponential = (-uniform.clamp(min=1e-10).log()).clamp(min=1e-10)  # the clamps keep both logarithms finite
    gumbel = -exponential.log()
    soft = (scale * decoded.float() + gumbel).softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(dim=1, index=soft.argmax(dim=1, keepdim=True), value=1.0)
    return hard + (soft - soft.detach())          # value of hard (the bracket is exactly 0), gradient of soft


# ------------------------------------------------------------------------------------------ the hypothesis


def windows(image: Tensor, ratio: float) -> Tensor:
    """Sliding windows of `ratio` times the image's height and width, half a window apart. Eq. 6, Sec. III-D.

    image (3, H, W) → (k², 3, H·ratio, W·ratio), k = 2/ratio − 1 places a side: 11 × 11 for ratio 1/6, 1 for
    ratio 1.
    """
    _, H, W = image.shape
    places = 1 if ratio >= 1 else max(2, round(2 / ratio) - 1)
    height, width = max(1, round(H * ratio)), max(1, round(W * ratio))
    tops = [round(i * (H - height) / max(1, places - 1)) for i in range(places)]
    lefts = [round(i * (W - width) / max(1, places - 1)) for i in range(places)]
    return torch.stack([image[:, top:top + height, left:left + width] for top in tops for left in lefts])


def at_input_size(image: Tensor, ratio: float, size: int) -> Tensor:
    """An image's windows, each resized to CLIP's input: (3, H, W) → (k², 3, size, size)."""
    return F.interpolate(windows(image, ratio), size=(size, size), mode="bicubic", antialias=True)


def window_votes(window_features: Tensor, query: Tensor) -> Tensor:
    """f(k): the share of an image's windows whose best class is k. Eq. 6, Sec. III-D.

    window_features (..., k², D) from CLIP's global encoder, any length; query (C, D) → (..., C), sums to one.
    """
    best = (F.normalize(window_features, dim=-1) @ query.T).argmax(dim=-1)                         # (..., k²)
    return F.one_hot(best, len(query)).float().mean(dim=-2)


def multi_label_hypothesis(votes: Tensor, threshold: float) -> Tensor:
    """H = {k : f(k) > t}: the classes that an image may contain. Eq. 6, Sec. III-D.

    votes (B, C), rows summing to one → (B, C) bool. Where no class passes, the one with most votes stands
    alone.
    """
    best = F.one_hot(votes.argmax(dim=-1), votes.shape[-1]).bool()
    return (votes > threshold) | best                                 # if any class passes, the best one does


@torch.no_grad()
def count_votes(setup: data.Setup, query: Tensor, recipe: Recipe, at_once: int | None = None) -> Tensor:
    """f(k) of every training image, (images, C): one pass, before training, over images that nobody has
    labelled.

    Windows of small images share a batch; an image with more than `at_once` windows comes in several.
    """
    clip_model, device = setup.clip_model, setup.device
    if at_once is None:                 # a CPU is fastest while all of it lies in its cache; this fills a GPU
        at_once = 32 if device.type == "cpu" else 1024
    whole = data.WholeImages(setup.training_images, recipe.short_side)
    loader = torch.utils.data.DataLoader(whole, batch_size=None, num_workers=setup.workers)
    rows, waiting = [], []
    for number, (_, image) in enumerate(tqdm(loader, desc="hypotheses", unit="image"), start=1):
        waiting.append(at_input_size(image.to(device), recipe.window_ratio,
                                     clip_model.visual.input_resolution))
        if len(waiting) * len(waiting[0]) >= at_once or number == len(whole):
            together = torch.cat(waiting)
            with machine.autocast(device, setup.precision):
                features = torch.cat([clip_model.encode_image(piece)
                                      for piece in together.chunk(-(-len(together) // at_once))]).float()
            rows += [window_votes(of_image, query).cpu() for of_image in features.chunk(len(waiting))]
            waiting.clear()
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------ the loss


@machine.in_float32
def contrastive_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor,
                     scale: float) -> Tensor:
    """What the mask of class k covers should look like k to CLIP, and like no other class. Eq. 7, Sec. III-D.

    features (B, D, h, w) of unit length; masks (B, C, h, w), 1 where a patch is the class's; query (C, D) of
    unit length; hypothesis (B, C) bool, at least one class per image; scale = 1/τ. Returns a scalar.

    Z_g = mean over all n patches of mask × feature, (B, C, D); S = Z_g W_qᵀ (B, C, C); the loss is the
    cross-entropy of row k of scale·S against k, averaged over k ∈ H, then over images. The paper writes S as
    a cosine. We follow the released code, which divides by n but does not normalise Z_g again, so that a
    logit grows with the mask's area: an empty mask then says nothing (all logits 0, cross-entropy ln C) and
    still has a finite gradient that draws the most fitting patches in, where the cosine of a zero vector has
    none of use.
    """
    pooled = torch.einsum("bchw,bdhw->bcd", masks, features) / masks[0, 0].numel()             # Z_g (B, C, D)
    log_probability = (scale * pooled @ query.T).log_softmax(dim=-1)                              # (B, C, C)
    of_itself = log_probability.diagonal(dim1=-2, dim2=-1)                                        # (B, C)
    return -((of_itself * hypothesis).sum(dim=-1) / hypothesis.sum(dim=-1)).mean()


# ------------------------------------------------------------------------------------------ training


class Rectifier(nn.Module):
    """All that stage 1 trains: the Reference prompt, the projection of positions, the decoder."""

    frozen_clip = True                          # its features are those of the one CLIP that all stages share

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__()
        width, dim = clip_model.visual.conv1.out_channels, clip_model.visual.proj.shape[1]
        # [code] All vectors start at the embedding of token 0; their positions make them differ at once.
        start = clip_model.token_embedding.weight[0].detach().cpu()
        self.prompt = nn.Parameter(start.repeat(prompt_length, 1))                                  # (L, Et)
        self.projection = nn.Conv2d(width, dim, kernel_size=1)
        self.decoder = Decoder(dim, classes)                                                        # Eq. 4

    @torch.no_grad()
    def encode(self, clip_model: clip.CLIP, images: Tensor, path: str) -> Tensor:
        """Z: what the frozen CLIP sees of images (B, 3, H, W) → (B, D, h, w). Sec. III-A."""
        return clip_model.encode_dense(images, path=path)

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        """M_b: positions (E, h, w), reference (C, D) → (C, h, w), whatever the image. Eq. 2."""
        return bias_logits(positions, self.projection, reference)

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        """M: features (B, D, h, w), query (C, D), bias (C, h, w) → (B, C, h, w). Eq. 3, from M_q = Z W_qᵀ."""
        return subtract_bias(query_logits(features, query), bias)

    def forward(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        """M_o, Eq. 3 and 4, as test and student need it: → (B, C, h, w)."""
        return self.decoder(features, self.subtract(features, query, bias))


def train_step(rectifier: Rectifier, clip_model: clip.CLIP, features: Tensor, votes: Tensor, query: Tensor,
               class_names: list[str], recipe: Recipe, noise: torch.Generator,
               loss: Callable = contrastive_loss) -> Tensor:
    """The loss of one batch: features Z (B, D, h, w), votes f (B, C), query W_q (C, D). Sec. III-B to D."""
    positions = clip_model.visual.patch_positions(*features.shape[-2:]).detach()                # PE (E, h, w)
    uniform = processes.uniform((len(features), len(query), *features.shape[-2:]), noise)

    reference = reference_features(clip_model, rectifier.prompt, class_names)       # W_r (C, D)         Eq. 1
    bias = rectifier.bias(positions, reference)                                     # M_b (C, h, w)      Eq. 2
    logits = rectifier.subtract(features, query, bias)                              # M   (B, C, h, w)   Eq. 3
    decoded = rectifier.decoder(features, logits)                                   # M_o (B, C, h, w)   Eq. 4
    masks = rectified_masks(decoded, recipe.mask_scale, uniform)                   # M̂   (B, C, h, w)   Eq. 5
    hypothesis = multi_label_hypothesis(votes, recipe.vote_threshold)               # H   (B, C)         Eq. 6
    return loss(features, masks, query, hypothesis, recipe.loss_scale)              #                    Eq. 7


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The poly schedule, rate · (1 − step / horizon)^0.9. Training may stop before the horizon [code]."""
    horizon = max(recipe.horizon, recipe.epochs) * steps_per_epoch
    return recipe.learning_rate * (1 - step / horizon) ** recipe.poly_power


# ----------------------------------------------------------------------------------------- the parts of a run


@dataclass(frozen=True)
class System:
    """The parts of stage 1 that can be exchanged. These are ReCLIP++'s; paper/systems.py hands in others."""
    name: str = "reclip++"
    command: str = "python rectify.py"          # what trains it, as a checkpoint remembers
    rectifier: type[Rectifier] = Rectifier      # Eq. 2 to 4, and what is trained
    votes: Callable = count_votes       # f(k) of Eq. 6: (setup, query, recipe) → (images, C), rows sum to one
    loss: Callable = contrastive_loss           # Eq. 7
    # dataset, or "any" → what its recipe has otherwise
    numbers: dict[str, dict] = field(default_factory=dict)


def recipe_of(setup: data.Setup, system: System) -> Recipe:
    """The recipe of a run. A long class name shortens the learned context: no end token is lost."""
    recipe = data.recipe_for(setup, RECIPES, system.numbers)
    room = setup.clip_model.prompt_room(setup.vocabulary.names)
    return replace(recipe, prompt_length=min(room, recipe.prompt_length))


def query_of(setup: data.Setup) -> Tensor:
    """W_q (C, D), made once for the same words and weights."""
    shape = len(setup.vocabulary), setup.clip_model.visual.proj.shape[1]
    return setup.kept("query", shape,
                      lambda: query_features(setup.clip_model, setup.vocabulary)).to(setup.device)


def votes_of(setup: data.Setup, query: Tensor, recipe: Recipe, system: System) -> Tensor:
    """f (images, C), made once for the same images, words, weights and windows; or those of a file."""
    if recipe.hypotheses:
        return hypotheses.votes(recipe.hypotheses, setup.data, setup.root, list(setup.training_images),
                                len(query))
    return setup.kept("votes", (len(setup.training_images), len(query)),
                      lambda: processes.gathered(system.votes(setup.share(), query, recipe)),
                      system.votes.__name__, recipe.window_ratio, recipe.short_side,
                      stamps_of(setup.training_images))


def build_rectifier(setup: data.Setup, recipe: Recipe, system: System) -> Rectifier:
    """A rectifier in its initial state."""
    return system.rectifier(setup.clip_model, len(setup.vocabulary), recipe.prompt_length).to(setup.device)


def load_rectifier(setup: data.Setup, checkpoint: dict, system: System) -> tuple[Recipe, Rectifier]:
    """Recipe and trained weights of a stage-1 checkpoint; the rectifier is frozen and in eval mode."""
    runs.refuse_other_system(checkpoint, system.name)
    recipe = runs.recipe_in(checkpoint, Recipe)
    rectifier = build_rectifier(setup, recipe, system)
    runs.load_weights(rectifier, checkpoint)
    return recipe, rectifier.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ the run


def forecast(setup: data.Setup, query: Tensor, recipe: Recipe, system: System, steps: int) -> None:
    """Print how long the parts of a run will take, from one image and one step of it. For --quick."""
    images, clip_model = setup.training_images, setup.clip_model
    _, image = data.WholeImages(images, recipe.short_side)[0]
    of_image = at_input_size(image.to(setup.device), recipe.window_ratio, clip_model.visual.input_resolution)
    rectifier, noise = build_rectifier(setup, recipe, system), torch.Generator(setup.device)

    def look() -> Tensor:
        crop = torch.zeros(1, 3, *recipe.crop, device=setup.device)
        return rectifier.encode(clip_model, crop, recipe.dense_path)

    batch = look().expand(min(recipe.batch_size, len(images)), -1, -1, -1)
    votes = torch.ones(len(batch), len(query), device=setup.device)

    def step() -> Tensor:
        loss = train_step(rectifier, clip_model, batch, votes, query, setup.vocabulary.names, recipe, noise)
        loss.backward()
        return loss.detach()

    machine.forecast({"hypotheses": (len(images), lambda: clip_model.encode_image(of_image)),
                      "features": (len(images), look), "steps": (steps, step)})


def main(args: argparse.Namespace, system: System = System()) -> data.Setup:
    """Train stage 1; what it made lies in `folder("rectify")` of the setup that is returned."""
    setup = data.open_setup(args)
    recipe = recipe_of(setup, system)
    if recipe.prompt_length < Recipe.prompt_length:
        print(f"The longest class name leaves room for {recipe.prompt_length} learned vectors instead of "
              f"{Recipe.prompt_length}.")
    per_epoch = data.steps_per_epoch(len(setup.training_images), recipe.batch_size)
    steps = recipe.epochs * per_epoch
    query = query_of(setup)
    if args.quick:
        forecast(setup, query, recipe, system, steps)
    votes = votes_of(setup, query, recipe, system)

    torch.manual_seed(machine.seed_of(args.seed, "rectifier"))
    rectifier = build_rectifier(setup, recipe, system)
    step_of = processes.parallel(train_step, rectifier)         # one process: the function itself
    augment = data.augmentation(recipe.short_side, recipe.crop, recipe.scale, recipe.distort)
    dataset = data.TrainingImages(setup.training_images, augment, args.seed)
    if recipe.cache_features:
        if not rectifier.frozen_clip:
            raise ValueError(f"--cache-features: expected a frozen CLIP, found {system.name}, which trains "
                             "it.")
        dataset = data.StoredFeatures(setup, dataset, recipe)
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum,
                                weight_decay=recipe.weight_decay)
    noise, ids = torch.Generator(setup.device), list(setup.training_images)
    with runs.Training(setup.folder("rectify"), "rectify", setup.settings(system, recipe),
                       setup.header("rectify", system, recipe), rectifier.train(), optimizer, steps=steps,
                       steps_per_epoch=per_epoch, resume=args.resume, save_every=args.save_every) as training:
        batches = data.training_batches(dataset, batch_size=recipe.batch_size, first_step=training.first_step,
                                        steps=steps, seed=args.seed, workers=setup.workers)
        for step, (batch, rows) in enumerate(batches, start=training.first_step):
            noise.manual_seed(machine.seed_of(args.seed, "gumbel", step))
            batch = batch.to(setup.device, non_blocking=True)
            with machine.autocast(setup.device, setup.precision):
                features = batch if recipe.cache_features \
                    else rectifier.encode(setup.clip_model, batch, recipe.dense_path)                   # Z
                loss = step_of(setup.clip_model, features, votes[rows].to(setup.device), query,
                               setup.vocabulary.names, recipe, noise, system.loss)
            training.descend(loss, learning_rate(recipe, step, per_epoch), [ids[row] for row in rows])
            training.done(loss=loss)
    return setup


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        finished = main(FLAGS)
        import evaluate                   # measuring opens labels: after training, and in no file that trains
        evaluate.after_training(finished, "rectify")
