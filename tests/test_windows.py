"""Eq. 6's windows in one pass: the masks against loops over pixels, the features window after window.

    python -m pytest tests/test_windows.py
"""

import pytest
import torch

import clip
import rectify
from helpers import TINY, openai_state, random, relative, toy_setup, unit, write_photos
from paper import windows


@pytest.fixture(scope="module")
def visual():
    return clip.build_model(openai_state(**TINY)).eval().requires_grad_(False).visual


@pytest.mark.parametrize("H, W, ratio", [(48, 64, 1 / 4), (40, 56, 1 / 6), (61, 45, 1 / 3), (24, 24, 1)])
def test_patches_of_a_window_are_those_that_it_covers(H, W, ratio):
    """Pixel after pixel; no window is empty, also where it is smaller than a patch."""
    found = windows.patches_of_windows(H, W, 8, ratio)
    h, w = -(-H // 8), -(-W // 8)
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")).float()
    cut = rectify.windows(torch.cat([place, place[:1]]), ratio)         # rows and columns of its pixels
    assert found.shape == (len(cut), h * w)
    for of_window, window in zip(found, cut):
        counts = [0] * (h * w)
        for row, column in window[:2].flatten(start_dim=1).T.int().tolist():
            counts[row // 8 * w + column // 8] += 1
        assert of_window.tolist() == [count >= max(counts) / 2 for count in counts] and of_window.any()


def block_by_hand(block, token, patches):
    """A class token (E,) after a block in which it sees itself and `patches` (m, E), head after head."""
    E, seen = len(token), block.ln_1(torch.cat([token[None], patches]))
    q, k, v = (seen @ block.attn.in_proj_weight[n * E:(n + 1) * E].T
               + block.attn.in_proj_bias[n * E:(n + 1) * E] for n in range(3))
    heads = [((q[0, a:a + 64] @ k[:, a:a + 64].T) / 8).softmax(dim=0) @ v[:, a:a + 64]
             for a in range(0, E, 64)]
    token = token + block.attn.out_proj(torch.cat(heads))
    return token + block.mlp(block.ln_2(token))


@pytest.mark.parametrize("split", [0, 1, 2])
def test_each_token_sees_its_window_and_patches_see_no_token(visual, split):
    """Together and one after the other, on an image that is no multiple of the patch."""
    image = random(3, 44, 60)
    inside = windows.patches_of_windows(44, 60, 8, 1 / 3)
    expected = []
    for of_window in inside:
        x = visual.embed(image[None])
        for number, block in enumerate(visual.transformer.resblocks):
            if number < split:
                x = block(x)                                    # as CLIP has it, class token and all
            else:
                token = block_by_hand(block, x[0, 0], x[0, 1:][of_window])
                x = torch.cat([token[None, None], block(x[:, 1:])], dim=1)
        expected.append(visual.ln_post(x[0, 0]) @ visual.proj)
    found = windows.window_features(visual, image, inside, split)
    assert found.shape == (25, TINY["embed_dim"]) and relative(found, torch.stack(expected)) < 1e-5


def test_votes_of_all_images(tmp_path):
    """Each image's votes are the shares of its own windows, at the recipe's size times `magnify`; late and
    larger ones are stored under other names."""
    setup = toy_setup(tmp_path)
    folder = write_photos(tmp_path / "photos", "a.png", "b.png", height=40, width=56)
    setup.training_images = {path.stem: path for path in sorted(folder.iterdir())}
    query, recipe = unit(4, TINY["embed_dim"]), rectify.Recipe(short_side=48, window_ratio=1 / 3)
    for late, magnify in ((False, 1.0), (True, 1.0), (False, 1.5)):
        votes = windows.one_pass(late, magnify)
        found = votes(setup, query, recipe)
        for row, path in zip(found, setup.training_images.values()):
            [(_, image)] = rectify.data.WholeImages({"x": path}, round(48 * magnify))
            inside = windows.patches_of_windows(*image.shape[1:], 8, 1 / 3)
            features = windows.window_features(setup.clip_model.visual, image, inside, 2 if late else 0)
            assert torch.equal(row, rectify.window_votes(features, query)) and row.sum() == pytest.approx(1)
    names = {windows.one_pass(*given).__name__ for given in ((), (True,), (False, 1.5))}
    assert len(names) == 3
