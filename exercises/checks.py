"""What `python exercises/check.py` checks: properties, invariances, and numbers small enough for paper and
pencil.

Each check is about one function and holds no solution of it. Modules are imported inside the checks, so that
a mistake in one file leaves the checks of the others alone.

    B images · C classes · D joint dimension · E ViT width · h,w patches · T tokens
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from exercises.probes import (FixedText, differs, in_place, module, numbers, step, tiny_clip, tokens_seen,
                              unit)

CHECKS: dict[str, list] = {}                # "file:name" → its checks, in order


class Wrong(Exception):
    """What is wrong, in one line that helps."""


def of(function: str):
    """Decorator: a check of this function."""
    def keep(check):
        CHECKS.setdefault(function, []).append(check)
        return check
    return keep


def expect(right, reason: str) -> None:
    if not right:
        raise Wrong(reason)


def same(found, expected, what: str, least: float = 1e-4) -> None:
    """Raise Wrong where a result is not what is expected."""
    expected = expected if isinstance(expected, torch.Tensor) else torch.tensor(expected)
    if said := differs(found, expected, least):
        raise Wrong(f"{what}: {said}")


# ------------------------------------------------------------------------------------------ 1: dense features


@of("clip/model.py:Attention.values")
def a_token_alone_attends_to_itself():
    attention = tiny_clip().visual.transformer.resblocks[0].attn
    token = numbers(3, 1, 128)
    same(attention.values(token), attention(token, False),
         "for a single token, `values` is what the whole attention gives")


@of("clip/model.py:Attention.values")
def no_token_sees_another():
    attention = tiny_clip().visual.transformer.resblocks[0].attn
    x = numbers(2, 5, 128)
    together = attention.values(x)
    expect(together.shape == x.shape, f"expected shape {tuple(x.shape)}, found {tuple(together.shape)}")
    same(together[:, 3:4], attention.values(x[:, 3:4]),
         "a token's result must not depend on the other tokens")


def last_block():
    tower = tiny_clip().visual
    return tower, tower.transformer.resblocks[-1], numbers(2, 7, 128, seed=3)


@of("clip/model.py:VisionTransformer.dense")
def patches_alone_in_the_joint_space():
    tower, _, x = last_block()
    for path in ("value", "residual", "vanilla"):
        expect(tower.dense(x, path).shape == (2, 6, 24),
               f"path {path}: expected one vector of D = 24 for each of 6 patches and none for the class "
               f"token, (2, 6, 24); found {tuple(tower.dense(x, path).shape)}")


@of("clip/model.py:VisionTransformer.dense")
def vanilla_is_the_block_as_it_is():
    tower, last, x = last_block()
    same(tower.dense(x, "vanilla")[:, 2], tower.pool(last(x)[:, 3:]),
         "path vanilla: CLIP's own last block, then the way into the joint space")


@of("clip/model.py:VisionTransformer.dense")
def residual_is_the_block_for_a_patch_alone():
    tower, last, x = last_block()
    same(tower.dense(x, "residual")[:, 2], tower.pool(last(x[:, 3:4])),
         "path residual: a patch gets what the block gives if that patch stands alone")


@of("clip/model.py:VisionTransformer.dense")
def value_is_the_attention_for_a_patch_alone():
    tower, last, x = last_block()
    same(tower.dense(x, "value")[:, 2], tower.pool(last.attn(last.ln_1(x[:, 3:4]), False)),
         "path value: the attention of a patch that stands alone; no residual, no MLP")


# ------------------------------------------------------------------------------------------ 2: query


def words_of(*synonyms, templates=("a photo of a {}.",)):
    return SimpleNamespace(synonyms=synonyms, templates=templates, names=[names[0] for names in synonyms])


@of("rectify.py:query_features")
def a_single_sentence():
    query_features, clip = module("rectify.py").query_features, module("clip")
    found = query_features(tiny_clip(), words_of(("cat",), ("potted plant",), ("sky",)))
    expect(found.shape == (3, 24), f"expected (C, D) = (3, 24), found {tuple(found.shape)}")
    same(found.norm(dim=1), torch.ones(3), "every row has length one")
    feature = tiny_clip().encode_text(clip.tokenize(["a photo of a cat."]))
    expect(F.cosine_similarity(found[:1], feature).item() > 0.9999,
           "with one name and one template, a row points where CLIP's text feature points")


@of("rectify.py:query_features")
def all_sentences_weigh_alike():
    clip, model = module("clip"), tiny_clip()
    templates = ("a photo of a {}.", "the {}")
    with in_place(model, encode_text=longer_for_longer(model.encode_text)):
        row = module("rectify.py").query_features(model, words_of(("cat", "kitten"), templates=templates))
    sentences = [template.format(name) for name in ("cat", "kitten") for template in templates]
    alone = F.normalize(model.encode_text(clip.tokenize(sentences)), dim=1)
    expect(row.shape == (1, 24), f"expected one row for a class with two names, found {tuple(row.shape)}")
    gain = alone @ (alone.sum(dim=0) / alone.sum(dim=0).norm())
    same(alone @ row[0], gain, "every sentence of a class weighs alike, however long CLIP's vector of it is; "
                               "all names and all templates count")


def longer_for_longer(encode_text):
    """CLIP's text features, but those of longer sentences are longer."""
    return lambda tokens: encode_text(tokens) * (tokens > 0).sum(dim=1, keepdim=True) ** 2


