"""Files as people have them: every kind is read rightly, refused, or told. Never silently something else.

    python -m pytest tests/test_field.py             # some 800 generated cases

Two tables are walked whole. Labels: every (mode × palette × values × format) that Pillow can write. Listings:
every (name of a mask × place × ending × letter case × spelling). Each other kind of a public report has a
test of its own name.
"""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import rectify
import segment
from conftest import ROOT
from datasets import DATASETS, check, images, labels, words
from helpers import photo, refusal, run, write_label, write_photos, write_public_tree, write_voc_tree

NAMES = "sky\ngrass\nwall\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text(NAMES)
    return tmp_path


# ---------------------------------------------------------------------------------- labels, every combination

MODES = ["1", "L", "P", "I;16", "I", "F", "RGB", "RGBA", "LA", "CMYK"]
PALETTES = {"none": None, "grey": [(k, k, k) for k in range(256)],
            "colours": [(k, 255 - k, 7) for k in range(256)]}
VALUES = {"classes": [0, 1, 2], "with 255": [0, 1, 255], "two": [0, 1], "one too many": [0, 1, 3],
          "a colour": [0, 128]}
FORMATS = {"png": {}, "tif": {}, "bmp": {}, "gif": {}, "webp": {"lossless": True}, "jpg": {}}


