"""Every public dataset, from its tree on disk to measured stages, at the real size of pictures and features.

    python -m pytest tests/test_layouts.py                                # two and a half minutes on one core
    # over photographs with real masks: look at them
    SAMPLES=DIR python -m pytest tests/test_layouts.py -k samples -s

datasets/check.py, rectify.py, distill.py and evaluate.py one after another, with the dataset's own recipe for
one epoch. All weights are random, in the files that people have: shown is that trees, recipes, classes and
labels fit together, not what is learned. DIR is what --root would be: the trees that it holds are walked, two
photographs of each, with all of ViT-B/16 and ResNet-50.
"""

import math
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import distill
import evaluate
import helpers
import rectify
from datasets import DATASETS, check, images as image_files, labels as ground_truth, words
from harness import runs
from helpers import run, write_label, write_openai_archive, write_public_tree, write_voc_tree
from test_datasets import ALPHABETICAL, CITYSCAPES, CLASSES, VOC_FIRST

pytestmark = pytest.mark.slow

# context-voc-first is the tree of context, read otherwise
LAYOUTS = ["voc", "context", "ade", "cityscapes", "coco"]
SHORT_SIDE = {"voc": 336, "context": 448, "ade": 512, "cityscapes": 448, "coco": 512}
CROP = SHORT_SIDE | {"context": 480, "cityscapes": 512}
STUDENT = {"context": (520, 480)}                             # short side and crop; of all others 512 and 512


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with ViT-B/16 in OpenAI's format, the same with two blocks a tower, and a ResNet-50 where
    torch looks."""
    folder = tmp_path_factory.mktemp("weights")
    write_openai_archive(folder / "ViT-B-16.pt")
    write_openai_archive(folder / "two blocks.pt", layers=2, text_layers=2)
    name = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (folder / "hub/checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), folder / "hub/checkpoints" / name)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, weights):
    """An empty folder to work in. The recipes are the real ones but for what a CPU need not do: 121 windows
    an image here are nine, 85 sentences a class are two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(weights))
    monkeypatch.setattr(words, "QUERY_TEMPLATES", words.QUERY_TEMPLATES[:2])
    for name in CLASSES:
        monkeypatch.setitem(rectify.RECIPES, name, replace(rectify.RECIPES[name], window_ratio=1 / 2))
    return tmp_path


def given_out_with(monkeypatch, name: str, images: int) -> None:
    """check.py is told that the dataset has so many images in each split."""
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], counts={"train": images, "val": images}))


def checked(name: str) -> list[str]:
    """What check.py finds to mend in ./data: nothing is its exit code 0."""
    return check.main(check.flags().parse_args(["--data", name, "--workers", "1"]))


def walk(name: str, clip_file: Path, images: int, *student: str) -> dict:
    """The four commands as they are typed, each checked for what it leaves behind. Returns what evaluate.py
    measured."""
    assert checked(name) == []
    run(rectify, "--data", name, "--clip", clip_file, "--epochs", 1)
    run(distill, "--epochs", 1, *student)
    metrics = run(evaluate)

    classes = CLASSES[name]
    teacher = runs.load(Path("runs", name, "rectify/checkpoint.pt"), "rectify")
    assert teacher["weights"]["decoder.conv.weight"].shape == (classes, 512 + classes, 5, 5)
    assert len(teacher["settings"]["synonyms"]) == classes
    assert teacher["settings"]["recipe"]["crop"] == [CROP[name]] * 2
    student = runs.load(Path("runs", name, "distill/checkpoint.pt"), "distill")
    assert student["weights"]["head.query"].shape == (classes, 512)
    assert student["weights"]["head.rectifier.projection.weight"].shape == (512, 768, 1, 1)
    short_side, crop = STUDENT.get(name, (512, 512))
    assert student["settings"]["recipe"]["crop"] == [crop] * 2

    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    for found in metrics.values():
        assert math.isfinite(found["miou"]) and 0 <= found["miou"] <= 100 \
            and found["fingerprint"]["images"] == images
        assert list(found["per_class_iou"]) == DATASETS[name].names
    assert [found["fingerprint"]["short_side"]
            for found in metrics.values()] == [SHORT_SIDE[name]] * 3 + [short_side]
    for stage in ("rectify", "distill", "evaluate"):
        assert is_picture_sheet(Path("runs", name, stage, "preview.png"))
    return metrics


def measured_again(name: str, was: str) -> dict:
    """check.py and evaluate.py alone, on labels in another encoding: no training reads one. The numbers of
    evaluate.py.

    `was`: the name that the labels were read under before; its run is taken over as it is.
    """
    if was != name:
        shutil.copytree(Path("runs", was), Path("runs", name))
    assert checked(name) == []
    return numbers(run(evaluate, "--data", name))


def is_picture_sheet(path: Path) -> bool:
    with Image.open(path) as page:
        page.load()
        return page.mode == "RGB" and page.width > 300 and page.height > 150


def true_labels(name: str) -> np.ndarray:
    """The classes of all validation pixels in ./data, one after another, as evaluation reads them."""
    images = image_files.image_files(name, "data", "val")
    read_label = ground_truth.LabelReader(name, CLASSES[name])
    labels = ground_truth.true_label_files(name, "data", "val", list(images))
    sizes = {image: image_files.read_image(path).size[::-1] for image, path in images.items()}
    return np.concatenate([read_label(labels[image], sizes[image]).ravel() for image in images])


def numbers(metrics: dict) -> dict:
    """Metrics without the fingerprint, which names the dataset."""
    return {stage: {key: value for key, value in found.items() if key != "fingerprint"} for stage,
            found in metrics.items()}


