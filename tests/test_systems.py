"""Every system of paper/systems.py, paper/run.py, and MaskCLIP's key smoothing: an equation against a slow
loop, or an exact invariance.

    python -m pytest tests/test_systems.py         # `-m "not slow"` leaves out the whole runs of every name

CLIP, rectifier and student are small and random here: an equation holds for any weights.

    B images · C classes · D joint dimension · E ViT width · h,w patches · n = h·w
"""

import copy
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
import data
import distill
import evaluate
import rectify
from conftest import ROOT
from datasets import DATASETS, images as image_files
from harness import errors, files, runs
from helpers import (TINY, random, refusal, relative, run, toy_setup, toy_vocabulary, unit,
                     write_photos, write_voc_tree)
from paper import reported, run as paper_run, systems
from paper.systems import SYSTEMS

VOCABULARY = toy_vocabulary()
C, D, E = len(VOCABULARY), TINY["embed_dim"], TINY["width"]
HYPOTHESIS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool()  # three classes in one image, one in the other
VOTES = systems.equal_votes(HYPOTHESIS)
RECIPE = rectify.Recipe(loss_scale=20.0, mask_scale=3.0, prompt_length=5, vote_threshold=0.0)
SMALL = distill.Recipe(backbone="small")
OWN_STAGE_1 = [name for name, system in SYSTEMS.items()
               if name != "reclip++" and not system.teacher and not paper_run.trains_nothing(system)]
STUDENTS = [name for name, system in SYSTEMS.items() if system.teacher]


