"""The other systems of the paper's tables: ReCLIP++ with one part replaced at a time, its predecessor ReCLIP, and
MaskCLIP+.

    python paper/run.py no-bias                trains, distils and measures one of them; --list prints all

Each hands its own parts to the same `main` of rectify.py and distill.py; the last section says which system is made of
which, and with which numbers. A part or a number that does not exist raises.

    B images · C classes · D joint dimension (512) · E ViT width (768) · h,w patches · n = h·w
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import rectify
from datasets import is_folder
from distill import Inherited, System
from harness import files, machine, runs
from rectify import Rectifier, contrastive_loss, query_logits, subtract_bias

# ---------------------------------------------------------------------------- stage 1: the rectifier

# Cosines differ less than what the decoder's BatchNorm gives out. The released codes multiply them ten times more, in
# Eq. 5 (1000 in ReCLIP, 100 in ReCLIP++) as for probabilities (100 and 10). So whatever has no decoder is multiplied by
# ten here, and every scale of the recipes, of the student's losses and of evaluate.py fits as it is.
LIKE_DECODED = 10.0


class Undecoded(nn.Module):
    """In the decoder's place: the logits as they are, times ten."""

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return LIKE_DECODED * logits


class WithoutDecoder(Rectifier):
    """M is the result: cosines less bias, no neighbourhood, no normalisation. Table III; so is ReCLIP."""

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.decoder = Undecoded()


