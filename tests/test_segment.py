"""segment.py: one's own photograph, one's own words; every way to say what is background.

    python -m pytest tests/test_segment.py

    K classes and background words · H,W pixels
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import distill
import evaluate
import rectify
import segment
from conftest import ROOT
from datasets import IGNORE, words
from helpers import SMALLEST, photo, quick_recipes, refusal, run, write_openai_archive, write_photos
from toyland import world


# ------------------------------------------------------------------------------------------ --background

@pytest.mark.parametrize("mode, expected", [
    ("none", ("none", None)), (" none ", ("none", None)), ("words: floor", ("words", ["floor"])),
    ("words:floor,  wet road ,", ("words", ["floor", "wet road"])), ("threshold: 0.5", ("threshold", 0.5)),
    ("threshold:1e-3", ("threshold", 0.001))])
def test_background_modes(mode, expected):
    assert segment.parse_background(mode) == expected


@pytest.mark.parametrize("mode", ["", "no", "none: x", "words", "words:", "words: ,", "threshold",
                                  "threshold:", "threshold: 0", "threshold: 1", "threshold: -0.1",
                                  "threshold: nan", "threshold: half", "0.5"])
def test_other_background_is_refused(mode):
    with pytest.raises(ValueError, match="--background: expected none, .*; found") as error:
        segment.parse_background(mode)
    assert repr(mode) in str(error.value)


# --------------------------------------------------------------------------- logits → classes and background

def random_logits(channels=4):
    return torch.randn(1, channels, 3, 5, generator=torch.Generator().manual_seed(0))


def test_without_background_every_pixel_gets_its_best_class():
    found = segment.segment(random_logits(), (24, 40), classes=4, scale=10.0, threshold=None)
    up = F.interpolate(random_logits(), size=(24, 40), mode="bilinear", align_corners=False)[0]
    assert found.shape == (24, 40) and found.dtype == torch.uint8 and found.max() <= 3
    assert torch.equal(found.long(), up.argmax(dim=0))


def test_pixels_of_background_words_are_background():
    """The last channels compete with the classes; where one of them wins there is no class."""
    found = segment.segment(random_logits(), (24, 40), classes=2, scale=10.0, threshold=None)
    best = segment.segment(random_logits(), (24, 40), classes=4, scale=10.0, threshold=None)
    assert torch.equal(found, torch.where(best >= 2, IGNORE, best)) and (best >= 2).any() and (best < 2).any()


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_threshold_makes_background_of_unsure_pixels(scale):
    """Pixel by pixel: the softmax of the scaled logits, and its best value against the threshold."""
    found = segment.segment(random_logits(3), (6, 10), classes=3, scale=scale, threshold=0.6)
    up = F.interpolate(random_logits(3), size=(6, 10), mode="bilinear", align_corners=False)[0]
    for y in range(6):
        for x in range(10):
            weight = np.exp(scale * up[:, y, x].double().numpy())
            best = int(up[:, y, x].argmax())
            assert found[y, x] == (best if weight[best] / weight.sum() >= 0.6 else IGNORE)
    assert 0 < (found == IGNORE).sum() < 60


def test_overlay_paints_classes_and_leaves_the_background():
    """Background pixels are the photo's own; a class is mixed with its colour and stays recognisable."""
    picture = photo(4, 6)
    classes = torch.tensor([[0, 1, IGNORE]]).repeat(4, 2)
    index = Image.fromarray(classes.numpy().astype(np.uint8))
    found = np.asarray(segment.overlay(picture, index, [(255, 0, 0), (0, 0, 255)]), int)
    original = np.asarray(picture, int)
    for value, colour in ((0, (255, 0, 0)), (1, (0, 0, 255))):
        mixed = 0.45 * original + 0.55 * np.array(colour)
        assert np.abs(found - mixed)[classes == value].max() <= 1
    assert np.array_equal(found[classes == IGNORE], original[classes == IGNORE])


# ------------------------------------------------------------------------------------------ the script

