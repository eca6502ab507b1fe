"""The public datasets and datasets/check.py: names, label values, trees on disk, and what is said when
something is wrong.

    python -m pytest tests/test_datasets.py         # `-m slow` adds whole runs of the scripts in every layout

No real dataset is needed: small trees are written here in the layouts of the archives. What the values in
label files mean stands here a second time, in words, so that a slip in a description (datasets/*.json) cannot
confirm itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distill
import evaluate
import rectify
from conftest import ROOT
from datasets import DATASETS, check, described, is_folder, split_to_measure, words
from datasets import images as image_files
from datasets import labels as ground_truth
from harness import runs
from helpers import (SMALLEST, TREES, photo, python_files, quick_recipes, refusal, run, write_label,
                     write_openai_archive, write_photos, write_public_tree, write_voc_tree)

LAYOUTS = list(TREES)
CLASSES = {"voc": 20, "context": 59, "context-voc-first": 59, "ade": 150, "cityscapes": 19, "coco": 27}

# ------------------------------------------------------------------------------------------ facts, in words

CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
              19: "traffic light",
              20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider",
              26: "car",
              27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}

ALPHABETICAL = """airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus,
cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse,
person, plate, platform, potted plant, road, rock, sheep, shelves, sidewalk, sign, sky,
snow, sofa, table, track, train, tree, truck, tv monitor, wall, water, window,
wood""".replace("\n", " ").split(", ")

VOC_FIRST = """airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse,
motorbike, person, potted plant, sheep, sofa, train, tv monitor, bag, bed, bench, book,
building, cabinet, ceiling, cloth, computer, cup, door, fence, floor, flower, food,
grass, ground, keyboard, light, mountain, mouse, curtain, platform, sign, plate, road,
rock, shelves, sidewalk, sky, snow, bedclothes, track, tree, truck, wall, water, window,
wood""".replace("\n", " ").split(", ")

# COCO-Stuff's 182 names, 1..182, and the group of each: things run in blocks, stuffs are told by name.
COCO_THINGS = {"person": (1, 1), "vehicle": (2, 9), "outdoor": (10, 15), "animal": (16, 25),
               "accessory": (26, 33),
               "sports": (34, 43), "kitchen": (44, 51), "food things": (52, 61), "furniture things": (62, 71),
               "electronic": (72, 77), "appliance": (78, 83), "indoor": (84, 91)}
COCO_STUFF_NAMES = """banner blanket branch bridge building-other bush cabinet cage cardboard carpet
ceiling-other ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt
door-stuff fence floor-marble floor-other floor-stone floor-tile floor-wood flower fog
food-other fruit furniture-other grass gravel ground-other hill house leaves light mat
metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other
plastic platform playingfield railing railroad river road rock roof rug salad sand sea
shelf sky-other skyscraper snow solid-other stairs stone straw structural-other table
tent textile-other towel tree vegetable wall-brick wall-concrete wall-other wall-panel
wall-stone wall-tile wall-wood water-other waterdrops window-blind window-other wood""".split()
COCO_STUFF = {
    "textile": "banner blanket cloth clothes curtain mat napkin pillow rug textile-other towel",
    "plant": "branch bush flower grass leaves moss plant-other straw tree",
    "building": "bridge building-other house roof skyscraper tent",
    "furniture stuff":
        "cabinet counter cupboard desk-stuff door-stuff furniture-other light mirror-stuff shelf stairs "
        "table",
    "structural": "cage fence net railing structural-other",
    "raw material": "cardboard metal paper plastic",
    "floor": "carpet floor-marble floor-other floor-stone floor-tile floor-wood",
    "ceiling": "ceiling-other ceiling-tile",
    "sky": "clouds sky-other",
    "ground": "dirt gravel ground-other mud pavement platform playingfield railroad road sand snow",
    "water": "fog river sea water-other waterdrops",
    "food stuff": "food-other fruit salad vegetable",
    "solid": "hill mountain rock solid-other stone wood",
    "wall": "wall-brick wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood",
    "window": "window-blind window-other"}
COCO = {value: group for group, (first, last) in COCO_THINGS.items() for value in range(first - 1, last)} \
    | {91 + COCO_STUFF_NAMES.index(name): group for group, names in COCO_STUFF.items()
       for name in names.split()}

# Thing ids of COCO that were dropped before its release: street sign, hat, shoe, eye glasses, plate, mirror,
# window, desk, door, blender, hair brush.
COCO_NEVER = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def read_as(name: str, table: np.ndarray) -> dict[int, str]:
    """A look-up table in words: value → name of its class, of the values that are one."""
    names = DATASETS[name].names
    return {value: names[table[value]] for value in range(256) if table[value] not in (-1, 255)}


def ignored(table: np.ndarray) -> list[int]:
    return np.flatnonzero(table == 255).tolist()


# ------------------------------------------------------------------------------------------ names and values

@pytest.mark.parametrize("name", CLASSES)
def test_each_dataset_has_its_classes_all_different_and_a_colour_for_each(name):
    found = words.vocabulary(name)
    assert len(found) == len(set(found.names)) == len(found.palette) == CLASSES[name]
    assert all(one == " ".join(one.split()) and one for one in found.names)
    assert all(len(colour) == 3 and all(0 <= channel <= 255 for channel in colour)
               for colour in found.palette)
    assert len(set(found.palette)) >= CLASSES[name] - 1   # ADE20K and Context officially use one colour twice
    assert found.templates == tuple(words.QUERY_TEMPLATES)


def test_every_known_name_is_a_dataset_and_no_folder():
    """The scripts, the flags and the recipes know the same names; ./ade is a folder of that name."""
    assert set(DATASETS) >= {"toyland", "toyland-things", *CLASSES}
    assert not any(is_folder(name) for name in DATASETS) and is_folder("./ade") and is_folder("photos")
    for stage in (rectify, distill):
        assert set(stage.RECIPES) == {*DATASETS, "folder"}
    for script in (rectify, check):
        [said] = [action.help for action in script.flags()._actions if "--data" in action.option_strings]
        assert all(name in said for name in ("toyland", "toyland-things", *CLASSES))


def test_cityscapes_label_ids_value_by_value():
    """labelIds 0..33: nineteen are classes, the others ignored, as is 255; nothing else may occur."""
    table = ground_truth.lookup_table("cityscapes", 19)["_gtFine_labelIds.png"]
    assert read_as("cityscapes", table) == CITYSCAPES
    assert ignored(table) == [value for value in range(34) if value not in CITYSCAPES] + [255]
    assert (table[34:255] == -1).all()


def test_cityscapes_train_ids_value_by_value():
    """labelTrainIds: a value is its class, in the order of the ids; 255 is ignored."""
    tables = ground_truth.lookup_table("cityscapes", 19)
    assert list(tables) == ["_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"]
    table = tables["_gtFine_labelTrainIds.png"]
    assert read_as("cityscapes", table) == dict(enumerate(CITYSCAPES.values()))
    assert ignored(table) == [255] and (table[19:255] == -1).all()


@pytest.mark.parametrize("name, order", [("context", ALPHABETICAL), ("context-voc-first", VOC_FIRST)])
def test_context_is_read_in_the_order_of_its_name_value_by_value(name, order):
    """1..59 in either order are the same 59 classes; 0 (other) and 255 are ignored."""
    table = ground_truth.lookup_table(name, 59)
    assert len(order) == len(set(order)) == 59
    assert read_as(name, table) == dict(enumerate(order, start=1))
    assert ignored(table) == [0, 255] and (table[60:255] == -1).all()


def test_the_two_orders_of_context_train_the_same_classes():
    """Only the reading of labels differs: names, colours and recipes are shared, so what is trained serves
    both."""
    assert words.vocabulary("context") == words.vocabulary("context-voc-first")
    assert words.vocabulary("context").names == ALPHABETICAL == sorted(ALPHABETICAL)
    for stage in (rectify, distill):
        assert stage.RECIPES["context"] == stage.RECIPES["context-voc-first"]


def test_ade_value_by_value():
    """1..150 are the classes, 0 (other) is ignored, and no official file holds 255. Known places are
    spot-checked."""
    table = ground_truth.lookup_table("ade", 150)
    for value in range(256):
        assert table[value] == (255 if value == 0 else value - 1 if value <= 150 else -1), value
    said = read_as("ade", table)
    places = {1: "wall", 2: "building", 3: "sky", 8: "bed", 13: "person", 21: "car", 45: "chest of drawers",
              49: "skyscraper", 90: "television receiver", 106: "conveyer belt", 128: "bicycle", 150: "flag"}
    assert {value: said[value] for value in places} == places


def test_coco_stuff_value_by_value():
    """Each value belongs to the group that COCO-Stuff's hierarchy gives it; 255 is unlabelled.

    Eleven of the 182 ids stand for things that no image shows: where their values occur, the numbering is
    another.
    """
    assert len(COCO_STUFF_NAMES) == len(set(COCO_STUFF_NAMES)) == 91 and sorted(COCO) == list(range(182))
    table = ground_truth.lookup_table("coco", 27)
    assert read_as("coco",
                   table) == {value: group for value, group in COCO.items() if value + 1 not in COCO_NEVER}
    assert ignored(table) == [255] and (table[182:255] == -1).all()


@pytest.mark.parametrize("name, value, known", [
    ("ade", 151, r"0\.\.150"), ("ade", 255, r"0\.\.150"), ("context", 60, r"0\.\.59 and 255"),
    ("context-voc-first", 60, r"0\.\.59 and 255"), ("coco", 182, r"0\.\.10, .*, 91\.\.181 and 255"),
    ("coco", 11, r"0\.\.10, 12\.\.24, .* and 255")])
def test_value_outside_the_table_is_named_with_its_file(tmp_path, name, value, known):
    write_label(tmp_path / "a.png", np.array([[1, value]]))
    with pytest.raises(ValueError, match=rf"a\.png: expected the values {known}; found \[{value}\]"):
        ground_truth.LabelReader(name, CLASSES[name])(tmp_path / "a.png", size=(1, 2))


@pytest.mark.parametrize("encoding, value, known",
                         [("labelIds", 34, r"0\.\.33"), ("labelTrainIds", 19, r"0\.\.18")])
def test_value_outside_cityscapes_tables_is_named_with_its_file(tmp_path, encoding, value, known):
    path = tmp_path / f"a_gtFine_{encoding}.png"
    write_label(path, np.array([[7, value]]))
    with pytest.raises(ValueError,
                       match=rf"{encoding}\.png: expected the values {known} and 255; found \[{value}\]"):
        ground_truth.LabelReader("cityscapes", 19)(path, size=(1, 2))


def test_labels_of_another_number_of_classes_are_not_read():
    for name, classes in CLASSES.items():
        with pytest.raises(ValueError,
                           match=f"labels of {name} .* {classes} classes: expected as many.*found 3"):
            ground_truth.refuse_other_classes(name, ["cat", "dog", "cow"])


# ------------------------------------------------------------------------------------------ trees

@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("inside", [False, True], ids=["above", "the tree itself"])
def test_images_and_labels_are_found_where_the_archive_puts_them(tmp_path, name, inside):
    """Ids are sorted and those of the archive, in both splits; --root may be the tree or the folder that
    holds it."""
    base = write_public_tree(name, tmp_path)
    root = str(base if inside else tmp_path)
    train, val, _ = TREES[name]
    assert list(image_files.training_images(name, root)) == sorted(train)
    assert list(image_files.image_files(name, root, "val")) == sorted(val)
    labels = ground_truth.true_label_files(name, root, "val", sorted(val))
    assert list(labels) == sorted(val) and all(path.is_file() for path in labels.values())
    for image, path in image_files.image_files(name, root, "val").items():
        assert image.split("/")[-1] in path.name and image.split("/")[-1] in labels[image].name
        ground_truth.LabelReader(name, CLASSES[name])(labels[image], size=(40, 56))


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_images_are_found_without_any_label(tmp_path, name):
    base = write_public_tree(name, tmp_path)
    before = image_files.training_images(name, str(tmp_path))
    for folder in ("SegmentationClassContext", "annotations", "gtFine"):
        shutil.rmtree(base / folder, ignore_errors=True)
    assert image_files.training_images(name, str(tmp_path)) == before
    ids = list(image_files.image_files(name, str(tmp_path), "val"))
    assert ground_truth.true_label_files(name, str(tmp_path), "val", ids) == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_tree_says_what_to_get_from_where(tmp_path, name):
    """The tree, the archive and the project page; --download says the same, for it can fetch VOC alone."""
    dataset, ask_for = DATASETS[name], image_files.training_images
    for ask, said in ((ask_for, "expected"), (image_files.download, "--download: expected --data voc")):
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            ask(name, str(tmp_path))
        found = f"found no {dataset.images.split('/')[0]}"
        for part in (said, dataset.tree, dataset.archive, dataset.page, found, str(tmp_path)):
            assert part in str(error.value)
    write_public_tree(name, tmp_path)
    assert image_files.download(name, str(tmp_path)) is None               # what is there need not be fetched


@pytest.mark.parametrize("name", ["ade", "cityscapes", "coco"])
def test_missing_split_is_named(tmp_path, name):
    base = write_public_tree(name, tmp_path)
    folder = next(base.glob("*/train*"))
    shutil.rmtree(base / DATASETS[name].images.split("/")[0] / folder.name)
    assert image_files.image_files(name, str(tmp_path), "val")
    with pytest.raises(FileNotFoundError,
                       match=rf"--data {name}: expected images .*{folder.name}.*found none"):
        image_files.training_images(name, str(tmp_path))


def test_ids_are_unique_across_cities(tmp_path):
    """Two cities may hold files of one name: the city is part of the id."""
    base = write_public_tree("cityscapes", tmp_path)
    for city in ("aachen", "ulm"):
        photo().save(base / f"leftImg8bit/train/{city}/same_leftImg8bit.png")
    found = image_files.training_images("cityscapes", str(tmp_path))
    assert {"aachen/same", "ulm/same"} < set(found) and len(set(found.values())) == len(found) == 6


def test_hidden_files_and_other_pictures_are_no_images(tmp_path):
    """macOS packs a ._file beside each; conversions and previews lie about."""
    base = write_public_tree("ade", tmp_path)
    before = image_files.training_images("ade", str(tmp_path))
    (base / "images/training/._ADE_train_00000001.jpg").write_bytes(b"no picture")
    (base / "images/training/.DS_Store").write_bytes(b"")
    photo().save(base / "images/training/preview.png")
    assert image_files.training_images("ade", str(tmp_path)) == before


def test_cityscapes_prefers_train_ids_file_by_file_and_says_so(tmp_path, capsys):
    """Where both lie there labelTrainIds are read, else labelIds; either way the classes are the same."""
    base = write_public_tree("cityscapes", tmp_path)
    ids, read_label = TREES["cityscapes"][1], ground_truth.LabelReader("cityscapes", 19)
    before = ground_truth.true_label_files("cityscapes", str(tmp_path), "val", ids)
    assert "2 *_gtFine_labelIds.png" in capsys.readouterr().out
    expected = read_label(before[ids[0]], (40, 56))
    write_label(base / f"gtFine/val/{ids[0]}_gtFine_labelTrainIds.png", expected)
    found = ground_truth.true_label_files("cityscapes", str(tmp_path), "val", ids)
    assert [path.name.split("_")[-1] for path in found.values()] == ["labelTrainIds.png", "labelIds.png"]
    said = capsys.readouterr().out
    assert "1 *_gtFine_labelTrainIds.png" in said and "1 *_gtFine_labelIds.png" in said
    assert np.array_equal(read_label(found[ids[0]], (40, 56)), expected) and len(np.unique(expected)) > 3


def test_curated_list_of_coco_narrows_its_split_alone(tmp_path):
    """A list under curated/ is used where it lies; among those that come together it is the usual one; else
    an error."""
    base = write_public_tree("coco", tmp_path)
    folder = base / "curated/train2017"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("000000000030\n000000000009\n")
    assert list(image_files.training_images("coco", str(tmp_path))) == ["000000000009", "000000000030"]
    assert len(image_files.image_files("coco", str(tmp_path), "val")) == 2
    (folder / "Coco164kFew_Stuff_6.txt").write_text("000000000025\n")
    with pytest.raises(ValueError, match=r"expected one list .*found Coco164kFew_Stuff_6\.txt, mine\.txt"):
        image_files.training_images("coco", str(tmp_path))
    (folder / "Coco164kFull_Stuff_Coarse_7.txt").write_text("000000000034\n")
    assert list(image_files.training_images("coco", str(tmp_path))) == ["000000000034"]
    (folder / "Coco164kFull_Stuff_Coarse_7.txt").write_text("000000000035\n")
    with pytest.raises(FileNotFoundError,
                       match=r"Coarse_7\.txt names 1 images: .*found 1 missing.*000000000035\.jpg"):
        image_files.training_images("coco", str(tmp_path))


# ------------------------------------------------------------------------------ the order of Context's labels

def context_pair(root: Path, order: list[str], voc_folder: str) -> None:
    """Context's tree with labels in the given order, and VOC's own labels of its validation images beside
    it."""
    base = write_public_tree("context", root, values=[0, 255, *(1 + order.index(name) for name in
                                                               ("airplane", "bus", "cat", "table", "sky",
                                                                "tv monitor"))])
    voc = {"airplane": 1, "bus": 6, "cat": 8, "table": 11, "tv monitor": 20}
    for name in TREES["context"][1]:
        with Image.open(base / f"SegmentationClassContext/{name}.png") as label:
            values = np.array(label)
        own = np.zeros_like(values)
        for word, value in voc.items():
            own[values == 1 + order.index(word)] = value
        own[:8] = 255                                                   # VOC's border decides nothing
        write_label(root / voc_folder / f"{name}.png", own)


@pytest.mark.parametrize("voc_folder",
                         ["VOCdevkit/VOC2010/SegmentationClass", "VOCdevkit/VOC2012/SegmentationClass"])
@pytest.mark.parametrize("name, order, other", [("context", ALPHABETICAL, "context-voc-first"),
                                                ("context-voc-first", VOC_FIRST, "context")])
def test_order_of_context_is_proven_or_refused_by_vocs_labels_beside(tmp_path, capsys, name, order, other,
                                                                     voc_folder):
    """The declared order is confirmed with its share of pixels; under the other name the same files are an
    error."""
    context_pair(tmp_path, order, voc_folder)
    ids = TREES["context"][1]
    assert len(ground_truth.true_label_files(name, str(tmp_path), "val", ids)) == 2
    assert "rightly" in (said := capsys.readouterr().out) and "100%" in said
    with pytest.raises(ValueError,
                       match=rf"--data {other}: expected labels in the order .*Use --data {name}\."):
        ground_truth.true_label_files(other, str(tmp_path), "val", ids)


def test_order_of_context_that_nothing_proves_is_said_to_be_unproven(tmp_path, capsys):
    """Without VOC's labels, or where they agree with neither order: read as declared, and said so each
    time."""
    write_public_tree("context", tmp_path)
    ids = TREES["context"][1]
    for name, order in (("context", "alphabetical"), ("context-voc-first", "voc-first")):
        assert len(ground_truth.true_label_files(name, str(tmp_path), "val", ids)) == 2
        assert f"in the order {order}. Nothing proves it: no labels" in capsys.readouterr().out
    for image in ids:
        write_label(tmp_path / f"VOCdevkit/VOC2012/SegmentationClass/{image}.png", np.full((40, 56), 19))
    ground_truth.true_label_files("context", str(tmp_path), "val", ids)
    assert "Nothing proves it: of " in capsys.readouterr().out


def test_no_label_of_context_is_opened_to_list_its_training_images(tmp_path, monkeypatch):
    """The check of the order is evaluation's: listing and training never come near it."""
    context_pair(tmp_path, VOC_FIRST, "VOCdevkit/VOC2010/SegmentationClass")
    monkeypatch.setattr(ground_truth, "label_picture", lambda path: pytest.fail(f"{path} was opened"))
    assert len(image_files.training_images("context", str(tmp_path))) == 4
    assert len(image_files.image_files("context", str(tmp_path), "val")) == 2