IMAGES, QUERY = random(2, 3, 24, 37), unit(C, D, seed=1)     # 3 × 5 patches of 8 pixels, the last ones padded
FEATURES, REFERENCE = unit(2, D, 3, 5, dim=1, seed=2), 0.5 * unit(C, D, seed=3)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return toy_setup(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def positions(setup) -> torch.Tensor:
    return setup.clip_model.visual.patch_positions(3, 5)


def trained(setup: data.Setup, name: str = "reclip++") -> rectify.Rectifier:
    """A rectifier as if trained: no bias is 0, no scale 1, and BatchNorm remembers some mean and variance."""
    torch.manual_seed(0)
    rectifier = rectify.build_rectifier(setup, RECIPE, SYSTEMS[name])
    with torch.no_grad():
        for parameter_name, parameter in rectifier.named_parameters():
            if not parameter_name.startswith("tower."):
                parameter += 0.1 * torch.randn_like(parameter)
        for module in rectifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += torch.randn(module.num_features)
                module.running_var *= 0.5 + torch.rand(module.num_features)
    return rectifier.eval()


def train_step(setup, rectifier, name: str = "reclip++", seed: int = 0) -> torch.Tensor:
    features = rectifier.encode(setup.clip_model, IMAGES, RECIPE.dense_path)
    return rectify.train_step(rectifier, setup.clip_model, features, VOTES, QUERY, VOCABULARY.names, RECIPE,
                              torch.Generator().manual_seed(seed), SYSTEMS[name].loss)


# ---------------------------------------------------------------------------- parts and numbers

def test_every_part_takes_what_the_part_in_whose_place_it_stands_takes():
    """And is one of its kind."""
    usual = distill.System()
    for name, system in SYSTEMS.items():
        assert name == system.name and isinstance(system, distill.System)
        assert issubclass(system.rectifier, rectify.Rectifier) and issubclass(system.head, distill.Inherited)
        for part in ("rectifier", "votes", "loss", "head"):
            found, expected = (inspect.signature(getattr(one, part)).parameters for one in (system, usual))
            assert len(found) == len(expected) or part == "votes" and len(found) == 3


def test_part_that_does_not_exist_raises():
    """Nothing is left out in silence: the trap of a name that nobody looks up."""
    with pytest.raises(TypeError, match="decoder"):
        systems.other("x", decoder=systems.Undecoded)
    with pytest.raises(TypeError, match="rectifier"):         # a student has no stage 1 of its own to replace
        systems.student("x", rectifier=systems.NoBias)
    with pytest.raises(TypeError, match="numbers"):
        systems.student("x", numbers={"any": {}})


def test_student_of_another_system_replaces_nothing_of_stage_1():
    """Its teacher's parts and numbers are looked up there, and its own would be by nobody."""
    usual = distill.System()
    for name in STUDENTS:
        system = SYSTEMS[name]
        assert system.teacher == rectify.System()
        for part in ("rectifier", "votes", "loss", "numbers"):
            assert getattr(system, part) == getattr(usual, part), (name, part)


def test_number_that_does_not_exist_raises():
    """In either stage."""
    of_voc = of_dataset("voc")
    for recipes in (rectify.RECIPES, distill.RECIPES):
        with pytest.raises(TypeError, match="mask_scael"):
            data.recipe_for(of_voc, recipes, {"any": dict(mask_scael=1.0)})


def test_numbers_are_of_datasets_that_are_known():
    """A misspelt dataset would be looked up by nothing."""
    for system in SYSTEMS.values():
        for numbers in (system.numbers, system.student_numbers):
            assert set(numbers) <= {"any", "folder", *DATASETS}
    assert {"folder", "toyland", "voc", "context", "ade", "cityscapes", "coco"} <= set(systems.WHOLE_IMAGE)


def test_system_that_lacks_a_number_of_a_dataset_says_so():
    """Whoever adds a dataset to datasets/ is told of ReCLIP's threshold."""
    with pytest.raises(ValueError, match="--data elsewhere: expected ReCLIP's threshold .* WHOLE_IMAGE"):
        DATASETS["elsewhere"] = DATASETS["voc"]
        try:
            systems.whole_image_votes(of_dataset("elsewhere"), QUERY, RECIPE)
        finally:
            del DATASETS["elsewhere"]


def test_reclips_thresholds_are_the_papers():
    assert {name: systems.WHOLE_IMAGE[name] for name in ("voc", "context", "ade", "cityscapes", "coco")} \
        == {"voc": (23, 2), "context": (20, 6), "ade": (21, 5), "cityscapes": (21.5, 2), "coco": (20, 8)}


def of_dataset(name: str, *flags: str) -> SimpleNamespace:
    """As much of a setup as `data.recipe_for` looks at."""
    args = paper_run.flags().parse_args([*flags])
    return SimpleNamespace(data=name, args=args, training_images=range(1464))


@pytest.mark.parametrize("name, changed", [
    ("no-bias", {}), ("reclip", {"vote_threshold": 0.0}), ("whole-image", {"vote_threshold": 0.0}),
    ("loss-area", {})])
def test_recipes_of_stage_1_differ_in_nothing_else(name, changed):
    """Not even without a decoder, whose place a factor takes: cosines are multiplied by 1000 in all, as in
    ReCLIP."""
    assert systems.LIKE_DECODED * rectify.RECIPES["voc"].mask_scale == 1000
    found = data.recipe_for(of_dataset("voc"), rectify.RECIPES, SYSTEMS[name].numbers)
    assert asdict(found) == asdict(rectify.RECIPES["voc"]) | changed


@pytest.mark.parametrize("name, changed", [
    ("loss-mask", {"feature_weight": 0.0, "text_weight": 0.0}), ("loss-mask+feature", {"text_weight": 0.0}),
    ("own-head", {}), ("reclip", {"feature_weight": 0.0, "text_weight": 0.0}), ("addition", {}),
    ("losses-at-image", {"losses_at": "image"}),
    ("maskclip+", {"feature_weight": 0.0, "text_weight": 0.0, "epochs": 44})])
def test_recipes_of_stage_2_differ_in_nothing_else(name, changed):
    """Table VIII is numbers alone; --epochs still has the last word."""
    found = data.recipe_for(of_dataset("voc"), distill.RECIPES, SYSTEMS[name].student_numbers)
    assert asdict(found) == asdict(distill.RECIPES["voc"]) | changed
    numbers = SYSTEMS[name].student_numbers
    assert data.recipe_for(of_dataset("voc", "--epochs", "3"), distill.RECIPES, numbers).epochs == 3


@pytest.mark.parametrize("dataset, epoch, steps", [
    ("voc", 1464, 4004), ("context", 4996, 4056), ("ade", 20210, 7578), ("cityscapes", 2975, 4070),
    ("coco", 118287, 7392)])
def test_maskclip_plus_trains_as_many_steps_as_the_original(dataset, epoch, steps):
    """2,000 to 8,000 steps of 16 images."""
    recipe = data.recipe_for(of_dataset(dataset), distill.RECIPES, SYSTEMS["maskclip+"].student_numbers)
    assert recipe.batch_size == 16
    assert recipe.epochs * data.steps_per_epoch(epoch, recipe.batch_size) == steps and 2000 <= steps <= 8000


@pytest.mark.parametrize("dataset, short_side, crop, epochs", [
    ("voc", 512, 512, 100), ("context", 520, 480, 150), ("ade", 512, 512, 150), ("cityscapes", 512, 512, 100),
    ("coco", 512, 512, 50)])
def test_students_train_with_the_numbers_of_the_release(dataset, short_side, crop, epochs):
    """Read from its configurations: scale (520, 520) for Context, (1024, 512) for Cityscapes; 16 images a
    step."""
    recipe = distill.RECIPES[dataset]
    assert (recipe.short_side, recipe.crop, recipe.epochs) == (short_side, (crop, crop), epochs)
    assert (recipe.batch_size, recipe.learning_rate, recipe.scale) == (16, 0.01, (0.5, 2.0))
    assert recipe.backbone == "resnet50"
    assert recipe.floor * recipe.learning_rate == pytest.approx(1e-4) and recipe.poly_power == 0.9
    assert (recipe.feature_weight, recipe.text_weight) == (0.5, 0.5)


def test_release_denoises_students_on_two_datasets():
    """And rectified masks on all five."""
    assert reported.DENOISING == {
        "rectify": {"voc": 1.0, "context": .85, "ade": .5, "cityscapes": .5, "coco": .95},
        "distill": {"voc": .95, "coco": .95}}


# ---------------------------------------------------------------------------- stage 1: the rectifier

def test_without_decoder_equals_eq3_by_hand(setup, positions):
    """Ten times M: at every place the cosine less the bias, and nothing of the neighbours."""
    rectifier = trained(setup, "without-decoder")
    bias = rectifier.bias(positions, REFERENCE)
    found = rectifier(FEATURES, QUERY, bias)
    for b in range(2):
        for k in range(C):
            for i in range(3):
                for j in range(5):
                    expected = 10 * (FEATURES[b, :, i, j] @ QUERY[k] - bias[k, i, j]).item()
                    assert found[b, k, i, j].item() == pytest.approx(expected, abs=1e-5)
    assert not any(name.startswith("decoder") for name in rectifier.state_dict())


def test_no_bias_equals_reclip_plus_plus_with_a_bias_of_zero(setup, positions):
    """The same decoder gives the same bits, on whatever grid; nothing else of the rectifier learns."""
    without, full = trained(setup, "no-bias"), trained(setup)
    nn.init.zeros_(full.projection.weight), nn.init.zeros_(full.projection.bias)
    assert torch.equal(without(FEATURES, QUERY, without.bias(positions, REFERENCE)),
                       full(FEATURES, QUERY, full.bias(positions, REFERENCE)))
    train_step(setup, without, "no-bias").backward()
    assert {name for name, parameter in without.named_parameters() if parameter.grad is not None} \
        == {name for name, _ in without.named_parameters() if name.startswith("decoder.")}


def test_addition_of_a_negated_projection_is_subtraction(setup, positions):
    """Bit for bit; with the same projection it is something else."""
    added, full = trained(setup, "addition"), trained(setup)
    expected = full(FEATURES, QUERY, full.bias(positions, REFERENCE))
    assert not torch.equal(added(FEATURES, QUERY, added.bias(positions, REFERENCE)), expected)
    with torch.no_grad():
        added.projection.weight.neg_(), added.projection.bias.neg_()
    assert torch.equal(added(FEATURES, QUERY, added.bias(positions, REFERENCE)), expected)


def slow_space_bias(space: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Three times: 3×3 neighbourhoods with zeros outside, kept mean and variance, no number below zero. (E,
    h, w)"""
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
def test_entangled_bias_equals_the_loop(setup, positions):
    """Class bias Z W_rᵀ, image by image, plus space bias; both taken from M_q, then the decoder."""
    rectifier = trained(setup, "reclip+decoder+windows")
    space = slow_space_bias(rectifier.space, positions)
    assert (space > 0).any()
    bias = rectifier.bias(positions, REFERENCE)
    assert torch.equal(bias[0], REFERENCE) and relative(bias[1], space) <= 1e-5
    expected = torch.empty(2, C, 3, 5)
    for b in range(2):
        for k in range(C):
            for i in range(3):
                for j in range(5):
                    z = FEATURES[b, :, i, j]
                    expected[b, k, i, j] = z @ QUERY[k] - (z @ REFERENCE[k] + space[k, i, j])
    assert relative(rectifier.subtract(FEATURES, QUERY, bias), expected) <= 1e-5
    assert relative(rectifier(FEATURES, QUERY, bias), rectifier.decoder(FEATURES, expected)) <= 1e-4
    undecoded = trained(setup, "reclip")
    assert relative(undecoded(FEATURES, QUERY, (REFERENCE, space)), 10 * expected) <= 1e-5


@torch.no_grad()
def test_reclip_without_its_biases_is_maskclip(setup, positions):
    """Zero reference and zero space convolutions: M_q times ten, bit for bit."""
    rectifier = rectify.build_rectifier(setup, RECIPE, SYSTEMS["reclip"]).eval()
    for layer in rectifier.space:
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
    nothing = torch.zeros(C, D)
    assert torch.equal(rectifier(FEATURES, QUERY, rectifier.bias(positions, nothing)),
                       10 * rectify.query_logits(FEATURES, QUERY))


def test_table_iii_adds_one_part_at_a_time():
    """ReCLIP → decoder → windows → independent encoding: from row to row one thing changes."""
    rows = [SYSTEMS[name] for name in ("reclip", "reclip+decoder", "reclip+decoder+windows", "reclip++")]
    assert [issubclass(row.rectifier, systems.Entangled) for row in rows] == [True, True, True, False]
    assert [issubclass(row.rectifier, systems.WithoutDecoder) for row in rows] == [True, False, False, False]
    assert [row.votes is systems.whole_image_votes for row in rows] == [True, True, False, False]
    assert all(row.loss is rectify.contrastive_loss for row in rows)
    assert [row.numbers.get("any", {}) for row in rows] == [{"vote_threshold": 0.0}] * 2 + [{}] * 2
    assert [row.cell[0] for row in reported.TABLES["table3"].rows] == [row.name for row in rows]


def test_learnable_query_at_rate_0_equals_the_fixed_one(setup, positions):
    """It starts at CLIP's words, and a step of rate 0 leaves it there."""
    rectifier, full = trained(setup, "learnable-query").train(), trained(setup)
    nn.init.zeros_(rectifier.moved)
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.0, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in rectifier.state_dict().items() if "norm" not in name}
    train_step(setup, rectifier, "learnable-query").backward()
    assert rectifier.moved.grad.any()
    optimizer.step()
    assert all(torch.equal(rectifier.state_dict()[name], tensor) for name, tensor in before.items())
    rectifier.load_state_dict(full.state_dict() | {"moved": rectifier.moved.detach()})
    bias = full.bias(positions, REFERENCE)
    assert relative(rectifier.eval()(FEATURES, QUERY, bias), full(FEATURES, QUERY, bias)) <= 1e-5


def test_learnable_query_has_rows_of_length_one(setup, positions):
    """Wherever it went: query plus the way gone, normalised row by row, through Eq. 3 and 4."""
    rectifier, full = trained(setup, "learnable-query"), trained(setup)
    rectifier.load_state_dict(full.state_dict() | {"moved": random(C, D, seed=7)})
    rows = torch.stack([(row + way) / (row + way).norm() for row, way in zip(QUERY, rectifier.moved)])
    bias = full.bias(positions, REFERENCE)
    assert relative(rectifier(FEATURES, QUERY, bias), full(FEATURES, rows, bias)) <= 1e-5


def test_fine_tuning_moves_the_image_tower_and_nothing_of_the_text_tower(setup):
    """What a dense feature passes through gets a gradient; CLIP itself keeps its bits; no text tower is
    stored."""
    rectifier = trained(setup, "fine-tuned").train()
    before = {name: tensor.clone() for name, tensor in rectifier.state_dict().items()}
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.1)
    train_step(setup, rectifier, "fine-tuned").backward()
    optimizer.step()
    changed = {name for name, tensor in rectifier.state_dict().items()
               if not torch.equal(tensor, before[name])}
    last = len(rectifier.tower.transformer.resblocks) - 1
    assert changed >= {"tower.conv1.weight", "tower.proj", "tower.positional_embedding",
                       "tower.ln_post.weight",
                       "prompt",
                       *(f"tower.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(last + 1))}
    assert {name.removeprefix("tower.") for name in before if name.startswith("tower.")} \
        == set(setup.clip_model.visual.state_dict())
    assert not any("token_embedding" in name or "text_projection" in name for name in before)
    assert clip.fingerprint(setup.clip_model) == setup.fingerprint


def test_fine_tuned_features_are_those_of_the_tuned_tower(setup):
    """At first CLIP's own, bit for bit; afterwards those of a CLIP into which the tower is put."""
    rectifier = rectify.build_rectifier(setup, RECIPE, SYSTEMS["fine-tuned"])
    assert torch.equal(rectifier.encode(setup.clip_model, IMAGES, "residual"),
                       setup.clip_model.encode_dense(IMAGES))
    with torch.no_grad():
        for parameter in rectifier.tower.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other = copy.deepcopy(setup.clip_model)
    other.visual.load_state_dict(rectifier.tower.state_dict())
    found = rectifier.encode(setup.clip_model, IMAGES, "residual")
    assert torch.equal(found, other.encode_dense(IMAGES)) and found.requires_grad
    taught, _ = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, REFERENCE, dense_path="residual")
    assert torch.equal(taught, found) and not taught.requires_grad
    assert clip.fingerprint(setup.clip_model) == setup.fingerprint


def save_rectification(setup, name: str, rectifier) -> None:
    """As stage 1 of a system would have written it."""
    settings = setup.settings(systems.rectification_of(SYSTEMS[name]), RECIPE)
    files.save(setup.folder("rectify") / "checkpoint.pt", {
        "stage": "rectify", "step": 1, "weights": rectifier.state_dict(), "settings": runs.plain(settings)})


@pytest.mark.parametrize("name", ["reclip++", "fine-tuned", "reclip", "learnable-query", "maskclip+"])
def test_evaluation_has_what_was_trained(setup, name, monkeypatch):
    """Read from a checkpoint, every part is the trained one: the image tower and the query too."""
    monkeypatch.setitem(setup.__dict__, "training_images", {})
    rectifier = trained(setup, name)
    with torch.no_grad():
        for parameter_name, parameter in rectifier.named_parameters():
            parameter += 0.02 * torch.randn_like(parameter) * parameter_name.startswith("tower.")
        reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
        _, expected = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference,
                                    dense_path="residual")
    save_rectification(setup, name, rectifier)
    found = evaluate.predictors(setup, QUERY, ["rectify"], SYSTEMS[name])
    with torch.no_grad():
        assert torch.equal(evaluate.logits_of_all(setup, found, IMAGES)["rectify"], expected)
    assert found["rectify"].system == name


