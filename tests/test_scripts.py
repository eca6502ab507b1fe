"""The scripts as they are used: whole runs in small, what the optimiser is given, labels that training never
sees, bad input, interruptions.

    python -m pytest tests/test_scripts.py           # about a minute; the real size: test_layouts.py

No network, no real dataset and no real weights: trees and weights files are written here, in the formats that
people have. Recipes are those of the datasets, on pictures of a few dozen pixels (see helpers.quick_recipes).
"""

import json
import os
import re
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
import segment
from conftest import ROOT
from datasets import DATASETS
from datasets import images as image_files
from harness import errors, machine, runs
from helpers import (SMALLEST, VOC_BASE, openai_state, photo, python_files, refusal, run, write_label,
                     write_openai_archive, write_photos, write_voc_tree)
from paper import clip_s4, maft, run as paper_run
from toyland import world

SCRIPTS = ["rectify", "distill", "evaluate", "segment", "toyland/world", "toyland/pretrain", "datasets/check",
           "paper/run", "paper/clip_s4", "paper/scores", "paper/figures", "paper/tables", "paper/bias",
           "paper/reproduce", "paper/released", "paper/windows", "paper/maft"]
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


def settings_of(stage: str, out="runs", name="voc") -> dict:
    return runs.load(Path(out, name, stage, "checkpoint.pt"), stage)["settings"]


def same_weights(found: dict, expected: dict) -> bool:
    assert found.keys() == expected.keys() and len(expected) > 5
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def content_of(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


def opened(*flags) -> data.Setup:
    """What the newest rectification under runs/ works on, as the later scripts open it."""
    args = evaluate.flags().parse_args([*flags, "--device", "cpu"])
    return data.open_setup(args, runs.find(args.out, args.data, "rectify"))


# ------------------------------------------------------------------------------------------ --help

WITHOUT_TORCH = """
import runpy, sys
sys.path[0] = {folder!r}                                # as Python itself has it for a script
for name in ("torch", "torchvision", "numpy", "PIL", "socket"):
    sys.modules[name] = None                            # to import it is an ImportError
sys.argv = ["{script}.py", "--help"]
runpy.run_path({root!r} + "/{script}.py", run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_without_torch_and_without_a_network(tmp_path, script):
    """In less than two seconds, exit code 0, from any folder, and nothing is written."""
    before = os.times()
    program = WITHOUT_TORCH.format(root=str(ROOT), folder=str((ROOT / script).parent), script=script)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage:") and "--debug" in result.stdout
    # What only measures or segments draws nothing at random.
    without = ("evaluate", "segment", "paper/tables", "paper/bias", "paper/windows")
    assert ("--seed" in result.stdout) == (script not in without)
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert list(tmp_path.iterdir()) == []


def test_every_script_is_among_those_whose_help_is_tested():
    """Whatever has lines to run as a command; benchmarks and exercises have tests of their own."""
    found = {path.relative_to(ROOT).with_suffix("").as_posix()
             for path in python_files(ROOT, leave_out=("benchmarks", "exercises"))
             if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert found == set(SCRIPTS)


def test_same_flag_means_the_same_in_every_script():
    """Name, default and help text of the contract's flags."""
    of_training = ["--epochs", "--batch-size", "--learning-rate", "--save-every", "--resume", "--seed"]
    contract = ["--data", "--root", "--classes", "--clip", "--activation", "--out", "--device", "--precision",
                "--debug", *of_training]
    parsers = {script.__name__: script.flags() for script in (rectify, distill, evaluate, segment)}
    for flag in contract:
        actions = [action for parser in parsers.values() for action in parser._actions
                   if flag in action.option_strings]
        assert len(actions) == (2 if flag in of_training else 4), flag
        assert len({(action.default, action.help, action.dest, getattr(action.type, "__qualname__", None))
                    for action in actions}) == 1, flag


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
        assert recipe["stage"] == stage and recipe["system"] == "reclip++" and recipe["images"] == 4
        assert recipe["recipe"]["epochs"] == 2 and recipe["seed"] == 0
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log] == [0, 1, 2, 3] and all(entry["loss"] > 0 for entry in log)
        with Image.open(folder / "preview.png") as page:
            assert page.width > 200 and page.height > 200
    assert sorted(os.listdir("runs/voc/evaluate")) == ["metrics.json", "preview.png"]
    assert sorted(os.listdir("runs/segment")) == ["2007_000033_index.png", "2007_000033_overlay.png"]
    assert not list(Path("runs").rglob("*.part")) and not list(Path("runs").rglob("unfinished"))