# ------------------------------------------------------------------------------------------ recipes

@pytest.mark.parametrize("name, numbers", [
    ("context", dict(vote_threshold=0.0, short_side=448, crop=(480, 480), horizon=400, epochs=50)),
    ("context-voc-first", dict(vote_threshold=0.0, short_side=448, crop=(480, 480), horizon=400, epochs=50)),
    ("ade", dict(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=600, epochs=100)),
    ("cityscapes",
     dict(vote_threshold=0.07, short_side=448, crop=(512, 512), horizon=300, epochs=50, batch_size=16,
                        learning_rate=0.16)),
    ("coco", dict(vote_threshold=0.0, short_side=512, crop=(512, 512), horizon=800, epochs=100))])
def test_recipes_are_the_papers_and_vocs_in_all_else(name, numbers):
    assert asdict(rectify.RECIPES[name]) == asdict(rectify.RECIPES["voc"]) | numbers
    context = dict(short_side=520, crop=(480, 480), epochs=150)
    student = {"context": context, "context-voc-first": context, "ade": dict(epochs=150),
               "coco": dict(epochs=50)}
    assert asdict(distill.RECIPES[name]) == asdict(distill.RECIPES["voc"]) | student.get(name, {})


# ------------------------------------------------------------------------------------------ check.py

