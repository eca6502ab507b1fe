"""datasets/images.py: lists and folders on disk, pictures of every kind, the download.

    python -m pytest tests/test_images.py

No real dataset is needed: the trees are written by the tests, in the layout that the archives have.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from datasets import images as image_files, labels as ground_truth
from helpers import VOC_BASE, photo, write_photos, write_voc_tree


# ------------------------------------------------------------------------------------------ VOC's tree

@pytest.mark.parametrize("inside", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_folder_on_the_way_to_voc(tmp_path, inside):
    """--root may name the folder with VOCdevkit, VOCdevkit, or VOC2012: the same lists and files are
    found."""
    root = str(write_voc_tree(tmp_path) / inside)
    train, val = image_files.training_images("voc", root), image_files.image_files("voc", root, "val")
    assert list(train) == ["2007_000032", "2007_000039", "2007_000063", "2007_000068"]
    assert list(val) == ["2007_000033", "2007_000042"]
    assert all(path.is_file() and path.parent.name == "JPEGImages"
               for path in (*train.values(), *val.values()))
    labels = ground_truth.true_label_files("voc", root, "val", list(val))
    assert list(labels) == list(val) and all(path.parent.name == "SegmentationClass"
                                             for path in labels.values())


def test_missing_voc_tree_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="expected VOCdevkit/VOC2012.* found no JPEGImages.*--download"):
        image_files.training_images("voc", str(tmp_path))


def test_missing_list_is_named(tmp_path):
    base = write_voc_tree(tmp_path) / VOC_BASE
    (base / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the list .*val\.txt, found none"):
        image_files.image_files("voc", str(tmp_path), "val")


def test_image_missing_from_the_folder_is_named(tmp_path):
    """A list that names a missing image: how many are missing, and the first of them."""
    base = write_voc_tree(tmp_path) / VOC_BASE
    for name in ("2007_000039", "2007_000063"):
        (base / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(FileNotFoundError,
                       match=r"train\.txt names 4 images: expected all .*found 2 missing.*000039\.jpg"):
        image_files.training_images("voc", str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n"])
def test_empty_list_is_refused(tmp_path, content):
    (write_voc_tree(tmp_path) / VOC_BASE / "ImageSets/Segmentation/train.txt").write_text(content)
    with pytest.raises(ValueError, match=r"train\.txt: expected image ids.*found an empty list"):
        image_files.training_images("voc", str(tmp_path))


def test_list_of_any_line_ends_order_and_repetition(tmp_path):
    """Windows' line ends, blank lines, a second column and repetitions change nothing; ids come sorted."""
    base = write_voc_tree(tmp_path) / VOC_BASE
    train = base / "ImageSets/Segmentation/train.txt"
    train.write_bytes(b"2007_000063\r\n2007_000032 1\r\n\r\n2007_000063\r\n")
    assert list(image_files.training_images("voc", str(tmp_path))) == ["2007_000032", "2007_000063"]


def test_training_images_need_no_label_folder(tmp_path):
    """Without SegmentationClass the training images are the same, and nothing is there to be measured."""
    before = image_files.training_images("voc", str(write_voc_tree(tmp_path)))
    shutil.rmtree(tmp_path / VOC_BASE / "SegmentationClass")
    assert image_files.training_images("voc", str(tmp_path)) == before
    assert ground_truth.true_label_files("voc", str(tmp_path), "val",
                                         list(image_files.image_files("voc", str(tmp_path), "val"))) == {}


# -------------------------------------------------------------------------------------- a folder of one's own

def test_folder_of_images_of_any_kind_and_depth(tmp_path):
    """Sub-folders, capital suffixes, spaces and any alphabet; sorted; other files are passed over."""
    folder = write_photos(tmp_path / "my photos", "b.JPG", "a.png", "été/кот 1.jpeg", "été/深い/x.y.webp",
                          "c.bmp", "d.TIF")
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "folder.jpg").mkdir()
    found = image_files.training_images(str(folder), "unused")
    assert sorted(found) == sorted(["a", "b", "c", "d", "été/кот 1", "été/深い/x.y"])
    assert list(found.values()) == sorted(found.values()) and all(path.is_file() for path in found.values())