def written(path: Path, mode: str, palette, values: list[int], ending: str) -> bool:
    """Write blocks of the values in a mode and format; False where Pillow has no such file."""
    blocks = np.resize(np.array(values, dtype=np.uint8), (5, 7)).repeat(8, axis=0).repeat(8, axis=1)
    picture = Image.fromarray(blocks)
    if mode == "P":
        picture = picture.copy()
        picture.putpalette([channel for rgb in palette or PALETTES["colours"] for channel in rgb])
    elif mode in ("I;16", "I", "F"):
        picture = Image.fromarray(blocks.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    elif mode == "1":
        picture = Image.fromarray(blocks > 0)
    else:
        picture = picture.convert(mode)
    try:
        picture.save(path, **FORMATS[ending])
        with Image.open(path) as opened:
            opened.load()
        return True
    except (OSError, KeyError, ValueError):
        path.unlink(missing_ok=True)
        return False


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("mode, palette",
                         [*((mode, "none") for mode in MODES), ("P", "grey"), ("P", "colours")])
@pytest.mark.parametrize("values", VALUES)
def test_label_is_read_rightly_or_refused(tmp_path, mode, palette, values, ending):
    """What comes out are the very values that were meant; or a paragraph that names the file. Nothing in
    between."""
    path = tmp_path / f"a.{ending}"
    if not written(path, mode, PALETTES[palette], VALUES[values], ending):
        pytest.skip("Pillow writes no such file")
    meant = np.resize(np.array(VALUES[values]), (5, 7)).repeat(8, axis=0).repeat(8, axis=1)
    if mode == "1":
        meant = (meant > 0).astype(int)
    try:
        found = labels.LabelReader("photos", 3)(path, (40, 56))
    except ValueError as error:
        assert str(path) in str(error) and "expected" in str(error) and "found" in str(error)
        readable = mode in ("1", "L", "P") and set(np.unique(meant)) <= {0, 1, 2, 255}
        assert not (readable and ending in ("png", "tif")), str(error)         # these must be read
        return
    assert np.array_equal(found, meant)


# -------------------------------------------------------------------------------- listings, every combination

MASKS = ["{}_mask", "{}_masks", "{}-mask", "{}_seg", "{}_parts_1", "{}_label", "{}_labels", "{}_labelIds",
         "{}_gtFine_labelTrainIds", "{}_gtFine_color", "{}_gt", "{}.mask", "instance_000_{}"]
FOLDERS = ["SegmentationClass", "SegmentationObject", "masks", "labels", "annotations", "gtFine",
           "ground_truth"]
SPELLINGS = {"NFC": "Früh", "NFD": unicodedata.normalize("NFD", "Früh"), "plain": "0001"}


@pytest.mark.parametrize("ending", [".png", ".PNG", ".tif", ".bmp"])
@pytest.mark.parametrize("linked", [False, True], ids=["plain", "linked"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("place", [*MASKS, *(f"{name}/{{}}" for name in FOLDERS),
                                   *(f"{name.upper()}/deep/{{}}" for name in FOLDERS), "elsewhere/{}"])
def test_mask_among_the_photographs_is_left_out_and_told(folder, capsys, place, spelling, linked, ending):
    """Whatever it is called and wherever it lies; the photograph itself stays, also behind a linked
    folder."""
    name = SPELLINGS[spelling]
    write_photos(folder / "real", f"trip/{name}.jpg")
    write_label(folder / "real/trip" / f"{place.format(name)}{ending}", np.zeros((40, 56)))
    (folder / "photos").mkdir()
    if linked:
        (folder / "photos/trip").symlink_to(folder / "real/trip")
        (folder / "real/trip/back").symlink_to(folder / "photos")  # a link that leads back is no endless walk
    else:
        (folder / "real/trip").rename(folder / "photos/trip")
    found = images.training_images("photos", "data")
    assert [path.suffix for path in found.values()] == [".jpg"] and len(found) == 1
    assert "Left out: 1 masks" in capsys.readouterr().out


def test_index_pictures_of_other_pngs_are_left_out(folder, capsys):
    """No name betrays them: out/1.png holds numbers, in/1.png colours. Frames of two films stay."""
    write_photos(folder / "photos", "in/1.png", "in/2.png", "again/1.png")
    for name in "12":
        write_label(Path(f"photos/out/{name}.png"), np.zeros((40, 56)))
    assert list(images.training_images("photos", "data")) == ["again/1", "in/1", "in/2"]
    assert "Left out: 2 masks (out/1.png, out/2.png)" in capsys.readouterr().out


@pytest.mark.parametrize("ending", sorted(images.image_suffixes()))
def test_every_format_that_pillow_reads_is_listed(folder, ending):
    """Lower case and upper case alike."""
    write_photos(folder / "photos", "a.jpg")
    for name in (f"b{ending}", f"C{ending.upper()}"):
        (folder / "photos" / name).write_bytes(b"not opened by a listing")
    assert set(images.training_images("photos", "data")) == {"a", "b", "C"}


def test_files_that_are_no_photographs_are_counted_by_kind(folder, capsys):
    write_photos(folder / "photos", "a.jpg")
    for name in ("b.heic", "c.heic", "notes.txt", "README"):
        (folder / "photos" / name).write_bytes(b"x")
    assert len(images.training_images("photos", "data")) == 1
    said = capsys.readouterr().out
    assert "photos: 1 photographs. Left out: 2 .heic (convert to JPEG), 1 .txt, 1 no ending." in said


def test_photographs_of_linked_folders_count_in_every_layout(folder):
    """Cityscapes whose cities are links: a part of them is no longer silently missing."""
    base = write_public_tree("cityscapes", folder / "data")
    before = {split: images.image_files("cityscapes", "data", split) for split in ("train", "val")}
    for kind in ("leftImg8bit", "gtFine"):
        (base / kind / "train/ulm").rename(folder / f"{kind} ulm")
        (base / kind / "train/ulm").symlink_to(folder / f"{kind} ulm")
    for split, expected in before.items():
        found = images.image_files("cityscapes", "data", split)
        assert list(found) == list(expected)
        assert list(labels.label_files("cityscapes", "data", split, list(found))) == list(expected)


# ------------------------------------------------------------------------------- no label is listed or opened

WATCHED = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import pytest
import helpers
import rectify
helpers.quick_recipes(pytest.MonkeyPatch(), Path("weights"))
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
rectify.main(rectify.flags().parse_args(["--data", "photos", "--classes", "names.txt", "--clip", {clip!r},
                                         "--device", "cpu", "--epochs", "1"]))
print(json.dumps(opened))
"""


def test_training_opens_no_file_that_is_named_like_a_label(folder, tiny_clip):
    """All habits of naming at once, seen from the interpreter, which reports every file that is opened."""
    (folder / "weights").mkdir()
    write_photos(folder / "photos", "a.jpg", "b.jpg")
    secret = [place.format("a") for place in (*MASKS, *(f"{name}/{{}}" for name in FOLDERS), "elsewhere/{}")]
    for name in secret:
        write_label(folder / "photos" / f"{name}.png", np.zeros((40, 56)))
    program = WATCHED.format(root=str(ROOT), tests=str(ROOT / "tests"), clip=str(tiny_clip))
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    opened = json.loads(result.stdout.splitlines()[-1])
    assert any("photos/a.jpg" in path for path in opened)
    assert not [path for path in opened if "photos" in path and path.endswith(".png") and "runs" not in path]


# ---------------------------------------------------------------------------- values that mean something else

def test_masks_of_0_and_255_for_two_classes_are_refused(folder, capsys):
    """255 is "ignored": with it the second class has no pixel, and mIoU is half of what it should be."""
    write_photos(folder / "photos", "a.jpg", "b.jpg")
    Path("names.txt").write_text("sky\ngrass\n")
    for name in "ab":
        write_label(Path(f"truth/{name}.png"), np.arange(40)[:, None].repeat(56, 1) // 20 * 255)
    flags = ["--data", "photos", "--classes", "names.txt", "--labels", "truth"]
    assert "write 1 instead" in refusal(capsys, evaluate, *flags, "--clip", "toyland")
    problems = check.main(check.flags().parse_args(flags))
    assert len(problems) == 1 and "write 1 instead" in problems[0]
    assert "All is well" not in capsys.readouterr().out


def test_class_without_a_pixel_beside_much_that_is_ignored_is_not_all_well(folder, capsys):
    write_photos(folder / "photos", "a.jpg")
    values = np.zeros((40, 56))
    values[:10] = 1
    values[20:] = 255
    write_label(Path("truth/a.png"), values)
    flags = ["--data", "photos", "--classes", "names.txt", "--labels", "truth"]
    [problem] = check.main(check.flags().parse_args(flags))
    assert "found none of wall, and 50% of all pixels ignored" in problem


def test_check_says_what_it_cannot_know(folder, capsys):
    write_photos(folder / "photos", "a.jpg")
    write_label(Path("truth/a.png"), np.arange(40)[:, None].repeat(56, 1) % 3)
    flags = ["--data", "photos", "--classes", "names.txt", "--labels", "truth"]
    assert check.main(check.flags().parse_args(flags)) == []
    said = capsys.readouterr().out
    assert "Not known:" in said and "which value is which class" in said \
        and "All is well in what was compared" in said


def palette_of(colours: list[tuple[int, int, int]]) -> list[int]:
    return [channel for rgb in colours for channel in rgb]


def test_palette_that_a_tool_sorted_anew_is_refused(folder):
    """One value has one colour over all files. A palette of greys, or none, says nothing and is taken."""
    reader = labels.LabelReader("photos", 3)
    colours = [(10, 20, 30), (200, 0, 0), (0, 200, 0)]
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        picture = Image.fromarray(np.resize(np.arange(3, dtype=np.uint8), (4, 6)))
        picture.putpalette(palette_of([colours[k] for k in order]))
        picture.save(f"{name}.png")
    Image.fromarray(np.resize(np.arange(3, dtype=np.uint8), (4, 6))).save("grey.png")
    for name in ("a", "grey", "a"):
        reader(Path(f"{name}.png"), (4, 6))
    with pytest.raises(ValueError,
                       match=r"b\.png: expected the value 0 to have the colour \(10, 20, 30\) as in a\.png"):
        reader(Path("b.png"), (4, 6))


def test_labels_of_voc_have_vocs_own_palette(folder):
    write_voc_tree(folder / "data")
    path = next((folder / "data/VOCdevkit/VOC2012/SegmentationClass").iterdir())
    labels.LabelReader("voc", 20)(path, (40, 56))
    with Image.open(path) as picture:
        values, colours = np.array(picture), picture.getpalette()
    sorted_anew = Image.fromarray(np.where(values == 1, 2, np.where(values == 2, 1, values)).astype(np.uint8))
    colours[3:6], colours[6:9] = colours[6:9], colours[3:6]
    sorted_anew.putpalette(colours)
    sorted_anew.save(path)
    if {1, 2} & set(np.unique(values).tolist()):
        with pytest.raises(ValueError, match="the dataset's own colours"):
            labels.LabelReader("voc", 20)(path, (40, 56))


def test_lossy_labels_are_refused_whatever_they_are_called(folder):
    write_label(Path("a.png"), np.zeros((40, 56)))
    Image.open("a.png").convert("L").save("b.png", format="JPEG")
    with pytest.raises(ValueError, match=r"b\.png: .*expected a lossless file, found JPEG"):
        labels.LabelReader("photos", 3)(Path("b.png"), (40, 56))


def test_colour_labels_are_refused_with_the_way_to_convert_them(folder):
    Image.new("RGB", (56, 40), "red").save("a.png")
    with pytest.raises(ValueError, match="Colours must become class numbers: write one number a pixel"):
        labels.LabelReader("photos", 3)(Path("a.png"), (40, 56))


def test_ade_labels_reduced_by_one_are_refused(folder):
    """0..149 and 255: official files hold no 255."""
    Image.fromarray(np.resize(np.array([0, 7, 149, 255], dtype=np.uint8), (8, 8))).save("a.png")
    with pytest.raises(ValueError, match="expected the values 0..150; found .255.*every class one lower"):
        labels.LabelReader("ade", 150)(Path("a.png"), (8, 8))


@pytest.mark.parametrize("value", [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90])
def test_coco_ids_that_never_occur_refuse(folder, value):
    Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save("a.png")
    with pytest.raises(ValueError, match="in another numbering.*pixelmaps"):
        labels.LabelReader("coco", 27)(Path("a.png"), (8, 8))


# -------------------------------------------------------------------------------- class lists in other syntax

SAME = [("sky",), ("grass",), ("wall",)]


@pytest.mark.parametrize("text", [
    "sky\ngrass\nwall\n", "\ufeffsky\ngrass\nwall", "s\u200bky\ngra\u200dss\nwall\n",
                                  "0: sky\n1: grass\n2: wall\n",
    "0,sky\n1,grass\n2,wall\n", "0 sky\n1 grass\n2 wall\n", "0\tsky\n1\tgrass\n2\twall\n",
                                  "“sky”\n\"grass\"\n«wall»\n",
    "- sky\n- grass\n- wall\n", '["sky", "grass", "wall"]', '{"0": "sky", "1": "grass", "2": "wall"}',
    '{"sky": 0, "wall": 2, "grass": 1}',
    '[{"id": 1, "name": "sky"}, {"id": 2, "name": "grass"}, {"name": "wall"}]',
    '{"categories": [{"name": "sky"}, {"name": "grass"}, {"name": "wall"}]}',
    "# label:color_rgb:parts:actions\nsky:51,221,255::\ngrass:250,50,83::\nwall:184,61,245::\n",
    "__ignore__\nsky\ngrass\nwall\n", "Pixel Value, Class\n0, sky\n1, grass\n2, wall\n"])
def test_class_list_of_another_program_is_read_on_purpose(folder, text):
    Path("other.txt").write_text(text, encoding="utf-8")
    assert [tuple(names) for names in words.read_classes(Path("other.txt"))] == SAME


def test_semicolons_stand_between_synonyms(folder):
    Path("other.txt").write_text("sky; heaven\ngrass\n")
    assert words.read_classes(Path("other.txt")) == (("sky", "heaven"), ("grass",))


@pytest.mark.parametrize("text, said", [("1: sky\n2: grass\n", "numbers that count from 0"),
                                        ("0: sky\n2: grass\n", "count from 0"),
                                        ("sky; grass; wall\n", "at least two classes, found 1"),
                                        ('{"a": {"b": 1}}', "JSON")])
def test_class_list_that_would_be_misread_is_refused(folder, text, said):
    Path("other.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        words.read_classes(Path("other.txt"))


# ----------------------------------------------------------------------------------------- a part of the data

@pytest.mark.parametrize("given", ["a.PNG", "A.png", "Früh.png"])
def test_label_is_found_whatever_its_case_and_spelling(folder, capsys, given):
    write_photos(folder / "photos", "a.jpg", f"{unicodedata.normalize('NFD', 'früh')}.jpg", "c.jpg")
    write_label(Path("truth", given), np.zeros((40, 56)))
    ids = list(images.training_images("photos", "data"))
    found = labels.true_label_files("photos", "data", "all", ids, "truth")
    assert [path.name for path in found.values()] == [given]
    assert "1 of 3 images have a label" in capsys.readouterr().out


def test_numbers_of_a_part_say_of_how_many(folder, capsys):
    """In the line that people read."""
    write_photos(folder / "photos", "a.jpg", "b.jpg", "c.jpg")
    write_label(Path("truth/a.png"), np.zeros((40, 56)))
    run(evaluate, "--data", "photos", "--classes", "names.txt", "--labels", "truth", "--clip", "toyland")
    assert "photos: 1 of 3 images, 3 classes" in capsys.readouterr().out


def test_list_with_paths_instead_of_ids_is_refused(folder, capsys):
    write_voc_tree(folder / "data")
    path = folder / "data/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_text("".join(f"JPEGImages/{line}.jpg\n" for line in path.read_text().split()))
    with pytest.raises(ValueError,
                       match="expected ids alone, one a line .as 2007_000032.; found a path or a file name"):
        images.training_images("voc", "data")


def test_two_photographs_of_one_name_keep_two_results(folder, capsys):
    write_photos(folder, "a/1.jpg", "b/1.jpg")
    for name in "ab":
        run(segment, f"{name}/1.jpg", "--classes", "sky, grass", "--clip", "toyland")
    assert sorted(path.name for path in Path("runs/segment").iterdir()) \
        == ["1_index.png", "1_overlay.png", "b_1_index.png", "b_1_overlay.png"]
    assert "is of another photo called 1, and stays" in capsys.readouterr().out
    # the same photo again: the same names
    run(segment, "a/1.jpg", "--classes", "sky, grass", "--clip", "toyland")
    assert len(list(Path("runs/segment").iterdir())) == 4


# ------------------------------------------------------------------------------------ geometry and appearance

def turned_photo(path: Path, orientation: int, height: int = 40, width: int = 56) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(height, width).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_turned_by_exif_are_counted_and_told(folder, capsys, orientation):
    """Where both sides are equal no size can tell: so it is said that labels are taken as upright."""
    turned_photo(folder / "photos/a.jpg", orientation, 48, 48)
    write_label(Path("truth/a.png"), np.zeros((48, 48)))
    run(evaluate, "--data", "photos", "--classes", "names.txt", "--labels", "truth", "--clip", "toyland")
    said = capsys.readouterr().out
    told = "1 of 1 photographs are turned by their EXIF orientation. Labels are taken as upright" in said
    assert told == (orientation != 1)


def test_label_with_swapped_sides_names_exif(folder):
    write_label(Path("a.png"), np.zeros((40, 56)))
    with pytest.raises(ValueError,
                       match="sides are swapped: was the photograph turned by its EXIF orientation"):
        labels.LabelReader("photos", 3)(Path("a.png"), (56, 40))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_background(folder, mode):
    """A cut-out: what hides under alpha 0 is not segmented."""
    picture = Image.new("RGBA", (64, 48), (200, 30, 30, 255))
    picture.paste((0, 255, 0, 0), (0, 0, 32, 48))
    picture = picture.quantize() if mode == "P" else picture.convert(mode)
    picture.save("cut.png")
    assert np.asarray(images.read_image(Path("cut.png")))[:, :31].min() == 255
    run(segment, "cut.png", "--classes", "sky, grass", "--clip", "toyland")
    index = np.array(Image.open("runs/segment/cut_index.png"))
    assert (index[:, :31] == 255).all() and (index[:, 33:] != 255).all()


def test_names_that_the_font_lacks_are_numbers_in_the_legend():
    assert evaluate.drawable(["Ёлка", "crème brûlée", "天空",
                              "sky"]) == ["Ёлка", "crème brûlée", "class 2", "sky"]


def test_words_beyond_english_are_told_once(folder, capsys):
    write_photos(folder, "a.jpg")
    run(segment, "a.jpg", "--classes", "天空, 草地", "--clip", "toyland")
    assert capsys.readouterr().out.count("CLIP learned from English captions") == 1


# -------------------------------------------------------------------------------------- resources, small lies

def test_picture_beyond_pillows_limit_is_named_as_such(folder, monkeypatch):
    write_photos(folder, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError,
                       match="a.png: expected at most 0 megapixels, Pillow's limit .* Scale it down"):
        images.read_image(Path("a.png"))


def test_classes_of_a_large_photograph_are_upsampled_a_few_at_a_time(monkeypatch):
    """The result does not depend on the budget of memory."""
    logits = torch.randn(1, 20, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(logits, size=(50, 70), mode="bilinear")[0].argmax(dim=0)
    for budget in (1, 3500 * 3, 2 ** 25):
        monkeypatch.setattr(evaluate, "BUDGET", budget)
        assert torch.equal(evaluate.best_class(logits, (50, 70))[0].long(), expected)


@pytest.mark.parametrize("error", [MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")])
def test_out_of_memory_is_one_paragraph(folder, capsys, monkeypatch, error):
    def fail(*_):
        raise error
    write_photos(folder, "a.jpg")
    monkeypatch.setattr(evaluate, "best_class", fail)
    said = refusal(capsys, segment, "a.jpg", "--classes", "sky, grass", "--clip", "toyland")
    assert "expected enough memory, found too little" in said


def test_second_run_into_a_folder_says_what_it_replaces(folder, tiny_clip, monkeypatch, capsys):
    from helpers import quick_recipes
    (folder / "weights").mkdir()
    quick_recipes(monkeypatch, folder / "weights")
    write_photos(folder / "photos", "a.jpg", "b.jpg")
    flags = ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip, "--epochs", "1"]
    run(rectify, *flags)
    assert "is of an earlier run" not in capsys.readouterr().out
    run(rectify, *flags, "--seed", "1")
    assert "checkpoint.pt is of an earlier run, and is replaced when this one ends" in capsys.readouterr().out


def test_every_public_dataset_describes_what_other_values_are():
    """ADE and COCO are the two whose labels circulate in another numbering that no value of its own
    betrays."""
    assert {name for name, dataset in DATASETS.items() if dataset.other_values} == {"ade", "coco"}


# ------------------------------------------------------------------- a second look at names, files and lists

MORE_MASKS = ["{}_mask_1", "mask_1_{}_mask", "{}_gt_1", "{}_gtFine_instanceIds", "{}_segmentation_color",
              "{}_semantic",
              "{}_label_color", "{}_labelme", "{}_masked", "{}_L", "{}_color", "{}_instanceIds"]
MORE_FOLDERS = ["trainannot", "train_masks", "label_images", "SegmentationClassRaw", "SegmentationClassPNG",
                "maskImages", "semantic_rgb", "Ground Truth", "val_labels", "annotations_v2"]


@pytest.mark.parametrize("ending", [".png", ".BMP"])
@pytest.mark.parametrize("place", [*(f"elsewhere/{name}" for name in MORE_MASKS), *MORE_MASKS,
                                   *(f"{name}/9{{}}" for name in MORE_FOLDERS)])
def test_mask_by_a_word_of_its_name_is_left_out_and_told(folder, capsys, place, ending):
    """CamVid's, CVAT's and labelme's other habits; in a folder of masks no photograph has its name."""
    write_photos(folder / "photos", "trip/0001.jpg")
    write_label(folder / "photos/trip" / f"{place.format('0001')}{ending}", np.zeros((40, 56)))
    assert list(images.training_images("photos", "data")) == ["trip/0001"]
    assert "photos: 1 photographs. Left out: 1 masks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sunset", "IMG_0001", "market", "segovia", "labrador", "instant",
                                  "ground/floor",
                                  "summer 2020/a", "beach_2", "maskerade_venice_7x", "color/a",
                                  "truck", "L/1"])
def test_photograph_with_a_plain_name_stays(folder, capsys, name):
    write_photos(folder / "photos", f"{name}.png", "other.jpg")
    assert set(images.training_images("photos", "data")) == {name, "other"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_two_folders_of_the_same_names_are_refused(folder, ending):
    """PNG photographs and PNG masks in folders that say nothing: no name tells them apart."""
    for name in ("0", "1"):
        write_photos(folder / "photos", f"in/{name}.png", f"out/{name}{ending}")
    with pytest.raises(ValueError, match="--data photos: expected photographs alone; found 2 files in"):
        images.training_images("photos", "data")
    write_photos(folder / "photos", "in/2.png")                             # films whose frames are counted
    assert len(images.training_images("photos", "data")) == 5


def test_label_beside_the_images_of_a_layout_is_no_image(folder, capsys, monkeypatch):
    """0001_L.png fits the images' pattern {id}.png too; what else lies there is counted."""
    from dataclasses import replace
    pets = replace(DATASETS["ade"], places=["pets"], images="all/{split}/{id}.png",
                   labels={"indices": "all/{split}/{id}_t.png"})
    monkeypatch.setitem(DATASETS, "pets", pets)
    write_photos(folder / "data/pets/all/training", "1.png", "2.png", "1_t.png", "2_t.png", "3_mask.png",
                 "4.jpg")
    assert list(images.training_images("pets", "data")) == ["1", "2"]
    assert "pets, train: 2 photographs. Left out: 3 masks" in capsys.readouterr().out
    assert list(labels.label_files("pets", "data", "train", ["1", "2"])) == ["1", "2"]


def test_two_files_of_one_id_are_refused_in_a_layout(folder):
    base = write_public_tree("ade", folder / "data")
    write_photos(base / "images/training", "ADE_train_00000001.JPG")
    with pytest.raises(ValueError, match="expected every name once, found ADE_train_00000001.JPG and"):
        images.training_images("ade", "data")


@pytest.mark.parametrize("line, said", [("JPEGImages/{}", "ids alone"), ("{}.png", "ids alone"),
                                        ("./{}.jpg", "ids alone"),
                                        ("JPEGImages\\{}.jpg", "ids alone"),
                                        ("{}_mask", "called like a mask")])
def test_list_of_other_things_than_ids_is_refused(folder, line, said):
    write_voc_tree(folder / "data")
    write_photos(folder / "data/VOCdevkit/VOC2012/JPEGImages", "2007_000032_mask.jpg")
    path = folder / "data/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_text(line.format("2007_000032") + "\n")
    with pytest.raises(ValueError, match=said):
        images.training_images("voc", "data")


def test_ids_of_a_list_may_hold_spaces(folder):
    write_voc_tree(folder / "data")
    base = folder / "data/VOCdevkit/VOC2012"
    write_photos(base / "JPEGImages", "plage été.jpg", "plage.jpg")
    (base / "ImageSets/Segmentation/train.txt").write_text("plage été\n2007_000032 1\n", encoding="utf-8")
    assert list(images.training_images("voc", "data")) == ["2007_000032", "plage été"]


def test_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    """os.walk passes over it without a word."""
    write_photos(folder / "photos", "a.jpg", "b/c.jpg")
    seen = images.os.scandir
    def closed(place):
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied", str(place))
        return seen(place)
    monkeypatch.setattr(images.os, "scandir", closed)
    with pytest.raises(PermissionError):
        images.training_images("photos", "data")


VALUES_3 = np.resize(np.array([0, 7, 11], dtype=np.uint8), (8, 9))


def read_12(path: str, size=(8, 9), data: str = "photos", classes: int = 12) -> np.ndarray:
    return labels.LabelReader(data, classes)(Path(path), size)


def test_tiff_label_with_jpeg_inside_is_refused(folder):
    Image.fromarray(VALUES_3).save("a.tif", compression="jpeg")
    with pytest.raises(ValueError, match="expected a lossless file, found TIFF"):
        read_12("a.tif", classes=200)
    Image.fromarray(VALUES_3).save("b.tif", compression="tiff_lzw")
    assert np.array_equal(read_12("b.tif"), VALUES_3)


def test_label_of_two_pages_is_refused(folder):
    picture = Image.fromarray(VALUES_3)
    picture.save("a.tif", save_all=True, append_images=[picture])
    with pytest.raises(ValueError, match="expected one picture, found 2 in one file"):
        read_12("a.tif")


def test_pgm_whose_values_are_stretched_is_refused(folder):
    Path("a.pgm").write_bytes(b"P5\n3 1\n11\n" + bytes([0, 7, 11]))
    with pytest.raises(ValueError, match="found PPM"):
        read_12("a.pgm", (1, 3), classes=255)


def test_four_bit_greys_are_refused(folder):
    """Pillow stretches them: the value 1 would be read as 17, which may be a class."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n"
                              + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0))
                              + chunk(b"IDAT", zlib.compress(b"\0\x01")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="expected 8 bits a pixel, found greys stored as L;4"):
        read_12("a.png", (1, 2), classes=60)


def test_greys_that_a_program_numbered_anew_are_refused(folder):
    """0, 7, 11 of a grey label become the values 0, 1, 2 of a palette. Black and white is no such palette."""
    picture = Image.fromarray(np.resize(np.arange(3, dtype=np.uint8), (8, 9)))
    picture.putpalette([0, 0, 0, 7, 7, 7, 11, 11, 11])
    picture.save("a.png")
    with pytest.raises(ValueError, match=r"greys \[0, 7, 11\] behind the values \[0, 1, 2\]"):
        read_12("a.png")
    picture = Image.fromarray(np.resize(np.arange(2, dtype=np.uint8), (8, 9)))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save("b.png")
    assert set(np.unique(read_12("b.png"))) == {0, 1}


def test_colour_of_a_class_at_vocs_background_is_refused(folder):
    """One airplane that fills the picture, optimised: its value is 0, which VOC ignores."""
    picture = Image.fromarray(np.zeros((8, 9), dtype=np.uint8))
    picture.putpalette([128, 0, 0])
    picture.save("a.png")
    with pytest.raises(ValueError, match=r"expected the colour \(128, 0, 0\) at the value 1.*found it at 0"):
        read_12("a.png", data="voc", classes=20)


def test_label_is_turned_by_its_own_exif_as_the_photograph_is(folder):
    """Some tools copy the photograph's orientation into the label."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(VALUES_3).save("a.png", exif=exif)
    assert np.array_equal(read_12("a.png", (9, 8)), VALUES_3[::-1].T)


def test_two_images_for_one_label_are_refused(folder):
    write_label(Path("truth/a.png"), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="found A and a for one label, a.png"):
        labels.true_label_files("photos", "data", "all", ["A", "a"], "truth")


def test_labels_of_other_endings_are_named(folder):
    Path("truth").mkdir()
    Image.fromarray(VALUES_3).save("truth/a.bmp")
    with pytest.raises(ValueError, match=r"expected PNG files .* found none of them; there are 1 \.bmp"):
        labels.true_label_files("photos", "data", "all", ["a"], "truth")


@pytest.mark.parametrize("text, said", [
    ("sky:51,221,255::\ngrass:250,50,83::\n", "found colours in"),
    ("sky,128,64,0\ngrass,1,2,3\n", "found colours in"),
    ("name,r,g,b\nsky,128,64,0\ngrass,1,2,3\n", "found colours in"),
    ("sky 128 64 0\ngrass 1 2 3\n", "found colours in"),
    ("nc: 2\nnames: ['sky', 'grass']\n", "another syntax"),
    ("names:\n  0: sky\n  1: grass\n", "another syntax"),
    ("item {\n  id: 1\n  name: 'sky'\n}\n", "another syntax"), ("sky=0\ngrass=1\n", "another syntax"),
    ("sky | heaven\ngrass\n", "another syntax"), ("sky  # blue\ngrass\n", "another syntax"),
    ("sky #ff0000\ngrass #00ff00\n", "another syntax"), ("<li>sky\n<li>grass\n", "another syntax"),
    ("sky\n__ignore__\ngrass\n", "__ignore__ in the first line"), ("1. sky\n2. grass\n", "count from 0"),
    ('[{"id": 1, "name": "sky"}, {"id": 5, "name": "grass"}]', "count from 0")])
def test_class_list_of_yet_another_syntax_is_refused(folder, text, said):
    """Colours would become synonyms, keys would become classes."""
    Path("other.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        words.read_classes(Path("other.txt"))


@pytest.mark.parametrize("text", ["0. sky\n1. grass\n", "0 - sky\n1 - grass\n", "0) sky\n1) grass\n",
                                  '{"id2label": {"1": "grass", "0": "sky"}}',
                                  '[{"id": 1, "name": "grass"}, {"id": 0, "name": "sky"}]'])
def test_numbers_of_a_class_list_say_the_order(folder, text):
    Path("other.txt").write_text(text)
    assert words.read_classes(Path("other.txt")) == (("sky",), ("grass",))


@pytest.mark.parametrize("name", ["parking meter (broken)", "tv/monitor", "traffic light [red]", "Ёлка",
                                  "crème brûlée", "o'clock", "7 dwarfs", "24/7 shop", "rock & roll"])
def test_odd_names_stay_names(folder, name):
    Path("other.txt").write_text(f"sky\n{name}\n", encoding="utf-8")
    assert words.read_classes(Path("other.txt")) == (("sky",), (name,))


def test_check_knows_a_label_by_another_spelling(folder, capsys):
    """What is measured must not be called a label without an image."""
    write_photos(folder / "photos", f"{unicodedata.normalize('NFD', 'früh')}.jpg")
    write_label(Path("truth/Früh.PNG"), np.arange(40)[:, None].repeat(56, 1) % 3)
    flags = ["--data", "photos", "--classes", "names.txt", "--labels", "truth"]
    assert check.main(check.flags().parse_args(flags)) == []
