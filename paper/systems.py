"""The other systems of the paper's tables: ReCLIP, MaskCLIP+, and ReCLIP++ with one part replaced at a time.

    python paper/run.py no-bias                trains, distils and measures one of them; --list prints all

Each hands its own parts to the same `main` of rectify.py and distill.py. The last section says which system
is made of which parts and numbers. A part or a number that does not exist raises.

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
from paper import windows
from rectify import Rectifier, contrastive_loss, query_logits, subtract_bias

# ---------------------------------------------------------------------------- stage 1: the rectifier

# Cosines differ less than what the decoder's BatchNorm gives out. The released codes multiply them ten times
# more, in Eq. 5 (1000 in ReCLIP, 100 in ReCLIP++) as for probabilities (100 and 10). So whatever has no
# decoder is multiplied by ten here, and every scale of the recipes, of the losses and of evaluate.py fits as
# it is.
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

    The class bias depends on the image here: Reference meets CLIP's own features, not projected positions.
    The space bias is three times convolution 3×3, BatchNorm, ReLU on the positional embedding, E → D → D → C
    [ours: its widths are not known].
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
    """ReCLIP's bias without a decoder. With whole_image_votes it is Table III's first row."""


class LearnableQuery(Rectifier):
    """W_q starts at CLIP's text features and trains too, rows of length one. Table IV.

    What is stored is the way gone from the start, (C, D), so that weight decay pulls towards CLIP's words and
    not towards nothing [ours]. Eq. 7 still compares with CLIP's own words: the goal does not move.
    """

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        self.moved = nn.Parameter(torch.zeros(classes, clip_model.visual.proj.shape[1]))

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return super().subtract(features, F.normalize(query + self.moved, dim=1), bias)


class Addition(Rectifier):
    """M = M_q + M_b. Table V. The projection can learn the other sign: only the start differs."""

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return query_logits(features, query) + bias


class FineTuned(Rectifier):
    """CLIP's image tower trains with all the rest. Table VI: it forgets what it knew, 1.2 mIoU on VOC.

    The tower is a copy and part of the checkpoint. The hypothesis, the positions of Eq. 2 and MaskCLIP's row
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


class MaskCLIP(WithoutDecoder, NoBias):
    """Nothing to learn: M_q is the result. The teacher of MaskCLIP+, written by `untrained_teacher`."""

    def __init__(self, clip_model: clip.CLIP, classes: int, prompt_length: int):
        super().__init__(clip_model, classes, prompt_length)
        del self.projection


# ---------------------------------------------------------------------------- stage 1: the hypothesis
# A hypothesis that comes from no vote is written as votes: each of its classes has the same share. With a
# threshold of 0, Eq. 6 gives it back.