@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with one photo, small recipes and no run."""
    monkeypatch.chdir(tmp_path)
    quick_recipes(monkeypatch, tmp_path)
    photo(40, 56).save("my cat.jpg")
    return tmp_path


@pytest.fixture
def trained(place, tiny_clip):
    """The same with a rectification for the words cat, sofa, wall."""
    write_photos(place / "photos", "a.jpg", "b.jpg")
    Path("names.txt").write_text("cat\nsofa\nwall\n")
    run(rectify, "--data", "photos", "--classes", "names.txt", "--clip", tiny_clip)
    return place


def index_of(folder="runs/segment", name="my cat") -> np.ndarray:
    with Image.open(Path(folder, f"{name}_index.png")) as picture:
        assert picture.mode == "P"
        return np.array(picture)


def test_words_on_the_command_line(place, tiny_clip, capsys):
    """No run, no file: the words alone. An overlay with a legend, an index PNG of the photo's size in the
    classes' colours."""
    path = run(segment, "my cat.jpg", "--classes", "cat, sofa , wall", "--clip", tiny_clip)
    said = capsys.readouterr().out
    assert path == Path("runs/segment/my cat_overlay.png")
    assert "MaskCLIP" in said and "3 classes: cat, sofa, wall" in said
    index = index_of()
    assert index.shape == (40, 56) and set(np.unique(index)) <= {0, 1, 2}
    with Image.open("runs/segment/my cat_index.png") as picture:
        assert picture.getpalette()[:9] == np.array(words.distinct_colours(3)).flatten().tolist()
    with Image.open(path) as page:
        colours = {colour for _, colour in page.convert("RGB").getcolors(1 << 20)}
        assert set(words.distinct_colours(3)) <= colours and page.height > 160
    shares = {line.split("%  ")[1]: float(line.split("%")[0]) for line in said.splitlines() if " %  " in line}
    for number, name in enumerate(("cat", "sofa", "wall")):
        assert shares.get(name, 0) == pytest.approx(100 * (index == number).mean(), abs=0.051)


def test_words_from_a_file_are_the_same(place, tiny_clip):
    run(segment, "my cat.jpg", "--classes", "cat, sofa, wall", "--clip", tiny_clip)
    expected = index_of()
    Path("names.txt").write_text("cat\nsofa\nwall\n")
    run(segment, "my cat.jpg", "--classes", "names.txt", "--clip", tiny_clip, "--out", "other")
    assert np.array_equal(index_of("other/segment"), expected)


def test_more_words_than_a_file_name_may_have_letters(place, tiny_clip):
    """A long list is a list, not a file name that is too long."""
    many = ", ".join(f"thing number {i}" for i in range(40))
    assert len(many) > 255
    run(segment, "my cat.jpg", "--classes", many, "--clip", tiny_clip)
    assert index_of().max() < 40


def test_photo_is_segmented_upright(place, tiny_clip):
    """A photo that the camera turned: the index has the size in which it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 56).save("turned.jpg", exif=exif)
    run(segment, "turned.jpg", "--classes", "cat, sofa", "--clip", tiny_clip)
    assert index_of(name="turned").shape == (56, 40)


def test_two_photos_of_one_name_do_not_overwrite_each_other(place, tiny_clip, capsys):
    """The second gets its folder's name in front, a third its folders'. A photo's own result is replaced."""
    photos = ["a/cat.jpg", "b/cat.jpg", "c/b/cat.jpg", "a/cat.png"]
    write_photos(place, *photos)
    for _ in range(2):
        for path in photos:
            run(segment, path, "--classes", "cat, sofa", "--clip", tiny_clip)
    names = ["a_cat", "b_cat", "c_b_cat", "cat"]
    assert sorted(os.listdir("runs/segment")) == [f"{name}_{kind}.png" for name in names
                                                  for kind in ("index", "overlay")]
    assert "runs/segment/cat_index.png is of another photo called cat, and stays" in capsys.readouterr().out
    pictures = [index_of(name=name) for name in ("cat", "b_cat", "c_b_cat", "a_cat")]
    for path, found in zip(photos, pictures):
        run(segment, path, "--classes", "cat, sofa", "--clip", tiny_clip, "--out", f"alone/{path}")
        assert np.array_equal(found, index_of(f"alone/{path}/segment", name="cat"))


