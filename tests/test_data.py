"""data.py: class files, the trees on disk, pictures of every kind, and batches that depend on the seed and step alone.

    python -m pytest tests/test_data.py

No real dataset is needed: the trees are written by the tests, in the layout that the archives have.
"""

import inspect
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import clip
import data
import ground_truth
import toyland
from helpers import VOC_BASE, photo, voc_colour, write_label, write_photos, write_voc_tree

WORDS = (("cat",), ("dog",))


def write_classes(folder, content: str | bytes):
    path = folder / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------------------ class files

@pytest.mark.parametrize("content", [
    "cat\ndog\n", "cat\ndog", "\n cat \n\n\tdog\n\n", "# what lives here\ncat\n  # and\ndog\n", "cat\r\ndog\r\n",
    b"\xef\xbb\xbfcat\ndog\n", "cat,\n,dog\n"],
    ids=["plain", "no last newline", "blanks", "comments", "Windows' line ends", "byte order mark", "loose commas"])
def test_class_file_holds_one_class_a_line(tmp_path, content):
    """However an editor saves the file, the same two classes come out of it."""
    assert data.read_classes(write_classes(tmp_path, content)) == WORDS


def test_synonyms_stand_after_commas_and_the_first_is_shown(tmp_path):
    """All names of a class are kept, in the file's order; the first stands for the class."""
    path = write_classes(tmp_path, "sofa, couch , settee\nKüchentisch\n")
    words = data.vocabulary("photos", str(path))
    assert words.synonyms == (("sofa", "couch", "settee"), ("Küchentisch",))
    assert words.names == ["sofa", "Küchentisch"] and len(words) == 2


@pytest.mark.parametrize("content, expected, found", [
    ("", "at least two classes", "found 0"),
    ("# cat\n\n", "at least two classes", "found 0"),
    ("cat\n", "at least two classes", "found 1"),
    ("".join(f"word {i}\n" for i in range(256)), "at most 255 classes", "found 256"),
    ("cat\ndog\nCat\n", "every name once", "found 'Cat' at class 1 and at class 3"),
    ("cat, puss\ndog, puss\n", "every name once", "found 'puss' at class 1 and at class 2"),
    ("potted plant\ndog\npotted  plant\n", "every name once", "class 3: to CLIP it is the same as 'potted plant'"),
    ("cafe\u0301\ndog\ncaf\xe9\n", "every name once", "to CLIP it is the same as"),
    ("dog\n" + "x" * 100_000, "at most 65 tokens", "found 100000 characters in 'xxx"),
    ("cat\n , ,\ndog\n", "a name for class 2", "found only commas"),
    ("cat\n" + "very " * 64 + "old dog\n", "at most 65 tokens", "found 66"),
    ("cat\n\x08\n", "names in plain words", "found '\\x08'"),
    ("cat\nKüche\n".encode("latin-1"), "UTF-8", "other bytes"),
    (b"\xff\xfec\x00a\x00t\x00\n\x00", "UTF-8", "other bytes")],
    ids=["empty", "comments alone", "one", "256", "twice", "synonym twice", "twice, spaced apart",
         "twice, in two forms of Unicode", "endless", "commas alone", "over-long", "unreadable",
         "Latin-1", "UTF-16"])
def test_unusable_class_file_is_refused_by_name(tmp_path, content, expected, found):
    """The error names the file, what was expected in it and what was found."""
    path = write_classes(tmp_path, content)
    with pytest.raises(ValueError) as error:
        data.read_classes(path)
    for part in (str(path), expected, found):
        assert part in str(error.value)


def test_missing_class_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names\.txt: expected a text file.*found no such file"):
        data.read_classes(tmp_path / "names.txt")


def test_255_classes_are_allowed(tmp_path):
    """A label picture has 256 values, one of which means ignored."""
    assert len(data.read_classes(write_classes(tmp_path, "".join(f"word {i}\n" for i in range(255))))) == 255


