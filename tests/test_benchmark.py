"""The benchmark's plain steps compute what ours compute: else its ratios would compare two different things.

Both sides share float32 weights and add the same products in another order, so values of the same size agree
to some 1e-6 and are held to 1e-5; gradients, sums of many terms of both signs, to 1e-4. A forgotten term, a
wrong mask or a wrong scale moves them by 1e-2 and more. Decisions (votes, predicted classes) must agree
exactly: on these inputs no two candidates come closer than rounding.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT
from helpers import TINY, openai_state, relative, write_photos

import clip
import distill
import evaluate
import rectify
from benchmarks import benchmark, bfloat16, plain
from datasets import IGNORE, words
from datasets.images import images_in
from harness import runs

NAMES = ["dog", "potted plant", "wall", "dining table"]                     # of one and of two tokens
SETTINGS = {"device": "cpu", "precision": "fp32", "quick": True, "batch": 1,
            "threads": torch.get_num_threads()}


@pytest.fixture(scope="module")
def models() -> tuple[clip.CLIP, plain.CLIP]:
    model = clip.build_model(openai_state(**TINY)).eval().requires_grad_(False)
    return model, plain.CLIP(model)


def query_of(model: clip.CLIP) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(len(NAMES), model.visual.proj.shape[1], generator=generator), dim=-1)


def images_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def rectifier_of(model: clip.CLIP, length: int = 73) -> rectify.Rectifier:
    torch.manual_seed(3)
    rectifier = rectify.Rectifier(model, len(NAMES), length)
    with torch.no_grad():                       # vectors all alike would hide a prompt in the wrong order
        rectifier.prompt += 0.1 * torch.randn_like(rectifier.prompt)
    return rectifier


def votes_of(batch: int) -> torch.Tensor:
    """Shares of windows, of which some pass the recipes' threshold, and in the second image none does."""
    return torch.tensor([[0.5, 0.06, 0.2, 0.24], [0.06, 0.07, 0.05, 0.06], [0.25, 0.25, 0.25, 0.25]])[:batch]


@pytest.mark.parametrize("path", ["residual", "value", "vanilla"])
def test_plain_dense_features_are_ours(models, path):
    ours, slow = models
    images = images_of(2, 3, 44, 52)            # neither square nor a multiple of the patch
    assert relative(slow.encode_dense(images, path), ours.encode_dense(images, path)) < 1e-5


def test_plain_global_features_are_ours(models):
    ours, slow = models
    images = images_of(2, 3, 32, 32)
    assert relative(slow.encode_image(images), ours.encode_image(images)) < 1e-5


def test_plain_query_features_are_ours(models):
    ours, slow = models
    asked = words.Vocabulary((("dog", "puppy"), ("potted plant",)), ((0, 0, 0),) * 2,
                             tuple(words.QUERY_TEMPLATES[:9]))
    assert relative(plain.query_features(slow, asked), rectify.query_features(ours, asked)) < 1e-5


def test_plain_hypothesis_is_ours():
    for threshold in (0.0, 0.07, 0.3, 1.0):
        ours = rectify.multi_label_hypothesis(votes_of(3), threshold)
        assert torch.equal(plain.hypothesis_of(votes_of(3), threshold), ours)


def test_votes_of_the_benchmark_put_a_tenth_of_the_classes_into_an_image():
    """With the threshold of its recipe, whatever the number of classes."""
    bench = benchmark.Bench(SETTINGS)
    for classes, expected in ((3, 1), (20, 2), (150, 15)):
        recipe = bench.recipe(benchmark.class_names(classes))
        hypothesis = rectify.multi_label_hypothesis(bench.votes(2, classes), recipe.vote_threshold)
        assert hypothesis.sum(dim=1).tolist() == [expected] * 2
    bench.folder.cleanup()


