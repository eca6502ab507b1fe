"""Bad input, in more than a thousand generated cases: each is refused in one paragraph or handled rightly.

    python -m pytest tests/test_bad_input.py         # -m "not slow" leaves out the longer half

A refusal is exit code 2 and one paragraph on stderr that says what was expected, what was found and where. It
leaves the run folders as they were, byte for byte, without a new lock or an empty folder; only caches, which
are keyed by all they depend on, may have grown.

Each case works in a copy of one folder in which everything has been done once: VOC's tree and a folder of
photos, both rectified and distilled, and a run of both stages that was broken off.
"""

import inspect
import json
import os
import shutil
import stat
import struct
import unicodedata
import urllib.error
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import distill
import evaluate
import rectify
import segment
from datasets import images as image_files, words as class_lists
from harness import errors, runs
from helpers import (SMALLEST, VOC_BASE, openai_state, photo, quick_recipes, write_label,
                     write_openai_archive, write_photos, write_voc_tree)
from paper import maft, reproduce, run as paper_run
from toyland import pretrain, world

SCRIPTS = {script.__name__.rpartition(".")[2]: script
           for script in (rectify, distill, evaluate, segment, world, pretrain, reproduce, paper_run,
                          maft)}
STAGES = {"rectify": rectify, "distill": distill}
WORDS = ["cat", "sofa", "wall"]
CLIP = "CLIP"                               # stands in the flags below for the path of the small CLIP
VOC = ["--data", "voc", "--clip", CLIP]
PHOTOS = ["--data", "photos", "--classes", "names.txt", "--clip", CLIP]
STORED = [*PHOTOS, "--out", "stored", "--cache-features", "1"]
SEGMENT = ["photo.jpg", "--classes", "cat, sofa, wall", "--clip", CLIP, "--out", "fresh"]
FIRST_RUN = {"rectify": PHOTOS, "distill": PHOTOS, "segment": SEGMENT}
LATER_RUN = {"distill": [], "evaluate": ["--labels", "truth"], "segment": ["photo.jpg"]}  # of the newest run


# ----------------------------------------------------------------------------- a folder in which all was done

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Datasets, words, labels; finished runs in runs/ and stored/, and a broken-off one in unfinished/."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick_recipes(patch, folder)
        patch.setattr(world, "TRAIN_SCENES", 2)
        patch.setattr(world, "VAL_SCENES", 2)
        patch.setattr(world, "TEST_SCENES", 2)
        write_openai_archive("tiny.pt", **SMALLEST)
        write_voc_tree(Path("data"))
        write_photos(Path("photos"), "a.jpg", "b.png", "c.jpg")
        photo(seed=7).save("photo.jpg")
        Path("names.txt").write_text("".join(f"{word}\n" for word in WORDS))
        for name in "abc":
            write_label(Path("truth", f"{name}.png"),
                        np.random.default_rng(0).choice([0, 1, 2, 255], (40, 56)))
        command(folder, rectify, VOC)
        command(folder, distill, [])
        command(folder, evaluate, [])
        for out in ("runs", "unfinished"):
            command(folder, rectify, [*PHOTOS, "--out", out])
            command(folder, distill, [*PHOTOS, "--out", out])
        command(folder, rectify, STORED)
        for script in (rectify, distill):                   # again, broken off in the second of two epochs
            with patch.context() as broken, pytest.raises(Interrupted):
                step, calls = script.train_step, []
                broken.setattr(script, "train_step",
                               lambda *args: interrupt() if calls else calls.append(1) or step(*args))
                command(folder, script, [*PHOTOS, "--out", "unfinished"])
        Path("unfinished/photos/distill/checkpoint.pt").unlink()
        for path in Path("runs/photos").rglob("checkpoint.pt"):             # runs/photos is the newest run
            os.utime(path)
        yield folder


class Interrupted(Exception):
    pass


def interrupt():
    raise Interrupted


@pytest.fixture(scope="module")
def work(finished):
    """A copy of it, and what each path in the copy looks like: type, size and time."""
    folder = finished.parent / "work"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("tiny.pt", "resnet.pt"))
    return folder, {path.relative_to(folder): looks(path) for path in sorted(folder.rglob("*"))}


def looks(path: Path):
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        return "folder"
    return stat.S_IFMT(found.st_mode), found.st_size, found.st_mtime_ns


@pytest.fixture
def place(finished, work, monkeypatch):
    """The copy to work in, mended behind each case (to copy all would take longer than most cases); gives
    CLIP's folder."""
    folder, expected = work
    monkeypatch.chdir(folder)
    yield finished
    for path in list(folder.rglob("*")):
        if os.path.lexists(path) and expected.get(path.relative_to(folder)) != looks(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, look in expected.items():                         # sorted: a folder comes before what is in it
        if not os.path.lexists(folder / name):
            (folder / name).mkdir() if look == "folder" else shutil.copy2(finished / name, folder / name)


# ------------------------------------------------------------------------------------- what a command must do

def command(place: Path, script, flags):
    """A script with a command line, on the CPU: its `main`, and after a training the script's last lines.
    CLIP in the flags is the small one."""
    flags = [str(place / "tiny.pt") if flag == CLIP else str(flag) for flag in flags]
    device = [] if script in (world, pretrain) or "--device" in flags else ["--device", "cpu"]
    result = script.main(script.flags().parse_args([*flags, *device]))
    if script in (rectify, distill):
        evaluate.after_training(result, script.__name__)
    return result


def contents() -> dict[str, bytes | str]:
    """Every file under the working folder with its bytes, and every empty folder.

    Not what lies in caches and among Toyland's scenes, which grow as they are needed; but a lock even there.
    """
    return {str(path): path.read_bytes() if path.is_file() else "empty" for path in Path().rglob("*")
            if path.suffix == ".lock"
            or path.parent.name != "cache" and path.parts[:2] != ("data", "toyland")
            and (path.is_file() or path.is_dir() and not any(path.iterdir()))}


def refused(capsys, place, script, flags, *naming: str, new=()) -> str:
    """Run a command that must be refused: exit code 2, one paragraph that holds all of `naming`, no change.

    `new`: files that may be new or changed all the same. Returns the paragraph.
    """
    before, code = contents(), 0
    capsys.readouterr()
    try:
        with errors.one_paragraph():
            command(place, script, flags)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err.strip()
    assert code == 2, f"exit code {code}, stderr: {said or 'nothing'}"
    paragraph = said[said.find("error: "):]
    assert paragraph.startswith("error: ") and "\n\n" not in paragraph and "Traceback" not in said, said
    assert not [str(part) for part in naming if str(part) not in paragraph], paragraph
    after = contents()
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} <= set(new)
    assert not list(Path().rglob("*.part"))
    if not said.startswith("usage:"):           # argparse has words of its own: invalid choice
        assert "expected" in paragraph.lower() and "found" in paragraph.lower(), f"wording: {paragraph}"
    return paragraph


def cases(table: dict, *scripts, slow=()) -> list:
    """The rows of a table, for each of the named scripts: pytest.param(script, row), readable id.

    `slow`: scripts or names of rows that `-m "not slow"` leaves out.
    """
    marks = {True: [pytest.mark.slow], False: []}
    rows = [(name, row if isinstance(row, tuple) else (row,)) for name, row in table.items()]
    if not scripts:
        return [pytest.param(*row, id=name, marks=marks[name in slow]) for name, row in rows]
    return [pytest.param(SCRIPTS[script], *row, id=f"{script}: {name}",
                         marks=marks[script in slow or name in slow])
            for script in scripts for name, row in rows]


def weights_of(stage: str, folder="runs/photos") -> dict[str, torch.Tensor]:
    return runs.load(Path(folder, stage, "checkpoint.pt"), stage)["weights"]


def same_weights(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name])
                                                   for name in expected)


def index_of(name="photo", out="fresh") -> np.ndarray:
    with Image.open(Path(out, "segment", f"{name}_index.png")) as picture:
        return np.array(picture)


# ------------------------------------------------------------------------------------------ flags

def unreadable_numbers():
    """For every script and every flag that takes a number: what is none, or none that the flag can take."""
    for name, script in SCRIPTS.items():
        for action in script.flags()._actions:
            kind = getattr(action.type, "__qualname__", "").split(".")[0]   # a function of harness/flags.py
            if kind not in ("whole", "real"):
                continue
            limits, texts = inspect.getclosurevars(action.type).nonlocals, ["many", "", "nan", "-3"]
            texts += ["1.5", "1e3"] if kind == "whole" else ["inf", f"{2 * limits['most'] + 1:g}"]
            texts += ["0"] if limits["least"] > 0 or limits.get("said") else []
            for text in texts:
                flag = action.option_strings[0]
                yield pytest.param(script, [flag, text], (flag, text), id=f"{name} {flag} {text or 'empty'}")


def unknown_choices():
    for name, script in SCRIPTS.items():
        for action in script.flags()._actions:
            if action.choices:
                for text in ("nonsense", action.choices[0].upper(), ""):
                    flag = action.option_strings[0]
                    yield pytest.param(script, [flag, text], (flag, repr(text)),
                                       id=f"{name} {flag} {text or 'empty'}")
        yield pytest.param(script, ["--nonsense"], ("--nonsense",), id=f"{name} unknown flag")
        yield pytest.param(script, ["--see", "1"], ("--see",), id=f"{name} shortened flag")
        yield pytest.param(script, ["one", "two"], ("two",), id=f"{name} surplus words")
        yield pytest.param(script, ["--seed"], ("--seed",), id=f"{name} flag without its value")