def test_longest_allowed_name_fits_into_every_sentence(tmp_path):
    """A name of as many tokens as are allowed can be said in all 85 sentences and leaves room for the learned prompt."""
    name = " ".join(["very"] * 64 + ["old"])
    [(longest,), _] = data.read_classes(write_classes(tmp_path, f"{name}\ncat\n"))
    assert len(clip.encode(longest)) == 65
    clip.tokenize([template.format(longest) for template in data.QUERY_TEMPLATES])           # raises if one is too long
    assert clip.CLIP(**toyland.SMALL_CLIP).prompt_room([longest]) >= 1


# ------------------------------------------------------------------------------------------ names, colours, sentences

def test_voc_has_its_20_classes_in_order_and_its_official_colours():
    """Class i has the colour that VOC's rule gives to the label value i + 1."""
    words = data.vocabulary("voc")
    assert len(words) == len(set(words.names)) == 20
    assert words.names[0] == "airplane" and words.names[10] == "dining table" and words.names[19] == "tv monitor"
    assert list(words.palette) == [voc_colour(value) for value in range(1, 21)]


def test_toyland_has_16_classes_and_colours():
    words = data.vocabulary("toyland")
    assert len(words) == len(set(words.names)) == len(set(words.palette)) == 16


def test_85_query_templates_all_different_each_with_one_place_for_the_name():
    assert len(data.QUERY_TEMPLATES) == len(set(data.QUERY_TEMPLATES)) == 85
    assert all(template.count("{}") == 1 and template.format("cat").endswith(".") for template in data.QUERY_TEMPLATES)
    assert all(template == " ".join(template.split()) for template in data.QUERY_TEMPLATES)


def test_own_classes_get_colours_of_their_own(tmp_path):
    """Different colours, none black (that is ignored); a dataset's own names keep the official ones, whatever synonyms."""
    many = data.vocabulary_of("photos", tuple((f"word {i}",) for i in range(60)))
    assert len(set(many.palette)) == 60 and (0, 0, 0) not in many.palette
    assert all(0 <= channel <= 255 for colour in many.palette for channel in colour)
    same = data.vocabulary_of("voc", tuple((name, f"some {name}") for name in data.VOC_CLASSES))
    assert list(same.palette) == data.VOC_PALETTE


def test_a_folder_needs_class_names():
    with pytest.raises(ValueError, match="--data photos: expected .* --classes FILE.*found no --classes"):
        data.vocabulary("photos")


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
    swapped = data.VOC_CLASSES[1::-1] + data.VOC_CLASSES[2:]
    assert not ground_truth.labels_fit("voc", swapped) and not ground_truth.labels_fit("voc", data.VOC_CLASSES[:3])
    assert ground_truth.labels_fit("voc", ["plane", *data.VOC_CLASSES[1:]])                 # another word for the same class
    assert ground_truth.labels_fit("voc", data.VOC_CLASSES) and ground_truth.labels_fit("photos", ["cat", "dog"])


def test_label_is_read_as_indices(tmp_path):
    """A palette PNG gives its indices, not its colours, through the table, in the label's own size."""
    values = np.array([[0, 1, 20], [255, 8, 15]])
    write_label(tmp_path / "a.png", values)
    found = ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("voc", 20), size=(2, 3))
    assert found.dtype == np.int64 and found.tolist() == [[255, 0, 19], [255, 7, 14]]


def test_unknown_label_value_is_named_with_its_file(tmp_path):
    write_label(tmp_path / "a.png", np.array([[0, 21], [77, 20]]))
    with pytest.raises(ValueError, match=r"a\.png: expected the values 0\.\.20 and 255; found \[21, 77\]"):
        ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("voc", 20), size=(2, 2))
    with pytest.raises(ValueError, match=r"expected the values 0\.\.2 and 255; found \[20, 21, 77\]"):
        ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("photos", 3), size=(2, 2))


