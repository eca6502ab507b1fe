"""The authors' files: hypotheses in both forms, and a rectification as their release saves it.

    python -m pytest tests/test_released.py
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import data
import distill
import evaluate
import rectify
from datasets import DATASETS, hypotheses
from harness import flags, runs
from helpers import SMALLEST, random, refusal, relative, run, write_openai_archive, write_photos, \
    write_public_tree, write_voc_tree
from paper import released, run as other_systems


@pytest.fixture
def voc(place, tiny_clip):
    """VOC's tree of four training images, and a CLIP where --clip says."""
    write_voc_tree(place / "data")
    return ["--data", "voc", "--clip", str(tiny_clip)]


def write_lists(path: Path, images: int, classes: int, seed: int = 0) -> list[list[int]]:
    """A file as the release has it, with random hypotheses of one to five classes."""
    chance = np.random.default_rng(seed)
    lists = [chance.choice(classes, chance.integers(1, 6), replace=False).tolist() for _ in range(images)]
    path.write_text("".join(f"{one}\n" for one in lists))
    return lists


# ------------------------------------------------------------------------------------- hypotheses: reading

@pytest.mark.parametrize("name, images", [("voc", 1464), ("context", 4996), ("cityscapes", 2975)])
def test_lists_of_the_releases_lengths_are_read_and_others_refused(tmp_path, name, images):
    """Against training lists of the same length, and of each other dataset's."""
    classes = len(DATASETS[name].names)
    expected = write_lists(tmp_path / "theirs.json", images, classes)
    order = [f"image {number}" for number in range(images)]
    form, found = hypotheses.read(tmp_path / "theirs.json", order, classes)
    assert form == "one list a line" and found == dict(zip(order, expected))
    for other in {1464, 4996, 2975} - {images}:
        with pytest.raises(ValueError, match=f"expected {other} lines.* found {images}"):
            hypotheses.read(tmp_path / "theirs.json", ["x"] * other, classes)


def test_votes_give_the_hypothesis_back_under_any_threshold(tmp_path, monkeypatch):
    """Nineteen classes in one image, the most of Cityscapes' file, pass t = 0.07 all the same."""
    (tmp_path / "h.json").write_text(json.dumps({"b": [*range(19)], "a": [7], "never seen": [1]}))
    monkeypatch.setattr(hypotheses.image_files, "training_order", lambda *_: ["a", "b"])
    votes = hypotheses.votes(flags.marked(str(tmp_path / "h.json")), "any", "data", ["a", "b"], 19)
    for threshold in (0.0, 0.07, 0.99):
        found = rectify.multi_label_hypothesis(votes, threshold)
        assert found.tolist() == [[k == 7 for k in range(19)], [True] * 19]


def test_lines_follow_the_training_list_and_not_the_names(voc, capsys):
    """VOC's list turned round: the first line is the last name's. What was read is said."""
    path = Path("data/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt")
    names = path.read_text().split()
    path.write_text("\n".join(reversed(names)))
    Path("theirs.json").write_text("[3]\n[2, 1]\n[0]\n[19]")
    setup = data.open_setup(rectify.flags().parse_args([*voc, "--device", "cpu"]))
    votes = hypotheses.votes(flags.marked("theirs.json"), "voc", "data", list(setup.training_images), 20)
    assert [row.nonzero()[:, 0].tolist() for row in votes] == [[19], [0], [1, 2], [3]]
    assert "theirs.json: one list a line, for 4 training images" in capsys.readouterr().out


BAD = {
    "lines": ("[0]\n[1]\n[2]", "expected 4 lines, one for each image of the training list, found 3"),
    "class": ("[0]\n[1]\n[20]\n[2]", "line 3: expected a JSON list of one class number or more, from 0 to 19,"
              " found [20]"),
    "negative": ("[0]\n[-1]\n[2]\n[2]", "line 2"),
    "empty": ("[0]\n[]\n[2]\n[2]", "line 2"),
    "names": ('[0]\n["cat"]\n[2]\n[2]', "line 2"),
    "truth": ("[0]\n[true]\n[2]\n[2]", "line 2"),
    "text": ("[0]\ncat\n[2]\n[2]", "line 2"),
    "one list": ("[[0], [1], [2], [3]]", "found 1."),
    "no JSON": ('{"2007_000032": [0]', "found no JSON"),
    "bytes": (b"\xff\xfe\x00", "found no JSON"),
    "missing": ('{"2007_000032": [0], "2007_000039": [1]}', "none for 2, the first of which is 2007_000063"),
    "of an id": ('{"2007_000032": [0, 99]}', "image 2007_000032: expected a JSON list"),
}