@of("rectify.py:query_logits")
def a_patch_like_a_class():
    query = unit(4, 6, seed=1)
    features = query[torch.tensor([[0, 1, 2], [3, 2, 1]])].permute(2, 0, 1)[None]       # (1, D, 2, 3)
    found = module("rectify.py").query_logits(features, query)
    expect(found.shape == (1, 4, 2, 3), f"expected (B, C, h, w) = (1, 4, 2, 3), found {tuple(found.shape)}")
    expect(found.argmax(dim=1).tolist() == [[[0, 1, 2], [3, 2, 1]]],
           "a patch that equals a class's query should be most like that class")
    same(found.amax(dim=1), torch.ones(1, 2, 3), "a patch that equals a class's query has cosine 1 with it")


@of("rectify.py:query_logits")
def small_numbers_of_cosines():
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0]]).T.view(1, 2, 1, 2)
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    same(module("rectify.py").query_logits(features, query)[0, :, 0],
         [[0.6, 1.0], [0.8, 0.0], [0.96, 0.8]],
         "features (0.6, 0.8), (1, 0) and query (1, 0), (0, 1), (0.8, 0.6)")


# ------------------------------------------------------------------------------------------ 3: bias


@of("clip/model.py:CLIP.encode_prompt")
def words_for_vectors_are_a_sentence():
    """One class, then several: what is wrong alone is in the sentence, what is wrong together in the mask."""
    clip, model = module("clip"), tiny_clip()
    prompt = model.token_embedding.weight[torch.tensor(clip.encode("a photo of a"))]
    alone = ("one class alone, with the embeddings of `a photo of a` for vectors, is encode_text's sentence: "
             "look at the start token, at the positions of prefix and name, at ln_final")
    together = ("one class alone is right, three together are not: look at the mask, and whether every "
                "class's positions go on from the prefix")
    for names, what in ((["potted plant"], alone), (["cat", "potted plant", "sky"], together)):
        same(model.encode_prompt(prompt, names),
             model.encode_text(clip.tokenize([f"a photo of a {name}" for name in names])), what)


@of("clip/model.py:CLIP.encode_prompt")
def every_vector_can_learn():
    model, prompt = tiny_clip(), numbers(5, 64, seed=4).requires_grad_()
    found = model.encode_prompt(prompt, ["cat", "sky"])
    expect(found.requires_grad, "the result has no gradient: the vectors could not learn")
    (found ** 2).sum().backward()
    expect(prompt.grad is not None and (prompt.grad.abs().amax(dim=1) > 0).all(),
           "a vector has no gradient: all of them should learn")


@of("clip/model.py:CLIP.encode_prompt")
def no_class_sees_another():
    model, prompt = tiny_clip(), numbers(6, 64, seed=4)
    names = ["potted plant", "cat", "airplane"]
    together = model.encode_prompt(prompt, names)
    expect(together.shape == (3, 24), f"expected (C, D) = (3, 24), found {tuple(together.shape)}")
    for row, name in enumerate(names):
        same(together[row], model.encode_prompt(prompt, [name])[0],
             f"the row of {name!r} depends on the other names")


@of("clip/model.py:CLIP.encode_prompt")
def the_prefix_is_shared():
    model = tiny_clip()
    with tokens_seen(model) as seen:
        model.encode_prompt(numbers(70, 64), ["cat", "dog", "sky", "sand", "road", "wall"])
    expect(seen[0] <= 2 * 83, "expected the blocks to see the 71 shared tokens once and two of each of 6 "
                              f"classes, 83 in all; found {seen[0]} tokens")


@of("clip/model.py:CLIP.encode_prompt")
def a_name_too_long_is_refused():
    try:
        tiny_clip().encode_prompt(numbers(74, 64), ["potted plant"])
        found = "none"
    except ValueError:
        found = ""
    except Exception as error:
        found = f"{type(error).__name__}, which does not tell a user what to mend"
    expect(not found, "74 vectors and `potted plant` need 78 of 77 positions: expected ValueError, found "
                      f"{found}")
    try:
        tiny_clip().encode_prompt(numbers(73, 64), ["potted plant"])
    except ValueError:
        raise Wrong("73 vectors and `potted plant` fill the 77 positions: expected no error") from None


@of("rectify.py:reference_features")
def the_whole_matrix_has_length_one():
    features, prompt = numbers(3, 8) * torch.tensor([[1.0], [2.0], [5.0]]), numbers(4, 6)
    text = FixedText(features)
    found = module("rectify.py").reference_features(text, prompt, ["cat", "dog", "sky"])
    expect(found.shape == (3, 8), f"expected (C, D) = (3, 8), found {tuple(found.shape)}")
    same(F.normalize(found, dim=1), F.normalize(features, dim=1),
         "every row points where CLIP's text feature points; divide by one number and not by one per column")
    expect((found.norm(dim=1) / found.norm() - features.norm(dim=1) / features.norm()).abs().max() < 1e-4,
           "rows keep their relative length: the whole matrix is normalised and not each row")
    same((found ** 2).sum(), 1.0, "the squares of all numbers of W_r sum to one")
    expect(text.asked and text.asked[0][1] == ["cat", "dog", "sky"] and text.asked[0][0] is prompt,
           "expected encode_prompt to be asked for the prompt and the names as they came")
    text.features.requires_grad_()
    (module("rectify.py").reference_features(text, prompt, ["cat", "dog", "sky"]) ** 2).sum().backward()
    expect(text.features.grad.abs().max() < 1e-5,
           "the length of W_r is one whatever it is made of, so its gradient is zero; found another: is the "
           "norm detached?")