def test_metrics_hold_what_the_contract_promises(voc):
    """Every stage under its name: mIoU in percent, accuracy, IoU per class, a fingerprint of what it saw."""
    run(rectify, *voc)
    run(distill)
    run(evaluate, "--prompt-denoising", "0.3")
    metrics = read_json("runs/voc/evaluate/metrics.json")
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    for stage, found in metrics.items():
        assert found.keys() >= FIELDS and 0 <= found["miou_absent_zero"] <= found["miou"] <= 100
        assert list(found["per_class_iou"]) == DATASETS["voc"].names
        fingerprint = found["fingerprint"]
        assert fingerprint["stage"] == stage and fingerprint["system"] == "reclip++"
        assert fingerprint["images"] == 2 and fingerprint["precision"] == "fp32"
        assert fingerprint["refinements"] == {"prompt_denoising": 0.3} and fingerprint["short_side"] == 32
        assert (fingerprint["weights"] is None) == (stage in ("vanilla", "maskclip"))
    assert len({found["fingerprint"]["clip"] for found in metrics.values()}) == 1
    assert metrics["rectify"]["fingerprint"]["weights"] != metrics["distill"]["fingerprint"]["weights"]


def test_measured_numbers_are_those_of_the_predictions(voc):
    """mIoU of MaskCLIP by hand: features, cosines, up-sampling, argmax, intersections class by class."""
    run(rectify, *voc)
    metrics = run(evaluate)["maskclip"]
    setup = opened()
    query = rectify.query_features(setup.clip_model, setup.vocabulary)
    predicted, truth = [], []
    for name, path in image_files.image_files("voc", "data", "val").items():
        image = data.to_tensor(data.short_side_to(image_files.read_image(path), 32, multiple=8))[None]
        cosines = torch.einsum("bdhw,cd->bchw", setup.clip_model.encode_dense(image, path="residual"), query)
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
    """No labels: both stages train and show pictures. With --labels evaluate.py measures those that exist."""
    run(rectify, *photos)
    run(distill)
    said = capsys.readouterr().out
    assert said.count("so nothing is measured. Training needed none.") == 2
    for stage in ("rectify", "distill"):
        assert sorted(os.listdir(f"runs/photos/{stage}")) \
            == ["checkpoint.pt", "log.jsonl", "preview.png", "recipe.json"]
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
    """Stage 1 sees a short side of 32 pixels, the student 48: each its own, in metrics as in pictures."""
    monkeypatch.setitem(distill.RECIPES, "voc", replace(distill.RECIPES["voc"], short_side=48))
    run(rectify, *voc)
    run(distill)
    seen = []
    logits = distill.Student.logits
    monkeypatch.setattr(distill.Student, "logits",
                        lambda self, images: seen.append(images.shape[-2:]) or logits(self, images))
    metrics = run(evaluate)
    assert {stage: found["fingerprint"]["short_side"] for stage, found in metrics.items()} \
        == {"vanilla": 32, "maskclip": 32, "rectify": 32, "distill": 48}
    run(segment, "data/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg")
    assert len(seen) == 5 and {min(size) for size in seen} == {48}


def test_bias_maps_that_are_kept_are_those_of_their_grids(trained_voc):
    """Images of two shapes in turn: what was made for one grid serves its next image, and no other grid."""
    setup = opened("--data", "voc")
    query, shapes = rectify.query_of(setup), [(40, 48), (48, 32), (40, 48), (48, 32)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, *shape, generator=generator) for shape in shapes]
    kept = evaluate.predictors(setup, query, ["rectify", "distill"])
    with torch.no_grad():
        for image in images:
            fresh = evaluate.predictors(setup, query, ["rectify", "distill"])
            found, expected = (evaluate.logits_of_all(setup, some, image) for some in (kept, fresh))
            assert all(torch.equal(found[stage], expected[stage]) for stage in kept)


def break_photos(*names: str) -> None:
    for name in names:
        Path(name).write_bytes(Path(name).read_bytes()[:300])


def test_broken_images_are_skipped_counted_and_listed_where_asked(photos, capsys):
    """The same weights as without them, from the first stage to the last picture; else an error."""
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
    said = refusal(capsys, rectify, *photos, "--skip-broken", "--out", "none")
    assert "found none of 7 that can be read" in said


def test_labels_among_the_photos_are_left_out_and_told(photos, capsys):
    """A folder of index pictures inside the folder of photos must not be trained on: the same weights as
    without."""
    run(rectify, *photos, "--out", "without")
    write_label(Path("photos/labels/z.png"), np.zeros((40, 56)))
    capsys.readouterr()
    run(rectify, *photos)
    said = capsys.readouterr().out
    assert "photos: 5 photographs. Left out: 1 masks (labels/z.png)." in said
    assert same_weights(weights_of("rectify", name="photos"), weights_of("rectify", "without", "photos"))


