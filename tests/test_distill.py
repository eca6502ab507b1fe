"""Every equation of stage 2 (distill.py) against a slow computation, and what the student may and may not
learn.

    python -m pytest tests/test_distill.py           # seconds; `-m slow` adds ResNet-50 and ResNet-101

CLIP, the rectifier and the student are small and random here, and nothing is fetched. The tests of the
gradients and of the pseudo-labels guard against faults of the released code: two of its three losses trained
nothing, and ground truth decided which pixels were distilled.

    B images · C classes · D joint dimension · H,W pixels · h,w the student's grid (⌈H/8⌉, ⌈W/8⌉)
"""

import copy
import math
from dataclasses import asdict, replace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import clip
import distill
import rectify
from data import Setup
from datasets import IGNORE, words
from harness import files
from helpers import TINY, random, relative, toy_vocabulary, toy_setup, unit

VOCABULARY = toy_vocabulary()
C, D = len(VOCABULARY), TINY["embed_dim"]
HYPOTHESIS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()  # three classes in one image, one in the other
VOTES = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.1, 0.9, 0.0, 0.0]])  # of which that is above 0.1


TEACHER_RECIPE = rectify.Recipe(loss_scale=20.0, mask_scale=3.0, prompt_length=5, vote_threshold=0.1)
SMALL = distill.Recipe(backbone="small")


IMAGES = random(2, 3, 61, 77)               # 8 × 10 patches of CLIP, and as many places of the student's grid


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return toy_setup(tmp_path_factory.mktemp("runs"))


def new_rectifier(setup: Setup, seed: int = 0) -> rectify.Rectifier:
    """A teacher as if trained: no bias is 0, no scale 1, and BatchNorm remembers some mean and variance."""
    torch.manual_seed(seed)
    rectifier = rectify.Rectifier(setup.clip_model, C, prompt_length=5)
    with torch.no_grad():
        for parameter in rectifier.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        rectifier.decoder.norm.running_mean += torch.randn(C)
        rectifier.decoder.norm.running_var *= 0.5 + torch.rand(C)
    return rectifier.eval().requires_grad_(False)


@pytest.fixture
def rectifier(setup) -> rectify.Rectifier:
    return new_rectifier(setup)


QUERY = unit(C, D, seed=1)


@pytest.fixture
def student(setup, rectifier) -> distill.Student:
    """A small student in training mode, around a frozen copy of the teacher's parts."""
    torch.manual_seed(1)
    return distill.build_student(setup, copy.deepcopy(rectifier), QUERY, SMALL, distill.System(),
                                 pretrained=False).train()


@pytest.fixture
def lesson(setup, rectifier) -> tuple[torch.Tensor, torch.Tensor]:
    """What the teacher says of IMAGES: (Z, M_o)."""
    with torch.no_grad():
        reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    return distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference, dense_path="residual")