@pytest.mark.parametrize("length, batch", [(73, 1), (73, 3), (5, 1)])
def test_plain_rectification_step_has_our_loss_and_gradients(models, length, batch):
    ours, slow = models
    # Small scales: at 100 a straight-through gradient is nearly zero, and a relative error says nothing.
    recipe = rectify.Recipe(mask_scale=3.0, loss_scale=10.0, prompt_length=length)
    found = []
    images, votes = images_of(batch, 3, 40, 48), votes_of(batch)
    for side in ("plain", "ours"):
        rectifier = rectifier_of(ours, length).train()
        noise = torch.Generator().manual_seed(4)
        if side == "plain":
            loss = plain.rectify_step(rectifier, slow, images, votes, query_of(ours), NAMES, recipe, noise)
        else:
            features = rectifier.encode(ours, images, recipe.dense_path)
            loss = rectify.train_step(rectifier, ours, features, votes, query_of(ours), NAMES, recipe, noise)
        loss.backward()
        found.append((loss.detach(),
                      {name: parameter.grad for name, parameter in rectifier.named_parameters()}))
    (slow_loss, slow_gradients), (our_loss, our_gradients) = found
    assert relative(slow_loss, our_loss) < 1e-5
    for name, gradient in our_gradients.items():
        assert gradient.norm() > 0, name
        assert relative(slow_gradients[name], gradient) < 1e-4, name


def test_plain_distillation_step_has_our_loss_and_gradients(models):
    ours, slow = models
    names, query = NAMES, query_of(ours)
    teacher_recipe = rectify.Recipe(mask_scale=3.0, loss_scale=10.0)
    recipe = distill.Recipe(backbone="small")
    rectifier = rectifier_of(ours).eval().requires_grad_(False)
    with torch.no_grad():
        reference = rectify.reference_features(ours, rectifier.prompt, names)
    images, votes = images_of(2, 3, 48, 64), votes_of(2)
    found = []
    for side in ("plain", "ours"):
        torch.manual_seed(5)
        inherited = distill.Inherited(rectifier, query, reference, ours.visual.patch_positions(4, 4))
        student = distill.Student("small", inherited, pretrained=False).train()
        noise = torch.Generator().manual_seed(6)
        if side == "plain":
            loss = plain.distill_step(student, rectifier, slow, images, votes, query, names, teacher_recipe,
                                      recipe, noise)
        else:
            taught = distill.teach(rectifier, ours, images, query, reference, teacher_recipe.dense_path)
            loss = distill.train_step(student, *taught, images, votes, teacher_recipe, recipe, noise)["loss"]
        loss.backward()
        # Backbone and head as two vectors: in one BatchNorm's bias the terms may cancel down to rounding.
        found.append((loss.detach(), [torch.cat([parameter.grad.flatten() for parameter in part.parameters()])
                                      for part in (student.network.backbone, student.network.aspp)]))
    (slow_loss, slow_gradients), (our_loss, our_gradients) = found
    assert relative(slow_loss, our_loss) < 1e-5
    for slow_gradient, gradient in zip(slow_gradients, our_gradients):
        assert gradient.norm() > 0
        assert relative(slow_gradient, gradient) < 1e-4


def test_plain_votes_are_ours(models, tmp_path):
    ours, slow = models
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):             # noise: a smooth picture is the same however it is resized
        Image.fromarray(rng.integers(0, 256, (60, 72, 3), dtype=np.uint8)).save(tmp_path / name)
    query, bench = query_of(ours), benchmark.Bench(SETTINGS)
    bench.model = ours                          # the weights of these tests in place of its own
    setup = bench.setup(NAMES)
    setup.data = str(tmp_path)
    expected = rectify.count_votes(setup, query, rectify.Recipe(short_side=48, window_ratio=1 / 3))
    found = plain.count_votes(slow, query, images_in(tmp_path), 48, 1 / 3)
    assert found.shape == expected.shape == (2, len(NAMES))
    assert torch.allclose(found, expected, atol=1e-6)                       # one vote is 1/25
    assert not torch.equal(expected[0], expected[1])                        # else any constant would pass
    bench.folder.cleanup()


