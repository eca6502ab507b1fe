"""Stage 2 of ReCLIP++ (Sec. III-E): teach the rectified CLIP to a segmentation network, DeepLab V2.

    python distill.py                          continues from the newest rectification
    python distill.py --data voc               the rectification of that dataset; so context, ade, cityscapes, coco

The teacher is stage 1, frozen: its masks and its features. The student is a dilated ResNet with DeepLab V2's head,
whose output replaces CLIP's features; what comes behind (query head, bias logit map, decoder) it inherits from the
teacher, frozen. Reads images alone, no label of any kind. Writes runs/<data>/distill/.

    image ──CLIP──► Z ───────────► rectified masks (stage 1) ──► pseudo-labels ───┐ Eq. 8
      │             │ Eq. 9 (L1)                                                  │
      └─ResNet─ASPP─► Ẑ ── query head ── − bias logits ── decoder ── M^D ─────────┘
                    └─────────────────── contrastive loss ◄───────────┘ Eq. 10

    B images · C classes · D joint dimension (512) · H,W pixels · h,w the student's grid (H/8, W/8)
"""

from __future__ import annotations

import argparse

import runs


ABLATIONS = ("loss-mask", "loss-mask+feature", "own-head", "head-query", "head-query+bias", "maskclip+")    # ablations.py


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__)
    parser.add_argument_group("ablation").add_argument(
        "--ablation", choices=("none", *ABLATIONS), metavar="NAME", default=argparse.SUPPRESS,
        help=f"train the student with one part replaced, or MaskCLIP+: {', '.join(ABLATIONS)} (default: that of the "
             "rectification, which is inherited)")
    parser.add_argument_group("student").add_argument(
        "--backbone", choices=("small", "resnet50", "resnet101"), default=argparse.SUPPRESS,
        help="torchvision's ResNet-50 or -101 with its ImageNet weights, or the small one of Toyland "
             "(default: small for toyland, else resnet50)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import clip
import data
import rectify
import toyland
from rectify import (Rectifier, build_rectifier, cached_hypotheses, cached_query, chosen, contrastive_loss, find_checkpoint,
                     load_checkpoint, load_rectifier, poly_rate, rectified_masks, reference_features, saved_recipe)
from world import World, open_world, recipe_for, refuse_another_folder

# ------------------------------------------------------------------------------------------ the recipe


@dataclass(frozen=True)
class Recipe:
    """Every number of stage 2. The defaults are those of VOC, with their sources; RECIPES says what differs."""
    backbone: str = "resnet50"              # [code] ImageNet initialisation
    feature_weight: float = 0.5             # [paper] α
    text_weight: float = 0.5                # [paper] β
    short_side: int = 512                   # [ours: the code's crop; it scales by U(0.5, 2) as stage 1 does]
    crop: tuple[int, int] = (512, 512)      # [code] height, width
    scale: tuple[float, float] = (0.5, 2.0)   # [code]
    distort: bool = True                    # [code] photometric distortion
    batch_size: int = 16                    # [code]
    learning_rate: float = 0.01             # [code] SGD
    momentum: float = 0.9                   # [code]
    weight_decay: float = 5e-4              # [code]
    poly_power: float = 0.9                 # [code]
    floor_rate: float = 1e-4                # [code] the rate never falls below
    epochs: int = 100                       # [code]
    ablation: str = "none"                  # what is replaced by what ablations.py has in its place; none: ReCLIP++


RECIPES = {
    "voc": Recipe(),
    "ade": Recipe(epochs=150),              # [code]
    "coco": Recipe(epochs=50),              # [code]
    "context": Recipe(),                    # [ours: no number is at hand for these: VOC's]
    "context-voc-first": Recipe(),
    "cityscapes": Recipe(),
    "folder": Recipe(),                     # [ours: VOC's]
    # [ours] A student and pictures for two cores. With the rate of VOC it learns less: after two epochs 30 mIoU with 0.01,
    # 35 with 0.004, 43 with 0.0015, 40 with 0.0006 (one trial with an earlier ResNet; seed 0, python distill.py --epochs 2).
    "toyland": Recipe(backbone="small", short_side=144, crop=(144, 192), scale=(1.0, 1.0), distort=False,
                      learning_rate=0.0015, epochs=8),
}

# ------------------------------------------------------------------------------------------ the student


class DeepLabV2(nn.Module):
    """A dilated ResNet (output stride 8) and DeepLab V2's head: Ẑ, one unit vector per place. Sec. III-E.

    The head (ASPP) is the SUM of four 3×3 convolutions at rates 6, 12, 18, 24: Chen et al. 2017, Sec. 3.2, unlike the
    concatenation of DeepLab V3. (B, 3, H, W) → (B, D, ⌈H/8⌉, ⌈W/8⌉).
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
        x = self.backbone(images)                                               # (B, 2048, h, w)
        x = sum(conv(x) for conv in self.aspp)                                  # (B, D, h, w)
        return F.normalize(x.float(), dim=1)                # the inherited head expects cosines, as from CLIP


def build_resnet(backbone: str, pretrained: bool) -> torchvision.models.ResNet:
    """torchvision's ResNet with dilation in place of the last two strides, with its pre-trained weights.

    Raises OSError when the ImageNet weights can neither be found in torch's cache nor be fetched.
    """
    if backbone == "small":
        return toyland.small_resnet(pretrained)
    build, weights = {"resnet50": (torchvision.models.resnet50, torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
                      "resnet101": (torchvision.models.resnet101, torchvision.models.ResNet101_Weights.IMAGENET1K_V1)}[backbone]
    try:
        return build(weights=weights if pretrained else None, replace_stride_with_dilation=[False, True, True])
    except (OSError, RuntimeError) as error:
        raise OSError(f"expected the ImageNet weights of {backbone} to start the student with, found none that could be read "
                      f"or fetched ({error}). Connect once, or put {weights.url.rsplit('/', 1)[1]} into "
                      f"{torch.hub.get_dir()}/checkpoints.") from error


class Inherited(nn.Module):
    """What the student takes over from stage 1, frozen: query head, bias logit map, decoder. Sec. III-E.

    A copy of the whole rectifier, all of it buffers or parameters without gradient, in eval mode for ever (the decoder's
    BatchNorm keeps the statistics it had as a teacher), and none of it needs CLIP: the student is complete without it.
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

    def bias(self, h: int, w: int) -> Tensor:
        """M_b (C, h, w) at the student's grid: positions resampled as CLIP would, then Eq. 2."""
        positions = self.positions
        if positions.shape[-2:] != (h, w):
            positions = F.interpolate(positions[None], size=(h, w), mode="bicubic", align_corners=False)[0]
        return self.rectifier.bias(positions, self.reference)

    def forward(self, features: Tensor) -> Tensor:
        """Ẑ (B, D, h, w) → M^D (B, C, h, w): Eq. 3 and 4 on the student's features."""
        return self.rectifier(features, self.query, self.reference, self.bias(*features.shape[-2:]))


class Student(nn.Module):
    """DeepLab V2 plus what it inherits; `logits` is all that is needed at test time."""

    def __init__(self, backbone: str, inherited: Inherited, pretrained: bool):
        super().__init__()
        self.network = DeepLabV2(backbone, inherited.query.shape[1], pretrained)
        self.inherited = inherited

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → M^D (B, C, h, w)."""
        return self.inherited(self.network(images))


# ------------------------------------------------------------------------------------------ the losses


def mask_loss(student_logits: Tensor, pseudo_label: Tensor) -> Tensor:
    """L_mask: cross-entropy of the student's M^D against the teacher's rectified masks. Eq. 8, Sec. III-E.

    student_logits (B, C, h, w); pseudo_label (B, h, w) int64 in 0..C−1, every pixel counts: the released code leaves out
    pixels that the ground truth does not know, which no unsupervised training may know.
    """
    return F.cross_entropy(student_logits.float(), pseudo_label)


def feature_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """L_feat: mean absolute difference of the student's Ẑ and CLIP's Z. Eq. 9, Sec. III-E.

    (B, D, h, w) and (B, D, h', w'), unit vectors: the teacher's are resized (bilinear) to the student's grid. The gradient
    reaches the student (the released code detaches it, so that this loss trained nothing).
    """
    return F.l1_loss(student_features, at_grid(teacher_features, student_features))


def text_loss(student_features: Tensor, student_masks: Tensor, query: Tensor, hypothesis: Tensor, scale: float) -> Tensor:
    """L_text: the contrastive loss of stage 1 with the student's own features and masks. Eq. 10, Sec. III-E; see Eq. 7."""
    return contrastive_loss(student_features, student_masks, query, hypothesis, scale)


def at_grid(maps: Tensor, like: Tensor) -> Tensor:
    """(B, K, h', w') resized, bilinear, to the grid of `like` (B, ·, h, w)."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------ training


@torch.no_grad()
def teach(rectifier: Rectifier, clip_model: clip.CLIP, images: Tensor, query: Tensor, reference: Tensor,
          dense_path: str) -> tuple[Tensor, Tensor]:
    """The teacher's view of the student's very pixels: `(Z (B, D, h', w'), M_o (B, C, h', w'))` of stage 1."""
    features = rectifier.encode(clip_model, images, dense_path)
    bias = rectifier.bias(clip_model.visual.patch_positions(*features.shape[-2:]), reference)
    return features, rectifier(features, query, reference, bias)


def train_step(student: Student, teacher_features: Tensor, teacher_logits: Tensor, images: Tensor, hypothesis: Tensor,
               teacher_recipe: rectify.Recipe, recipe: Recipe, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, L = L_mask + α L_feat + β L_text, and its three parts. Sec. III-E."""
    features = student.network(images)                                                            # Ẑ (B, D, h, w)
    logits = student.inherited(features)                                                          # M^D (B, C, h, w)
    pseudo_label = at_grid(teacher_logits, logits).argmax(dim=1)                                  # (B, h, w)
    uniform = torch.rand(logits.shape, generator=noise, device=logits.device)
    masks = rectified_masks(logits, teacher_recipe.mask_scale, teacher_recipe.mask_tau, uniform)
    of_masks = mask_loss(logits, pseudo_label)                                                    #         Eq. 8
    of_features = feature_loss(features, teacher_features)                                        #         Eq. 9
    of_text = chosen(teacher_recipe, text_loss)(features, masks, student.inherited.query, hypothesis,
                                                teacher_recipe.loss_scale)                        #         Eq. 10
    loss = of_masks + recipe.feature_weight * of_features + recipe.text_weight * of_text
    return loss, {"mask": of_masks.item(), "feature": of_features.item(), "text": of_text.item()}


# ------------------------------------------------------------------------------------------ the run


def build_student(world: World, rectifier: Rectifier, query: Tensor, recipe: Recipe, pretrained: bool = True) -> Student:
    """A student in its initial state around what it inherits from `rectifier`."""
    with torch.no_grad():
        reference = reference_features(world.clip_model, rectifier.prompt, world.vocabulary.names)
    visual = world.clip_model.visual
    grid = visual.input_resolution // visual.patch_size
    head = chosen(recipe, Inherited)
    inherited = head(rectifier, query, reference, visual.patch_positions(grid, grid).detach().clone())
    return Student(recipe.backbone, inherited, pretrained).to(world.device)


def teacher_of(checkpoint: dict) -> int:
    """A number for the settings of a stage-1 checkpoint: a student remembers from whom it learned."""
    return runs.seed_of(checkpoint["settings"])


def load_student(world: World, query: Tensor) -> tuple[Recipe, Student]:
    """The recipe of `world`'s trained student, and the student, in eval mode. It holds all it needs; CLIP's image tower is
    not run."""
    path = world.folder("distill") / "checkpoint.pt"
    checkpoint = load_checkpoint(path, "distill")
    world.refuse_misfit(checkpoint)
    with runs.reading(path):
        recipe = Recipe(**checkpoint["settings"]["recipe"])
        rectifier = build_rectifier(world, saved_recipe(checkpoint, "teacher_recipe"))      # shapes alone; weights follow
        student = build_student(world, rectifier, query, recipe, pretrained=False)
        student.load_state_dict(checkpoint["weights"])
        return recipe, student.eval()


def resolved(world: World, args: argparse.Namespace, teacher_recipe: rectify.Recipe) -> Recipe:
    """The dataset's recipe with what the flags say put in, and the teacher's ablation."""
    recipe = recipe_for(world, inheriting(args, teacher_recipe), RECIPES)
    return replace(recipe, backbone=getattr(args, "backbone", recipe.backbone))


def main(args: argparse.Namespace) -> Path:
    """Distil the newest rectification (making one first if there is none) and return the checkpoint's path."""
    world, teacher_checkpoint = world_and_teacher(args)
    query = cached_query(world)
    teacher_recipe, rectifier = load_rectifier(world, teacher_checkpoint)
    recipe = resolved(world, args, teacher_recipe)
    images = world.training_images
    per_epoch = data.steps_per_epoch(len(images), recipe.batch_size)
    steps = recipe.epochs * per_epoch

    hypotheses = chosen(teacher_recipe, cached_hypotheses)(world, query, images, teacher_recipe)
    row = {name: number for number, name in enumerate(images)}
    torch.manual_seed(runs.seed_of(args.seed, "student"))
    student = build_student(world, rectifier, query, recipe)
    reference = student.inherited.reference
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]     # the network's alone
    optimizer = torch.optim.SGD(learned, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    settings = world.settings(recipe, args.seed) | {"teacher": teacher_of(teacher_checkpoint),
                                                    "teacher_recipe": asdict(teacher_recipe)}
    run = runs.Training(world.folder("distill"), "distill", settings, world.header("distill", recipe, args.seed), student,
                        optimizer, steps=steps, steps_per_epoch=per_epoch, resume=args.resume)
    dataset = data.TrainingImages(images, data.augmentation(recipe.short_side, recipe.crop, recipe.scale, recipe.distort),
                                  args.seed)
    batches = data.training_batches(dataset, batch_size=recipe.batch_size, first_step=run.first_step, steps=steps,
                                    seed=args.seed, workers=world.workers)
    noise = torch.Generator(world.device)
    student.train()
    with run:
        for step, (batch, ids) in enumerate(batches, start=run.first_step):
            batch = batch.to(world.device, non_blocking=True)
            noise.manual_seed(runs.seed_of(args.seed, "gumbel", step))
            hypothesis = hypotheses[[row[name] for name in ids]].to(world.device)
            with runs.autocast(world.device, world.precision):
                teacher_features, teacher_logits = teach(rectifier, world.clip_model, batch, query, reference,
                                                         teacher_recipe.dense_path)
                loss, losses = train_step(student, teacher_features, teacher_logits, batch, hypothesis,
                                          teacher_recipe, recipe, noise)
            run.refuse_non_finite(loss, step, ids)
            rate = max(recipe.floor_rate, poly_rate(recipe.learning_rate, step, steps, recipe.poly_power))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.done(step, {"loss": loss.item(), **losses}, rate)
    path = run.finish()

    import evaluate                                 # after training, and not before: it may open labels
    teacher = "maskclip" if recipe.ablation == "maskclip+" else "rectify"
    evaluate.after_training(world, [teacher, "distill"], "distill", query)
    print(f"\nNext: python evaluate.py{runs.repeated(args)}")
    return path


def world_and_teacher(args: argparse.Namespace) -> tuple[World, dict]:
    """The world to train in and the stage-1 checkpoint to continue from; MaskCLIP+ learns from CLIP as it is."""
    if getattr(args, "ablation", "none") == "maskclip+":
        import ablations
        world = open_world(args)
        refuse_another_folder(world)
        return world, ablations.untrained_teacher(world)
    checkpoint = rectification(args)
    return open_world(args, checkpoint), checkpoint


def inheriting(args: argparse.Namespace, teacher_recipe: rectify.Recipe) -> argparse.Namespace:
    """The flags; where they name no ablation, with the teacher's. Raises ValueError where each has one of its own."""
    name, of_teacher = getattr(args, "ablation", "none"), teacher_recipe.ablation
    if of_teacher != "none" and name not in ("none", of_teacher):
        raise ValueError(f"--ablation {name}: expected a rectification without an ablation to continue from, found one with "
                         f"{of_teacher}, which its student inherits. Leave the flag out, or rectify anew (another --out "
                         "keeps both).")
    return argparse.Namespace(**vars(args) | {"ablation": name if of_teacher == "none" else of_teacher})


def rectification(args: argparse.Namespace) -> dict:
    """The stage-1 checkpoint to continue from: that of `--data`, else the newest; stage 1 is run first if there is none."""
    found = find_checkpoint(args, "rectify")
    if found is None:
        print("No rectification found: making one first, as python rectify.py would.")
        flags = argparse.Namespace(**vars(args))
        for name in ("epochs", "batch_size", "backbone", "ablation"):       # these are meant for stage 2
            if hasattr(flags, name):
                delattr(flags, name)
        found = load_checkpoint(rectify.main(flags), "rectify")
    return found


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
