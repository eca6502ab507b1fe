"""paper/maft.py: every equation against a slow loop, and that nothing without labels can import it.

    python -m pytest tests/test_maft.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import evaluate
import rectify
from conftest import ROOT
from datasets import DATASETS, IGNORE, words
from helpers import TINY, openai_state, random, refusal, relative, run, unit, write_voc_tree
from paper import maft
from test_house import TRAINING, all_arrows, house, reached                                 # noqa: F401
from toyland import world

LAYERS = TINY["layers"]


@pytest.fixture(scope="module")
def visual():
    return clip.build_model(openai_state(**TINY)).eval().visual.requires_grad_(False)


def some_masks(N: int, p: int = 12, q: int = 20, seed: int = 0) -> torch.Tensor:
    """Masks of blocks, (1, N, p, q) bool."""
    return random(1, N, p // 4, q // 4, seed=seed).repeat_interleave(4, -2).repeat_interleave(4, -1) > 0


# ---------------------------------------------------------------------------- IP-CLIP encoder

def slow_encoding(visual, image, mask, split):
    """z of one mask (p, q): token after token and head after head, attending to what it may see."""
    x = visual.embed(image[None])[0]                                                # (1 + n, E)
    h, w = (-(-side // visual.patch_size) for side in image.shape[-2:])
    inside = F.interpolate(mask[None, None].float(), size=(h, w), mode="bilinear")[0, 0].flatten() >= 0.5
    for number, block in enumerate(visual.transformer.resblocks):
        heads, q_k_v = block.attn.heads, F.linear(block.ln_1(x), block.attn.in_proj_weight,
                                                  block.attn.in_proj_bias)
        q, k, v = q_k_v.chunk(3, dim=-1)
        mixed = torch.zeros_like(x)
        for token in range(len(x)):
            sees = list(range(len(x)))
            if number >= split:
                sees = [0, *(1 + i for i in range(h * w) if inside[i])] if token == 0 else sees[1:]
            for part in torch.arange(x.shape[1]).chunk(heads):
                weights = (k[sees][:, part] @ q[token, part] / math.sqrt(len(part))).softmax(dim=0)
                mixed[token, part] = weights @ v[sees][:, part]
        x = x + block.attn.out_proj(mixed)
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[0]) @ visual.proj


@pytest.mark.parametrize("split", range(LAYERS))
def test_encoder_is_the_slow_loop(visual, split):
    """One pass for three masks, one of them empty, on an image that is not square and no multiple of a
    patch."""
    image, masks = random(3, 20, 30), some_masks(3, 10, 15)
    masks[0, 1] = False
    found = maft.encode_proposals(visual, image[None], masks, split)[0]
    expected = torch.stack([slow_encoding(visual, image, mask, split) for mask in masks[0]])
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("split", range(LAYERS))
def test_one_pass_is_each_mask_alone(visual, split):
    """So no class token sees another, and no patch sees one. Also for a batch of two images."""
    images, masks = random(2, 3, 24, 40), torch.cat([some_masks(6), some_masks(6, seed=1)])
    together = maft.encode_proposals(visual, images, masks, split)
    for b in range(2):
        for n in range(6):
            alone = maft.encode_proposals(visual, images[b:b + 1], masks[b:b + 1, n:n + 1], split)
            assert relative(together[b, n], alone[0, 0]) < 1e-5


def test_full_masks_at_the_last_block_are_the_ordinary_class_token(visual):
    images, full = random(2, 3, 24, 40), torch.ones(2, 3, 12, 20, dtype=torch.bool)
    found, ordinary = maft.encode_proposals(visual, images, full, LAYERS - 1), visual(images)
    assert relative(found, ordinary[:, None].expand(-1, 3, -1)) < 1e-5
    earlier = maft.encode_proposals(visual, images, full, LAYERS - 2)
    assert relative(earlier, found) > 1e-3, "patches no longer see the class token"


@pytest.mark.parametrize("N", [0, 1, 7, 130])
def test_any_number_of_proposals(visual, N):
    found = maft.encode_proposals(visual, random(1, 3, 24, 40), some_masks(N), 1)
    assert found.shape == (1, N, TINY["embed_dim"]) and found.isfinite().all()


def test_empty_mask_gives_no_nan_neither_forward_nor_backward():
    tower = clip.build_model(openai_state(**TINY)).visual
    parameters = maft.learned(tower)
    found = maft.encode_proposals(tower, random(1, 3, 24, 40), torch.zeros(1, 2, 12, 20, dtype=torch.bool), 0)
    found.sum().backward()
    assert found.isfinite().all() and all(one.grad.isfinite().all() for one in parameters)


def test_mask_decides_what_a_class_token_sees(visual):
    """What lies outside the mask changes nothing (L = 0: the patches have not mixed yet)."""
    left = torch.zeros(1, 1, 12, 20, dtype=torch.bool)
    left[..., :8] = True
    seen = maft.who_sees_whom(left, (3, 5))[0, 0, 0, 1:].view(3, 5)
    assert seen[:, :2].all() and not seen[:, 2:].any()
    half = torch.zeros(1, 1, 3, 5)
    half[..., 0], half[..., 1] = 0.5, 0.49
    assert maft.who_sees_whom(half, (3, 5))[0, 0, 0, 1:].view(3, 5).sum(dim=0).tolist() == [3, 0, 0, 0, 0]


# ---------------------------------------------------------------------------- scores and losses

def test_class_scores_are_a_softmax_of_cosines():
    features, query = random(5, 16), unit(4, 16, seed=1)
    found = maft.class_scores(features, query, 20.0)
    for n in range(5):
        exponentials = [math.exp(20 * (features[n] @ query[c] / features[n].norm())) for c in range(4)]
        assert found[n].tolist() == pytest.approx([one / sum(exponentials) for one in exponentials], rel=1e-4)


def test_score_spread_is_the_mean_total_variation_of_pairs():
    scores = random(6, 4).softmax(dim=1)
    pairs = random(6, 6, seed=1) > 0
    each = [sum(abs(scores[i, c] - scores[j, c]).item() for c in range(4)) / 2
            for i in range(6) for j in range(6) if pairs[i, j]]
    assert maft.score_spread(scores, pairs) == pytest.approx(100 * sum(each) / len(each), rel=1e-5)
    other = ~torch.eye(4, dtype=torch.bool)
    assert maft.score_spread(torch.eye(4), other) == pytest.approx(100)
    assert maft.score_spread(scores[:1].expand(4, -1), other) == pytest.approx(0)
    assert math.isnan(maft.score_spread(scores, torch.zeros(6, 6, dtype=torch.bool)))


def test_class_of_a_proposal_is_that_of_most_of_its_labelled_pixels():
    label = torch.tensor([[0, 0, 2, 255], [0, 1, 2, 255]])
    masks = torch.zeros(4, 2, 4, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 1:] = True, True
    masks[2, :, 3] = True
    assert maft.class_of(masks, label, 3).tolist() == [0, 2, 3, 3], "unlabelled and empty: none"


def test_soft_iou_is_the_slow_loop():
    """Of soft masks, one of them empty; of binary ones it is the ordinary intersection over union."""
    masks, truth = random(3, 4, 5).sigmoid(), random(2, 4, 5, seed=1) > 0
    masks[2] = 0
    found = maft.soft_iou(masks, truth)
    for k in range(2):
        for n in range(3):
            pairs = [(m, float(t)) for m, t in zip(masks[n].flatten().tolist(), truth[k].flatten())]
            assert found[k, n].item() == pytest.approx(
                sum(m * t for m, t in pairs) / sum(m + t - m * t for m, t in pairs), abs=1e-6)
    binary = masks > 0.5
    assert maft.soft_iou(binary, truth)[0, 0].item() == pytest.approx(
        (binary[0] & truth[0]).sum().item() / (binary[0] | truth[0]).sum().item())
    assert maft.soft_iou(binary[2:], torch.zeros(1, 4, 5)).tolist() == [[0.0]], "nothing over nothing"


def test_min_max_is_of_each_class_for_itself():
    quality = torch.tensor([[0.2, 0.4, 0.3], [0.0, 0.0, 0.9], [0.7, 0.7, 0.7]])
    assert torch.allclose(maft.min_max(quality), torch.tensor([[0, 1, 0.5], [0, 0, 1], [0.7, 0.7, 0.7]]))
    assert maft.min_max(torch.ones(1, 1)).item() == 1, "the only class's own mask is right"


def test_mask_aware_loss_is_the_slow_loop_with_the_iou_alone_normalised():
    scores, quality = random(2, 5).sigmoid().requires_grad_(), random(2, 5, seed=1).sigmoid()
    quality.requires_grad_()
    total = 0.0
    for k in range(2):
        low, high = min(quality[k].tolist()), max(quality[k].tolist())
        for n in range(5):
            away = abs(scores[k, n].item() - (quality[k, n].item() - low) / (high - low))
            total += away ** 2 / 2 if away < 1 else away - 1 / 2
    loss = maft.mask_aware_loss(scores, quality)
    assert loss.item() == pytest.approx(total / 10, rel=1e-5)
    loss.backward()
    assert quality.grad is None and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_class_or_no_proposal_has_no_loss_but_a_gradient(shape):
    scores = torch.zeros(shape, requires_grad=True)
    loss = maft.mask_aware_loss(scores, torch.zeros(shape))
    loss.backward()
    assert loss.item() == 0


def test_distillation_and_total():
    tuned, frozen = random(1, 6).softmax(dim=1).requires_grad_(), random(1, 6, seed=1).softmax(dim=1)
    loss = maft.self_distillation(tuned, frozen.requires_grad_())
    expected = sum((a - b) ** 2 / 2 for a, b in zip(tuned[0].tolist(), frozen[0].tolist())) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert frozen.grad is None
    assert maft.total_loss(torch.tensor(2.0), torch.tensor(3.0), 0.1).item() == pytest.approx(2.3)


def test_semantic_scores_and_the_three_means():
    scores, masks = random(3, 4).softmax(dim=1), some_masks(3)[0]
    found = maft.semantic_scores(scores, masks)
    for c, p, q in ((0, 0, 0), (3, 11, 19), (2, 5, 7)):
        assert found[c, p, q].item() == pytest.approx(
            sum(scores[n, c].item() for n in range(3) if masks[n, p, q]))
    confusion = torch.tensor([[8, 2, 0], [1, 9, 0], [5, 0, 5]])
    means = maft.seen_and_unseen(confusion, 2)
    assert means["seen"] == pytest.approx(50 * (8 / 16 + 9 / 12)) and means["unseen"] == pytest.approx(50)
    assert means["harmonic"] == pytest.approx(2 / (1 / means["seen"] + 1 / 50))


# ---------------------------------------------------------------------------- proposals

def flood(classes):
    """Regions one after the other in the order of their first pixels, by a stack."""
    region, count = -torch.ones_like(classes), 0
    for start in np.ndindex(*classes.shape):
        stack = [start] if region[start] < 0 else []
        while stack:
            y, x = stack.pop()
            if region[y, x] < 0:
                region[y, x] = count
                stack += [(a, b) for a, b in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                          if 0 <= a < len(classes) and 0 <= b < classes.shape[1]
                          and classes[a, b] == classes[y, x]]
        count = int(region.max()) + 1
    return region


@pytest.mark.parametrize("seed", range(4))
def test_connected_regions_are_those_of_a_flood(seed):
    classes = torch.randint(3, (13, 17), generator=torch.Generator().manual_seed(seed))
    assert maft.connected_regions(classes).equal(flood(classes))


def test_connected_region_may_wind():
    snake = torch.zeros(15, 15, dtype=torch.long)
    snake[1::4, :-1] = snake[3::4, 1:] = 1
    assert maft.connected_regions(snake).equal(flood(snake))


def test_superpixels_are_k_means():
    """Two rounds against loops; every pixel is in one piece, and a border of colours is one of pieces."""
    image = random(3, 6, 8)
    image[:, :, 4:] += 20
    found = maft.superpixels(image, 4, rounds=2)
    pixels = {(y, x): [*image[:, y, x].tolist(), 0.5 * 2 * y / 5, 0.5 * 2 * x / 7]
              for y in range(6) for x in range(8)}
    cells = {(y, x): 2 * (y >= 3) + (x >= 4) for y, x in pixels}
    for _ in range(2):
        centres = [np.mean([pixels[at] for at in pixels if cells[at] == one], axis=0) for one in range(4)]
        cells = {at: int(np.argmin([np.linalg.norm(np.array(pixels[at]) - one) for one in centres]))
                 for at in pixels}
    assert {at: int(found[at]) for at in pixels} == cells
    assert not set(found[:, :4].unique().tolist()) & set(found[:, 4:].unique().tolist())
    masks = maft.as_masks(found, least=1)
    assert masks.sum(dim=0).eq(1).all() and len(maft.as_masks(found, least=25)) == 0


def test_masks_of_a_user_come_with_what_they_leave(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name, columns in (("one", slice(0, 4)), ("two", slice(2, 6))):
        picture = np.zeros((4, 8), dtype=np.uint8)
        picture[:, columns] = 255
        Image.fromarray(picture).save(tmp_path / f"a/b/{name}.png")
    found = maft.masks_of_user(tmp_path, "a/b", (2, 4))
    assert found.int().tolist() == [[[1, 1, 0, 0]] * 2, [[0, 1, 1, 0]] * 2, [[0, 0, 0, 1]] * 2]
    with pytest.raises(FileNotFoundError, match="expected maskclip, rectify, or a folder .* found none"):
        maft.masks_of_user(tmp_path, "c", (2, 4))


# ---------------------------------------------------------------------------- what trains, on which labels

def test_attention_and_norms_train_and_nothing_else():
    tower = clip.build_model(openai_state(**TINY)).visual
    found = {id(one) for one in maft.learned(tower)}
    for name, parameter in tower.named_parameters():
        trains = any(part in name for part in (".attn.", ".ln_1.", ".ln_2.", "ln_post."))
        assert (id(parameter) in found) == parameter.requires_grad == trains, name


def test_last_quarter_of_the_classes_is_unseen():
    names = DATASETS["voc"].names
    assert maft.seen_classes(len(names)) == 15
    assert names[15:] == ["potted plant", "sheep", "sofa", "train", "tv monitor"]
    assert world.CLASSES[maft.seen_classes(16):] == ["cloud", "flower", "fish", "balloon"]


def test_labels_of_unseen_classes_do_not_matter():
    """Exchanged among each other or taken away, they leave the same classes and masks."""
    label = torch.randint(8, (12, 16), generator=torch.Generator().manual_seed(0))
    classes, masks = maft.true_masks(label, 6, (6, 8))
    assert classes.tolist() == [0, 1, 2, 3, 4, 5] and masks.shape == (6, 6, 8)
    for other in (255, 6, 7):
        again = maft.true_masks(torch.where(label >= 6, other, label), 6, (6, 8))
        assert again[0].equal(classes) and again[1].equal(masks)
    assert maft.true_masks(torch.full((4, 4), 7), 6, (2, 2))[1].shape == (0, 2, 2)


# ---------------------------------------------------------------------------- it stands apart

TABULATES = {"paper/reproduce.py"}                  # may know it: runs its command, fills its table


def test_nothing_but_what_tabulates_imports_it():
    """So no training without labels reaches it, in one import or over several."""
    arrows = all_arrows(ROOT)
    assert {arrow.source for arrow in arrows if arrow.target == "paper/maft.py"} == TABULATES
    assert not {arrow.source for arrow in arrows if arrow.target in TABULATES}
    unsupervised = [*TRAINING, "evaluate.py", "segment.py", "paper/systems.py", "paper/run.py"]
    assert "paper/maft.py" not in reached(arrows, *unsupervised)
    assert "datasets/labels.py" in reached(arrows, "paper/maft.py")
    assert "trains on labels" in maft.__doc__.split("\n\n")[2]


@pytest.mark.parametrize("file", ["rectify.py", "paper/systems.py", "harness/runs.py"])
def test_a_way_to_it_would_be_found(house, file):                                           # noqa: F811
    path = house / file
    path.write_text(path.read_text() + "\n\ndef late():\n    from paper import maft\n")
    arrows = all_arrows(house)
    assert {arrow.source for arrow in arrows if arrow.target == "paper/maft.py"} == TABULATES | {file}
    assert "paper/maft.py" in reached(arrows, file)


# ---------------------------------------------------------------------------- the command

@pytest.fixture
def voc(place, tiny_clip, monkeypatch):
    write_voc_tree(place / "data")
    small = replace(maft.Recipe(), first_block=1, short_side=32, superpixels=(4,), batch_size=2, epochs=2,
                    learning_rate=1e-3)
    monkeypatch.setitem(maft.RECIPES, "voc", small)
    return ["--data", "voc", "--clip", tiny_clip]


def weights(out: str = "runs") -> dict[str, torch.Tensor]:
    return torch.load(Path(out, "voc/maft/checkpoint.pt"))["weights"]


@pytest.mark.parametrize("train_on", ["truth", "proposals"])
def test_command_trains_measures_and_says_it(voc, capsys, train_on):
    metrics = run(maft, *voc, "--train-on", train_on)
    assert json.loads(Path("runs/voc/maft/metrics.json").read_text()) == metrics
    assert {"seen", "unseen", "harmonic", "spread"} <= metrics["frozen"].keys() == metrics["tuned"].keys()
    said = capsys.readouterr().out
    assert "15 seen and 5 unseen classes" in said and "frozen CLIP" in said and "tuned CLIP" in said
    before = clip.load(voc[-1], "cpu")[0].visual.state_dict()
    changed = {name for name, tensor in weights().items() if not tensor.equal(before[name])}
    assert changed and all(any(part in name for part in (".attn.", ".ln_1.", ".ln_2.", "ln_post."))
                           for name in changed)


def test_proposals_of_a_rectification_and_of_a_user(voc, capsys):
    """Without a checkpoint its command is named; masks of a user are read for images that are measured."""
    assert "python rectify.py" in refusal(capsys, maft, *voc, "--proposals", "rectify")
    run(rectify, *voc)
    assert run(maft, *voc, "--proposals", "rectify")["tuned"]["fingerprint"]["proposals"] == "rectify"
    for name in ("2007_000033", "2007_000042"):
        Path("masks", name).mkdir(parents=True)
        Image.new("L", (56, 20), 255).save(Path("masks", name, "0.png"))
    assert run(maft, *voc, "--proposals", "masks")["tuned"]["proposals"] == 2
    assert "2007_0000" in refusal(capsys, maft, *voc, "--proposals", "masks", "--train-on", "proposals")


def test_same_seed_gives_the_same_bits_and_labels_of_unseen_classes_give_none(voc):
    run(maft, *voc)
    first = weights()
    for path in Path("data/VOCdevkit/VOC2012/SegmentationClass").glob("2007_0000[36]*.png"):
        picture = Image.open(path)
        values = np.array(picture)
        picture.putdata(np.where((values > 15) & (values < 255), 16, values).flatten().tolist())
        picture.save(path)
    run(maft, *voc, "--out", "again")
    assert all(tensor.equal(first[name]) for name, tensor in weights("again").items())
    run(maft, *voc, "--out", "other", "--seed", "1")
    assert not all(tensor.equal(first[name]) for name, tensor in weights("other").items())


def test_resumed_run_has_the_bits_of_an_uninterrupted_one(voc, monkeypatch):
    run(maft, *voc)
    descend = maft.runs.Training.descend

    def stopped(training, *args):
        descend(training, *args)
        training.stop_asked = training.step == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="Saved after step 3 of 4"):
        patch.setattr(maft.runs.Training, "descend", stopped)
        run(maft, *voc, "--out", "again")
    run(maft, *voc, "--out", "again", "--resume")
    assert all(tensor.equal(weights()[name]) for name, tensor in weights("again").items())


def test_what_cannot_be_run_is_refused(voc, capsys):
    assert "found a folder" in refusal(capsys, maft, "--data", "photos")
    for path in Path("data/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"):
        path.unlink()
    assert "expected labels of its train images" in refusal(capsys, maft, *voc)


def test_toylands_training_labels_are_drawn_and_not_read(tmp_path):
    """The truth of a training scene, whatever lies on the disk."""
    class Setup:
        data, root, training_images = "toyland", str(tmp_path), {"0007": tmp_path / "0007.png"}
        clip_model, vocabulary = clip.build_model(openai_state(**TINY)), words.vocabulary("toyland")

    image, truth = world.scene("train", 7)
    Image.fromarray(image).save(tmp_path / "0007.png")
    [(name, found, label)] = [maft.labelled(Setup(), "train", 96)[0]]
    assert name == "0007" and label.equal(torch.from_numpy(truth.astype(np.int64)))
    assert found.shape == (3, 96, 128)
    assert evaluate.confusion_matrix(label, label, 16).sum() == truth.size
    Setup.data, Setup.vocabulary = "toyland-things", words.vocabulary("toyland-things")
    [(_, _, label)] = [maft.labelled(Setup(), "train", 96)[0]]
    assert np.array_equal(label.numpy(), np.where(truth < 6, IGNORE, truth.astype(int) - 6))