@pytest.mark.parametrize("script, flags, naming", [*unreadable_numbers(), *unknown_choices()])
def test_flag_that_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys, script, flags, naming):
    """Each flag by its name, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, script, flags, *naming)


NUMBERS_OUT_OF_RANGE = {
    **{f"evaluate --prompt-denoising {p}": (evaluate, ["--data", "voc", "--prompt-denoising", p],
                                            "--prompt-denoising")
       for p in ("nan", "inf", "-inf", "-0.5", "1.5")},
    **{f"{name} --workers -1": (SCRIPTS[name], [*flags, "--workers", "-1"], "--workers")
       for name, flags in (("rectify", VOC), ("distill", ["--data", "voc"]), ("evaluate", ["--data", "voc"]),
                           ("reproduce", VOC))},
    **{f"pretrain {flag} {text}": (pretrain, ["--weights", "weights", flag, text], flag)
       for flag, text in (("--pictures", "0"), ("--pictures", "-1"), ("--pictures", "100"), ("--epochs", "0"),
                          ("--epochs", "-1"), ("--seed", "-1"))},
    "world --seed -1": (world, ["--seed", "-1"], "--seed"),
    **{f"{name} --device {device or 'empty'}": (SCRIPTS[name], [*flags, "--device", device],
                                                f"--device {device}".strip())
       for name, flags in (("rectify", VOC), ("segment", SEGMENT))
       for device in ("nonsense", "cuda:99", "cpu:x", "meta", "-1", "")},
    **{f"segment --background {mode or 'empty'}": (segment, [*SEGMENT, "--background", mode], "--background")
       for mode in ("", "words:", "words: ,", "threshold: 2", "threshold: nan", "threshold: 0", "road",
                    "words: cat", "words: " + "very " * 70)},
    "segment --stage rectify for other words": (
        segment, ["photo.jpg", "--classes", "dog, lawn", "--clip", CLIP, "--stage", "rectify"],
        "--stage rectify"),
    "segment --background words of a rectification": (segment, ["photo.jpg", "--background", "words: road"],
                                                      "--background"),
    "evaluate --labels of a known dataset": (evaluate, ["--data", "voc", "--labels", "truth"], "--labels"),
    **{f"rectify {flag} {text or 'empty'}": (rectify, [*VOC, flag, text], flag)
       for flag, texts in (("--vote-threshold", ("-0.1", "1.1", "nan", "")),
                           ("--window-ratio", ("0", "0.001", "2", "nan", "r")))
       for text in texts},
    "run --vote-threshold of whole images": (paper_run, ["reclip", *VOC, "--vote-threshold", "0.1"],
                                             "--vote-threshold: expected"),
    "run of an unknown system": (paper_run, ["recap", *VOC], "recap"),
    "run of no system": (paper_run, VOC, "reclip"),
    "run --cache-features of a CLIP that trains": (paper_run, ["fine-tuned", *VOC, "--cache-features", "1"],
                                                   "--cache-features"),
    "rectify --cache-features with too little room": (rectify, [*PHOTOS, "--cache-features", "1e-9"],
                                                      "--cache-features 1e-09"),
    "rectify --download of photos": (rectify, [*PHOTOS, "--download"], "--download"),
    "reproduce of photos": (reproduce, PHOTOS, "--data photos")}


@pytest.mark.parametrize("script, flags, naming", cases(NUMBERS_OUT_OF_RANGE))
def test_flag_with_a_senseless_value_is_refused(place, monkeypatch, capsys, script, flags, naming):
    """The value can be read, but nothing sensible follows from it: no silent default, no message of another
    library."""
    monkeypatch.setattr(pretrain, "pretraining_pictures", lambda _seed, count: (
        np.zeros((count, 64, 64, 3), np.uint8), ["sky"] * count))           # to draw them would take seconds
    monkeypatch.setattr(pretrain, "RESNET_EPOCHS", 1)
    refused(capsys, place, script, flags, naming)


@pytest.mark.parametrize("script", [rectify, distill, evaluate], ids=lambda script: script.__name__)
def test_more_workers_than_cores_are_not_started(place, monkeypatch, script):
    """A million processes would take the machine down: no more than it has cores, whatever is asked."""
    asked, loader = [], torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *args, num_workers=0, **more: (
        asked.append(num_workers) or loader(*args, **more)))
    command(place, script, ["--data", "voc", "--clip", CLIP, "--workers", "1000000"])
    assert asked and max(asked) <= os.cpu_count()


@pytest.mark.slow
@pytest.mark.parametrize("stage, flags", [
    *(pytest.param(stage, ["--seed", seed], id=f"{stage} --seed {seed}") for stage in STAGES
      for seed in ("7", str(10 ** 30))),
    *(pytest.param(stage, ["--batch-size", size], id=f"{stage} --batch-size {size}") for stage in STAGES
      for size in ("1", "3", str(10 ** 12))),
    *(pytest.param(stage, ["--learning-rate", rate], id=f"{stage} --learning-rate {rate}") for stage in STAGES
      for rate in ("1e-30", "0.5")),
    *(pytest.param("rectify", [flag, number], id=f"rectify {flag} {number}")
      for flag,
      number in (("--vote-threshold", "0.0"), ("--vote-threshold", "1.0"), ("--window-ratio", "1.0"),
                           ("--mask-scale", "1e-30"), ("--loss-scale", "1e-30")))])
def test_unusual_number_is_taken_as_it_is(place, stage, flags):
    """Any seed; a batch that is larger than the dataset holds all of it; whatever lies in a flag's range."""
    command(place, STAGES[stage], [*PHOTOS, *flags])
    recipe = json.loads(Path("runs/photos", stage, "recipe.json").read_text())
    name = flags[0][2:].replace("-", "_")
    assert str(recipe[name] if name == "seed" else recipe["recipe"][name]) == flags[1]
    assert all(tensor.isfinite().all() for tensor in weights_of(stage).values())


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_backbone_that_cannot_be_fetched_is_named(place, monkeypatch, capsys, backbone):
    def unreachable(*_args, **_more):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    refused(capsys, place, distill, ["--backbone", backbone], backbone, "no route to host")


# ------------------------------------------------------------------------------------------ --data

def a_file(name):
    return lambda: Path(name).write_text("no folder")


def empty_folder():
    Path("empty").mkdir()


def folder_of_other_files():
    Path("notes").mkdir()
    Path("notes/list.txt").write_text("photo.jpg")
    Path("notes/deep/er").mkdir(parents=True)


def folder_of_dangling_links():
    Path("links").mkdir()
    Path("links/a.jpg").symlink_to("nowhere.jpg")


def names_that_differ_in_their_suffix():
    write_photos(Path("twice"), "a.jpg", "a.png")


def nothing():
    pass


NO_DATA = {"missing": ("nowhere", nothing), "empty": ("empty", empty_folder),
           "a file": ("photo.jpg", nothing), "below a file": ("photo.jpg/photos", nothing),
           "no images": ("notes", folder_of_other_files),
           "dangling links alone": ("links", folder_of_dangling_links),
           "VOC in capitals": ("VOC", nothing),
           "Toyland in capitals": ("Toyland", nothing), "data/voc": ("data/voc", nothing),
           "a long name": ("x" * 300, nothing), "a blank": (" ", nothing),
           "names twice": ("twice", names_that_differ_in_their_suffix)}


@pytest.mark.slow
@pytest.mark.parametrize("script, name, spoil",
                         cases(NO_DATA, "rectify", "distill", "evaluate", slow=["distill"]))
def test_folder_that_holds_no_dataset_is_refused(place, capsys, script, name, spoil):
    """With class names, so that a folder could be meant."""
    spoil()
    refused(capsys, place, script, ["--data", name, "--classes", "names.txt", "--clip", CLIP], name)


@pytest.mark.parametrize("script, name", [pytest.param(SCRIPTS[script], name, id=f"{script} {name}")
                                          for script in ("rectify", "distill", "evaluate")
                                          for name in ("photos/", "VOC", "data/voc")])
def test_folder_without_class_names_is_refused(place, capsys, script, name):
    refused(capsys, place, script, ["--data", name, "--out", "fresh"], name, "--classes")


NAMES = {"spaces": "my own photos", "Unicode": "été на море 写真", "quotes": "it's \"mine\"", "dots": "a.b..c",
         "percent": "50% {off}", "a dash": "--photos", "a new line": "two\nlines", "brackets": "[a-c]*",
         "a dataset's name": "sub/voc", "a stage's name": "rectify", "200 letters": "x" * 200,
         "trailing slash": "photos/", "dots on the way": "photos/../photos", "inner dot": "./photos"}


