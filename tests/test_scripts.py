"""The scripts as they are used: whole runs in small, labels that training never sees, bad input, interruptions.

    python -m pytest tests/test_scripts.py           # under a minute; the real size: test_layouts.py

No network, no real dataset and no real weights: trees and weights files are written here, in the formats that people
have. Recipes are those of the datasets, on pictures of a few dozen pixels (see helpers.quick_recipes).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import distill
import evaluate
import rectify
import runs
import segment
import toyland
from conftest import ROOT
from helpers import (SMALLEST, VOC_BASE, photo, refusal, run, write_label, write_openai_archive, write_photos,
                     write_voc_tree)

SCRIPTS = ["check", "distill", "evaluate", "figures", "rectify", "scores", "segment", "toyland"]
FIELDS = {"miou", "pixel_accuracy", "per_class_iou", "fingerprint"}


@pytest.fixture
def voc(place, tiny_clip):
    """VOC's tree in ./data; gives the flags that a first run needs."""
    write_voc_tree(place / "data")
    return ["--data", "voc", "--clip", tiny_clip]


@pytest.fixture
def photos(place, tiny_clip):
    """A folder of five photos and three words; gives the flags that a first run needs."""
    write_photos(place / "photos", "a.jpg", "b.png", "in the sun/a.jpg", "in the sun/ü.webp", "z.tif")
    Path("names.txt").write_text("cat, kitty\nsofa\nwall\n")
    return ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip]


def weights_of(stage: str, out="runs", name="voc") -> dict[str, torch.Tensor]:
    return runs.load(Path(out, name, stage, "checkpoint.pt"), stage)["weights"]