# -------------------------------------------------------------------------------- trees that are written here

def write_tree(name: str, monkeypatch) -> None:
    """One training and one validation image in ./data, in the dataset's layout."""
    given_out_with(monkeypatch, name, 1)
    if name == "voc":
        write_voc_tree(Path("data"), train=["2007_000032"], val=["2007_000033"], height=48, width=48)
        return
    train, val, values = helpers.TREES[name]
    monkeypatch.setitem(helpers.TREES, name, (train[:1], val[:1], values))
    write_public_tree(name, Path("data"))


def recode(source: Path, target: Path, value_of: dict[int, int]) -> None:
    """A label in another encoding, old value → new; all other pixels are ignored."""
    with Image.open(source) as label:
        values = np.array(label)
    table = np.full(256, 255)
    table[list(value_of)] = list(value_of.values())
    write_label(target, table[values])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_checked_trained_distilled_and_measured(place, monkeypatch, weights, name):
    """VOC with all of ViT-B/16 and a ResNet-50. The others with every size of ViT-B/16 but two of its twelve
    blocks, which are all alike, and Toyland's ResNet: a step of ResNet-50 takes twenty seconds of a core, and
    knows nothing of a layout.

    A split of one image is a batch of one whatever the recipe says, so that the recipes' 16 need no flag.
    """
    write_tree(name, monkeypatch)
    if name == "voc":
        walk(name, weights / "ViT-B-16.pt", 1)
    else:
        metrics = walk(name, weights / "two blocks.pt", 1, "--backbone", "small")
    # Of all tests that this process has run so far: a bound for the largest of them.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20 < 16

    if name == "cityscapes":
        before = true_labels(name)
        [label] = Path("data/cityscapes/gtFine/val").rglob("*_labelIds.png")
        recode(label, Path(str(label).replace("labelIds", "labelTrainIds")),
               {id_: k for k, id_ in enumerate(CITYSCAPES)})
        label.unlink()
        assert np.array_equal(true_labels(name),
                              before) and measured_again(name, was=name) == numbers(metrics)
    if name == "context":
        before = true_labels(name)
        label = Path("data/VOCdevkit/VOC2010/SegmentationClassContext", f"{helpers.TREES[name][1][0]}.png")
        recode(label, label, {1 + k: 1 + VOC_FIRST.index(word) for k, word in enumerate(ALPHABETICAL)})
        given_out_with(monkeypatch, "context-voc-first", 1)
        assert np.array_equal(true_labels("context-voc-first"),
                              before) and not np.array_equal(true_labels(name), before)
        assert measured_again("context-voc-first", was=name) == numbers(metrics)


# -------------------------------------------------------------------------------- photographs with real masks

def copy_samples(name: str, monkeypatch, most: int = 2) -> list[str]:
    """The tree of a dataset in ./data from validation photographs under $SAMPLES; their ids. Skips where
    there are none.

    They are the training images too, under other names: samples often come without a training split.
    """
    root = os.environ.get("SAMPLES")
    if not root:
        pytest.skip("SAMPLES=DIR names no folder with photographs and masks in the datasets' layouts")
    try:
        found = image_files.image_files(name, root, "val")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    ids, dataset, base = list(found)[:most], DATASETS[name], Path("data", DATASETS[name].places[0])
    for split, prefix in (("train", "copy_"), ("val", "")):
        for image in ids:
            copy(found[image], base / dataset.images.format(split=dataset.splits[split], id=prefix + image))
        if dataset.lists:
            path = base / dataset.lists.format(split=dataset.splits[split])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{prefix}{image}\n" for image in ids))
    copy_labels(name, ids, list(dataset.labels)[-1])
    if name == "ade" and (official := image_files.find(name, root) / "objectInfo150.txt").exists():
        copy(official, base / official.name)
    given_out_with(monkeypatch, name, len(ids))
    return ids


def copy_labels(name: str, ids: list[str], encoding: str, folder: str = "") -> None:
    """Labels of one encoding from $SAMPLES, where their folder may have a suffix, into ./data. Skips if one
    is missing."""
    dataset, base = DATASETS[name], image_files.find(name, os.environ["SAMPLES"])
    for image in ids:
        path = Path(dataset.labels[encoding].format(split=dataset.splits["val"], id=image))
        source = base / f"{path.parent}{folder}" / path.name
        if not source.exists():
            pytest.skip(f"{source} is not there")
        copy(source, Path("data", dataset.places[0], path))


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_of_every_layout_go_the_same_way(place, monkeypatch, weights, name):
    """At real size. Predictions of random weights are noise; in the pictures that are written (pytest names
    the folder of the last runs; --basetemp chooses it) the truth must fit photograph and legend.

    The labels' other encoding, where it is there too, must name the same classes: real masks, read by both
    tables. Not to the last pixel: samples are often made smaller, each file by itself, and then differ along
    borders.
    """
    ids = copy_samples(name, monkeypatch)
    walk(name, weights / "ViT-B-16.pt", len(ids))
    before = true_labels(name)
    if name == "cityscapes":
        copy_labels(name, ids, "labelTrainIds")
        assert (true_labels(name) == before).mean() > 0.99
        measured_again(name, was=name)
    if name == "context":
        copy_labels("context-voc-first", ids, "voc-first", folder="_vocfirst")
        given_out_with(monkeypatch, "context-voc-first", len(ids))
        assert (true_labels("context-voc-first") == before).mean() > 0.99
        measured_again("context-voc-first", was=name)
    for path in sorted(Path("runs").glob("*/evaluate/preview.png")):
        print(f"\nLook at {path.resolve()}")