@pytest.mark.parametrize("name", cases(NAMES, slow=list(NAMES)[2:]))
def test_folder_of_any_name_works(place, name):
    """The same photos under another name give the same weights; later scripts find the run by themselves."""
    if not Path(name).exists():
        shutil.copytree("photos", name)
    command(place, rectify, [f"--data={name}", *PHOTOS[2:], "--out", "fresh"])
    assert same_weights(weights_of("rectify", Path("fresh", Path(name).resolve().name)),
                        weights_of("rectify"))
    metrics = command(place, evaluate, ["--labels", "truth", "--out", "fresh"])
    assert list(metrics) == ["vanilla", "maskclip", "rectify"]
    command(place, segment, ["photo.jpg", "--out", "fresh"])


def test_folder_named_like_a_dataset_keeps_off_its_results(place):
    """./voc is a folder of one's own: to train on it must not replace what was trained on VOC."""
    shutil.copytree("photos", "voc")
    before = Path("runs/voc/rectify/checkpoint.pt").read_bytes()
    try:
        command(place, rectify, ["--data", "./voc", *PHOTOS[2:]])
    except ValueError:
        pass
    assert Path("runs/voc/rectify/checkpoint.pt").read_bytes() == before


# --------------------------------------------------------------------------------- images that cannot be read

def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand: rows are raw scan lines, each behind a filter byte."""
    return (b"\x89PNG\r\n\x1a\n"
            + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
            + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def encoded(suffix: str, **more) -> bytes:
    photo(seed=5).save(f"encoded.{suffix}", **more)
    content = Path(f"encoded.{suffix}").read_bytes()
    Path(f"encoded.{suffix}").unlink()
    return content


def cut(suffix: str, share: float, **more):
    def content() -> bytes:
        whole = encoded(suffix, **more)
        return whole[:round(len(whole) * share)]
    return content


def flipped_in_png() -> bytes:
    """One bit of the compressed pixels: the chunk's check sum is wrong."""
    content = bytearray(encoded("png"))
    content[len(content) // 2] ^= 1
    return bytes(content)


BROKEN_IMAGES = {
    "zero bytes": lambda: b"", "text": lambda: b"I am no picture\n",
    "a web page": lambda: b"<!DOCTYPE html><html>404</html>",
    "a PDF": lambda: b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "zeros": lambda: bytes(5000),
    "AppleDouble": lambda: b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100),
    "JPEG's first bytes": lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "PNG's signature": lambda: b"\x89PNG\r\n\x1a\n",
    **{f"JPEG cut at {round(100 * share)} %": cut("jpg", share) for share in (0.1, 0.5, 0.9)},
    **{f"PNG cut at {round(100 * share)} %": cut("png", share) for share in (0.1, 0.5, 0.9)},
    "progressive JPEG cut at 50 %": cut("jpg", 0.5, progressive=True), "TIFF cut at 50 %": cut("tif", 0.5),
    "WEBP cut at 50 %": cut("webp", 0.5), "BMP cut at 50 %": cut("bmp", 0.5),
    "PNG with one wrong bit": flipped_in_png,
    "PNG of 40000 × 40000": lambda: png(40000, 40000, 8, 2, bytes(100)),
    "PNG of 0 × 0": lambda: png(0, 0, 8, 2, b""),
    "a git-lfs pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"}


@pytest.mark.slow
@pytest.mark.parametrize("script, content", cases(BROKEN_IMAGES, "rectify"))
def test_broken_training_image_is_named(place, capsys, script, content):
    """In a folder of photos that were trained with before: the old results stay."""
    Path("photos/broken.jpg").write_bytes(content())
    refused(capsys, place, script, ["--data", "photos", "--classes", "names.txt", "--clip", CLIP],
            "photos/broken.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("content", cases(BROKEN_IMAGES))
def test_broken_training_image_of_voc_is_named(place, capsys, content):
    path = Path("data", VOC_BASE, "JPEGImages/2007_000039.jpg")
    path.write_bytes(content())
    refused(capsys, place, rectify, VOC, path)


@pytest.mark.slow
@pytest.mark.parametrize("content", cases(BROKEN_IMAGES))
def test_broken_validation_image_is_named(place, capsys, content):
    """By evaluate.py, which writes nothing."""
    path = Path("data", VOC_BASE, "JPEGImages/2007_000042.jpg")
    path.write_bytes(content())
    refused(capsys, place, evaluate, ["--data", "voc"], path)


@pytest.mark.parametrize("stage", STAGES)
def test_broken_validation_image_does_not_cost_the_training(place, capsys, stage):
    """Training reads other images: its checkpoint is written, whole; only then is the measuring refused."""
    path = Path("data", VOC_BASE, "JPEGImages/2007_000042.jpg")
    path.write_bytes(b"")
    folder = Path("fresh/voc", stage)
    shutil.copytree("runs/voc/rectify", "fresh/voc/rectify") if stage == "distill" else None
    refused(capsys, place, STAGES[stage], ["--data", "voc", "--out", "fresh", "--clip", CLIP], path,
            new=[str(folder / name) for name in ("checkpoint.pt", "recipe.json", "log.jsonl")])
    assert weights_of(stage, "fresh/voc")


@pytest.mark.parametrize("content", cases(BROKEN_IMAGES))
def test_broken_photo_is_named(place, capsys, content):
    Path("broken photo.jpg").write_bytes(content())
    refused(capsys, place, segment, ["broken photo.jpg"], "broken photo.jpg")


@pytest.mark.parametrize("name", cases({
    "missing": "nowhere.jpg", "a folder": "photos", "empty": "", "below a file": "photo.jpg/x.jpg",
    "a text": "names.txt", "a long name": "x" * 300 + ".jpg", "a dangling link": "link.jpg",
    "the null device": os.devnull}))
def test_photo_that_is_no_file_is_named(place, capsys, name):
    Path("link.jpg").symlink_to("nowhere.jpg")
    refused(capsys, place, segment, [name, "--classes", "cat, dog", "--clip", CLIP], name)


# ------------------------------------------------------------------------------------------ images that can

COLOURS = np.asarray(photo(seed=5))                             # (40, 56, 3)
GREY = np.asarray(photo(seed=5).convert("L"))                   # (40, 56)
THREE = GREY[..., None].repeat(3, axis=2)


def saved(image, suffix="png", **more):
    """A picture that is stored as it is: an image or an array, a suffix, what else Pillow should write."""
    def write(stem: str) -> Path:
        path = Path(f"{stem}.{suffix}")
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **more)
        return path
    return write


def raw(content: bytes, suffix="png"):
    def write(stem: str) -> Path:
        Path(f"{stem}.{suffix}").write_bytes(content)
        return Path(f"{stem}.{suffix}")
    return write


def turned(orientation: int, **more):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(COLOURS, "jpg", quality=100, subsampling=0, exif=exif, **more)


def upright(orientation: int) -> np.ndarray:
    """What a viewer shows for the EXIF orientations 1 to 8, in terms of numpy."""
    x = COLOURS
    return {1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.swapaxes(0, 1), 6: np.rot90(x, -1),
            7: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(x)}[orientation]


def large_exif():
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 3000
    return saved(COLOURS, "jpg", quality=100, subsampling=0, exif=exif)