def same_weights(found: dict, expected: dict) -> bool:
    assert found.keys() == expected.keys() and len(expected) > 5
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def content_of(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


# ------------------------------------------------------------------------------------------ --help

WITHOUT_TORCH = """
import runpy, sys
sys.path.insert(0, {root!r})
for name in ("torch", "torchvision", "numpy", "PIL", "socket"):
    sys.modules[name] = None                            # to import it is an ImportError
sys.argv = ["{script}.py", "--help"]
runpy.run_path({root!r} + "/{script}.py", run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_without_torch_and_without_a_network(tmp_path, script):
    """In less than two seconds, exit code 0, from any folder, and nothing is written."""
    before = os.times()
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(root=str(ROOT), script=script)], cwd=tmp_path,
                            capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:") and "--seed" in result.stdout + "--seed" * (script == "segment")
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert list(tmp_path.iterdir()) == []


def test_every_script_is_among_those_whose_help_is_tested():
    found = {path.stem for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert found - {"reproduce"} == set(SCRIPTS)


def test_same_flag_means_the_same_in_every_script():
    """Name, default and help text of the contract's flags."""
    contract = ["--data", "--root", "--classes", "--clip", "--out", "--epochs", "--batch-size", "--seed", "--device",
                "--precision", "--resume"]
    parsers = {script.__name__: script.flags() for script in (rectify, distill, evaluate, segment)}
    for flag in contract:
        actions = [action for parser in parsers.values() for action in parser._actions if flag in action.option_strings]
        assert len(actions) == (2 if flag in ("--epochs", "--batch-size", "--resume") else 4), flag
        assert len({(action.default, action.help, action.dest, str(action.type)) for action in actions}) == 1, flag


# ------------------------------------------------------------------------------------------ whole runs

def test_voc_from_photos_to_measured_stages(voc, capsys):
    """rectify → distill → evaluate → segment in VOC's layout: later scripts need no flag at all."""
    run(rectify, *voc)
    said = capsys.readouterr().out
    assert "MaskCLIP" in said and "ReCLIP++ rectified" in said and "Next: python distill.py" in said
    run(distill)
    assert "ReCLIP++ distilled" in (said := capsys.readouterr().out) and "Next: python evaluate.py" in said
    metrics = run(evaluate)
    assert "Next: python segment.py" in capsys.readouterr().out
    run(segment, "data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg")
    assert "ReCLIP++ distilled" in capsys.readouterr().out

    for stage in ("rectify", "distill"):
        folder = Path("runs/voc", stage)
        assert sorted(path.name for path in folder.iterdir()) \
            == ["checkpoint.pt", "log.jsonl", "metrics.json", "preview.png", "recipe.json"]
        assert read_json(folder, "metrics.json") == metrics[stage]
        recipe = read_json(folder, "recipe.json")
        assert recipe["stage"] == stage and recipe["images"] == 4 and recipe["recipe"]["epochs"] == 2 and recipe["seed"] == 0
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == [0, 1, 2, 3] and all(entry["loss"] > 0 for entry in log)
        with Image.open(folder / "preview.png") as page:
            assert page.width > 200 and page.height > 200
    assert sorted(os.listdir("runs/voc/evaluate")) == ["metrics.json", "preview.png"]
    assert sorted(os.listdir("runs/segment")) == ["2007_000033_index.png", "2007_000033_overlay.png"]
    assert not list(Path("runs").rglob("*.part")) and not list(Path("runs").rglob("resume.pt"))


def test_metrics_hold_what_the_contract_promises(voc):
    """Every stage under its name: mIoU in percent, accuracy, IoU per class, and a fingerprint of what was measured."""
    run(rectify, *voc)
    run(distill)
    run(evaluate, "--prompt-denoising", "0.3")
    metrics = read_json("runs/voc/evaluate/metrics.json")
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    for stage, found in metrics.items():
        assert found.keys() >= FIELDS and 0 <= found["miou_absent_zero"] <= found["miou"] <= 100
        assert list(found["per_class_iou"]) == data.VOC_CLASSES
        fingerprint = found["fingerprint"]
        assert fingerprint["stage"] == stage and fingerprint["images"] == 2 and fingerprint["precision"] == "fp32"
        assert fingerprint["refinements"] == {"prompt_denoising": 0.3} and fingerprint["short_side"] == 32
        assert (fingerprint["weights"] is None) == (stage in ("vanilla", "maskclip"))
    assert len({found["fingerprint"]["clip"] for found in metrics.values()}) == 1
    assert metrics["rectify"]["fingerprint"]["weights"] != metrics["distill"]["fingerprint"]["weights"]


def test_measured_numbers_are_those_of_the_predictions(voc):
    """mIoU of MaskCLIP by hand: features, cosines, up-sampling, argmax, and intersections counted class by class."""
    run(rectify, *voc)
    metrics = run(evaluate)["maskclip"]
    args = evaluate.flags().parse_args(["--device", "cpu"])
    world = rectify.open_world(args, rectify.find_checkpoint(args, "rectify"))
    query = rectify.query_features(world.clip_model, world.vocabulary)
    predicted, truth = [], []
    for name, path in data.validation_images("voc", "data").items():
        image = data.to_tensor(data.short_side_to(data.read_image(path), 32, multiple=8))[None]
        cosines = torch.einsum("bdhw,cd->bchw", world.clip_model.encode_dense(image, path="residual"), query)
        up = torch.nn.functional.interpolate(cosines, size=(40, 56), mode="bilinear", align_corners=False)
        predicted.append(up.argmax(dim=1).flatten().numpy())
        with Image.open(Path("data", VOC_BASE, "SegmentationClass", f"{name}.png")) as label:
            truth.append(np.array(label).flatten().astype(int))
    predicted, truth = np.concatenate(predicted), np.concatenate(truth)
    counted = (truth != 0) & (truth != 255)
    predicted, truth = predicted[counted], truth[counted] - 1
    iou = [((predicted == k) & (truth == k)).sum() / ((predicted == k) | (truth == k)).sum()
           for k in range(20) if ((predicted == k) | (truth == k)).any()]
    assert metrics["miou"] == pytest.approx(100 * np.mean(iou), abs=0.006)
    assert metrics["pixel_accuracy"] == pytest.approx(100 * (predicted == truth).mean(), abs=0.006)


def test_folder_of_ones_own_photos_and_words(photos, capsys):
    """No labels: both stages train and show pictures; with --labels, evaluate.py measures those that are there."""
    run(rectify, *photos)
    run(distill)
    said = capsys.readouterr().out
    assert said.count("nothing to measure, which hindered no training") == 2
    for stage in ("rectify", "distill"):
        assert sorted(os.listdir(f"runs/photos/{stage}")) == ["checkpoint.pt", "log.jsonl", "preview.png", "recipe.json"]
    for name in ("b", "in the sun/ü"):
        write_label(Path("truth", f"{name}.png"), np.random.default_rng(0).choice([0, 1, 2, 255], (40, 56)))
    metrics = run(evaluate, "--labels", "truth")
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    assert metrics["distill"]["fingerprint"]["images"] == 2
    assert list(metrics["distill"]["per_class_iou"]) == ["cat", "sofa", "wall"]


def test_odd_pictures_go_through_every_stage(photos):
    """A single pixel, a narrow strip, grey, transparent, 16-bit and turned pictures among the photos."""
    Image.new("RGB", (1, 1), "red").save("photos/pixel.png")
    photo(8, 90).save("photos/strip.png")
    photo().convert("LA").save("photos/grey.png")
    photo().convert("P").save("photos/palette.png")
    Image.fromarray(np.arange(2240, dtype=np.uint16).reshape(40, 56) * 29).save("photos/deep.png")
    run(rectify, *photos)
    run(distill)
    assert read_json("runs/photos/distill/recipe.json")["images"] == 10


def test_distill_makes_the_rectification_that_it_needs(voc, capsys):
    """It says so; the stage-2 flags are not taken for stage 1; the result is that of two commands."""
    run(distill, *voc, "--epochs", "1")
    assert "No rectification found: making one first" in capsys.readouterr().out
    assert read_json("runs/voc/rectify/recipe.json")["recipe"]["epochs"] == 2
    assert read_json("runs/voc/distill/recipe.json")["recipe"]["epochs"] == 1
    run(rectify, *voc, "--out", "apart")
    run(distill, "--epochs", "1", "--out", "apart")
    assert same_weights(weights_of("distill"), weights_of("distill", out="apart"))


def test_evaluate_leaves_out_a_stage_that_was_not_trained(voc, capsys):
    run(rectify, *voc)
    capsys.readouterr()
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify"]
    assert "No checkpoint of distill" in (said := capsys.readouterr().out) and "python distill.py" in said
    assert list(run(evaluate, *voc, "--out", "no runs")) == ["vanilla", "maskclip"]


def test_student_of_another_teacher_is_left_out(voc, capsys):
    """After a new rectification the old student would stand beside a teacher that it never had."""
    run(rectify, *voc)
    run(distill)
    run(rectify, *voc, "--seed", "1")
    capsys.readouterr()
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify"]
    assert "distill/checkpoint.pt was made with another rectification" in capsys.readouterr().out
    run(segment, "data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg")
    assert "ReCLIP++ rectified" in capsys.readouterr().out
    run(distill, "--seed", "1")
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify", "distill"]


def test_student_is_measured_at_the_size_it_was_trained_at(voc, monkeypatch):
    """Stage 1 sees a short side of 32 pixels, the student one of 48: each its own, in metrics as in pictures."""
    monkeypatch.setitem(distill.RECIPES, "voc", replace(distill.RECIPES["voc"], short_side=48))
    run(rectify, *voc)
    run(distill)
    seen = []
    logits = distill.Student.logits
    monkeypatch.setattr(distill.Student, "logits", lambda self, images: seen.append(images.shape[-2:]) or logits(self, images))
    metrics = run(evaluate)
    assert {stage: found["fingerprint"]["short_side"] for stage, found in metrics.items()} \
        == {"vanilla": 32, "maskclip": 32, "rectify": 32, "distill": 48}
    run(segment, "data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg")
    assert len(seen) == 5 and {min(size) for size in seen} == {48}


def test_bias_maps_that_are_kept_are_those_of_their_grids(trained_voc):
    """Images of two shapes in turn: what was computed for one grid serves its next image, and none of another grid."""
    args = evaluate.flags().parse_args(["--data", "voc"])
    world = rectify.open_world(args, rectify.find_checkpoint(args, "rectify"))
    query, shapes = rectify.cached_query(world), [(40, 48), (48, 32), (40, 48), (48, 32)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, *shape, generator=generator) for shape in shapes]
    kept = evaluate.predictors(world, query, ["rectify", "distill"])
    with torch.no_grad():
        for image in images:
            fresh = evaluate.predictors(world, query, ["rectify", "distill"])
            found, expected = (evaluate.logits_of_all(world, some, image) for some in (kept, fresh))
            assert all(torch.equal(found[stage], expected[stage]) for stage in kept)


