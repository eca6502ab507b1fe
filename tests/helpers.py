"""What several test files share: random CLIP weights, files in OpenAI's format, and a measure of difference.

Weights are random but never zero and never one: an initialisation that leaves biases at 0 and LayerNorm at 1 would hide
a forgotten bias or a swapped norm from every parity test.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

# Small enough for milliseconds, and no two sizes alike: a test cannot pass because two of them were confused.
TINY = dict(width=128, layers=3, patch=8, resolution=32, embed_dim=48, text_width=192, text_layers=2)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries. The shapes must agree: no silent broadcasting."""
    assert found.shape == expected.shape, f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}"
    return ((found - expected).norm() / expected.norm()).item()


def openai_shapes(*, width=768, layers=12, patch=16, resolution=224, embed_dim=512, text_width=512, text_layers=12,
                  text_vocab=49408) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a ViT CLIP, as OpenAI's release has them. The defaults are ViT-B/16."""
    shapes = {"positional_embedding": (77, text_width), "text_projection": (text_width, embed_dim), "logit_scale": (),
              "visual.class_embedding": (width,),
              "visual.positional_embedding": (1 + (resolution // patch) ** 2, width),
              "visual.proj": (width, embed_dim), "visual.conv1.weight": (width, 3, patch, patch),
              "token_embedding.weight": (text_vocab, text_width)}
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    for tower, E, depth in (("visual.", width, layers), ("", text_width, text_layers)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": E, f"{block}.ln_2": E}
            for layer, out, into in (("attn.in_proj_", 3 * E, E), ("attn.out_proj.", E, E),
                                     ("mlp.c_fc.", 4 * E, E), ("mlp.c_proj.", E, 4 * E)):
                shapes |= {f"{block}.{layer}weight": (out, into), f"{block}.{layer}bias": (out,)}
    return shapes | {f"{norm}.{part}": (E,) for norm, E in norms.items() for part in ("weight", "bias")}


def openai_state(*, seed=0, **sizes) -> dict[str, Tensor]:
    """A random float32 state dict under OpenAI's names; `sizes` as in `openai_shapes`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in openai_shapes(**sizes).items():
        # Matrices keep the size of what passes through them; vectors (biases, norms) get a noise one can see.
        std = 0.1 if len(shape) < 2 or "embedding" in name else math.prod(shape[1:]) ** -0.5
        middle = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 2.6 if name == "logit_scale" else 0.0
        state[name] = middle + std * torch.randn(shape, generator=generator)
    return state


def write_openai_archive(path: str | Path, *, width=768, layers=12, patch=16, resolution=224, embed_dim=512,
                         text_width=512, text_layers=12, seed=0, half=True, text_vocab=49408) -> dict[str, Tensor]:
    """Write a file in the format of OpenAI's release and return the float32 state dict that should come out of it.

    That is a TorchScript archive of a module tree with OpenAI's names. Besides the weights it holds, as theirs do, three
    sizes as buffers; and in the text tower's blocks the causal mask, which OpenAI's code keeps as a plain attribute: an
    archive stores such tensors too, though they are no weights, and a reader has to cope. `half` rounds to float16 what
    OpenAI rounds: matrices and their biases; norms, embeddings and logit_scale stay in float32.
    """
    state = openai_state(width=width, layers=layers, patch=patch, resolution=resolution, embed_dim=embed_dim,
                         text_width=text_width, text_layers=text_layers, text_vocab=text_vocab, seed=seed)
    if half:
        kept = ("ln_", "embedding", "logit_scale")
        state = {name: tensor if any(word in name for word in kept) else tensor.half() for name, tensor in state.items()}

    tree = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = tree
        for parent in parents:                              # make the modules on the way, as in `a.b.c.weight`
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(leaf, nn.Parameter(tensor))
    for name, value in (("input_resolution", resolution), ("context_length", 77), ("vocab_size", text_vocab)):
        tree.register_buffer(name, torch.tensor(value))
    for block in tree.transformer.resblocks.children():
        block.attn_mask = torch.full((77, 77), -math.inf).triu(diagonal=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # torch calls TorchScript deprecated; the files remain
        torch.jit.save(torch.jit.script(tree.eval()), str(path))
    return {name: tensor.float() for name, tensor in state.items()}