def a_projection(E: int, D: int) -> nn.Conv2d:
    projection = nn.Conv2d(E, D, kernel_size=1)
    projection.weight.data, projection.bias.data = numbers(D, E, 1, 1, seed=5), numbers(D, seed=6)
    return projection


@of("rectify.py:bias_logits")
def bias_of_one_place():
    projection = nn.Conv2d(2, 2, kernel_size=1)
    projection.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    projection.bias.data = torch.tensor([0.5, 0.0])
    found = module("rectify.py").bias_logits(torch.tensor([1.0, 3.0]).view(2, 1, 1), projection,
                                             torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
    same(found, torch.tensor([1.5, 6.0, -4.5]).view(3, 1, 1),
         "position (1, 3), W_p = (1 + 0.5, 2 · 3), where 0.5 is the convolution's own bias, and Reference "
         "rows (1, 0), (0, 1), (1, −1)")


@of("rectify.py:bias_logits")
def bias_map_over_a_grid():
    bias_logits, projection = module("rectify.py").bias_logits, a_projection(5, 4)
    positions, reference = numbers(5, 2, 3), numbers(3, 4, seed=1)
    found = bias_logits(positions, projection, reference)
    expect(found.shape == (3, 2, 3), f"expected (C, h, w) = (3, 2, 3), found {tuple(found.shape)}")
    same(found[:, 1:, 2:], bias_logits(positions[:, 1:, 2:], projection, reference),
         "a place's bias depends on its own position alone")
    same(bias_logits(positions, projection, 2 * reference), 2 * found,
         "twice the Reference is twice the bias")


# ---------------------------------------------------------------------------------------- 4: rectified logits


@of("rectify.py:subtract_bias")
def less_the_bias():
    subtract_bias = module("rectify.py").subtract_bias
    same(subtract_bias(torch.tensor([0.3, 0.2]).view(1, 2, 1, 1), torch.tensor([0.1, -0.1]).view(2, 1, 1)),
         torch.tensor([0.2, 0.3]).view(1, 2, 1, 1), "query logits (0.3, 0.2), bias (0.1, −0.1)")
    query = numbers(3, 2, 4, 5)
    same(subtract_bias(query, query[1])[1], torch.zeros(2, 4, 5), "nothing is left of what is all bias")
    expect(subtract_bias(query, query[0]).shape == query.shape,
           "one bias map (C, h, w) serves all images of a batch")


def looking_at(channel: int, D: int, C: int):
    """A decoder whose convolution copies one of its channels into all classes, and whose norm is at its
    start."""
    decoder = module("rectify.py").Decoder(D, C).eval()
    decoder.conv.weight.data.zero_()
    decoder.conv.weight.data[:, channel, 2, 2] = 1.0
    return decoder


@of("rectify.py:Decoder.forward")
def features_first_then_logits():
    features, logits = numbers(2, 4, 3, 5), numbers(2, 3, 3, 5, seed=1)
    for channel, expected, what in ((1, features[:, 1:2], "channel 1 of the convolution is feature 1"),
                                    (5, logits[:, 1:2],
                                     "channel D + 1 of the convolution is class 1's logit")):
        found = looking_at(channel, 4, 3)(features, logits)
        expect(found.shape == logits.shape, f"expected (B, C, h, w) = (2, 3, 3, 5), found "
                                            f"{tuple(found.shape)}")
        same(found[:, :1], expected, what, least=1e-3)


@of("rectify.py:Decoder.forward")
def normalised_in_training():
    torch.manual_seed(0)
    found = module("rectify.py").Decoder(4, 3).train()(numbers(2, 4, 6, 5), numbers(2, 3, 6, 5, seed=1))
    same(found.mean(dim=(0, 2, 3)) + 1, torch.ones(3), "in training every class has mean 0 over the batch")
    same(found.std(dim=(0, 2, 3), correction=0), torch.ones(3),
         "in training every class has spread 1 over the batch: BatchNorm comes last", least=1e-2)


# ------------------------------------------------------------------------------------------ 5: masks


@of("rectify.py:rectified_masks")
def one_class_a_patch():
    masks = module("rectify.py").rectified_masks(numbers(2, 4, 3, 5), 2.0, torch.rand(2, 4, 3, 5))
    expect(masks.shape == (2, 4, 3, 5), f"expected (B, C, h, w) = (2, 4, 3, 5), found {tuple(masks.shape)}")
    rounded = masks.detach().round()
    same(masks, rounded, "a mask has ones and zeros and nothing between")
    same(rounded.sum(dim=1), torch.ones(2, 3, 5), "exactly one class per patch: look at dim 1")


@of("rectify.py:rectified_masks")
def all_chance_comes_from_outside():
    decoded, uniform = numbers(2, 4, 9, 9), torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    before = uniform.clone()
    masks = [module("rectify.py").rectified_masks(decoded, 1.0, uniform).detach() for _ in range(2)]
    expect(torch.equal(uniform, before), "`uniform` was changed in place: the caller still needs it")
    expect(torch.equal(*masks), "two calls with the same `uniform` give two masks: it is the only "
                                "randomness, so leave torch's own generator alone")


@of("rectify.py:rectified_masks")
def the_chance_of_a_class():
    chance = torch.tensor([0.6, 0.3, 0.1])
    uniform = torch.rand(1, 3, 100, 200, generator=torch.Generator().manual_seed(0))
    masks = module("rectify.py").rectified_masks(chance.log().view(1, 3, 1, 1).expand(1, 3, 100, 200), 1.0,
                                                 uniform)
    share = masks.detach().mean(dim=(0, 2, 3))
    expect(share.shape == (3,) and (share - chance).abs().max() < 0.02,
           "with log-probabilities for M_o and scale 1, classes of probability 0.6, 0.3, 0.1 are drawn as "
           f"often; found {[round(one, 2) for one in share.flatten().tolist()[:3]]}: look at the noise and "
           "its sign, and at the dim of the softmax")
    masks = module("rectify.py").rectified_masks(0.5 * chance.log().view(1, 3, 1, 1).expand(1, 3, 100, 200),
                                                 2.0, uniform)
    same(masks.detach().mean(dim=(0, 2, 3)), share, "half the M_o with twice the scale is the same draw")


@of("rectify.py:rectified_masks")
def next_to_the_ends_of_chance():
    pairs = torch.tensor([[1e-5, 1e-3], [1 - 1e-3, 1 - 1e-5]]).T.reshape(1, 2, 1, 2)        # class 1 has more
    masks = module("rectify.py").rectified_masks(torch.zeros(1, 2, 1, 2), 1.0, pairs)
    expect(masks[0, 1].detach().round().tolist() == [[1.0, 1.0]],
           "with equal M_o the class with the larger `uniform` is drawn, next to 0 and next to 1 too: clamp "
           "less")


@of("rectify.py:rectified_masks")
def a_soft_gradient():
    decoded, weight = numbers(1, 3, 2, 2).requires_grad_(), numbers(1, 3, 2, 2, seed=1)
    masks = module("rectify.py").rectified_masks(decoded, 1.5, torch.full((1, 3, 2, 2), 0.4))
    expect(masks.requires_grad, "the mask has no gradient: add something that is zero and whose gradient is "
                                "not")
    (masks * weight).sum().backward()
    soft = (1.5 * decoded.detach()).softmax(dim=1)                  # equal noise for all classes is no noise
    gradient = 1.5 * soft * (weight - (soft * weight).sum(dim=1, keepdim=True))
    same(decoded.grad, gradient,
         "the gradient is that of the softmax over the classes of scale · M_o + noise")
    decoded.grad, uniform = None, torch.full((1, 3, 2, 2), 0.4)
    uniform[:, 1] = 1 - 1e-6                                        # noise that decides for class 1
    (module("rectify.py").rectified_masks(decoded, 0.5, uniform) * weight).sum().backward()
    expect(decoded.grad.abs().max() < 1e-3,
           "where the noise has decided, next to no gradient is left: the softmax is of scale · M_o + noise, "
           "not of scale · M_o alone")


@of("rectify.py:rectified_masks")
def the_ends_of_chance():
    edge = torch.tensor([0.0, 1 - 2 ** -24]).repeat(6).view(1, 3, 2, 2)
    decoded = numbers(1, 3, 2, 2).requires_grad_()
    masks = module("rectify.py").rectified_masks(decoded, 1.0, edge)
    expect(masks.isfinite().all(), "found a number that is not finite where `uniform` is 0 or next to 1")
    masks.sum().backward()
    expect(decoded.grad is not None and decoded.grad.isfinite().all(),
           "found a gradient that is not finite where `uniform` is 0 or next to 1")


# ------------------------------------------------------------------------------------------ 6: the hypothesis


def numbered(H: int, W: int) -> torch.Tensor:
    """An image whose three channels say where a pixel lies: row, column, 0."""
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack([rows, columns, 0 * rows]).float()


@of("rectify.py:windows")
def the_whole_image_is_one_window():
    image = numbered(6, 9)
    same(module("rectify.py").windows(image, 1.0), image[None], "ratio 1: one window, the image")


@of("rectify.py:windows")
def windows_half_a_window_apart():
    found = module("rectify.py").windows(numbered(8, 12), 0.5)
    expect(found.shape == (9, 3, 4, 6), "ratio 1/2 of 8 × 12 pixels: expected 3 × 3 windows of 4 × 6, (9, 3, "
                                        f"4, 6); found {tuple(found.shape)}")
    corners = [tuple(one) for one in found[:, :2, 0, 0].int().tolist()]
    expect(corners == [(0, 0), (0, 3), (0, 6), (2, 0), (2, 3), (2, 6), (4, 0), (4, 3), (4, 6)],
           "ratio 1/2 of 8 × 12 pixels: expected corners (0, 0), (0, 3), (0, 6), (2, 0), … row by row; found "
           f"{', '.join(map(str, corners[:4]))}, …")
    count = len(module("rectify.py").windows(numbered(60, 60), 1 / 6))
    expect(count == 121, f"ratio 1/6: expected 11 × 11 = 121 windows, found {count}")


@of("rectify.py:window_votes")
def shares_of_windows():
    query = torch.eye(3)
    features = torch.tensor([[5.0, 0.1, 0], [0.1, 0.5, 0], [0, 0.2, 0.1], [0.9, 0.1, 0.8]])
    found = module("rectify.py").window_votes(features, query)
    same(found, [0.5, 0.5, 0.0], "four windows, whose best classes are 0, 1, 1, 0")
    same(module("rectify.py").window_votes(torch.stack([features, features.flip(1)]), query),
         [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], "two images at once: the share is over the windows (dim −2)")


@of("rectify.py:multi_label_hypothesis")
def more_than_the_threshold():
    votes = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.375, 0.125]])
    found = module("rectify.py").multi_label_hypothesis(votes, 0.25)
    expect(found.dtype == torch.bool, f"expected bool, found {found.dtype}")
    expect(found.tolist() == [[True, False, False], [True, True, False]],
           "votes (1/2, 1/4, 1/4) and (1/2, 3/8, 1/8) with threshold 1/4: expected {0} and {0, 1}, for a "
           "share "
           f"equal to the threshold is not enough; found {found.int().tolist()}")


