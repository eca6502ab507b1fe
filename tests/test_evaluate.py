"""evaluate.py: the measures against slow loops and properties that any true measure has, and the pictures.

    python -m pytest tests/test_evaluate.py

    B images · C classes · H,W pixels
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from datasets import IGNORE, words


def slow_confusion(true_label, predicted, classes):
    """Pixel by pixel."""
    counts = [[0] * classes for _ in range(classes)]
    for true, said in zip(true_label.flatten().tolist(), predicted.flatten().tolist()):
        if true != IGNORE:
            counts[true][said] += 1
    return torch.tensor(counts)


def random_labels(classes, *shape, seed=0):
    """(true_label with some ignored pixels, predicted)."""
    generator = torch.Generator().manual_seed(seed)
    true_label = torch.randint(classes, shape, generator=generator)
    true_label[torch.rand(shape, generator=generator) < 0.2] = IGNORE
    return true_label, torch.randint(classes, shape, generator=generator)


# -------------------------------------------------------------------------------------- the confusion matrix

@pytest.mark.parametrize("classes", [2, 3, 20, 255])
def test_confusion_matrix_equals_a_loop_over_pixels(classes):
    """Rows are the truth, columns the prediction; 255 is not counted, not even as class 255 of 255."""
    true_label, predicted = random_labels(classes, 13, 17)
    found = evaluate.confusion_matrix(true_label, predicted, classes)
    assert found.dtype == torch.int64 and found.shape == (classes, classes)
    assert torch.equal(found, slow_confusion(true_label, predicted, classes))
    assert found.sum() == (true_label != IGNORE).sum() < true_label.numel()


def test_matrices_of_images_add_up_to_that_of_the_dataset():
    """A dataset is measured image by image, whatever the images' sizes."""
    pairs = [random_labels(5, 4 + seed, 9 - seed, seed=seed) for seed in range(4)]
    streamed = sum(evaluate.confusion_matrix(*pair, classes=5) for pair in pairs)
    true_label, predicted = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs))
    together = evaluate.confusion_matrix(true_label, predicted, classes=5)
    assert torch.equal(streamed, together)


def test_label_of_ignored_pixels_alone_counts_nothing():
    true_label, predicted = torch.full((3, 4), IGNORE), torch.zeros(3, 4, dtype=torch.long)
    assert not evaluate.confusion_matrix(true_label, predicted, classes=3).any()


# ------------------------------------------------------------------------------------------ IoU and its mean

# By hand: 4 classes. The last occurs neither in truth nor in prediction, the third in the prediction alone.
HAND = torch.tensor([[6, 2, 2, 0],
                     [1, 19, 0, 0],
                     [0, 0, 0, 0],
                     [0, 0, 0, 0]])


def test_class_iou_of_a_worked_example():
    """I / (P + G − I): 6 / (10 + 7 − 6), 19 / (20 + 21 − 19), 0 / 2, and 0 / 0, which is no number."""
    found = evaluate.class_iou(HAND)
    assert found[:3].tolist() == pytest.approx([6 / 11, 19 / 22, 0])
    assert found[3].isnan()


def test_measures_of_the_worked_example():
    """miou leaves the absent class out, miou_absent_zero counts it as 0; 25 of 30 pixels are right. In
    percent with two decimals."""
    found = evaluate.measures(HAND, ["a", "b", "c", "d"])
    total = 6 / 11 + 19 / 22
    assert found == {"miou": round(100 * total / 3, 2), "miou_absent_zero": round(100 * total / 4, 2),
                     "pixel_accuracy": 83.33, "per_class_iou": {"a": 54.55, "b": 86.36, "c": 0.0, "d": None}}
    assert found["miou"] == 46.97 and found["miou_absent_zero"] == 35.23


def test_measures_of_nothing_are_an_error():
    """No pixel was counted: 0 / 0 is no result to write into a file."""
    with pytest.raises(ValueError, match="expected labels that name a class.*found ignored pixels"):
        evaluate.measures(torch.zeros(3, 3, dtype=torch.int64), ["a", "b", "c"])


def square(classes: int):
    row = st.lists(st.integers(0, 50), min_size=classes, max_size=classes)
    return st.lists(row, min_size=classes, max_size=classes)


