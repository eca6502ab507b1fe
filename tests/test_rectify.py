"""Every equation of stage 1 (rectify.py) against a slow computation that one can check by eye.

    python -m pytest tests/test_rectify.py

The slow computations are loops over images b, classes k and places i, j, written from the paper's formulas.
CLIP is tiny and random here: an equation holds for any weights. "Equal" means a relative error of at most
1e-5.

    B images · C classes · D joint dimension · E ViT width · Et text width · h,w patches · n = h·w · L prompt
    vectors
"""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import distill
import rectify
from datasets import DATASETS, images, words
from helpers import TINY, openai_state, random, relative, unit

START, END = 49406, 49407
NAMES = ["cat", "potted plant", "airplane"]                    # one or two tokens: the paper's 73 vectors fit
LONGER = ["cat", "potted plant", "chest of drawers"]                # three tokens: only 72 do
D, E, Et = TINY["embed_dim"], TINY["width"], TINY["text_width"]


@pytest.fixture(scope="module")
def model() -> clip.CLIP:
    """A tiny random CLIP, frozen as `open_setup` freezes it."""
    return clip.build_model(openai_state(**TINY)).eval().requires_grad_(False)


def some_rectifier(model: clip.CLIP, classes: int, prompt_length: int = 73) -> rectify.Rectifier:
    """A rectifier in the middle of its training: no bias is 0, no scale 1, no two prompt vectors are
    alike."""
    torch.manual_seed(0)
    rectifier = rectify.Rectifier(model, classes, prompt_length)
    with torch.no_grad():
        for parameter in rectifier.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        # so that the bias weighs in what follows: no error in it is drowned
        rectifier.projection.weight *= 30
        rectifier.decoder.norm.running_mean += torch.randn(classes)
        rectifier.decoder.norm.running_var *= 0.5 + torch.rand(classes)
    return rectifier


# ------------------------------------------------------------------------------------------ what CLIP says

def test_query_features_average_every_name_in_every_template(model):
    """W_q: each sentence encoded alone and normalised; the mean over templates and synonyms, normalised
    again."""
    vocabulary = words.Vocabulary((("cat", "kitten", "cat's tail"), ("chest of drawers",)), palette=(),
                                 templates=("a photo of a {}.", "the {} in a video game."))
    expected = []
    for names in vocabulary.synonyms:
        total, count = torch.zeros(D), 0
        for name in names:
            for template in vocabulary.templates:
                feature = model.encode_text(clip.tokenize(template.format(name)))[0]
                total, count = total + feature / feature.norm(), count + 1
        expected.append(total / count / (total / count).norm())
    found = rectify.query_features(model, vocabulary)
    assert relative(found, torch.stack(expected)) <= 1e-5


def test_query_logits_are_cosines_of_patch_and_class():
    """M_q: the dot product of every patch with every class, in [−1, 1] because both have length one."""
    B, C, h, w = 2, 3, 4, 5
    features, query = unit(B, D, h, w, dim=1), unit(C, D, seed=1)
    found, expected = rectify.query_logits(features, query), torch.empty(B, C, h, w)
    for b in range(B):
        for k in range(C):
            for i in range(h):
                for j in range(w):
                    expected[b, k, i, j] = sum(features[b, :, i, j] * query[k])
    assert relative(found, expected) <= 1e-5
    assert found.abs().max() <= 1


# ------------------------------------------------------------------------------------------ Eq. 1