# ---------------------------------------------------------------------------- stage 1: the hypothesis

@pytest.mark.parametrize("cosines, threshold, count, expected", [
    ([0.30, 0.10, 0.22, 0.20], 21.0, 3, [1, 0, 1, 0]),             # what is above the threshold, however many
    ([0.30, 0.10, 0.22, 0.20], 30.5, 3, [1, 0, 1, 1]),              # nothing is: the best three
    ([0.25, 0.10, 0.00, 0.20], 25.0, 2, [1, 0, 0, 1]),    # the threshold itself is not above it: the best two
    ([0.30, 0.10, 0.22, 0.20], 90.0, 9, [1, 1, 1, 1])])             # fewer classes than are asked for
def test_whole_image_rule_takes_what_is_above_or_else_the_best(cosines, threshold, count, expected):
    """Each image for itself: its neighbours in the batch, with and without a class above, change nothing."""
    others = [[0.99, 0.0, 0.0, 0.0], [0.01, 0.02, 0.03, 0.04]]
    found = systems.above_or_best(torch.tensor([others[0], cosines, others[1]]), threshold, count)
    assert found.dtype == torch.bool and found[1].int().tolist() == expected
    assert found[0].int().tolist() == [1, 0, 0, 0] or threshold > 90


def test_eq6_gives_back_a_hypothesis_that_is_written_as_votes():
    """Equal votes for each of its classes, and a threshold of 0; rows sum to one like those of windows."""
    hypothesis = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    votes = systems.equal_votes(hypothesis)
    assert torch.allclose(votes.sum(dim=1), torch.ones(3))
    assert torch.equal(rectify.multi_label_hypothesis(votes, threshold=0.0), hypothesis)