def half_transparent() -> Image.Image:
    picture = Image.fromarray(COLOURS)
    picture.putalpha(Image.fromarray(GREY))
    return picture


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What a viewer shows on a white page: colours (40, 56, 3), alpha (40, 56) from 0 to 255."""
    share = alpha[..., None] / 255
    return (share * colours + (1 - share) * 255).round().astype(int)


PALETTE = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE)
SIXTEEN = png(56, 40, 16, 2, b"".join(b"\0" + row.repeat(2, axis=-1).tobytes() for row in COLOURS))
FRAMES = [Image.fromarray(255 - COLOURS), Image.fromarray(COLOURS // 2)]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GOOD_IMAGES = {                         # how it is written, what is to be read, by how much that may differ
    "mode 1": (saved(GREY > 127), THREE // 128 * 255, 0), "mode L": (saved(GREY), THREE, 0),
    "mode L, JPEG": (saved(GREY, "jpg", quality=100), THREE, 3),
    "mode LA": (saved(half_transparent().convert("LA")), over_white(THREE, GREY), 1),
    "mode P": (saved(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
    "mode P, transparent": (
        saved(PALETTE, transparency=0),
        over_white(np.asarray(PALETTE.convert("RGB")), 255 * (np.asarray(PALETTE) != 0)), 0),
    "mode RGBA": (saved(half_transparent()), over_white(COLOURS, GREY), 1),
    "mode RGBA, WEBP": (saved(half_transparent(), "webp", lossless=True, exact=True),
                        over_white(COLOURS, GREY), 1),
    "mode CMYK, TIFF": (saved(Image.fromarray(COLOURS).convert("CMYK"), "tif"), COLOURS, 1),
    "mode CMYK, JPEG": (saved(Image.fromarray(COLOURS).convert("CMYK"), "jpg", quality=100, subsampling=0),
                        COLOURS, 8),
    "mode I;16, PNG": (saved(GREY.astype(np.uint16) * 257), THREE, 0),
    "mode I;16, TIFF": (saved(GREY.astype(np.uint16) * 257, "tif"), THREE, 0),
    "mode I, TIFF": (saved(GREY.astype(np.int32) * 257, "tif"), THREE, 0),
    "16 bits a colour": (raw(SIXTEEN), COLOURS, 0),
    **{f"EXIF orientation {k}": (turned(k), upright(k), 6) for k in range(1, 9)},
    "EXIF orientation 0": (turned(0), COLOURS, 6), "EXIF orientation 9": (turned(9), COLOURS, 6),
    "EXIF of 57 kB": (large_exif(), COLOURS, 6),
    "EXIF of noise": (saved(COLOURS, "jpg", quality=100, subsampling=0,
                            exif=b"Exif\0\0" + bytes(range(256))), COLOURS, 6),
    "ICC profile": (saved(COLOURS, icc_profile=PROFILE), COLOURS, 0),
    "progressive JPEG": (saved(COLOURS, "jpg", quality=100, subsampling=0, progressive=True), COLOURS, 6),
    "JPEG with a tail": (
        lambda stem: raw(encoded("jpg", quality=100, subsampling=0) + b"tail" * 50, "jpg")(stem), COLOURS, 6),
    "JPEG called PNG": (lambda stem: raw(encoded("jpg", quality=100, subsampling=0))(stem), COLOURS, 6),
    "PNG called JPG": (lambda stem: raw(encoded("png"), "JPG")(stem), COLOURS, 0),
    "BMP": (saved(COLOURS, "bmp"), COLOURS, 0), "PPM": (saved(COLOURS, "ppm"), COLOURS, 0),
    "TIFF of three frames": (saved(COLOURS, "tif", save_all=True, append_images=FRAMES), COLOURS, 0),
    "WEBP of three frames": (saved(COLOURS, "webp", save_all=True, append_images=FRAMES, lossless=True),
                             COLOURS, 0),
    "PNG of three frames": (saved(COLOURS, save_all=True, append_images=FRAMES), COLOURS, 0),
    "1 × 1": (saved(COLOURS[:1, :1]), COLOURS[:1, :1], 0),
    "2 × 3": (saved(COLOURS[:2, :3]), COLOURS[:2, :3], 0),
    "40 × 1": (saved(COLOURS[:, :1]), COLOURS[:, :1], 0),
    "1 × 500": (saved(COLOURS[:1].repeat(9, axis=1)[:, :500]), COLOURS[:1].repeat(9, axis=1)[:, :500], 0),
    "2000 × 3": (saved(COLOURS[:, :3].repeat(50, axis=0)), COLOURS[:, :3].repeat(50, axis=0), 0),
    "600 × 800": (saved(COLOURS.repeat(15, axis=0).repeat(15, axis=1)[:, :800]),
                  COLOURS.repeat(15, axis=0).repeat(15, axis=1)[:, :800], 0)}


@pytest.mark.slow
@pytest.mark.parametrize("write, pixels, tolerance", cases(GOOD_IMAGES))
def test_photo_of_any_kind_is_segmented_as_it_looks(place, write, pixels, tolerance):
    """Read as the picture that a viewer shows. The index has its size and no class but the three; 255 where
    the picture is wholly transparent."""
    path = write("odd")
    read = np.asarray(image_files.read_image(path), int)
    assert read.shape == pixels.shape and np.abs(read - pixels).max() <= tolerance
    command(place, segment, [path, *SEGMENT[1:]])
    index, hidden = index_of("odd"), np.zeros(pixels.shape[:2], bool)
    with Image.open(path) as picture:
        if picture.has_transparency_data:
            hidden = np.asarray(picture.convert("RGBA"))[..., 3] == 0
    assert index.shape == pixels.shape[:2] and index[~hidden].max() < 3 and (index[hidden] == 255).all()


STRIPS = ["1 × 500", "2000 × 3"]
TRAINED_WITH = {name: row for name, row in GOOD_IMAGES.items()
                if "mode" in name or "×" in name or name.endswith(("frames", "6"))}


@pytest.mark.slow
@pytest.mark.parametrize("write, pixels, tolerance", cases(TRAINED_WITH, slow=STRIPS))
def test_training_image_of_any_kind_is_trained_with(place, write, pixels, tolerance):
    """As one of four, and the rectification that comes out is finite."""
    write("photos/odd")
    command(place, rectify, [*PHOTOS, "--out", "fresh"])
    assert json.loads(Path("fresh/photos/rectify/recipe.json").read_text())["images"] == 4
    assert all(tensor.isfinite().all() for tensor in weights_of("rectify", "fresh/photos").values())


AMBIGUOUS_IMAGES = {        # no convention says what is white: to refuse them is as good as to read them
    "mode F, TIFF, 0 to 255": (saved(GREY.astype(np.float32), "tif"), THREE),
    "mode F, TIFF, 0 to 1": (saved(GREY.astype(np.float32) / 255, "tif"), THREE),
    "mode F, TIFF, with NaN": (saved(np.where(GREY > 127, np.nan, GREY).astype(np.float32), "tif"), THREE),
    "mode I, TIFF, 0 to 255": (saved(GREY.astype(np.int32), "tif"), THREE),
    "mode I, TIFF, negative": (saved(-GREY.astype(np.int32) * 257, "tif"), THREE),
    "mode LAB, TIFF": (saved(Image.merge("LAB", [Image.fromarray(GREY)] * 3), "tif"), THREE)}


@pytest.mark.parametrize("write, pixels", cases(AMBIGUOUS_IMAGES))
def test_picture_without_a_known_white_is_refused_or_read(place, write, pixels):
    """Never silently all black, all white or with half of its greys lost."""
    path = write("odd")
    try:
        read = np.asarray(image_files.read_image(path), int)
    except ValueError as error:
        assert "odd.tif: expected" in str(error) and "truncated" not in str(error), error
    else:
        left = np.unique(read)
        assert len(left) > len(np.unique(pixels)) // 2, f"only the greys {left} are left"


PHOTO_NAMES = {"spaces": "my photo.jpg", "Unicode": "Küste 写真.jpg", "quotes": "it's \"it\".jpg",
               "two lines": "two\nlines.jpg", "percent": "50% {0}.jpg", "a dash": "./-x.jpg",
               "two dots": "a.b.jpg", "no suffix": "photo", "capitals": "A.JPEG",
               "bytes that are no UTF-8": os.fsdecode(b"caf\xe9.jpg")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, id=key) for key, name in PHOTO_NAMES.items()])
def test_photo_of_any_name_is_segmented(place, name):
    shutil.copy("photo.jpg", name)
    command(place, segment, [name, *SEGMENT[1:]])
    assert index_of(Path(name).stem).shape == (40, 56)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, id=key) for key, name in PHOTO_NAMES.items()
                                  if key != "no suffix"])
def test_training_image_of_any_name_is_trained_with(place, name):
    shutil.copy("photo.jpg", Path("photos", name))
    command(place, rectify, [*PHOTOS, "--out", "fresh"])
    checkpoint = runs.load(Path("fresh/photos/rectify/checkpoint.pt"), "rectify")
    images = checkpoint["settings"]["images"]
    assert Path(name).with_suffix("").as_posix() in images and len(images) == 4


def test_what_is_no_file_among_the_photos_is_passed_over(place, capsys):
    """A folder called x.png, a dangling link, a loop of links, an empty folder, a text change no weight."""
    Path("photos/x.png").mkdir()
    Path("photos/dangling.jpg").symlink_to("nowhere.jpg")
    Path("photos/loop").symlink_to(".")
    Path("photos/empty").mkdir()
    Path("photos/Thumbs.db").write_bytes(bytes(100))
    command(place, rectify, [*PHOTOS, "--out", "fresh"])
    assert same_weights(weights_of("rectify", "fresh/photos"), weights_of("rectify"))
    said = capsys.readouterr().out
    assert "3 photographs" in said and "1 dangling link" in said and "1 .db" in said, said


# ------------------------------------------------------------------------------------------ class files

def lines(*words: str) -> bytes:
    return "".join(f"{word}\n" for word in words).encode()


BAD_CLASSES = {
    "empty": b"", "blanks": b"\n \n\t\n\r\n", "comments": lines("# cat", "  # dog"), "one": lines("cat"),
    "one with synonyms": lines("cat, kitty, puss"), "twice": lines("cat", "dog", "cat"),
    "twice by case": lines("cat", "CAT"), "twice with blanks": lines("potted plant", "potted  plant"),
    "a synonym twice": lines("cat, pet", "dog, pet"),
    "a synonym twice in a class": lines("cat, cat", "dog"), "a name as a synonym": lines("cat", "dog, cat"),
    "twice in Unicode's two spellings": lines(*(unicodedata.normalize(form, "café")
                                                for form in ("NFC", "NFD")), "dog"),
    "commas alone": lines("cat", ", ,", "dog"), "an over-long name": lines("cat", "very " * 70 + "old dog"),
    "one word of 100 kB": lines("cat", "x" * 100_000), "no readable character": lines("cat", "\x08"),
    "256 classes": lines(*(f"word {i}" for i in range(256))),
    "1000 classes": lines(*(f"word {i}" for i in range(1000))),
    "UTF-16": "cat\ndog\n".encode("utf-16"), "UTF-16 without a mark": "cat\ndog\n".encode("utf-16-le"),
    "UTF-32": "cat\ndog\n".encode("utf-32"), "Latin-1": "Küche\nTür\n".encode("latin-1"),
    "a picture": png(1, 1, 8, 0, b"\0\0"), "NUL in a name": b"ca\0t\ndog\n",
    "CLIP's end token": lines("cat", "<|endoftext|>"),
    "CLIP's start token in a name": lines("cat", "dog <|startoftext|>"), "half a JSON": b'["cat",\n"dog"',
    "braces at the beginning": lines("{}", "{0} {name}")}


@pytest.mark.parametrize("script, content",
                         cases(BAD_CLASSES, "rectify", "distill", "segment", slow=["distill"]))
def test_bad_class_file_is_named(place, capsys, script, content):
    Path("bad names.txt").write_bytes(content)
    flags = [flag if flag not in ("names.txt", "cat, sofa, wall") else "bad names.txt"
             for flag in FIRST_RUN[script.__name__]]
    refused(capsys, place, script, flags, "--classes bad names.txt")


@pytest.mark.parametrize("name", ["nowhere.txt", "photos", "nowhere/names.txt", "x" * 300, ""],
                         ids=["missing", "a folder", "in a missing folder", "a long name", "empty"])
@pytest.mark.parametrize("script", ["rectify", "distill", "evaluate"])
def test_class_file_that_is_not_there_is_named(place, capsys, script, name):
    refused(capsys, place, SCRIPTS[script], ["--data", "photos", "--classes", name, "--clip", CLIP],
            name or "--classes")


@pytest.mark.parametrize("words", ["nams.txt", "nowhere/names.txt", "photos", "names.tx", "~/names.txt"])
def test_mistyped_class_file_of_segment_is_told_from_words(place, capsys, words):
    """segment.py's --classes is a file or words: what looks like a path, and is none, is named as such."""
    said = refused(capsys, place, segment, ["photo.jpg", "--classes", words, "--clip", CLIP],
                   os.path.expanduser(words))
    assert "file" in said, said