def slow_reference(model: clip.CLIP, prompt: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Eq. 1: every class alone, all 77 positions, through the causal text tower; then over the norm of the
    matrix."""
    rows = []
    for name in names:
        tokens = clip.encode(name) + [END]
        end = len(prompt) + len(tokens)                    # the end token's place: start, L vectors, the name
        padding = [0] * (77 - end - 1)
        x = torch.cat([model.token_embedding(torch.tensor([START])), prompt,
                       model.token_embedding(torch.tensor(tokens + padding))])
        x = model.transformer((x + model.positional_embedding)[None])[0]                 # (77, Et)
        rows.append(model.ln_final(x[end]) @ model.text_projection)
    rows = torch.stack(rows)
    return rows / sum(value ** 2 for value in rows.flatten()).sqrt()


@pytest.mark.parametrize("names, length", [(NAMES, 73), (LONGER, 72), (LONGER, 5)])
def test_eq1_reference_features_equal_each_class_alone(model, names, length):
    """W_r: the pass that shares its prefix among the classes gives what 77 tokens class by class give."""
    prompt = 0.1 * random(length, Et)
    assert relative(rectify.reference_features(model, prompt, names),
                    slow_reference(model, prompt, names)) <= 1e-5


def test_eq1_the_whole_matrix_has_length_one_and_rows_keep_their_ratio(model):
    """W_r is divided by one number, not row by row: rows differ in length as CLIP's text features do."""
    prompt = 0.1 * random(73, Et)
    found, raw = rectify.reference_features(model, prompt, NAMES), model.encode_prompt(prompt, NAMES)
    assert found.square().sum().item() == pytest.approx(1, abs=1e-5)
    lengths, expected = found.norm(dim=1), raw.norm(dim=1)
    assert torch.allclose(lengths / lengths[0], expected / expected[0], rtol=1e-4)
    assert lengths.max() / lengths.min() > 1.001             # per-row normalisation would make them all alike


def test_eq1_a_three_token_name_is_read_at_its_end_token(model):
    """With 72 real words for a prompt, "chest of drawers" ends at the last of 77 places and reads as CLIP
    reads it."""
    words = ["word"] * 72
    tokens = clip.tokenize(" ".join([*words, "chest of drawers"]))
    assert tokens[0, 76] == END
    prompt = model.token_embedding(torch.tensor(clip.encode(" ".join(words))))
    expected = model.encode_text(tokens)
    assert relative(rectify.reference_features(model, prompt, ["chest of drawers"]),
                    expected / expected.norm()) <= 1e-5


def test_eq1_a_name_that_does_not_fit_is_refused(model):
    """73 vectors and three tokens need 78 places: the error names the class and the number of vectors that
    fit."""
    with pytest.raises(ValueError, match="chest of drawers.*at most 72 vectors"):
        rectify.reference_features(model, random(73, Et), LONGER)
    assert model.prompt_room(LONGER) == 72                          # what rectify.main shortens the prompt to


# ------------------------------------------------------------------------------------------ Eq. 2 and 3

def slow_bias(positions: torch.Tensor, projection: torch.nn.Conv2d, reference: torch.Tensor) -> torch.Tensor:
    """Eq. 2: at every place the positional embedding, projected, times every class's reference."""
    (_, h, w), C = positions.shape, len(reference)
    bias = torch.empty(C, h, w)
    for i in range(h):
        for j in range(w):
            # W_p at (i, j): (D,)
            projected = projection.weight[:, :, 0, 0] @ positions[:, i, j] + projection.bias
            for k in range(C):
                bias[k, i, j] = projected @ reference[k]
    return bias


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_eq2_bias_logits_equal_the_loop(model, grid):
    """M_b: projected position times reference, place by place and class by class, on CLIP's own grid and on
    others."""
    positions, reference = model.visual.patch_positions(*grid), unit(6, D)
    projection = torch.nn.Conv2d(E, D, kernel_size=1)
    found = rectify.bias_logits(positions, projection, reference)
    assert relative(found, slow_bias(positions, projection, reference)) <= 1e-5
    rectifier = some_rectifier(model, classes=6)
    assert torch.equal(rectifier.bias(positions, reference),
                       rectify.bias_logits(positions, rectifier.projection, reference))


def test_eq2_both_factors_of_the_bias_learn(model):
    """A gradient comes through M_b to each of the 73 vectors and to weight and bias of the projection."""
    rectifier = some_rectifier(model, classes=3)
    reference = rectify.reference_features(model, rectifier.prompt, NAMES)
    bias = rectify.bias_logits(model.visual.patch_positions(3, 5), rectifier.projection, reference)
    (bias * random(3, 3, 5)).sum().backward()
    assert (rectifier.prompt.grad.abs().sum(dim=1) > 0).all()
    assert (rectifier.projection.weight.grad != 0).all() and (rectifier.projection.bias.grad != 0).all()


def test_eq3_the_same_bias_is_taken_from_every_image():
    """M = M_q − M_b, entry by entry: a bias, unlike a query, is no matter of the image."""
    query, bias = random(2, 3, 4, 5), random(3, 4, 5, seed=1)
    found = rectify.subtract_bias(query, bias)
    assert found.shape == query.shape
    for b in range(2):
        for k in range(3):
            for i in range(4):
                for j in range(5):
                    assert found[b, k, i, j] == query[b, k, i, j] - bias[k, i, j]


# ------------------------------------------------------------------------------------------ Eq. 4

def slow_convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every output is a sum over all channels of a 5×5 neighbourhood; outside the image there is zero."""
    (B, _, h, w), C = x.shape, len(weight)
    out = torch.zeros(B, C, h, w)
    for b in range(B):
        for k in range(C):
            for i in range(h):
                for j in range(w):
                    for di in range(-2, 3):
                        for dj in range(-2, 3):
                            if 0 <= i + di < h and 0 <= j + dj < w:
                                out[b, k, i, j] += x[b, :, i + di, j + dj] @ weight[k, :, 2 + di, 2 + dj]
    return out


def test_eq4_decoder_equals_convolution_and_batch_norm_by_hand():
    """M_o: features first, logits behind; batch statistics while training (and kept), the kept ones
    afterwards."""
    B, C, dim, h, w = 2, 3, 4, 4, 5
    torch.manual_seed(0)
    decoder = rectify.Decoder(dim, C)
    norm = decoder.norm
    with torch.no_grad():                                    # a fresh norm has weight 1, bias 0: hides errors
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor += torch.rand(C)
    features, logits = random(B, dim, h, w), random(B, C, h, w, seed=1)
    x = slow_convolution(torch.cat([features, logits], dim=1), decoder.conv.weight.detach())
    old_mean, old_variance = norm.running_mean.clone(), norm.running_var.clone()
    expected, count = torch.empty_like(x), B * h * w

    for k in range(C):
        mean = x[:, k].sum() / count
        variance = (x[:, k] - mean).square().sum() / count
        expected[:, k] = (x[:, k] - mean) / (variance + 1e-5).sqrt() * norm.weight[k] + norm.bias[k]
    assert relative(decoder.train()(features, logits), expected.detach()) <= 1e-5
    for k in range(C):
        mean, variance = x[:, k].mean(), x[:, k].var(unbiased=True)
        assert norm.running_mean[k].item() == pytest.approx((0.9 * old_mean[k] + 0.1 * mean).item(), abs=1e-5)
        assert norm.running_var[k].item() == pytest.approx((0.9 * old_variance[k] + 0.1 * variance).item(),
                                                           rel=1e-5)

    for k in range(C):
        expected[:,
                 k] = ((x[:, k] - norm.running_mean[k]) / (norm.running_var[k] + 1e-5).sqrt() * norm.weight[k]
                          + norm.bias[k])
    assert relative(decoder.eval()(features, logits), expected.detach()) <= 1e-5


def test_eq4_decoder_starts_as_the_released_code_starts_it():
    """Kaiming with fan-out, no convolution bias: the weights' standard deviation is √(2 / (25·C))."""
    torch.manual_seed(0)
    decoder = rectify.Decoder(dim=60, classes=20)
    assert decoder.conv.bias is None
    assert decoder.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (25 * 20)), rel=0.03)