def test_whole_image_hypotheses_look_once_at_each_whole_image(setup, tmp_path, monkeypatch):
    """Each image alone, resized to CLIP's input, one cosine per class; then the dataset's rule; stored for
    the next time, under another name where the rule has other numbers."""
    write_photos(tmp_path, "a.png", "b.png", "c.png")
    images = {path.stem: path for path in sorted(tmp_path.iterdir())}
    monkeypatch.setitem(setup.__dict__, "training_images", images)
    expected = []
    for path in images.values():
        image = data.to_tensor(data.short_side_to(image_files.read_image(path), 32))[None]
        resized = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True)
        feature = setup.clip_model.encode_image(resized)[0]
        expected.append([(feature @ row / feature.norm()).item() for row in QUERY])
    expected, recipe = torch.tensor(expected), replace(RECIPE, short_side=32)
    assert relative(systems.whole_image_cosines(setup, QUERY, 32), expected) <= 1e-5
    votes = rectify.votes_of(setup, QUERY, recipe, SYSTEMS["whole-image"])
    found = rectify.multi_label_hypothesis(votes, threshold=0.0)
    assert torch.equal(found, systems.above_or_best(expected, *systems.WHOLE_IMAGE["folder"]))
    assert len(list(setup.cache.glob("votes-*.pt"))) == 1

    def counted_as(numbers):
        @systems.named_after(numbers)
        def rule(setup, query, recipe):
            return systems.equal_votes(HYPOTHESIS[[0, 0, 0]])
        return rectify.votes_of(setup, QUERY, recipe, replace(SYSTEMS["whole-image"], votes=rule))
    for count in (1, 2):
        assert torch.equal(counted_as({"folder": (0.0, count)})[0], VOTES[0])
    assert len(list(setup.cache.glob("votes-*.pt"))) == 3


# ---------------------------------------------------------------------------- stage 1: the forms of Eq. 7

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


FORMS = {"cosine": systems.cosine_loss, "area": systems.area_loss}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_equal_the_loop(form):
    """With soft masks and with hard ones, some of them empty."""
    soft = 3 * random(2, C, 3, 5).softmax(dim=1)
    hard = F.one_hot(random(2, C, 3, 5).argmax(dim=1), C).permute(0, 3, 1, 2).float()
    hard[1, 1] = 0
    for masks in (soft, hard):
        found = FORMS[form](FEATURES, masks, QUERY, HYPOTHESIS, 20.0)
        expected = slow_loss(FEATURES, masks, QUERY, HYPOTHESIS, 20.0, form)
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_do_not_care_how_large_the_rest_of_the_image_is(form):
    """The same masked patches in an image twice as high: the same loss, where ReCLIP++'s form says something
    else."""
    masks = F.one_hot(random(2, C, 3, 5).argmax(dim=1), C).permute(0, 3, 1, 2).float()
    higher = torch.cat([FEATURES, unit(2, D, 3, 5, dim=1, seed=8)], dim=2)
    covered = torch.cat([masks, torch.zeros_like(masks)], dim=2)

    def losses(loss):
        return [loss(features, mask, QUERY, HYPOTHESIS, 20.0).item()
                for features, mask in ((FEATURES, masks), (higher, covered))]
    before, after = losses(FORMS[form])
    assert after == pytest.approx(before, rel=1e-5)
    before, after = losses(rectify.contrastive_loss)
    assert after != pytest.approx(before, rel=1e-2)