@pytest.mark.parametrize("words", ["", ",", " , ,", "cat", "cat,", "cat, CAT", "cat, dog, cat", "cat, \x08",
                                   "cat, " + "very " * 70])
def test_bad_list_of_words_is_refused(place, capsys, words):
    refused(capsys, place, segment, ["photo.jpg", "--classes", words, "--clip", CLIP], "--classes")


GOOD_CLASSES = {
    "a byte-order mark": (b"\xef\xbb\xbf" + lines("cat", "dog"), ["cat", "dog"]),
    "Windows' line ends": (b"cat\r\ndog\r\n", ["cat", "dog"]),
    "old Macs' line ends": (b"cat\rdog\r", ["cat", "dog"]),
    "no last line end": (b"cat\ndog", ["cat", "dog"]),
    "blanks and comments": (b"# pets\n\n cat \n\t\n  # more\ndog\n", ["cat", "dog"]),
    "synonyms": (lines("cat, kitty ,, puss,", "dog"), ["cat", "dog"]),
    "emoji": (lines("🐱", "🐶"), ["🐱", "🐶"]),
    "Cyrillic and Chinese": (lines("кот", "狗"), ["кот", "狗"]), "digits": (lines("7", "8"), ["7", "8"]),
    "braces": (lines("a {}", "{0} {name}"), ["a {}", "{0} {name}"]),
    "percent": (lines("%s", "100%"), ["%s", "100%"]),
    "entities": (lines("cat &amp; dog", "sofa"), ["cat & dog", "sofa"]),
    "apostrophes": (lines("'cat'", "dog's nose"), ["'cat'", "dog's nose"]),
    "quotes": (lines('"cat"', "“dog”"), ["cat", "dog"]),
    "a name of 60 tokens": (lines("cat", "very " * 59 + "old"), ["cat", "very " * 59 + "old"])}


@pytest.mark.slow
@pytest.mark.parametrize("content, names", cases(GOOD_CLASSES, slow=list(GOOD_CLASSES)[7:]))
def test_class_file_of_any_kind_is_read(place, content, names):
    """Through a training: the names are in its checkpoint, in their order."""
    Path("good.txt").write_bytes(content)
    command(place, rectify, [*PHOTOS[:3], "good.txt", *PHOTOS[4:], "--out", "fresh"])
    settings = runs.load(Path("fresh/photos/rectify/checkpoint.pt"), "rectify")["settings"]
    assert [first for first, *_ in settings["synonyms"]] == names
    command(place, segment, ["photo.jpg", "--out", "fresh"])
    assert index_of().max() < len(names)


def test_255_classes_go_through_a_training(place, monkeypatch):
    """As many as a label picture has values, but for the one that means ignored."""
    monkeypatch.setattr(class_lists, "QUERY_TEMPLATES", class_lists.QUERY_TEMPLATES[:2])
    Path("many.txt").write_bytes(lines(*(f"word {i}" for i in range(255))))
    command(place, rectify, [*PHOTOS[:3], "many.txt", *PHOTOS[4:], "--out", "fresh"])
    command(place, segment, ["photo.jpg", "--out", "fresh"])
    assert weights_of("rectify", "fresh/photos")["decoder.norm.weight"].shape == (255,)
    assert index_of().max() < 255


# ------------------------------------------------------------------------------------------ VOC's tree

BASE = Path("data", VOC_BASE)
LISTS = BASE / "ImageSets/Segmentation"
IDS = ("2007_000032", "2007_000039", "2007_000063", "2007_000068")


def list_of(content: bytes):
    def spoil() -> None:
        for name in ("train.txt", "val.txt"):
            (LISTS / name).write_bytes(content)
    return spoil


def without(path: Path):
    return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_for_folder(path: Path):
    def spoil() -> None:
        shutil.rmtree(path)
        path.write_text("no folder")
    return spoil


def folder_for_file(*paths: Path):
    def spoil() -> None:
        for path in paths:
            path.unlink(missing_ok=True)
            path.mkdir(parents=True)
    return spoil


def lists_gone() -> None:
    for name in ("train.txt", "val.txt"):
        (LISTS / name).unlink()


def dangling_image() -> None:
    for name in ("2007_000032.jpg", "2007_000033.jpg"):
        (BASE / "JPEGImages" / name).unlink()
        (BASE / "JPEGImages" / name).symlink_to("nowhere.jpg")


def images_in_capitals() -> None:
    for path in (BASE / "JPEGImages").iterdir():
        path.rename(path.with_suffix(".JPG"))


BAD_TREES = {                           # what is spoilt, what is to be named
    "no data folder": (without(Path("data")), "JPEGImages"),
    "empty data folder": (without(Path("data/VOCdevkit")), "JPEGImages"),
    "no JPEGImages": (without(BASE / "JPEGImages"), "JPEGImages"),
    "no ImageSets": (without(BASE / "ImageSets"), ".txt"),
    "no lists": (lists_gone, ".txt"),
    "JPEGImages is a file": (file_for_folder(BASE / "JPEGImages"), "JPEGImages"),
    "ImageSets is a file": (file_for_folder(BASE / "ImageSets"), ".txt"),
    "VOC2012 is a file": (file_for_folder(BASE), "JPEGImages"),
    "lists are folders": (folder_for_file(LISTS / "train.txt", LISTS / "val.txt"), ".txt"),
    "empty lists": (list_of(b""), ".txt"), "blank lists": (list_of(b"\n \r\n"), ".txt"),
    "lists of UTF-16": (list_of("2007_000032\n".encode("utf-16")), ".txt"),
    "lists of noise": (list_of(b"\xff\x80\n"), ".txt"),
    "lists with NUL": (list_of(b"2007\x00000032\n"), ".txt"),
    "a name of 300 letters": (list_of(b"x" * 300), "x" * 300),
    "a missing image": (list_of(b"2007_000032\n2007_999999\n"), "2007_999999.jpg"),
    "names with suffixes": (list_of(b"2007_000032.jpg\n"), "2007_000032.jpg"),
    "a dangling link": (dangling_image, ".jpg")}


@pytest.mark.parametrize("script, spoil, naming", cases(BAD_TREES, "rectify", "evaluate", slow=["evaluate"]))
def test_bad_tree_of_voc_is_refused(place, capsys, script, spoil, naming):
    spoil()
    refused(capsys, place, script, VOC, naming)


ORDERED = "".join(f"{name}\n" for name in IDS).encode()
GOOD_LISTS = {"Windows' line ends": ORDERED.replace(b"\n", b"\r\n"),
              "blank lines": b"\n" + ORDERED.replace(b"\n", b"\n\n"),
              "trailing blanks": ORDERED.replace(b"\n", b"  \t\n"), "leading blanks": b"  " + ORDERED,
              "no last line end": ORDERED[:-1], "repetitions": ORDERED * 2,
              "another order": b"".join(reversed(ORDERED.splitlines(keepends=True))),
              "a second column": ORDERED.replace(b"\n", b" 1\n"),
              "a byte-order mark": b"\xef\xbb\xbf" + ORDERED}


@pytest.mark.slow
@pytest.mark.parametrize("content", cases(GOOD_LISTS, slow=list(GOOD_LISTS)[4:8]))
def test_list_of_any_form_gives_the_same_weights(place, content):
    (LISTS / "train.txt").write_bytes(content)
    command(place, rectify, [*VOC, "--out", "fresh"])
    assert same_weights(weights_of("rectify", "fresh/voc"), weights_of("rectify", "runs/voc"))