def test_an_index_picture_that_is_damaged_is_replaced(place, tiny_clip):
    Path("runs/segment").mkdir(parents=True)
    Path("runs/segment/my cat_index.png").write_bytes(b"half a picture")
    run(segment, "my cat.jpg", "--classes", "cat, sofa", "--clip", tiny_clip)
    assert index_of().shape == (40, 56) and len(os.listdir("runs/segment")) == 2


def test_background_words_are_255_in_the_index(place, tiny_clip, capsys):
    """With words: pixels that fit them better than the classes; the rest keep their classes. (A PNG with a
    palette of two colours would have one bit a pixel, and 255 would come back as 1.)"""
    run(segment, "my cat.jpg", "--classes", "cat, sofa, wall, road", "--clip", tiny_clip)
    four = index_of()
    run(segment, "my cat.jpg", "--classes", "cat, sofa", "--background", "words: wall, road",
        "--clip", tiny_clip)
    assert np.array_equal(index_of(), np.where(four >= 2, IGNORE, four))
    assert ("(background)" in capsys.readouterr().out) == bool((four >= 2).any())


def test_threshold_leaves_unsure_pixels_without_a_class(place, tiny_clip):
    """Never another class than without it, and the more the higher the threshold is."""
    shares = []
    run(segment, "my cat.jpg", "--classes", "cat, sofa, wall", "--clip", tiny_clip)
    whole = index_of()
    for threshold in (0.5, 0.9):
        run(segment, "my cat.jpg", "--classes", "cat, sofa, wall", "--clip", tiny_clip,
            "--background", f"threshold: {threshold}")
        found = index_of()
        assert np.array_equal(found, np.where(found == IGNORE, IGNORE, whole))
        shares.append((found == IGNORE).mean())
    assert shares[0] < shares[1] and shares[1] > 0.1


def test_newest_run_gives_words_and_stage(trained, capsys):
    """Without --classes: what was trained last, with the words that it was trained for."""
    run(segment, "my cat.jpg")
    assert "ReCLIP++ rectified" in (said := capsys.readouterr().out) and "3 classes: cat, sofa, wall" in said
    rectified = index_of()
    run(segment, "my cat.jpg", "--classes", "cat, sofa, wall")
    assert "ReCLIP++ rectified" in capsys.readouterr().out and np.array_equal(index_of(), rectified)
    run(segment, "my cat.jpg", "--stage", "maskclip")
    assert "MaskCLIP" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--data", "photos"]], ids=["newest", "--data"])
def test_words_that_were_not_trained_are_left_to_maskclip(trained, tiny_clip, capsys, more):
    """It says so, and what it shows is exactly what it would show without any run."""
    run(segment, "my cat.jpg", "--classes", "dog, lawn", "--clip", tiny_clip, *more)
    said = capsys.readouterr().out
    assert "MaskCLIP" in said and "No rectification was trained for these words" in said
    found = index_of()
    run(segment, "my cat.jpg", "--classes", "dog, lawn", "--clip", tiny_clip, "--out", "nothing there")
    assert np.array_equal(found, index_of("nothing there/segment"))


def test_words_that_were_not_trained_are_asked_in_all_sentences(place, tiny_clip, monkeypatch):
    """A run in Toyland, with its four sentences, does not lend them to the words of a photograph."""
    monkeypatch.setattr(world, "TRAIN_SCENES", 2)
    monkeypatch.setattr(world, "VAL_SCENES", 2)
    monkeypatch.setattr(world, "TEST_SCENES", 2)
    run(rectify, "--clip", tiny_clip)
    seen = []
    monkeypatch.setattr(rectify, "query_features", lambda _, asked: seen.append(asked) or torch.eye(2, 24))
    run(segment, "my cat.jpg", "--classes", "dog, lawn", "--clip", tiny_clip)
    assert list(seen[0].templates) == words.QUERY_TEMPLATES and seen[0].names == ["dog", "lawn"]