def test_the_cosine_does_not_care_how_heavy_a_mask_is():
    """Seven times the mask is the same direction."""
    masks = 3 * random(2, C, 3, 5).softmax(dim=1)
    assert systems.cosine_loss(FEATURES, 7 * masks, QUERY, HYPOTHESIS, 20.0).item() \
        == pytest.approx(systems.cosine_loss(FEATURES, masks, QUERY, HYPOTHESIS, 20.0).item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_eq7_survive_an_empty_mask(form):
    """ln C, and the gradient of a sum that is divided by one patch: n times that of the mean over the
    image."""
    gradients = []
    for of in (FORMS[form], rectify.contrastive_loss):
        masks = torch.zeros(2, C, 3, 5, requires_grad=True)
        loss = of(FEATURES, masks, QUERY, HYPOTHESIS, 20.0)
        assert loss.item() == pytest.approx(math.log(C), rel=1e-6)
        loss.backward()
        gradients.append(masks.grad)
    assert gradients[0][HYPOTHESIS].all() and relative(gradients[0], 15 * gradients[1]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_both_stages_train_with_the_form_that_is_handed_in(setup, monkeypatch, form):
    """Stage 1, and the student of such a teacher: the loss part is Eq. 7 in both."""
    name, calls = f"loss-{form}", []
    counted = replace(SYSTEMS[name], loss=lambda *args: calls.append(name) or FORMS[form](*args))
    monkeypatch.setitem(SYSTEMS, name, counted)
    found = train_step(setup, trained(setup), name)
    student_step(setup, trained(setup), name)
    assert len(calls) == 2
    assert found.item() != pytest.approx(train_step(setup, trained(setup)).item(), rel=1e-3)


# ---------------------------------------------------------------------------- stage 2

def new_student(setup, rectifier, name: str) -> distill.Student:
    torch.manual_seed(1)
    return distill.build_student(setup, rectifier, QUERY, SMALL, SYSTEMS[name], pretrained=False).train()


def student_step(setup, rectifier, name: str) -> tuple[distill.Student, dict[str, torch.Tensor]]:
    """One step of stage 2 on IMAGES by the teacher `rectifier`: student and losses."""
    student = new_student(setup, rectifier, name)
    with torch.no_grad():
        reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    lesson = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference, dense_path="residual")
    recipe = replace(SMALL, **SYSTEMS[name].student_numbers.get("any", {}))
    return student, distill.train_step(student, *lesson, IMAGES, VOTES, RECIPE, recipe,
                                       torch.Generator().manual_seed(0), SYSTEMS[name].loss)


@pytest.mark.parametrize("name", ["head-query", "maskclip+", "reclip"])
def test_query_head_is_ten_cosines(setup, name):
    """The text features as a frozen classifier: neither bias nor decoder."""
    teacher = "reclip++" if name == "head-query" else name
    found = new_student(setup, trained(setup, teacher), name).head(FEATURES)
    for b, k, i, j in [(0, 0, 0, 0), (1, 3, 2, 4), (0, 2, 1, 3)]:
        expected = 10 * (FEATURES[b, :, i, j] @ QUERY[k]).item()
        assert found[b, k, i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.equal(found, 10 * rectify.query_logits(FEATURES, QUERY))


def test_query_and_bias_head_is_eq3(setup):
    """Ten times M: the decoder of its teacher is left out."""
    head = new_student(setup, trained(setup), "head-query+bias").head
    expected = rectify.query_logits(FEATURES, QUERY) - head.bias(3, 5)
    assert relative(head(FEATURES), 10 * expected) <= 1e-5 and head.bias(3, 5).any()


def test_own_head_learns_and_inherits_nothing(setup):
    """A 1×1 convolution by hand; its gradient arrives; what was inherited plays no part and does not move."""
    student, losses = student_step(setup, trained(setup), "own-head")
    classifier = student.head.classifier
    found = student.head(FEATURES)
    for b, k, i, j in [(0, 0, 0, 0), (1, 3, 2, 4)]:
        by_hand = classifier.weight[k, :, 0, 0] @ FEATURES[b, :, i, j] + classifier.bias[k]
        assert found[b, k, i, j].item() == pytest.approx(10 * by_hand.item(), rel=1e-4, abs=1e-5)
    losses["loss"].backward()
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if not name.startswith("network.")} \
        == {"head.classifier.weight", "head.classifier.bias"}
    assert classifier.weight.grad.any() and student.network.backbone[0].weight.grad.any()


@pytest.mark.parametrize("name, kept", [("loss-mask", {"mask": 1}),
                                        ("loss-mask+feature", {"mask": 1, "feature": 0.5})])
def test_table_viii_leaves_out_losses(setup, name, kept):
    """The loss is the sum of those that are kept, and so is its gradient; what is left out is still
    logged."""
    rectifier = trained(setup)
    student, losses = student_step(setup, rectifier, name)
    expected = sum(weight * losses[part].item() for part, weight in kept.items())
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert set(losses) == {"loss", "mask", "feature", "text"}
    losses["loss"].backward()
    found = student.network.aspp[0].weight.grad.clone()
    same = new_student(setup, rectifier, name)
    features = same.network(IMAGES)
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
    teacher_features, logits = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference,
                                             "residual")
    pseudo_label = distill.resized(logits, features.shape[-2:]).argmax(dim=1)             # Eq. 8, at the grid
    of_masks = distill.mask_loss(same.head(features), pseudo_label)
    (of_masks + kept.get("feature", 0) * distill.feature_loss(features, teacher_features)).backward()
    assert relative(found, same.network.aspp[0].weight.grad) <= 1e-5