def test_the_rectifier_is_eq3_and_eq4(model):
    """Query minus bias through the decoder; at test time an image gets the same logits whatever it is batched
    with."""
    rectifier = some_rectifier(model, classes=3).eval()
    features, query, bias = unit(2, D, 4, 5, dim=1), unit(3, D, seed=1), random(3, 4, 5)
    found = rectifier(features, query, bias)
    rectified = rectify.query_logits(features, query) - bias
    assert torch.equal(found, rectifier.decoder(features, rectified))
    for b in range(2):
        assert relative(rectifier(features[b:b + 1], query, bias)[0], found[b]) <= 1e-5


def test_bias_that_is_the_same_everywhere_is_lost_in_the_decoder():
    """Why M_b gives so little beside a decoder: Eq. 4 is linear up to its BatchNorm, which takes a constant
    away.

    Exactly so with a border that repeats itself; with Eq. 4's zeros around the image a constant is still seen
    two patches deep.
    """
    features, logits, bias = unit(2, D, 9, 11, dim=1), random(2, 3, 9, 11, seed=1), random(3, 1, 1, seed=2)
    decoder = rectify.Decoder(D, 3).train()
    change = decoder.conv(torch.cat([features, logits - bias],
                                    dim=1)) - decoder.conv(torch.cat([features, logits], dim=1))
    inside = change[:, :, 2:-2, 2:-2]
    assert inside.abs().amax() > 0.01 and relative(inside, inside[:, :, :1, :1].expand_as(inside)) <= 1e-5
    assert relative(decoder(features, logits - bias), decoder(features, logits)) > 0.01
    decoder.conv.padding_mode = "replicate"
    assert relative(decoder(features, logits - bias), decoder(features, logits)) <= 1e-4
    assert relative(decoder(features, logits - bias * random(1, 9, 11, seed=3)),
                    decoder(features, logits)) > 0.01