@of("rectify.py:multi_label_hypothesis")
def never_empty():
    found = module("rectify.py").multi_label_hypothesis(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]]),
                                                        0.6)
    expect(found.tolist() == [[False, True, False], [True, False, False]],
           "where no class passes, the one with most votes stands alone, and elsewhere nothing is added: "
           f"expected {{1}} and {{0}}, found {found.int().tolist()}")


# ---------------------------------------------------------------------------------------- 7: contrastive loss


def some_masks(B: int, C: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return F.one_hot(numbers(B, C, h, w, seed=seed).argmax(dim=1), C).permute(0, 3, 1, 2).float()


LOSS = "rectify.py:contrastive_loss"


def loss_of(*given):
    return module("rectify.py").contrastive_loss(*given)


@of(LOSS)
def two_patches_of_four():
    features = torch.tensor([[1.0, 0.0]] * 4).T.reshape(1, 2, 2, 2)                     # all patches are e_0
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 0, 0] = 1.0
    found = float(loss_of(features, masks, torch.eye(2), torch.tensor([[True, False]]), 4.0))
    others = {math.log(1 + math.exp(-4.0)): "divided by the mask's own area, or made unit length, found",
              math.log(1 + math.exp(-8.0)): "not divided at all, found",
              math.log(1 + math.exp(-0.5)): "without the scale, found",
              math.log(1 + math.exp(-0.125)): "divided by the scale, found",
              (math.log(1 + math.exp(-2.0)) + math.log(2)) / 2: "the mean over all classes, not H, found",
              math.log(1 + math.exp(-2.0)) / 2: "divided by C and not by |H|, found"}
    guess = next((text for other, text in others.items() if abs(found - other) < 1e-5), "found")
    expect(abs(found - math.log(1 + math.exp(-2.0))) < 1e-5,
           "four patches, all e_0; the mask of class 0, alone in H, covers two: Z_g = (½, 0), with scale 4 "
           f"the loss is ln(1 + e^−2) = 0.1269; {guess} {found:.4g}")