def test_two_folders_of_one_name_are_told_apart(photos, capsys):
    """A teacher of other images is refused, although words and CLIP are the same."""
    run(rectify, *photos)
    shutil.copytree("photos", "elsewhere/photos")
    assert "another folder of images" in refusal(capsys, distill, "--data", "elsewhere/photos")
    before = content_of("runs")
    assert "another folder of images" in refusal(capsys, rectify, "--data", "elsewhere/photos", *photos[2:])
    shutil.copytree("photos", "elsewhere/voc")
    run(rectify, "--data", "elsewhere/voc", *photos[2:], "--out", "other")
    write_voc_tree(Path("data"))
    said = refusal(capsys, rectify, "--data", "voc", *photos[4:], "--out", "other")
    assert "another folder of images" in said
    assert content_of("runs") == before                                         # nor is anything overwritten


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
    assert "There are no labels of voc for these classes" in capsys.readouterr().out
    assert not Path("runs/voc/rectify/metrics.json").exists()
    assert "labels of voc" in refusal(capsys, evaluate)


def test_bf16_goes_through_every_stage(voc):
    """Autocast on the CPU; the fingerprint says so."""
    run(rectify, *voc, "--precision", "bf16")
    run(distill, "--precision", "bf16")
    assert run(evaluate, "--precision", "bf16")["distill"]["fingerprint"]["precision"] == "bf16"


def test_toyland_without_a_flag(place, monkeypatch, capsys):
    """The first commands of a newcomer, on fewer scenes, with the weights that ship with the project."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(world, "TRAIN_SCENES", 16)
    monkeypatch.setattr(world, "VAL_SCENES", 8)
    monkeypatch.setattr(world, "TEST_SCENES", 8)
    run(rectify, "--epochs", "1")
    run(distill, "--epochs", "1")
    metrics = run(evaluate)
    run(segment)
    assert list(metrics) == ["vanilla", "maskclip", "rectify", "distill"]
    assert metrics["maskclip"]["miou"] > metrics["vanilla"]["miou"] > 1
    assert metrics["maskclip"]["fingerprint"]["images"] == 8
    assert Path("runs/segment/toyland_overlay.png").exists()
    assert Path("runs/toyland/evaluate/preview.png").exists()
    assert not Path("data/toyland/labels/train").exists()


@pytest.fixture
def few_scenes(place, monkeypatch):
    monkeypatch.setattr(world, "TRAIN_SCENES", 4)
    monkeypatch.setattr(world, "VAL_SCENES", 3)
    monkeypatch.setattr(world, "TEST_SCENES", 5)


def test_split_is_chosen_told_and_recorded(few_scenes, capsys):
    """val unless test is asked for: other scenes, other numbers, also right after a training."""
    run(rectify, "--epochs", "1")
    assert "toyland: 3 val images, 16 classes" in capsys.readouterr().out
    trained = read_json("runs/toyland/rectify/metrics.json")
    assert trained["fingerprint"]["split"] == "val" and trained["fingerprint"]["images"] == 3
    val, asked, test = (run(evaluate, *flags) for flags in ([], ["--split", "val"], ["--split", "test"]))
    said = capsys.readouterr().out
    assert said.count("toyland: 3 val images, 16") == 2 and said.count("toyland: 5 test images, 16") == 1
    assert val == asked and val["rectify"]["miou"] == trained["miou"]
    assert test["rectify"]["fingerprint"] == val["rectify"]["fingerprint"] | {"split": "test", "images": 5,
                                                                               "of": 5}
    assert all(val[stage]["miou"] != test[stage]["miou"] for stage in test)
    assert read_json("runs/toyland/evaluate/metrics.json") == test


def test_split_that_is_not_there_is_refused(voc, photos, capsys):
    """Before CLIP is opened."""
    assert run(evaluate, *voc, "--split", "val")["maskclip"]["fingerprint"]["split"] == "val"
    said = refusal(capsys, evaluate, "--data", "voc", "--clip", "no such file", "--split", "test")
    assert "--split test: expected a dataset with that split and its labels, found voc, with val" in said
    said = refusal(capsys, evaluate, *photos, "--labels", "nowhere", "--split", "val")
    assert "--split val: expected a dataset" in said and "a folder, all of which is measured" in said


def test_what_a_training_ends_with_is_of_the_usual_split(few_scenes):
    """rectify.py and distill.py have no --split; that of paper/run.py is for its last stage."""
    for script in (rectify, distill):
        assert "--split" not in script.flags().format_help()
    run(paper_run, "no-bias", "--split", "test", "--epochs", "1")
    split = {stage: {one["fingerprint"]["split"] for one in metrics.values()} for stage, metrics in (
        ("rectify", {"": read_json("runs/toyland/rectify/metrics.json")}),
        ("evaluate", read_json("runs/toyland/evaluate/metrics.json")))}
    assert split == {"rectify": {"val"}, "evaluate": {"test"}}


@pytest.mark.parametrize("flags, split", [([], "val"), (["--split", "test"], "test")])
def test_scripts_that_train_and_measure_know_the_split(few_scenes, monkeypatch, flags, split):
    monkeypatch.setitem(maft.RECIPES, "toyland", replace(maft.RECIPES["toyland"], epochs=1))
    for script, name in ((clip_s4, "clip_s4"), (maft, "maft")):
        run(script, *flags)
        found = read_json(f"runs/toyland/{name}/metrics.json")
        made = found["tuned" if script is maft else "fingerprint"]
        made = made.get("fingerprint", made)
        assert (made["split"], made["images"]) == (split, 5 if split == "test" else 3)


def test_things_of_toyland_are_a_dataset(few_scenes, capsys):
    """The pictures of toyland, ten classes, and runs of its own."""
    run(rectify, "--data", "toyland-things", "--epochs", "1")
    run(distill, "--epochs", "1")
    metrics = run(evaluate)
    assert "toyland-things: 3 val images, 10 classes" in capsys.readouterr().out
    assert all(list(found["per_class_iou"]) == [*world.THINGS] for found in metrics.values())
    assert os.listdir("data") == ["toyland"] and os.listdir("runs") == ["toyland-things"]
    assert metrics["maskclip"]["miou"] > metrics["vanilla"]["miou"]
    assert "found 16 in --classes" in refusal(
        capsys, evaluate, "--data", "toyland-things", "--out", "other", "--classes", all_classes())


def all_classes() -> str:
    Path("all.txt").write_text("\n".join(world.CLASSES))
    return "all.txt"


# ------------------------------------------------------------------------------ what the optimiser is given

class Watched(torch.optim.SGD):
    """The optimiser of a stage. It writes down what it is given in every step, and then does its work."""
    made = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.start = [], [parameter.detach().clone() for parameter in self.parameters()]
        Watched.made.append(self)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self):
        given = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        self.steps.append(given | {"gradients": [parameter.grad.clone() for parameter in self.parameters()]})
        return super().step()


def watched(monkeypatch, script, *flags):
    """A training of a script, watched: its optimiser, and what `Training.descend` got, that is the model and
    for every step the gradients of that step's loss alone."""
    descended, descend = [], runs.Training.descend

    def alone(self, loss, rate, ids):
        of_loss = torch.autograd.grad(loss, self.optimizer.parameters(), retain_graph=True)
        descended.append({"model": self.model, "gradients": of_loss})
        descend(self, loss, rate, ids)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "SGD", Watched)
        patched.setattr(runs.Training, "descend", alone)
        Watched.made.clear()
        run(script, *flags)
    [optimizer] = Watched.made
    return optimizer, descended