def test_without_a_photo_a_scene_of_toyland_is_shown(place, tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr(world, "TRAIN_SCENES", 1)
    monkeypatch.setattr(world, "VAL_SCENES", 8)
    monkeypatch.setattr(world, "TEST_SCENES", 8)
    run(segment, "--clip", tiny_clip)
    assert index_of(name="toyland").shape == world.SCENE
    assert "16 classes: sky, grass" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- in another program

@pytest.fixture
def distilled(trained):
    run(distill)
    return trained


def test_segmenter_gives_what_the_script_writes(distilled):
    """For one image as for a list of them, whatever their sizes; names in the order of the values."""
    segmenter = segment.Segmenter(device="cpu")
    assert segmenter.names == ["cat", "sofa", "wall"] and segmenter.stage == "distill"
    images = [Image.open("my cat.jpg"), photo(31, 90, seed=3), photo(8, 8).convert("L")]
    found = segmenter(images)
    assert [one.shape for one in found] == [(40, 56), (31, 90), (8, 8)]
    for one, image in zip(found, images):
        assert one.dtype == np.uint8 and np.array_equal(one, segmenter(image))
    run(segment, "my cat.jpg")
    assert np.array_equal(index_of(), found[0])


def test_segmenter_takes_the_flags_as_keywords_and_nothing_else(distilled):
    segmenter = segment.Segmenter(data="photos", stage="maskclip", background="threshold: 0.9", device="cpu")
    run(segment, "my cat.jpg", "--data", "photos", "--stage", "maskclip", "--background", "threshold: 0.9")
    assert np.array_equal(segmenter(Image.open("my cat.jpg")), index_of()) and (index_of() == IGNORE).any()
    with pytest.raises(TypeError, match="Segmenter: expected .*classes.*, found colour, tile"):
        segment.Segmenter(tile=3, colour="red")


def read_export(path: Path) -> tuple:
    """An exported student as another program has it, (1, 3, H, W) → (1, C, h, w), and its metadata."""
    if path.suffix == ".pt2":
        about = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=about).module()
        return program, json.loads(about["metadata.json"])
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), about


@pytest.mark.slow
@pytest.mark.parametrize("ending, least", [("pt2", 1.0), ("onnx", 0.999)])
def test_exported_student_is_used_as_its_metadata_says(distilled, ending, least):
    """From nothing but the file, every pixel has the class that segment.py writes, for photos of three sizes;
    in onnxruntime, whose sums are rounded otherwise, 99.9 % of them have."""
    path = run(segment, "--export", f"made/student.{ending}")
    assert path == Path(f"made/student.{ending}") and not Path("runs/segment").exists()
    program, about = read_export(path)
    assert about["classes"] == ["cat", "sofa", "wall"] and len(about["colours"]) == 3
    for number, size in enumerate(((40, 56), (90, 31), (33, 33))):
        image = photo(*size, seed=number)
        image.save(f"{number}.png")
        run(segment, f"{number}.png")
        scale = min(about["short_side"] / min(size), about["longest_side"] / max(size))
        sides = [about["multiple"] * max(1, round(scale * side / about["multiple"])) for side in size]
        small = image.resize(sides[::-1], Image.Resampling.BILINEAR)
        with torch.no_grad():
            logits = program(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255)
        assert logits.shape == (1, 3, -(-sides[0] // 8), -(-sides[1] // 8))
        best = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        assert (best.numpy() == index_of(name=str(number))).mean() >= least


@pytest.mark.parametrize("flags, parts", [
    (["--export", "a.pt2", "--stage", "rectify"],
     ["--export a.pt2: expected a distilled student", "distill.py"]),
    (["--export", "a.bin"], ["--export a.bin: expected a name that ends with .pt2 or .onnx, found '.bin'"])])
def test_export_of_something_else_is_refused(distilled, capsys, flags, parts):
    said = refusal(capsys, segment, *flags)
    assert all(part in said for part in parts) and not list(Path().glob("a.*"))


# ------------------------------------------------------------------------------------------ large photographs

LARGE = """
import resource, sys
sys.path.insert(0, {root!r})
import segment
from PIL import Image
Image.new("RGB", (8660, 5774), (90, 120, 200)).save("large.png")            # 50 megapixels
words = ", ".join(f"thing number {{i}}" for i in range(20))
flags = ["--classes", words, "--clip", {clip!r}, "--device", "cpu", "--background", "threshold: 0.5"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
segment.main(segment.flags().parse_args(["large.png", *flags]))
print("KIB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts KiB as Linux does")
def test_photo_of_50_megapixels_and_20_words_need_less_than_3_gib(place, tiny_clip):
    """All 20 maps at the photo's size would be 4 GB, and as much again the softmax that a threshold needs."""
    program = LARGE.format(root=str(ROOT), clip=str(tiny_clip))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    grown = int(ended.stdout.split("KIB ")[1])
    assert grown < 3 * 2 ** 20, f"{grown / 2 ** 20:.2f} GiB"
    with Image.open("runs/segment/large_index.png") as picture:
        assert picture.size == (8660, 5774)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you …"),
    MemoryError()], ids=["GPU", "CPU", "Python"])
