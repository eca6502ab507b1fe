"""Every ablation (ablations.py) and MaskCLIP's key smoothing: an equation against a slow loop, or an exact invariance.

    python -m pytest tests/test_ablations.py         # `-m "not slow"` leaves out the whole runs of every name

CLIP, rectifier and student are small and random here: an equation holds for any weights.

    B images · C classes · D joint dimension · E ViT width · h,w patches · n = h·w
"""

import copy
import inspect
import json
import math
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ablations
import clip
import data
import distill
import evaluate
import rectify
import runs
from helpers import (TINY, quick_recipes, random, refusal, relative, run, toy_vocabulary, toy_world, unit, write_photos,
                     write_voc_tree)

VOCABULARY = toy_vocabulary()
C, D, E = len(VOCABULARY), TINY["embed_dim"], TINY["width"]
HYPOTHESIS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()              # three classes in one image, one in the other
RECIPE = rectify.Recipe(loss_scale=20.0, mask_scale=3.0, prompt_length=5)
SMALL = distill.Recipe(backbone="small")


IMAGES, QUERY = random(2, 3, 24, 37), unit(C, D, seed=1)                    # 3 × 5 patches of 8 pixels, the last ones padded
FEATURES, REFERENCE, BIAS = unit(2, D, 3, 5, dim=1, seed=2), 0.5 * unit(C, D, seed=3), random(C, 3, 5, seed=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy_world(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def positions(world) -> torch.Tensor:
    return world.clip_model.visual.patch_positions(3, 5)


def trained(world: rectify.World, ablation: str = "none") -> rectify.Rectifier:
    """A rectifier as if trained: no bias is 0, no scale 1, and BatchNorm remembers some mean and variance."""
    torch.manual_seed(0)
    rectifier = rectify.build_rectifier(world, replace(RECIPE, ablation=ablation))
    with torch.no_grad():
        for name, parameter in rectifier.named_parameters():
            if not name.startswith("tower."):
                parameter += 0.1 * torch.randn_like(parameter)
        for module in rectifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += torch.randn(module.num_features)
                module.running_var *= 0.5 + torch.rand(module.num_features)
    return rectifier.eval()


def train_step(world, rectifier, ablation: str = "none", seed: int = 0) -> torch.Tensor:
    return rectify.train_step(rectifier, world.clip_model, IMAGES, HYPOTHESIS, QUERY, VOCABULARY.names,
                              replace(RECIPE, ablation=ablation), torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ names and numbers

def test_help_names_every_ablation_and_none_that_is_not_there():
    """What the two scripts offer is what ablations.py has; only ReCLIP's rows of Table III may be made of the same parts."""
    assert {*rectify.ABLATIONS, *distill.ABLATIONS} == set(ablations.IN_PLACE_OF)
    assert not set(rectify.ABLATIONS) & set(distill.ABLATIONS)
    for script in (rectify, distill):
        [action] = [action for action in script.flags()._actions if "--ablation" in action.option_strings]
        assert all(name in action.help for name in script.ABLATIONS) and action.choices == ("none", *script.ABLATIONS)


def test_what_stands_in_a_place_is_called_like_what_stood_there():
    """Every replaced name exists in its stage, and its replacement takes the same arguments."""
    for ablation, replacements in ablations.IN_PLACE_OF.items():
        for name, replacement in replacements.items():
            original = getattr(rectify, name, None) or getattr(distill, name)
            assert len(inspect.signature(replacement).parameters) == len(inspect.signature(original).parameters)
            assert not inspect.isclass(original) or issubclass(replacement, original)
            assert rectify.chosen(replace(RECIPE, ablation=ablation), original) is replacement
            assert rectify.chosen(RECIPE, original) is original


def test_numbers_of_an_ablation_are_fields_of_a_recipe():
    """Every number is a field of a stage that offers or inherits the name, and for a dataset that is known."""
    known = {field.name for stage in (rectify, distill) for field in fields(stage.Recipe)}
    for dataset, table in {"voc": ablations.NUMBERS, **ablations.NUMBERS_FOR}.items():
        assert dataset in data.KNOWN
        assert all(ablation in ablations.IN_PLACE_OF and known >= numbers.keys() for ablation, numbers in table.items())
    assert set(ablations.WHOLE_IMAGE) == {*data.KNOWN, "folder"}


def test_reclips_thresholds_are_the_papers():
    assert {name: ablations.WHOLE_IMAGE[name] for name in ("voc", "context", "ade", "cityscapes", "coco")} \
        == {"voc": (23, 2), "context": (20, 6), "ade": (21, 5), "cityscapes": (21.5, 2), "coco": (20, 8)}


@pytest.mark.parametrize("ablation, changed", [
    ("no-bias", {}), ("reclip", {}), ("loss-area", {})])
def test_recipes_of_stage_1_differ_in_nothing_else(ablation, changed):
    """Not even without a decoder, whose place is taken by a factor: cosines are multiplied by 1000 in all, as in ReCLIP."""
    assert ablations.LIKE_DECODED * rectify.RECIPES["voc"].mask_scale == 1000
    found = asdict(ablations.recipe_for(ablation, rectify.RECIPES["voc"], "voc"))
    assert found == asdict(rectify.RECIPES["voc"]) | {"ablation": ablation} | changed


@pytest.mark.parametrize("ablation, changed", [
    ("loss-mask", {"feature_weight": 0.0, "text_weight": 0.0}), ("loss-mask+feature", {"text_weight": 0.0}),
    ("own-head", {}), ("reclip", {"feature_weight": 0.0, "text_weight": 0.0}), ("addition", {}),
    ("maskclip+", {"feature_weight": 0.0, "text_weight": 0.0, "epochs": 44})])
def test_recipes_of_stage_2_differ_in_nothing_else(ablation, changed):
    """Table VIII is numbers alone; --epochs still has the last word."""
    found = asdict(ablations.recipe_for(ablation, distill.RECIPES["voc"], "voc"))
    assert found == asdict(distill.RECIPES["voc"]) | {"ablation": ablation} | changed
    args = distill.flags().parse_args(["--epochs", "3"])
    args.ablation = ablation
    voc = rectify.World("voc", *[None] * 9)
    assert rectify.recipe_for(voc, args, distill.RECIPES).epochs == 3


@pytest.mark.parametrize("dataset, epoch, steps", [("voc", 1464, 4004), ("context", 4996, 4056), ("ade", 20210, 7578),
                                                   ("cityscapes", 2975, 4070), ("coco", 118287, 7392)])
def test_maskclip_plus_trains_as_many_steps_as_the_original(dataset, epoch, steps):
    """2,000 to 8,000 steps of 16 images."""
    recipe = ablations.recipe_for("maskclip+", distill.RECIPES[dataset], dataset)
    assert recipe.epochs * data.steps_per_epoch(epoch, recipe.batch_size) == steps and 2000 <= steps <= 8000


# ------------------------------------------------------------------------------------------ stage 1: the rectifier

def test_without_decoder_equals_eq3_by_hand(world, positions):
    """Ten times M: at every place the cosine less the bias, and nothing of the neighbours."""
    rectifier = trained(world, "without-decoder")
    bias = rectifier.bias(positions, REFERENCE)
    found = rectifier(FEATURES, QUERY, REFERENCE, bias)
    for b in range(2):
        for k in range(C):
            for i in range(3):
                for j in range(5):
                    expected = 10 * (FEATURES[b, :, i, j] @ QUERY[k] - bias[k, i, j]).item()
                    assert found[b, k, i, j].item() == pytest.approx(expected, abs=1e-5)
    assert not any(name.startswith("decoder") for name in rectifier.state_dict())


def test_no_bias_equals_reclip_plus_plus_with_a_bias_of_zero(world, positions):
    """The same decoder gives the same bits, on whatever grid; nothing else of the rectifier learns."""
    without, full = trained(world, "no-bias"), trained(world)
    nn.init.zeros_(full.projection.weight), nn.init.zeros_(full.projection.bias)
    assert torch.equal(without(FEATURES, QUERY, REFERENCE, without.bias(positions, REFERENCE)),
                       full(FEATURES, QUERY, REFERENCE, full.bias(positions, REFERENCE)))
    train_step(world, without, "no-bias").backward()
    assert {name for name, parameter in without.named_parameters() if parameter.grad is not None} \
        == {name for name, _ in without.named_parameters() if name.startswith("decoder.")}


def test_addition_of_a_negated_projection_is_subtraction(world, positions):
    """Bit for bit; with the same projection it is something else."""
    added, full = trained(world, "addition"), trained(world)
    expected = full(FEATURES, QUERY, REFERENCE, full.bias(positions, REFERENCE))
    assert not torch.equal(added(FEATURES, QUERY, REFERENCE, added.bias(positions, REFERENCE)), expected)
    with torch.no_grad():
        added.projection.weight.neg_(), added.projection.bias.neg_()
    assert torch.equal(added(FEATURES, QUERY, REFERENCE, added.bias(positions, REFERENCE)), expected)


def slow_space_bias(space: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Three times: 3×3 neighbourhoods with zeros outside, the kept mean and variance, no number below zero. (E, h, w)."""
    for conv, norm in ((space[0], space[1]), (space[3], space[4]), (space[6], space[7])):
        _, h, w = x.shape
        out = torch.zeros(len(conv.weight), h, w)
        for i in range(h):
            for j in range(w):
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < h and 0 <= j + dj < w:
                            out[:, i, j] += conv.weight[:, :, 1 + di, 1 + dj] @ x[:, i + di, j + dj]
        x = (out - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    return x


@torch.no_grad()
def test_entangled_bias_equals_the_loop(world, positions):
    """Class bias Z W_rᵀ, image by image, plus space bias; both taken from M_q, then the decoder."""
    rectifier = trained(world, "entangled")
    space = slow_space_bias(rectifier.space, positions)
    assert (space > 0).any()
    assert relative(rectifier.bias(positions, REFERENCE), space) <= 1e-5
    expected = torch.empty(2, C, 3, 5)
    for b in range(2):
        for k in range(C):
            for i in range(3):
                for j in range(5):
                    z = FEATURES[b, :, i, j]
                    expected[b, k, i, j] = z @ QUERY[k] - (z @ REFERENCE[k] + space[k, i, j])
    found = rectifier(FEATURES, QUERY, REFERENCE, space)
    assert relative(found, rectifier.decoder(FEATURES, expected)) <= 1e-4
    undecoded = trained(world, "reclip")
    assert relative(undecoded(FEATURES, QUERY, REFERENCE, space), 10 * expected) <= 1e-5


@torch.no_grad()
def test_reclip_without_its_biases_is_maskclip(world, positions):
    """Zero reference and zero space convolutions: M_q times ten, bit for bit."""
    rectifier = rectify.build_rectifier(world, replace(RECIPE, ablation="reclip")).eval()
    for layer in rectifier.space:
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
    nothing = torch.zeros(C, D)
    assert torch.equal(rectifier(FEATURES, QUERY, nothing, rectifier.bias(positions, nothing)),
                       10 * rectify.query_logits(FEATURES, QUERY))


def test_table_iii_adds_one_part_at_a_time():
    """ReCLIP → decoder → windows → independent encoding: from row to row one thing changes."""
    rows = [ablations.IN_PLACE_OF[name] for name in ("reclip", "reclip+decoder", "reclip+decoder+windows")]
    assert all(issubclass(row["Rectifier"], ablations.Entangled) for row in rows)
    assert [issubclass(row["Rectifier"], ablations.WithoutDecoder) for row in rows] == [True, False, False]
    assert ["cached_hypotheses" in row for row in rows] == [True, True, False]
    assert ablations.IN_PLACE_OF["entangled"] == rows[2]


def test_learnable_query_at_rate_0_equals_the_fixed_one(world, positions):
    """It starts at CLIP's words, and a step of rate 0 leaves it there."""
    rectifier, full = trained(world, "learnable-query").train(), trained(world)
    nn.init.zeros_(rectifier.moved)
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.0, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in rectifier.state_dict().items() if "norm" not in name}
    train_step(world, rectifier, "learnable-query").backward()
    assert rectifier.moved.grad.any()
    optimizer.step()
    assert all(torch.equal(rectifier.state_dict()[name], tensor) for name, tensor in before.items())
    rectifier.load_state_dict(full.state_dict() | {"moved": rectifier.moved.detach()})
    bias = full.bias(positions, REFERENCE)
    assert relative(rectifier.eval()(FEATURES, QUERY, REFERENCE, bias), full(FEATURES, QUERY, REFERENCE, bias)) <= 1e-5


def test_learnable_query_has_rows_of_length_one(world, positions):
    """Wherever it went: query plus the way gone, normalised row by row, through Eq. 3 and 4."""
    rectifier, full = trained(world, "learnable-query"), trained(world)
    rectifier.load_state_dict(full.state_dict() | {"moved": random(C, D, seed=7)})
    rows = torch.stack([(row + way) / (row + way).norm() for row, way in zip(QUERY, rectifier.moved)])
    bias = full.bias(positions, REFERENCE)
    assert relative(rectifier(FEATURES, QUERY, REFERENCE, bias), full(FEATURES, rows, REFERENCE, bias)) <= 1e-5


def test_fine_tuning_moves_the_image_tower_and_nothing_of_the_text_tower(world):
    """All that a dense feature passes through gets a gradient; CLIP itself keeps its bits; no text tower is stored."""
    rectifier = trained(world, "fine-tuned").train()
    before = {name: tensor.clone() for name, tensor in rectifier.state_dict().items()}
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.1)
    train_step(world, rectifier, "fine-tuned").backward()
    optimizer.step()
    changed = {name for name, tensor in rectifier.state_dict().items() if not torch.equal(tensor, before[name])}
    last = len(rectifier.tower.transformer.resblocks) - 1
    assert changed >= {"tower.conv1.weight", "tower.proj", "tower.positional_embedding", "tower.ln_post.weight", "prompt",
                       *(f"tower.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(last + 1))}
    assert {name.removeprefix("tower.") for name in before if name.startswith("tower.")} \
        == set(world.clip_model.visual.state_dict())
    assert not any("token_embedding" in name or "text_projection" in name for name in before)
    assert clip.fingerprint(world.clip_model) == world.fingerprint


def test_fine_tuned_features_are_those_of_the_tuned_tower(world):
    """At first CLIP's own, bit for bit; afterwards those of a CLIP into which the tower is put."""
    rectifier = rectify.build_rectifier(world, replace(RECIPE, ablation="fine-tuned"))
    assert torch.equal(rectifier.encode(world.clip_model, IMAGES, "residual"), world.clip_model.encode_dense(IMAGES))
    with torch.no_grad():
        for parameter in rectifier.tower.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other = copy.deepcopy(world.clip_model)
    other.visual.load_state_dict(rectifier.tower.state_dict())
    found = rectifier.encode(world.clip_model, IMAGES, "residual")
    assert torch.equal(found, other.encode_dense(IMAGES)) and found.requires_grad
    taught, _ = distill.teach(rectifier, world.clip_model, IMAGES, QUERY, REFERENCE, dense_path="residual")
    assert torch.equal(taught, found) and not taught.requires_grad
    assert clip.fingerprint(world.clip_model) == world.fingerprint


@pytest.mark.parametrize("ablation", ["none", "fine-tuned", "reclip", "learnable-query"])
def test_evaluation_has_what_was_trained(world, ablation):
    """Read from a checkpoint, every part is the trained one: the image tower and the query too."""
    rectifier, recipe = trained(world, ablation), replace(RECIPE, ablation=ablation)
    with torch.no_grad():
        for name, parameter in rectifier.named_parameters():
            parameter += 0.02 * torch.randn_like(parameter) * name.startswith("tower.")
        reference = rectify.reference_features(world.clip_model, rectifier.prompt, VOCABULARY.names)
        _, expected = distill.teach(rectifier, world.clip_model, IMAGES, QUERY, reference, dense_path="residual")
    runs.save(world.folder("rectify") / "checkpoint.pt", {
        "stage": "rectify", "step": 1, "weights": rectifier.state_dict(),
        "settings": runs.plain({"world": world.described(), "recipe": asdict(recipe)})})
    found = evaluate.predictors(world, QUERY, ["rectify"])
    with torch.no_grad():
        assert torch.equal(evaluate.logits_of_all(world, found, IMAGES)["rectify"], expected)
    assert found["rectify"].ablation == ablation


# ------------------------------------------------------------------------------------------ stage 1: the hypothesis

@pytest.mark.parametrize("cosines, threshold, count, expected", [
    ([0.30, 0.10, 0.22, 0.20], 21.0, 3, [1, 0, 1, 0]),              # what is above the threshold, however many
    ([0.30, 0.10, 0.22, 0.20], 30.5, 3, [1, 0, 1, 1]),              # nothing is: the best three
    ([0.25, 0.10, 0.00, 0.20], 25.0, 2, [1, 0, 0, 1]),              # the threshold itself is not above it: the best two
    ([0.30, 0.10, 0.22, 0.20], 90.0, 9, [1, 1, 1, 1])])             # fewer classes than are asked for
def test_whole_image_rule_takes_what_is_above_or_else_the_best(cosines, threshold, count, expected):
    """Each image for itself: its neighbours in the batch, with and without a class above, change nothing."""
    others = [[0.99, 0.0, 0.0, 0.0], [0.01, 0.02, 0.03, 0.04]]
    found = ablations.above_or_best(torch.tensor([others[0], cosines, others[1]]), threshold, count)
    assert found.dtype == torch.bool and found[1].int().tolist() == expected
    assert found[0].int().tolist() == [1, 0, 0, 0] or threshold > 90


def test_whole_image_hypotheses_look_once_at_each_whole_image(world, tmp_path):
    """Each image alone, resized to CLIP's input, one cosine per class; then the dataset's rule; stored for the next time."""
    write_photos(tmp_path, "a.png", "b.png", "c.png")
    images = data.images_in(tmp_path)
    expected = []
    for path in images.values():
        image = data.to_tensor(data.short_side_to(data.read_image(path), 32))[None]
        feature = world.clip_model.encode_image(F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True))[0]
        expected.append([(feature @ row / feature.norm()).item() for row in QUERY])
    expected = torch.tensor(expected)
    recipe = rectify.Recipe(short_side=32, ablation="whole-image")
    assert relative(ablations.whole_image_cosines(world, QUERY, images, 32), expected) <= 1e-5
    found = rectify.chosen(recipe, rectify.cached_hypotheses)(world, QUERY, images, recipe)
    assert torch.equal(found, ablations.above_or_best(expected, *ablations.WHOLE_IMAGE["folder"]))
    assert len(list(world.cache.glob("cosines-*.pt"))) == 1


# ------------------------------------------------------------------------------------------ stage 1: the forms of Eq. 7

def slow_loss(features, masks, query, hypothesis, scale: float, form: str) -> float:
    """Eq. 7, image by image and class by class, with the sum over the mask divided by what the form says."""
    (B, _, h, w), of_images = features.shape, []
    for b in range(B):
        of_classes = []
        for k in hypothesis[b].nonzero().flatten().tolist():
            total = sum(masks[b, k, i, j] * features[b, :, i, j] for i in range(h) for j in range(w))
            divisor = {"cosine": total.norm(), "area": masks[b, k].sum()}[form]
            powers = [math.exp(scale * (total / max(1, divisor) @ row).item()) for row in query]
            of_classes.append(-math.log(powers[k] / sum(powers)))
        of_images.append(sum(of_classes) / len(of_classes))
    return sum(of_images) / len(of_images)


FORMS = {"cosine": ablations.cosine_loss, "area": ablations.area_loss}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_equal_the_loop(form):
    """With soft masks and with hard ones, some of them empty."""
    soft = 3 * random(2, C, 3, 5).softmax(dim=1)
    hard = F.one_hot(random(2, C, 3, 5).argmax(dim=1), C).permute(0, 3, 1, 2).float()
    hard[1, 1] = 0
    for masks in (soft, hard):
        found = FORMS[form](FEATURES, masks, QUERY, HYPOTHESIS, 20.0)
        assert found.item() == pytest.approx(slow_loss(FEATURES, masks, QUERY, HYPOTHESIS, 20.0, form), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_do_not_care_how_large_the_rest_of_the_image_is(form):
    """The same masked patches in an image twice as high: the same loss, where ReCLIP++'s own form says something else."""
    masks = F.one_hot(random(2, C, 3, 5).argmax(dim=1), C).permute(0, 3, 1, 2).float()
    higher = torch.cat([FEATURES, unit(2, D, 3, 5, dim=1, seed=8)], dim=2)
    covered = torch.cat([masks, torch.zeros_like(masks)], dim=2)

    def losses(loss):
        return [loss(FEATURES, masks, QUERY, HYPOTHESIS, 20.0).item(), loss(higher, covered, QUERY, HYPOTHESIS, 20.0).item()]
    before, after = losses(FORMS[form])
    assert after == pytest.approx(before, rel=1e-5)
    before, after = losses(rectify.contrastive_loss)
    assert after != pytest.approx(before, rel=1e-2)


def test_the_cosine_does_not_care_how_heavy_a_mask_is():
    """Seven times the mask is the same direction."""
    masks = 3 * random(2, C, 3, 5).softmax(dim=1)
    assert ablations.cosine_loss(FEATURES, 7 * masks, QUERY, HYPOTHESIS, 20.0).item() \
        == pytest.approx(ablations.cosine_loss(FEATURES, masks, QUERY, HYPOTHESIS, 20.0).item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_survive_an_empty_mask(form):
    """ln C, and the gradient of a sum that is divided by one patch: n times that of the mean over the image."""
    gradients = []
    for of in (FORMS[form], rectify.contrastive_loss):
        masks = torch.zeros(2, C, 3, 5, requires_grad=True)
        loss = of(FEATURES, masks, QUERY, HYPOTHESIS, 20.0)
        assert loss.item() == pytest.approx(math.log(C), rel=1e-6)
        loss.backward()
        gradients.append(masks.grad)
    assert gradients[0][HYPOTHESIS].all() and relative(gradients[0], 15 * gradients[1]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_both_stages_train_with_the_chosen_form(world, monkeypatch, form):
    """Stage 1, and the student of such a teacher."""
    calls = []
    for name in ("contrastive_loss", "text_loss"):
        monkeypatch.setitem(ablations.IN_PLACE_OF[f"loss-{form}"], name,
                            lambda *args, name=name: calls.append(name) or FORMS[form](*args))
    train_step(world, trained(world), f"loss-{form}")
    student_step(world, trained(world), ablation=f"loss-{form}")
    assert calls == ["contrastive_loss", "text_loss"]


# ------------------------------------------------------------------------------------------ stage 2

def new_student(world, rectifier, ablation: str) -> distill.Student:
    torch.manual_seed(1)
    return distill.build_student(world, rectifier, QUERY, replace(SMALL, ablation=ablation), pretrained=False).train()


def student_step(world, rectifier, ablation: str, student=None):
    """One step of stage 2 on IMAGES by the teacher `rectifier`: student, loss and its parts."""
    student = student or new_student(world, rectifier, ablation)
    with torch.no_grad():
        reference = rectify.reference_features(world.clip_model, rectifier.prompt, VOCABULARY.names)
    lesson = distill.teach(rectifier, world.clip_model, IMAGES, QUERY, reference, dense_path="residual")
    recipe = ablations.recipe_for(ablation, SMALL, "toys") if ablation != "none" else SMALL
    return student, *distill.train_step(student, *lesson, IMAGES, HYPOTHESIS, replace(RECIPE, ablation=ablation), recipe,
                                        torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ablation", ["head-query", "maskclip+", "reclip"])
def test_query_head_is_ten_cosines(world, ablation):
    """The text features as a frozen classifier: neither bias nor decoder."""
    rectifier = trained(world, ablation)
    found = new_student(world, rectifier, ablation).inherited(FEATURES)
    for b, k, i, j in [(0, 0, 0, 0), (1, 3, 2, 4), (0, 2, 1, 3)]:
        assert found[b, k, i, j].item() == pytest.approx(10 * (FEATURES[b, :, i, j] @ QUERY[k]).item(), rel=1e-4, abs=1e-5)
    assert torch.equal(found, 10 * rectify.query_logits(FEATURES, QUERY))


def test_query_and_bias_head_is_eq3(world):
    """Ten times M: the decoder of its teacher is left out."""
    rectifier = trained(world)
    inherited = new_student(world, rectifier, "head-query+bias").inherited
    expected = rectify.query_logits(FEATURES, QUERY) - inherited.bias(3, 5)
    assert relative(inherited(FEATURES), 10 * expected) <= 1e-5 and inherited.bias(3, 5).any()


def test_own_head_learns_and_inherits_nothing(world):
    """A 1×1 convolution by hand; its gradient arrives; what was inherited plays no part and does not move."""
    rectifier = trained(world)
    student, loss, _ = student_step(world, rectifier, "own-head")
    head = student.inherited.classifier
    found = student.inherited(FEATURES)
    for b, k, i, j in [(0, 0, 0, 0), (1, 3, 2, 4)]:
        by_hand = head.weight[k, :, 0, 0] @ FEATURES[b, :, i, j] + head.bias[k]
        assert found[b, k, i, j].item() == pytest.approx(10 * by_hand.item(), rel=1e-4, abs=1e-5)
    loss.backward()
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if not name.startswith("network.")} \
        == {"inherited.classifier.weight", "inherited.classifier.bias"}
    assert head.weight.grad.any() and student.network.backbone[0].weight.grad.any()


@pytest.mark.parametrize("ablation, kept", [("loss-mask", {"mask": 1}), ("loss-mask+feature", {"mask": 1, "feature": 0.5})])
def test_table_viii_leaves_out_losses(world, ablation, kept):
    """The loss is the sum of those that are kept, and so is its gradient; what is left out is still logged."""
    rectifier = trained(world)
    student, loss, parts = student_step(world, rectifier, ablation)
    assert loss.item() == pytest.approx(sum(weight * parts[name] for name, weight in kept.items()), rel=1e-6)
    assert set(parts) == {"mask", "feature", "text"}
    loss.backward()
    found = student.network.aspp[0].weight.grad.clone()
    same = new_student(world, rectifier, ablation)
    features = same.network(IMAGES)
    reference = rectify.reference_features(world.clip_model, rectifier.prompt, VOCABULARY.names)
    teacher_features, logits = distill.teach(rectifier, world.clip_model, IMAGES, QUERY, reference, "residual")
    of_masks = distill.mask_loss(same.inherited(features), distill.at_grid(logits, features).argmax(dim=1))
    (of_masks + kept.get("feature", 0) * distill.feature_loss(features, teacher_features)).backward()
    assert relative(found, same.network.aspp[0].weight.grad) <= 1e-5


def test_maskclip_plus_learns_maskclips_argmax(world, monkeypatch):
    """The pseudo-label of every place is the class of the highest cosine; nothing random is stored with the student."""
    checkpoint = ablations.untrained_teacher(world)
    recipe, rectifier = rectify.load_rectifier(world, checkpoint)
    assert recipe.ablation == "maskclip+" and list(checkpoint["weights"]) == ["prompt"]
    seen = []
    monkeypatch.setattr(distill, "mask_loss", lambda logits, pseudo_label: seen.append(pseudo_label) or logits.sum())
    student_step(world, rectifier, "maskclip+")
    features = world.clip_model.encode_dense(IMAGES)
    expected = torch.empty(2, 3, 5, dtype=torch.int64)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                cosines = [(features[b, :, i, j] @ row).item() for row in QUERY]
                expected[b, i, j] = cosines.index(max(cosines))
    assert torch.equal(seen[0], expected)
    assert ablations.any_class(world, QUERY, {"a": Path("a")}, recipe).tolist() == [[True] * C]


def test_student_of_a_fine_tuned_teacher_holds_no_image_tower(world):
    """It looks with its own network; what is inherited still is the teacher's head."""
    rectifier = trained(world, "fine-tuned")
    inherited = new_student(world, rectifier, "fine-tuned").inherited
    assert not any("tower" in name for name in inherited.state_dict())
    assert torch.equal(inherited(FEATURES), rectifier(FEATURES, QUERY, inherited.reference, inherited.bias(3, 5)))


# ------------------------------------------------------------------------------------------ key smoothing

def test_keys_are_those_of_the_last_block_and_of_length_one(world):
    """The same keys that attention computes, heads side by side, normalised over channels; the class token has none."""
    visual = world.clip_model.visual
    found, seen = world.clip_model.encode_keys(IMAGES), []
    assert found.shape == (2, E, 3, 5) and torch.allclose(found.norm(dim=1), torch.ones(2, 3, 5), atol=1e-5)
    x = visual.embed(IMAGES)
    for block in visual.transformer.resblocks:
        seen.append(block.attn.qkv(block.ln_1(x))[1])
        x = block(x)
    keys = seen[-1].transpose(1, 2).flatten(start_dim=2)[:, 1:]                             # (B, n, E)
    for b, i, j in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        key = keys[b, 5 * i + j]
        assert relative(found[b, :, i, j], key / key.norm()) <= 1e-5


def test_key_smoothing_equals_the_double_loop():
    """pred_i ← Σ_j cos(k_i, k_j) pred_j where the best of pred_i is under the threshold; all sums use the old numbers."""
    probability, keys, threshold = (3 * random(2, C, 3, 4)).softmax(dim=1), unit(2, E, 3, 4, dim=1, seed=1), 0.8
    found = evaluate.smooth(probability, keys, threshold)
    places = [(i, j) for i in range(3) for j in range(4)]
    smoothed = 0
    for b in range(2):
        for i, j in places:
            expected = probability[b, :, i, j]
            if expected.max() < threshold:
                smoothed += 1
                expected = sum((keys[b, :, i, j] @ keys[b, :, y, x]) * probability[b, :, y, x] for y, x in places)
                assert relative(found[b, :, i, j], expected) <= 1e-5
            else:
                assert torch.equal(found[b, :, i, j], expected)
    assert 0 < smoothed < 24


def test_key_smoothing_of_0_changes_nothing():
    """Neither the probabilities nor, through `predict`, a single pixel; without keys none is changed either."""
    logits, keys = random(1, C, 3, 4), unit(1, E, 3, 4, dim=1, seed=1)
    probability = logits.softmax(dim=1)
    assert torch.equal(evaluate.smooth(probability, keys, 0.0), probability)
    expected = evaluate.predict(logits, (30, 41))
    assert torch.equal(evaluate.predict(logits, (30, 41), smoothing=0.0, keys=keys), expected)
    assert torch.equal(evaluate.predict(logits, (30, 41), smoothing=0.9, keys=None), expected)
    assert not torch.equal(evaluate.predict(logits, (30, 41), smoothing=1.0, keys=keys), expected)


# ------------------------------------------------------------------------------------------ whole runs

@pytest.fixture
def voc(tmp_path, monkeypatch, tiny_clip):
    """VOC's tree in ./data and recipes of a few seconds; gives the flags that a first run needs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    quick_recipes(monkeypatch, tmp_path / "weights")
    write_voc_tree(tmp_path / "data")
    monkeypatch.setitem(ablations.NUMBERS_FOR, "voc", {})           # MaskCLIP+ has many epochs there
    return ["--data", "voc", "--clip", tiny_clip]


class Interrupted(Exception):
    pass


def interrupted_and_resumed(monkeypatch, script, out: str, *flags) -> dict[str, torch.Tensor]:
    """The script breaks off in its third step of four and is resumed; gives the weights that were saved in between."""
    step, calls = script.train_step, []

    def third_fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return step(*args)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(script, "train_step", third_fails)
        run(script, *flags, "--out", out)
    saved = runs.load(Path(out, "voc", script.__name__, "unfinished/resume.pt"), script.__name__)["weights"]
    run(script, *flags, "--out", out, "--resume")
    return saved


def weights_of(stage: str, out: str) -> dict[str, torch.Tensor]:
    return runs.load(Path(out, "voc", stage, "checkpoint.pt"), stage)["weights"]


def differing(found: dict, expected: dict) -> set[str]:
    """The names of the weights that are not the same bits."""
    assert found.keys() == expected.keys()
    return {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)}


def stage_1_to_the_end(monkeypatch, capsys, voc, ablation: str) -> None:
    run(rectify, *voc, "--ablation", ablation, "--out", "whole")
    shutil.copytree("whole/voc/cache", "broken/voc/cache")
    interrupted_and_resumed(monkeypatch, rectify, "broken", *voc, "--ablation", ablation)
    assert not differing(weights_of("rectify", "broken"), weights_of("rectify", "whole"))
    assert f"rectified, {ablation}" in capsys.readouterr().out
    run(distill, "--out", "whole")
    recipe = json.loads(Path("whole/voc/distill/recipe.json").read_text())["recipe"]
    assert recipe["ablation"] == ablation
    smooth, calls = evaluate.smooth, []
    monkeypatch.setattr(evaluate, "smooth", lambda *args: calls.append(1) or smooth(*args))
    metrics = run(evaluate, "--out", "whole", "--key-smoothing", "1")
    assert len(calls) == 3 * 2                                      # of two images, all stages but the student, who has no keys
    said = capsys.readouterr().out
    assert f"rectified, {ablation}" in said and f"distilled, {ablation}" in said and "key smoothing 1.0" in said
    assert {stage: found["fingerprint"]["ablation"] for stage, found in metrics.items()} \
        == {"vanilla": "none", "maskclip": "none", "rectify": ablation, "distill": ablation}
    assert metrics.pop("distill") == json.loads(Path("whole/voc/distill/metrics.json").read_text())
    assert metrics["rectify"] != json.loads(Path("whole/voc/rectify/metrics.json").read_text())
    refined = {"prompt_denoising": 0.0, "key_smoothing": 1.0}
    assert all(found["fingerprint"]["refinements"] == refined for found in metrics.values())


def stage_2_to_the_end(monkeypatch, capsys, voc, ablation: str) -> None:
    if ablation != "maskclip+":
        run(rectify, *voc, "--out", "broken")
        shutil.copytree("broken", "whole")
    saved = interrupted_and_resumed(monkeypatch, distill, "broken", *voc, "--ablation", ablation)
    run(distill, *voc, "--ablation", ablation, "--out", "whole")
    assert not differing(weights_of("distill", "broken"), weights_of("distill", "whole"))
    learned = {name for name in differing(saved, weights_of("distill", "whole")) if not name.startswith("network.")}
    assert learned == ({"inherited.classifier.weight", "inherited.classifier.bias"} if ablation == "own-head" else set())
    capsys.readouterr()
    metrics = run(evaluate, "--out", "whole")
    assert f"distilled, {ablation}" in capsys.readouterr().out
    assert list(metrics) == ["vanilla", "maskclip", *(["rectify"] if ablation != "maskclip+" else []), "distill"]
    assert metrics["distill"]["fingerprint"]["ablation"] == ablation


def slow_but(quick: str, names: tuple[str, ...]) -> list:
    """One of the names for every day, the others marked slow."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("ablation", slow_but("reclip", rectify.ABLATIONS))
def test_ablations_of_stage_1_from_photos_to_measured_student(monkeypatch, capsys, voc, ablation):
    """Trained, broken off, resumed to the same bits, distilled, measured; its name on every table and in every recipe."""
    stage_1_to_the_end(monkeypatch, capsys, voc, ablation)


@pytest.mark.parametrize("ablation", slow_but("own-head", distill.ABLATIONS))
def test_ablations_of_stage_2_from_photos_to_measured_student(monkeypatch, capsys, voc, ablation):
    """Trained, broken off, resumed to the same bits, measured; MaskCLIP+ asks for no rectification."""
    stage_2_to_the_end(monkeypatch, capsys, voc, ablation)


def test_ablations_are_not_mixed(capsys, voc):
    """Neither is a run resumed under another name, nor an ablated teacher's student ablated once more."""
    run(rectify, *voc, "--ablation", "addition")
    said = refusal(capsys, distill, "--ablation", "own-head")
    assert "addition" in said and "own-head" in said
    assert "another recipe" in refusal(capsys, rectify, *voc, "--ablation", "no-bias", "--resume")


@pytest.mark.slow
def test_maskclip_plus_stands_beside_any_rectification(voc, capsys):
    """It learned from none, so that a rectification in the same folder does not make it another's student."""
    run(distill, *voc, "--ablation", "maskclip+")
    run(rectify, *voc)
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify", "distill"]


@pytest.mark.slow
def test_ablations_file_is_read_only_when_one_is_named(voc):
    """The two stages and their evaluation run without ablations.py: a first reader may delete it."""
    known = sys.modules.pop("ablations")
    sys.modules["ablations"] = None                                 # to import it is an ImportError
    try:
        run(distill, *voc, "--epochs", "1")
        assert len(run(evaluate)) == 4
    finally:
        sys.modules["ablations"] = known