def test_images_and_labels_with_suffixes_in_capitals_are_found(place):
    """As copies by way of a camera's or an old disk's file system have them."""
    images_in_capitals()
    for path in LABEL.parent.iterdir():
        path.rename(path.with_suffix(".PNG"))
    command(place, rectify, [*VOC, "--out", "fresh"])
    assert same_weights(weights_of("rectify", "fresh/voc"), weights_of("rectify", "runs/voc"))
    measured = [json.loads(Path(out, "voc/rectify/metrics.json").read_text()) for out in ("fresh", "runs")]
    assert measured[0]["miou"] == measured[1]["miou"] and measured[0]["fingerprint"]["images"] == 2


# ------------------------------------------------------------------------------------------ labels

LABEL = BASE / "SegmentationClass/2007_000042.png"
VALUES = np.random.default_rng(0).choice([0, 1, 15, 255], (40, 56)).astype(np.uint8)


def label_of(content):
    """A label of bytes, of a function that gives bytes, of values or of a whole picture."""
    def spoil() -> None:
        if isinstance(content, np.ndarray):
            write_label(LABEL, content)
        elif isinstance(content, Image.Image):
            content.save(LABEL)
        else:
            LABEL.write_bytes(content() if callable(content) else content)
    return spoil


def cut_label(share: float):
    return lambda: LABEL.read_bytes()[:round(share * LABEL.stat().st_size)]


BAD_LABELS = {
    "zero bytes": label_of(b""), "text": label_of(b"no picture"), "cut at 30 %": label_of(cut_label(0.3)),
    "cut at 80 %": label_of(cut_label(0.8)), "a JPEG": label_of(lambda: encoded("jpg")),
    "colours": label_of(photo()), "colours with alpha": label_of(photo().convert("RGBA")),
    "16 bits": label_of(Image.fromarray(VALUES.astype(np.uint16))),
    "turned": label_of(VALUES.T), "a row too many": label_of(np.vstack([VALUES, VALUES[:1]])),
    "one pixel": label_of(VALUES[:1, :1]),
    "an unknown value": label_of(np.where(VALUES == 15, 21, VALUES)),
    "254": label_of(np.where(VALUES == 15, 254, VALUES)),
    "grey values of a photo": label_of(np.asarray(photo().convert("L"))), "a folder": folder_for_file(LABEL)}


@pytest.mark.parametrize("spoil", cases(BAD_LABELS))
def test_bad_label_is_named(place, capsys, spoil):
    spoil()
    refused(capsys, place, evaluate, ["--data", "voc"], LABEL)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", cases({name: BAD_LABELS[name] for name in (
    "text", "cut at 30 %", "an unknown value", "turned")}))
def test_bad_label_does_not_cost_the_training(place, capsys, spoil):
    """The checkpoint is written before any label is opened; then the measuring is refused."""
    spoil()
    refused(capsys, place, rectify, [*VOC, "--out", "fresh"], LABEL,
            new=[f"fresh/voc/rectify/{name}" for name in ("checkpoint.pt", "recipe.json", "log.jsonl")])
    assert same_weights(weights_of("rectify", "fresh/voc"), weights_of("rectify", "runs/voc"))


def all_labels(value: int):
    def spoil() -> None:
        for path in LABEL.parent.iterdir():
            write_label(path, np.full((40, 56), value))
    return spoil


@pytest.mark.parametrize("spoil", cases({
    "all ignored": all_labels(255), "all background": all_labels(0), "none": without(LABEL.parent),
    "an empty folder": lambda: (shutil.rmtree(LABEL.parent), LABEL.parent.mkdir()),
    "a file": file_for_folder(LABEL.parent)}))
def test_nothing_to_measure_is_no_result(place, capsys, spoil):
    spoil()
    refused(capsys, place, evaluate, ["--data", "voc"])


def labels_of_wrong_names() -> None:
    write_label(Path("wrong/nobody.png"), np.zeros((40, 56)))


def labels_as_jpeg() -> None:
    Path("wrong").mkdir()
    Image.new("L", (56, 40)).save("wrong/a.jpg")


def labels_of_more_classes() -> None:
    write_label(Path("wrong/a.png"), np.full((40, 56), 3))


BAD_LABEL_FOLDERS = {
    "missing": ("nowhere", nothing), "empty": ("empty", empty_folder), "a file": ("names.txt", nothing),
    "": ("", nothing), "below a file": ("names.txt/labels", nothing),
    "wrong names": ("wrong", labels_of_wrong_names),
    "JPEG": ("wrong", labels_as_jpeg), "a class too many": ("wrong", labels_of_more_classes),
    "the photos themselves": ("photos", nothing)}


def test_label_folder_with_names_in_capitals_is_read(place):
    """A.PNG is the label of a.jpg: here it says class 0 everywhere, and one image is measured."""
    write_label(Path("capitals/A.PNG"), np.zeros((40, 56)))
    metrics = command(place, evaluate, ["--labels", "capitals"])
    assert metrics["rectify"]["fingerprint"]["images"] == 1


@pytest.mark.parametrize("name, spoil", cases(BAD_LABEL_FOLDERS))
def test_bad_label_folder_is_named(place, capsys, name, spoil):
    spoil()
    refused(capsys, place, evaluate, ["--labels", name], name)


# ------------------------------------------------------------------------------------------ checkpoints

def code(path: Path) -> None:
    """A pickle that makes a file called `executed` when it is loaded freely."""
    class Bomb:
        def __reduce__(self):
            return open, ("executed", "w")
    torch.save({"stage": path.parent.name, "settings": {}, "weights": Bomb()}, path)


def truncated(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[:round(share * path.stat().st_size)])