def break_photos(*names: str) -> None:
    for name in names:
        Path(name).write_bytes(Path(name).read_bytes()[:300])


def test_broken_images_are_skipped_counted_and_listed_where_asked(photos, capsys):
    """The same weights as without them, from the first stage to the last picture; without the flag the first is an error."""
    shutil.copytree("photos", "whole/photos")
    write_photos(Path("photos"), "broken one.jpg", "late.png")
    break_photos("photos/broken one.jpg", "photos/late.png")
    assert "photos/broken one.jpg: expected an image" in refusal(capsys, rectify, *photos)
    run(rectify, *photos, "--skip-broken", "--out", "some")
    said = capsys.readouterr().out
    assert "2 of 7 images are left out" in said and "broken one.jpg" in said and "late.png" in said
    run(distill, "--skip-broken", "--out", "some")
    recipe = read_json("some/photos/rectify/recipe.json")
    assert recipe["images"] == 5 and recipe["skipped"] == ["broken one", "late"]
    run(rectify, "--data", "whole/photos", *photos[2:], "--out", "all")
    run(distill, "--out", "all")
    for stage in ("rectify", "distill"):
        assert same_weights(weights_of(stage, "some", "photos"), weights_of(stage, "all", "photos"))
    break_photos(*(str(path) for path in Path("photos").rglob("*.*")))
    assert "found none of 7 that can be read" in refusal(capsys, rectify, *photos, "--skip-broken", "--out", "none")