def test_losses_at_the_image_are_those_of_maps_resized_to_it(setup):
    """Eq. 8 and 9 to the letter: averages over the image's pixels; the text loss is as it was."""
    student, losses = student_step(setup, trained(setup), "losses-at-image")
    _, usual = student_step(setup, trained(setup), "loss-mask")
    with torch.no_grad():
        rectifier = trained(setup)
        reference = rectify.reference_features(setup.clip_model, rectifier.prompt, VOCABULARY.names)
        seen, taught = distill.teach(rectifier, setup.clip_model, IMAGES, QUERY, reference, "residual")
        same = new_student(setup, rectifier, "losses-at-image")
        features = same.network(IMAGES)
        up = [F.interpolate(maps, size=(24, 37), mode="bilinear", align_corners=False)
              for maps in (same.head(features), taught, features, seen)]
    assert losses["mask"].item() == pytest.approx(F.cross_entropy(up[0], up[1].argmax(dim=1)).item(),
                                                  rel=1e-5)
    assert losses["feature"].item() == pytest.approx((up[2] - up[3]).abs().mean().item(), rel=1e-5)
    assert losses["text"].item() == usual["text"].item() and losses["mask"].item() != usual["mask"].item()


def test_maskclip_plus_learns_maskclips_argmax(setup, monkeypatch):
    """The pseudo-label of every place is the class of the highest cosine; nothing random is stored in its
    teacher."""
    monkeypatch.setitem(setup.__dict__, "training_images", {"a": Path("a")})
    shutil.rmtree(setup.folder("rectify"), ignore_errors=True)
    monkeypatch.setattr(setup, "args", paper_run.flags().parse_args(["--out", setup.args.out]))
    systems.untrained_teacher(setup, SYSTEMS["maskclip+"])
    checkpoint = runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")
    recipe, rectifier = rectify.load_rectifier(setup, checkpoint, SYSTEMS["maskclip+"])
    assert list(checkpoint["weights"]) == ["prompt"] and recipe.prompt_length == 1
    assert recipe.vote_threshold == 0
    assert checkpoint["settings"]["system"] == {"name": "maskclip+",
                                                "command": "python paper/run.py maskclip+"}
    seen = []
    monkeypatch.setattr(distill, "mask_loss",
                        lambda logits, pseudo_label: seen.append(pseudo_label) or logits.sum())
    student_step(setup, rectifier, "maskclip+")
    features = setup.clip_model.encode_dense(IMAGES)
    expected = torch.empty(2, 3, 5, dtype=torch.int64)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                cosines = [(features[b, :, i, j] @ row).item() for row in QUERY]
                expected[b, i, j] = cosines.index(max(cosines))
    assert torch.equal(seen[0], expected)
    votes = systems.any_class(setup, QUERY, recipe)
    assert rectify.multi_label_hypothesis(votes, recipe.vote_threshold).tolist() == [[True] * C]


def test_student_of_a_fine_tuned_teacher_holds_no_image_tower(setup):
    """It looks with its own network; what is inherited still is the teacher's head."""
    rectifier = trained(setup, "fine-tuned")
    head = new_student(setup, rectifier, "fine-tuned").head
    assert not any("tower" in name for name in head.state_dict())
    assert torch.equal(head(FEATURES), rectifier(FEATURES, QUERY, head.bias(3, 5)))


# ---------------------------------------------------------------------------- key smoothing

def test_keys_are_those_of_the_last_block_and_of_length_one(setup):
    """The keys that attention computes, heads side by side, normalised over channels; the class token has
    none."""
    visual = setup.clip_model.visual
    found, seen = setup.clip_model.encode_keys(IMAGES), []
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
    """pred_i ← Σ_j cos(k_i, k_j) pred_j where the best of pred_i is under the threshold; sums use the old
    numbers."""
    probability, threshold = (3 * random(2, C, 3, 4)).softmax(dim=1), 0.8
    keys = unit(2, E, 3, 4, dim=1, seed=1)
    found = evaluate.smooth(probability, keys, threshold)
    places = [(i, j) for i in range(3) for j in range(4)]
    smoothed = 0
    for b in range(2):
        for i, j in places:
            expected = probability[b, :, i, j]
            if expected.max() < threshold:
                smoothed += 1
                expected = sum((keys[b, :, i, j] @ keys[b, :, y, x]) * probability[b, :, y, x]
                               for y, x in places)
                assert relative(found[b, :, i, j], expected) <= 1e-5
            else:
                assert torch.equal(found[b, :, i, j], expected)
    assert 0 < smoothed < 24


def test_key_smoothing_of_0_changes_nothing():
    """Neither the probabilities nor, through `predict`, a single pixel; without keys none is changed
    either."""
    logits, keys = random(1, C, 3, 4), unit(1, E, 3, 4, dim=1, seed=1)
    probability = logits.softmax(dim=1)
    assert torch.equal(evaluate.smooth(probability, keys, 0.0), probability)
    expected = evaluate.predict(logits, (30, 41))
    assert torch.equal(evaluate.predict(logits, (30, 41), smoothing=0.0, keys=keys), expected)
    assert torch.equal(evaluate.predict(logits, (30, 41), smoothing=0.9, keys=None), expected)
    assert not torch.equal(evaluate.predict(logits, (30, 41), smoothing=1.0, keys=keys), expected)


# ---------------------------------------------------------------------------- paper/run.py

@pytest.fixture
def voc(place, tiny_clip):
    """VOC's tree in ./data and recipes of a few seconds; gives the flags that a first run needs."""
    write_voc_tree(place / "data")
    return ["--data", "voc", "--clip", tiny_clip]


def test_flags_are_those_of_the_three_stages():
    """Same names, same defaults, same choices; --system, --stage and --list besides."""
    own = {action.dest: action for action in paper_run.flags()._actions}
    theirs = {action.dest: action for script in paper_run.STAGES.values()
              for action in script.flags()._actions}
    assert own.keys() - theirs.keys() == {"system", "stage", "list"} and theirs.keys() <= own.keys()
    for name, action in theirs.items():
        assert (own[name].default, own[name].choices) == (action.default, action.choices), name