def checked(capsys, *flags) -> tuple[list[str], str]:
    """What check.py finds wrong, and all that it prints."""
    capsys.readouterr()
    problems = check.main(check.flags().parse_args([*map(str, flags), "--workers", "2"]))
    said = capsys.readouterr().out
    assert all(problem in said for problem in problems) and ("All is well" in said) == (not problems)
    return problems, said


@pytest.fixture
def small(monkeypatch):
    """Datasets that are given out with four training and two validation images, as the trees of these tests
    have."""
    for name, dataset in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(dataset, counts={"train": 4, "val": 2}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_good_tree_is_well(tmp_path, capsys, small, name):
    base = write_public_tree(name, tmp_path)
    problems, said = checked(capsys, "--data", name, "--root", tmp_path)
    assert problems == [] and str(base) in said and "4 images" in said and "2 labels" in said
    assert f"Next: python rectify.py --data {name} --root {tmp_path}" in said


def test_histogram_counts_pixels_and_images_of_each_class(tmp_path, capsys, small):
    """Percent of the counted pixels, how many images show a class, what is ignored, and which classes never
    occur."""
    base = write_public_tree("ade", tmp_path)
    for name, values in (("ADE_val_00000001", [1, 1, 1, 0]), ("ADE_val_00000020", [1, 150, 150, 150])):
        write_label(base / f"annotations/validation/{name}.png",
                    np.array(values).repeat(14)[None].repeat(40, axis=0))
    _, said = checked(capsys, "--data", "ade", "--root", tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()
            if line[:4] in ("wall", "flag", "(ign")}
    assert rows == {"wall": ["2240", "57.14", "2"], "flag": ["1680", "42.86", "1"], "(ignored)": ["560", "1"]}
    assert "In none of these 2 labels: building, sky, " in said


def test_context_is_shown_in_both_orders(tmp_path, capsys, small):
    """The same pixels read either way, the declared one marked: grass (29) would be a computer (29)."""
    write_public_tree("context", tmp_path, values=[29])
    _, said = checked(capsys, "--data", "context", "--root", tmp_path)
    assert "alphabetical (declared) grass 100 %" in said and "voc-first               computer 100 %" in said
    _, said = checked(capsys, "--data", "context-voc-first", "--root", tmp_path)
    assert "alphabetical            grass 100 %" in said and "voc-first (declared)    computer 100 %" in said


def test_other_numbers_than_the_archives_are_to_mend(tmp_path, capsys):
    """The real counts: a part of a dataset is told from the whole."""
    for name in LAYOUTS:
        write_public_tree(name, tmp_path)
    known = {"context": (4996, 5104), "ade": (20210, 2000), "cityscapes": (2975, 500), "coco": (118287, 5000)}
    for name, (train, val) in known.items():
        problems, _ = checked(capsys, "--data", name, "--root", tmp_path)
        assert [problem.split(". ")[0].split(" images")[0]
                for problem in problems] == [f"train: expected {train}", f"val: expected {val}"]
        assert "found 4" in problems[0] and "found 2" in problems[1]
    (tmp_path / "coco_stuff164k/curated/val2017").mkdir(parents=True)
    (tmp_path / "coco_stuff164k/curated/val2017/list.txt").write_text("000000000139\n")
    problems, _ = checked(capsys, "--data", "coco", "--root", tmp_path)
    assert "val: expected 2175 images in " in problems[1] and "list.txt, found 1" in problems[1]
    write_voc_tree(tmp_path)
    problems, _ = checked(capsys, "--data", "voc", "--root", tmp_path)
    assert "expected 1464" in problems[0] and "expected 1449" in problems[1]


LABEL, IMAGE = "annotations/validation/ADE_val_00000020.png", "images/validation/ADE_val_00000020.jpg"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


DEFECTS = {
    "image cut off": (lambda base: cut(base / IMAGE), ["ADE_val_00000020.jpg: expected an image"]),
    "training image cut off": (lambda base: cut(base / "images/training/ADE_train_00000010.jpg"),
                               ["ADE_train_00000010.jpg: expected an image"]),
    "label cut off": (lambda base: cut(base / LABEL),
                      ["ADE_val_00000020.png: expected a label, found a file that cannot be used as one"]),
    "colour picture": (lambda base: photo().save(base / LABEL), ["ADE_val_00000020.png", "found mode RGB"]),
    "other size": (lambda base: write_label(base / LABEL, np.ones((20, 28))),
                   ["expected a label of 40×56", "found 20×28"]),
    "unknown value": (lambda base: write_label(base / LABEL, np.full((40, 56), 151)),
                      ["ADE_val_00000020.png: expected the values 0..150; found [151]"]),
    "label without image": (lambda base: write_label(base / "annotations/validation/ADE_val_7.png",
                                                     np.ones((40, 56))),
                            ["annotations/validation",
                             "expected an image for each label, found none for 1 (ADE_val_7)"]),
    "training label without image": (lambda base: write_label(base / "annotations/training/x.png",
                                                              np.ones((40, 56))),
                                     ["annotations/training", "found none for 1 (x)"]),
    "image without label": (lambda base: (base / LABEL).unlink(),
                            ["val: expected a label for each of 2 images, found none for 1 "
                             "(ADE_val_00000020)"]),
    "no labels": (lambda base: shutil.rmtree(base / "annotations/validation"),
                  ["val: expected labels annotations/validation/{id}.png, found none"]),
    "nothing but ignored": (lambda base: [write_label(path, np.zeros((40, 56)))
                                          for path in (base / "annotations/validation").iterdir()],
                            ["val: expected labels that name a class"]),
    "image missing": (lambda base: (base / "images/training/ADE_train_00000010.jpg").unlink(),
                      ["train: expected 4 images, found 3", "found none for 1 (ADE_train_00000010)"]),
    "no training images": (lambda base: shutil.rmtree(base / "images/training"),
                           ["images/training/*.jpg, found none"]),
    "image in both splits": (lambda base: (shutil.copy(base / "images/training/ADE_train_00000001.jpg",
                                                       base / IMAGE),
                                           (base / IMAGE).rename(
                                               base / "images/validation/ADE_train_00000001.jpg")),
                             ["expected no image in both train and val, found 1 (ADE_train_00000001)"]),
    "other classes": (lambda base: (base / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0\t0\t0\twall\n2\t0\t0\t0\tsky\n3\t0\t0\t0\tbuilding, edifice\n"),
        ["objectInfo150.txt: expected class 2 to be building, found sky"]),
    "no class list": (lambda base: (base / "objectInfo150.txt").write_bytes(b"\xff\xfe\x00PK"),
                      ["objectInfo150.txt: expected class 1 to be wall, found no such line"]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_of_a_tree_is_named(tmp_path, capsys, small, defect):
    """Every fault is found, whatever else is well, and the problem says which file and what was expected."""
    spoil, parts = DEFECTS[defect]
    spoil(write_public_tree("ade", tmp_path))
    problems, _ = checked(capsys, "--data", "ade", "--root", tmp_path)
    for part in parts:
        assert any(part in problem for problem in problems), problems


def test_an_id_may_stand_in_both_splits_an_image_may_not(tmp_path):
    """Toyland counts each split from 0000, and those are other scenes; the same bytes are the same image."""
    write_photos(tmp_path, "train/0000.png", "val/0000.png")
    images = {split: {"0000": tmp_path / split / "0000.png"} for split in ("train", "val")}
    assert check.wrong_counts("photos", "unused", images, labels={}) == []
    shutil.copy(images["train"]["0000"], images["val"]["0000"])
    [problem] = check.wrong_counts("photos", "unused", images, labels={})
    assert "expected no image in both train and val, found 1 (0000)" in problem


def test_many_faults_of_one_kind_are_counted_not_listed(tmp_path, capsys, monkeypatch):
    dataset = DATASETS["ade"]
    monkeypatch.setitem(DATASETS, "ade", replace(dataset, counts={"train": 4, "val": 30}))
    base = write_public_tree("ade", tmp_path)
    for number in range(100, 128):
        photo().save(base / f"images/validation/ADE_val_{number}.jpg")
        write_label(base / f"annotations/validation/ADE_val_{number}.png", np.full((40, 56), 200))
    problems, _ = checked(capsys, "--data", "ade", "--root", tmp_path)
    assert len(problems) == 6 and problems[-1] == "val: 23 more files of 30 have such faults."


def test_lists_that_are_wrong_are_to_mend(tmp_path, capsys, small):
    """Context: a list that is missing, empty, or names what is not there; the other split is looked at all
    the same."""
    base = write_public_tree("context", tmp_path)
    path = base / "ImageSets/SegmentationContext/train.txt"
    good = path.read_text()
    for spoil, part in ((lambda: path.unlink(), "train.txt, found none"),
                        (lambda: path.write_text("\n"), "an empty list"),
                        (lambda: path.write_text(good + "2012_000001\n"), "2012_000001.jpg"),
                        (lambda: path.write_bytes(b"\xff\xd8\xff\xe0JFIF"), "train.txt names 1 images")):
        spoil()
        problems, said = checked(capsys, "--data", "context", "--root", tmp_path)
        assert len(problems) == 1 and problems[0].startswith("train: ") and part in problems[0] \
            and "2 labels" in said
    path.write_bytes(b"\xef\xbb\xbf" + good.encode())           # a byte order mark is no part of the first id
    assert checked(capsys, "--data", "context", "--root", tmp_path)[0] == []


def test_context_in_the_other_order_is_to_mend(tmp_path, capsys, small):
    context_pair(tmp_path, VOC_FIRST, "VOCdevkit/VOC2010/SegmentationClass")
    [problem], _ = checked(capsys, "--data", "context", "--root", tmp_path)
    assert "Use --data context-voc-first" in problem
    assert checked(capsys, "--data", "context-voc-first", "--root", tmp_path)[0] == []


def test_conversions_beside_cocos_labels_are_no_fault(tmp_path, capsys, small):
    """mmsegmentation writes <id>_labelTrainIds.png into the same folder; a label of no image is still one."""
    base = write_public_tree("coco", tmp_path)
    write_label(base / "annotations/val2017/000000000139_labelTrainIds.png", np.ones((4, 4)))
    assert checked(capsys, "--data", "coco", "--root", tmp_path)[0] == []
    write_label(base / "annotations/val2017/000000000999.png", np.ones((4, 4)))
    assert "(000000000999)" in checked(capsys, "--data", "coco", "--root", tmp_path)[0][0]


def test_training_labels_are_counted_but_never_opened(tmp_path, capsys, small):
    base = write_public_tree("ade", tmp_path)
    for path in (base / "annotations/training").iterdir():
        path.write_bytes(b"no picture")
    problems, said = checked(capsys, "--data", "ade", "--root", tmp_path)
    assert problems == [] and "4 labels  (not opened" in said


def test_quick_decodes_a_sample_that_the_seed_draws(tmp_path, capsys, small, monkeypatch):
    """Counts stay whole; of each split only some files are opened, other ones with another seed."""
    monkeypatch.setattr(check, "SAMPLE", 1)
    write_public_tree("coco", tmp_path)
    seen, read = [], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path: (seen.append(path.stem), read(path))[1])
    for seed in range(6):
        problems, said = checked(capsys, "--data", "coco", "--root", tmp_path, "--quick", "--seed", seed)
        assert problems == [] and "4 images" in said and "All is well in this sample" in said
    assert len(seen) == 12 and len(set(seen)) > 2


def test_folder_of_ones_own_is_checked_with_its_labels(tmp_path, capsys):
    """Values past the class list, labels of no image, images of no label; without --labels the images
    alone."""
    folder = write_photos(tmp_path / "photos", "a.jpg", "sub/b.png", "c.jpg")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    flags = ["--data", folder, "--classes", tmp_path / "names.txt"]
    assert checked(capsys, *flags)[0] == []
    labels = tmp_path / "labels"
    for name in ("a", "sub/b", "c"):
        write_label(labels / f"{name}.png", np.eye(56)[:40])
    assert checked(capsys, *flags, "--labels", labels)[0] == []
    write_label(labels / "a.png", np.full((40, 56), 2))
    write_label(labels / "z.png", np.zeros((40, 56)))
    (labels / "c.png").unlink()
    problems, _ = checked(capsys, *flags, "--labels", labels)
    missing, alone, unknown = problems
    assert "found none for 1 (c)" in missing and "(z)" in alone and "found [2]" in unknown
    cut(folder / "c.jpg")
    assert "c.jpg: expected an image" in checked(capsys, *flags)[0][0]


def test_own_words_leave_the_labels_unopened(tmp_path, capsys, small):
    """With --classes of one's own a known dataset's labels say nothing: images are checked, labels are
    not."""
    base = write_public_tree("ade", tmp_path)
    (base / LABEL).write_bytes(b"no picture")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    problems, said = checked(capsys, "--data", "ade", "--root", tmp_path, "--classes", tmp_path / "names.txt")
    assert problems == [] and "not opened" in said


@pytest.mark.slow
def test_check_as_a_command_exits_with_0_or_2(tmp_path):
    """2 with a list of what to mend, 2 in one paragraph when there is no tree at all, 0 for a folder that is
    well."""
    write_public_tree("ade", tmp_path / "data")
    write_photos(tmp_path / "photos", "a.jpg", "b.jpg")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for flags, code, part in ((["--data", "ade"], 2, "2 to mend"),
                              (["--data", "coco"], 2, "error: --data coco: expected"),
                              (["--data", "photos", "--classes", "names.txt"], 0, "All is well")):
        result = subprocess.run([sys.executable, ROOT / "datasets/check.py", *flags], cwd=tmp_path,
                                capture_output=True, text=True)
        assert result.returncode == code and part in result.stdout + result.stderr \
            and "Traceback" not in result.stderr


def test_no_script_of_the_method_imports_the_check():
    """It opens labels: what it finds must have no way into a training."""
    imports = re.compile(r"import check\b|datasets\.check|datasets import .*\bcheck\b")
    for path in python_files(ROOT):
        assert not imports.search(path.read_text(encoding="utf-8")), path


# ------------------------------------------------------------------------------------------ whole runs

@pytest.fixture
def layout(request, tmp_path, monkeypatch):
    """The tree of one dataset in ./data, quick recipes of one epoch, few sentences; gives the flags of a
    first run."""
    monkeypatch.chdir(tmp_path)
    quick_recipes(monkeypatch, tmp_path)
    monkeypatch.setattr(words, "QUERY_TEMPLATES", words.QUERY_TEMPLATES[:2])
    write_openai_archive(tmp_path / "tiny.pt", **SMALLEST)
    write_public_tree(request.param, tmp_path / "data")
    return ["--data", request.param, "--clip", "tiny.pt", "--epochs", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_scripts_train_and_measure_in_every_layout(layout, capsys):
    """rectify → distill → evaluate; two labelled images are measured, in the dataset's classes."""
    name = layout[1]
    run(rectify, *layout)
    run(distill, "--epochs", "1")
    metrics = run(evaluate)
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    for found in metrics.values():
        assert found["fingerprint"]["images"] == 2 and list(found["per_class_iou"]) == DATASETS[name].names
    assert Path("runs", name,
                "distill/checkpoint.pt").exists() and Path("runs", name, "evaluate/preview.png").exists()
    assert {"context": "Nothing proves it",
            "cityscapes": "2 *_gtFine_labelIds.png"}.get(name, "") in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_weights_are_the_same_without_any_label(layout):
    """Bit for bit, with the whole folder of labels gone."""
    weights = []
    for out in ("with", "without"):
        run(rectify, *layout, "--out", out)
        weights.append(runs.load(Path(out, layout[1], "rectify/checkpoint.pt"), "rectify")["weights"])
        for folder in ("SegmentationClassContext", "annotations", "gtFine"):
            for path in Path("data").rglob(folder):
                shutil.rmtree(path)
    assert len(weights[0]) > 5 and all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    assert not Path("without", layout[1], "rectify/metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["context"], indirect=True)
def test_what_was_trained_under_the_wrong_order_stays_right(layout, capsys):
    """The error's advice holds: rename the folder, and the same checkpoint is measured in the other order."""
    shutil.rmtree("data")
    context_pair(Path("data"), VOC_FIRST, "VOCdevkit/VOC2012/SegmentationClass")
    assert "Use --data context-voc-first" in refusal(capsys, rectify, *layout)
    assert Path("runs/context/rectify/checkpoint.pt").exists()
    Path("runs/context").rename("runs/context-voc-first")
    assert run(evaluate, "--data", "context-voc-first")["rectify"]["fingerprint"]["images"] == 2


# ------------------------------------------------------------------------------------------ add a dataset

# What a description must hold. Two classes, five images a split at most, labels of one encoding.
PETS = {
    "title": "Pets", "places": ["pets", ""], "tree": "pets/{images,labels}/{train,val}",
        "archive": "pets.zip",
    "page": "https://example.org/pets", "counts": {"train": 4, "val": 2},
        "splits": {"train": "train", "val": "val"},
    "images": "images/{split}/{id}.jpg", "labels": {"indices": "labels/{split}/{id}.png"},
    "ignored": {"indices": [255]},
    "classes": [{"name": "cat", "colour": [255, 0, 0], "indices": [0]},
                {"name": "dog", "colour": [0, 0, 255], "indices": [1]}]}
# Tiny pictures and whole epochs of two steps, so that a stage is over in seconds.
PETS_RECIPE = {
    "rectify": '    "pets": Recipe(short_side=32, crop=(32, 32), batch_size=2, window_ratio=1 / 2),\n',
    "distill": '    "pets": Recipe(backbone="small", short_side=32, crop=(32, 32), batch_size=2),\n'}


@pytest.fixture
def project(tmp_path):
    """A copy of the project to add to, with the dataset's files and a tiny CLIP where a user would have
    them."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "runs", "data", "results")
    shutil.copytree(ROOT, tmp_path / "project", ignore=skip)
    for split, count in PETS["counts"].items():
        for number in range(count):
            path = tmp_path / "project/data/pets/images" / split / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(seed=number + 10 * (split == "val")).save(path)
            values = np.random.default_rng(number).choice([0, 1, 255],
                                                          (5, 7)).repeat(8, axis=0).repeat(8, axis=1)
            write_label(tmp_path / "project/data/pets/labels" / split / f"{number}.png", values)
    write_openai_archive(tmp_path / "project/tiny.pt", **SMALLEST)
    return tmp_path / "project"


def describe(project: Path, content: dict) -> None:
    (project / "datasets/pets.json").write_text(json.dumps(content))


def add_recipe(project: Path, *stages: str) -> None:
    """The line that the page of datasets/ asks for, right behind `RECIPES = {`."""
    for stage in stages:
        path = project / f"{stage}.py"
        before, opening, after = path.read_text(encoding="utf-8").partition("\nRECIPES = {\n")
        assert opening, f"{path.name} has no table RECIPES"
        path.write_text(before + opening + PETS_RECIPE[stage] + after, encoding="utf-8")


def command(project: Path, *words_typed: str) -> subprocess.CompletedProcess:
    """What a user types in the project's folder, after `python`."""
    return subprocess.run([sys.executable, *words_typed], cwd=project, capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_description_and_two_recipe_lines_add_a_dataset(project):
    """No other file is touched: it is checked, trained on, distilled and measured by its name."""
    describe(project, PETS)
    add_recipe(project, "rectify", "distill")
    for typed, said in ((["datasets/check.py", "--data", "pets"], "All is well"),
                        (["rectify.py", "--data", "pets", "--clip", "tiny.pt", "--epochs", "1"],
                         "pets: 2 val images, 2 classes"),
                        (["distill.py", "--epochs", "1"], "pets: 2 val images, 2 classes"),
                        (["evaluate.py"], "pets: 2 val images, 2 classes")):
        result = command(project, *typed)
        assert result.returncode == 0 and said in result.stdout, result.stdout + result.stderr
    metrics = json.loads((project / "runs/pets/evaluate/metrics.json").read_text())
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    assert all(list(found["per_class_iou"]) == ["cat", "dog"] for found in metrics.values())


@pytest.mark.slow
def test_a_missing_recipe_line_is_an_error_that_names_the_file(project):
    """Of either stage, before anything is trained in it."""
    describe(project, PETS)
    flags = ["--data", "pets", "--clip", "tiny.pt", "--epochs", "1"]
    for stage, has in (("rectify", []), ("distill", ["rectify"])):
        add_recipe(project, *has)
        result = command(project, f"{stage}.py", *flags)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert f"error: --data pets: expected a recipe for it in {stage}.py" in result.stderr
        assert not (project / "runs/pets" / stage).exists()


def without(content: dict, *keys: str) -> dict:
    """A copy in which the last of the keys is gone, the others being the way to it."""
    copy = json.loads(json.dumps(content))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return copy


@pytest.mark.parametrize("keys", [
    *[[key] for key in PETS], ["ignored", "indices"], ["counts", "val"], ["splits", "train"],
    *[["classes", 1, key]
      for key in ("name", "colour", "indices")]], ids=lambda keys: " ".join(map(str, keys)))
def test_a_description_without_a_key_is_refused_by_file_and_key(tmp_path, keys):
    path = tmp_path / "pets.json"
    path.write_text(json.dumps(PETS))
    assert described(path).names == ["cat", "dog"]
    path.write_text(json.dumps(without(PETS, *keys)))
    with pytest.raises(ValueError) as error:
        described(path)
    said, found = str(error.value).split("found: ")
    assert f"{path}: expected a dataset's description with title, " in said
    assert keys[-1] in found


@pytest.mark.parametrize("content, found", [
    (json.dumps(PETS | {"palete": True}), "palete"), ("{", "line 1"), ("[]", "list"),
    (json.dumps({"like": "cats"}), "cats.json")],
    ids=["a key that nothing reads", "no JSON", "no object", "like a dataset that is not there"])
def test_a_description_that_cannot_be_one_is_refused_by_file(tmp_path, content, found):
    """A misspelt key would else be ignored, and a default taken in its place."""
    (tmp_path / "pets.json").write_text(content)
    with pytest.raises(ValueError, match=r"pets\.json: expected a dataset's description") as error:
        described(tmp_path / "pets.json")
    assert found in str(error.value).split("found: ")[1]


def test_a_description_may_have_a_third_split(tmp_path, monkeypatch):
    """It is measured when it is asked for. Counts and splits name the same ones, and no fourth."""
    path = tmp_path / "pets.json"
    three = PETS | {"counts": {"train": 4, "val": 2, "test": 3},
                    "splits": {"train": "train", "val": "val", "test": "exam"}}
    for content, splits in ((PETS, ["val"]), (three, ["val", "test"])):
        path.write_text(json.dumps(content))
        monkeypatch.setitem(DATASETS, "pets", described(path))
        assert split_to_measure("pets") == "val"
        assert all(split_to_measure("pets", split) == split for split in splits)
    for wrong in (without(three, "counts", "test"), without(three, "splits", "test"),
                  PETS | {"counts": {"train": 4, "val": 2, "dev": 3},
                          "splits": {"train": "train", "val": "val", "dev": "dev"}}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="counts and splits are those of train and val, and of test"):
            described(path)


def test_all_splits_that_there_are_are_looked_through(tmp_path, capsys, monkeypatch):
    """A third split's labels are opened, and its images are in no other."""
    base, ade = write_public_tree("ade", tmp_path), DATASETS["ade"]
    monkeypatch.setitem(DATASETS, "ade", replace(ade, counts={"train": 4, "val": 2, "test": 1},
                                                 splits=ade.splits | {"test": "exam"}))
    write_photos(base, "images/exam/1.jpg")
    write_label(base / "annotations/exam/1.png", np.tile(np.repeat([1, 2, 13, 45], 14), (40, 1)))
    problems, said = checked(capsys, "--data", "ade", "--root", tmp_path)
    assert problems == [] and "test        1 images        1 labels\n" in said
    write_label(base / "annotations/exam/1.png", np.full((40, 56), 200))
    shutil.copy(base / "images/training/ADE_train_00000001.jpg", base / "images/exam/ADE_train_00000001.jpg")
    problems, _ = checked(capsys, "--data", "ade", "--root", tmp_path)
    assert any("exam/1.png" in problem and "found [200]" in problem for problem in problems), problems
    assert any("no image in both train and test, found 1" in problem for problem in problems), problems


def test_a_description_like_another_takes_what_it_does_not_say_from_there(tmp_path):
    (tmp_path / "pets.json").write_text(json.dumps(PETS))
    (tmp_path / "pets-scribbles.json").write_text(json.dumps(
        {"like": "pets", "title": "Scribbles", "labels": {"indices": "scribbles/{split}/{id}.png"}}))
    found = described(tmp_path / "pets-scribbles.json")
    assert asdict(found) == asdict(described(tmp_path / "pets.json")) | {
        "title": "Scribbles", "labels": {"indices": "scribbles/{split}/{id}.png"}}


@pytest.mark.slow
def test_a_broken_description_stops_every_script_at_its_start(project):
    """By file and key, before weights or images are looked for."""
    describe(project, without(PETS, "classes", 1, "colour"))
    for script in ("rectify.py", "evaluate.py", "datasets/check.py"):
        result = command(project, script)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and "datasets/pets.json: expected" in last and "colour" in last \
            and "Traceback" not in result.stderr, result.stderr
