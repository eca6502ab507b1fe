"""Stage 2 of ReCLIP++ (Sec. III-E): teach the rectified CLIP to a segmentation network, DeepLab V2.

    python distill.py                          continues from the newest rectification
    python distill.py --data voc               the rectification of that dataset; so context, ade, coco, …

The teacher is stage 1, frozen: its masks and its features. The student is a dilated ResNet with DeepLab V2's
head, whose output replaces CLIP's features. What comes behind (query head, bias logit map, decoder) it
inherits from the teacher, frozen. Reads images alone, no label of any kind. Writes runs/<data>/distill/.

    image ──CLIP──► Z ───────────► rectified masks (stage 1) ──► pseudo-labels ───┐ L_mask  Eq. 8
      │             │ L_feat  Eq. 9                                               │
      └─ResNet─ASPP─► Ẑ ── query head ── − bias logits ── decoder ── M^D ─────────┘
                    └───────────── L_text: the loss of Eq. 7 ◄────────┘

    L = L_mask + α L_feat + β L_text  (Eq. 10)

    B images · C classes · D joint dimension (512) · H,W pixels · h,w the student's grid (H/8, W/8)
"""

from __future__ import annotations

import argparse

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    return common.parser(__doc__, "training", "student")


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import clip
import data
import rectify
from harness import machine, processes, runs
from rectify import Rectifier, contrastive_loss, multi_label_hypothesis, rectified_masks, reference_features
from toyland import networks

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of stage 2: those of VOC, with their sources. RECIPES says what differs."""
    backbone: Literal[common.BACKBONES] = "resnet50"    # [code] ImageNet initialisation
    feature_weight: float = 0.5             # [paper] α
    text_weight: float = 0.5                # [paper] β
    losses_at: Literal["grid", "image"] = "grid"    # Eq. 8, 9 at the student's grid [ours: memory] or [paper]
    short_side: int = 512                   # [code] pixels
    crop: tuple[int, int] = (512, 512)      # [code] height, width
    scale: tuple[float, float] = (0.5, 2.0)   # [code]
    distort: bool = True                    # [code] photometric distortion
    batch_size: int = 16                    # [code]
    learning_rate: float = 0.01             # [code] SGD
    momentum: float = 0.9                   # [code]
    weight_decay: float = 5e-4              # [code]
    poly_power: float = 0.9                 # [code]
    floor: float = 0.01                     # [code] share of the learning rate it never falls below: 1e-4
    epochs: int = 100                       # [code]


RECIPES = {
    "voc": Recipe(),
    "context": Recipe(short_side=520, crop=(480, 480), epochs=150),     # [code] its img_scale: (520, 520)
    "ade": Recipe(epochs=150),                                          # [code]
    "cityscapes": Recipe(epochs=100),                                   # [code] its img_scale: (1024, 512)
    "coco": Recipe(epochs=50),                                          # [code]
    "folder": Recipe(),                                                 # [ours: VOC's]
    # [ours] A student and pictures for two cores. With the rate of VOC it learns less: after two epochs 30
    # mIoU with 0.01, 35 with 0.004, 43 with 0.0015, 40 with 0.0006 (one trial with an earlier ResNet; seed 0,
    # --epochs 2).
    "toyland": Recipe(backbone="small", short_side=144, crop=(144, 192), scale=(1.0, 1.0), distort=False,
                      learning_rate=0.0015, floor=1 / 15, epochs=8),
}
RECIPES["context-voc-first"] = RECIPES["context"]
RECIPES["toyland-things"] = RECIPES["toyland"]

# ------------------------------------------------------------------------------------------ the student


class DeepLabV2(nn.Module):
    """A dilated ResNet (output stride 8) and DeepLab V2's head: Ẑ, one unit vector per place. Sec. III-E.

    The head (ASPP) is the SUM of four 3×3 convolutions at rates 6, 12, 18, 24: Chen et al. 2017, Sec. 3.2,
    unlike the concatenation of DeepLab V3. (B, 3, H, W) → (B, D, ⌈H/8⌉, ⌈W/8⌉).
    """

    def __init__(self, backbone: str, dim: int, pretrained: bool):
        super().__init__()
        resnet = build_resnet(backbone, pretrained)
        self.backbone = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool,
                                      resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        channels = resnet.fc.in_features
        self.aspp = nn.ModuleList(nn.Conv2d(channels, dim, kernel_size=3, padding=rate, dilation=rate)
                                  for rate in (6, 12, 18, 24))
        for conv in self.aspp:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.backbone(images)                             # (B, 2048, h, w), with Toyland's 128
        x = sum(conv(x) for conv in self.aspp)                                  # (B, D, h, w)
        return F.normalize(x.float(), dim=1)                # the inherited head expects cosines, as from CLIP


def build_resnet(backbone: str, pretrained: bool) -> torchvision.models.ResNet:
    """torchvision's ResNet with dilation in place of the last two strides, with its pre-trained weights.

    Raises OSError when the ImageNet weights can neither be found in torch's cache nor be fetched.
    """
    if backbone == "small":
        return networks.small_resnet(pretrained)
    resnet = torchvision.models.get_model(backbone, replace_stride_with_dilation=[False, True, True])
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    try:
        if pretrained:
            resnet.load_state_dict(weights.get_state_dict(check_hash=True))
        return resnet
    except (OSError, RuntimeError) as error:
        raise OSError(f"expected the ImageNet weights of {backbone} to start the student with, found none "
                      f"that could be read or fetched ({error}). Connect once, or put "
                      f"{weights.url.rsplit('/', 1)[1]} into {torch.hub.get_dir()}/checkpoints.") from error


class Inherited(nn.Module):
    """What the student takes over from stage 1, frozen: query head, bias logit map, decoder. Sec. III-E.

    A copy of the whole rectifier, all of it buffers or parameters without gradient, in eval mode for ever
    (the decoder's BatchNorm keeps the statistics it had as a teacher), and none of it needs CLIP: the student
    is complete without it.
    """

    def __init__(self, rectifier: Rectifier, query: Tensor, reference: Tensor, positions: Tensor):
        super().__init__()
        self.rectifier = copy.deepcopy(rectifier)
        self.register_buffer("query", query)                                    # W_q (C, D)
        self.register_buffer("reference", reference)                            # W_r (C, D)
        self.register_buffer("positions", positions)                            # CLIP's PE (E, grid, grid)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    def bias(self, h: int, w: int):
        """M_b (C, h, w) at the student's grid: positions resampled as CLIP would, then Eq. 2."""
        positions = F.interpolate(self.positions[None], size=(h, w), mode="bicubic", align_corners=False)[0]
        return self.rectifier.bias(positions, self.reference)

    def forward(self, features: Tensor) -> Tensor:
        """Ẑ (B, D, h, w) → M^D (B, C, h, w): Eq. 3 and 4 on the student's features."""
        return self.rectifier(features, self.query, self.bias(*features.shape[-2:]))


class Student(nn.Module):
    """DeepLab V2 and the head that it inherits; `logits` is all that is needed at test time."""

    def __init__(self, backbone: str, head: Inherited, pretrained: bool):
        super().__init__()
        self.network = DeepLabV2(backbone, head.query.shape[1], pretrained)
        self.head = head

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → M^D (B, C, h, w)."""
        return self.head(self.network(images))


# ------------------------------------------------------------------------------------------ the losses


def mask_loss(student_logits: Tensor, pseudo_label: Tensor) -> Tensor:
    """L_mask: cross-entropy of the student's M^D against the teacher's rectified masks. Eq. 8, Sec. III-E.

    student_logits (B, C, h, w); pseudo_label (B, h, w) int64 in 0..C−1. The mean over all places of the
    student's grid (`losses_at`: of the image, as in the paper). Every place counts: the released code
    leaves out pixels that the ground truth does not know, which no unsupervised training may know.
    """
    return F.cross_entropy(student_logits.float(), pseudo_label)


def feature_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """L_feat: mean absolute difference of the student's Ẑ and CLIP's Z. Eq. 9, Sec. III-E.

    (B, D, h, w) and (B, D, h', w'), unit vectors. The teacher's are resized (bilinear) to the student's grid.
    The paper resizes both to the image (`losses_at`), which at 512 pixels takes twice 16 × 512 × 512 × 512
    numbers, 17 GB. The gradient reaches the student: the released code detaches it, so that this loss trained
    nothing.
    """
    return F.l1_loss(student_features, resized(teacher_features, student_features.shape[-2:]))


def text_loss(student_features: Tensor, student_masks: Tensor, query: Tensor, hypothesis: Tensor,
              scale: float, loss: Callable = contrastive_loss) -> Tensor:
    """L_text: the loss of Eq. 7 on the student's own features and masks. Sec. III-E, without a number."""
    return loss(student_features, student_masks, query, hypothesis, scale)


def total_loss(mask: Tensor, feature: Tensor, text: Tensor, alpha: float, beta: float) -> Tensor:
    """L_distill = L_mask + α L_feat + β L_text. Eq. 10, Sec. III-E."""
    return mask + alpha * feature + beta * text


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, h', w') resized, bilinear, to a grid (h, w)."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------ training