@of(LOSS)
def a_loss_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # patch 0 is e_0, patch 1 is e_1
    masks = features.clone()  # each class has its own patch
    found = loss_of(features, masks, torch.eye(2), torch.ones(1, 2, dtype=torch.bool), 4.0)
    same(found, math.log(1 + math.exp(-2.0)),
         "two patches, two classes, each mask on its own patch, scale 4: Z_g is half a patch, S = ½ on the "
         "diagonal, the loss ln(1 + e^−2) = 0.1269")
    swapped = loss_of(features, masks.flip(1), torch.eye(2), torch.ones(1, 2, dtype=torch.bool), 4.0)
    same(swapped, math.log(1 + math.exp(2.0)), "masks on the wrong patches: ln(1 + e^2) = 2.1269")


@of(LOSS)
def an_empty_mask():
    features, masks = unit(1, 4, 2, 3, dim=1), torch.zeros(1, 5, 2, 3, requires_grad=True)
    found = loss_of(features, masks, unit(5, 4), torch.ones(1, 5, dtype=torch.bool), 10.0)
    same(found, math.log(5), "empty masks of 5 classes: the loss is ln 5")
    found.backward()
    expect(masks.grad is not None and masks.grad.isfinite().all() and masks.grad.abs().max() > 1e-3,
           "empty masks need a finite gradient that is not zero")


@of(LOSS)
def the_rows_of_two_classes():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).T.view(1, 2, 1, 2)
    query, masks = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2).view(1, 2, 1, 2)
    only_first = loss_of(features * torch.tensor([1.0, 0.5]), masks, query, torch.tensor([[True, False]]),
                         10.0)
    same(only_first, math.log(1 + math.exp(-2.0)),
         "of class 0 alone: its mask's feature (½, 0) has cosines ½ and 0.3 with the classes, so the loss is "
         "ln(1 + e^−2) = 0.1269: the softmax is over the classes that a mask is compared with")