def test_list_has_a_line_for_every_system(capsys):
    run(paper_run, "--list")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == list(SYSTEMS) and len(lines) == len(SYSTEMS)
    said = dict(zip(SYSTEMS, lines))
    assert "rectifier NoBias" in said["no-bias"] and "loss cosine_loss" in said["loss-cosine"]
    assert "votes whole_image_votes" in said["whole-image"]
    assert "student's numbers losses_at" in said["losses-at-image"]


@pytest.mark.parametrize("flags, said", [
    (["nonsense"], "expected a system of reclip++, reclip,"), ([], "found none"),
    (["reclip", "--vote-threshold", "0.1"], "--vote-threshold: expected flags that"),
    (["whole-image", "--window-ratio", "0.5"], "--window-ratio: expected flags that"),
    (["maskclip+", "--loss-scale", "3"], "--loss-scale: expected flags that"),
    (["no-bias", "--stage", "distill", "--mask-scale", "3"],
     "--mask-scale: expected flags that distill of no-bias"),
    (["no-bias", "--stage", "evaluate", "--epochs", "3"],
     "--epochs: expected flags that evaluate of no-bias"),
    (["own-head", "--vote-threshold", "0.1"],
     "--vote-threshold: expected flags that distill and evaluate of own-head"),
    (["own-head", "--stage", "rectify"], "Make that with: python rectify.py")])
def test_what_nothing_reads_is_refused(place, capsys, flags, said):
    """Before anything is opened, let alone trained."""
    assert said in refusal(capsys, paper_run, *flags)
    assert not Path("runs").exists()


class Interrupted(Exception):
    pass


def interrupted_and_resumed(monkeypatch, stage: str, out: str, *flags) -> dict[str, torch.Tensor]:
    """The stage breaks off in its third step of four and is resumed; gives the weights that were saved in
    between."""
    script = paper_run.STAGES[stage]
    step, calls = script.train_step, []

    def third_fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return step(*args)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(script, "train_step", third_fails)
        run(paper_run, *flags, "--stage", stage, "--out", out)
    saved = runs.load(Path(out, "voc", stage, "unfinished/state.pt"), stage)["weights"]
    run(paper_run, *flags, "--stage", stage, "--out", out, "--resume")
    return saved


def weights_of(stage: str, out: str) -> dict[str, torch.Tensor]:
    return runs.load(Path(out, "voc", stage, "checkpoint.pt"), stage)["weights"]


def differing(found: dict, expected: dict) -> set[str]:
    """The names of the weights that are not the same bits."""
    assert found.keys() == expected.keys()
    return {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)}