def test_plain_predictions_and_confusions_are_ours(models, tmp_path):
    ours, slow = models
    query, recipe = query_of(ours), rectify.Recipe()
    rectifier = rectifier_of(ours).eval().requires_grad_(False)
    bench = benchmark.Bench(SETTINGS)
    bench.model = ours                          # the weights of these tests in place of its own
    image, size = images_of(3, 40, 56), (61, 83)
    true_label = torch.randint(0, len(NAMES), size, generator=torch.Generator().manual_seed(7))
    true_label[:5] = IGNORE
    setup = bench.rectified(NAMES, recipe, rectifier)
    stages = ["vanilla", "maskclip", "rectify"]
    with torch.no_grad():
        logits = evaluate.logits_of_all(setup, evaluate.predictors(setup, query, stages), image[None])
    found = plain.evaluate_image(rectifier, slow, image[None], true_label, query, NAMES, recipe.dense_path)
    for stage in stages:
        expected, (predicted, confusion) = evaluate.predict(logits[stage], size), found[stage]
        assert len(expected.unique()) > 1
        assert (predicted != expected.numpy()).mean() == 0, (stage, (predicted != expected.numpy()).sum())
        assert np.array_equal(confusion, evaluate.confusion_matrix(true_label, expected, len(NAMES)).numpy())
    sides = benchmark.evaluation(bench, benchmark.Case(len(NAMES), 40, (40, 56), size), images=2)
    slow_matrices, our_matrices = sides.plain(), sides.ours()
    assert all(np.array_equal(slow_matrices[stage], our_matrices[stage].numpy()) for stage in stages)
    bench.folder.cleanup()


def test_class_names_of_the_benchmark_are_as_long_as_real_ones():
    lengths = [len(clip.encode(name)) for name in benchmark.class_names(150)]
    assert [lengths.count(tokens) for tokens in (1, 2, 3)] == [120, 27, 3]  # ADE20K's: 119, 28, 3
    assert len(set(benchmark.class_names(150))) == 150


def test_flop_of_a_product_and_of_both_attentions_are_counted():
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert benchmark.flop_of(lambda: left @ right) == 2 * 3 * 5 * 7
    T, E = 6, 64
    x = torch.randn(1, T, E)
    expected = 2 * T * E * 3 * E + 2 * 2 * T * T * E + 2 * T * E * E        # in, scores and mixing, out
    own, torchs = clip.model.Attention(E, 1), torch.nn.MultiheadAttention(E, 1, batch_first=True).eval()
    with torch.no_grad():
        torch.nn.init.normal_(own.in_proj_weight)
        assert benchmark.flop_of(lambda: own(x, causal=False)) == expected
        assert benchmark.flop_of(lambda: torchs(x, x, x)) == expected


@pytest.mark.slow
def test_peak_memory_sees_what_a_call_takes_and_frees_again(models):
    if (found := benchmark.peak(benchmark.Bench(SETTINGS), hungry, ())) is None:
        pytest.skip("this system does not tell a process's highest memory since a reset")
    assert 0.95 * HUNGER < found["growth"] < 1.2 * HUNGER       # and what Python itself takes meanwhile


HUNGER = 64 << 20


def hungry(_bench) -> benchmark.Sides:
    def call() -> None:
        torch.ones(HUNGER, dtype=torch.uint8)
    return benchmark.Sides(call, call, 1, "meals")


def run_benchmark(tmp_path, *flags: str) -> tuple[dict, str]:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "benchmark.py"), "--quick",
                           "--repeats", "1", "--device", "cpu", "--threads", "1", "--out", "found.json",
                           *flags],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text()), done.stdout