def test_labels_among_the_photos_are_refused(photos, capsys):
    """A folder of index pictures inside the folder of photos would be trained on."""
    write_label(Path("photos/labels/z.png"), np.zeros((40, 56)))
    said = refusal(capsys, rectify, *photos)
    assert "photos/labels/z.png, an index picture with the name of photos/z.tif" in said and "--labels" in said


def test_two_folders_of_one_name_are_told_apart(photos, capsys):
    """A teacher of other images is refused, although words and CLIP are the same."""
    run(rectify, *photos)
    shutil.copytree("photos", "elsewhere/photos")
    assert "another folder of images" in refusal(capsys, distill, "--data", "elsewhere/photos")
    before = content_of("runs")
    assert "another folder of images" in refusal(capsys, rectify, "--data", "elsewhere/photos", *photos[2:])    # nor overwritten
    shutil.copytree("photos", "elsewhere/voc")
    run(rectify, "--data", "elsewhere/voc", *photos[2:], "--out", "other")
    write_voc_tree(Path("data"))
    assert "another folder of images" in refusal(capsys, rectify, "--data", "voc", *photos[4:], "--out", "other")
    assert content_of("runs") == before


def test_later_stages_follow_the_newest_run(voc, photos):
    """Of two datasets the one that was rectified last is distilled; --data chooses."""
    run(rectify, *voc)
    run(rectify, *photos)
    run(distill)
    assert Path("runs/photos/distill/checkpoint.pt").exists() and not Path("runs/voc/distill").exists()
    run(distill, "--data", "voc")
    assert Path("runs/voc/distill/checkpoint.pt").exists()


def test_own_words_in_a_known_dataset_are_trained_but_not_measured(voc, capsys):
    """VOC's labels do not speak of other classes: pictures, no numbers, and no error."""
    Path("two.txt").write_text("animal\nvehicle\n")
    run(rectify, *voc, "--classes", "two.txt")
    assert "nothing to measure" in capsys.readouterr().out and not Path("runs/voc/rectify/metrics.json").exists()
    assert "labels of voc" in refusal(capsys, evaluate)


def test_bf16_goes_through_every_stage(voc):
    """Autocast on the CPU; the fingerprint says so."""
    run(rectify, *voc, "--precision", "bf16")
    run(distill, "--precision", "bf16")
    assert run(evaluate, "--precision", "bf16")["distill"]["fingerprint"]["precision"] == "bf16"


def test_toyland_without_a_flag(place, monkeypatch, capsys):
    """The first commands of a newcomer, on fewer scenes, with the weights that ship with the project."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(toyland, "TRAIN_SCENES", 16)
    monkeypatch.setattr(toyland, "VAL_SCENES", 8)
    run(rectify, "--epochs", "1")
    run(distill, "--epochs", "1")
    metrics = run(evaluate)
    run(segment)
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    assert metrics["maskclip"]["miou"] > metrics["vanilla"]["miou"] > 1
    assert metrics["maskclip"]["fingerprint"]["images"] == 8
    assert Path("runs/segment/toyland_overlay.png").exists() and Path("runs/toyland/evaluate/preview.png").exists()
    assert not Path("data/toyland/labels/train").exists()


# ------------------------------------------------------------------------------------------ equal runs, equal weights

@pytest.mark.slow
def test_same_command_same_weights_other_seed_others(voc):
    """Both stages, bit for bit."""
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(rectify, *voc, "--out", out, "--seed", seed)
        run(distill, "--out", out, "--seed", seed)
    for stage in ("rectify", "distill"):
        assert same_weights(weights_of(stage, "two"), weights_of(stage, "one"))
        assert not same_weights(weights_of(stage, "three"), weights_of(stage, "one"))


def test_cached_features_train_as_the_images_would_under_one_augmentation(voc, monkeypatch):
    """CLIP looks at every image once; the weights are those of a training whose augmentation never changes, up to float16."""
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1")
    assert read_json("cached/voc/rectify/recipe.json")["recipe"]["augment_once"] is True
    seen = []
    encode = rectify.Rectifier.encode
    monkeypatch.setattr(rectify.Rectifier, "encode", lambda self, *args: seen.append(1) or encode(self, *args))
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1", "--seed", "0")
    assert not seen                                                                 # all of it came from the cache
    item = data.TrainingImages.__getitem__
    monkeypatch.setattr(data.TrainingImages, "__getitem__", lambda self, when: item(self, (0, when[1])))
    run(rectify, *voc, "--out", "fixed")
    found, expected = weights_of("rectify", "cached"), weights_of("rectify", "fixed")
    assert all(torch.allclose(found[name], tensor, atol=2e-3) for name, tensor in expected.items())


def test_cached_features_that_do_not_fit_are_refused_before_anything_is_written(voc, capsys):
    said = refusal(capsys, rectify, *voc, "--cache-features", "1e-6")
    assert "--cache-features 1e-06: expected room for" in said and not Path("runs/voc/rectify").exists()
    assert "found --ablation fine-tuned" in refusal(capsys, rectify, *voc, "--cache-features", "1", "--ablation", "fine-tuned")


def test_learning_rate_goes_with_the_batch(voc):
    """Twice the images a step, twice the rate; the recipe that is kept says both."""
    recipe = rectify.RECIPES["voc"]
    run(rectify, *voc, "--batch-size", 2 * recipe.batch_size)
    found = read_json("runs/voc/rectify/recipe.json")["recipe"]
    assert found["batch_size"] == 2 * recipe.batch_size and found["learning_rate"] == 2 * recipe.learning_rate


def test_runs_share_what_is_slow_to_make(voc, monkeypatch):
    """--cache: another --out, another seed, and the student take query and hypotheses from the first run's."""
    run(rectify, *voc, "--out", "one", "--cache", "shared")
    assert {path.name.split("-")[0] for path in Path("shared").iterdir()} == {"query", "hypotheses"}
    assert not Path("one/voc/cache").exists()
    for name in ("count_votes", "query_features"):
        monkeypatch.setattr(rectify, name, None)
    run(rectify, *voc, "--out", "two", "--cache", "shared", "--seed", "1")
    run(distill, "--out", "two", "--cache", "shared")


