"""What checks and hidden tests work with: a small CLIP, stand-ins for functions, and a closer look at a
result.

No check depends on another exercise: what a function calls that is an exercise itself gets a stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def module(file: str):
    """"clip/model.py" → the module clip.model."""
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, dim: int = -1, seed: int = 0) -> Tensor:
    return F.normalize(numbers(*shape, seed=seed), dim=dim)


@functools.lru_cache(maxsize=4)
def tiny_clip(seed: int = 0):
    """A CLIP of the smallest sizes, D = 24, E = 128, Et = 64. No weight is zero, no scale one, no size twice.
    """
    model = module("clip/model.py").CLIP(
        embed_dim=24, image_resolution=32, vision_layers=2, vision_width=128, vision_patch_size=8,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        small = 0.1 if parameter.dim() < 2 or "embedding" in name else parameter[0].numel() ** -0.5
        middle = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        parameter.data = middle + small * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def tokens_seen(model):
    """Counts the tokens that the text tower's first block normalises, in a list with one number."""
    seen = [0]
    first = model.transformer.resblocks[0].ln_1
    hook = first.register_forward_hook(lambda _, given,
                                       __: seen.__setitem__(0, seen[0] + given[0][..., 0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------ stand-ins


class FixedText:
    """In the place of a CLIP: `encode_prompt` gives one matrix, and notes what it was asked."""

    def __init__(self, features: Tensor):
        self.features, self.asked = features, []

    def encode_prompt(self, prompt: Tensor, class_names: list[str]) -> Tensor:
        self.asked.append((prompt, class_names))
        return self.features + 0 * prompt.sum()


class StandIns:
    """Simple parts in the place of Eq. 1 to 7, for `train_step`: they write down what they are given.

    None of them computes what the real one does; each result differs with each argument.
    """

    def __init__(self, D: int, E: int):
        self.D, self.E, self.given = D, E, {}
        self.prompt = nn.Parameter(numbers(5, 7, seed=1))
        self.visual = self

    def note(self, name: str, **arguments) -> None:
        self.given.setdefault(name, []).append(arguments)

    # ---- as clip_model.visual
    def patch_positions(self, h: int, w: int) -> Tensor:
        self.note("patch_positions", h=torch.tensor(h), w=torch.tensor(w))
        return numbers(self.E, h, w, seed=2)

    # ---- as the rectifier
    def bias(self, positions: Tensor, reference: Tensor) -> Tensor:
        self.note("bias, Eq. 2", positions=positions, reference=reference)
        return positions.mean(dim=0) * reference.mean(dim=1)[:, None, None]

    def subtract(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        self.note("subtract, Eq. 3", features=features, query=query, bias=bias)
        return features.mean(dim=1, keepdim=True) * query.sum(dim=1)[:, None, None] + 0.3 * bias

    def decoder(self, features: Tensor, logits: Tensor) -> Tensor:
        self.note("decoder, Eq. 4", features=features, logits=logits)
        return 1.7 * logits + features.amax(dim=1, keepdim=True)

    def __call__(self, features: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        return self.decoder(features, self.subtract(features, query, bias))

    # ---- as functions of rectify.py
    def reference_features(self, clip_model, prompt: Tensor, class_names: list[str]) -> Tensor:
        self.note("reference_features, Eq. 1", prompt=prompt,
                  names=torch.tensor([len(one) for one in class_names]))
        return numbers(len(class_names), self.D, seed=3) + prompt.mean()

    def rectified_masks(self, decoded: Tensor, scale: float, uniform: Tensor) -> Tensor:
        self.note("rectified_masks, Eq. 5", decoded=decoded, scale=torch.tensor(float(scale)),
                  uniform=uniform)
        return decoded * scale + uniform

    def multi_label_hypothesis(self, votes: Tensor, threshold: float) -> Tensor:
        self.note("multi_label_hypothesis, Eq. 6", votes=votes, threshold=torch.tensor(float(threshold)))
        return votes >= threshold

    def loss(self, features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor,
             scale: float) -> Tensor:
        self.note("the loss, Eq. 7", features=features, masks=masks, query=query, hypothesis=hypothesis,
                  scale=torch.tensor(float(scale)))
        return (masks * features.mean(dim=1,
                                      keepdim=True)).mean() * scale + query.mean() + hypothesis.float().mean()


@contextlib.contextmanager
def in_place(module, **parts):
    """A module with other functions for a moment."""
    before = {name: getattr(module, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(module, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(module, name, part)


def step(B: int, C: int, D: int, h: int, w: int, seed: int = 0, **recipe):
    """`train_step` among stand-ins: (the stand-ins with what they were given, the loss)."""
    rectify = module("rectify.py")
    parts = StandIns(D, E=6)
    numbers_of = dict(mask_scale=2.5, loss_scale=11.0, vote_threshold=0.2) | recipe
    votes = numbers(B, C, seed=seed + 1).softmax(dim=1)
    names = ["cat", "potted plant", "airplane", "sky", "wall"][:C]
    with in_place(rectify, reference_features=parts.reference_features, rectified_masks=parts.rectified_masks,
                  multi_label_hypothesis=parts.multi_label_hypothesis):
        loss = rectify.train_step(parts, parts, numbers(B, D, h, w, seed=seed), votes,
                                  numbers(C, D, seed=seed + 2),
                                  names, rectify.Recipe(**numbers_of), torch.Generator().manual_seed(seed),
                                  parts.loss)
    return parts, loss


# ------------------------------------------------------------------------------------------ a closer look


def differs(found, expected: Tensor, least: float = 1e-4) -> str | None:
    """What is wrong with a result, in words that help; None if nothing is."""
    if not isinstance(found, Tensor):
        return f"expected a tensor, found {type(found).__name__}"
    if found.shape != expected.shape:
        swapped = sorted(found.shape) == sorted(expected.shape) and found.dim() == expected.dim()
        return (f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}"
                + (": are two axes swapped?" if swapped else ""))
    if found.is_floating_point() != expected.is_floating_point() or (found.dtype == torch.bool) \
            != (expected.dtype == torch.bool):
        return f"expected numbers of the kind {expected.dtype}, found {found.dtype}"
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.equal(found.isnan(), expected.isnan()):
        return "expected NaN where there is nothing to divide by, and nowhere else" \
            if expected.isnan().any() else "found NaN"
    found, expected = found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    off = (found - expected).norm().item()
    size = max(expected.norm().item(), 1e-6)
    if off <= least * size + 1e-7:
        return None
    if found.numel() == 1:
        text = f"expected {expected.item():.4g}, found {found.item():.4g}"
    else:
        text = f"the numbers differ by {100 * off / size:.3g} %"
    if (found + expected).norm() <= least * size:
        return f"{text}: the sign is turned"
    factor = (found.flatten() @ expected.flatten() / (expected.flatten() @ expected.flatten())).item() \
        if expected.any() else 0.0
    if factor and (found - factor * expected).norm() <= least * abs(factor) * size and found.numel() > 1:
        return f"{text}: all are {factor:.4g} times what is expected; is something not normalised, or twice?"
    if found.numel() == 1 and expected.item() and (ratio := found.item() / expected.item()) \
            and abs(ratio - round(ratio)) < 1e-4 and abs(ratio) > 1.5:
        return f"{text}: {round(ratio)} times as much; a sum where a mean belongs?"
    for a in range(found.dim()):
        for b in range(a):
            turned = found.transpose(a, b)
            if turned.shape == expected.shape and (turned - expected).norm() <= least * size:
                return f"{text}: axes {b} and {a} are swapped"
    shift = found - expected
    if found.numel() > 1 and (shift - shift.mean()).norm() <= least * size:
        return f"{text}: all are off by {shift.mean().item():.4g}"
    if found.dim() > 1 and found.shape[-1] > 1:
        rows = F.normalize(found, dim=-1), F.normalize(expected, dim=-1)
        if (rows[0] - rows[1]).norm() <= least * max(rows[1].norm().item(), 1e-6):
            return f"{text}: every row points the right way but has another length; look at the normalisation"
    return text
