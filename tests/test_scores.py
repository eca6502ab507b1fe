"""paper/scores.py: the preferences against slow loops and cases whose answer is known; the probe, and whose
labels it opens.

    python -m pytest tests/test_scores.py

    C classes · H,W pixels · h,w patches · N objects or patches · K bins
"""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clip
import data
import distill
import evaluate
import rectify
from conftest import ROOT
from datasets import DATASETS, IGNORE, images as image_files, labels as ground_truth
from harness import files
from helpers import (VOC_BASE, python_files, refusal, run, write_label, write_photos, write_public_tree,
                     write_voc_tree)
from paper import run as paper_run, scores, systems
from toyland import world as toyland

VOC_CLASSES = DATASETS["voc"].names
CLASSES = 4

# ------------------------------------------------------------------------------------------ class preference

# Truth in rows: 10 pixels of a, 8 called a, 2 called b; 20 of b, 5 called b, 15 called a; none of c; 4 of d,
# all called c.
HAND = torch.tensor([[8, 2, 0, 0],
                     [15, 5, 0, 0],
                     [0, 0, 0, 0],
                     [0, 0, 4, 0]])
confusions = st.integers(2, 5).flatmap(lambda classes: st.lists(
    st.lists(st.integers(0, 9), min_size=classes, max_size=classes), min_size=classes,
    max_size=classes)).map(torch.tensor)


def slow_class_preference(confusion):
    """Row by row, with Python's own numbers."""
    differences = []
    for true, row in enumerate(confusion.tolist()):
        if sum(row):
            rival = max(count for said, count in enumerate(row) if said != true)
            differences.append((row[true] - rival) / sum(row))
    return sum(differences) / len(differences)


def test_class_preference_of_a_worked_example():
    """0.8 − 0.2, 0.25 − 0.75, no row of c, 0 − 1."""
    assert scores.class_preference(HAND) == pytest.approx((0.6 - 0.5 - 1) / 3)


@given(confusions.filter(lambda confusion: bool(confusion.any())))
@settings(max_examples=60, deadline=None)
def test_class_preference_equals_a_loop_over_rows(confusion):
    found = scores.class_preference(confusion)
    assert found == pytest.approx(slow_class_preference(confusion)) and -1 <= found <= 1
    assert scores.class_preference(7 * confusion) == pytest.approx(found)


