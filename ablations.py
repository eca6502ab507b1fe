"""The other systems of the paper's tables: ReCLIP++ with one part replaced at a time, its predecessor ReCLIP, and MaskCLIP+.

    python rectify.py --ablation no-bias           stage 1 without the bias; python rectify.py --help lists the names
    python distill.py                              a student of whatever rectification is the newest, ablations included
    python distill.py --ablation own-head          another student of an unablated rectification

Not needed to understand ReCLIP++: rectify.py and distill.py read this file only when `--ablation` names something. Each
replacement stands in for a class or function of those two files; the last section says which ablation is made of which, and
with which numbers. The name is part of the recipe, so that checkpoints, --resume and evaluate.py know it.

    B images · C classes · D joint dimension (512) · E ViT width (768) · h,w patches · n = h·w
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import rectify
import runs
from distill import Inherited
from rectify import Rectifier, contrastive_loss, query_logits, subtract_bias
from world import World, stamps_of

# ------------------------------------------------------------------------------------------ stage 1: the rectifier

# Cosines differ less than what the decoder's BatchNorm gives out. The released codes multiply them ten times more, in Eq. 5
# (1000 in ReCLIP, 100 in ReCLIP++) as for probabilities (100 and 10). So whatever has no decoder is multiplied by ten here,
# and every scale of the recipes, of the student's losses and of evaluate.py fits as it is.
LIKE_DECODED = 10.0


class Undecoded(nn.Module):
    """In the decoder's place: the logits as they are, times ten."""

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return LIKE_DECODED * logits


class WithoutDecoder(Rectifier):
    """M is the result: cosines less bias, no neighbourhood, no normalisation. Table III; ReCLIP has no decoder either."""

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.decoder = Undecoded()