def test_flags_of_the_hypothesis_reach_recipe_and_training(voc):
    """t and r of Eq. 6; a student asks with its teacher's."""
    run(rectify, *voc, "--out", "few", "--vote-threshold", "0.9", "--window-ratio", "0.34")
    run(rectify, *voc, "--out", "many", "--vote-threshold", "0", "--window-ratio", "0.34")
    found = {out: read_json(out, "voc/rectify/recipe.json")["recipe"] for out in ("few", "many")}
    assert [found[out]["vote_threshold"] for out in found] == [0.9, 0] and found["few"]["window_ratio"] == 0.34
    assert not same_weights(weights_of("rectify", "few"), weights_of("rectify", "many"))
    run(distill, "--out", "few")
    assert runs.load(Path("few/voc/distill/checkpoint.pt"), "distill")["settings"]["teacher_recipe"]["vote_threshold"] == 0.9


@pytest.mark.slow
def test_compiled_blocks_change_rounding_alone(voc):
    for out, flags in (("plain", []), ("compiled", ["--compile"])):
        run(rectify, *voc, "--out", out, *flags)
    found, expected = weights_of("rectify", "compiled"), weights_of("rectify", "plain")
    assert all(torch.allclose(found[name], tensor, atol=1e-3) for name, tensor in expected.items())
    images = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():                                       # weights of a few steps hide much: the features themselves
        plain, compiled = (rectify.open_world(rectify.flags().parse_args(list(map(str, [*voc, *flags])))).clip_model
                           .encode_dense(images) for flags in ([], ["--compile"]))
    assert torch.allclose(compiled, plain, atol=1e-5)


def test_number_of_workers_changes_no_weight(voc):
    """Processes that decode images: the same votes, batches and weights as without."""
    for out, workers in (("one", 0), ("two", 2)):
        run(rectify, *voc, "--out", out, "--workers", workers)
    assert same_weights(weights_of("rectify", "two"), weights_of("rectify", "one"))


def replace_by_noise(folder: Path) -> None:
    """Every label file becomes random bytes that are no picture."""
    for number, path in enumerate(sorted(folder.iterdir())):
        path.write_bytes(np.random.default_rng(number).bytes(500))


@pytest.mark.parametrize("change", [shutil.rmtree, replace_by_noise], ids=["deleted", "noise"])
def test_labels_change_no_weight(voc, monkeypatch, change):
    """Both stages give bit-identical weights with the labels, without the folder, and with noise in its place."""
    run(rectify, *voc, "--out", "with")
    run(distill, "--out", "with")
    change(Path("data", VOC_BASE, "SegmentationClass"))
    monkeypatch.setattr(evaluate, "after_training", lambda *_: None)            # noise cannot be measured
    run(rectify, *voc, "--out", "without")
    run(distill, "--out", "without")
    for stage in ("rectify", "distill"):
        assert same_weights(weights_of(stage, "without"), weights_of(stage, "with"))


OPENED = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import pytest
import helpers, runs
import rectify, distill, toyland
helpers.quick_recipes(pytest.MonkeyPatch(), Path("weights"))
toyland.TRAIN_SCENES, toyland.VAL_SCENES = 4, 2
if {name!r} == "toyland":
    toyland.draw_dataset(Path("data"))
opened, finish = [], runs.Training.finish

def note(event, args):
    if event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(args[0]))

def finish_and_note(self):
    path = finish(self)
    opened.append("TRAINED")
    return path