@torch.no_grad()
def teach(rectifier: Rectifier, clip_model: clip.CLIP, images: Tensor, query: Tensor, reference: Tensor,
          dense_path: str) -> tuple[Tensor, Tensor]:
    """The teacher's view of the student's pixels: `(Z (B, D, h', w'), M_o (B, C, h', w'))` of stage 1."""
    features = rectifier.encode(clip_model, images, dense_path)
    bias = rectifier.bias(clip_model.visual.patch_positions(*features.shape[-2:]), reference)
    return features, rectifier(features, query, bias)


def train_step(student: Student, teacher_features: Tensor, teacher_logits: Tensor, images: Tensor,
               votes: Tensor, teacher_recipe: rectify.Recipe, recipe: Recipe, noise: torch.Generator,
               loss: Callable = contrastive_loss) -> dict[str, Tensor]:
    """The losses of one batch, images (B, 3, H, W), votes f (B, C): "loss" is the total. Sec. III-E."""
    features = student.network(images)                                          # Ẑ (B, D, h, w)
    logits = student.head(features)                                             # M^D (B, C, h, w)
    uniform = processes.uniform(logits.shape, noise)
    masks = rectified_masks(logits, teacher_recipe.mask_scale, uniform)         # (B, C, h, w)   Eq. 5
    hypothesis = multi_label_hypothesis(votes, teacher_recipe.vote_threshold)   # H (B, C)       Eq. 6
    size = images.shape[-2:] if recipe.losses_at == "image" else logits.shape[-2:]
    pseudo_label = resized(teacher_logits, size).argmax(dim=1)                  # (B, *size)
    query, scale = student.head.query, teacher_recipe.loss_scale

    mask = mask_loss(resized(logits, size), pseudo_label)                       # L_mask         Eq. 8
    feature = feature_loss(resized(features, size), teacher_features)           # L_feat         Eq. 9
    text = text_loss(features, masks, query, hypothesis, scale, loss)           # L_text         no number
    alpha, beta = recipe.feature_weight, recipe.text_weight
    total = total_loss(mask, feature, text, alpha, beta)                        # L_distill      Eq. 10
    return {"loss": total, "mask": mask, "feature": feature, "text": text}


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The poly schedule, rate · (1 − step / steps)^0.9, which stays above a floor."""
    poly = recipe.learning_rate * (1 - step / steps) ** recipe.poly_power
    return max(recipe.floor * recipe.learning_rate, poly)


# ----------------------------------------------------------------------------------------- the parts of a run


@dataclass(frozen=True)
class System(rectify.System):
    """The exchangeable parts of both stages. These are ReCLIP++'s; paper/systems.py hands in others."""
    command: str = "python distill.py"
    head: type[Inherited] = Inherited                   # what makes logits of the student's features
    teacher: rectify.System | None = None               # whose rectification it learns from; None: its own
    student_numbers: dict[str, dict] = field(default_factory=dict)   # as `numbers`, for the recipe of stage 2

    def __post_init__(self):
        if self.teacher and (self.rectifier is not self.teacher.rectifier or self.numbers):
            raise ValueError(f"{self.name}: expected the teacher's rectifier and numbers, since that is who "
                             "trains them; found others. Leave them out, or leave the teacher out.")