def test_label_of_another_size_is_refused(tmp_path):
    write_label(tmp_path / "a.png", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a\.png: expected a label of 3×2 pixels.*found 2×3"):
        ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("voc", 20), size=(3, 2))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_colour_picture_is_no_label(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png: .*expected an index picture.*found mode {mode}"):
        ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("voc", 20), size=(4, 4))


def test_broken_label_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"a\.png: expected a label, found a file that cannot be used"):
        ground_truth.read_label(tmp_path / "a.png", ground_truth.lookup_table("voc", 20), size=(4, 4))


# ------------------------------------------------------------------------------------------ VOC's tree

@pytest.mark.parametrize("inside", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_folder_on_the_way_to_voc(tmp_path, inside):
    """--root may name the folder with VOCdevkit, VOCdevkit, or VOC2012: the same lists and files are found."""
    root = str(write_voc_tree(tmp_path) / inside)
    train, val = data.training_images("voc", root), data.validation_images("voc", root)
    assert list(train) == ["2007_000032", "2007_000039", "2007_000063", "2007_000068"]
    assert list(val) == ["2007_000033", "2007_000042"]
    assert all(path.is_file() and path.parent.name == "JPEGImages" for path in (*train.values(), *val.values()))
    labels = ground_truth.true_label_files("voc", root, list(val))
    assert list(labels) == list(val) and all(path.parent.name == "SegmentationClass" for path in labels.values())


def test_missing_voc_tree_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected VOCdevkit/VOC2012.* found no JPEGImages.*--download"):
        data.training_images("voc", str(tmp_path))


def test_missing_list_is_named(tmp_path):
    base = write_voc_tree(tmp_path) / VOC_BASE
    (base / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the list .*val\.txt, found none"):
        data.validation_images("voc", str(tmp_path))


def test_image_missing_from_the_folder_is_named(tmp_path):
    """A list that names a missing image: how many are missing, and the first of them."""
    base = write_voc_tree(tmp_path) / VOC_BASE
    for name in ("2007_000039", "2007_000063"):
        (base / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt names 4 images: expected all .*found 2 missing.*000039\.jpg"):
        data.training_images("voc", str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n"])
def test_empty_list_is_refused(tmp_path, content):
    (write_voc_tree(tmp_path) / VOC_BASE / "ImageSets/Segmentation/train.txt").write_text(content)
    with pytest.raises(ValueError, match=r"train\.txt: expected image ids.*found an empty list"):
        data.training_images("voc", str(tmp_path))


def test_list_of_any_line_ends_order_and_repetition(tmp_path):
    """Windows' line ends, blank lines, a second column and repetitions change nothing; ids come sorted."""
    base = write_voc_tree(tmp_path) / VOC_BASE
    (base / "ImageSets/Segmentation/train.txt").write_bytes(b"2007_000063\r\n2007_000032 1\r\n\r\n2007_000063\r\n")
    assert list(data.training_images("voc", str(tmp_path))) == ["2007_000032", "2007_000063"]


def test_training_images_need_no_label_folder(tmp_path):
    """Without SegmentationClass the training images are the same, and nothing is there to be measured."""
    before = data.training_images("voc", str(write_voc_tree(tmp_path)))
    shutil.rmtree(tmp_path / VOC_BASE / "SegmentationClass")
    assert data.training_images("voc", str(tmp_path)) == before
    assert ground_truth.true_label_files("voc", str(tmp_path), list(data.validation_images("voc", str(tmp_path)))) == {}


# ------------------------------------------------------------------------------------------ a folder of one's own

def test_folder_of_images_of_any_kind_and_depth(tmp_path):
    """Sub-folders, capital suffixes, spaces and any alphabet; sorted; other files are passed over."""
    folder = write_photos(tmp_path / "my photos", "b.JPG", "a.png", "été/кот 1.jpeg", "été/深い/x.y.webp", "c.bmp", "d.TIF")
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "folder.jpg").mkdir()
    found = data.training_images(str(folder), "unused")
    assert sorted(found) == sorted(["a", "b", "c", "d", "été/кот 1", "été/深い/x.y"])
    assert list(found.values()) == sorted(found.values()) and all(path.is_file() for path in found.values())
    assert data.validation_images(str(folder), "unused") == found


def test_two_images_that_differ_in_their_suffix_alone_are_refused(tmp_path):
    """Results are kept by name; the same stem in two folders is fine."""
    write_photos(tmp_path, "x/cat.jpg", "y/cat.jpg")
    assert list(data.images_in(tmp_path)) == ["x/cat", "y/cat"]
    write_photos(tmp_path, "._a.jpg", ".thumbnails/a.jpg", "x/.hidden.png")             # what systems leave behind
    assert list(data.images_in(tmp_path)) == ["x/cat", "y/cat"]
    write_photos(tmp_path, "x/cat.png")
    with pytest.raises(ValueError, match=r"found cat\.jpg and cat\.png, which differ only in their suffix"):
        data.images_in(tmp_path)


def test_folder_without_images_and_no_folder_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(ValueError, match="expected images .* found none"):
        data.images_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected toyland, voc, or a folder.*found no folder"):
        data.images_in(tmp_path / "nowhere")


def test_labels_of_a_folder_are_found_by_name(tmp_path):
    """--labels: those that are there; none at all, or no such folder, is an error; without --labels there are none."""
    ids = ["a", "sub/b"]
    write_label(tmp_path / "labels/sub/b.png", np.zeros((2, 2)))
    assert ground_truth.true_label_files("photos", "unused", ids, str(tmp_path / "labels")) \
        == {"sub/b": tmp_path / "labels/sub/b.png"}
    assert ground_truth.true_label_files("photos", "unused", ids) == {}
    with pytest.raises(FileNotFoundError, match="--labels .*expected a folder"):
        ground_truth.true_label_files("photos", "unused", ids, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"expected PNG files .*\(c\.png, …\), found none"):
        ground_truth.true_label_files("photos", "unused", ["c"], str(tmp_path / "labels"))


# ------------------------------------------------------------------------------------------ pictures of every kind

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp"), ("CMYK", "tif")])
def test_colour_image_in_any_mode_is_the_same_rgb(tmp_path, mode, suffix):
    """What a file stores beside the colours (alpha, a palette, four inks) does not change them."""
    picture = Image.fromarray(np.stack([GREY, GREY.T.reshape(6, 8), 255 - GREY], axis=-1))
    picture.convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {})).save(tmp_path / f"a.{suffix}")
    found = data.read_image(tmp_path / f"a.{suffix}")
    assert found.mode == "RGB" and found.size == (8, 6)
    assert np.abs(np.asarray(found, int) - np.asarray(picture, int)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_image_has_three_equal_channels(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(data.read_image(tmp_path / "a.png")), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_image_keeps_its_greys(tmp_path, suffix):
    """0..65535 becomes 0..255. Pillow's own conversion would make everything above 255 white."""
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert picture.mode.startswith("I")
    assert np.array_equal(np.asarray(data.read_image(tmp_path / f"a.{suffix}")), np.stack([GREY] * 3, axis=-1))


def test_1_bit_image_is_black_and_white(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(data.read_image(tmp_path / "a.png"))[..., 0], 255 * (GREY > 100))


def test_photo_is_turned_upright_as_the_camera_says(tmp_path):
    """EXIF orientation 6: the camera was held sideways. Height and width change places, as in every viewer."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 56).save(tmp_path / "a.jpg", exif=exif)
    found = data.read_image(tmp_path / "a.jpg")
    assert found.size == (40, 56)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert np.array_equal(np.asarray(found), np.asarray(stored)[::-1].transpose(1, 0, 2))
        assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(stored)))


def test_single_pixel_is_an_image(tmp_path):
    """It can be read, resized and normalised like any other."""
    Image.new("RGB", (1, 1), (255, 0, 128)).save(tmp_path / "a.png")
    tensor = data.to_tensor(data.short_side_to(data.read_image(tmp_path / "a.png"), 16))
    assert tensor.shape == (3, 16, 16) and torch.allclose(tensor, tensor[:, :1, :1].expand(3, 16, 16))


@pytest.mark.parametrize("keep", [0, 100, 700])
def test_truncated_jpeg_is_named(tmp_path, keep):
    """Nothing of a half picture is used; the error says which file it is."""
    photo(64, 96).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert len(whole) > 700
    (tmp_path / "cut.jpg").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"cut\.jpg: expected an image, found a file that cannot be read"):
        data.read_image(tmp_path / "cut.jpg")


def test_text_that_is_called_jpg_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("I am no picture")
    with pytest.raises(ValueError, match=r"a\.jpg: expected an image"):
        data.read_image(tmp_path / "a.jpg")


def test_missing_image_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        data.read_image(tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------------ image → tensor

def test_tensor_is_normalised_with_clips_mean_and_std():
    """(v / 255 − mean) / std per channel, in float32, as a plain tensor."""
    tensor = data.to_tensor(Image.new("RGB", (3, 2), (255, 0, 128)))
    assert type(tensor) is torch.Tensor and tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711]
    assert torch.allclose(tensor[:, 0, 0], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("size, expected", [((56, 40), (28, 20)), ((40, 56), (20, 28)), ((10, 10), (20, 20))])
def test_short_side_is_resized_and_the_shape_kept(size, expected):
    assert data.short_side_to(Image.new("RGB", size), 20).size == expected


@pytest.mark.parametrize("size, expected", [((500, 375), (448, 336)), ((500, 332), (512, 336)), ((500, 334), (496, 336)),
                                            ((1, 1), (336, 336)), ((500, 1), (2048, 16)), ((3000, 500), (2016, 336)),
                                            ((3000, 400), (2048, 272))])
def test_image_is_resized_to_whole_patches(size, expected):
    """(width, height) for a short side of 336 and patches of 16; a panorama's long side is 2048 at most."""
    assert data.short_side_to(Image.new("RGB", size), 336, multiple=16).size == expected


@pytest.mark.parametrize("size", [(200, 30), (30, 200), (64, 64), (16, 12)])
@pytest.mark.parametrize("crop", [(48, 48), (32, 64)])
def test_augmented_image_has_the_size_of_the_crop(size, crop):
    """Whatever the image's size and shape; height before width."""
    torch.manual_seed(0)
    for _ in range(4):
        image = data.augmentation(40, crop, (0.5, 2.0), distort=True)(photo(*size))
        assert tuple(image.shape) == (3, *crop) and image.dtype == torch.float32 and image.isfinite().all()


def test_what_a_crop_lacks_is_zero_after_normalisation():
    """Zero is CLIP's mean colour: a white image in a larger crop has white places and places of exactly 0."""
    torch.manual_seed(0)
    image = data.augmentation(16, (40, 40), (1.0, 1.0), distort=False)(Image.new("RGB", (16, 16), "white"))
    white = data.to_tensor(Image.new("RGB", (1, 1), "white"))
    filled = (image == 0).all(dim=0)
    assert 0 < filled.sum() < 40 * 40
    assert torch.allclose(image[:, ~filled], white.view(3, 1).expand(3, int((~filled).sum())), atol=1e-5)


def test_augmentation_flips_scales_and_crops():
    """A few draws of one image: different pictures, some of them mirrored when nothing else may change."""
    image = photo(32, 32)
    torch.manual_seed(0)
    draws = [data.augmentation(32, (24, 24), (0.5, 2.0), distort=True)(image) for _ in range(8)]
    assert len({draw.sum().item() for draw in draws}) == 8
    shares = [(data.augmentation(16, (64, 64), (0.5, 2.0), distort=False)(image) != 0).float().mean() for _ in range(16)]
    assert min(shares) < 0.5 ** 2 / 16 * 3 and max(shares) > 1.5 ** 2 / 16         # of the crop's area: (ratio · 16 / 64)²
    flip_only = data.augmentation(32, (32, 32), (1.0, 1.0), distort=False)
    seen = {tuple(flip_only(image).flatten().tolist()) for _ in range(16)}
    whole = data.to_tensor(image)
    assert seen == {tuple(whole.flatten().tolist()), tuple(whole.flip(dims=(2,)).flatten().tolist())}


# ------------------------------------------------------------------------------------------ training images

@pytest.fixture
def seven(tmp_path):
    return data.images_in(write_photos(tmp_path / "seven", *(f"{letter}.png" for letter in "abcdefg")))


def batches_of(images, first_step=0, steps=9, seed=0, workers=0, batch_size=2):
    """All batches as (pixels, ids), with an augmentation that is random in every way."""
    transform = data.augmentation(24, (24, 24), (0.5, 2.0), distort=True)
    dataset = data.TrainingImages(images, transform, seed)
    return list(data.training_batches(dataset, batch_size=batch_size, first_step=first_step, steps=steps, seed=seed,
                                      workers=workers))


def assert_same_batches(found, expected):
    assert len(found) == len(expected) and len(expected) > 0
    for (images, ids), (expected_images, expected_ids) in zip(found, expected):
        assert list(ids) == list(expected_ids) and torch.equal(images, expected_images)


def test_training_images_have_no_way_to_a_label(seven):
    """The class is handed image paths, a transform and a seed, and gives an image and its id: nothing else is there."""
    assert list(inspect.signature(data.TrainingImages).parameters) == ["images", "transform", "seed"]
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (1.0, 1.0), distort=False), seed=0)
    item = dataset[0, 1]
    assert len(dataset) == 7 and len(item) == 2 and item[1] == "b"
    assert item[0].shape == (3, 24, 24) and type(item[0]) is torch.Tensor
    assert dataset.paths == list(seven.values()) and not isinstance(dataset, ground_truth.LabelledImages)


def test_same_seed_same_batches_other_seed_others(seven):
    assert_same_batches(batches_of(seven), batches_of(seven))
    others = batches_of(seven, seed=1)
    assert any(list(ids) != list(other) for (_, ids), (_, other) in zip(batches_of(seven), others))


def test_batches_do_not_depend_on_the_number_of_workers(seven):
    assert_same_batches(batches_of(seven, steps=4, workers=2), batches_of(seven, steps=4))


@pytest.mark.parametrize("first_step", [1, 3, 4, 8])
def test_resumed_batches_are_those_of_the_uninterrupted_run(seven, first_step):
    """Also in the middle of an epoch (three steps each here)."""
    assert_same_batches(batches_of(seven, first_step=first_step), batches_of(seven)[first_step:])


def test_every_epoch_is_a_fresh_permutation():
    """Each image at most once an epoch, a last batch that is not full is dropped, and orders differ between epochs."""
    per_epoch = data.steps_per_epoch(7, 2)
    assert per_epoch == 3
    batches = list(data.Batches(7, 2, first_step=0, steps=4 * per_epoch, seed=0))
    orders = []
    for epoch in range(4):
        items = [item for batch in batches[epoch * per_epoch:(epoch + 1) * per_epoch] for item in batch]
        assert [number for number, _ in items] == [epoch] * 6
        orders.append([index for _, index in items])
        assert len(set(orders[-1])) == 6 and set(orders[-1]) <= set(range(7))
    assert len({tuple(order) for order in orders}) == 4
    whole = [index for batch in data.Batches(6, 2, 0, 3, seed=0) for _, index in batch]
    assert sorted(whole) == list(range(6))


def test_fewer_images_than_a_batch_make_one_batch_an_epoch(seven):
    assert data.steps_per_epoch(7, 16) == 1
    found = batches_of(seven, steps=2, batch_size=16)
    assert [sorted(ids) for _, ids in found] == [sorted(seven)] * 2


def test_an_image_looks_different_in_every_epoch(seven):
    """The augmentation is a function of (seed, epoch, index), not of the index alone."""
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (0.5, 2.0), distort=True), seed=0)
    assert torch.equal(dataset[0, 1][0], dataset[0, 1][0]) and not torch.equal(dataset[0, 1][0], dataset[1, 1][0])


