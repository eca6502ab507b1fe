"""datasets/labels.py: which label files there are, what their values mean, and what is refused as a label.

    python -m pytest tests/test_labels.py            # the public datasets, value by value: test_datasets.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from datasets import DATASETS, images as image_files, labels as ground_truth
from helpers import write_label, write_photos, write_voc_tree


# ------------------------------------------------------------------------------------------ label values

def test_voc_lookup_table_value_by_value():
    """0 (background) and 255 (border) are ignored, 1..20 are the classes 0..19, nothing else may occur."""
    table = ground_truth.lookup_table("voc", 20)
    assert table.shape == (256,)
    for value in range(256):
        assert table[value] == (255 if value in (0, 255) else value - 1 if value <= 20 else -1), value


@pytest.mark.parametrize("name, classes", [("photos", 3), ("toyland", 16), ("photos", 255)])
def test_own_lookup_table_value_by_value(name, classes):
    """A value is its class; 255 is ignored; other values may not occur."""
    table = ground_truth.lookup_table(name, classes)
    for value in range(256):
        assert table[value] == (value if value < classes or value == 255 else -1), value


def test_labels_of_a_known_dataset_are_not_read_as_other_classes():
    """VOC's labels with three words of one's own would give numbers that mean nothing: an error."""
    with pytest.raises(ValueError, match="labels of voc .* 20 classes: expected as many.*found 3"):
        ground_truth.refuse_other_classes("voc", ["cat", "dog", "cow"])
    own = DATASETS["voc"].names
    swapped = own[1::-1] + own[2:]
    assert not ground_truth.labels_fit("voc", swapped) and not ground_truth.labels_fit("voc", own[:3])
    assert ground_truth.labels_fit("voc", ["plane", *own[1:]])               # another word for the same class
    assert ground_truth.labels_fit("voc", own) and ground_truth.labels_fit("photos", ["cat", "dog"])


def test_label_is_read_as_indices(tmp_path):
    """A palette PNG gives its indices, not its colours, through the table, in the label's own size."""
    values = np.array([[0, 1, 20], [255, 8, 15]])
    write_label(tmp_path / "a.png", values)
    found = ground_truth.LabelReader("voc", 20)(tmp_path / "a.png", size=(2, 3))
    assert found.dtype == np.int64 and found.tolist() == [[255, 0, 19], [255, 7, 14]]


def test_unknown_label_value_is_named_with_its_file(tmp_path):
    write_label(tmp_path / "a.png", np.array([[0, 21], [77, 20]]))
    with pytest.raises(ValueError, match=r"a\.png: expected the values 0\.\.20 and 255; found \[21, 77\]"):
        ground_truth.LabelReader("voc", 20)(tmp_path / "a.png", size=(2, 2))
    with pytest.raises(ValueError, match=r"expected the values 0\.\.2 and 255; found \[20, 21, 77\]"):
        ground_truth.LabelReader("photos", 3)(tmp_path / "a.png", size=(2, 2))


def test_label_of_another_size_is_refused(tmp_path):
    write_label(tmp_path / "a.png", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a\.png: expected a label of 3×2 pixels.*found 2×3"):
        ground_truth.LabelReader("voc", 20)(tmp_path / "a.png", size=(3, 2))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_colour_picture_is_no_label(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png: .*expected an index picture.*found mode {mode}"):
        ground_truth.LabelReader("voc", 20)(tmp_path / "a.png", size=(4, 4))


def test_broken_label_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"a\.png: expected a label, found a file that cannot be used"):
        ground_truth.LabelReader("voc", 20)(tmp_path / "a.png", size=(4, 4))


# ------------------------------------------------------------------------------------------ which files

def test_labels_of_a_folder_are_found_by_name(tmp_path):
    """--labels: those that are there; none at all, or no such folder, is an error; without --labels there are
    none."""
    ids = ["a", "sub/b"]
    write_label(tmp_path / "labels/sub/b.png", np.zeros((2, 2)))
    assert ground_truth.true_label_files("photos", "unused", "all", ids, str(tmp_path / "labels")) \
        == {"sub/b": tmp_path / "labels/sub/b.png"}
    assert ground_truth.true_label_files("photos", "unused", "all", ids) == {}
    with pytest.raises(FileNotFoundError, match="--labels .*expected a folder"):
        ground_truth.true_label_files("photos", "unused", "all", ids, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"expected PNG files .*\(c\.png, …\), found none"):
        ground_truth.true_label_files("photos", "unused", "all", ["c"], str(tmp_path / "labels"))


# ------------------------------------------------------------------------------------------ evaluation images

def test_labelled_images_pair_an_image_with_its_label_at_its_own_size(tmp_path):
    """The image is resized, the label is not; an image without a label is left out."""
    write_voc_tree(tmp_path)
    images = image_files.image_files("voc", str(tmp_path), "val")
    labels = ground_truth.true_label_files("voc", str(tmp_path), "val", list(images))
    labels.pop("2007_000033")
    dataset = evaluate.LabelledImages(images, labels,
                                     ground_truth.LabelReader("voc", 20), short_side=20)
    assert len(dataset) == 1
    name, image, true_label = dataset[0]
    assert name == "2007_000042" and image.shape == (3, 20, 28) and true_label.shape == (40, 56)
    with Image.open(labels[name]) as picture:
        values = torch.from_numpy(np.array(picture)).long()
    assert torch.equal(true_label, torch.where((values == 0) | (values == 255), 255, values - 1))


def test_label_that_does_not_belong_to_its_image_is_named(tmp_path):
    write_photos(tmp_path, "a.png")
    write_label(tmp_path / "label.png", np.zeros((8, 8)))
    dataset = evaluate.LabelledImages({"a": tmp_path / "a.png"}, {"a": tmp_path / "label.png"},
                                      ground_truth.LabelReader("photos", 2), short_side=16)
    with pytest.raises(ValueError, match=r"label\.png: expected a label of 40×56 pixels.*found 8×8"):
        dataset[0]