confusions = st.integers(1, 6).flatmap(square).map(torch.tensor)
counted = confusions.filter(lambda confusion: bool(confusion.any()))


def names_of(confusion):
    return [f"class {i}" for i in range(len(confusion))]


@given(counted)
@settings(max_examples=60, deadline=None)
def test_measures_lie_between_0_and_100(confusion):
    """And the mean over all classes is never above the mean over those that occur."""
    found = evaluate.measures(confusion, names_of(confusion))
    assert 0 <= found["miou_absent_zero"] <= found["miou"] <= 100 and 0 <= found["pixel_accuracy"] <= 100
    assert all(value is None or 0 <= value <= 100 for value in found["per_class_iou"].values())
    occurs = (confusion.sum(dim=0) + confusion.sum(dim=1) > 0).tolist()
    assert [value is not None for value in found["per_class_iou"].values()] == occurs


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
@settings(max_examples=40, deadline=None)
def test_perfect_prediction_is_100(areas):
    """Whatever the areas; classes that do not occur lower miou_absent_zero alone."""
    found = evaluate.measures(torch.tensor(areas).diag(), names_of(areas))
    assert found["miou"] == found["pixel_accuracy"] == 100
    assert found["miou_absent_zero"] == round(100 * sum(area > 0 for area in areas) / len(areas), 2)


@given(counted, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_measures_do_not_depend_on_the_order_of_classes(confusion, random):
    """Renaming classes renames the rows of the table and changes no mean."""
    order = list(range(len(confusion)))
    random.shuffle(order)
    names = names_of(confusion)
    found = evaluate.measures(confusion, names)
    shuffled = evaluate.measures(confusion[order][:, order], [names[i] for i in order])
    assert shuffled["per_class_iou"] == found["per_class_iou"]
    for name in ("miou", "miou_absent_zero", "pixel_accuracy"):
        assert shuffled[name] == pytest.approx(found[name], abs=0.011)


@given(counted)
@settings(max_examples=40, deadline=None)
def test_iou_takes_truth_and_prediction_alike(confusion):
    """Intersection and union are symmetric, and twice as many pixels of everything change nothing."""
    expected = evaluate.class_iou(confusion)
    assert torch.equal(evaluate.class_iou(confusion.T).nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.allclose(evaluate.class_iou(2 * confusion), expected, equal_nan=True)


# ------------------------------------------------------------------------------------------ logits → classes

def random_logits(classes=4, h=5, w=7, seed=0):
    return torch.randn(1, classes, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(5, 7), (40, 56), (33, 20), (3, 2), (1, 1)])
def test_prediction_has_the_labels_size(size):
    """The logits are resized, bilinear, before the classes are chosen: not the classes after."""
    logits = random_logits()
    found = evaluate.predict(logits, size)
    assert found.shape == size and found.dtype == torch.uint8
    up = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(found.long(), up.argmax(dim=0))


@pytest.mark.parametrize("at_once", [1, 3, 10, 32])
def test_best_class_is_the_same_for_any_number_of_classes_at_once(monkeypatch, at_once):
    """Bit for bit the argmax of all maps up-sampled together, ties included. The probability is softmax's."""
    logits = torch.randn(1, 10, 5, 7, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    logits[:, 7] = logits[:, 2]                                         # equal everywhere: the first one wins
    up = F.interpolate(logits, size=(40, 61), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(evaluate, "BUDGET", at_once * 40 * 61)
    best, probability = evaluate.best_class(logits, (40, 61), scale=3.0)
    assert best.dtype == torch.uint8 and (best == 2).any() and not (best == 7).any()
    assert torch.equal(best.long(), up.argmax(dim=0))
    assert torch.allclose(probability, (3.0 * up).softmax(dim=0).amax(dim=0), atol=1e-6)
    alone, none = evaluate.best_class(logits, (40, 61))
    assert torch.equal(alone, best) and none is None


def test_a_large_picture_is_never_held_for_all_classes(monkeypatch):
    """No more numbers than the budget are up-sampled at a time, or one class, whatever the classes."""
    sizes, interpolate = [], F.interpolate

    def noted(maps, **kwargs):
        sizes.append(maps.shape[1])
        return interpolate(maps, **kwargs)

    monkeypatch.setattr(evaluate, "BUDGET", 3 * 100 * 100)
    monkeypatch.setattr(evaluate.F, "interpolate", noted)
    for size, expected in (((100, 100), [3, 3, 3, 1]), ((100, 160), [1] * 10), ((400, 400), [1] * 10)):
        sizes.clear()
        evaluate.best_class(random_logits(10), size, scale=1.0)
        assert sizes == expected


def test_up_sampled_boundary_lies_between_the_patches():
    """Two patches, two classes: the boundary is in the middle of the picture, where the logits cross."""
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert evaluate.predict(logits, (2, 8)).tolist() == [[0] * 4 + [1] * 4] * 2
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]]]])                   # the surer patch reaches farther
    assert evaluate.predict(logits, (1, 8)).sum() > 4