# ------------------------------------------------------------------------------------------ Eq. 5

def uniform_like(decoded: torch.Tensor, seed: int = 9) -> torch.Tensor:
    return torch.rand(decoded.shape, generator=torch.Generator().manual_seed(seed))


def test_eq5_every_patch_goes_to_exactly_one_class():
    """M̂ is one-hot, bit for bit, and the 1 stands where logit plus Gumbel noise is largest."""
    decoded, scale = random(2, 4, 5, 6), 3.0
    uniform = uniform_like(decoded)
    masks = rectify.rectified_masks(decoded, scale, uniform)
    for b in range(2):
        for i in range(5):
            for j in range(6):
                noisy = [scale * decoded[b, k, i, j].item() - math.log(-math.log(uniform[b, k, i, j].item()))
                         for k in range(4)]
                expected = [1.0 if k == noisy.index(max(noisy)) else 0.0 for k in range(4)]
                assert masks[b, :, i, j].tolist() == expected


def test_eq5_the_gradient_is_that_of_the_softmax():
    """Straight-through: forward the hard mask, backward scale · s_k (g_k − Σ s g), s the noisy soft
    distribution."""
    scale = 3.0
    decoded = random(2, 4, 3, 3).requires_grad_()
    uniform, upstream = uniform_like(decoded), random(2, 4, 3, 3, seed=5)
    (rectify.rectified_masks(decoded, scale, uniform) * upstream).sum().backward()
    expected = torch.empty(2, 4, 3, 3)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                exponent = (scale * decoded[b, :, i, j].detach() - (-uniform[b, :, i, j].log()).log())
                s, g = exponent.exp() / exponent.exp().sum(), upstream[b, :, i, j]
                expected[b, :, i, j] = scale * s * (g - (s * g).sum())
    assert relative(decoded.grad, expected) <= 1e-5


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_eq5_equals_torch_with_the_same_noise(scale):
    """Value and gradient are those of torch.nn.functional.gumbel_softmax(hard=True)."""
    ours, theirs = (random(2, 4, 5, 6).double().requires_grad_() for _ in range(2))
    torch.manual_seed(3)
    # torch's noise is −log uniform
    uniform = torch.empty(ours.shape, dtype=torch.float64).exponential_().neg().exp()
    found = rectify.rectified_masks(ours, scale, uniform)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(scale * theirs, tau=1.0, hard=True, dim=1)
    assert torch.equal(found.round(), expected.round())
    upstream = random(2, 4, 5, 6, seed=5)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert relative(ours.grad, theirs.grad) <= 1e-5