def test_bfloat16_products_in_float32_are_torchs_own():
    """Number for number; where float32 itself lies on the edge, another order of adding may tip it.

    Backward too, but not the convolution's: there torch's on a CPU adds in bfloat16; no tensor core does.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().requires_grad_()

    for function, inputs in (
            (torch.matmul, (numbers(70, 96), numbers(96, 50))),
            (torch.bmm, (numbers(3, 30, 64), numbers(3, 64, 20))),
            (F.linear, (numbers(70, 96), numbers(50, 96), numbers(50))),
            (lambda x, w: F.conv2d(x, w, padding=2), (numbers(1, 40, 20, 20), numbers(12, 40, 5, 5)))):
        own = function(*inputs)
        towards = torch.randn(own.shape, generator=generator).bfloat16()
        wanted = inputs if own.ndim < 4 else ()
        own = (own, *(torch.autograd.grad(own, wanted, towards) if wanted else ()))
        with bfloat16.Bfloat16Products():
            emulated = function(*inputs)
            emulated = (emulated, *(torch.autograd.grad(emulated, wanted, towards) if wanted else ()))
        for one, other in zip(own, emulated):
            assert one.dtype == other.dtype == torch.bfloat16
            assert (one != other).float().mean() < 0.01 and relative(one.float(), other.float()) < 2 ** -12


def test_bfloat16_attention_in_float32_is_torchs_own_up_to_the_rounding_of_its_weights():
    """torch's kernel rounds the softmax's weights as well, by half a place of 2⁻⁸, which no caller sees."""
    q, k, v = torch.randn(3, 1, 2, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    own = F.scaled_dot_product_attention(q, k, v)
    with bfloat16.Bfloat16Products():
        emulated = F.scaled_dot_product_attention(q, k, v)
    assert emulated.dtype == torch.bfloat16 and relative(own.float(), emulated.float()) < 2 ** -8


def test_float32_goes_through_untouched():
    left, right = torch.randn(70, 96), torch.randn(96, 50)
    expected = left @ right
    with bfloat16.Bfloat16Products():
        assert torch.equal(left @ right, expected)


@pytest.mark.slow
def test_quick_benchmark_writes_every_row(tmp_path):
    found, printed = run_benchmark(tmp_path)
    assert [*found["rows"], "loader"] == list(benchmark.ROWS)
    for name, row in found["rows"].items():
        assert f"\n{name} " in printed
        slow, ours = row["plain"], row["ours"]
        assert row["ratio"] == pytest.approx(slow["seconds_per_unit"] / ours["seconds_per_unit"])
        for side in ("plain", "ours"):
            assert row[side]["seconds_per_unit"] == row[side]["seconds"] / row[side]["units"]
            assert row[side]["flop"] > 0 and len(row[side]["all_seconds"]) == 1
            assert row[side]["memory"] is None or row[side]["memory"]["total"] > 0
        if "dense" not in name:                 # those differ in the last block's scores alone
            assert slow["flop"] / slow["units"] > ours["flop"] / ours["units"], name
        assert slow["units"] == (1 if name.endswith(("-batch", "-cached")) else ours["units"])
    assert set(found["loader"]) >= {"utilisation", "workers"}
    assert len(found["projections"]) == 4
    assert {"versions", "chip", "threads", "command", "precision", "device"} <= set(found)


@pytest.mark.slow
def test_quick_benchmark_writes_growth_and_memory(tmp_path):
    found, printed = run_benchmark(tmp_path, "--growth", "--memory")
    for row in found["growth"]:
        assert len(row["points"]) == len(row["seconds"]) == len(row["flop"]) == 3
        assert row["sentence"] in printed and row["flop"] == sorted(row["flop"])
    assert len(found["memory"]) == 7
    assert "rows" not in found


@pytest.mark.slow
def test_one_row_can_be_chosen(tmp_path):
    found, _ = run_benchmark(tmp_path, "--only", "dense-224")
    assert list(found["rows"]) == ["dense-224"] and not found["projections"] and "loader" not in found


@pytest.mark.slow
def test_script_runs_with_bfloat16_products(tmp_path, tiny_clip):
    """bfloat16.py rectify.py: a whole training, whose checkpoint says bf16 and is finite."""
    write_photos(tmp_path / "photos", "a.png", "b.png")
    (tmp_path / "names.txt").write_text("cat\nsofa\n")
    flags = ["--data", "photos", "--classes", "names.txt", "--clip", str(tiny_clip), "--epochs", "1",
             "--window-ratio", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "bfloat16.py"), "rectify.py", *flags],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = runs.load(tmp_path / "runs/photos/rectify/checkpoint.pt", "rectify")["settings"]
    assert settings["precision"] == "bf16"