def test_too_little_memory_is_said_in_one_paragraph(place, tiny_clip, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(evaluate, "best_class", full)
    said = refusal(capsys, segment, "my cat.jpg", "--classes", "cat, sofa", "--clip", tiny_clip)
    assert "expected enough memory" in said and "--device" in said and len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("flags, parts", [
    (["nothing.jpg", "--classes", "cat, dog"], ["nothing.jpg"]),
    (["text.jpg", "--classes", "cat, dog"], ["text.jpg: expected an image"]),
    (["my cat.jpg"], ["expected words to look for; found no --classes", "my cat.jpg --classes"]),
    (["my cat.jpg", "--classes", "cat"], ["at least two words", "found no such file and one word"]),
    (["my cat.jpg", "--classes", "cat,"], ["at least two classes, found 1"]),
    (["my cat.jpg", "--classes", "cat, Cat"], ["found 'Cat' at class 1 and at class 2"]),
    (["my cat.jpg", "--classes", "cat, dog", "--background", "some"],
     ["--background: expected none", "found 'some'"]),
    (["my cat.jpg", "--classes", "cat, dog", "--stage", "distill"],
     ["--stage distill: expected a checkpoint", "cat, dog"]),
    (["my cat.jpg", "--classes", "cat, dog", "--background", "words: cat"],
     ["found 'cat' at class 1 and at class 3"])])
def test_unusable_input_is_refused_and_nothing_is_written(place, tiny_clip, capsys, flags, parts):
    """One paragraph that says what was expected and what was found."""
    Path("text.jpg").write_text("I am no picture")
    said = refusal(capsys, segment, *flags, "--clip", tiny_clip)
    assert all(part in said for part in parts), said
    assert not os.path.exists("runs")


def test_rectified_stage_knows_no_further_words(trained, capsys):
    """A decoder was trained for its classes: background words can only be asked of CLIP."""
    said = refusal(capsys, segment, "my cat.jpg", "--background", "words: road")
    assert "--background words" in said and "--stage maskclip" in said
    assert not Path("runs/segment").exists()
    run(segment, "my cat.jpg", "--background", "words: road", "--stage", "maskclip")


def test_another_clip_than_the_checkpoints_is_refused(trained, tmp_path, capsys):
    write_openai_archive(tmp_path / "other.pt", **SMALLEST, seed=1)
    assert "another CLIP" in refusal(capsys, segment, "my cat.jpg", "--clip", tmp_path / "other.pt")