def test_eq5_the_rarest_random_numbers_stay_finite():
    """A uniform number of exactly 0, just under 1, or 1 gives a one-hot mask and a finite gradient, no
    NaN."""
    decoded = torch.zeros(1, 2, 1, 4, requires_grad=True)
    near_one = 1 - 2 ** -24
    uniform = torch.tensor([[0.0, 0.0, near_one, 1.0], [0.0, 0.5, near_one, 1.0]]).view(1, 2, 1, 4)
    masks = rectify.rectified_masks(decoded, scale=100.0, uniform=uniform)
    assert torch.equal(masks.sum(dim=1), torch.ones(1, 1, 4))
    (masks * random(1, 2, 1, 4)).sum().backward()
    assert decoded.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_eq5_classes_are_drawn_as_often_as_softmax_says(scale):
    """Over many patches the share of class k is softmax(scale · M_o)_k."""
    logits, patches = torch.tensor([0.0, 0.5, -0.3, 0.9]), 40_000
    decoded = logits.view(1, 4, 1, 1).expand(1, 4, 200, patches // 200)
    share = rectify.rectified_masks(decoded, scale, uniform_like(decoded)).mean(dim=(0, 2, 3))
    assert torch.allclose(share, (scale * logits).softmax(dim=0), atol=0.01)        # four standard deviations


def test_eq5_a_huge_scale_leaves_nothing_to_chance():
    """With scale → ∞ the masks are the argmax of M_o."""
    decoded = random(2, 4, 5, 6)
    masks = rectify.rectified_masks(decoded, scale=1e6, uniform=uniform_like(decoded))
    assert torch.equal(masks.argmax(dim=1), decoded.argmax(dim=1))


# ------------------------------------------------------------------------------------------ Eq. 6

def coordinates(H: int, W: int) -> torch.Tensor:
    """An image (3, H, W) that says of every pixel where it was: channel 0 its row, channel 1 its column."""
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack([row, column, torch.zeros(H, W, dtype=torch.long)]).float()


@pytest.mark.parametrize("size", [(336, 336), (336, 504), (144, 192), (97, 131), (131, 97), (37, 500)])
@pytest.mark.parametrize("ratio, places", [(1 / 6, 11), (1 / 3, 5), (1 / 2, 3)])
def test_eq6_windows_tile_the_image_half_a_window_apart(size, ratio, places):
    """r = 1/6 gives 11 × 11 = 121 windows at any size: from corner to corner, inside the image, half
    overlapping."""
    H, W = size
    found = rectify.windows(coordinates(H, W), ratio)
    height, width = round(H * ratio), round(W * ratio)
    assert found.shape == (places ** 2, 3, height, width)
    corners = [(int(window[0, 0, 0]), int(window[1, 0, 0])) for window in found]
    for window, (top, left) in zip(found, corners):                 # each is one whole piece of the image
        assert torch.equal(window[0, :, 0], torch.arange(top, top + height).float())
        assert torch.equal(window[1, 0, :], torch.arange(left, left + width).float())
    assert corners[0] == (0, 0) and corners[-1] == (H - height, W - width)
    for k, (top, left) in enumerate(corners):                 # row by row; up to the rounding to whole pixels
        assert abs(top - (k // places) * H * ratio / 2) <= 1.01
        assert abs(left - (k % places) * W * ratio / 2) <= 1.01


def test_eq6_windows_of_a_divisible_size_are_exactly_half_a_window_apart():
    """336 pixels, r = 1/6: windows of 56 pixels at 0, 28, 56, …, 280."""
    found = rectify.windows(coordinates(336, 336), 1 / 6)
    assert found[:11, 1, 0, 0].tolist() == list(range(0, 281, 28))
    assert found[::11, 0, 0, 0].tolist() == list(range(0, 281, 28))


def test_eq6_one_window_of_ratio_one_is_the_image():
    """r = 1 is ReCLIP's older rule: the whole image is the only window."""
    image = random(3, 20, 31)
    assert torch.equal(rectify.windows(image, 1), image[None])


def test_eq6_votes_are_shares_of_windows_won():
    """f(k): every window votes for its most similar class; how long its feature is makes no difference."""
    features, query = random(3, 7, D), unit(4, D, seed=1)
    expected = torch.zeros(3, 4)
    for b in range(3):
        for window in features[b]:
            similarities = [(window @ row / window.norm()).item() for row in query]
            expected[b, similarities.index(max(similarities))] += 1 / 7
    assert (expected > 0).sum() > 6                                 # the example is not a trivial one
    assert relative(rectify.window_votes(features, query), expected) <= 1e-5
    assert relative(rectify.window_votes(features[1] * torch.arange(1, 8)[:, None], query),
                    expected[1]) <= 1e-5


@pytest.mark.parametrize("votes, threshold, expected", [
    ([0.5, 0.25, 0.25, 0.0], 0.25, [1, 0, 0, 0]),                  # more than t, not t itself
    ([0.5, 0.25, 0.25, 0.0], 0.24, [1, 1, 1, 0]),
    ([0.5, 0.25, 0.25, 0.0], 0.0, [1, 1, 1, 0]),                   # t = 0: one window suffices, none does not
    ([0.3, 0.4, 0.2, 0.1], 0.5, [0, 1, 0, 0]),                     # nobody passes: the best stands alone
])
def test_eq6_hypothesis_is_what_wins_more_than_the_threshold(votes, threshold, expected):
    """H = {k : f(k) > t}, never empty; the other images of the batch change nothing."""
    others = [[0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]]
    found = rectify.multi_label_hypothesis(torch.tensor([others[0], votes, others[1]]), threshold)
    assert found.dtype == torch.bool and found.any(dim=1).all()
    assert found[1].int().tolist() == expected


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict:
    """Four small image files, no two of one size, of coloured noise in blocks: id → path."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for number, (W, H) in enumerate([(40, 40), (61, 44), (40, 77), (90, 42)]):
        blocks = (torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(number)) * 255).byte().numpy()
        path = folder / f"{number}.png"
        Image.fromarray(blocks).resize((W, H), Image.NEAREST).save(path)
        found[f"picture/{number}"] = path
    return found


@torch.no_grad()
def window_features(model: clip.CLIP, path, short_side: int, ratio: float) -> torch.Tensor:
    """CLIP's vector of every window of one picture, window by window: (k², D)."""
    image = data.to_tensor(data.short_side_to(images.read_image(path), short_side))
    return torch.cat([model.encode_image(F.interpolate(window[None], size=(32, 32), mode="bicubic",
                                                       antialias=True))
                      for window in rectify.windows(image, ratio)])


@pytest.mark.parametrize("per_batch, batches", [(1, 100 * [1]), (10, 4 * [9, 9, 7]), (60, [38, 37, 25]),
                                                (1024, [100])])
def test_eq6_votes_of_a_folder_equal_window_by_window(model, pictures, monkeypatch, per_batch, batches):
    """count_votes runs windows of several images at once, in batches of any size, and counts as one by one
    would."""
    short_side, ratio = 120, 1 / 3
    features = {name: window_features(model, path, short_side, ratio) for name, path in pictures.items()}
    # Random vectors are all alike to a random CLIP. Windows themselves, less what all have in common, tell
    # them apart.
    everything = torch.cat(list(features.values()))
    query = F.normalize(everything[::5] - everything.mean(dim=0), dim=-1)
    expected = {}
    for name, of_image in features.items():
        winners = [int((query @ feature).argmax()) for feature in of_image]
        expected[name] = torch.tensor([winners.count(k) / len(winners) for k in range(len(query))])
    assert all((votes > 0).sum() >= 2 for votes in expected.values())

    seen, encode_image = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: seen.append(len(images))
                        or encode_image(images))
    setup = SimpleNamespace(clip_model=model, device=model.device, training_images=pictures, workers=0,
                            precision="fp32")
    found = rectify.count_votes(setup, query, rectify.Recipe(short_side=short_side, window_ratio=ratio),
                                per_batch)
    assert len(found) == len(pictures)
    for of_image, name in zip(found, pictures):
        assert relative(of_image, expected[name]) <= 1e-5
    assert seen == batches                                     # each window once; never more than was allowed


# ------------------------------------------------------------------------------------------ Eq. 7

def slow_contrastive_loss(features, masks, query, hypothesis, scale: float) -> float:
    """Eq. 7, image by image and class by class, with softmax and logarithm in plain numbers."""
    (B, _, h, w), C = features.shape, len(query)
    of_images = []
    for b in range(B):
        of_classes = []
        for k in range(C):
            if hypothesis[b, k]:
                pooled = sum(masks[b, k, i, j] * features[b, :, i, j] for i in range(h)
                             for j in range(w)) / (h * w)
                similarities = [scale * (pooled @ query[other]).item() for other in range(C)]
                total = sum(math.exp(similarity) for similarity in similarities)
                of_classes.append(-math.log(math.exp(similarities[k]) / total))
        of_images.append(sum(of_classes) / len(of_classes))
    return sum(of_images) / len(of_images)


# three classes in one image, one in the other
HYPOTHESIS = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()


def test_eq7_contrastive_loss_equals_the_loop():
    """Pool by mask, divide by n, cross-entropy of row k against k; mean over H, then over images."""
    features, query = unit(2, D, 3, 4, dim=1), unit(5, D, seed=1)
    masks = random(2, 5, 3, 4).softmax(dim=1)
    found = rectify.contrastive_loss(features, masks, query, HYPOTHESIS, scale=20.0)
    assert found.item() == pytest.approx(slow_contrastive_loss(features, masks, query, HYPOTHESIS, 20.0),
                                         rel=1e-5)


def test_eq7_an_empty_mask_still_learns():
    """Nothing covered: the loss is ln C, and its gradient calls first for the patch that most stands out as
    class k."""
    features, query = unit(2, D, 3, 4, dim=1), unit(5, D, seed=1)
    masks = torch.zeros(2, 5, 3, 4, requires_grad=True)
    loss = rectify.contrastive_loss(features, masks, query, HYPOTHESIS, scale=100.0)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    loss.backward()
    assert masks.grad.isfinite().all()
    similarity = rectify.query_logits(features, query)
    outstanding = similarity - similarity.mean(dim=1, keepdim=True)
    for b, k in HYPOTHESIS.nonzero().tolist():
        assert (masks.grad[b, k] != 0).all()
        assert masks.grad[b, k].argmin() == outstanding[b, k].argmax()


def test_eq7_right_masks_cost_less_than_wrong_ones():
    """Patches that look like their class, each under its own mask: cheaper than the same masks with classes
    swapped."""
    query = unit(3, D)
    truth = torch.tensor([[0, 0, 0, 1], [2, 2, 1, 1]])                                   # (h, w)
    features = F.normalize(query[truth].permute(2, 0, 1) + 0.05 * random(D, 2, 4, seed=1), dim=0)[None]
    masks = F.one_hot(truth).permute(2, 0, 1)[None].float()
    hypothesis = torch.ones(1, 3, dtype=torch.bool)

    def loss(masks):
        return rectify.contrastive_loss(features, masks, query, hypothesis, scale=10.0).item()
    assert loss(masks) < loss(torch.full_like(masks, 1 / 3)) < loss(masks[:, [1, 2, 0]])


def test_eq7_only_classes_of_the_hypothesis_count():
    """What the mask of another class covers changes nothing and gets no gradient."""
    features, query = unit(2, D, 3, 4, dim=1), unit(5, D, seed=1)
    masks = torch.rand(2, 5, 3, 4).requires_grad_()
    loss = rectify.contrastive_loss(features, masks, query, HYPOTHESIS, scale=20.0)
    loss.backward()
    assert torch.equal((masks.grad != 0).any(dim=(2, 3)), HYPOTHESIS)
    other = torch.where(HYPOTHESIS[:, :, None, None], masks.detach(), torch.rand(2, 5, 3, 4))
    assert rectify.contrastive_loss(features, other, query, HYPOTHESIS, scale=20.0).item() == loss.item()


def test_autocast_leaves_cosines_bias_and_loss_in_float32():
    """Under --precision bf16 the three that are multiplied by 1/τ are the very bits of float32."""
    features, query, masks = unit(2, D, 3, 4, dim=1), unit(5, D), random(2, 5, 3, 4).softmax(dim=1)
    projection, positions = torch.nn.Conv2d(E, D, kernel_size=1), random(E, 3, 4)

    def results():
        return (rectify.query_logits(features, query), rectify.bias_logits(positions, projection, query),
                rectify.contrastive_loss(features, masks, query, torch.ones(2, 5, dtype=torch.bool), 100.0))

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert (features[0, :, 0] @ features[0, :, 0].T).dtype == torch.bfloat16            # it is on
        assert all(found.dtype == torch.float32 and torch.equal(found, wanted) for found,
                   wanted in zip(results(), expected))


# ------------------------------------------------------------------------------------------ training

def test_rectifier_holds_what_stage_1_trains_and_nothing_else(model):
    """73 vectors (at first all the embedding of token 0), the projection, the decoder: no tensor of CLIP."""
    rectifier = rectify.Rectifier(model, classes=3, prompt_length=73)
    shapes = {name: tuple(parameter.shape) for name, parameter in rectifier.named_parameters()}
    assert shapes == {"prompt": (73, Et), "projection.weight": (D, E, 1, 1), "projection.bias": (D,),
                      "decoder.conv.weight": (3, D + 3, 5, 5), "decoder.norm.weight": (3,),
                      "decoder.norm.bias": (3,)}
    assert torch.equal(rectifier.prompt, model.token_embedding.weight[:1].expand(73, Et))


RECIPE = rectify.Recipe(mask_scale=2.0, loss_scale=20.0, vote_threshold=0.1)
IMAGES = random(2, 3, 24, 37)                                # 3 × 5 patches of 8 pixels, the last ones padded
VOTES = torch.tensor([[0.6, 0.05, 0.35], [0.02, 0.9, 0.08]])        # of which HYPOTHESIS[:, :3] is above 0.1


def step(model: clip.CLIP, rectifier: rectify.Rectifier, seed: int = 0) -> torch.Tensor:
    features = model.encode_dense(IMAGES, path="residual")
    return rectify.train_step(rectifier, model, features, VOTES, unit(3, D, seed=1), NAMES, RECIPE,
                              torch.Generator().manual_seed(seed))


def test_train_step_is_equations_1_to_7_in_order(model):
    """The loss of a batch equals the chain of this file's slow computations with the same noise."""
    rectifier, query, scale = some_rectifier(model, classes=3), unit(3, D, seed=1), RECIPE.loss_scale
    with torch.no_grad():
        features = model.encode_dense(IMAGES, path="residual")
        reference = slow_reference(model, rectifier.prompt, NAMES)
        bias = slow_bias(model.visual.patch_positions(3, 5), rectifier.projection, reference)
        rectified = torch.stack([rectify.query_logits(image[None], query)[0] - bias for image in features])
        decoded = rectifier.decoder(features, rectified)
        uniform = torch.rand(decoded.shape, generator=torch.Generator().manual_seed(7))
        noisy = RECIPE.mask_scale * decoded - (-uniform.log()).log()
        masks = F.one_hot(noisy.argmax(dim=1), 3).permute(0, 3, 1, 2).float()
        expected = slow_contrastive_loss(features, masks, query, HYPOTHESIS[:, :3], scale)
    assert step(model, rectifier, seed=7).item() == pytest.approx(expected, rel=1e-4)


def test_train_step_repeats_itself_and_follows_its_noise(model):
    """The same generator state gives the same loss bit for bit; another draws other masks."""
    rectifier = some_rectifier(model, classes=3)
    losses = [step(model, rectifier, seed=seed).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_train_step_reaches_the_rectifier_and_leaves_clip_alone(model):
    """Every parameter of the rectifier gets a gradient and moves; CLIP gets none and keeps its very bits."""
    before = clip.fingerprint(model)
    rectifier = some_rectifier(model, classes=3)
    old = {name: parameter.detach().clone() for name, parameter in rectifier.named_parameters()}
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step(model, rectifier).backward()
    for name, parameter in rectifier.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), f"no gradient reaches {name}"
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    for name, parameter in rectifier.named_parameters():
        assert not torch.equal(parameter, old[name]), f"{name} did not move"
    assert clip.fingerprint(model) == before


def test_training_lowers_the_loss(model):
    """Forty steps on one batch: the decoder learns to cover what fits, whatever noise each step draws."""
    rectifier = rectify.Rectifier(model, 3, prompt_length=73)
    optimizer = torch.optim.SGD(rectifier.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number in range(40):
        loss = step(model, rectifier, seed=number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


# ------------------------------------------------------------------------------------------ the numbers

def test_rate_of_stage_1_follows_the_poly_schedule():
    """rate · (1 − step/horizon)^0.9: the full rate at first, zero at the horizon, 0.0077 where VOC's run
    stops."""
    recipe = rectify.Recipe(learning_rate=0.01, horizon=20, epochs=5, poly_power=0.9)
    rates = [rectify.learning_rate(recipe, step, steps_per_epoch=10) for step in (0, 50, 100, 200)]
    assert rates == [0.01, pytest.approx(0.0077189, abs=1e-7), pytest.approx(0.0053589, abs=1e-7), 0]
    assert rectify.learning_rate(replace(recipe, learning_rate=0.04, poly_power=1.0), 50,
                                 10) == pytest.approx(0.03)


def test_rate_of_a_run_longer_than_its_horizon_stays_real():
    """--epochs beyond the horizon moves it: a negative number has no power of 0.9."""
    recipe = rectify.Recipe(learning_rate=0.01, horizon=20, epochs=50)
    assert rectify.learning_rate(recipe, 499, steps_per_epoch=10) == pytest.approx(0.01 * (1 / 500) ** 0.9)


def test_the_recipe_of_voc_is_the_papers():
    """Every number of stage 1 on VOC, as the paper and the released code have it."""
    assert asdict(rectify.RECIPES["voc"]) == dict(
        dense_path="residual", prompt_length=73, window_ratio=1 / 6, vote_threshold=0.07, mask_scale=100.0,
        loss_scale=100.0, short_side=336, crop=(336, 336), scale=(0.5, 2.0), distort=True, batch_size=1,
                                                  learning_rate=0.01,
        momentum=0.9, weight_decay=5e-4, poly_power=0.9, horizon=200, epochs=50,
        hypotheses="", cache_features=0.0)


@pytest.mark.parametrize("stage", [rectify, distill])
def test_every_dataset_has_a_recipe_that_the_flags_can_change(stage):
    """Known datasets and folders have a recipe in both stages; --epochs and --batch-size replace their own
    field, and the learning rate goes with the batch."""
    for name in [*DATASETS, "some/folder"]:
        def recipe(*given):
            args = stage.flags().parse_args(given)
            return data.recipe_for(SimpleNamespace(data=name, training_images=range(1000), args=args),
                                   stage.RECIPES, {})

        plain = recipe()
        assert plain == stage.RECIPES["folder" if name == "some/folder" else name]
        rate = pytest.approx(plain.learning_rate * 3 / plain.batch_size)
        assert asdict(recipe("--epochs", "1000", "--batch-size", "3")) \
            == asdict(plain) | {"epochs": 1000, "batch_size": 3, "learning_rate": rate}
    assert rectify.RECIPES["folder"].vote_threshold == 0         # of unknown images: whatever wins one window