@given(confusions.filter(lambda confusion: bool(confusion.any())), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_class_preference_does_not_depend_on_the_order_of_classes(confusion, random):
    order = list(range(len(confusion)))
    random.shuffle(order)
    expected = scores.class_preference(confusion)
    assert scores.class_preference(confusion[order][:, order]) == pytest.approx(expected)


def test_class_preference_of_a_model_that_is_always_right_is_one():
    """Also where a class is absent: it has no row to speak of."""
    assert scores.class_preference(torch.tensor([5, 0, 3]).diag()) == 1


def test_class_preference_of_a_model_that_always_says_one_class():
    """One row is perfect, every other is wholly the rival's: (1 − (C − 1)) / C."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    confusion[:, 2] = 10
    assert scores.class_preference(confusion) == pytest.approx((1 - (CLASSES - 1)) / CLASSES)


def test_class_preference_of_nothing_is_no_number():
    assert math.isnan(scores.class_preference(torch.zeros(3, 3, dtype=torch.int64)))


def test_rows_of_shares_sum_to_one_where_the_truth_has_the_class():
    found = scores.row_shares(HAND)
    assert found[[0, 1, 3]].sum(dim=1).tolist() == pytest.approx([1, 1, 1]) and found[2].isnan().all()
    assert found[1].tolist() == pytest.approx([0.75, 0.25, 0, 0])


# ------------------------------------------------------------------------------------------ objects

def flood_fill(values):
    """Pieces by walking from pixel to pixel: a list of sets of (y, x), in reading order of their first
    pixels."""
    H, W = values.shape
    free, pieces = {(y, x) for y in range(H) for x in range(W)}, []
    for start in [(y, x) for y in range(H) for x in range(W)]:
        if start not in free:
            continue
        free.remove(start)
        piece, waiting = set(), [start]
        while waiting:
            y, x = waiting.pop()
            piece.add((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in free and values[near] == values[y, x]:
                    free.remove(near)
                    waiting.append(near)
        pieces.append(piece)
    return pieces


def random_label(seed, H, W, values=(0, 1, 2, IGNORE)):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.choice(values, (H, W)).astype(np.int64))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_connected_pieces_are_those_of_a_flood_fill(seed, H, W, values):
    """Piece by piece and in the same order, one row, one column and one pixel among the pictures."""
    label = random_label(seed, H, W, range(values))
    found, expected = scores.connected_pieces(label), flood_fill(label)
    assert int(found.max()) + 1 == len(expected)
    for number, piece in enumerate(expected):
        assert {tuple(place) for place in (found == number).nonzero().tolist()} == piece


def test_a_spiral_is_one_piece_and_what_it_winds_around_another():
    """A path that turns inwards and back: runs are joined over many rounds, not only to their neighbours."""
    rows = ["#########", "........#", "#######.#", "#.....#.#", "#.###.#.#", "#.#...#.#", "#.#####.#",
            "#.......#",
            "#########"]
    label = torch.tensor([[int(letter == "#") for letter in row] for row in rows])
    found = scores.connected_pieces(label)
    assert int(found.max()) + 1 == len(flood_fill(label)) == 2


def test_pieces_that_meet_at_a_corner_are_two():
    assert scores.connected_pieces(torch.tensor([[1, 0], [0, 1]])).tolist() == [[0, 1], [2, 3]]


def test_distance_is_measured_in_half_diagonals():
    """A 3 × 5 label of which the middle is 0 and the corner's pixel 2 columns and 1 row away."""
    label = torch.full((3, 5), IGNORE)
    label[1, 2], label[0, 0] = 0, 1
    number, distance = scores.objects(label)
    assert distance.tolist() == pytest.approx([math.hypot(1, 2) / (math.hypot(3, 5) / 2), 0])
    assert number[0, 0] == 0 and number[1, 2] == 1 and (number == -1).sum() == 13


def test_two_cars_are_two_objects_far_from_the_centre():
    """Their common centroid would be the centre, where there is none."""
    label = torch.full((9, 21), IGNORE)
    label[3:6, :3] = label[3:6, 18:] = 0
    _, distance = scores.objects(label)
    assert distance.tolist() == pytest.approx([9 / (math.hypot(9, 21) / 2)] * 2)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_objects_equal_a_loop_over_pieces(seed, H, W):
    label = random_label(seed, H, W)
    number, distance = scores.objects(label)
    pieces = [piece for piece in flood_fill(label) if label[min(piece)] != IGNORE]
    assert len(distance) == len(pieces) and torch.equal(number == -1, label == IGNORE)
    for count, piece in enumerate(pieces):
        y, x = (sum(place[axis] for place in piece) / len(piece) for axis in (0, 1))
        expected = math.hypot(y - (H - 1) / 2, x - (W - 1) / 2) / (math.hypot(H, W) / 2)
        assert distance[count].item() == pytest.approx(expected, abs=1e-12) and 0 <= expected < 1
        assert all(number[place] == count for place in piece)


# ------------------------------------------------------------------------------------------ space preference

def random_prediction(seed, label, classes=3, right=0.5):
    """Right with the given probability, else any class."""
    generator = torch.Generator().manual_seed(seed)
    said = torch.randint(classes, label.shape, generator=generator)
    is_right = torch.rand(label.shape, generator=generator) < right
    return torch.where(is_right & (label != IGNORE), label, said)


def by_distance(label, predicted, classes, bins):
    """(matrices of the bins (K, C, C), objects in them (K,)) of one image."""
    place, counts = scores.bins_of_pixels(label, bins)
    return scores.confusion_by_distance(label, place, predicted, classes, bins), counts


def enlarged(picture, times):
    return picture.repeat_interleave(times, dim=0).repeat_interleave(times, dim=1)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_matrices_of_bins_equal_a_loop_over_objects(seed, H, W, bins):
    """Each pixel in the bin of its own object; all bins together are the confusion matrix of evaluate.py."""
    label = random_label(seed, H, W)
    predicted = random_prediction(seed, label)
    found, counts = by_distance(label, predicted, 3, bins)
    expected, objects_in = torch.zeros(bins, 3, 3, dtype=torch.int64), [0] * bins
    number, distance = scores.objects(label)
    for one, far in enumerate(distance.tolist()):
        place = int(far * bins + 1e-9)
        objects_in[place] += 1
        for true, said in zip(label[number == one].tolist(), predicted[number == one].tolist()):
            expected[place, true, said] += 1
    assert torch.equal(found, expected) and counts.tolist() == objects_in
    assert torch.equal(found.sum(dim=0), evaluate.confusion_matrix(label, predicted, 3))


def slow_curve(confusion):
    """mIoU of each bin from its definition, class by class."""
    bins, classes = len(confusion), confusion.shape[1]
    pixels, found = confusion.sum(dim=2).tolist(), confusion.tolist()
    curve = []
    for b in range(bins):
        values = []
        for k in range(classes):
            if pixels[b][k]:
                false = sum(found[a][j][k] for a in range(bins) for j in range(classes) if j != k)
                share = pixels[b][k] / sum(pixels[a][k] for a in range(bins))
                values.append(found[b][k][k] / (pixels[b][k] + false * share))
        curve.append(sum(values) / len(values) if values else math.nan)
    return curve


many_confusions = st.integers(0, 10_000).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).integers(-4, 9, (5, 3, 3)).clip(0)))


@given(many_confusions)
@settings(max_examples=60, deadline=None)
def test_curve_equals_its_definition(confusion):
    assert scores.distance_curve(confusion).tolist() == pytest.approx(slow_curve(confusion), nan_ok=True)