# ReCLIP's rule: the threshold on 100·cos, and how many classes are taken where none is above it. How its
# authors chose the thresholds is not known; labels may have helped. They did not help with ours.
WHOLE_IMAGE = {
    "voc": (23.0, 2), "context": (20.0, 6), "context-voc-first": (20.0, 6), "ade": (21.0, 5),
    "cityscapes": (21.5, 2), "coco": (20.0, 8),                             # [reclip]
    "folder": (20.0, 6),                                                    # [ours: Context's]
    # [ours] Names 5.4 classes in a training scene on average, as the windows do. But others: captions of
    # Toyland name things, so a whole scene looks like its things, hardly any stuff is named, and what is
    # never named dies.
    "toyland": (13.0, 5), "toyland-things": (13.0, 5),
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


def named_after(numbers):
    """Decorator. Votes are stored under the name of the function that counts them: with other numbers it has
    another name, so that nothing stale is read."""
    def rename(function):
        function.__name__ += f" {numbers}"
        return function
    return rename


@named_after(WHOLE_IMAGE)
def whole_image_votes(setup: data.Setup, query: Tensor, recipe: rectify.Recipe) -> Tensor:
    """H from one look at every whole image, as in ReCLIP: (images, C). Table III; the line in Figure 3."""
    name = "folder" if is_folder(setup.data) else setup.data
    if name not in WHOLE_IMAGE:
        raise ValueError(f"--data {name}: expected ReCLIP's threshold for it, found those of "
                         f"{', '.join(WHOLE_IMAGE)}. Add a line to WHOLE_IMAGE in paper/systems.py.")
    cosines = whole_image_cosines(setup, query, recipe.short_side)
    return equal_votes(above_or_best(cosines, *WHOLE_IMAGE[name]))


@torch.no_grad()
def whole_image_cosines(setup: data.Setup, query: Tensor, short_side: int) -> Tensor:
    """Cosine of every image with every class by CLIP's global encoder: (images, C), from one window each."""
    size, rows = setup.clip_model.visual.input_resolution, []
    whole = data.WholeImages(setup.training_images, short_side)
    for _, image in torch.utils.data.DataLoader(whole, batch_size=None, num_workers=setup.workers):
        with machine.autocast(setup.device, setup.precision):
            window = rectify.at_input_size(image.to(setup.device), 1.0, size)             # (1, 3, size, size)
            feature = setup.clip_model.encode_image(window).float()                       # (1, D)
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

    A sum of mask × feature shorter than one patch's is divided by one: an empty mask has logits 0 and a
    finite gradient.
    """
    total = torch.einsum("bchw,bdhw->bcd", masks, features)                                 # n·Z_g (B, C, D)
    length = total.norm(dim=-1).clamp(min=1)[..., None, None]                               # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / length, query, hypothesis, scale)


@machine.in_float32
def area_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """Eq. 7 with Z_g as the mean over the mask and not over the image: small and large masks weigh alike.

    An area of less than one patch counts as one.
    """
    area = masks.sum(dim=(2, 3), keepdim=True).clamp(min=1)                                 # (B, C, 1, 1)
    return contrastive_loss(features, masks * masks[0, 0].numel() / area, query, hypothesis, scale)


# ---------------------------------------------------------------------------- stage 2: the student's head


class OwnHead(Inherited):
    """A classifier of the student's own, a learned 1×1 convolution D → C; nothing is inherited. Table IX."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        self.classifier = nn.Conv2d(query.shape[1], len(query), kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * self.classifier(features)                         # features have length one


class QueryHead(Inherited):
    """M_q^D alone: the text as a frozen classifier. Table IX; also ReCLIP's and MaskCLIP+'s students."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * query_logits(features, self.query)


class QueryBiasHead(Inherited):
    """M_q^D − M_b without the decoder. Table IX."""

    def forward(self, features: Tensor) -> Tensor:
        return LIKE_DECODED * self.rectifier.subtract(features, self.query, self.bias(*features.shape[-2:]))


class WithoutTower(Inherited):
    """For FineTuned: the student looks with its own network and does not take over the teacher's tower."""

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__(rectifier, query, reference, positions)
        del self.rectifier.tower


# ---------------------------------------------------------------------------- which system is which

MASKS_ALONE = dict(feature_weight=0.0, text_weight=0.0)
# [ours] With 0.9 the noise of Eq. 5 changes 54 % of the patches before training, as with the decoder and 2.
UNDECODED = dict.fromkeys(("toyland", "toyland-things"), dict(mask_scale=0.9))


def other(name: str, **parts) -> System:
    """ReCLIP++ but for some parts: see the fields of rectify.System and distill.System."""
    return System(name=name, command=f"python paper/run.py {name}", **parts)


def student(name: str, *, head: type[Inherited] = Inherited, student_numbers: dict | None = None) -> System:
    """Another student of ReCLIP++'s own rectification. Stage 1 has parts of its own for `other` alone."""
    return other(name, teacher=rectify.System(), head=head, student_numbers=student_numbers or {})


# MaskCLIP+ trains for 2,000 to 8,000 steps of 16 images: so do these epochs (4,004 on VOC).
MASKCLIP_PLUS_EPOCHS = {"voc": 44, "context": 13, "context-voc-first": 13, "ade": 6, "cityscapes": 22,
                        "coco": 1}

SYSTEMS = {system.name: system for system in (
    System(),                                                                   # ReCLIP++
    # Table III, from ReCLIP to ReCLIP++. Each row has one part more; the last ("reclip++") encodes class and
    # space bias independently. ReCLIP's student has the text as a classifier, and one loss. [reclip]
    other("reclip", rectifier=ReCLIP, votes=whole_image_votes, numbers=ANY_THRESHOLD | UNDECODED,
          head=QueryHead, student_numbers={"any": MASKS_ALONE}),
    other("reclip+decoder", rectifier=Entangled, votes=whole_image_votes, numbers=ANY_THRESHOLD),
    other("reclip+decoder+windows", rectifier=Entangled),
    # One part of ReCLIP++ taken out or replaced.
    other("without-decoder", rectifier=WithoutDecoder, numbers=UNDECODED),
    other("whole-image", votes=whole_image_votes, numbers=ANY_THRESHOLD),
    other("one-pass-windows", votes=windows.one_pass()),
    other("one-pass-windows-larger", votes=windows.one_pass(magnify=1.5)),
    other("one-pass-windows-late", votes=windows.one_pass(late=True)),
    other("no-bias", rectifier=NoBias),
    other("learnable-query", rectifier=LearnableQuery),                         # Table IV
    other("addition", rectifier=Addition),                                      # Table V
    other("fine-tuned", rectifier=FineTuned, head=WithoutTower),                # Table VI
    other("loss-cosine", loss=cosine_loss),
    other("loss-area", loss=area_loss),
    other("no-bias+loss-cosine", rectifier=NoBias, loss=cosine_loss),
    other("no-bias+loss-area", rectifier=NoBias, loss=area_loss),
    # Stage 2: Table VIII, Table IX, and Eq. 8 and 9 to the letter.
    student("loss-mask", student_numbers={"any": MASKS_ALONE}),
    student("loss-mask+feature", student_numbers={"any": dict(text_weight=0.0)}),
    student("own-head", head=OwnHead),
    student("head-query", head=QueryHead),
    student("head-query+bias", head=QueryBiasHead),
    student("losses-at-image", student_numbers={"any": dict(losses_at="image")}),
    other("maskclip+", rectifier=MaskCLIP, head=QueryHead, votes=any_class,
          numbers={"any": dict(vote_threshold=0.0, prompt_length=1)},
          student_numbers={"any": MASKS_ALONE} | {
              name: dict(epochs=epochs) for name, epochs in MASKCLIP_PLUS_EPOCHS.items()}),
)}


def of(checkpoint: dict) -> System:
    """The system that made a checkpoint. Raises ValueError for one that is not here."""
    made_by = checkpoint["settings"]["system"]
    if made_by.get("name") not in SYSTEMS:
        raise ValueError(f"{checkpoint['path']}: expected a checkpoint of a system of paper/systems.py, "
                         f"found one of {made_by.get('name')}. It was made with: {made_by.get('command')}")
    return SYSTEMS[made_by["name"]]


def rectification_of(system: System) -> rectify.System:
    """The system whose stage 1 it has: its own, or that of its teacher."""
    return rectify.System() if system == System() else system.teacher or system


def untrained_teacher(setup: data.Setup, system: System) -> None:
    """Write the rectification of a system with nothing to train in stage 1 (MaskCLIP+), for its student.

    Raises ValueError where the run folder holds the rectification of another system.
    """
    path = setup.folder("rectify") / "checkpoint.pt"
    if path.exists() and (found := of(runs.load(path, "rectify"))) is not system:
        raise ValueError(f"{path}: expected no rectification but that of {system.name}, found one of "
                         f"{found.name}. Give another --out, which keeps both.")
    recipe = rectify.recipe_of(setup, system)
    files.save(path, {"stage": "rectify", "settings": runs.plain(setup.settings(system, recipe)), "step": 0,
                      "weights": rectify.build_rectifier(setup, recipe, system).state_dict()})