@of(LOSS)
def classes_outside_the_hypothesis():
    features, query = unit(1, 4, 2, 3, dim=1), unit(3, 4, seed=1)
    masks, hypothesis = some_masks(1, 3, 2, 3), torch.tensor([[True, False, True]])
    other = masks.clone()
    other[:, 1] = 1.0
    same(loss_of(features, other, query, hypothesis, 9.0), loss_of(features, masks, query, hypothesis, 9.0),
         "the mask of a class outside H must not change the loss")


@of(LOSS)
def an_image_counts_once():
    features, query, masks = unit(2, 4, 2, 3, dim=1), unit(3, 4, seed=1), some_masks(2, 3, 2, 3)
    hypothesis = torch.tensor([[True, False, False], [True, True, True]])
    one, two = (loss_of(features[i:i + 1], masks[i:i + 1], query, hypothesis[i:i + 1], 9.0) for i in (0, 1))
    same(loss_of(features, masks, query, hypothesis, 9.0), (one + two) / 2,
         "the mean over H first, then over images: an image with three classes weighs as one with one")


# --------------------------------------------------------------------------------------- 8: the training step


@of("rectify.py:train_step")
def each_part_once_and_in_order():
    parts, loss = step(B=2, C=3, D=4, h=2, w=5, mask_scale=2.5, loss_scale=11.0, vote_threshold=0.2)
    given = {name: calls[0] for name, calls in parts.given.items()}
    for name in ("reference_features, Eq. 1", "bias, Eq. 2", "subtract, Eq. 3", "decoder, Eq. 4",
                 "rectified_masks, Eq. 5", "multi_label_hypothesis, Eq. 6", "the loss, Eq. 7"):
        calls = len(parts.given.get(name, []))
        expect(calls == 1, f"{name}: expected to be called once, found {calls} calls")
    places = parts.given.get("patch_positions", [])
    expect(places and (int(places[0]["h"]), int(places[0]["w"])) == (2, 5),
           "the positions are those of the features' grid: expected h, w = 2, 5")
    silent = type(parts)(4, 6)
    features, query = numbers(2, 4, 2, 5), numbers(3, 4, seed=2)
    reference = silent.reference_features(None, parts.prompt, ["cat", "potted plant", "airplane"])
    same(given["reference_features, Eq. 1"]["prompt"], parts.prompt, "Eq. 1 is given the rectifier's prompt")
    same(given["bias, Eq. 2"]["reference"], reference, "Eq. 2 is given what Eq. 1 gave")
    bias = silent.bias(silent.patch_positions(2, 5), reference)
    same(given["subtract, Eq. 3"]["features"], features, "Eq. 3 is given the features")
    same(given["subtract, Eq. 3"]["query"], query, "Eq. 3 is given the query")
    same(given["subtract, Eq. 3"]["bias"], bias, "Eq. 3 is given what Eq. 2 gave")
    logits = silent.subtract(features, query, bias)
    same(given["decoder, Eq. 4"]["features"], features, "Eq. 4 is given the features")
    same(given["decoder, Eq. 4"]["logits"], logits, "Eq. 4 is given what Eq. 3 gave")
    masks, hypothesis, last = (given[name] for name in (
        "rectified_masks, Eq. 5", "multi_label_hypothesis, Eq. 6", "the loss, Eq. 7"))
    same(masks["decoded"], silent.decoder(features, logits), "Eq. 5 is given what Eq. 4 gave")
    same(masks["scale"], 2.5, "Eq. 5 is given the recipe's mask_scale")
    same(hypothesis["threshold"], 0.2, "Eq. 6 is given the recipe's vote_threshold")
    same(hypothesis["votes"], numbers(2, 3, seed=1).softmax(dim=1), "Eq. 6 is given the votes")
    same(last["scale"], 11.0, "Eq. 7 is given the recipe's loss_scale")
    for name, expected in (("features", features), ("query", query),
                           ("masks", silent.rectified_masks(masks["decoded"], 2.5, masks["uniform"])),
                           ("hypothesis", silent.multi_label_hypothesis(hypothesis["votes"], 0.2))):
        same(last[name], expected, f"Eq. 7 is given the {name}")
    same(loss, silent.loss(**{name: last[name] for name in ("features", "masks", "query", "hypothesis")},
                           scale=11.0),
         "the step returns what Eq. 7 gave")


@of("rectify.py:train_step")
def all_chance_from_the_generator():
    def drawn(seed: int):
        torch.manual_seed(seed)
        return step(B=2, C=3, D=4, h=2, w=5)[0].given["rectified_masks, Eq. 5"][0]["uniform"]
    first = drawn(0)
    expect(first.shape == (2, 3, 2, 5), f"expected `uniform` of shape (B, C, h, w), found "
                                        f"{tuple(first.shape)}")
    expect(first.min() >= 0 and first.max() < 1 and first.std() > 0.15,
           "expected `uniform` to be spread over [0, 1): torch.rand and not torch.randn")
    expect(torch.equal(first, drawn(1)),
           "the numbers of Eq. 5 must come from the generator `noise` alone: a resumed run repeats them")