runs.Training.finish = finish_and_note
sys.addaudithook(note)
helpers.run(rectify, "--data", {name!r}, "--clip", {clip!r})
after_rectify = list(opened)
opened.clear()
helpers.run(distill)
Path("opened.json").write_text(json.dumps([after_rectify, opened]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, images, labels", [("voc", "JPEGImages", "SegmentationClass"),
                                                  ("toyland", "toyland/images/train", "toyland/labels")])
def test_no_label_is_opened_before_training_is_done(voc, place, tiny_clip, name, images, labels):
    """Seen from the interpreter itself, which reports every file that is opened and every folder that is listed."""
    program = OPENED.format(root=str(ROOT), tests=str(ROOT / "tests"), clip=str(tiny_clip), name=name)
    result = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for opened in read_json("opened.json"):
        trained = opened.index("TRAINED")
        assert any(images in path for path in opened[:trained])                 # the hook does see what is opened
        assert not [path for path in opened[:trained] if labels in path]
        assert any(labels in path for path in opened[trained:])                 # and afterwards it is measured


@pytest.mark.slow
def test_training_does_not_import_what_reads_labels():
    """Both stages, all that they import, and the ablations: ground_truth.py is not among it."""
    program = "import sys; sys.path[:0] = [%r]\nimport rectify, distill, ablations, toyland\nprint(*sys.modules)" % str(ROOT)
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "rectify" in modules and "data" in modules and "ground_truth" not in modules


# ------------------------------------------------------------------------------------------ interruptions

class Interrupted(Exception):
    pass


def stop_at(monkeypatch, script, call: int, stop) -> None:
    """`stop()` is called in the given optimiser step of the script, before the step is done."""
    train_step, calls = script.train_step, []

    def counted(*args):
        calls.append(1)
        if len(calls) == call:
            stop()
        return train_step(*args)

    monkeypatch.setattr(script, "train_step", counted)