class Entangled(Rectifier):
    """ReCLIP's bias, Table III's row before "independent encoding": class bias Z W_rᵀ plus space bias, both taken from M_q.

    The class bias here depends on the image: Reference meets CLIP's own features, not projected positions. The space bias is
    three times convolution 3×3, BatchNorm, ReLU on the positional embedding, E → D → D → C [ours: its widths are not known].
    """

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        D, E = self.projection.weight.shape[:2]
        del self.projection
        self.space = nn.Sequential(*(layer for into, out in ((E, D), (D, D), (D, classes)) for layer in (
            nn.Conv2d(into, out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())))

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        return self.space(positions[None])[0]                                   # the space bias alone, (C, h, w)

    def forward(self, features: Tensor, query: Tensor, reference: Tensor, bias: Tensor) -> Tensor:
        bias = query_logits(features, reference) + bias                         # (B, C, h, w): of each image its own
        return self.decoder(features, subtract_bias(query_logits(features, query), bias))


class ReCLIP(WithoutDecoder, Entangled):
    """ReCLIP's bias without a decoder: Table III's first row, together with its hypothesis (whole_image_hypotheses)."""


class LearnableQuery(Rectifier):
    """W_q starts at CLIP's text features and trains too, rows of length one. Table IV.

    What is stored is the way gone from the start, (C, D), so that weight decay pulls towards CLIP's words and not towards
    nothing [ours]. Eq. 7 still compares with CLIP's own words: the goal does not move with the learner.
    """

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.moved = nn.Parameter(torch.zeros(classes, clip_model.visual.proj.shape[1]))

    def forward(self, features: Tensor, query: Tensor, reference: Tensor, bias: Tensor) -> Tensor:
        return super().forward(features, F.normalize(query + self.moved, dim=1), reference, bias)


class Addition(Rectifier):
    """M = M_q + M_b. Table V. The projection could learn the other sign; where it starts is all that differs."""

    def forward(self, features: Tensor, query: Tensor, reference: Tensor, bias: Tensor) -> Tensor:
        return self.decoder(features, query_logits(features, query) + bias)


class FineTuned(Rectifier):
    """CLIP's image tower trains with all the rest. Table VI: it forgets what it knew, 1.2 mIoU on VOC.

    The tower is a copy and part of the checkpoint. The hypothesis, the positions of Eq. 2 and the rows of MaskCLIP beside it
    are the untouched CLIP's.
    """

    frozen_clip = False

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.tower = copy.deepcopy(clip_model.visual).requires_grad_(True)

    def encode(self, clip_model: clip.CLIP, images: Tensor, path: str) -> Tensor:
        tuned = copy.copy(clip_model)                                           # shares everything …
        tuned._modules = clip_model._modules | {"visual": self.tower}           # … but the image tower
        return tuned.encode_dense(images, path=path)


class NoBias(Rectifier):
    """M = M_q: the decoder alone. What the whole of Sec. III-B gives is the distance to this one."""

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        return positions.new_zeros(len(reference), *positions.shape[-2:])


class MaskCLIP(Rectifier):
    """Nothing to learn: M_q is the result. The teacher of MaskCLIP+."""

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        del self.projection, self.decoder

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        return positions.new_zeros(len(reference), *positions.shape[-2:])

    def forward(self, features: Tensor, query: Tensor, reference: Tensor, bias: Tensor) -> Tensor:
        return query_logits(features, query)


def untrained_teacher(world: World) -> dict:
    """For MaskCLIP+: in place of a stage-1 checkpoint, CLIP as it is."""
    of_dataset = rectify.RECIPES.get(world.name, rectify.RECIPES["folder"])
    recipe = replace(of_dataset, ablation="maskclip+", prompt_length=1)
    return {"stage": "rectify", "settings": {"world": world.described(), "recipe": asdict(recipe)},
            "weights": rectify.build_rectifier(world, recipe).state_dict()}


# ------------------------------------------------------------------------------------------ stage 1: the hypothesis

# ReCLIP's rule: the threshold on 100·cos, and how many classes are taken where none is above it. How its authors chose the
# thresholds is not known; labels may have helped. They did not help with ours.
WHOLE_IMAGE = {
    "voc": (23.0, 2), "context": (20.0, 6), "context-voc-first": (20.0, 6), "ade": (21.0, 5), "cityscapes": (21.5, 2),
    "coco": (20.0, 8),                                                          # [reclip]
    "folder": (20.0, 6),                                                        # [ours: Context's, where anything may be]
    # [ours] Names 5.4 classes in a training scene on average, as the windows do. But others: captions of Toyland name
    # things, so a whole scene looks like its things, hardly any stuff is named, and what is never named dies.
    "toyland": (13.0, 5),
}


def above_or_best(cosines: Tensor, threshold: float, count: int) -> Tensor:
    """{k : 100·cos > threshold}; where no class is above it, the `count` best. [reclip]

    cosines (B, C) → (B, C) bool.
    """
    above = 100 * cosines > threshold
    best = cosines.topk(min(count, cosines.shape[1]), dim=1).indices
    return torch.where(above.any(dim=1, keepdim=True), above, torch.zeros_like(above).scatter_(1, best, True))


def whole_image_hypotheses(world: World, query: Tensor, images: dict[str, Path], recipe: rectify.Recipe) -> Tensor:
    """H from one look at every whole image, as in ReCLIP: (images, C) bool. Table III, and the line in Figure 3."""
    threshold, count = WHOLE_IMAGE["folder" if runs.is_folder(world.name) else world.name]
    return above_or_best(cached_cosines(world, query, images, recipe), threshold, count)


def cached_cosines(world: World, query: Tensor, images: dict[str, Path], recipe: rectify.Recipe) -> Tensor:
    """Cosine of every image with every class by CLIP's global encoder, (images, C), stored like the votes of Eq. 6."""
    key = ("cosines", world.fingerprint, world.vocabulary.synonyms, world.vocabulary.templates, recipe.short_side,
           world.precision, stamps_of(images))
    shape = (len(images), len(query))
    return runs.cached(world.cache, "cosines", key,
                       make=lambda: whole_image_cosines(world, query, images, recipe.short_side),
                       fits=lambda cosines: cosines.shape == shape and bool(cosines.isfinite().all()))


@torch.no_grad()
def whole_image_cosines(world: World, query: Tensor, images: dict[str, Path], short_side: int) -> Tensor:
    """(images, C), the image resized to CLIP's input as one window of ratio 1 would be."""
    size, rows = world.clip_model.visual.input_resolution, []
    loader = torch.utils.data.DataLoader(rectify.WholeImages(images, short_side), batch_size=None, num_workers=world.workers)
    for _, image in loader:
        resized = F.interpolate(image[None].to(world.device), size=(size, size), mode="bicubic", antialias=True)
        with runs.autocast(world.device, world.precision):
            feature = world.clip_model.encode_image(resized).float()                              # (1, D)
        rows.append((F.normalize(feature, dim=1) @ query.T).cpu())
    return torch.cat(rows)


def any_class(world: World, query: Tensor, images: dict[str, Path], recipe: rectify.Recipe) -> Tensor:
    """H for MaskCLIP+, whose loss asks for none: no window is looked at."""
    return torch.ones(len(images), len(query), dtype=torch.bool)


# ------------------------------------------------------------------------------------------ stage 1: the forms of Eq. 7
# Z_g is divided by n in contrastive_loss. Masks n / d times as heavy make it divided by d.


@runs.in_float32
def cosine_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """Eq. 7 as the paper writes it: S is the cosine of Z_g and W_q, whatever the mask's area.

    A sum of mask × feature shorter than one patch's is divided by one: an empty mask has logits 0 and a finite gradient.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)                                       # n·Z_g (B, C, D)
    length = total.norm(dim=-1).clamp(min=1)[..., None, None]                                     # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / length, query, hypothesis, scale)


@runs.in_float32
def area_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """Eq. 7 with Z_g as the mean over the mask and not over the image: small and large masks weigh alike.

    An area of less than one patch counts as one.
    """
    area = masks.sum(dim=(2, 3), keepdim=True).clamp(min=1)                                       # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / area, query, hypothesis, scale)


# ------------------------------------------------------------------------------------------ stage 2: the student's head

class OwnHead(Inherited):
    """A classifier of the student's own, a learned 1×1 convolution D → C, in place of all that is inherited. Table IX."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        self.classifier = nn.Conv2d(query.shape[1], len(query), kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * self.classifier(features)                         # features have length one


class QueryHead(Inherited):
    """M_q^D alone: the text features as a frozen classifier. Table IX; also ReCLIP's student's head and MaskCLIP+'s."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * query_logits(features, self.query)


class QueryBiasHead(Inherited):
    """M_q^D − M_b without the decoder. Table IX."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * subtract_bias(query_logits(features, self.query), self.bias(*features.shape[-2:]))


class WithoutTower(Inherited):
    """The student of a teacher with its own image tower does not take that over: it looks with its own network."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        del self.rectifier.tower


# ------------------------------------------------------------------------------------------ which ablation is which

WINDOWLESS = {"cached_hypotheses": whole_image_hypotheses}

# ablation: {the name of a class or function of rectify.py or distill.py: what stands in its place}
IN_PLACE_OF = {
    # Table III, from ReCLIP to ReCLIP++: each row has one part more, the last one ("none") independent encoding.
    "reclip": {"Rectifier": ReCLIP, "Inherited": QueryHead, **WINDOWLESS},
    "reclip+decoder": {"Rectifier": Entangled, **WINDOWLESS},
    "reclip+decoder+windows": {"Rectifier": Entangled},
    # One part of ReCLIP++ taken out or replaced.
    "entangled": {"Rectifier": Entangled},                                      # the same as the row above
    "without-decoder": {"Rectifier": WithoutDecoder},
    "whole-image": WINDOWLESS,
    "no-bias": {"Rectifier": NoBias},
    "learnable-query": {"Rectifier": LearnableQuery},                           # Table IV
    "addition": {"Rectifier": Addition},                                        # Table V
    "fine-tuned": {"Rectifier": FineTuned, "Inherited": WithoutTower},          # Table VI
    "loss-cosine": {"contrastive_loss": cosine_loss, "text_loss": cosine_loss},
    "loss-area": {"contrastive_loss": area_loss, "text_loss": area_loss},
    "no-bias+loss-cosine": {"Rectifier": NoBias, "contrastive_loss": cosine_loss, "text_loss": cosine_loss},
    "no-bias+loss-area": {"Rectifier": NoBias, "contrastive_loss": area_loss, "text_loss": area_loss},
    # Stage 2: Table VIII, Table IX, and MaskCLIP+.
    "loss-mask": {},                                                            # numbers alone, see below
    "loss-mask+feature": {},
    "own-head": {"Inherited": OwnHead},
    "head-query": {"Inherited": QueryHead},
    "head-query+bias": {"Inherited": QueryBiasHead},
    "maskclip+": {"Rectifier": MaskCLIP, "Inherited": QueryHead, "cached_hypotheses": any_class},
}

# The numbers that an ablation needs instead of the recipe's: for every dataset, and for some in particular.
MASKS_ALONE = dict(feature_weight=0.0, text_weight=0.0)
NUMBERS = {
    "reclip": MASKS_ALONE,                      # [reclip] its student has the text as a classifier, and one loss
    "loss-mask": MASKS_ALONE,
    "loss-mask+feature": dict(text_weight=0.0),
    "maskclip+": MASKS_ALONE,
}
NUMBERS_FOR = {
    # [ours] With 0.9 the noise of Eq. 5 changes 54 % of the patches before training, as with the decoder and 2.
    "toyland": {"reclip": dict(mask_scale=0.9), "without-decoder": dict(mask_scale=0.9)},
    # MaskCLIP+ trains for 2,000 to 8,000 steps of 16 images: so do these epochs (4,004 on VOC).
    "voc": {"maskclip+": dict(epochs=44)},
    "context": {"maskclip+": dict(epochs=13)},
    "context-voc-first": {"maskclip+": dict(epochs=13)},
    "ade": {"maskclip+": dict(epochs=6)},
    "cityscapes": {"maskclip+": dict(epochs=22)},
    "coco": {"maskclip+": dict(epochs=1)},
}


def in_place_of(original, ablation: str):
    """What stands in the place of a class or function of rectify.py or distill.py; itself where nothing does."""
    return IN_PLACE_OF[ablation].get(original.__name__, original)


def recipe_for(ablation: str, recipe, data: str):
    """A recipe of either stage with the ablation's name and numbers."""
    numbers = NUMBERS.get(ablation, {}) | NUMBERS_FOR.get(data, {}).get(ablation, {})
    return replace(recipe, ablation=ablation, **{name: value for name, value in numbers.items() if hasattr(recipe, name)})