@of("rectify.py:train_step")
def what_is_trained_gets_a_gradient():
    parts, loss = step(B=2, C=3, D=4, h=2, w=5)
    expect(loss.dim() == 0, f"expected a loss that is one number, found shape {tuple(loss.shape)}")
    loss.backward()
    expect(parts.prompt.grad is not None and parts.prompt.grad.abs().max() > 0,
           "the prompt vectors get no gradient: is something detached, or inside no_grad?")


# ------------------------------------------------------------------------------------------ 9: distillation


@of("distill.py:mask_loss")
def a_mask_loss_by_hand():
    mask_loss = module("distill.py").mask_loss
    label = torch.tensor([[[0, 1, 2], [3, 2, 1]]])
    same(mask_loss(torch.zeros(1, 4, 2, 3), label), math.log(4),
         "a student that knows nothing pays ln C = ln 4")
    sure = 20.0 * F.one_hot(label, 4).permute(0, 3, 1, 2)
    same(mask_loss(sure, label) + 1, 1.0, "a student that is sure and right pays nothing")
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    same(mask_loss(logits, torch.tensor([[[1]]])), math.log(4 / 3),
         "probabilities (¼, ¾), label 1: ln 4/3 = 0.2877")


@of("distill.py:mask_loss")
def a_mean_over_places():
    mask_loss, logits = module("distill.py").mask_loss, numbers(2, 3, 2, 4)
    label = numbers(2, 3, 2, 4, seed=1).argmax(dim=1)
    one = mask_loss(logits[:1], label[:1])
    expect(one.dim() == 0, f"expected one number, found shape {tuple(one.shape)}")
    same(mask_loss(torch.cat([logits[:1]] * 2), torch.cat([label[:1]] * 2)), one,
         "two equal images cost what one costs: a mean and not a sum")
    same(mask_loss(logits[:1].tile(1, 1, 2, 2), label[:1].tile(1, 2, 2)), one,
         "an image of four times as many places costs the same: a mean and not a sum")


@of("distill.py:feature_loss")
def a_feature_loss_by_hand():
    feature_loss = module("distill.py").feature_loss
    student, teacher = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 0.5]).view(1, 2, 1, 1)
    same(feature_loss(student, teacher), 0.75, "(1, 0) and (0, ½): the mean of |1| and |−½|")
    same(feature_loss(student, teacher.expand(1, 2, 3, 4)), 0.75,
         "a teacher of another grid, equal everywhere")
    ramp = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 4)
    same(feature_loss(torch.zeros(1, 1, 1, 2), ramp), 1.5,
         "a teacher of 4 places (0, 1, 2, 3) on a grid of 2: bilinear gives ½ and 2½")
    expect(feature_loss(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)).abs() < 1e-6,
           "equal features cost nothing")


@of("distill.py:feature_loss")
def a_gradient_for_the_student():
    student = numbers(1, 3, 4, 4).requires_grad_()
    loss = module("distill.py").feature_loss(student, numbers(1, 3, 2, 2, seed=1))
    expect(loss.requires_grad, "the student's features get no gradient: is something detached?")
    loss.backward()
    same(student.grad.abs().sum(), 1.0, "each of n numbers has a gradient of ± 1/n: a mean over all numbers")


@of("distill.py:text_loss")
def the_loss_of_stage_1():
    given = []

    def loss(*arguments, **named):
        given.append((arguments, named))
        return torch.tensor(2.5)
    features, masks, query = numbers(1, 4, 2, 3), numbers(1, 3, 2, 3, seed=1), numbers(3, 4, seed=2)
    hypothesis = torch.tensor([[True, False, True]])
    found = module("distill.py").text_loss(features, masks, query, hypothesis, 7.0, loss)
    same(found, 2.5, "the text loss is what the loss that is handed in gives")
    arguments, named = given[0]
    arguments = [*arguments, *(named[name] for name in ("features", "masks", "query", "hypothesis", "scale")
                               if name in named)]
    expect(len(arguments) == 5, f"expected the loss to be given 5 things, found {len(arguments)}")
    for name, expected, one in zip(("features", "masks", "query", "hypothesis"),
                                   (features, masks, query, hypothesis), arguments):
        same(one, expected, f"the loss is given the {name}")
    expect(arguments[4] == 7.0, "the loss is given the scale as it came")


@of("distill.py:total_loss")
def the_total_by_hand():
    found = module("distill.py").total_loss(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0), 0.5,
                                            0.25)
    same(found, 3.0, "1 + 0.5 · 2 + 0.25 · 4")
    found = module("distill.py").total_loss(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0), 0.0, 1.0)
    same(found, 5.0, "1 + 0 · 2 + 1 · 4")


# ------------------------------------------------------------------------------------------ 10: mIoU


@of("evaluate.py:confusion_matrix")
def pixels_by_hand():
    truth = torch.tensor([[0, 0, 1], [2, 2, 255]])
    said = torch.tensor([[0, 1, 1], [2, 0, 2]])
    found = module("evaluate.py").confusion_matrix(truth, said, 3)
    expect(found.shape == (3, 3), f"expected (C, C) = (3, 3), found {tuple(found.shape)}")
    expect(not found.is_floating_point(), f"expected whole numbers, found {found.dtype}")
    expect(found.sum() == 5, f"six pixels, one of them 255: expected 5 to be counted, found "
                             f"{int(found.sum())}")
    same(found, torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1]]),
         "truth 0 0 1 2 2 and prediction 0 1 1 2 0; row: truth, column: prediction")