def crash():
    raise Interrupted


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 4, 6])
@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_crashed_run_resumes_to_the_same_weights(voc, monkeypatch, script, call):
    """Six steps in three epochs, broken off in the first, the second and the last: --resume ends as if nothing had been."""
    stage = script.__name__
    for out in ("whole", "broken"):
        if script is distill:
            run(rectify, *voc, "--out", out)
    run(script, *voc, "--out", "whole", "--epochs", "3")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at(patched, script, call, crash)
        run(script, *voc, "--out", "broken", "--epochs", "3")
    assert not Path("broken/voc", stage, "checkpoint.pt").exists()
    assert Path("broken/voc", stage, "unfinished/resume.pt").exists() == (call > 2)
    run(script, *voc, "--out", "broken", "--epochs", "3", "--resume")
    assert same_weights(weights_of(stage, "broken"), weights_of(stage, "whole"))
    assert [json.loads(line)["step"] for line in Path("broken/voc", stage, "log.jsonl").read_text().splitlines()] \
        == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_ctrl_c_saves_and_resumes_to_the_same_weights(voc, monkeypatch, capsys, script):
    """In the middle of an epoch: exit code 130, the hint to --resume, and the same weights in the end."""
    stage = script.__name__
    for out in ("whole", "broken"):
        if script is distill:
            run(rectify, *voc, "--out", out)
    run(script, *voc, "--out", "whole")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end, runs.errors_in_one_paragraph():
        stop_at(patched, script, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(script, *voc, "--out", "broken")
    assert end.value.code == 130 and "--resume" in capsys.readouterr().err
    assert torch.load(Path("broken/voc", stage, "unfinished/resume.pt"), weights_only=True)["step"] == 3
    run(script, *voc, "--out", "broken", "--resume")
    assert same_weights(weights_of(stage, "broken"), weights_of(stage, "whole"))


def test_resume_with_other_words_or_numbers_is_refused(voc, monkeypatch, capsys):
    """What was saved stays as it was, and can still be resumed as it was begun."""
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at(patched, rectify, 4, crash)
        run(rectify, *voc)
    before = content_of("runs/voc/rectify")
    assert "another recipe" in refusal(capsys, rectify, *voc, "--resume", "--epochs", "9")
    assert "another seed" in refusal(capsys, rectify, *voc, "--resume", "--seed", "9")
    Path("other.txt").write_text("cat\ndog\n")
    assert "resume.pt was made with another" in refusal(capsys, rectify, *voc, "--resume", "--classes", "other.txt")
    assert content_of("runs/voc/rectify") == before
    run(rectify, *voc, "--resume")


# ------------------------------------------------------------------------------------------ bad input

def nothing_half_written() -> bool:
    return not [path for path in Path().rglob("*") if path.suffix == ".part" or path.name in ("checkpoint.pt", "resume.pt",
                                                                                             "metrics.json", "preview.png")]


@pytest.mark.parametrize("case, parts", [
    (["--data", "nowhere", "--classes", "names.txt"], ["--data nowhere"]),
    (["--data", "nowhere"], ["--data nowhere", "--classes FILE"]),
    (["--data", "voc", "--root", "nowhere"], ["nowhere/VOCdevkit/VOC2012", "--download"]),
    (["--data", "empty", "--classes", "names.txt"], ["--data empty", "expected images"]),
    (["--data", "photos", "--classes", "nowhere.txt"], ["--classes nowhere.txt"]),
    (["--data", "photos", "--classes", "one.txt"], ["one.txt", "at least two classes, found 1"]),
    (["--data", "photos", "--classes", "long.txt"], ["long.txt", "at most 65 tokens", "found 72 in 'very very"]),
    (["--data", "photos", "--classes", "names.txt", "--clip", "nowhere.pt"], ["'nowhere.pt'", "ViT-B/16"]),
    (["--data", "photos", "--classes", "names.txt", "--clip", "names.txt"], ["names.txt", "damaged or no weights file"]),
    (["--data", "cut", "--classes", "names.txt"], ["cut/half.jpg", "truncated"]),
    (["--data", "cut", "--classes", "names.txt", "--workers", "1"], ["cut/half.jpg", "truncated"]),
    (["--data", "twice", "--classes", "names.txt"], ["a.jpg and a.png"]),
    (["--data", "photos", "--classes", "names.txt", "--out", "names.txt"], ["names.txt/photos"]),
    (["--data", "photos", "--classes", "names.txt", "--download"], ["--download", "photos"])],
    ids=lambda value: " ".join(value) if len(value) > 1 and value[1][0] != "-" else "")
def test_bad_input_is_named_and_leaves_nothing_half_written(photos, capsys, case, parts):
    """One paragraph on stderr: what was expected, what was found, what to do; exit code 2."""
    Path("empty").mkdir()
    Path("one.txt").write_text("cat\n")
    Path("long.txt").write_text("cat\n" + "very " * 70 + "old dog\n")
    write_photos(Path("cut"), "half.jpg", "whole.jpg")
    Path("cut/half.jpg").write_bytes(Path("cut/half.jpg").read_bytes()[:600])
    write_photos(Path("twice"), "a.jpg", "a.png")
    said = refusal(capsys, rectify, *photos[-2:], *case)
    assert all(part in said for part in parts), said
    assert len(said.splitlines()) == 1 and nothing_half_written()
    if "--classes" in case:                     # the stage that makes its rectification first says the same
        assert refusal(capsys, distill, *photos[-2:], *case) == said and nothing_half_written()


def test_device_that_is_not_there_is_refused(photos, capsys):
    with pytest.raises(SystemExit) as end, runs.errors_in_one_paragraph():
        rectify.main(rectify.flags().parse_args([*map(str, photos), "--device", "nonsense"]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--device nonsense: expected a device of this machine, found none" in said
    assert nothing_half_written()


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--epochs", "-3"], ["--batch-size", "0"], ["--epochs", "many"]])
def test_numbers_that_make_no_sense_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as end:
        rectify.flags().parse_args(flags)
    assert end.value.code == 2 and f"{flags[0]}: expected a whole number from 1 on, found {flags[1]}" in capsys.readouterr().err


def test_list_that_names_a_missing_image_is_refused(voc, capsys):
    Path("data", VOC_BASE, "JPEGImages/2007_000039.jpg").unlink()
    said = refusal(capsys, rectify, *voc)
    assert "train.txt names 4 images" in said and "2007_000039.jpg" in said and nothing_half_written()


def test_truncated_photo_of_voc_is_refused(voc, capsys):
    path = Path("data", VOC_BASE, "JPEGImages/2007_000063.jpg")
    path.write_bytes(path.read_bytes()[:400])
    assert "2007_000063.jpg: expected an image" in refusal(capsys, rectify, *voc)
    assert nothing_half_written()


def test_photo_that_breaks_after_the_votes_were_stored_is_refused(voc, capsys):
    """The stored hypotheses do not stand for a file that has changed since."""
    run(rectify, *voc)
    path = Path("data", VOC_BASE, "JPEGImages/2007_000063.jpg")
    path.write_bytes(path.read_bytes()[:400])
    before = content_of("runs/voc/rectify")
    assert "2007_000063.jpg: expected an image" in refusal(capsys, rectify, *voc)
    assert content_of("runs/voc/rectify") == before


def test_mask_with_an_unknown_value_is_refused_and_named(voc, capsys):
    """By evaluate.py before anything is written; by a training script after its checkpoint, which stays."""
    path = Path("data", VOC_BASE, "SegmentationClass/2007_000042.png")
    good = path.read_bytes()
    with Image.open(path) as label:
        values = np.array(label)
    values[3, 4] = 77
    write_label(path, values)
    said = refusal(capsys, evaluate, *voc)
    assert "2007_000042.png: expected the values 0..20 and 255; found [77]" in said and nothing_half_written()
    assert "found [77]" in refusal(capsys, rectify, *voc)
    assert not Path("runs/voc/rectify/metrics.json").exists() and not list(Path("runs").rglob("*.part"))
    path.write_bytes(good)
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify"]


@pytest.mark.parametrize("script", [distill, evaluate], ids=["distill", "evaluate"])
def test_checkpoint_of_another_class_list_is_refused(photos, capsys, script):
    """Both lists are shown, also when they differ in their order alone; what was trained stays."""
    run(rectify, *photos)
    before = content_of("runs")
    for words in ("cat\ndog\n", "sofa\ncat, kitty\nwall\n"):
        Path("other.txt").write_text(words)
        said = refusal(capsys, script, "--data", "photos", "--classes", "other.txt")
        assert "rectify/checkpoint.pt was made with another class list" in said and "['cat', 'kitty']" in said
    assert content_of("runs") == before


@pytest.mark.parametrize("script", [distill, evaluate], ids=["distill", "evaluate"])
def test_checkpoint_of_another_clip_is_refused(photos, capsys, script):
    run(rectify, *photos)
    write_openai_archive("other.pt", **SMALLEST, seed=1)
    assert "another CLIP" in refusal(capsys, script, "--clip", "other.pt")


def test_student_of_another_class_list_is_left_out(photos, capsys):
    """A rectification that was trained again with other words does not fit the old student: said, and shown without it."""
    run(rectify, *photos)
    run(distill)
    Path("names.txt").write_text("cat\ndog\n")
    run(rectify, *photos)
    write_label(Path("truth/b.png"), np.zeros((40, 56)))
    assert list(run(evaluate, "--labels", "truth")) == ["vanilla", "maskclip", "rectify"]
    assert "distill/checkpoint.pt was made with another class list: left out" in capsys.readouterr().out
    run(segment, "photos/a.jpg")
    assert "ReCLIP++ rectified" in capsys.readouterr().out


def test_damaged_checkpoint_is_refused_by_every_later_stage(photos, capsys):
    run(rectify, *photos)
    path = Path("runs/photos/rectify/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:1000])
    for script, flags in ((distill, []), (evaluate, []), (segment, ["photos/a.jpg"])):
        with pytest.raises(SystemExit) as end, runs.errors_in_one_paragraph():
            run(script, *flags)
        said = capsys.readouterr().err
        assert end.value.code == 2 and "checkpoint.pt: expected a checkpoint, found a damaged file" in said and "python rectify.py" in said


def test_nothing_to_measure_against_is_an_error_that_says_what_to_do(photos, capsys):
    run(rectify, *photos)
    assert "--labels DIR" in refusal(capsys, evaluate)
    assert not Path("runs/photos/evaluate").exists()


def test_labels_of_ignored_pixels_alone_are_no_result(voc, capsys):
    for path in Path("data", VOC_BASE, "SegmentationClass").iterdir():
        write_label(path, np.full((40, 56), 255))
    assert "found ignored pixels" in refusal(capsys, evaluate, *voc)
    assert nothing_half_written()


# ------------------------------------------------------------------------------------------ as separate processes

def command(*args, cwd, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | environment)


@pytest.mark.slow
def test_refusal_of_the_real_command(photos, place):
    """python rectify.py in a process of its own: exit code 2, one paragraph on stderr, nothing on disk."""
    Path("one.txt").write_text("cat\n")
    result = command(ROOT / "rectify.py", "--data", "photos", "--classes", "one.txt", cwd=place)
    assert result.returncode == 2 and "at least two classes, found 1" in result.stderr
    assert "Traceback" not in result.stderr and not Path("runs").exists()


@pytest.mark.slow
def test_the_real_commands_end_to_end(voc, place):
    """Four processes, VOC's own recipe at its real picture size (a tiny CLIP, one epoch), no flag but the first ones."""
    result = command(ROOT / "rectify.py", *voc, "--epochs", 1, "--device", "cpu", cwd=place)
    assert result.returncode == 0, result.stderr
    assert "Next: python distill.py" in result.stdout and "ReCLIP++ rectified" in result.stdout
    assert read_json("runs/voc/rectify/recipe.json")["recipe"]["crop"] == [336, 336]
    result = command(ROOT / "evaluate.py", "--device", "cpu", cwd=place)
    assert result.returncode == 0 and "sheep" in result.stdout, result.stderr
    result = command(ROOT / "segment.py", "data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg", "--device", "cpu", cwd=place)
    assert result.returncode == 0 and Path("runs/segment/2007_000033_overlay.png").exists(), result.stderr
    result = command(ROOT / "distill.py", "--classes", "nowhere.txt", "--device", "cpu", cwd=place)
    assert result.returncode == 2 and "nowhere.txt" in result.stderr