def test_two_images_that_differ_in_their_suffix_alone_are_refused(tmp_path):
    """Results are kept by name; the same stem in two folders is fine."""
    write_photos(tmp_path, "x/cat.jpg", "y/cat.jpg")
    assert list(image_files.images_in(tmp_path)) == ["x/cat", "y/cat"]
    write_photos(tmp_path, "._a.jpg", ".thumbnails/a.jpg", "x/.hidden.png")        # what systems leave behind
    assert list(image_files.images_in(tmp_path)) == ["x/cat", "y/cat"]
    write_photos(tmp_path, "x/cat.png")
    with pytest.raises(ValueError, match=r"found cat\.jpg and cat\.png, which differ only in their suffix"):
        image_files.images_in(tmp_path)


def test_folder_without_images_and_no_folder_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"expected photographs .* found none\. Left out: 1 \.txt"):
        image_files.images_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected toyland, voc, or a folder.*found no folder"):
        image_files.images_in(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------- pictures of every kind

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize("mode, suffix",
                         [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp"), ("CMYK", "tif")])
def test_colour_image_in_any_mode_is_the_same_rgb(tmp_path, mode, suffix):
    """What a file stores beside the colours (alpha, a palette, four inks) does not change them."""
    picture = Image.fromarray(np.stack([GREY, GREY.T.reshape(6, 8), 255 - GREY], axis=-1))
    picture.convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P"
                             else {})).save(tmp_path / f"a.{suffix}")
    found = image_files.read_image(tmp_path / f"a.{suffix}")
    assert found.mode == "RGB" and found.size == (8, 6)
    assert np.abs(np.asarray(found, int) - np.asarray(picture, int)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_image_has_three_equal_channels(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image_files.read_image(tmp_path / "a.png")),
                          np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_image_keeps_its_greys(tmp_path, suffix):
    """0..65535 becomes 0..255. Pillow's own conversion would make everything above 255 white."""
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert picture.mode.startswith("I")
    assert np.array_equal(np.asarray(image_files.read_image(tmp_path / f"a.{suffix}")),
                          np.stack([GREY] * 3, axis=-1))


def test_1_bit_image_is_black_and_white(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image_files.read_image(tmp_path / "a.png"))[..., 0], 255 * (GREY > 100))


def test_photo_is_turned_upright_as_the_camera_says(tmp_path):
    """EXIF orientation 6: the camera was held sideways. Height and width change places, as in every
    viewer."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 56).save(tmp_path / "a.jpg", exif=exif)
    found = image_files.read_image(tmp_path / "a.jpg")
    assert found.size == (40, 56)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert np.array_equal(np.asarray(found), np.asarray(stored)[::-1].transpose(1, 0, 2))
        assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(stored)))


def test_single_pixel_is_an_image(tmp_path):
    """It can be read, resized and normalised like any other."""
    Image.new("RGB", (1, 1), (255, 0, 128)).save(tmp_path / "a.png")
    tensor = data.to_tensor(data.short_side_to(image_files.read_image(tmp_path / "a.png"), 16))
    assert tensor.shape == (3, 16, 16) and torch.allclose(tensor, tensor[:, :1, :1].expand(3, 16, 16))


@pytest.mark.parametrize("keep", [0, 100, 700])
def test_truncated_jpeg_is_named(tmp_path, keep):
    """Nothing of a half picture is used; the error says which file it is."""
    photo(64, 96).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert len(whole) > 700
    (tmp_path / "cut.jpg").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"cut\.jpg: expected an image, found a file that cannot be read"):
        image_files.read_image(tmp_path / "cut.jpg")


def test_text_that_is_called_jpg_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("I am no picture")
    with pytest.raises(ValueError, match=r"a\.jpg: expected an image"):
        image_files.read_image(tmp_path / "a.jpg")


def test_missing_image_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        image_files.read_image(tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------------ the download

def test_download_fetches_voc_only_when_it_is_missing(tmp_path, monkeypatch):
    """What is there is kept; what is missing is asked of torchvision; other datasets cannot be fetched."""
    import torchvision
    asked = []
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", lambda root,
                        **how: asked.append((root, how)))
    image_files.download("voc", str(write_voc_tree(tmp_path / "here")))
    assert asked == []
    image_files.download("voc", str(tmp_path / "empty"))
    assert asked == [(str(tmp_path / "empty"), {"year": "2012", "image_set": "train", "download": True})]
    with pytest.raises(ValueError, match="--download: expected --data voc.*found photos"):
        image_files.download("photos", str(tmp_path))


def test_failed_download_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    import torchvision

    def offline(*_args, **_how):
        raise RuntimeError("Error downloading VOCtrainval_11-May-2012.tar")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", offline)
    with pytest.raises(OSError, match="could not be fetched .*unpack VOCtrainval_11-May-2012.tar"):
        image_files.download("voc", str(tmp_path))