def build_student(setup: data.Setup, rectifier: Rectifier, query: Tensor, recipe: Recipe, system: System,
                  pretrained: bool = True) -> Student:
    """A student in its initial state around what it inherits from `rectifier`."""
    with torch.no_grad():
        reference = reference_features(setup.clip_model, rectifier.prompt, setup.vocabulary.names)
    visual = setup.clip_model.visual
    grid = visual.input_resolution // visual.patch_size
    head = system.head(rectifier, query, reference, visual.patch_positions(grid, grid).detach().clone())
    return Student(recipe.backbone, head, pretrained).to(setup.device)


SETTINGS = runs.SETTINGS | {"teacher": int, "teacher_recipe": dict}        # what a student's checkpoint knows


def load_student(setup: data.Setup, query: Tensor, system: System) -> tuple[Recipe, Student]:
    """The trained student and its recipe, in eval mode. It does not need CLIP's image tower."""
    checkpoint = runs.load(setup.folder("distill") / "checkpoint.pt", "distill", SETTINGS)
    setup.refuse_misfit(checkpoint)
    runs.refuse_other_system(checkpoint, system.name)
    recipe, of_teacher = (runs.recipe_in(checkpoint, kind, key)
                          for kind, key in ((Recipe, "recipe"), (rectify.Recipe, "teacher_recipe")))
    rectifier = rectify.build_rectifier(setup, of_teacher, system)              # shapes alone; weights follow
    student = build_student(setup, rectifier, query, recipe, system, pretrained=False)
    runs.load_weights(student, checkpoint)
    return recipe, student.eval()