@pytest.fixture(params=["rectify", "distill"])
def stage(request, voc, monkeypatch):
    """A stage, watched for three epochs of two steps: (script, recipe, optimiser, what it descended on)."""
    script = {"rectify": rectify, "distill": distill}[request.param]
    if script is distill:
        run(rectify, *voc)
    optimizer, descended = watched(monkeypatch, script, *voc, "--epochs", "3")
    assert len(optimizer.steps) == len(descended) == 6
    return script, replace(script.RECIPES["voc"], epochs=3), optimizer, descended


def test_rate_of_rectify_falls_in_every_step_as_its_schedule_says(voc, monkeypatch):
    """A mutant that never lowered the rate survived all other tests: rate · (1 − step / horizon)^0.9."""
    optimizer, _ = watched(monkeypatch, rectify, *voc, "--epochs", "3")
    recipe, rates = replace(rectify.RECIPES["voc"], epochs=3), [step["lr"] for step in optimizer.steps]
    assert rates == [rectify.learning_rate(recipe, step, 2) for step in range(6)]
    for step in (0, 3, 5):                                              # the first, a middle one, the last
        assert rates[step] == pytest.approx(0.01 * (1 - step / 400) ** 0.9, rel=1e-12)
    assert sorted(rates, reverse=True) == rates and len(set(rates)) == 6


@pytest.mark.parametrize("floor", [0.01, 0.5])
def test_rate_of_distill_falls_to_its_floor_and_no_further(voc, monkeypatch, floor):
    """A mutant with `min` in place of `max` survived all other tests. The last steps reach a floor of 0.5."""
    monkeypatch.setitem(distill.RECIPES, "voc", replace(distill.RECIPES["voc"], floor=floor))
    run(rectify, *voc)
    optimizer, _ = watched(monkeypatch, distill, *voc, "--epochs", "3")
    recipe, rates = replace(distill.RECIPES["voc"], epochs=3), [step["lr"] for step in optimizer.steps]
    assert rates == [distill.learning_rate(recipe, step, 6) for step in range(6)]
    for step in (0, 3, 5):
        expected = 0.01 * {0: 1, 3: 0.5 ** 0.9, 5: (1 / 6) ** 0.9}[step]
        assert rates[step] == pytest.approx(max(floor * 0.01, expected), rel=1e-12)
    assert (rates[5] == floor * recipe.learning_rate) == (floor == 0.5)