@pytest.mark.parametrize("content, said", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_before_training(voc, capsys, content, said):
    Path("theirs.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refusal(capsys, rectify, *voc, "--hypotheses", "theirs.json")
    assert "--hypotheses theirs.json" in found and said in found
    assert not Path("runs/voc/rectify").exists()


def test_a_file_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        rectify.flags().parse_args(["--hypotheses", "no such file"])
    assert end.value.code == 2 and "expected a file, found none at no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- hypotheses: in a run

def settings(stage: str) -> dict:
    return runs.load(Path(f"runs/voc/{stage}/checkpoint.pt"), stage)["settings"]


@pytest.mark.slow
def test_training_takes_them_and_no_window_is_looked_at(voc, monkeypatch):
    """Lists that say what windows said give the same weights; others give others. distill.py takes its
    teacher's."""
    run(rectify, *voc)
    usual = runs.load(Path("runs/voc/rectify/checkpoint.pt"), "rectify")["weights"]
    released.main(released.flags().parse_args(["--write", "ours.json", "--device", "cpu"]))
    monkeypatch.setattr(rectify, "count_votes", None)
    for name, same in (("ours.json", True), ("others.json", False)):
        if not same:
            lists = [json.loads(line) for line in Path("ours.json").read_text().splitlines()]
            Path(name).write_text("\n".join(json.dumps([(k + 1) % 20 for k in one]) for one in lists))
        run(rectify, *voc, "--hypotheses", name)
        found = runs.load(Path("runs/voc/rectify/checkpoint.pt"), "rectify")["weights"]
        assert all(torch.equal(found[key], usual[key]) for key in usual) == same
    seen = []
    monkeypatch.setattr(hypotheses, "votes", lambda *given: seen.append(given) or torch.ones(4, 20))
    run(distill)
    assert [given[0] for given in seen] == [flags.marked("others.json")]
    assert settings("distill")["teacher_recipe"]["hypotheses"] == flags.marked("others.json")


@pytest.mark.slow
def test_a_rectification_that_distill_makes_first_takes_them_too(voc):
    Path("theirs.json").write_text("[0]\n[1]\n[2]\n[3]\n")
    run(distill, *voc, "--hypotheses", "theirs.json")
    assert settings("rectify")["recipe"]["hypotheses"] == flags.marked("theirs.json")


def test_another_file_or_content_is_refused_on_resume_and_for_the_student(voc, capsys):
    Path("theirs.json").write_text("[0]\n[1]\n[2]\n[3]\n")
    run(rectify, *voc, "--hypotheses", "theirs.json")
    assert settings("rectify")["recipe"]["hypotheses"] == flags.marked("theirs.json")
    assert "hypotheses" in refusal(capsys, rectify, *voc, "--resume")
    Path("theirs.json").write_text("[0]\n[1]\n[2]\n[4]\n")
    assert "another recipe" in refusal(capsys, rectify, *voc, "--resume", "--hypotheses", "theirs.json")
    assert "another file of hypotheses" in refusal(capsys, distill, "--hypotheses", "theirs.json")
    assert "expected the content that this run began with" in refusal(capsys, distill)
    Path("theirs.json").unlink()
    assert "expected the file that this run began with" in refusal(capsys, distill)


def test_a_flag_that_no_part_of_a_system_reads_is_refused(voc, capsys):
    Path("theirs.json").write_text("[0]\n[1]\n[2]\n[3]\n")
    given = [*voc, "--hypotheses", "theirs.json"]
    assert "--hypotheses" in refusal(capsys, other_systems, "maskclip+", *given)
    assert "--vote-threshold" in refusal(capsys, other_systems, "no-bias", *given, "--vote-threshold", "0.1")
    run(other_systems, "no-bias", *given, "--stage", "rectify")
    assert settings("rectify")["recipe"]["hypotheses"] == flags.marked("theirs.json")


def test_what_is_written_is_read_again_in_both_forms(voc, capsys):
    """Ours one list a line, then by id; a file is turned from one form into the other."""
    given = [*voc, "--device", "cpu"]
    for target, source in (("ours.json", None), ("by id.json", "ours.json"), ("back.json", "by id.json")):
        more = ["--hypotheses", source] if source else []
        more += ["--by-id"] * (target == "by id.json")
        released.main(released.flags().parse_args([*given, "--write", target, *more]))
    assert Path("back.json").read_text() == Path("ours.json").read_text()
    setup = data.open_setup(rectify.flags().parse_args(given))
    votes = rectify.votes_of(setup, rectify.query_of(setup), rectify.RECIPES["voc"], rectify.System())
    H = rectify.multi_label_hypothesis(votes, rectify.RECIPES["voc"].vote_threshold)
    expected = {name: row.nonzero()[:, 0].tolist() for name, row in zip(setup.training_images, H)}
    assert json.loads(Path("by id.json").read_text()) == expected
    assert [json.loads(line) for line in Path("ours.json").read_text().splitlines()] == [*expected.values()]


# ------------------------------------------------------------------------------------- their rectification

def their_state(C: int, D: int, E: int, Et: int, L: int = 73, prefix: str = "module.",
                seed: int = 0) -> dict[str, Tensor]:
    """What the release's state dict holds of what was trained, random; and one frozen weight beside it."""
    shapes = {"text_encoder.prompt_token": (1, L, Et), "pe_proj.weight": (D, E, 1, 1), "pe_proj.bias": (D,),
              "decoder_conv2.weight": (C, D + C, 5, 5), "decoder_conv2.bias": (C,),
              "decoder_norm2.weight": (C,), "decoder_norm2.bias": (C,), "decoder_norm2.running_mean": (C,),
              "decoder_norm2.running_var": (C,), "proj.weight": (D, E, 1, 1)}
    state = {name: 0.1 * random(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}
    state["decoder_norm2.running_var"] = state["decoder_norm2.running_var"].abs() + 0.5
    return {prefix + name: tensor for name, tensor in state.items()}


@torch.no_grad()
def their_logits(state: dict[str, Tensor], model: clip.CLIP, images: Tensor, query: Tensor,
                 names: list[str]) -> Tensor:
    """M_o as the release's formula has it, step by step: LayerNorms of the image tower with eps 1e-6, one
    sentence of 77 tokens at a time, W_r read at the largest id, the convolution with its bias, BatchNorm."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    visual = copy.deepcopy(model.visual)
    for module in visual.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    Z = visual.encode_dense(images, "residual")                                             # (B, D, h, w)
    rows = []
    for name in names:
        cut = clip.encode(name)[:3]
        cut = (cut + [49407] + [0] * 3)[:3]
        ids = torch.tensor([49406] + [0] * 73 + cut)
        x = model.token_embedding(ids).clone()
        x[1:74] = state["text_encoder.prompt_token"][0]
        x = model.transformer((x + model.positional_embedding)[None])[0]
        rows.append(model.ln_final(x[74 + max(range(3), key=lambda n: cut[n])]) @ model.text_projection)
    W_r = torch.stack(rows).double()
    W_r = W_r / W_r.square().sum().sqrt()
    h, w = Z.shape[-2:]
    grid = model.visual.input_resolution // model.visual.patch_size
    PE = model.visual.positional_embedding[1:].T.reshape(1, -1, grid, grid)
    PE = F.interpolate(PE, size=(h, w), mode="bicubic", align_corners=False)[0].double()
    W_p = (state["pe_proj.weight"][:, :, 0, 0].double() @ PE.flatten(1)).T + state["pe_proj.bias"].double()
    M_b = (W_p @ W_r.T).T.reshape(len(names), h, w)
    M = torch.einsum("bdhw,cd->bchw", Z, query).double() - M_b
    x = F.conv2d(torch.cat([Z.double(), M], dim=1), state["decoder_conv2.weight"].double(),
                 state["decoder_conv2.bias"].double(), padding=2)
    of = {part: state[f"decoder_norm2.{part}"].double()[:, None, None]
          for part in ("weight", "bias", "running_mean", "running_var")}
    x = (x - of["running_mean"]) / (of["running_var"] + 1e-5).sqrt() * of["weight"] + of["bias"]
    return x.float()


# ViT-B/16's layout, narrow and flat, so that it takes seconds.
NARROW = dict(width=128, layers=3, patch=16, resolution=224, embed_dim=192, text_width=64, text_layers=2)
SHORT = "axe bat bow cap cat cow cup den dog elk fan fig fox gem hat hen ink jar jet keg".split()


def imported(place: Path, names: list[str], size: int, prefix: str) -> tuple[Tensor, Tensor]:
    """M_o of evaluate.py behind an import, and by the release's formula."""
    write_openai_archive(place / "clip.pt", **NARROW, half=False)
    write_photos(place / "photos", "a.png", "b.png")
    Path("names.txt").write_text("\n".join(names))
    state = their_state(len(names), 192, 128, 64, prefix=prefix)
    torch.save(state, "best_weight.pth")
    given = ["--data", "photos", "--classes", "names.txt", "--clip", "clip.pt", "--device", "cpu"]
    setup = released.import_rectification(released.flags().parse_args(["best_weight.pth", *given]))
    query, image = rectify.query_of(setup), random(1, 3, size, size)
    predictor = evaluate.rectified(setup, query, distill.System())
    features = setup.clip_model.encode_dense(image, "residual")
    return predictor.logits(features), their_logits(state, setup.clip_model, image, query, names)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_imported_rectification_gives_their_logits_on_vocs_shapes(place, prefix):
    """Twenty classes at 336 × 336, M_o to 1e-5; names with and without "module."."""
    found, expected = imported(place, SHORT, 336, prefix)
    assert found.shape == (1, 20, 21, 21) and relative(found, expected) < 1e-5


@pytest.mark.slow
def test_imported_rectification_gives_their_logits_on_ades_shapes(place):
    """150 classes at 512 × 512, names of one token and two."""
    names = [f"{first}{second}" for first in ("", *(f"{word} " for word in SHORT)) for second in SHORT][:150]
    assert max(len(clip.encode(name)) for name in names) == 2
    found, expected = imported(place, names, 512, "module.")
    assert found.shape == (1, 150, 32, 32) and relative(found, expected) < 1e-5


def test_names_of_three_tokens_keep_their_logits_with_a_shorter_prompt(place, capsys):
    """As ADE's "chest of drawers": the release does not read those at the end token, and 73 vectors leave no
    room for it."""
    found, expected = imported(place, [*SHORT[:9], "chest of drawers", "skyscraper"], 96, "module.")
    assert relative(found, expected) < 1e-5
    assert "leaves room for 72 of 73 learned vectors" in capsys.readouterr().out


@pytest.mark.slow
def test_distillation_goes_on_from_an_imported_rectification(voc, capsys):
    state = their_state(20, SMALLEST["embed_dim"], SMALLEST["width"], SMALLEST["text_width"])
    torch.save(state, "best_weight.pth")
    Path("theirs.json").write_text("[0]\n[1]\n[2]\n[3]\n")
    given = [*voc, "--hypotheses", "theirs.json", "--device", "cpu"]
    released.main(released.flags().parse_args(["best_weight.pth", *given]))
    run(distill)
    assert set(run(evaluate)) == {"vanilla", "maskclip", "rectify", "distill"}
    assert settings("distill")["teacher_recipe"]["hypotheses"] == flags.marked("theirs.json")
    student = runs.load(Path("runs/voc/distill/checkpoint.pt"), "distill")["weights"]
    assert torch.equal(student["head.rectifier.projection.weight"], state["module.pe_proj.weight"])
    assert "expected no rectification yet" in refusal(capsys, released, "best_weight.pth", *given)


WRONG = {
    "no state dict": (["a list"], "another content or a damaged file"),
    "another network": ({"module.conv.weight": torch.zeros(1)}, "found no text_encoder.prompt_token"),
    "other classes": (their_state(19, 24, 64, 64), "expected decoder_conv2.weight for 20 classes"),
    "another CLIP": (their_state(20, 24, 128, 64), "expected pe_proj.weight for 20 classes and this CLIP"),
    "a longer prompt": (their_state(20, 24, 64, 64, L=80), "expected text_encoder.prompt_token"),
}


@pytest.mark.parametrize("content, said", WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused(voc, capsys, content, said):
    torch.save(content, "best_weight.pth")
    assert said in refusal(capsys, released, "best_weight.pth", *voc)
    assert not Path("runs/voc/rectify/checkpoint.pt").exists()


def test_a_damaged_or_dangerous_checkpoint_is_refused(voc, capsys):
    """Cut in two; a pickle that would run a command when it is read; no file; nothing to do."""
    torch.save(their_state(20, 24, 64, 64), "whole.pth")
    whole = Path("whole.pth").read_bytes()
    Path("best_weight.pth").write_bytes(whole[:len(whole) // 2])
    assert "a damaged file" in refusal(capsys, released, "best_weight.pth", *voc)

    class Command:
        def __reduce__(self):
            return Path.touch, (Path("it ran"),)

    torch.save({"module.proj.weight": Command()}, "best_weight.pth")
    assert "another content" in refusal(capsys, released, "best_weight.pth", *voc)
    assert not Path("it ran").exists()
    assert "found no such file" in refusal(capsys, released, "nowhere.pth", *voc)
    assert "found neither" in refusal(capsys, released, *voc)
    assert "found both" in refusal(capsys, released, "whole.pth", "--write", "x", *voc)