def test_drawing_an_augmentation_leaves_the_global_generator_alone(seven):
    """Otherwise whatever else draws from it would depend on the number of images that were read."""
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (0.5, 2.0), distort=True), seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_ctrl_c_does_not_kill_the_processes_that_decode(seven):
    """A terminal sends it to every process; were the decoders to die, the step could not end and nothing be saved."""
    transform = data.augmentation(24, (24, 24), (1.0, 1.0), distort=False)
    batches = iter(data.training_batches(data.TrainingImages(seven, transform, seed=0), batch_size=1, first_step=0, steps=40, seed=0,
                                      workers=1))
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39 and all(worker.exitcode in (0, None) for worker in batches._workers)


# ------------------------------------------------------------------------------------------ evaluation images

def test_labelled_images_pair_an_image_with_its_label_at_its_own_size(tmp_path):
    """The image is resized, the label is not; an image without a label is left out."""
    write_voc_tree(tmp_path)
    images = data.validation_images("voc", str(tmp_path))
    labels = ground_truth.true_label_files("voc", str(tmp_path), list(images))
    labels.pop("2007_000033")
    dataset = ground_truth.LabelledImages(images, labels, ground_truth.lookup_table("voc", 20), short_side=20)
    assert len(dataset) == 1
    name, image, true_label = dataset[0]
    assert name == "2007_000042" and image.shape == (3, 20, 28) and true_label.shape == (40, 56)
    with Image.open(labels[name]) as picture:
        values = torch.from_numpy(np.array(picture)).long()
    assert torch.equal(true_label, torch.where((values == 0) | (values == 255), 255, values - 1))