def flipped(path: Path) -> None:
    """One bit in the middle of the largest tensor of the file."""
    content = torch.load(path, weights_only=True)
    tensors = [content] if isinstance(content, torch.Tensor) else content["weights"].values()
    largest = max((tensor for tensor in tensors if tensor.is_floating_point()), key=torch.Tensor.numel)
    numbers, file = largest.numpy().tobytes(), bytearray(path.read_bytes())
    file[file.index(numbers) + len(numbers) // 2 | 3] ^= 0x20           # of an exponent: it matters
    path.write_bytes(file)


def changed(change):
    """The content of a checkpoint after `change(content)`, which alters it or returns another."""
    def spoil(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(content if (other := change(content)) is None else other, path)
    return spoil


def first_weight(change):
    def alter(content: dict) -> None:
        name = next(iter(content["weights"]))
        content["weights"][name] = change(content["weights"][name])
    return changed(alter)


def first_weight_gone(content: dict) -> None:
    del content["weights"][next(iter(content["weights"]))]


def fewer_classes(content: dict) -> None:
    """The weights of a training with two classes, under the settings of one with three."""
    for name, tensor in content["weights"].items():
        if "decoder.norm" in name and tensor.ndim:
            content["weights"][name] = tensor[:2]


def remove(*keys):
    def alter(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]
    return changed(alter)


def put(value, *keys):
    def alter(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
    return changed(alter)


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_FILES = {"empty": lambda path: path.write_bytes(b""),
             "text": lambda path: path.write_text("no checkpoint\n"),
             "JSON": lambda path: path.write_text('{"stage": "rectify"}'),
             "zeros": lambda path: path.write_bytes(bytes(5000)),
             **{f"cut at {round(100 * share)} %": truncated(share) for share in (0.01, 0.3, 0.6, 0.99)},
             "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
             "one wrong bit": flipped, "code": code, "a folder": folder_for}
OF_SETTINGS = {
    **{f"no {name}": remove("settings", name) for name in runs.SETTINGS},
    **{f"{name} that is none": put([1, 2] if kind is dict else "text" if kind is int else 7, "settings", name)
       for name, kind in runs.SETTINGS.items()}}
BAD_CHECKPOINTS = {
    **BAD_FILES, "a list": changed(lambda content: [1, 2]), "an empty dict": changed(lambda content: {}),
    "a tensor": changed(lambda content: torch.ones(3)), "another stage's": put("toyland", "stage"),
    "no stage": remove("stage"), "no weights": remove("weights"), "no settings": remove("settings"),
    "settings that are none": put("text", "settings"),
    **OF_SETTINGS, "a system without a name": put({}, "settings", "system"),
    "an unknown system": put({"name": "recap", "command": "python recap.py"}, "settings", "system"),
    "weights that are none": put([1, 2], "weights"),
    "a weight that is none": first_weight(lambda tensor: "text"), "a weight less": changed(first_weight_gone),
    "a weight more": put(torch.ones(3), "weights", "surplus"),
    "a weight of another shape": first_weight(lambda tensor: torch.ones(2, 2)),
    "another number of classes": changed(fewer_classes),
    "a weight that is NaN": first_weight(lambda tensor: tensor * torch.nan)}
OF_RECIPE = {"rectify": {"a number of the recipe missing": remove("settings", "recipe", "vote_threshold"),
                         "a number more in the recipe": put(1, "settings", "recipe", "surplus"),
                         "a dense path that is none": put("nonsense", "settings", "recipe", "dense_path"),
                         "a prompt length of another prompt": put(5, "settings", "recipe", "prompt_length")},
             "distill": {"no backbone": remove("settings", "recipe", "backbone"),
                         "another backbone": put("nonsense", "settings", "recipe", "backbone"),
                         "no teacher": remove("settings", "teacher"),
                         "a teacher that is none": put("text", "settings", "teacher"),
                         "no teacher's recipe": remove("settings", "teacher_recipe"),
                         "a teacher's recipe that is none": put([1, 2], "settings", "teacher_recipe"),
                         "a number of the teacher's missing": remove("settings", "teacher_recipe",
                                                                     "loss_scale")}}


@pytest.mark.parametrize("script, spoil", cases(BAD_CHECKPOINTS | OF_RECIPE["rectify"], "distill", "evaluate",
                                                "segment", slow=["evaluate", "segment"]))
def test_bad_rectification_is_named(place, capsys, script, spoil):
    """By every script that would continue from it. What code is in it is not run."""
    path = Path("runs/photos/rectify/checkpoint.pt")
    spoil(path)
    os.utime(path)                          # it is still the newest
    flags = LATER_RUN[script.__name__] + (["--stage", "rectify"] if script is segment else [])
    refused(capsys, place, script, flags, path)
    assert not Path("executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, spoil", cases(BAD_CHECKPOINTS | OF_RECIPE["distill"], "evaluate", "segment",
                                                slow=["evaluate"]))
def test_bad_student_is_named(place, capsys, script, spoil):
    path = Path("runs/photos/distill/checkpoint.pt")
    spoil(path)
    refused(capsys, place, script, LATER_RUN[script.__name__], path)
    assert not Path("executed").exists()


def of_optimizer(change):
    def alter(content: dict) -> None:
        change(content["optimizer"])
    return changed(alter)


def momentum_of_other_shapes(optimizer: dict) -> None:
    for state in optimizer["state"].values():
        state["momentum_buffer"] = torch.ones(2)


BAD_RESUMES = {
    **BAD_CHECKPOINTS, "no optimiser": remove("optimizer"),
    "an optimiser that is none": put("text", "optimizer"),
    "no groups in the optimiser": of_optimizer(lambda optimizer: optimizer.pop("param_groups")),
    "momentum of other shapes": of_optimizer(momentum_of_other_shapes), "no step": remove("step"),
    "a step that is none": put("text", "step"), "a negative step": put(-1, "step"),
    "a step behind the end": put(10 ** 6, "step"), "no log": remove("log"),
    "a log that is none": put(7, "log")}


@pytest.mark.parametrize("script, spoil", cases(BAD_RESUMES, "rectify", "distill",
                                                slow=["distill", *OF_SETTINGS]))
def test_bad_resume_is_named(place, capsys, script, spoil):
    """--resume goes on from what is whole and fits, or not at all: an earlier checkpoint stays."""
    path = Path("unfinished/photos", script.__name__, "unfinished/state.pt")
    spoil(path)
    refused(capsys, place, script, [*PHOTOS, "--out", "unfinished", "--resume"], path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("script", [rectify, distill], ids=lambda script: script.__name__)
def test_unspoilt_run_resumes(place, script):
    """What the cases above spoil is whole before: it ends with the weights of a run that nothing stopped."""
    command(place, script, [*PHOTOS, "--out", "unfinished", "--resume"])
    assert same_weights(weights_of(script.__name__, "unfinished/photos"), weights_of(script.__name__))


BAD_LOGS = {"empty": b"", "noise": b"\xff\x80\x00\n", "half a line": b'{"step": 0, "lo', "a number": b"5\n",
            "a list": b"[]\n", "no step": b"{}\n", "a step that is none": b'{"step": "text"}\n',
            "blank lines": b"\n\n"}


@pytest.mark.parametrize("content", cases(BAD_LOGS))
def test_log_that_cannot_be_read_hinders_no_resume(place, content):
    """It is for people, and state.pt has its lines too: the run goes on, and its log is whole again."""
    Path("unfinished/photos/rectify/unfinished/log.jsonl").write_bytes(content)
    command(place, rectify, [*PHOTOS, "--out", "unfinished", "--resume"])
    assert same_weights(weights_of("rectify", "unfinished/photos"), weights_of("rectify"))
    logs = [Path(out, "photos/rectify/log.jsonl").read_text().splitlines() for out in ("unfinished", "runs")]
    ours, expected = ([json.loads(line) for line in log] for log in logs)
    assert len(ours) == len(expected)
    assert all(one[key] == other[key] for one, other in zip(ours, expected)
               for key in ("step", "loss", "rate"))


# ------------------------------------------------------------------------------------------ caches

BAD_CACHES = {
    **{name: spoil for name, spoil in BAD_FILES.items() if name != "a folder"},
    "another shape": changed(lambda content: torch.ones(2, 2)), "a list": changed(lambda content: [1, 2]),
    "an empty dict": changed(lambda content: {}), "a row less": changed(lambda content: content[1:]),
    "NaN": changed(lambda content: content * torch.nan), "infinity": changed(lambda content: content / 0)}


@pytest.mark.slow
@pytest.mark.parametrize("script, spoil, kind", [
    pytest.param(*case.values, kind, id=f"{case.id}, {kind}", marks=case.marks)
    for case in cases(BAD_CACHES, "rectify", "distill", slow=["distill"])
    for kind in ("query", "votes", "features")
    if kind != "features" or case.values[0] is rectify])
def test_bad_cache_is_made_again(place, script, spoil, kind):
    """The weights are those of a run with a good one, and the file is what it was."""
    out, flags = ("stored", STORED) if kind == "features" else ("runs", PHOTOS)
    [path] = Path(out, "photos/cache").glob(f"{kind}-*.pt")
    expected, before = weights_of(script.__name__, f"{out}/photos"), torch.load(path, weights_only=True)
    spoil(path)
    command(place, script, flags)
    assert same_weights(weights_of(script.__name__, f"{out}/photos"), expected)
    assert torch.equal(torch.load(path, weights_only=True), before)
    assert not Path("executed").exists()


# ------------------------------------------------------------------------------------------ --clip

def clip_file(change):
    """A state dict in OpenAI's names after `change`, which alters it or returns another content."""
    def write() -> None:
        state = openai_state(**SMALLEST)
        torch.save(state if (other := change(state)) is None else other, "bad clip.pt")
    return write


def clip_bytes(content):
    return lambda: Path("bad clip.pt").write_bytes(content)


def clip_cut(share: float):
    def write() -> None:
        write_openai_archive("bad clip.pt", **SMALLEST)
        truncated(share)(Path("bad clip.pt"))
    return write


def clip_code() -> None:
    code(Path("bad clip.pt"))


def renamed(state: dict) -> dict:
    return {name.replace("visual.", "image_tower."): tensor for name, tensor in state.items()}


def clip_without(name: str):
    return clip_file(lambda state: {key: tensor for key, tensor in state.items() if key != name})


def set_key(name: str, change):
    def alter(state: dict) -> None:
        state[name] = change(state[name])
    return clip_file(alter)


BAD_CLIPS = {
    "empty": clip_bytes(b""), "text": clip_bytes(b"no weights"), "a web page": clip_bytes(b"<!DOCTYPE html>"),
    **{f"archive cut at {round(100 * share)} %": clip_cut(share) for share in (0.01, 0.5, 0.99)},
    "code": clip_code, "a list": clip_file(lambda state: [1, 2]),
    "an empty dict": clip_file(lambda state: {}),
    "a ResNet": clip_file(lambda state: {"visual.layer1.0.conv1.weight": torch.ones(2, 2, 1, 1)}),
    "names of another program": clip_file(renamed), "a key less": clip_without("ln_final.bias"),
    "a key of the sizes less": clip_without("visual.conv1.weight"),
    "a key more": clip_file(lambda state: state.update(surplus=torch.ones(2))),
    "a transposed projection": set_key("visual.proj", torch.Tensor.t),
    "a short norm": set_key("visual.ln_post.weight", lambda t: t[:3]),
    "a flat patch embedding": set_key("visual.conv1.weight", torch.Tensor.flatten),
    "a flat text projection": set_key("text_projection", torch.Tensor.flatten),
    "no square of patches": set_key("visual.positional_embedding", lambda t: t[:6]),
    "1000 words": set_key("token_embedding.weight", lambda t: t[:1000]),
    "an image width of 63": set_key("visual.conv1.weight", lambda t: t[:63]),
    "one channel": set_key("visual.conv1.weight", lambda t: t[:, :1]),
    "NaN in the image tower": set_key("visual.proj", lambda t: t * torch.nan),
    "NaN in the text tower": set_key("text_projection", lambda t: t * torch.nan),
    "infinity": set_key("visual.ln_post.weight", lambda t: t / 0),
    "an empty folder": lambda: Path("bad clip.pt").mkdir()}


@pytest.mark.parametrize("script, spoil", cases(BAD_CLIPS, "rectify", "segment", slow=["rectify"]))
def test_bad_clip_is_named(place, capsys, script, spoil):
    spoil()
    flags = [flag if flag != CLIP else "bad clip.pt" for flag in FIRST_RUN[script.__name__]]
    refused(capsys, place, script, [*flags, "--out", "fresh"], "bad clip.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("script", ["rectify", "segment"])
@pytest.mark.parametrize("name", ["nowhere.pt", "ViT-B/17", "vit-b/16", "RN50", "RN50x64", "", "photos",
                                  "nowhere/clip.pt", "names.txt/clip.pt", "x" * 300])
def test_clip_that_is_not_there_is_named(place, capsys, script, name):
    flags = {"segment": SEGMENT[:3]}.get(script, ["--data", "voc"])
    refused(capsys, place, SCRIPTS[script], [*flags, "--clip", name, "--out", "fresh"], name)


@pytest.mark.parametrize("change", cases({
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "of a parallel training": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "of a larger model": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "in half precision": lambda state: {name: t.half().float().half() for name, t in state.items()}}))
def test_clip_in_another_wrapping_works(place, change):
    state = openai_state(**SMALLEST)
    torch.save(change(state), "my clip.pt")
    command(place, segment, [flag if flag != CLIP else "my clip.pt" for flag in SEGMENT])
    assert index_of().shape == (40, 56)


# ---------------------------------------------------------------------------------- --out and what lies there

REPRODUCE = ["stages", *VOC, "--seeds", "1", "--jobs", "1"]
OUT_RUNS = {"rectify": [*PHOTOS], "distill": [*PHOTOS], "evaluate": [*VOC], "segment": SEGMENT[:-2],
            "reproduce": REPRODUCE}


@pytest.mark.slow
@pytest.mark.parametrize("script", OUT_RUNS)
@pytest.mark.parametrize("out", ["names.txt", "names.txt/below", f"{os.devnull}/below", "x" * 300],
                         ids=["a file", "below a file", "below the null device", "a long name"])
def test_out_that_is_no_folder_is_refused(place, capsys, script, out):
    refused(capsys, place, SCRIPTS[script], [*OUT_RUNS[script], "--out", out], out)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["my Läufe 実行", "it's \"mine\"", "deep/er/../50% {0}"])
def test_out_of_any_name_works(place, out):
    """All scripts one after the other, each finding what the one before made."""
    command(place, rectify, [*VOC, "--out", out])
    command(place, distill, ["--out", out])
    assert same_weights(weights_of("distill", Path(out, "voc")), weights_of("distill", "runs/voc"))
    metrics = command(place, evaluate, ["--out", out])
    assert metrics == json.loads(Path("runs/voc/evaluate/metrics.json").read_text())
    command(place, segment, ["photo.jpg", "--out", out])
    assert index_of(out=out).shape == (40, 56)


def folder_at(name: str):
    return folder_for_file(Path("fresh", name))


def file_at(name: str):
    def spoil() -> None:
        Path("fresh", name).parent.mkdir(parents=True, exist_ok=True)
        Path("fresh", name).write_text("in the way")
    return spoil


IN_THE_WAY = {
    **{name: file_at(name)
       for name in ("photos", "photos/rectify", "photos/cache", "photos/rectify/unfinished")},
    **{f"photos/rectify/{name}": folder_at(f"photos/rectify/{name}")
       for name in ("recipe.json", "log.jsonl", "checkpoint.pt", "metrics.json", "preview.png",
                    *(f"unfinished/{file}" for file in ("state.pt", "recipe.json", "log.jsonl",
                                                        "checkpoint.pt", "lock")))}}


@pytest.mark.parametrize("name, spoil", [pytest.param(*case, id=case[0]) for case in IN_THE_WAY.items()])
def test_what_lies_in_the_way_of_a_training_is_named(place, capsys, name, spoil):
    """A file for a folder, a folder for a file: seen before anything is trained or written."""
    spoil()
    said = refused(capsys, place, rectify, [*PHOTOS, "--out", "fresh"], f"fresh/{name}")
    assert ".part" not in said, said                        # the file that was meant, not its temporary name


@pytest.mark.parametrize("script, flags, name, spoil", [
    pytest.param(evaluate, VOC, "voc/evaluate", file_at, id="evaluate: the folder"),
    pytest.param(evaluate, VOC, "voc/evaluate/metrics.json", folder_at, id="evaluate: metrics.json"),
    pytest.param(evaluate, VOC, "voc/evaluate/preview.png", folder_at, id="evaluate: preview.png"),
    pytest.param(segment, SEGMENT, "segment", file_at, id="segment: the folder"),
    pytest.param(segment, SEGMENT, "segment/photo_index.png", folder_at, id="segment: index"),
    pytest.param(segment, SEGMENT, "segment/photo_overlay.png", folder_at, id="segment: overlay"),
    pytest.param(reproduce, REPRODUCE, "reproduce", file_at, id="reproduce: the folder"),
    pytest.param(reproduce, REPRODUCE, "reproduce/voc/reclip++", file_at, id="reproduce: a system's folder"),
    pytest.param(reproduce, REPRODUCE, "reproduce/voc/results.md", folder_at, id="reproduce: results.md"),
    pytest.param(reproduce, REPRODUCE, "reproduce/voc/results.json", folder_at,
                 id="reproduce: results.json")])
def test_what_lies_in_the_way_of_results_is_named(place, capsys, script, flags, name, spoil):
    """All of a script's files are written or none."""
    spoil(name)()
    said = refused(capsys, place, script, [*flags, "--out", "fresh"], f"fresh/{name}")
    assert ".part" not in said, said


BAD_METRICS = {"empty": b"", "text": b"no JSON", "cut": b'{"vanilla": {"miou": 1.', "a list": b"[]",
               "no stage": b"{}", "noise": b"\xff\x80",
               "no miou": b'{"vanilla": {}, "maskclip": {}, "rectify": {}, "distill": {}}'}


@pytest.mark.slow
@pytest.mark.parametrize("content", cases(BAD_METRICS))
def test_bad_metrics_of_a_seed_are_measured_again(place, monkeypatch, content):
    """reproduce.py takes what is finished as it is: a file that is no result must not end in a riddle."""
    def in_this_process(words, _log, _environment):         # another one would not know the quick recipes
        command(place, reproduce.SCRIPTS[words[0]], words[1:])
        return SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(reproduce, "start", in_this_process)
    run = Path("fresh/reproduce/voc/reclip++/0/voc")
    for stage in ("rectify", "distill"):
        shutil.copytree(Path("runs/voc", stage), run / stage)
    for name in ("evaluate", "distill"):
        (run / name).mkdir(exist_ok=True)
        (run / name / "metrics.json").write_bytes(content)
    before = (run / "distill/checkpoint.pt").stat().st_mtime_ns
    command(place, reproduce, [*REPRODUCE, "--out", "fresh"])
    assert json.loads((run / "evaluate/metrics.json").read_text())["distill"]["miou"] > 0
    assert json.loads((run / "distill/metrics.json").read_text())["miou"] > 0
    assert (run / "distill/checkpoint.pt").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------ Toyland's folder

def scenes_drawn() -> None:
    world.draw_dataset(Path("data"))


def spoilt_scene(split: str, content):
    def spoil() -> None:
        scenes_drawn()
        path = Path("data/toyland/images", split, "0001.png")
        path.write_bytes(content(path.read_bytes()))
    return spoil


BAD_SCENES = {
    f"{split} {name}": (split, change) for split in ("train", "val") for name, change in (
        ("empty", lambda _: b""), ("text", lambda _: b"no picture"),
        ("cut", lambda whole: whole[:len(whole) // 2]),
        ("of another size", lambda _: png(1, 1, 8, 0, b"\0\0")))
    if (split, name) != ("train", "of another size")}


@pytest.mark.parametrize("split, content", cases(BAD_SCENES))
@pytest.mark.slow
@pytest.mark.parametrize("script", ["rectify", "world"])
def test_bad_scene_is_drawn_again_or_named(place, capsys, script, split, content):
    """A scene is a function of its number: it is drawn again, or the run is refused. No riddle."""
    spoilt_scene(split, content)()
    path = Path("data/toyland/images", split, "0001.png")
    before = path.read_bytes()
    try:
        with errors.one_paragraph():
            command(place, SCRIPTS[script],
                    ["--out", "fresh", "--epochs", "1"] if script == "rectify" else [])
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and str(path) in said and "expected" in said, said
    else:
        if path.read_bytes() == before:                     # then it must not have been looked at as a scene
            assert script == "world" and split == "train"
        else:
            with Image.open(path) as scene:
                assert np.array_equal(np.asarray(scene), world.scene(split, 1)[0])


@pytest.mark.parametrize("root, spoil", cases({
    "a file": ("names.txt", nothing), "below a file": ("names.txt/data", nothing),
    "a long name": ("x" * 300, nothing),
    "toyland is a file": ("own", lambda: (Path("own").mkdir(), Path("own/toyland").write_text("in the way"))),
    "images is a file": ("own", lambda: (Path("own/toyland").mkdir(parents=True),
                                         Path("own/toyland/images").write_text("in the way"))),
    "overview.png is a folder": ("own", folder_for_file(Path("own/toyland/overview.png")))}))
def test_root_that_toyland_cannot_be_drawn_to_is_refused(place, capsys, root, spoil):
    spoil()
    new = [f"own/toyland/{kind}/{split}/{number:04d}.png"
           for kind, splits in (("images", ("train", "val", "test")), ("labels", ("val", "test")))
           for split in splits for number in range(2)]          # whole scenes are kept for the next time
    said = refused(capsys, place, world, ["--root", root], root, new=new)
    assert ".part" not in said, said