@given(many_confusions)
@settings(max_examples=40, deadline=None)
def test_mean_over_bins_weighted_by_a_class_s_pixels_is_its_iou(confusion):
    """What makes the curve a picture of mIoU itself. A class is alone in its bins when the others' truth is
    in another."""
    for k in range(3):
        of_k, others = torch.zeros_like(confusion), confusion.sum(dim=0)
        of_k[:, k], others[k] = confusion[:, k], 0
        pixels = confusion[:, k].sum(dim=1).double()
        if pixels.sum() > 0:
            curve = scores.distance_curve(torch.cat([of_k, others[None]]))[:-1]
            mean = (pixels * curve.nan_to_num(0)).sum() / pixels.sum()
            assert mean.item() == pytest.approx(evaluate.class_iou(confusion.sum(dim=0))[k].item())


def test_false_pixels_of_wide_stuff_do_not_make_the_centre_look_worse():
    """Cars near and far are found equally well; all false cars lie on a road whose centroid is the centre: a
    level curve."""
    confusion = torch.zeros(2, 2, 2, dtype=torch.int64)
    # cars, 3 of 4 pixels found
    confusion[0, 0], confusion[1, 0] = torch.tensor([30, 10]), torch.tensor([15, 5])
    # a road in the first bin alone
    confusion[0, 1], confusion[1, 1] = torch.tensor([40, 60]), torch.tensor([0, 0])
    of_cars = scores.distance_curve(torch.stack([confusion[0] * torch.tensor([[1], [0]]), confusion[1],
                                                 confusion[0] * torch.tensor([[0], [1]])]))[:2]
    assert of_cars.tolist() == pytest.approx([45 / (60 + 40)] * 2)


def scene_of_dots(size=41, step=8):
    """One-pixel-apart squares of classes 0 and 1 all over a picture, each an object of its own."""
    label = torch.full((size, size), IGNORE)
    for row, y in enumerate(range(2, size - 3, step)):
        for column, x in enumerate(range(2, size - 3, step)):
            label[y:y + 5, x:x + 5] = (row + column) % 2
    return label


def test_model_that_is_right_everywhere_has_a_level_curve_at_one():
    label = scene_of_dots()
    confusion, counts = by_distance(label, label.clamp(max=1), 2, bins=10)
    curve = scores.distance_curve(confusion)
    assert counts.sum() == 25 and (curve[counts > 0] == 1).all() and curve[counts == 0].isnan().all()
    assert scores.space_slope(curve, counts) == pytest.approx(0, abs=1e-12)
    assert scores.space_preference(curve) == pytest.approx(0, abs=1e-12)


def test_model_that_is_right_only_in_the_centre_falls_from_one_to_nought():
    """Objects nearer than half are found, those beyond are called a third class: a step, whose slope is
    known."""
    label = scene_of_dots()
    number, distance = scores.objects(label)
    predicted = torch.where((number >= 0) & (distance[number] < 0.5), label, 2).clamp(max=2)
    confusion, counts = by_distance(label, predicted, 3, bins=10)
    curve = scores.distance_curve(confusion)
    held = counts > 0
    assert curve[held].tolist() == [1.0 if x < 0.5 else 0.0 for x in scores.bin_middles(10)[held].tolist()]
    x, weight = scores.bin_middles(10)[held].numpy(), counts[held].numpy()
    expected = np.polyfit(x, curve[held].numpy(), deg=1, w=np.sqrt(weight))[0]
    assert scores.space_slope(curve, counts) == pytest.approx(expected) and expected < -1
    [step] = [far - near for near, far in zip(x, x[1:]) if near < 0.5 < far]
    assert scores.space_preference(curve) == pytest.approx(-1 / step / (len(x) - 1))  # all other slopes are 0


def test_model_that_always_says_one_class_has_a_level_curve():
    """It finds that class wholly everywhere and the other nowhere: ½ · IoU in each bin that holds both, at
    any distance."""
    label = scene_of_dots()
    confusion, counts = by_distance(label, torch.zeros_like(label), 2, bins=2)
    curve = scores.distance_curve(confusion)
    assert (confusion.sum(dim=2) > 0).all()                                       # both classes in either bin
    assert curve.tolist() == pytest.approx([13 / 25 / 2] * 2)
    assert scores.space_slope(curve, counts) == pytest.approx(0)
    assert scores.space_preference(curve) == pytest.approx(0)