def test_label_that_does_not_belong_to_its_image_is_named(tmp_path):
    write_photos(tmp_path, "a.png")
    write_label(tmp_path / "label.png", np.zeros((8, 8)))
    dataset = ground_truth.LabelledImages({"a": tmp_path / "a.png"}, {"a": tmp_path / "label.png"}, ground_truth.lookup_table("photos", 2), 16)
    with pytest.raises(ValueError, match=r"label\.png: expected a label of 40×56 pixels.*found 8×8"):
        dataset[0]


# ------------------------------------------------------------------------------------------ the download

def test_download_fetches_voc_only_when_it_is_missing(tmp_path, monkeypatch):
    """What is there is kept; what is missing is asked of torchvision; other datasets cannot be fetched."""
    import torchvision
    asked = []
    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", lambda root, **how: asked.append((root, how)))
    data.download("voc", str(write_voc_tree(tmp_path / "here")))
    assert asked == []
    data.download("voc", str(tmp_path / "empty"))
    assert asked == [(str(tmp_path / "empty"), {"year": "2012", "image_set": "train", "download": True})]
    with pytest.raises(ValueError, match="--download: expected --data voc.*found photos"):
        data.download("photos", str(tmp_path))


def test_failed_download_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    import torchvision

    def offline(*_args, **_how):
        raise RuntimeError("Error downloading VOCtrainval_11-May-2012.tar")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", offline)
    with pytest.raises(OSError, match="could not be fetched .*unpack VOCtrainval_11-May-2012.tar"):
        data.download("voc", str(tmp_path))