def slow_but(quick: str, names: list[str]) -> list:
    """One of the names for every day, the others marked slow."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but("reclip", OWN_STAGE_1))
def test_systems_with_a_stage_1_from_photos_to_measured_student(monkeypatch, capsys, voc, name):
    """Trained, broken off, resumed to the same bits, distilled, measured; its name on every table and in
    every file."""
    run(paper_run, name, *voc, "--stage", "rectify", "--out", "whole")
    shutil.copytree("whole/voc/cache", "broken/voc/cache")
    interrupted_and_resumed(monkeypatch, "rectify", "broken", name, *voc)
    assert not differing(weights_of("rectify", "broken"), weights_of("rectify", "whole"))
    assert f"rectified, {name}" in capsys.readouterr().out
    run(paper_run, name, "--stage", "distill", "--out", "whole")
    assert json.loads(Path("whole/voc/distill/recipe.json").read_text())["system"] == name
    smooth, calls = evaluate.smooth, []
    monkeypatch.setattr(evaluate, "smooth", lambda *args: calls.append(1) or smooth(*args))
    metrics = run(paper_run, name, "--stage", "evaluate", "--out", "whole", "--key-smoothing", "1")
    assert len(calls) == 3 * 2                    # of two images, all stages but the student, who has no keys
    said = capsys.readouterr().out
    assert f"rectified, {name}" in said and f"distilled, {name}" in said and "key smoothing 1.0" in said
    assert {stage: found["fingerprint"]["system"] for stage, found in metrics.items()} \
        == {"vanilla": "reclip++", "maskclip": "reclip++", "rectify": name, "distill": name}
    assert metrics.pop("distill") == json.loads(Path("whole/voc/distill/metrics.json").read_text())
    assert metrics["rectify"] != json.loads(Path("whole/voc/rectify/metrics.json").read_text())
    refined = {"prompt_denoising": 0.0, "key_smoothing": 1.0}
    assert all(found["fingerprint"]["refinements"] == refined for found in metrics.values())


@pytest.mark.parametrize("name", slow_but("own-head", [*STUDENTS, "maskclip+"]))
def test_other_students_from_photos_to_measured_student(monkeypatch, capsys, voc, name):
    """The rectification is made where it is missing; broken off, resumed to the same bits, measured."""
    flags = [name, *voc, "--epochs", "2"]               # MaskCLIP+ has many epochs
    saved = interrupted_and_resumed(monkeypatch, "distill", "broken", *flags)
    metrics = run(paper_run, *flags, "--out", "whole")
    assert not differing(weights_of("rectify", "broken"), weights_of("rectify", "whole"))
    assert not differing(weights_of("distill", "broken"), weights_of("distill", "whole"))
    learned = {key for key in differing(saved, weights_of("distill", "whole"))
               if not key.startswith("network.")}
    assert learned == ({"head.classifier.weight", "head.classifier.bias"} if name == "own-head" else set())
    assert f"distilled, {name}" in capsys.readouterr().out
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    teacher = "maskclip+" if name == "maskclip+" else "reclip++"
    assert [metrics[stage]["fingerprint"]["system"] for stage in ("rectify", "distill")] == [teacher, name]
    if name == "maskclip+":
        assert metrics["rectify"]["miou"] == metrics["maskclip"]["miou"]


def test_reclip_plus_plus_is_the_one_of_the_plain_scripts(voc):
    """The same bits, and either goes on with what the other began."""
    run(rectify, *voc, "--out", "plain")
    run(paper_run, "reclip++", *voc, "--stage", "rectify", "--out", "other")
    found, expected = (runs.load(Path(out, "voc/rectify/checkpoint.pt"), "rectify")
                       for out in ("other", "plain"))
    assert found["settings"] == expected["settings"] and not differing(found["weights"], expected["weights"])


def test_systems_are_not_mixed(capsys, voc):
    """Neither is a run resumed as another system, nor a student taught by another system than its own."""
    run(paper_run, "addition", *voc, "--stage", "rectify")
    said = refusal(capsys, paper_run, "own-head", *voc)
    assert "expected a checkpoint of reclip++, found one of addition" in said
    said = refusal(capsys, paper_run, "maskclip+", *voc)
    assert "addition" in said and "maskclip+" in said
    assert "another system" in refusal(capsys, paper_run, "no-bias", *voc, "--stage", "rectify", "--resume")
    kept = runs.load(Path("runs/voc/rectify/checkpoint.pt"), "rectify")
    assert kept["settings"]["system"]["name"] == "addition"


def test_maskclip_plus_does_not_overwrite_a_rectification(voc, capsys):
    """Its teacher needs a folder of its own, and says so; with --out both are kept."""
    run(rectify, *voc)
    before = Path("runs/voc/rectify/checkpoint.pt").read_bytes()
    said = refusal(capsys, paper_run, "maskclip+", *voc, "--epochs", "1")
    assert "expected no rectification but that of maskclip+, found one of reclip++" in said
    assert "--out" in said
    assert Path("runs/voc/rectify/checkpoint.pt").read_bytes() == before
    assert list(run(paper_run, "maskclip+", *voc, "--epochs", "1", "--out", "o")) \
        == ["vanilla", "maskclip", "rectify", "distill"]


@pytest.mark.parametrize("script", [distill, evaluate])
def test_script_that_does_not_know_a_system_says_the_command_that_does(voc, capsys, script):
    """As the checkpoint remembers it."""
    run(paper_run, "no-bias", *voc, "--stage", "rectify")
    said = refusal(capsys, script)
    assert "expected a checkpoint of reclip++, found one of no-bias" in said
    assert "python paper/run.py no-bias" in said


def test_checkpoint_of_a_system_that_is_not_here_is_told_with_its_command(tmp_path):
    checkpoint = {"path": tmp_path / "c.pt",
                  "settings": {"system": {"name": "mine", "command": "python mine.py"}}}
    with pytest.raises(ValueError, match="found one of mine. It was made with: python mine.py"):
        systems.of(checkpoint)
    assert systems.of({"settings": {"system": {"name": "no-bias"}}}) is SYSTEMS["no-bias"]


@pytest.mark.parametrize("part", ["rectifier", "votes", "loss", "head"])
def test_typo_in_a_systems_code_keeps_its_traceback_and_blames_no_checkpoint(voc, monkeypatch, capsys, part):
    """It is no error of a file, though a good checkpoint is being read: nobody is told to delete it."""
    class Misspelt(rectify.Rectifier):
        def bias(self, positions, reference):
            return self.projektion(positions[None])[0]

    class MisspeltHead(distill.Inherited):
        def forward(self, features):
            return self.qery @ features

    def misspelt(*args):
        return rectify.contrastive_los(*args)

    run(paper_run, "no-bias", *voc, "--stage", "rectify")
    typo = {"rectifier": Misspelt, "head": MisspeltHead}.get(part, misspelt)
    monkeypatch.setitem(SYSTEMS, "no-bias", replace(SYSTEMS["no-bias"], **{part: typo}))
    capsys.readouterr()
    with pytest.raises(AttributeError, match="projektion|qery|contrastive_los"), errors.one_paragraph():
        run(paper_run, "no-bias", "--stage", "distill")
    said = capsys.readouterr()
    assert "checkpoint" not in said.err and "Remove" not in said.err + said.out
    assert Path("runs/voc/rectify/checkpoint.pt").exists()


@pytest.mark.slow
def test_first_reader_may_delete_the_room(voc, tmp_path_factory):
    """The main path runs without paper/: no script of it looks there."""
    copy_of = tmp_path_factory.mktemp("project") / "p"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "paper", "tests", "runs", "data")
    shutil.copytree(ROOT, copy_of, ignore=left_out)
    for script in ("rectify.py", "evaluate.py"):
        flags = [*map(str, voc), *["--epochs", "1"] * (script == "rectify.py")]
        done = subprocess.run([sys.executable, copy_of / script, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not (copy_of / "paper").exists() and Path("runs/voc/evaluate/metrics.json").exists()


# ---------------------------------------------------------------------------- "Add an ablation"

def test_recipe_for_an_ablation_works_to_the_letter(voc, tmp_path_factory):
    """paper/README.md's own blocks: class and line go where it says, and its command is run."""
    text = (ROOT / "paper/README.md").read_text(encoding="utf-8")
    chapter = re.split(r"^## ", text, flags=re.M)
    [chapter] = [part for part in chapter if part.startswith("Add an ablation\n")]
    code = re.findall(r"```python\n(.*?)```", chapter, flags=re.S)
    [command] = re.findall(r"```\npython (paper/run.py .*?)\n", chapter)
    assert len(code) == 2 and "kernel_size=1" in code[0] and "other(" in code[1]
    project = tmp_path_factory.mktemp("project") / "p"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "runs", "data")
    shutil.copytree(ROOT, project, ignore=left_out)
    path = project / "paper/systems.py"
    source = path.read_text(encoding="utf-8")
    [rule] = re.findall(r"^# -+ stage 1: the hypothesis$", source, flags=re.M)
    opening = "SYSTEMS = {system.name: system for system in (\n"
    source = source.replace(rule, f"{code[0]}\n\n{rule}")
    path.write_text(source.replace(opening, f"{opening}    {code[1].strip()}\n"), encoding="utf-8")
    script, name, *words = command.split()
    words += [*map(str, voc), "--stage", "rectify", "--epochs", "1"]        # in small, and without a student
    done = subprocess.run([sys.executable, project / script, name, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = words[words.index("--out") + 1]
    checkpoint = runs.load(Path(out, "voc/rectify/checkpoint.pt"), "rectify")
    assert checkpoint["settings"]["system"]["name"] == name
    assert checkpoint["weights"]["decoder.conv.weight"].shape[-2:] == (1, 1)