@given(st.integers(0, 10_000), st.permutations(range(3)), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_curve_depends_neither_on_the_order_of_classes_nor_on_the_image_s_size(seed, order, times):
    """Renamed in truth and prediction alike; every pixel a block of pixels."""
    label = random_label(seed, 7, 9)
    predicted = random_prediction(seed, label)
    confusion, counts = by_distance(label, predicted, 3, bins=6)
    table = torch.tensor([*order, *[IGNORE] * 253])
    renamed, same = by_distance(table[label], table[predicted], 3, bins=6)
    larger, as_many = by_distance(enlarged(label, times), enlarged(predicted, times), 3, bins=6)
    assert torch.equal(counts, same) and torch.equal(counts, as_many)
    assert torch.equal(larger, times ** 2 * confusion)
    curve = scores.distance_curve(confusion).tolist()
    assert scores.distance_curve(renamed).tolist() == pytest.approx(curve, nan_ok=True)
    assert scores.distance_curve(larger).tolist() == pytest.approx(curve, nan_ok=True)


@given(st.floats(-1, 1), st.floats(0, 1), st.lists(st.integers(0, 9), min_size=10, max_size=10))
@settings(max_examples=40, deadline=None)
def test_slope_of_a_straight_curve_is_its_slope_whatever_the_weights(slope, height, counts):
    """And bins without objects may say what they like."""
    counts = torch.tensor(counts)
    curve = (height + slope * scores.bin_middles(10)).masked_fill(counts == 0, torch.nan)
    found = scores.space_slope(curve, counts)
    if (counts > 0).sum() < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(slope, abs=1e-9)


@given(st.floats(-1, 1), st.floats(0, 1), st.lists(st.booleans(), min_size=10, max_size=10))
@settings(max_examples=40, deadline=None)
def test_preference_of_a_straight_curve_is_its_slope_too(slope, height, held):
    """Both numbers agree on a line; bins without objects are passed over."""
    curve = (height + slope * scores.bin_middles(10)).masked_fill(~torch.tensor(held), torch.nan)
    found = scores.space_preference(curve)
    if sum(held) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(slope, abs=1e-9)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_preference_is_the_mean_of_the_slopes_between_neighbouring_distances(curve):
    """Each step from one distance that holds objects to the next counts once, as the paper words it."""
    points = [((i + 0.5) / len(curve), y) for i, y in enumerate(curve) if y == y]
    slopes = [(y - before) / (x - nearer) for (nearer, before), (x, y) in zip(points, points[1:])]
    found = scores.space_preference(torch.tensor(curve, dtype=torch.float64))
    if slopes:
        assert found == pytest.approx(sum(slopes) / len(slopes), abs=1e-9)
    else:
        assert math.isnan(found)


def test_the_two_numbers_differ_where_few_objects_lie_at_the_ends():
    """MaskCLIP's curve in Toyland: 86 of 3,633 objects, in the last bin, make the paper's number half as
    large again."""
    curve = torch.tensor([29.33, 30.27, 33.6, 34.2, 33.6, 28.83, 29.75, 28.66, 32.2, 17.19],
                         dtype=torch.float64) / 100
    counts = torch.tensor([109, 225, 411, 624, 671, 433, 454, 416, 203, 86])
    assert scores.space_preference(curve) == pytest.approx(-0.1349, abs=1e-4)
    assert scores.space_slope(curve, counts) == pytest.approx(-0.078, abs=1e-4)


def test_slope_is_that_of_all_objects_each_counted_once():
    """The weighted line through bins is the plain line through as many points as there are objects."""
    curve, counts = torch.tensor([0.9, 0.5, 0.6, 0.1], dtype=torch.float64), torch.tensor([1, 5, 2, 3])
    points = torch.repeat_interleave(torch.arange(4), counts)
    expected = np.polyfit(scores.bin_middles(4)[points].numpy(), curve[points].numpy(), deg=1)[0]
    assert scores.space_slope(curve, counts) == pytest.approx(expected)


def test_distance_at_a_boundary_is_in_the_outer_bin_whatever_its_last_bits():
    far = torch.tensor([0.0, 0.3 - 1e-12, 0.3, 0.3 + 1e-12, 0.2999, 1 - 1e-16, 1.0], dtype=torch.float64)
    assert scores.bin_of(far, 10).tolist() == [0, 3, 3, 3, 2, 9, 9]


# ---------------------------------------------------------------------------- the probe's classifier

def clouds(N=300, D=6, classes=3, spread=0.1, seed=0):
    """Points around a centre for each class: (N, D) and (N,)."""
    generator = torch.Generator().manual_seed(seed)
    true_label = torch.randint(classes, (N,), generator=generator)
    return 3 * F.one_hot(true_label, D).float() + spread * torch.randn(N, D, generator=generator), true_label


def accuracy(weight, bias, features, true_label):
    return (F.linear(features, weight, bias).argmax(dim=1) == true_label).float().mean().item()


def test_probe_separates_what_a_plane_separates():
    features, true_label = clouds()
    weight, bias = scores.fit_linear(features, true_label, 3, decay=1e-4, steps=200)
    assert weight.shape == (3, 6) and bias.shape == (3,) and not weight.requires_grad
    assert accuracy(weight, bias, *clouds(seed=1)) == 1


def test_probe_of_noise_knows_nothing_of_new_patches():
    """Labels drawn apart from the features: on patches never seen, one in three is right."""
    features = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    true_label = torch.randint(3, (600,), generator=torch.Generator().manual_seed(1))
    weight, bias = scores.fit_linear(features[:300], true_label[:300], 3, decay=1e-4, steps=200)
    assert abs(accuracy(weight, bias, features[300:], true_label[300:]) - 1 / 3) < 0.08


def test_probe_is_at_the_minimum_of_its_loss():
    """The gradient of cross-entropy plus decay on standardised channels, computed apart, is nought there."""
    features, true_label = clouds(spread=2.0)
    weight, bias = scores.fit_linear(features, true_label, 3, decay=1e-2, steps=200)
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    weight, bias = (weight * std).requires_grad_(), (bias + weight @ mean).requires_grad_()
    logits = F.linear((features - mean) / std, weight, bias)
    loss = F.cross_entropy(logits, true_label) + 1e-2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_probe_does_not_depend_on_the_scale_or_order_of_its_input():
    """Stages whose channels are of another size, or patches in another order, meet the same problem."""
    features, true_label = clouds(spread=2.0)
    expected = F.linear(features, *scores.fit_linear(features, true_label, 3, decay=1e-2, steps=200))
    scale, shift = torch.tensor([0.01, 1, 5, 0.3, 20, 2]), torch.tensor([5.0, 0, -3, 1, 0, 2])
    moved = features * scale + shift
    assert torch.allclose(F.linear(moved, *scores.fit_linear(moved, true_label, 3, 1e-2, 200)), expected,
                          atol=0.01)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(2))
    shuffled = scores.fit_linear(features[order], true_label[order], 3, decay=1e-2, steps=200)
    assert torch.allclose(F.linear(features, *shuffled), expected, atol=0.01)