def weak_class_logits():
    """Three classes: 0 wins on the left, 1 on the right, 2 nearly everywhere but with little confidence."""
    logits = torch.zeros(1, 3, 2, 6)
    logits[0, 0, :, 0], logits[0, 1, :, 5] = 5.0, 5.0
    logits[0, 2] = 0.2
    return logits


@pytest.mark.parametrize("classes", [1, 15, 16, 17, 50])
def test_prediction_in_chunks_of_classes_has_the_same_bits_as_all_at_once(monkeypatch, classes):
    monkeypatch.setattr(evaluate, "BUDGET", 16 * 43 * 61)
    logits = torch.randn(1, classes, 5, 7, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 1                                       # often the highest, and
    logits[:, -1] = logits[:, 0]                    # equal to the last, of another chunk: the first counts
    at_once = F.interpolate(logits, size=(43, 61), mode="bilinear", align_corners=False)
    highest = at_once.max(dim=1, keepdim=True).values
    found = evaluate.predict(logits, (43, 61))
    assert torch.equal(found.long(), (at_once == highest).int().argmax(dim=1)[0])


def test_prompt_denoising_leaves_out_a_class_that_is_nowhere_probable():
    """Class 2 wins in the middle with a probability of 0.38 at best: under 0.5 it is not in the image."""
    logits = weak_class_logits()
    assert set(evaluate.predict(logits, (2, 6)).flatten().tolist()) == {0, 1, 2}
    found = evaluate.predict(logits, (2, 6), denoising=0.5)
    assert set(found.flatten().tolist()) == {0, 1} and found[0, 0] == 0 and found[0, 5] == 1
    assert set(evaluate.predict(logits, (2, 6), denoising=0.3).flatten().tolist()) == {0, 1, 2}
    assert torch.equal(evaluate.predict(logits, (4, 12), denoising=0.0), evaluate.predict(logits, (4, 12)))


def test_prompt_denoising_asks_for_probabilities_at_the_given_scale():
    """Logits × 10 make class 2 probable (0.79) where it wins: then it stays."""
    assert 2 in evaluate.predict(weak_class_logits(), (2, 6), denoising=0.5, scale=10.0)
    assert 2 not in evaluate.predict(weak_class_logits(), (2, 6), denoising=0.9, scale=10.0)


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.sampled_from([1.0, 10.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_prompt_denoising_removes_some_classes_never_all(seed, denoising, scale):
    """Against a loop over classes: out is what stays under the threshold everywhere, but never the best."""
    logits = random_logits(seed=seed)
    probability = (scale * logits).softmax(dim=1)[0]
    best = [probability[k].max().item() for k in range(4)]
    threshold = torch.tensor(denoising, dtype=torch.float32).item()
    kept = [k for k in range(4) if best[k] >= threshold or best[k] == max(best)]
    found = evaluate.predict(logits, (5, 7), denoising, scale)
    assert kept and set(found.flatten().tolist()) <= set(kept)
    assert torch.equal(found.long(), torch.tensor(kept)[logits[0, kept].argmax(dim=0)])


def test_prompt_denoising_gives_finite_results_after_up_sampling():
    """Infinities of a class that is left out must not leak into its neighbours through the interpolation."""
    found = evaluate.predict(weak_class_logits(), (16, 48), denoising=0.5)
    assert set(found.flatten().tolist()) == {0, 1}
    assert (found[:, :4] == 0).all() and (found[:, -4:] == 1).all()


# ------------------------------------------------------------------------------------------ pictures

WORDS = words.vocabulary_of("photos", (("cat",), ("чёрная собака",), ("wall",)))


def test_classes_are_coloured_by_the_palette_and_ignored_pixels_are_black():
    classes = torch.tensor([[0, 1, 2], [IGNORE, 2, 0]])
    found = np.asarray(evaluate.colour(classes, WORDS.palette))
    expected = [[(0, 0, 0) if value == IGNORE else WORDS.palette[value] for value in row]
                for row in classes.tolist()]
    assert [[tuple(pixel) for pixel in row] for row in found.tolist()] == expected


def tiles(*sizes):
    return [[Image.new("RGB", size, (10 * i, 200, 50)) for _ in range(3)] for i, size in enumerate(sizes)]


def test_picture_sheet_holds_every_tile_at_one_height():
    """Wide and tall pictures, enlarged or reduced to the same height, each in its column under its title,
    none cut off."""
    pictures = tiles((30, 20), (90, 30), (10, 400))
    page = np.asarray(evaluate.sheet(pictures, ["image", "CLIP", "truth"], WORDS, height=60))
    for i in range(3):
        rows, columns = np.nonzero((page == (10 * i, 200, 50)).all(axis=-1))
        width = max(1, round(60 * (30 / 20, 90 / 30, 10 / 400)[i]))
        assert rows.max() - rows.min() + 1 == 60 and len(rows) == 3 * 60 * width
    assert (page[-1] == 255).all() and (page[:, -1] == 255).all()


@pytest.mark.parametrize("classes", [2, 20, 255])
def test_legend_shows_every_colour_inside_the_page(classes):
    """However many words: each has its box, and the page is long enough for all lines."""
    many = words.vocabulary_of("photos", tuple((f"rather long word number {i}",) for i in range(classes)))
    page = np.asarray(evaluate.sheet(tiles((40, 30)), ["image", "CLIP", "truth"], many, height=30))
    seen = {tuple(colour) for colour in page.reshape(-1, 3).tolist()}
    assert seen >= set(many.palette)
    assert (page[-2:] == 255).all()


def test_single_class_column_of_a_one_pixel_wide_picture():
    """A strip one pixel wide would round to a width of 0, which cannot be drawn."""
    page = evaluate.sheet([[Image.new("RGB", (1, 1000), (10, 200, 50))]], ["image"], WORDS, height=100)
    assert page.height > 100


# ------------------------------------------------------------------------------------------ the table

def metrics_of(**stages):
    return {stage: evaluate.measures(confusion, WORDS.names) | {"fingerprint": {
        "system": "reclip++", "data": "photos", "split": "all", "images": 3, "of": 3, "classes": WORDS.names,
        "short_side": 336, "precision": "fp32", "refinements": {"prompt_denoising": 0.0}}}
        for stage, confusion in stages.items()}


def test_table_shows_every_stage_and_every_class(capsys):
    """A class that occurs nowhere has a dash, not a 0; the settings stand above the numbers."""
    confusion = torch.tensor([[6, 2, 0], [1, 9, 0], [0, 0, 0]])
    metrics = metrics_of(vanilla=confusion, distill=torch.eye(3).long())
    evaluate.print_table(metrics, per_class=True)
    said = capsys.readouterr().out
    for part in ("photos: 3 images, 3 classes, short side 336, prompt denoising off, fp32", "vanilla CLIP",
                 "ReCLIP++ distilled"):
        assert part in said
    row = next(line for line in said.splitlines() if line.startswith("wall"))
    assert row.split() == ["wall", "–", "100.0"]
    for found in metrics.values():                      # two images of the dataset have no label
        found["fingerprint"]["of"] = 5
    evaluate.print_table(metrics)
    assert "photos: 3 of 5 images, 3 classes" in capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("vanilla CLIP"))
    assert math.isclose(float(row.split()[2]), 100 * (6 / 9 + 9 / 12) / 2, abs_tol=0.06)