def teacher_number(checkpoint: dict) -> int:
    """A number for the settings of a stage-1 checkpoint: a student remembers from whom it learned."""
    return machine.seed_of(checkpoint["settings"])


def rectification(args: argparse.Namespace, system: rectify.System) -> dict:
    """The stage-1 checkpoint to continue from: of `--data`, else the newest; made first if there is none."""
    found = runs.find(args.out, args.data, "rectify")
    if found is not None:
        known = found["settings"]["recipe"].get("hypotheses")
        runs.refuse_unless(found["path"], "file of hypotheses", args.hypotheses or known, known)
        return found
    print("No rectification found: making one first, as python rectify.py would.")
    for_stage_2 = dict.fromkeys(("epochs", "batch_size", "learning_rate"))
    usual = vars(rectify.flags().parse_args([]))                        # of the flags that stage 2 lacks
    setup = rectify.main(argparse.Namespace(**usual | vars(args) | for_stage_2), system)
    return runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")


# ------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace, system: System = System()) -> data.Setup:
    """Distil the newest rectification; the result lies in `folder("distill")` of the returned setup."""
    of_stage_1 = rectification(args, system.teacher or system)
    setup = data.open_setup(args, of_stage_1)
    query = rectify.query_of(setup)
    teacher_recipe, rectifier = rectify.load_rectifier(setup, of_stage_1, system.teacher or system)
    votes = rectify.votes_of(setup, query, teacher_recipe, system)
    recipe = data.recipe_for(setup, RECIPES, system.student_numbers)
    per_epoch = data.steps_per_epoch(len(setup.training_images), recipe.batch_size)
    steps = recipe.epochs * per_epoch

    torch.manual_seed(machine.seed_of(args.seed, "student"))
    student = build_student(setup, rectifier, query, recipe, system)
    step_of = processes.parallel(train_step, student)           # one process: the function itself
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]  # the network's
    optimizer = torch.optim.SGD(learned, lr=recipe.learning_rate, momentum=recipe.momentum,
                                weight_decay=recipe.weight_decay)
    augment = data.augmentation(recipe.short_side, recipe.crop, recipe.scale, recipe.distort)
    dataset = data.TrainingImages(setup.training_images, augment, args.seed)
    noise, ids = torch.Generator(setup.device), list(setup.training_images)
    settings = setup.settings(system, recipe) | {"teacher": teacher_number(of_stage_1),
                                                 "teacher_recipe": asdict(teacher_recipe)}
    with runs.Training(setup.folder("distill"), "distill", settings, setup.header("distill", system, recipe),
                       student.train(), optimizer, steps=steps, steps_per_epoch=per_epoch, resume=args.resume,
                       save_every=args.save_every) as training:
        batches = data.training_batches(dataset, batch_size=recipe.batch_size, first_step=training.first_step,
                                        steps=steps, seed=args.seed, workers=setup.workers)
        for step, (batch, rows) in enumerate(batches, start=training.first_step):
            noise.manual_seed(machine.seed_of(args.seed, "gumbel", step))
            batch = batch.to(setup.device, non_blocking=True)
            with machine.autocast(setup.device, setup.precision):
                seen, taught = teach(rectifier, setup.clip_model, batch, query, student.head.reference,
                                     teacher_recipe.dense_path)
                losses = step_of(seen, taught, batch, votes[rows].to(setup.device), teacher_recipe, recipe,
                                 noise, system.loss)
            training.descend(losses["loss"], learning_rate(recipe, step, steps), [ids[row] for row in rows])
            training.done(**losses)
    return setup


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        finished = main(FLAGS)
        import evaluate                   # measuring opens labels: after training, and in no file that trains
        evaluate.after_training(finished, "distill")