class Entangled(Rectifier):
    """ReCLIP's bias, Table III's row before "independent encoding": class bias Z W_rᵀ plus space bias.

    The class bias depends on the image here: Reference meets CLIP's own features, not projected positions. The space
    bias is three times convolution 3×3, BatchNorm, ReLU on the positional embedding, E → D → D → C [ours: its widths
    are not known].
    """

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        D, E = self.projection.weight.shape[:2]
        del self.projection
        self.space = nn.Sequential(*(layer for into, out in ((E, D), (D, D), (D, classes)) for layer in (
            nn.Conv2d(into, out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())))

    def bias(self, positions: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """The Reference, (C, D), and the space bias, (C, h, w): the two meet in `subtract`."""
        return reference, self.space(positions[None])[0]

    def subtract(self, features: Tensor, query: Tensor, bias: tuple[Tensor, Tensor]) -> Tensor:
        reference, space = bias
        return subtract_bias(query_logits(features, query), query_logits(features, reference) + space)


class ReCLIP(WithoutDecoder, Entangled):
    """ReCLIP's bias without a decoder: Table III's first row, together with its hypothesis (whole_image_votes)."""


class LearnableQuery(Rectifier):
    """W_q starts at CLIP's text features and trains too, rows of length one. Table IV.

    What is stored is the way gone from the start, (C, D), so that weight decay pulls towards CLIP's words and not
    towards nothing [ours]. Eq. 7 still compares with CLIP's own words: the goal does not move with the learner.
    """

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.moved = nn.Parameter(torch.zeros(classes, clip_model.visual.proj.shape[1]))

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return super().subtract(features, F.normalize(query + self.moved, dim=1), bias)


class Addition(Rectifier):
    """M = M_q + M_b. Table V. The projection could learn the other sign; where it starts is all that differs."""

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return query_logits(features, query) + bias


class FineTuned(Rectifier):
    """CLIP's image tower trains with all the rest. Table VI: it forgets what it knew, 1.2 mIoU on VOC.

    The tower is a copy and part of the checkpoint. The hypothesis, the positions of Eq. 2 and the rows of MaskCLIP
    beside it are the untouched CLIP's.
    """

    frozen_clip = False

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.tower = copy.deepcopy(clip_model.visual).requires_grad_(True)

    def encode(self, clip_model: clip.CLIP, images: Tensor, path: str) -> Tensor:
        return self.tower.encode_dense(images, path)


class NoBias(Rectifier):
    """M = M_q: the decoder alone. What the whole of Sec. III-B gives is the distance to this one."""

    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        return positions.new_zeros(len(reference), *positions.shape[-2:])


class MaskCLIP(NoBias):
    """Nothing to learn: M_q is the result. The teacher of MaskCLIP+."""

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        del self.projection, self.decoder

    def forward(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return query_logits(features, query)


# ---------------------------------------------------------------------------- stage 1: the hypothesis
# A hypothesis that comes from no vote is written as votes: each of its classes has the same share. With a threshold
# of 0, Eq. 6 gives it back.

# ReCLIP's rule: the threshold on 100·cos, and how many classes are taken where none is above it. How its authors chose
# the thresholds is not known; labels may have helped. They did not help with ours.
WHOLE_IMAGE = {
    "voc": (23.0, 2), "context": (20.0, 6), "context-voc-first": (20.0, 6), "ade": (21.0, 5),
    "cityscapes": (21.5, 2), "coco": (20.0, 8),                             # [reclip]
    "folder": (20.0, 6),                                                    # [ours: Context's, where anything may be]
    # [ours] Names 5.4 classes in a training scene on average, as the windows do. But others: captions of Toyland name
    # things, so a whole scene looks like its things, hardly any stuff is named, and what is never named dies.
    "toyland": (13.0, 5),
}
ANY_THRESHOLD = {"any": dict(vote_threshold=0.0)}


def above_or_best(cosines: Tensor, threshold: float, count: int) -> Tensor:
    """{k : 100·cos > threshold}; where no class is above it, the `count` best. [reclip]

    cosines (B, C) → (B, C) bool.
    """
    above = 100 * cosines > threshold
    best = cosines.topk(min(count, cosines.shape[1]), dim=1).indices
    return torch.where(above.any(dim=1, keepdim=True), above, torch.zeros_like(above).scatter_(1, best, True))


def equal_votes(hypothesis: Tensor) -> Tensor:
    """H (B, C) bool → f (B, C), rows that sum to one."""
    return hypothesis.float() / hypothesis.sum(dim=1, keepdim=True)


def whole_image_votes(setup: data.Setup, query: Tensor, recipe: rectify.Recipe) -> Tensor:
    """H from one look at every whole image, as in ReCLIP: (images, C). Table III, and the line in Figure 3."""
    threshold, count = WHOLE_IMAGE["folder" if is_folder(setup.data) else setup.data]
    return equal_votes(above_or_best(whole_image_cosines(setup, query, recipe.short_side), threshold, count))


@torch.no_grad()
def whole_image_cosines(setup: data.Setup, query: Tensor, short_side: int) -> Tensor:
    """Cosine of every image with every class by CLIP's global encoder, (images, C): one window of ratio 1 each."""
    size, rows = setup.clip_model.visual.input_resolution, []
    whole = data.WholeImages(setup.training_images, short_side)
    for _, image in torch.utils.data.DataLoader(whole, batch_size=None, num_workers=setup.workers):
        with machine.autocast(setup.device, setup.precision):
            window = rectify.at_input_size(image.to(setup.device), 1.0, size)                   # (1, 3, size, size)
            feature = setup.clip_model.encode_image(window).float()                             # (1, D)
        rows.append((F.normalize(feature, dim=1) @ query.T).cpu())
    return torch.cat(rows)


def any_class(setup: data.Setup, query: Tensor, recipe: rectify.Recipe) -> Tensor:
    """H for MaskCLIP+, whose loss asks for none: no window is looked at."""
    return equal_votes(torch.ones(len(setup.training_images), len(query), dtype=torch.bool))


# ---------------------------------------------------------------------------- stage 1: the forms of Eq. 7
# Z_g is divided by n in contrastive_loss. Masks n / d times as heavy make it divided by d.


@machine.in_float32
def cosine_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """Eq. 7 as the paper writes it: S is the cosine of Z_g and W_q, whatever the mask's area.

    A sum of mask × feature shorter than one patch's is divided by one: an empty mask has logits 0 and a finite gradient.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)                                     # n·Z_g (B, C, D)
    length = total.norm(dim=-1).clamp(min=1)[..., None, None]                                   # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / length, query, hypothesis, scale)


@machine.in_float32
def area_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """Eq. 7 with Z_g as the mean over the mask and not over the image: small and large masks weigh alike.

    An area of less than one patch counts as one.
    """
    area = masks.sum(dim=(2, 3), keepdim=True).clamp(min=1)                                     # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / area, query, hypothesis, scale)


# ---------------------------------------------------------------------------- stage 2: the student's head


class OwnHead(Inherited):
    """A classifier of the student's own, a learned 1×1 convolution D → C, in place of all that is inherited. Table IX."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        self.classifier = nn.Conv2d(query.shape[1], len(query), kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * self.classifier(features)                         # features have length one


class QueryHead(Inherited):
    """M_q^D alone: the text features as a frozen classifier. Table IX; so are ReCLIP's and MaskCLIP+'s students."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * query_logits(features, self.query)


class QueryBiasHead(Inherited):
    """M_q^D − M_b without the decoder. Table IX."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * self.rectifier.subtract(features, self.query, self.bias(*features.shape[-2:]))


class WithoutTower(Inherited):
    """The student of a teacher with its own image tower does not take that over: it looks with its own network."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        if hasattr(self.rectifier, "tower"):
            del self.rectifier.tower


# ---------------------------------------------------------------------------- which system is which

MASKS_ALONE = dict(feature_weight=0.0, text_weight=0.0)
# [ours] With 0.9 the noise of Eq. 5 changes 54 % of the patches before training, as with the decoder and 2.
UNDECODED = {"toyland": dict(mask_scale=0.9)}
WHOLE = dict(votes=whole_image_votes)


def stage_1(name: str, **parts) -> System:
    return System(name=name, command=f"python paper/run.py {name}", **parts)


def stage_2(name: str, **parts) -> System:
    """A student of ReCLIP++'s own rectification."""
    return System(name=name, command=f"python paper/run.py {name}", teacher=rectify.System(), **parts)


SYSTEMS = {system.name: system for system in (
    System(),                                                                   # ReCLIP++
    # Table III, from ReCLIP to ReCLIP++: each row has one part more, the last one ("reclip++") independent encoding.
    # [reclip] ReCLIP's student has the text as a classifier, and one loss.
    stage_1("reclip", rectifier=ReCLIP, head=QueryHead, **WHOLE, numbers=ANY_THRESHOLD | UNDECODED,
            student_numbers={"any": MASKS_ALONE}),
    stage_1("reclip+decoder", rectifier=Entangled, **WHOLE, numbers=ANY_THRESHOLD),
    stage_1("reclip+decoder+windows", rectifier=Entangled),
    # One part of ReCLIP++ taken out or replaced.
    stage_1("without-decoder", rectifier=WithoutDecoder, numbers=UNDECODED),
    stage_1("whole-image", **WHOLE, numbers=ANY_THRESHOLD),
    stage_1("no-bias", rectifier=NoBias),
    stage_1("learnable-query", rectifier=LearnableQuery),                       # Table IV
    stage_1("addition", rectifier=Addition),                                    # Table V
    stage_1("fine-tuned", rectifier=FineTuned, head=WithoutTower),              # Table VI
    stage_1("loss-cosine", loss=cosine_loss),
    stage_1("loss-area", loss=area_loss),
    stage_1("no-bias+loss-cosine", rectifier=NoBias, loss=cosine_loss),
    stage_1("no-bias+loss-area", rectifier=NoBias, loss=area_loss),
    # Stage 2: Table VIII, Table IX.
    stage_2("loss-mask", student_numbers={"any": MASKS_ALONE}),
    stage_2("loss-mask+feature", student_numbers={"any": dict(text_weight=0.0)}),
    stage_2("own-head", head=OwnHead),
    stage_2("head-query", head=QueryHead),
    stage_2("head-query+bias", head=QueryBiasHead),
    # MaskCLIP+ trains for 2,000 to 8,000 steps of 16 images: so do these epochs (4,004 on VOC).
    stage_1("maskclip+", rectifier=MaskCLIP, head=QueryHead, votes=any_class,
            numbers={"any": dict(vote_threshold=0.0, prompt_length=1)},
            student_numbers={"any": MASKS_ALONE} | {name: MASKS_ALONE | dict(epochs=epochs) for name, epochs in (
                ("voc", 44), ("context", 13), ("context-voc-first", 13), ("ade", 6), ("cityscapes", 22),
                ("coco", 1))}),
)}


def of(checkpoint: dict) -> System:
    """The system that made a checkpoint. Raises ValueError for one that is not here."""
    name = checkpoint["settings"]["system"].get("name")
    if name not in SYSTEMS:
        raise ValueError(f"{checkpoint['path']}: expected a checkpoint of {', '.join(SYSTEMS)}, found one of {name}. "
                         "Add that system to SYSTEMS in paper/systems.py.")
    return SYSTEMS[name]


def untrained_teacher(setup: data.Setup, system: System) -> None:
    """Write the rectification of a system that has nothing to train in stage 1 (MaskCLIP+), for its student."""
    recipe = data.recipe_for(setup, rectify.RECIPES, system.numbers)
    rectifier = rectify.build_rectifier(setup, recipe, system)
    files.save(setup.folder("rectify") / "checkpoint.pt", {
        "stage": "rectify", "settings": runs.plain(setup.settings(system, recipe)), "step": 0,
        "weights": rectifier.state_dict()})