def test_optimiser_has_the_recipes_numbers_in_every_step(stage):
    """Momentum 0.9 and weight decay 0.0005 for all parameters in one group; nothing of SGD's other kinds."""
    script, recipe, optimizer, _ = stage
    assert type(optimizer).__bases__ == (torch.optim.SGD,) and len(optimizer.param_groups) == 1
    for given in optimizer.steps:
        found = given["momentum"], given["weight_decay"]
        assert found == (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
        assert not given["nesterov"] and given["dampening"] == 0 and not given["maximize"]


def test_optimiser_has_exactly_what_the_stage_trains(stage):
    """Stage 1: prompt, projection, decoder. Stage 2: the network, nothing of the head that it inherits."""
    script, _, optimizer, descended = stage
    model, given = descended[0]["model"], optimizer.parameters()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for parameter in given]
    assert len(set(names)) == len(names) and all(parameter.requires_grad for parameter in given)
    if script is rectify:
        assert sorted(names) == ["decoder.conv.weight", "decoder.norm.bias", "decoder.norm.weight",
                                 "projection.bias", "projection.weight", "prompt"]
    else:
        assert set(names) == {name for name in name_of.values() if name.startswith("network.")}
        assert {name.split(".")[1] for name in names} == {"backbone", "aspp"}
        assert not [name for name, parameter in model.head.named_parameters() if parameter.requires_grad]