@of("evaluate.py:confusion_matrix")
def matrices_add_up():
    confusion_matrix = module("evaluate.py").confusion_matrix
    truth, said = (numbers(4, 6, 5, seed=seed).argmax(dim=-1).to(torch.uint8) for seed in (0, 1))
    expect(confusion_matrix(truth, said, 7).shape == (7, 7),
           "classes that occur nowhere have a row and a column too")
    same(confusion_matrix(truth, said, 7), confusion_matrix(truth[:1], said[:1], 7) + confusion_matrix(
        truth[1:], said[1:], 7), "the matrices of two pictures add up to that of both")


@of("evaluate.py:class_iou")
def shares_by_hand():
    class_iou = module("evaluate.py").class_iou
    same(class_iou(torch.tensor([[3, 1], [2, 4]])).float(), torch.tensor([3 / 6, 4 / 7]),
         "[[3, 1], [2, 4]]: 3 of 3 + 1 + 2, and 4 of 4 + 2 + 1")
    same(class_iou(torch.diag(torch.tensor([5, 1, 2]))).float(), torch.ones(3), "all right: 1 for each class")
    found = class_iou(torch.tensor([[2, 0, 0], [0, 0, 0], [1, 0, 0]]))
    expect(found[1].isnan(), "a class in neither truth nor prediction has NaN")
    expect(found[2] == 0, "a class in the truth alone has 0")


# ------------------------------------------------------------------------------------------ 11, 12: open


def own_system(already: list[str]) -> None:
    """Exercise 11. Every system that the project did not have: a name, a difference, a step of training."""
    systems = module("paper/systems.py").SYSTEMS
    own = [system for name, system in systems.items() if name not in already]
    expect(own, "there is no system of your own in SYSTEMS of paper/systems.py yet")
    usual = module("distill.py").System()
    for system in own:
        differ = [part for part in ("rectifier", "votes", "loss", "head", "numbers", "student_numbers")
                  if getattr(system, part) != getattr(usual, part)]
        expect(differ or system == usual, f"{system.name}: it has the parts and the numbers of ReCLIP++")
        takes_a_step(system)


def takes_a_step(system) -> None:
    from dataclasses import replace
    rectify, distill = module("rectify.py"), module("distill.py")
    part, model, names = system.teacher or system, tiny_clip(), ["cat", "potted plant", "sky"]
    own = {**part.numbers.get("any", {}), **part.numbers.get("toyland", {})}
    recipe = replace(rectify.RECIPES["toyland"], **(own | {"prompt_length": 4}))
    replace(distill.RECIPES["toyland"], **{**system.student_numbers.get("any", {}),
                                           **system.student_numbers.get("toyland", {})})
    torch.manual_seed(0)
    rectifier, query = part.rectifier(model, len(names), 4), unit(3, 24)
    features = rectifier.encode(model, numbers(2, 3, 32, 40), recipe.dense_path)
    loss = rectify.train_step(rectifier, model, features, numbers(2, 3).softmax(dim=1), query, names, recipe,
                              torch.Generator().manual_seed(0), part.loss)
    expect(loss.isfinite(), f"{system.name}: the loss of a step is {loss.item()}")
    trained = [parameter for parameter in rectifier.parameters() if parameter.requires_grad]
    if loss.requires_grad:
        loss.backward()
        expect(any(one.grad is not None and one.grad.abs().max() > 0 for one in trained),
               f"{system.name}: nothing of its rectifier gets a gradient")
    reference = rectify.reference_features(model, rectifier.prompt, names).detach()
    head = system.head(rectifier, query, reference, model.visual.patch_positions(4, 4))
    found = head(unit(1, 24, 3, 5, dim=1)).shape
    expect(found == (1, 3, 3, 5), f"{system.name}: expected logits (1, 3, 3, 5) of its student's head, found "
                                  f"{tuple(found)}")


def own_class(already: list[str]) -> None:
    """Exercise 12. Every class that Toyland did not have: drawn, named, with a colour of its own."""
    import numpy as np
    world = module("toyland/world.py")
    own = [name for name in world.CLASSES if name not in already]
    expect(own, "there is no class of your own in toyland/world.py yet")
    expect(len({tuple(one) for one in world.PALETTE}) == len(world.CLASSES),
           "two classes have the same colour")
    expect(len(set(world.CLASSES)) == len(world.CLASSES), "two classes have the same name")
    seen = np.zeros(len(world.CLASSES), dtype=int)
    for number in range(120):
        seen += np.bincount(np.unique(world.scene("train", number)[1]), minlength=len(seen))
    rng = np.random.default_rng(0)
    captions = " and ".join(world.captioned_picture(rng)[1] for _ in range(300)).split()
    for number, name in enumerate(world.CLASSES):
        whose = "" if name in own else " now"
        expect(seen[number] > 0, f"{name} is in none of 120 scenes{whose}")
        expect(name.split()[-1] in captions, f"{name} is named by none of 300 captions{whose}")


OPEN = {11: (own_system, "systems"), 12: (own_class, "classes")}
