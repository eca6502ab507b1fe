"""The two towers of clip/model.py against two trusted implementations, and the two calls that segmentation
adds against slow computations that one can check by eye.

    python -m pytest tests/test_clip.py              # seconds; `-m slow` adds the full size of ViT-B/16

open_clip and transformers are needed for these tests only. Every comparison goes through a file that the
other library wrote, so that reading the file is tested too. "Equal" means a relative error of at most 1e-5 in
float32, and 1e-12 in float64.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import clip
from helpers import TINY, openai_state, relative

open_clip = pytest.importorskip("open_clip")

VIT_B_16 = dict(width=768, layers=12, patch=16, resolution=224, embed_dim=512, text_width=512, text_layers=12)
SIZES = [pytest.param(TINY, id="tiny"), pytest.param(VIT_B_16, id="ViT-B/16", marks=pytest.mark.slow)]
MODELS = [pytest.param(TINY, "quickgelu", id="tiny"), pytest.param(TINY, "gelu", id="tiny, exact GELU"),
          pytest.param(VIT_B_16, "quickgelu", id="ViT-B/16", marks=pytest.mark.slow)]
START, END = 49406, 49407
SENTENCES = ["a photo of a cat", "a photo of the chest of drawers, seen from above!", "", "ein Förderband ☃",
             "word " * 75]                                                  # the last one fills all 77 places
NAMES = ["cat", "potted plant", "chest of drawers", "a sleeping dog indoors", "skyscraper", "conveyer belt"]


# --------------------------------------------------------------------------------- the models to compare with

def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Noise on every parameter: fresh ones have biases of 0 and LayerNorm weights of 1, which hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model.eval()


def open_clip_model(width, layers, patch, resolution, embed_dim, text_width, text_layers,
                    activation="quickgelu"):
    """open_clip's CLIP with random weights."""
    torch.manual_seed(0)
    return perturb(open_clip.CLIP(
        embed_dim, quick_gelu=activation == "quickgelu",
        vision_cfg=dict(width=width, layers=layers, patch_size=patch, image_size=resolution, head_width=64),
        text_cfg=dict(width=text_width, layers=text_layers, heads=text_width // 64)))


def hugging_face_model(width, layers, patch, resolution, embed_dim, text_width, text_layers, activation):
    """transformers' CLIPModel with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    def tower(width, layers):
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=width // 64, layer_norm_eps=1e-5,
                    hidden_act={"quickgelu": "quick_gelu", "gelu": "gelu"}[activation])

    return perturb(transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=tower(width, layers) | dict(patch_size=patch, image_size=resolution),
        text_config=tower(text_width, text_layers) | dict(eos_token_id=END), projection_dim=embed_dim)))


def hugging_face_features(model, images, tokens):
    found = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens.long())
    return [getattr(output, "pooler_output", output) for output in found]       # transformers 4 gives tensors


def load_from(path, activation="quickgelu"):
    """Our model from a file that is no longer needed afterwards (the big ones take 600 MB each)."""
    model, _ = clip.load(path, device="cpu", activation=activation)
    path.unlink()
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, open_clip's): the same tiny weights, ours read from the file that open_clip's were saved to."""
    theirs = open_clip_model(**TINY)
    path = tmp_path_factory.mktemp("open_clip") / "tiny.pt"
    torch.save(theirs.state_dict(), path)
    return load_from(path), theirs


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------- what OpenAI's CLIP does, unchanged

@torch.no_grad()
@pytest.mark.parametrize("sizes, activation", MODELS)
def test_features_equal_open_clip(sizes, activation, tmp_path):
    """encode_image and encode_text give open_clip's vectors with the weights that open_clip saved."""
    theirs = open_clip_model(**sizes, activation=activation)
    torch.save(theirs.state_dict(), tmp_path / "open_clip.pt")
    ours = load_from(tmp_path / "open_clip.pt", activation)
    images, tokens = random_images(2, sizes["resolution"], sizes["resolution"]), clip.tokenize(SENTENCES)
    assert relative(ours.encode_image(images), theirs.encode_image(images)) <= 1e-5
    assert relative(ours.encode_text(tokens), theirs.encode_text(tokens.long())) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sizes, activation", MODELS)
def test_features_equal_hugging_face(sizes, file, activation, tmp_path):
    """encode_image and encode_text give transformers' vectors, from its folder and from its old .bin."""
    theirs = hugging_face_model(**sizes, activation=activation)
    theirs.config.save_pretrained(tmp_path)             # config.json, which names the activation
    if file == "model.safetensors":
        theirs.save_pretrained(tmp_path)
    else:                       # older releases of transformers stored these two ranges among the weights
        ranges = {"text_model.embeddings.position_ids": torch.arange(77)[None],
                  "vision_model.embeddings.position_ids": torch.arange(50)[None]}
        torch.save(theirs.state_dict() | ranges, tmp_path / file)
    ours, _ = clip.load(tmp_path, device="cpu")                             # the folder
    assert ours.activation == activation
    assert clip.fingerprint(ours) == clip.fingerprint(load_from(tmp_path / file, activation))
    images, tokens = random_images(2, sizes["resolution"], sizes["resolution"]), clip.tokenize(SENTENCES)
    expected_image, expected_text = hugging_face_features(theirs, images, tokens)
    assert relative(ours.encode_image(images), expected_image) <= 1e-5
    assert relative(ours.encode_text(tokens), expected_text) <= 1e-5


@torch.no_grad()
def test_logits_equal_open_clip(pair):
    """model(images, tokens) gives cosines times exp(logit_scale), images by texts and texts by images."""
    ours, theirs = pair
    images, tokens = random_images(3, 32, 32), clip.tokenize(SENTENCES)
    logits_per_image, logits_per_text = ours(images, tokens)
    expected_per_image, expected_per_text = theirs.get_logits(images, tokens.long())
    assert relative(logits_per_image, expected_per_image) <= 1e-5
    assert relative(logits_per_text, expected_per_text) <= 1e-5


@torch.no_grad()
def test_trimmed_text_equals_all_77_places(pair):
    """encode_text leaves out what stands behind the longest sentence, and nothing changes."""
    ours, _ = pair
    tokens = clip.tokenize(["a cat", "a photo of the chest of drawers"])
    x = ours.transformer(ours.token_embedding(tokens) + ours.positional_embedding)           # (2, 77, Et)
    expected = torch.stack([ours.ln_final(x[i, row.tolist().index(END)]) @ ours.text_projection
                            for i, row in enumerate(tokens)])
    assert relative(ours.encode_text(tokens), expected) <= 1e-5

    tokens[:, 12:] = 320                                                           # "a a a …" behind the ends
    assert relative(ours.encode_text(tokens), expected) <= 1e-5


@torch.no_grad()
def test_each_sentence_is_read_at_its_own_end(pair):
    """A batch of long and short sentences gives what each gives alone."""
    ours, _ = pair
    together = ours.encode_text(clip.tokenize(SENTENCES))
    alone = torch.cat([ours.encode_text(clip.tokenize(sentence)) for sentence in SENTENCES])
    assert relative(together, alone) <= 1e-5


# -------------------------------------------------------------------------- dense features, token after token

def tokens_by_hand(theirs, image: torch.Tensor) -> torch.Tensor:
    """One image (3, H, W) as it enters open_clip's last block: (1, 1 + h·w, E), any H and W."""
    visual, (_, H, W) = theirs.visual, image.shape
    patch, grid = visual.patch_size[0], visual.grid_size[0]
    h, w = math.ceil(H / patch), math.ceil(W / patch)
    canvas = torch.zeros(3, h * patch, w * patch)                       # zeros to the right and at the bottom
    canvas[:, :H, :W] = image
    positions = visual.positional_embedding[1:].view(grid, grid, -1).permute(2, 0, 1)       # (E, grid, grid)
    positions = F.interpolate(positions[None], size=(h, w), mode="bicubic", align_corners=False)[0]
    tokens = [visual.class_embedding + visual.positional_embedding[0]]
    for i in range(h):
        for j in range(w):
            pixels = canvas[:, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch]
            tokens.append(visual.conv1.weight.flatten(start_dim=1) @ pixels.flatten() + positions[:, i, j])
    x = visual.ln_pre(torch.stack(tokens))[None]
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def mixed_by_hand(last, patches: torch.Tensor, i: int, path: str, w: int) -> torch.Tensor:
    """What patch i of `patches` (n, E), w a row, takes of all patches' values: (E,), head after head."""
    E = patches.shape[1]
    parts = [last.ln_1(patches) @ last.attn.in_proj_weight[n * E:(n + 1) * E].T
             + last.attn.in_proj_bias[n * E:(n + 1) * E] for n in range(3)]
    heads = []
    for one in range(0, E, 64):
        query, key, value = (part[:, one:one + 64] for part in parts)
        taken = torch.zeros(64)
        for alike in [key] if path == "neighbourhood" else [query, key]:
            scores = []
            for j in range(len(patches)):
                score = alike[i] @ alike[j] / 8
                if path == "neighbourhood":
                    score = score + math.exp(-((i // w - j // w) ** 2 + (i % w - j % w) ** 2) / 50)
                scores.append(score)
            taken = taken + torch.stack(scores).softmax(dim=0) @ value
        heads.append(taken)
    return torch.cat(heads)


def dense_by_hand(theirs, image: torch.Tensor, path: str) -> torch.Tensor:
    """encode_dense of one image (3, H, W) → (D, h, w), with open_clip's layers, one token at a time."""
    visual, last = theirs.visual, theirs.visual.transformer.resblocks[-1]
    x = tokens_by_hand(theirs, image)
    E = x.shape[-1]
    outputs = []
    for i, token in enumerate(x[0, 1:], start=1):
        if path == "vanilla":
            outputs.append(last(x)[0, i])
            continue
        value = last.attn.in_proj_weight[2 * E:] @ last.ln_1(token) + last.attn.in_proj_bias[2 * E:]
        if path in ("neighbourhood", "correlative"):
            value = mixed_by_hand(last, x[0, 1:], i - 1, path, math.ceil(image.shape[2] / 8))
        value = last.attn.out_proj.weight @ value + last.attn.out_proj.bias
        if path in ("residual", "correlative"):
            value = token + value
            value = value + last.mlp(last.ln_2(value))
        outputs.append(value)
    features = [visual.ln_post(output) @ visual.proj for output in outputs]
    features = torch.stack([feature / feature.norm() for feature in features], dim=1)               # (D, h·w)
    h, w = (math.ceil(side / visual.patch_size[0]) for side in image.shape[1:])
    return features.unflatten(dim=1, sizes=(h, w))


IMAGE_SIZES = [pytest.param((32, 32), id="native"), pytest.param((48, 24), id="tall"),
               pytest.param((21, 50), id="padded"), pytest.param((5, 7), id="one-patch")]


@torch.no_grad()
@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("path", clip.DENSE_PATHS)
def test_dense_features_equal_token_by_token(pair, path, size):
    """encode_dense equals each path's definition, also where positions are resampled and images padded."""
    ours, theirs = pair
    images = random_images(1, *size)
    assert relative(ours.encode_dense(images, path)[0], dense_by_hand(theirs, images[0], path)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("path", clip.DENSE_PATHS)
def test_dense_features_with_the_exact_gelu(path):
    """The same for weights that were trained with the exact GELU; QuickGELU gives other features."""
    theirs = open_clip_model(**TINY, activation="gelu")
    ours, wrong = (clip.build_model(theirs.state_dict(), activation=name) for name in ("gelu", "quickgelu"))
    images = random_images(1, 21, 50)
    expected = dense_by_hand(theirs, images[0], path)
    assert relative(ours.encode_dense(images, path)[0], expected) <= 1e-5
    assert relative(wrong.encode_dense(images, path)[0], expected) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("path", clip.DENSE_PATHS)
def test_dense_features_of_a_tower_without_its_clip(pair, path):
    """VisionTransformer has the same calls, to the bit: a tower of one's own needs no CLIP around it."""
    ours, _ = pair
    images, tower = random_images(2, 21, 50), copy.deepcopy(pair[0].visual)
    assert torch.equal(tower.encode_dense(images, path), ours.encode_dense(images, path))
    assert torch.equal(tower.encode_dense_paths(images, iter([path]))[path], ours.encode_dense(images, path))
    assert torch.equal(tower.encode_keys(images), ours.encode_keys(images))
    with pytest.raises(ValueError, match="value, residual, vanilla.*'values'"):
        tower.encode_dense(images, "values")


@torch.no_grad()
@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_keys_equal_token_by_token(pair, size):
    """encode_keys gives the last block's key of every patch, all heads together of length one."""
    ours, theirs = pair
    images, last = random_images(1, *size), theirs.visual.transformer.resblocks[-1]
    tokens = last.ln_1(tokens_by_hand(theirs, images[0]))[0, 1:]                                # (n, E)
    E = tokens.shape[-1]
    keys = [last.attn.in_proj_weight[E:2 * E] @ token + last.attn.in_proj_bias[E:2 * E] for token in tokens]
    expected = torch.stack([key / key.norm() for key in keys], dim=1)                           # (E, n)
    found = ours.encode_keys(images)[0]
    assert found.shape == (E, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    assert relative(found.flatten(start_dim=1), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_global_features_at_other_sizes(pair, size):
    """encode_image takes any size as encode_dense does: resampled positions, zero padding, class token."""
    ours, theirs = pair
    images, visual = random_images(1, *size), theirs.visual
    x = visual.transformer.resblocks[-1](tokens_by_hand(theirs, images[0]))
    assert relative(ours.encode_image(images), visual.ln_post(x[:, 0]) @ visual.proj) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quick_gelu_is_the_same_with_and_without_a_gradient(dtype):
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-39000.0, 39000.0])]).to(dtype)
    with_gradient, kept = clip.model.QuickGELU()(x), x.clone()
    with torch.no_grad():
        assert torch.equal(clip.model.QuickGELU()(x), with_gradient)
    assert torch.equal(x, kept)                 # it works in memory of its own
    assert torch.equal(with_gradient, x * torch.sigmoid(1.702 * x)) and with_gradient.isfinite().all()


def test_prompts_first_encoded_in_inference_mode_can_be_trained_later(pair):
    """What is kept of a class list between calls is no inference tensor, which no backward pass may hold."""
    ours, _ = pair
    prompt = torch.randn(4, ours.positional_embedding.shape[1])
    with torch.inference_mode():
        ours.encode_prompt(prompt, ["a name", "of its own"])
    prompt.requires_grad_()
    ours.encode_prompt(prompt, ["a name", "of its own"]).sum().backward()
    assert prompt.grad.abs().sum() > 0


@torch.no_grad()
def test_a_few_tokens_of_a_block_equal_the_whole_block(pair):
    """The last block runs for the tokens that are read, and gives for them what the whole block gives."""
    block = pair[0].visual.transformer.resblocks[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, pair[0].visual.conv1.out_channels, generator=generator)
    assert relative(block.only(x[:, :1], x), block(x)[:, :1]) <= 1e-6
    seen = (torch.rand(10, 10, generator=generator) < 0.5) | torch.eye(10, dtype=torch.bool)
    rows = torch.tensor([7, 2, 2])
    assert relative(block.only(x[:, rows], x, seen[rows]), block(x, seen=seen)[:, rows]) <= 1e-6


@pytest.mark.parametrize("path", clip.DENSE_PATHS)
def test_dense_features_of_a_batch(pair, path):
    """Images in a batch do not touch one another, and each patch's vector has length one."""
    ours, _ = pair
    images = random_images(3, 21, 50)
    together = ours.encode_dense(images, path)
    alone = torch.cat([ours.encode_dense(image[None], path) for image in images])
    assert together.shape == (3, TINY["embed_dim"], 3, 7)                        # ⌈21 / 8⌉ by ⌈50 / 8⌉
    assert relative(together, alone) <= 1e-5
    assert torch.allclose(together.norm(dim=1), torch.ones(3, 3, 7), atol=1e-6)


@torch.no_grad()
def test_dense_features_by_several_paths_are_those_of_each(pair):
    """One run of the image tower for all: the same bits as a call for each."""
    ours, _ = pair
    images = random_images(2, 21, 50)
    found = ours.encode_dense_paths(images, reversed(clip.DENSE_PATHS))
    assert list(found) == [*reversed(clip.DENSE_PATHS)]
    assert all(torch.equal(features, ours.encode_dense(images, path)) for path, features in found.items())


@torch.no_grad()
def test_dense_default_is_residual(pair):
    """Without a path, encode_dense takes the one that the published numbers were measured with."""
    ours, _ = pair
    images = random_images(1, 32, 32)
    assert torch.equal(ours.encode_dense(images), ours.encode_dense(images, path="residual"))


def test_dense_refuses_an_unknown_path(pair):
    """A misspelt path is an error that lists the three that exist, never a silent default."""
    ours, _ = pair
    with pytest.raises(ValueError, match="value, residual, vanilla.*'values'"):
        ours.encode_dense(random_images(1, 32, 32), path="values")


@torch.no_grad()
def test_patch_positions(pair):
    """The PE of Eq. 2: the stored numbers at the trained size, (E, h, w) with height first at any other."""
    ours, _ = pair
    stored = ours.visual.positional_embedding[1:]                                                    # (16, E)
    native = ours.visual.patch_positions(4, 4)
    assert torch.equal(native[:, 1, 3], stored[1 * 4 + 3])
    resampled = ours.visual.patch_positions(3, 7)
    expected = F.interpolate(native[None], size=(3, 7), mode="bicubic", align_corners=False)[0]
    assert resampled.shape == (TINY["width"], 3, 7) and relative(resampled, expected) <= 1e-6


# ------------------------------------------------------------- learned prompts, against all 77 places at once

def prompt_by_hand(theirs, prompt: torch.Tensor, class_names: list[str]) -> torch.Tensor:
    """encode_prompt as Eq. 1 reads: for every class all of [start][v_1]…[v_L][name][end][padding], (C, D)."""
    tokenizer, embedding = open_clip.tokenizer.SimpleTokenizer(), theirs.token_embedding
    sentences, ends = [], []
    for name in class_names:
        ids = torch.tensor([*tokenizer.encode(name), END])
        padding = torch.zeros(77 - 1 - len(prompt) - len(ids), dtype=torch.long)
        start = embedding(torch.tensor([START]))
        sentences.append(torch.cat([start, prompt, embedding(ids), embedding(padding)]))
        ends.append(1 + len(prompt) + len(ids) - 1)
    x = torch.stack(sentences) + theirs.positional_embedding                                     # (C, 77, Et)
    x = theirs.transformer(x, attn_mask=theirs.attn_mask)
    return theirs.ln_final(x[torch.arange(len(ends)), ends]) @ theirs.text_projection


def random_prompt(count: int, width: int = TINY["text_width"]) -> torch.Tensor:
    return 0.1 * torch.randn(count, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 16, 71])
def test_prompt_equals_all_77_places(pair, length):
    """The shared prefix gives the naive result for names of one to four tokens, up to a sentence of 77."""
    ours, theirs = pair
    assert [len(clip.encode(name)) for name in NAMES] == [1, 2, 3, 4, 3, 3]
    prompt = random_prompt(length)
    assert relative(ours.encode_prompt(prompt, NAMES), prompt_by_hand(theirs, prompt, NAMES)) <= 1e-5


@pytest.mark.parametrize("length", [3, 71])
def test_prompt_gradients_equal_all_77_places(length):
    """The gradients agree too, for the prompt and for every weight of the text tower (float64, to 1e-12)."""
    theirs = open_clip_model(**TINY).double()
    ours = clip.build_model(theirs.state_dict()).double()
    upstream = torch.randn(len(NAMES), TINY["embed_dim"], dtype=torch.float64)  # the loss's gradient for W_r
    gradients = []
    for model, features_of in ((ours, ours.encode_prompt), (theirs, lambda *a: prompt_by_hand(theirs, *a))):
        prompt = random_prompt(length).double().requires_grad_()
        weights = {name: parameter for name, parameter in model.named_parameters()
                   if not name.startswith("visual.") and name != "logit_scale"}
        features = features_of(prompt, NAMES)
        found = torch.autograd.grad(features, [prompt, *weights.values()], grad_outputs=upstream)
        gradients.append({"features": features.detach()} | dict(zip(["prompt", *weights], found)))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 31
    for name, expected in gradients[1].items():
        if name.endswith("in_proj_bias"):    # the keys' bias moves all scores alike: its gradient is rounding
            width = TINY["text_width"]
            assert gradients[0][name][width:2 * width].abs().max() < 1e-12
        assert relative(gradients[0][name], expected) <= 1e-12, name


@torch.no_grad()
def test_prompt_of_real_words_is_encode_text(pair):
    """If the "learned" vectors are the embeddings of words, encode_prompt is encode_text of the sentence."""
    ours, _ = pair
    prompt = ours.token_embedding(torch.tensor(clip.encode("a photo of a")))
    expected = ours.encode_text(clip.tokenize([f"a photo of a {name}" for name in NAMES]))
    assert relative(ours.encode_prompt(prompt, NAMES), expected) <= 1e-5


@torch.no_grad()
def test_prompt_of_one_class_alone(pair):
    """A class's text feature does not depend on which other classes, of whatever length, are in the list."""
    ours, _ = pair
    prompt = random_prompt(16)
    alone = torch.cat([ours.encode_prompt(prompt, [name]) for name in NAMES])
    assert relative(ours.encode_prompt(prompt, NAMES), alone) <= 1e-5


def test_prompt_room(pair):
    """prompt_room: 77 places less start, end and the longest name. Filled exactly works; one more fails."""
    ours, _ = pair
    assert ours.prompt_room(["cat"]) == 74
    assert ours.prompt_room(["cat", "potted plant"]) == 73                          # the paper's number
    assert ours.prompt_room(NAMES) == 71
    assert ours.prompt_room(["word " * 80]) == -5
    ours.encode_prompt(random_prompt(71), NAMES)
    with pytest.raises(ValueError, match=r"72 learned.*'a sleeping dog indoors' \(4 tokens\).*at most 71"):
        ours.encode_prompt(random_prompt(72), NAMES)


# -------------------------------------------------------------------------------------- the size of the paper

@pytest.mark.slow
@torch.no_grad()
def test_dense_features_and_prompt_at_full_size():
    """At the size of ViT-B/16 the value paths and the shared prefix agree with the slow computations."""
    theirs = open_clip_model(**VIT_B_16)
    ours = clip.build_model(theirs.state_dict())
    images = random_images(1, 120, 200)
    for path in ("value", "residual"):
        assert relative(ours.encode_dense(images, path)[0], dense_by_hand(theirs, images[0], path)) <= 1e-5
    prompt = random_prompt(71, width=512)
    assert relative(ours.encode_prompt(prompt, NAMES), prompt_by_hand(theirs, prompt, NAMES)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
def test_eps_of_the_released_image_tower(sizes):
    """The eps of the image tower's LayerNorm is 1e-6 in the authors' release, 1e-5 at OpenAI and here.

    What that changes, for random weights: python -m pytest tests/test_clip.py -k eps -s
    """
    model = clip.build_model(openai_state(**sizes))
    images = random_images(1, 336, 448)
    ours = {path: model.encode_dense(images, path) for path in clip.DENSE_PATHS}
    for module in model.visual.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5
            module.eps = 1e-6
    found = {path: relative(model.encode_dense(images, path), ours[path]) for path in clip.DENSE_PATHS}
    print("\neps 1e-6 in place of 1e-5, relative difference of the dense features:",
          ", ".join(f"{path} {value:.1e}" for path, value in found.items()))
    assert all(0 < value < 1e-4 for value in found.values())