def step(student: distill.Student, lesson, recipe: distill.Recipe = distill.Recipe(), seed: int = 0):
    """One `train_step` on IMAGES."""
    return distill.train_step(student, *lesson, IMAGES, VOTES, teacher_recipe=TEACHER_RECIPE, recipe=recipe,
                              noise=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ the losses

def slow_resize(maps: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Bilinear, pixel centres at halves: every new place is a weighted mean of the four old ones around
    it."""
    B, K, old_h, old_w = maps.shape
    out = torch.empty(B, K, h, w)
    for i in range(h):
        for j in range(w):
            y = min(max((i + 0.5) * old_h / h - 0.5, 0), old_h - 1)
            x = min(max((j + 0.5) * old_w / w - 0.5, 0), old_w - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, old_h - 1), min(left + 1, old_w - 1)
            upper = (1 - (x - left)) * maps[:, :, top, left] + (x - left) * maps[:, :, top, right]
            lower = (1 - (x - left)) * maps[:, :, down, left] + (x - left) * maps[:, :, down, right]
            out[:, :, i, j] = (1 - (y - top)) * upper + (y - top) * lower
    return out


def slow_cross_entropy(logits: torch.Tensor, pseudo_label: torch.Tensor) -> float:
    """−log softmax at the pseudo-label, averaged over all places of all images."""
    B, _, h, w = logits.shape
    total = 0.0
    for b in range(B):
        for i in range(h):
            for j in range(w):
                powers = [math.exp(value) for value in logits[b, :, i, j].tolist()]
                total -= math.log(powers[pseudo_label[b, i, j]] / sum(powers))
    return total / (B * h * w)


def test_eq8_mask_loss_equals_the_loop():
    """L_mask: the cross-entropy of every place against the teacher's class there, averaged over all
    places."""
    logits, pseudo_label = random(2, C, 3, 4), random(2, C, 3, 4, seed=1).argmax(dim=1)
    found = distill.mask_loss(logits, pseudo_label)
    assert found.item() == pytest.approx(slow_cross_entropy(logits, pseudo_label), rel=1e-5)


def test_eq8_every_place_counts_and_none_can_be_ignored():
    """Each place has a gradient of its own, and a label 255, the mark of ignored pixels, is an error here."""
    logits = random(2, C, 3, 4).requires_grad_()
    pseudo_label = random(2, C, 3, 4, seed=1).argmax(dim=1)
    distill.mask_loss(logits, pseudo_label).backward()
    assert (logits.grad != 0).all()
    pseudo_label[0, 0, 0] = IGNORE
    with pytest.raises(IndexError):
        distill.mask_loss(logits, pseudo_label)


@pytest.mark.parametrize("teacher_grid", [(5, 6), (3, 4), (9, 7)])
def test_eq9_feature_loss_equals_the_loop(teacher_grid):
    """L_feat: the mean absolute difference; a teacher's coarser or finer grid is first resized to the
    student's."""
    ours, theirs = unit(2, D, 5, 6, dim=1), unit(2, D, *teacher_grid, dim=1, seed=1)
    resized, total = slow_resize(theirs, 5, 6), 0.0
    for b in range(2):
        for i in range(5):
            for j in range(6):
                total += (ours[b, :, i, j] - resized[b, :, i, j]).abs().sum().item()
    found = distill.feature_loss(ours, theirs)
    assert found.item() == pytest.approx(total / (2 * 5 * 6 * D), rel=1e-5)


def test_eq9_costs_nothing_only_when_student_and_teacher_agree():
    """Equal features have a loss of zero; any other have more."""
    features = unit(2, D, 5, 6, dim=1)
    assert distill.feature_loss(features, features.clone()).item() == 0
    assert distill.feature_loss(features, unit(2, D, 5, 6, dim=1, seed=1)).item() > 0


def test_text_loss_equals_the_loop():
    """L_text: pool the student's features by its masks, divide by n, cross-entropy of class k against all; k
    in H."""
    features, masks = unit(2, D, 3, 4, dim=1), random(2, C, 3, 4).softmax(dim=1)
    of_images = []
    for b in range(2):
        of_classes = []
        for k in HYPOTHESIS[b].nonzero().flatten().tolist():
            pooled = sum(masks[b, k, i, j] * features[b, :, i, j] for i in range(3) for j in range(4)) / 12
            powers = [math.exp(20.0 * (pooled @ row).item()) for row in QUERY]
            of_classes.append(-math.log(powers[k] / sum(powers)))
        of_images.append(sum(of_classes) / len(of_classes))
    found = distill.text_loss(features, masks, QUERY, HYPOTHESIS, scale=20.0)
    assert found.item() == pytest.approx(sum(of_images) / 2, rel=1e-5)


def test_eq10_the_total_is_mask_plus_alpha_feature_plus_beta_text():
    mask, feature, text = torch.tensor([0.7, 0.2, 3.0])
    assert distill.total_loss(mask, feature, text, alpha=0.5,
                              beta=0.25).item() == pytest.approx(0.7 + 0.1 + 0.75)


# ------------------------------------------------------------------------------------------ DeepLab V2

def test_aspp_is_the_sum_of_four_dilated_convolutions():
    """Rates 6, 12, 18, 24: nine places at that distance, zero outside the image, four results added; then
    length one."""
    network = distill.DeepLabV2("small", dim=5, pretrained=False)
    channels, h, w = network.aspp[0].in_channels, 27, 31
    network.backbone = nn.Identity()                              # the test hands the head its input directly
    with torch.no_grad():
        for conv in network.aspp:
            conv.bias += torch.randn(5)                          # fresh ones are 0 and would hide a lost bias
    x, expected = random(1, channels, h, w), torch.zeros(1, 5, h, w)
    assert len(network.aspp) == 4
    for conv, rate in zip(network.aspp, (6, 12, 18, 24)):
        expected += conv.bias.detach()[:, None, None]
        for i in range(3):
            for j in range(3):
                down, right = (i - 1) * rate, (j - 1) * rate
                shifted = torch.zeros_like(x)                          # x at (y + down, x + right), 0 outside
                shifted[:, :, max(0, -down):h - max(0, down), max(0, -right):w - max(0, right)] = \
                    x[:, :, max(0, down):h + min(0, down), max(0, right):w + min(0, right)]
                expected += torch.einsum("bchw,oc->bohw", shifted, conv.weight[:, :, i, j].detach())
    found = network(x).detach()
    assert relative(found, expected / expected.norm(dim=1, keepdim=True)) <= 1e-4
    assert torch.allclose(found.norm(dim=1), torch.ones(1, h, w), atol=1e-5)


def network_of_shapes(backbone: str) -> distill.DeepLabV2:
    """A network on torch's device `meta`: it has shapes and no numbers, so that ResNet-101 costs no time
    here."""
    with torch.device("meta"):
        return distill.DeepLabV2(backbone, D, pretrained=False)


@pytest.mark.parametrize("backbone", ["small", "resnet50", "resnet101"])
def test_output_stride_is_8_at_any_size(backbone):
    """(B, 3, H, W) → (B, D, ⌈H/8⌉, ⌈W/8⌉), also where 8 divides neither side."""
    network = network_of_shapes(backbone)
    for H, W in [(64, 80), (65, 79), (97, 131), (8, 33), (512, 512)]:
        features = network(torch.empty(2, 3, H, W, device="meta"))
        assert features.shape == (2, D, math.ceil(H / 8), math.ceil(W / 8))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["small", pytest.param("resnet50", marks=pytest.mark.slow),
                                      pytest.param("resnet101", marks=pytest.mark.slow)])
def test_features_are_unit_vectors_that_differ_from_place_to_place(backbone):
    """What takes the place of CLIP's features has their length; a random network keeps images and places
    apart."""
    torch.manual_seed(0)
    features = distill.DeepLabV2(backbone, D, pretrained=False)(random(2, 3, 65, 97))
    assert torch.allclose(features.norm(dim=1), torch.ones(2, 9, 13), atol=1e-5)
    right, left = features[..., 1:], features[..., :-1]
    assert (features[0] - features[1]).abs().max() > 1e-3 and (right - left).abs().max() > 1e-3



@pytest.mark.parametrize("backbone, blocks", [("small", (2, 2, 2, 2)), ("resnet50", (3, 4, 6, 3)),
                                              ("resnet101", (3, 4, 23, 3))])
def test_the_last_two_stages_are_dilated_by_2_and_4(backbone, blocks):
    """Stages 3 and 4 keep stride 1; behind the block where the stride was, the 3×3 convolutions have rate 2
    and 4."""
    stages = network_of_shapes(backbone).backbone[4:]
    assert tuple(map(len, stages)) == blocks
    strides = [stage[0].conv2.stride[0] for stage in stages]
    assert strides == [1, 2, 1, 1]
    dilations = [[block.conv2.dilation[0] for block in stage] for stage in stages]
    # torchvision gives the first block of a stage the rate of the stage before it: its input is not yet
    # finer.
    assert dilations == [[1] * blocks[0], [1] * blocks[1], [1] + [2] * (blocks[2] - 1),
                         [2] + [4] * (blocks[3] - 1)]


def test_missing_imagenet_weights_are_named(monkeypatch, tmp_path):
    """Without network the error says which file is wanted and where to put it; a random backbone is no
    substitute."""
    def no_network(url, *_, **__):
        raise URLError("no network in this test")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    with pytest.raises(OSError, match=f"{file} into .*checkpoints"):
        distill.DeepLabV2("resnet50", D, pretrained=True)


# ---------------------------------------------------------------------------------- what the student inherits

@pytest.mark.parametrize("size", [(32, 32), (61, 77)])
def test_inherited_head_on_the_teachers_features_is_the_teacher(setup, rectifier, student, size):
    """M^D of CLIP's own features equals stage 1's M_o bit for bit, on CLIP's own grid and on another."""
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    features, logits = distill.teach(rectifier, setup.clip_model, random(2, 3, *size), QUERY, reference,
                                     "value")
    assert torch.equal(features, setup.clip_model.encode_dense(random(2, 3, *size), path="value"))
    assert torch.equal(student.head(features), logits)


@pytest.mark.parametrize("grid", [(4, 4), (7, 9), (3, 2)])
def test_inherited_bias_follows_clips_positions_to_any_grid(setup, rectifier, student, grid):
    """At the student's grid M_b is Eq. 2 on positions resampled as CLIP itself resamples them (its own grid
    is 4 × 4)."""
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    positions = setup.clip_model.visual.patch_positions(*grid)
    assert torch.equal(student.head.bias(*grid),
                       rectify.bias_logits(positions, rectifier.projection, reference))


def test_inherited_stays_in_eval_mode(setup):
    """Whatever mode the teacher was in and however often train() is called: BatchNorm keeps the teacher's
    statistics."""
    rectifier = new_rectifier(setup).train()
    student = distill.build_student(setup, rectifier, QUERY, SMALL, distill.System(), pretrained=False)
    for change in (lambda: None, student.train, student.eval, student.train):
        change()
        assert not any(module.training for module in student.head.modules())
    assert all(module.training for module in student.network.modules())


def test_training_changes_nothing_that_was_inherited(student, lesson):
    """After a step the network's weights and statistics are others; every inherited tensor has its old
    bits."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, weight_decay=5e-4)
    step(student, lesson)["loss"].backward()
    optimizer.step()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("network.")}
    assert any(name.endswith("running_mean") for name in before if name.startswith("head."))


# --------------------------------------------------------------------------------------- who learns from what

LOSSES = ("mask_loss", "feature_loss", "text_loss")


def only(monkeypatch, kept: str) -> None:
    """Put zero in the place of the other two losses."""
    for name in LOSSES:
        if name != kept:
            monkeypatch.setattr(distill, name, lambda *_: torch.zeros(()))


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_trains_the_student(monkeypatch, student, lesson, name):
    """From the first convolution to the four of the head a gradient arrives; nothing inherited gets one."""
    only(monkeypatch, name)
    step(student, lesson)["loss"].backward()
    for layer in (student.network.backbone[0], student.network.backbone[4][0].conv2, *student.network.aspp):
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
    assert all(parameter.grad is None for parameter in student.head.parameters())
    assert not any(buffer.requires_grad for buffer in student.head.buffers())


def test_text_loss_trains_through_the_masks_too(monkeypatch, student, lesson):
    """With the pooled features held still, L_text still moves the network: by where it puts its masks."""
    only(monkeypatch, "text_loss")
    monkeypatch.setattr(distill, "contrastive_loss",
                        lambda features, *rest: rectify.contrastive_loss(features.detach(), *rest))
    step(student, lesson)["loss"].backward()
    assert student.network.backbone[0].weight.grad.any()


def test_nothing_trains_the_teacher(setup, rectifier, student):
    """Even a teacher that nobody froze gives features and logits without a gradient, and stays as it is."""
    rectifier.requires_grad_(True)
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    lesson = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference, dense_path="residual")
    assert not any(tensor.requires_grad for tensor in lesson)
    step(student, lesson)["loss"].backward()
    assert all(parameter.grad is None for module in (setup.clip_model, rectifier)
               for parameter in module.parameters())
    assert clip.fingerprint(setup.clip_model) == setup.fingerprint


@pytest.mark.parametrize("recipe, weights", [
    (distill.RECIPES["voc"],
     (1, 0.5, 0.5)), (replace(distill.Recipe(), feature_weight=3.0, text_weight=0.0), (1, 3, 0))])
def test_the_loss_is_mask_plus_half_feature_plus_half_text(student, lesson, recipe, weights):
    """L = L_mask + α L_feat + β L_text, and the three parts that are logged are these, without their
    weights."""
    parts = {name: loss.item() for name, loss in step(student, lesson, recipe, seed=4).items()}
    loss = parts.pop("loss")
    mask, feature, text = weights
    assert loss == pytest.approx(mask * parts["mask"] + feature * parts["feature"] + text * parts["text"],
                                 rel=1e-6)
    with torch.no_grad():                         # in train mode BatchNorm uses the batch: the same once more
        features = student.network(IMAGES)
        logits = student.head(features)
        pseudo_label = slow_resize(lesson[1], *logits.shape[-2:]).argmax(dim=1)
        uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(4))
        noisy = 3.0 * logits - (-uniform.log()).log()
        masks = F.one_hot(noisy.argmax(dim=1), C).permute(0, 3, 1, 2).float()
        expected = {"mask": slow_cross_entropy(logits, pseudo_label),
                    "feature": distill.feature_loss(features, lesson[0]).item(),
                    "text": distill.text_loss(features, masks, QUERY, HYPOTHESIS, 20.0).item()}
    assert parts == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("teacher_grid", [(8, 10), (4, 5), (11, 13)])
def test_pseudo_labels_are_the_teachers_argmax_everywhere(monkeypatch, student, teacher_grid):
    """Every place of the student's grid gets a class 0..C−1 from the teacher's resized logits; none is left
    out."""
    seen = []

    def remember(logits, pseudo_label):
        seen.append(pseudo_label)
        return logits.sum() * 0
    monkeypatch.setattr(distill, "mask_loss", remember)
    teacher_logits = random(2, C, *teacher_grid, seed=5)
    step(student, (unit(2, D, *teacher_grid, dim=1), teacher_logits))
    assert seen[0].shape == (2, 8, 10) and seen[0].dtype == torch.int64
    assert seen[0].unique().tolist() == list(range(C))                    # neither 255 nor −100 is among them
    assert torch.equal(seen[0], slow_resize(teacher_logits, 8, 10).argmax(dim=1))


def test_training_lowers_every_loss(student, lesson):
    """Fifteen steps on one batch: the student comes nearer to the masks, the features and the words."""
    optimizer = torch.optim.SGD(student.network.parameters(), lr=0.02, momentum=0.9)
    history = []
    for number in range(15):
        losses = step(student, lesson, seed=number)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in ("mask", "feature", "text"):
        assert sum(parts[name] for parts in history[-3:]) < sum(parts[name] for parts in history[:3])


# --------------------------------------------------------------------------------------- a student on its own

def test_student_runs_without_clip(setup, student, tmp_path, monkeypatch):
    """Weights saved and read back give the same logits in a student that was built around nothing and asks
    CLIP nothing."""
    student = student.eval()
    expected = student.logits(IMAGES)
    torch.save(student.state_dict(), tmp_path / "student.pt")

    empty = rectify.Rectifier(setup.clip_model, C, prompt_length=5)        # shapes alone
    inherited = distill.Inherited(empty, torch.zeros(C, D), torch.zeros(C, D),
                                  torch.zeros_like(student.head.positions))
    other = distill.Student("small", inherited, pretrained=False)
    other.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    for name in ("encode_image", "encode_text", "encode_dense", "encode_prompt"):
        monkeypatch.setattr(clip.CLIP, name, None)                          # a call would be a TypeError
    assert torch.equal(other.eval().logits(IMAGES), expected)


def checkpoint(setup: Setup, student: distill.Student) -> dict:
    setup.training_images = {}
    settings = setup.settings(distill.System(),
                              SMALL) | {"teacher": 1, "teacher_recipe": asdict(TEACHER_RECIPE)}
    return {"stage": "distill", "step": 1, "weights": student.state_dict(), "settings": settings}


def test_load_student_gives_the_trained_student_back(setup, student):
    """From checkpoint.pt: the same logits, in eval mode, whatever query is at hand."""
    files.save(setup.folder("distill") / "checkpoint.pt", checkpoint(setup, student))
    recipe, found = distill.load_student(setup, unit(C, D, seed=8), distill.System())
    assert not found.training and recipe.short_side == SMALL.short_side
    assert torch.equal(found.logits(IMAGES), student.eval().logits(IMAGES))


def test_load_student_refuses_other_words_and_another_clip(setup, student):
    """A student knows its own classes alone and was taught by one CLIP: anything else is an error that says
    so."""
    files.save(setup.folder("distill") / "checkpoint.pt", checkpoint(setup, student))
    other = words.vocabulary_of("toys", (("dog",), *VOCABULARY.synonyms[1:]))
    with pytest.raises(ValueError, match="another class list.*dog.*cat"):
        distill.load_student(replace(setup, vocabulary=other), QUERY, distill.System())
    with pytest.raises(ValueError, match="another CLIP"):
        another = replace(setup)
        another.fingerprint = "0123"
        distill.load_student(another, QUERY, distill.System())


# ------------------------------------------------------------------------------------------ the numbers

def test_the_recipe_of_voc_is_the_papers():
    """Every number of stage 2 on VOC, as the paper and the released code have it."""
    assert asdict(distill.RECIPES["voc"]) == dict(
        backbone="resnet50", feature_weight=0.5, text_weight=0.5, losses_at="grid", short_side=512,
                                                  crop=(512, 512), scale=(0.5, 2.0),
        distort=True, batch_size=16, learning_rate=0.01, momentum=0.9, weight_decay=5e-4, poly_power=0.9,
        floor=0.01, epochs=100)


@pytest.mark.parametrize("dataset, short_side, crop, epochs", [
    ("voc", 512, (512, 512),
     100), ("context", 520, (480, 480), 150), ("context-voc-first", 520, (480, 480), 150),
    ("ade", 512, (512, 512), 150), ("cityscapes", 512, (512, 512), 100), ("coco", 512, (512, 512), 50)])
def test_recipes_of_the_other_datasets_are_the_released_codes(dataset, short_side, crop, epochs):
    """Scale, crop and length differ; batch 16, rate 0.01, ratio 0.5 to 2 and all else are VOC's."""
    expected = replace(distill.RECIPES["voc"], short_side=short_side, crop=crop, epochs=epochs)
    assert distill.RECIPES[dataset] == expected


def test_rate_of_stage_2_falls_to_its_floor_and_stays_there():
    """rate · (1 − step/steps)^0.9, and never below 1e-4 with VOC's numbers: the last five steps of 1,000 are
    at it."""
    recipe = distill.RECIPES["voc"]
    rates = [distill.learning_rate(recipe, step, 1000) for step in range(1000)]
    assert rates[0] == 0.01 and rates[500] == pytest.approx(0.01 * 0.5 ** 0.9)
    assert min(rates) == rates[-1] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True)
    assert sum(rate == rates[-1] for rate in rates) == 5         # (6 / 1000)^0.9 > 0.01 > (5 / 1000)^0.9
    assert distill.learning_rate(replace(recipe, learning_rate=0.1), 999, 1000) == pytest.approx(1e-3)