def test_gradients_are_those_of_one_batch_alone(stage):
    """They are reset in every step: none is left of the step before, in which they were others."""
    _, _, optimizer, descended = stage
    for given, alone in zip(optimizer.steps, descended):
        for found, expected in zip(given["gradients"], alone["gradients"], strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    for earlier, later in zip(optimizer.steps, optimizer.steps[1:]):
        assert any(not torch.allclose(a, b) for a, b in zip(earlier["gradients"], later["gradients"]))


def test_weights_are_those_that_sgd_gives_by_hand(stage):
    """w ← w − rate · v, v ← 0.9 v + (gradient + 0.0005 w), from the gradients and rates of all six steps."""
    script, recipe, optimizer, descended = stage
    for number, (weight, parameter) in enumerate(zip(optimizer.start, optimizer.parameters())):
        velocity = torch.zeros_like(weight)
        for given in optimizer.steps:
            velocity = recipe.momentum * velocity + given["gradients"][number] + recipe.weight_decay * weight
            weight = weight - given["lr"] * velocity
        assert torch.allclose(parameter, weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, optimizer.start[number])
    name = next(name for name, one in descended[0]["model"].named_parameters() if one is parameter)
    assert torch.equal(weights_of(script.__name__)[name], parameter)            # and these are saved


# ---------------------------------------------------------------------------------- equal runs, equal weights

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
    """CLIP looks at every image once. The weights are, up to float16, those of a training whose augmentation
    never changes."""
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1")
    assert read_json("cached/voc/rectify/recipe.json")["recipe"]["cache_features"] == 0.1
    seen = []
    for owner, name in ((rectify.Rectifier, "encode"), (data.StoredFeatures, "look")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original: seen.append(1) or original(*args))
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1", "--seed", "0")
    assert not seen                                                         # all of it came from the cache
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1", "--seed", "1")
    assert seen == [1]                                                  # another seed, another augmentation
    item = data.TrainingImages.__getitem__
    monkeypatch.setattr(data.TrainingImages, "__getitem__", lambda self, when: item(self, (0, when[1])))
    run(rectify, *voc, "--out", "fixed")
    run(rectify, *voc, "--out", "cached", "--cache-features", "0.1", "--seed", "0")
    found, expected = weights_of("rectify", "cached"), weights_of("rectify", "fixed")
    assert all(torch.allclose(found[name], tensor, atol=2e-3) for name, tensor in expected.items())


def test_cached_features_that_do_not_fit_are_refused_before_anything_is_written(voc, capsys):
    said = refusal(capsys, rectify, *voc, "--cache-features", "1e-6")
    assert "--cache-features 1e-06: expected room for" in said and not Path("runs/voc/rectify").exists()


def test_quick_is_other_numbers_and_says_first_what_will_take_how_long(voc, capsys):
    """The weights are those of the three flags that --quick stands for; one that is given too is obeyed."""
    capsys.readouterr()
    run(rectify, *voc, "--out", "quick", "--quick", "--batch-size", "3")
    said = capsys.readouterr().out
    forecast = re.search(r"about [\d.]+ minutes: hypotheses [\d.]+, features [\d.]+, steps [\d.]+\.", said)
    assert forecast and forecast.start() < said.index("recipe")
    run(rectify, *voc, "--out=spelt", "--window-ratio", "0.4", "--cache-features", "4", "--batch-size", "3")
    recipes = [read_json(f"{out}/voc/rectify/recipe.json")["recipe"] for out in ("quick", "spelt")]
    assert recipes[0] == recipes[1] and (recipes[0]["batch_size"], recipes[0]["window_ratio"]) == (3, 0.4)
    assert recipes[0]["learning_rate"] == pytest.approx(rectify.RECIPES["voc"].learning_rate * 3 / 2)
    assert same_weights(weights_of("rectify", "quick"), weights_of("rectify", "spelt"))


@pytest.mark.parametrize("lacks", [True, False])
def test_bf16_on_a_processor_without_it_says_that_it_will_be_slow(voc, capsys, monkeypatch, lacks):
    monkeypatch.setattr(machine, "lacks_bfloat16", lambda device: lacks)
    run(rectify, *voc, "--precision", "bf16", "--epochs", "1")
    assert ("--precision bf16: this processor has no instruction for it" in capsys.readouterr().out) is lacks


def test_learning_rate_goes_with_the_batch(voc):
    """Twice the images a step, twice the rate; the recipe that is kept says both."""
    recipe = rectify.RECIPES["voc"]
    run(rectify, *voc, "--batch-size", 2 * recipe.batch_size)
    found = read_json("runs/voc/rectify/recipe.json")["recipe"]
    assert found["batch_size"] == 2 * recipe.batch_size and found["learning_rate"] == 2 * recipe.learning_rate


def test_runs_share_what_is_slow_to_make(voc, monkeypatch):
    """--cache: another --out, another seed, and the student take query and votes from the first run's."""
    run(rectify, *voc, "--out", "one", "--cache", "shared")
    kept = content_of("shared")
    assert sorted(Path(name).name.split("-")[0] for name in kept) == ["query", "votes"]
    assert all(name.endswith(".pt") for name in kept) and not Path("one/voc/cache").exists()
    for name in ("window_votes", "query_features"):
        monkeypatch.setattr(rectify, name, None)
    run(rectify, *voc, "--out", "two", "--cache", "shared", "--seed", "1")
    run(distill, "--out", "two", "--cache", "shared")
    assert content_of("shared") == kept


def test_flags_of_the_hypothesis_reach_recipe_and_training(voc):
    """t and r of Eq. 6; a student asks with its teacher's."""
    run(rectify, *voc, "--out", "few", "--vote-threshold", "0.9", "--window-ratio", "0.34")
    run(rectify, *voc, "--out", "many", "--vote-threshold", "0", "--window-ratio", "0.34")
    found = {out: read_json(out, "voc/rectify/recipe.json")["recipe"] for out in ("few", "many")}
    assert [found[out]["vote_threshold"] for out in found] == [0.9, 0]
    assert [found[out]["window_ratio"] for out in found] == [0.34, 0.34]
    assert not same_weights(weights_of("rectify", "few"), weights_of("rectify", "many"))
    run(distill, "--out", "few")
    assert settings_of("distill", "few")["teacher_recipe"]["vote_threshold"] == 0.9


def test_learning_rate_of_the_flag_is_that_of_the_first_step(voc):
    """In both stages, and not multiplied with the batch, for it was given."""
    for script in (rectify, distill):
        stage = script.__name__
        run(script, *voc, "--learning-rate", "0.003", "--batch-size", "4")
        assert read_json("runs/voc", stage, "recipe.json")["recipe"]["learning_rate"] == 0.003
        first = Path("runs/voc", stage, "log.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["rate"] == 0.003


@pytest.mark.parametrize("flag, field, value", [("--dense-path", "dense_path", "value"),
                                                ("--mask-scale", "mask_scale", 0.5),
                                                ("--loss-scale", "loss_scale", 20.0)])
def test_numbers_that_belong_to_the_clip_reach_recipe_and_training(voc, flag, field, value):
    """Other weights than with the recipe's own; the student learns with its teacher's numbers."""
    run(rectify, *voc, "--out", "usual")
    run(rectify, *voc, "--out", "other", flag, value)
    assert read_json("other/voc/rectify/recipe.json")["recipe"][field] == value
    assert read_json("usual/voc/rectify/recipe.json")["recipe"][field] != value
    assert not same_weights(weights_of("rectify", "other"), weights_of("rectify", "usual"))
    run(distill, "--out", "other", "--epochs", "1")
    assert settings_of("distill", "other")["teacher_recipe"][field] == value


def test_activation_is_that_of_the_flag_and_later_stages_keep_it(voc, capsys):
    """A file that does not tell: the flag makes another CLIP of it. It is said, stored, and asked once."""
    torch.save(openai_state(**SMALLEST), "bare.pt")
    bare = ["--data", "voc", "--clip", "bare.pt"]
    run(rectify, *bare, "--out", "usual")
    run(rectify, *bare, "--activation", "gelu")
    assert "gelu)" in capsys.readouterr().out
    assert settings_of("rectify")["activation"] == "gelu"
    assert settings_of("rectify", "usual")["activation"] == "quickgelu"
    assert not same_weights(weights_of("rectify"), weights_of("rectify", "usual"))
    assert opened().clip_model.activation == "gelu"
    run(distill, "--epochs", "1")
    assert settings_of("distill")["activation"] == "gelu"
    assert list(run(evaluate)) == ["vanilla", "maskclip", "rectify", "distill"]
    assert "another CLIP" in refusal(capsys, evaluate, "--activation", "quickgelu")


@pytest.mark.slow
def test_compiled_blocks_change_rounding_alone(voc):
    for out, flags in (("plain", []), ("compiled", ["--compile"])):
        run(rectify, *voc, "--out", out, *flags)
    found, expected = weights_of("rectify", "compiled"), weights_of("rectify", "plain")
    assert all(torch.allclose(found[name], tensor, atol=1e-3) for name, tensor in expected.items())
    images = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():                       # weights of a few steps hide much: the features themselves
        args = [rectify.flags().parse_args([*map(str, voc), *flags]) for flags in ([], ["--compile"])]
        plain, compiled = (data.open_setup(one).clip_model.encode_dense(images) for one in args)
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
    """Both stages give the same bits with the labels, without their folder, and with noise in its place."""
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
import helpers
import rectify, distill, evaluate
from toyland import world
helpers.quick_recipes(pytest.MonkeyPatch(), Path("weights"))
world.TRAIN_SCENES, world.VAL_SCENES, world.TEST_SCENES = 4, 2, 2
if {name!r} != "voc":
    world.draw_dataset(Path("data"))
opened, found, measure = [], [], evaluate.after_training

def note(event, args):
    if event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(args[0]))

def note_and_measure(*args):
    opened.append("MAIN HAS ENDED")
    return measure(*args)

evaluate.after_training = note_and_measure
sys.addaudithook(note)
for script, flags in ((rectify, ["--data", {name!r}, "--clip", {clip!r}]), (distill, []),
                      (distill, ["--data", {name!r}, "--clip", {clip!r}, "--out", "both at once"])):
    helpers.run(script, *flags)
    found.append(list(opened))
    opened.clear()
Path("opened.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, images, labels", [("voc", "JPEGImages", "SegmentationClass"),
                                                  ("toyland", "toyland/images/train", "toyland/labels"),
                                                  ("toyland-things", "toyland/images/train",
                                                   "toyland/labels")])
def test_no_label_is_opened_before_training_is_done(voc, place, tiny_clip, name, images, labels):
    """Seen from the interpreter itself, which reports every file that is opened and every folder that is
    listed: by rectify, by distill, and by a distill that makes its rectification itself."""
    program = OPENED.format(root=str(ROOT), tests=str(ROOT / "tests"), clip=str(tiny_clip), name=name)
    result = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for listed in read_json("opened.json"):
        [ended] = [number for number, path in enumerate(listed) if path == "MAIN HAS ENDED"]
        assert any(images in path for path in listed[:ended])               # the hook does see what is opened
        assert not [path for path in listed[:ended] if labels in path]
        assert any(labels in path for path in listed[ended:])               # and afterwards it is measured


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


def saved_step(*run_folder) -> int:
    """Up to which step an unfinished run is saved."""
    return torch.load(Path(*run_folder, "unfinished/state.pt"), weights_only=True)["step"]


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 4, 6])
@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_crashed_run_resumes_to_the_same_weights(voc, monkeypatch, script, call):
    """Six steps in three epochs, broken off in the first, the second and the last: --resume ends as if
    nothing had been."""
    stage = script.__name__
    for out in ("whole", "broken"):
        if script is distill:
            run(rectify, *voc, "--out", out)
    run(script, *voc, "--out", "whole", "--epochs", "3")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at(patched, script, call, crash)
        run(script, *voc, "--out", "broken", "--epochs", "3")
    assert not Path("broken/voc", stage, "checkpoint.pt").exists()
    assert saved_step("broken/voc", stage) == (call - 1) // 2 * 2               # the last whole epoch
    run(script, *voc, "--out", "broken", "--epochs", "3", "--resume")
    assert same_weights(weights_of(stage, "broken"), weights_of(stage, "whole"))
    log = Path("broken/voc", stage, "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_ctrl_c_saves_and_resumes_to_the_same_weights(voc, monkeypatch, capsys, script):
    """In the middle of an epoch: exit code 130, the hint to --resume, and the same weights in the end."""
    stage = script.__name__
    for out in ("whole", "broken"):
        if script is distill:
            run(rectify, *voc, "--out", out)
    run(script, *voc, "--out", "whole")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end, errors.one_paragraph():
        stop_at(patched, script, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(script, *voc, "--out", "broken")
    assert end.value.code == 130 and "--resume" in capsys.readouterr().err
    assert saved_step("broken/voc", stage) == 3
    run(script, *voc, "--out", "broken", "--resume")
    assert same_weights(weights_of(stage, "broken"), weights_of(stage, "whole"))


@pytest.mark.parametrize("script", [rectify, distill], ids=["rectify", "distill"])
def test_run_is_saved_as_often_as_the_flag_says(voc, monkeypatch, script):
    """--save-every 0: after every step, also in the middle of an epoch. It goes on to the same weights."""
    stage = script.__name__
    for out in ("whole", "broken"):
        if script is distill:
            run(rectify, *voc, "--out", out)
    run(script, *voc, "--out", "whole")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at(patched, script, 4, crash)
        run(script, *voc, "--out", "broken", "--save-every", "0")
    assert saved_step("broken/voc", stage) == 3
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
    said = refusal(capsys, rectify, *voc, "--resume", "--classes", "other.txt")
    assert "state.pt was made with another" in said
    assert content_of("runs/voc/rectify") == before
    run(rectify, *voc, "--resume")


# ------------------------------------------------------------------------------------------ bad input

def nothing_half_written() -> bool:
    written = ("checkpoint.pt", "state.pt", "metrics.json", "preview.png")
    return not [path for path in Path().rglob("*")
                if path.suffix in (".part", ".lock") or path.name in written]


@pytest.mark.parametrize("case, parts", [
    (["--data", "nowhere", "--classes", "names.txt"], ["--data nowhere"]),
    (["--data", "nowhere"], ["--data nowhere", "--classes FILE"]),
    (["--data", "voc", "--root", "nowhere"], ["nowhere/VOCdevkit/VOC2012", "--download"]),
    (["--data", "empty", "--classes", "names.txt"], ["--data empty", "expected photographs"]),
    (["--data", "photos", "--classes", "nowhere.txt"], ["--classes nowhere.txt"]),
    (["--data", "photos", "--classes", "one.txt"], ["one.txt", "at least two classes, found 1"]),
    (["--data", "photos", "--classes", "long.txt"],
     ["long.txt", "at most 65 tokens", "found 72 in 'very very"]),
    (["--data", "photos", "--classes", "names.txt", "--clip", "nowhere.pt"], ["'nowhere.pt'", "ViT-B/16"]),
    (["--data", "photos", "--classes", "names.txt", "--clip", "names.txt"],
     ["names.txt", "damaged or no weights file"]),
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
    with pytest.raises(SystemExit) as end, errors.one_paragraph():
        rectify.main(rectify.flags().parse_args([*map(str, photos), "--device", "nonsense"]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--device nonsense: expected a device of this machine, found none" in said
    assert nothing_half_written()


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--epochs", "-3"], ["--batch-size", "0"],
                                   ["--epochs", "many"]])
def test_numbers_that_make_no_sense_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as end:
        rectify.flags().parse_args(flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"{flags[0]}: expected a whole number from 1 on, found {flags[1]}" in said


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
    """A rectification that was trained again with other words does not fit the old student: left out."""
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
        with pytest.raises(SystemExit) as end, errors.one_paragraph():
            run(script, *flags)
        said = capsys.readouterr().err
        assert end.value.code == 2 and "python rectify.py" in said
        assert "checkpoint.pt: expected a checkpoint, found a damaged file" in said


def test_nothing_to_measure_against_is_an_error_that_says_what_to_do(photos, capsys):
    run(rectify, *photos)
    assert "--labels DIR" in refusal(capsys, evaluate)
    assert not Path("runs/photos/evaluate").exists()


def test_labels_of_ignored_pixels_alone_are_no_result(voc, capsys):
    for path in Path("data", VOC_BASE, "SegmentationClass").iterdir():
        write_label(path, np.full((40, 56), 255))
    assert "found ignored pixels" in refusal(capsys, evaluate, *voc)
    assert nothing_half_written()


# -------------------------------------------------------------------------------------- as separate processes

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
@pytest.mark.parametrize("script", ["rectify", "datasets/check"])
def test_debug_shows_the_traceback_of_a_refusal(place, script):
    """The same paragraph and the same exit code; without the flag none. (All scripts: test_house.py.)"""
    for debug in ([], ["--debug"]):
        result = command(ROOT / f"{script}.py", "--data", "nowhere", *debug, cwd=place)
        assert result.returncode == 2 and "expected" in result.stderr.strip().splitlines()[-1]
        assert ("Traceback (most recent call last)" in result.stderr) == bool(debug)
        assert len(result.stderr.strip().splitlines()) == 1 or debug


@pytest.mark.slow
def test_the_real_commands_end_to_end(voc, place):
    """Four processes, VOC's own recipe at its real picture size (a tiny CLIP, one epoch), few flags."""
    result = command(ROOT / "rectify.py", *voc, "--epochs", 1, "--device", "cpu", cwd=place)
    assert result.returncode == 0, result.stderr
    assert "Next: python distill.py" in result.stdout and "ReCLIP++ rectified" in result.stdout
    assert read_json("runs/voc/rectify/recipe.json")["recipe"]["crop"] == [336, 336]
    result = command(ROOT / "evaluate.py", "--device", "cpu", cwd=place)
    assert result.returncode == 0 and "sheep" in result.stdout, result.stderr
    photo_of_voc = Path("data", VOC_BASE, "JPEGImages/2007_000033.jpg")
    result = command(ROOT / "segment.py", photo_of_voc, "--device", "cpu", cwd=place)
    assert result.returncode == 0 and Path("runs/segment/2007_000033_overlay.png").exists(), result.stderr
    result = command(ROOT / "distill.py", "--classes", "nowhere.txt", "--device", "cpu", cwd=place)
    assert result.returncode == 2 and "nowhere.txt" in result.stderr