def test_probe_of_the_same_patches_is_the_same_to_the_bit():
    first, second = (scores.fit_linear(*clouds(spread=2.0), 3, decay=1e-3, steps=50) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_probe_bears_channels_without_variance_and_classes_without_patches():
    """A constant channel divides by no zero; a class that no patch has is never said."""
    features, true_label = clouds()
    features[:, 5] = 7.0
    weight, bias = scores.fit_linear(features, true_label, 5, decay=1e-4, steps=200)
    assert weight.isfinite().all() and bias.isfinite().all()
    said = F.linear(features, weight, bias).argmax(dim=1)
    assert torch.equal(said, true_label)


@pytest.mark.parametrize("H, W, h, w", [(8, 12, 2, 3), (9, 7, 3, 2), (1, 1, 1, 1), (5, 5, 5, 5), (3, 4, 6, 8),
                                        (375, 500, 21, 28)])
def test_label_of_a_patch_is_that_of_its_middle_pixel(H, W, h, w):
    label = torch.arange(H * W).view(H, W)
    expected = [[label[int((i + 0.5) * H / h), int((j + 0.5) * W / w)].item() for j in range(w)]
                for i in range(h)]
    assert scores.label_at_centres(label, h, w).tolist() == expected


@given(st.integers(0, 50), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_evenly_spaced_items_are_in_order_and_none_twice(length, most):
    found = scores.evenly_spaced(list(range(length)), most)
    assert len(found) == min(length, most) and found == sorted(set(found))
    assert set(found) <= set(range(length))
    gaps = [after - before for before, after in zip(found, found[1:])]
    assert found[:1] in ([], [0]) and max(gaps, default=1) - min(gaps, default=1) <= 1


# ------------------------------------------------------------------------------------------ the command

@pytest.fixture
def voc(trained_voc):
    return trained_voc


@pytest.fixture
def opened(monkeypatch):
    """The label files that are opened, as datasets/labels.py is asked for them: a list of names that fills
    up."""
    found, label_picture = [], ground_truth.label_picture
    monkeypatch.setattr(ground_truth, "label_picture",
                        lambda path: found.append(path.name) or label_picture(path))
    return found


def content_of(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def measured(*flags):
    """(setup, query, labels, stages, system) of the newest run."""
    return scores.open_measured(scores.flags().parse_args([*flags, "--device", "cpu"]))


def test_scores_of_all_stages_are_printed_and_written(voc, opened, capsys):
    """One row a stage, one file; without --probe no label of a training image is opened."""
    before = content_of("runs/voc/rectify") | content_of("runs/voc/distill")
    found = run(scores)
    said = capsys.readouterr().out
    assert json.loads(Path("runs/voc/scores/scores.json").read_text()) == found
    assert list(found) == ["vanilla", "maskclip", "rectify", "distill"]
    for stage, of_stage in found.items():
        assert evaluate.STAGES[stage] in said and "probe" not in of_stage
        assert -1 <= of_stage["class_preference"] <= 1
        assert isinstance(of_stage["space_preference"], float) and isinstance(of_stage["space_slope"], float)
        assert all(f"{of_stage[name]:.3f}" in said for name in ("space_preference", "space_slope"))
        curve = of_stage["curve"]
        assert curve["distance"] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
        assert [value is None for value in curve["miou"]] == [count == 0 for count in curve["objects"]]
        assert of_stage["fingerprint"]["stage"] == stage and of_stage["fingerprint"]["images"] == 2
        assert (of_stage["fingerprint"]["weights"] is None) == (stage in ("vanilla", "maskclip"))
    assert set(opened) == {"2007_000033.png", "2007_000042.png"}                # the two of validation
    assert content_of("runs/voc/rectify") | content_of("runs/voc/distill") == before
    assert "Next: python paper/figures.py" in said


def test_scores_are_those_of_the_predictions_that_evaluate_measures(voc):
    """The matrices of all bins together give evaluate.py's numbers, and class preference is theirs."""
    setup, query, labels, stages, _ = measured()
    expected = evaluate.measure(setup, evaluate.predictors(setup, query, stages), labels)
    found = scores.confusions(setup, evaluate.predictors(setup, query, stages), labels)
    written = run(scores)
    for stage, (confusion, counts) in found.items():
        of_bins = evaluate.measures(confusion.sum(dim=0), setup.vocabulary.names)
        assert of_bins == {name: expected[stage][name] for name in of_bins}
        assert written[stage]["class_preference"] == round(slow_class_preference(confusion.sum(dim=0)), 4)
        assert written[stage]["curve"]["miou"] == pytest.approx(
            [None if value != value else round(100 * value, 2) for value in slow_curve(confusion)], abs=0.011)


def test_probe_teaches_on_training_labels_and_changes_no_weight(voc, opened):
    """Every stage has its probe; both checkpoints are bit for bit as before; the same seed gives the same
    numbers."""
    before = content_of("runs/voc/rectify") | content_of("runs/voc/distill")
    first = run(scores, "--probe", "--seed", "3")
    assert {"2007_000032.png", "2007_000068.png"} < set(opened)               # of training, and of validation
    assert content_of("runs/voc/rectify") | content_of("runs/voc/distill") == before
    assert run(scores, "--probe", "--seed", "3") == first
    for of_stage in first.values():
        probe = of_stage["probe"]
        assert 0 <= probe["miou"] <= 100 and 0 < probe["patches"] <= 4 * 100 and probe["seed"] == 3
        assert list(probe["per_class_iou"]) == VOC_CLASSES
    assert len({of_stage["probe"]["pixel_accuracy"] for of_stage in first.values()}) > 1


def with_votes(monkeypatch, votes):
    """As if stage 1 had counted other votes: Eq. 6 makes hypotheses of these."""
    monkeypatch.setattr(rectify, "votes_of", lambda *_: systems.equal_votes(votes))


def with_threshold(name: str, threshold: float) -> None:
    """The threshold of Eq. 6 in the recipe of the rectification that lies in runs/."""
    path = Path("runs", name, "rectify/checkpoint.pt")
    content = files.read(path)
    content["settings"]["recipe"]["vote_threshold"] = threshold
    files.save(path, content)


def test_hypotheses_are_compared_with_what_is_in_the_training_images(voc, monkeypatch, capsys):
    """Right hypotheses have precision and recall 1; all classes have recall 1 and the truth's share as
    precision."""
    with_threshold("voc", 0.0)
    setup, query, _, _, system = measured()
    names = setup.vocabulary.names
    folder = Path("data/VOCdevkit/VOC2012/SegmentationClass")
    labels = [np.array(Image.open(folder / f"{image}.png")) for image in setup.training_images]
    truth = torch.tensor([[(label == 1 + k).any() for k in range(20)] for label in labels])
    with_votes(monkeypatch, truth)
    found = scores.hypothesis_scores(setup, query, system)
    assert found["precision"] == found["recall"] == 1 and found["classes"] == round(truth.sum().item() / 4, 2)
    # no bird there
    assert found["per_class"][names[3]] == (None, None) and found["per_class"][names[0]] == (1, 1)
    with_votes(monkeypatch, torch.ones(4, 20, dtype=torch.bool))
    written = run(scores, "--hypotheses") and json.loads(Path("runs/voc/scores/hypotheses.json").read_text())
    assert written["recall"] == 1
    assert written["precision"] == pytest.approx(truth.float().mean().item(), abs=1e-4)
    assert written["system"] == "reclip++" and f"{names[0]:22}" in capsys.readouterr().out


def test_hypotheses_are_those_of_the_system_that_was_trained(voc, monkeypatch):
    """Of ReCLIP's rule, if ReCLIP was trained; a student of another rectification is told what that was
    taught."""
    asked = []
    monkeypatch.setattr(rectify, "votes_of", lambda setup, query, recipe, system: asked.append(system.name)
                        or systems.equal_votes(torch.ones(4, 20, dtype=torch.bool)))
    setup, query, *_ = measured()
    for name, expected in (("whole-image", "whole-image"), ("own-head", "reclip++"),
                           ("reclip++", "reclip++")):
        scores.hypothesis_scores(setup, query, systems.SYSTEMS[name])
        assert asked[-1] == expected


def test_class_of_a_few_pixels_is_not_in_an_image(voc, monkeypatch):
    """Less than a thousandth of the labelled pixels."""
    with_threshold("voc", 0.0)
    setup, query, _, _, system = measured()
    for image in setup.training_images:
        values = np.full((40, 56), 8)
        values[0, :2], values[1, :3] = 15, 20           # two pixels of 2,240 and three
        write_label(Path("data/VOCdevkit/VOC2012/SegmentationClass", f"{image}.png"), values)
    with_votes(monkeypatch, torch.ones(4, 20, dtype=torch.bool))
    found = scores.hypothesis_scores(setup, query, system)
    there = [name for name, (precision, _) in found["per_class"].items() if precision]
    assert there == [VOC_CLASSES[k] for k in (7, 19)]


def test_probe_leaves_clip_as_it_is(voc):
    """No gradient reaches it and no buffer moves, neither in CLIP nor in the student."""
    setup, query, labels, stages, system = measured()
    before = clip.fingerprint(setup.clip_model)
    scores.linear_probes(setup, query, stages, labels, scores.ProbeRecipe(images=2, patches=10), 0, system)
    assert clip.fingerprint(setup.clip_model) == before == setup.fingerprint
    assert all(parameter.grad is None for parameter in setup.clip_model.parameters())


def test_embeddings_are_what_stands_before_each_stage_s_classes(voc):
    """vanilla and MaskCLIP: CLIP's unit vectors; rectified: M_o, one channel a class; distilled: Ẑ, behind
    which the inherited head gives exactly the stage's own logits. What evaluate.py predicts with stays as it
    was."""
    setup, query, _, stages, system = measured()
    predictors = evaluate.predictors(setup, query, stages)
    found = scores.embeddings(setup, query, stages, system)
    image = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded, logits = (evaluate.logits_of_all(setup, of, image) for of in (found, predictors))
        for stage in ("vanilla", "maskclip"):
            assert torch.allclose(torch.einsum("bdhw,cd->bchw", embedded[stage], query), logits[stage])
        assert not torch.allclose(embedded["vanilla"], embedded["maskclip"])
        assert torch.equal(embedded["rectify"], logits["rectify"]) and embedded["rectify"].shape[1] == 20
        student = distill.load_student(setup, query, system)[1]
        assert torch.equal(student.head(embedded["distill"]), logits["distill"])


def test_probe_learns_from_patches_with_a_class_alone(voc):
    """Background (0) and border (255) of VOC are ignored; each remaining patch has the class of its middle
    pixel."""
    setup, query, _, _, system = measured()
    found = scores.embeddings(setup, query, ["maskclip"], system)
    many, few = scores.ProbeRecipe(patches=1000), scores.ProbeRecipe(images=2, patches=3)
    features, classes = scores.labelled_patches(setup, found, many, seed=0)["maskclip"]
    expected = []
    for name in image_files.training_images("voc", "data"):
        with Image.open(Path("data", VOC_BASE, "SegmentationClass", f"{name}.png")) as picture:
            values = np.asarray(picture).astype(int)
        h, w = 32 // 8, round(56 * 32 / 40 / 8)                  # the grid of 40 × 56 pixels at short side 32
        middle = [values[int((i + 0.5) * 40 / h), int((j + 0.5) * 56 / w)] for i in range(h)
                  for j in range(w)]
        expected += [value - 1 for value in middle if value not in (0, 255)]
    assert sorted(classes.tolist()) == sorted(expected) and features.shape == (len(expected), query.shape[1])
    assert len(scores.labelled_patches(setup, found, few, seed=0)["maskclip"][1]) <= 6


def test_no_script_that_trains_knows_of_the_probe():
    """The only code that learns from labels is imported by nothing outside paper/."""
    outside = python_files(ROOT, leave_out=("paper",))
    assert len(outside) > 20
    for path in outside:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) +paper\b", text, flags=re.M), path


def test_newest_run_is_measured_as_the_system_that_made_it(voc, tiny_clip, capsys):
    """Of the furthest stage's system; a student that is of another rectification plays no part."""
    assert measured()[-1].name == "reclip++"
    run(paper_run, "no-bias", "--data", "voc", "--clip", tiny_clip, "--stage", "rectify")
    *_, stages, system = measured()
    assert stages == ["vanilla", "maskclip", "rectify"] and system.name == "no-bias"
    found = run(scores)
    assert found["rectify"]["fingerprint"]["system"] == "no-bias"
    assert "rectified, no-bias" in capsys.readouterr().out


def test_toyland_s_probe_draws_training_scenes_again_and_writes_none(place, monkeypatch):
    """The pictures are those on disk; their truth is on no disk, before and after; only validation labels are
    opened."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(toyland, "TRAIN_SCENES", 6)
    monkeypatch.setattr(toyland, "VAL_SCENES", 3)
    monkeypatch.setattr(toyland, "TEST_SCENES", 3)
    found, label_picture = [], ground_truth.label_picture
    monkeypatch.setattr(ground_truth, "label_picture",
                        lambda path: found.append(path.parent.name) or label_picture(path))
    result = run(scores, "--probe")
    assert list(result) == ["vanilla", "maskclip"] and 0 < result["maskclip"]["probe"]["patches"] <= 600
    assert set(found) == {"val"} and sorted(os.listdir("data/toyland/labels")) == ["test", "val"]
    written = [path for path in Path(".").rglob("*") if path.is_file() and "train" in path.parts]
    assert len(written) == 6 and {path.parent for path in written} == {Path("data/toyland/images/train")}
    class_of = ground_truth.lookup_table("toyland", 16)
    drawn = scores.DrawnScenes(["0004"], class_of, short_side=144, multiple=8)
    name, image, truth = drawn[0]
    on_disk = image_files.read_image(Path("data/toyland/images/train/0004.png"))
    assert name == "0004" and torch.equal(image, data.to_tensor(data.short_side_to(on_disk, 144, 8)))
    assert truth.shape == (96, 128) and np.array_equal(truth.numpy(), toyland.scene("train", 4)[1])


def test_hypotheses_and_probe_of_toyland_s_things_are_about_things(place, monkeypatch):
    """The truth that is drawn again has the numbers of the list of classes; no stuff counts."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(toyland, "TRAIN_SCENES", 6)
    monkeypatch.setattr(toyland, "VAL_SCENES", 2)
    monkeypatch.setattr(toyland, "TEST_SCENES", 3)
    result = run(scores, "--data", "toyland-things", "--probe", "--hypotheses")
    assert list(result["maskclip"]["probe"]["per_class_iou"]) == [*toyland.THINGS]
    found = json.loads(Path("runs/toyland-things/scores/hypotheses.json").read_text())
    assert list(found["per_class"]) == [*toyland.THINGS]
    there = np.zeros(10, dtype=bool)
    for number in range(6):
        things = toyland.scene("train", number)[1].astype(int) - 6
        counts = np.bincount(things[things >= 0], minlength=10)
        there |= counts > scores.LEAST * counts.sum()
    assert [recall is not None for _, recall in found["per_class"].values()] == there.tolist()


@pytest.mark.slow
def test_probe_beats_the_stage_s_own_words_in_toyland(place, monkeypatch):
    """Labels know more than captions: on new scenes the probe of MaskCLIP's features is well above
    MaskCLIP."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(toyland, "TRAIN_SCENES", 150)
    monkeypatch.setattr(toyland, "VAL_SCENES", 60)
    monkeypatch.setattr(toyland, "TEST_SCENES", 60)
    setup, query, labels, _, system = measured()
    recipe = scores.ProbeRecipe()
    probed = scores.linear_probes(setup, query, ["maskclip"], labels, recipe, 0, system)["maskclip"]
    found = evaluate.predictors(setup, query, ["maskclip"])
    assert probed["miou"] > evaluate.measure(setup, found, labels)["maskclip"]["miou"] + 10


@pytest.mark.parametrize("name", ["context", "ade", "cityscapes", "coco"])
def test_probe_finds_training_labels_of_every_public_dataset(place, tiny_clip, opened, name):
    """Whatever their pattern and their values; MaskCLIP alone, so nothing needs to be trained."""
    write_public_tree(name, place / "data")
    found = run(scores, "--data", name, "--clip", tiny_clip, "--probe")
    assert list(found) == ["vanilla", "maskclip"] and found["maskclip"]["probe"]["patches"] > 0
    assert len(set(opened)) >= 6                                         # four of training, two of validation


def test_what_cannot_be_scored_is_refused(place, tiny_clip, capsys):
    """No labels, a folder without a second part for the probe, another class list, --labels where there are
    labels."""
    write_photos(place / "photos", "a.jpg", "b.png")
    Path("names.txt").write_text("cat\nsofa\nwall\n")
    own = ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip]
    assert "expected labels of the images to measure" in refusal(capsys, scores, *own)
    for name in ("a", "b"):
        write_label(Path("truth", f"{name}.png"), np.random.default_rng(0).choice([0, 1, 2, 255], (40, 56)))
    assert list(run(scores, *own, "--labels", "truth")) == ["vanilla", "maskclip"]
    assert "--probe --data photos: expected a dataset with labels for training" \
        in refusal(capsys, scores, *own, "--labels", "truth", "--probe")
    write_voc_tree(place / "data")
    voc = ["--data", "voc", "--clip", tiny_clip]
    assert "labels of its own" in refusal(capsys, scores, *voc, "--labels", "truth")
    Path("two.txt").write_text("animal\nvehicle\n")
    assert "labels of voc" in refusal(capsys, scores, *voc, "--classes", "two.txt")
    for name in ("2007_000032", "2007_000039", "2007_000063", "2007_000068"):
        Path("data", VOC_BASE, "SegmentationClass", f"{name}.png").unlink()
    run(scores, *voc)
    assert "expected labels of its training images, found none. Unpack them, or leave --probe out" \
        in refusal(capsys, scores, *voc, "--probe")


def test_probe_of_labels_that_name_no_class_is_refused(place, tiny_clip, capsys):
    write_voc_tree(place / "data")
    for name in ("2007_000032", "2007_000039", "2007_000063", "2007_000068"):
        write_label(Path("data", VOC_BASE, "SegmentationClass", f"{name}.png"), np.full((40, 56), 255))
    said = refusal(capsys, scores, "--data", "voc", "--clip", tiny_clip, "--probe")
    assert "found ignored pixels (255) alone" in said
