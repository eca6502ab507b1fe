"""The steps of both stages as one writes them first: the measure for what the project's own steps save.

Same weights, same numbers, same libraries; tests/test_benchmark.py holds loss, gradients, votes, predictions
and queries against the project's. What differs is how much is computed for them, and each such choice is
marked "Plain:". None is foolish: every one is either the equation taken at its word or what the nearest
building block of torch does.

    B images · C classes · D joint dimension (512) · E ViT width (768) · Et text width (512)
    H,W pixels · h,w patches · n = h·w · L learned prompt vectors (73) · T = 77 tokens
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import distill
import rectify
from clip.tokenizer import END, START
from datasets import IGNORE
from datasets.images import read_image
from datasets.words import Vocabulary

# ------------------------------------------------------------------------------------------ CLIP


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)                     # Plain: a new tensor at each of three steps.


class Block(nn.Module):
    """Pre-norm transformer block around torch's own attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        # Plain: torch's default (need_weights=True) writes every head's (T, T) attention weights to memory.
        x = x + self.attn(normed, normed, normed, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, E) → what enters the last block, and what leaves it: both (B, T, E)."""
        for block in self.resblocks:
            x_before = x
            x = block(x, mask)
        return x_before, x


class Vision(nn.Module):
    """The image tower: one forward, from which the class token and the dense features are both read."""

    def __init__(self, width: int, layers: int, patch: int, tokens: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, layers)
        self.proj = nn.Parameter(torch.empty(width, dim))

    def patch_positions(self, h: int, w: int) -> Tensor:
        """(E, h, w): the positional embedding without the class token, resampled."""
        grid = math.isqrt(len(self.positional_embedding) - 1)
        positions = self.positional_embedding[1:].T.reshape(1, -1, grid, grid)
        return F.interpolate(positions, size=(h, w), mode="bicubic", align_corners=False)[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → tokens before and after the last block, (B, 1 + n, E) each."""
        patch = self.conv1.kernel_size[0]
        images = F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch))
        patches = self.conv1(images)                                                        # (B, E, h, w)
        patches = patches + self.patch_positions(*patches.shape[-2:])
        patches = patches.flatten(start_dim=2).transpose(1, 2)                              # (B, n, E)
        first = (self.class_embedding + self.positional_embedding[0]).to(patches.dtype)
        first = first.expand(len(images), 1, -1)
        # Plain: the whole last block for all tokens, whether its class token or its values are wanted.
        return self.transformer(self.ln_pre(torch.cat([first, patches], dim=1)))


class CLIP(nn.Module):
    """Both towers, under OpenAI's parameter names."""

    def __init__(self, model: clip.CLIP):
        """The sizes and the weights of `model`; the tensors are shared, not copied."""
        super().__init__()
        width, dim = model.visual.proj.shape
        vocabulary, text_width = model.token_embedding.weight.shape
        with torch.device("meta"):                                      # no weights of its own
            self.visual = Vision(width, len(model.visual.transformer.resblocks), model.visual.patch_size,
                                 len(model.visual.positional_embedding), dim)
            self.transformer = Tower(text_width, len(model.transformer.resblocks))
            self.token_embedding = nn.Embedding(vocabulary, text_width)
            self.positional_embedding = nn.Parameter(torch.empty(model.context_length, text_width))
            self.ln_final = nn.LayerNorm(text_width)
            self.text_projection = nn.Parameter(torch.empty(text_width, dim))
            self.logit_scale = nn.Parameter(torch.empty(()))
        self.load_state_dict(model.state_dict(), assign=True)
        self.eval().requires_grad_(False)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D)."""
        _, x = self.visual(images)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_dense(self, images: Tensor, path: str) -> Tensor:
        """(B, 3, H, W) → (B, D, h, w), unit vectors; `path` as in `clip.CLIP.encode_dense`."""
        patch = self.visual.conv1.kernel_size[0]
        h, w = math.ceil(images.shape[-2] / patch), math.ceil(images.shape[-1] / patch)
        x, after = self.visual(images)
        last, E = self.visual.transformer.resblocks[-1], x.shape[-1]
        value = last.attn.out_proj(F.linear(last.ln_1(x), last.attn.in_proj_weight[2 * E:],
                                            last.attn.in_proj_bias[2 * E:]))
        if path == "vanilla":
            x = after
        elif path == "residual":
            x = x + value
            x = x + last.mlp(last.ln_2(x))
        else:
            x = value
        x = F.normalize((self.visual.ln_post(x[:, 1:]) @ self.visual.proj).float(), dim=-1)   # (B, n, D)
        return x.transpose(1, 2).reshape(len(images), -1, h, w)

    def encode_embedded(self, x: Tensor, end: Tensor) -> Tensor:
        """Word vectors (N, T, Et), read at the places `end` (N,) → (N, D)."""
        T = x.shape[1]
        mask = torch.full((T, T), -math.inf, device=x.device).triu(diagonal=1)
        _, x = self.transformer(x + self.positional_embedding, mask)
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, 77) → (N, D). Plain: all 77 positions, as OpenAI's own code runs them."""
        return self.encode_embedded(self.token_embedding(tokens), tokens.argmax(dim=-1))

    def encode_prompt(self, prompt: Tensor, class_names: list[str]) -> Tensor:
        """Eq. 1, prompt (L, Et) → (C, D). Plain: each sentence in full, 77 tokens, with its gradient."""
        L, rows = len(prompt), []
        for name in class_names:
            ids = [START, *[0] * L, *clip.encode(name), END]
            rows.append(ids + [0] * (self.positional_embedding.shape[0] - len(ids)))
        tokens = torch.tensor(rows, device=prompt.device)                                   # (C, T)
        x = self.token_embedding(tokens)                                                    # (C, T, Et)
        x = torch.cat([x[:, :1], prompt.expand(len(tokens), -1, -1), x[:, 1 + L:]], dim=1)
        return self.encode_embedded(x, tokens.argmax(dim=-1))


# ------------------------------------------------------------------------------------------ stage 1


@torch.no_grad()
def query_features(model: CLIP, vocabulary: Vocabulary) -> Tensor:
    """W_q (C, D)."""
    rows = []
    for names in vocabulary.synonyms:
        tokens = clip.tokenize([template.format(name) for name in names for template in vocabulary.templates])
        features = F.normalize(model.encode_text(tokens.to(model.text_projection.device)).float(), dim=-1)
        rows.append(F.normalize(features.mean(dim=0), dim=-1))
    return torch.stack(rows)


def reference_features(model: CLIP, prompt: Tensor, class_names: list[str]) -> Tensor:
    """W_r (C, D), Eq. 1."""
    reference = model.encode_prompt(prompt, class_names).float()
    return reference / reference.norm()


def decoded_logits(model: CLIP, rectifier: rectify.Rectifier, features: Tensor, query: Tensor,
                   class_names: list[str]) -> Tensor:
    """M_o (B, C, h, w) of features (B, D, h, w): Eq. 1 to 4.

    Plain: the one forward of training and of test; Reference and bias are computed again for every image.
    """
    reference = reference_features(model, rectifier.prompt, class_names)                            # Eq. 1
    positions = model.visual.patch_positions(*features.shape[-2:])
    with torch.autocast(features.device.type, enabled=False):                               # as the project's
        bias = torch.einsum("dhw,cd->chw", rectifier.projection(positions[None])[0], reference)     # Eq. 2
        rectified = torch.einsum("bdhw,cd->bchw", features, query) - bias                           # Eq. 3
    return rectifier.decoder(features, rectified)                                                   # Eq. 4


def gumbel_masks(decoded: Tensor, scale: float, noise: torch.Generator) -> Tensor:
    """M̂ (B, C, h, w), one 1 per patch, straight-through: Eq. 5."""
    uniform = torch.rand(decoded.shape, generator=noise, device=decoded.device).clamp(min=1e-10)
    gumbel = -(-uniform.log()).clamp(min=1e-10).log()
    soft = (scale * decoded.float() + gumbel).softmax(dim=1)
    hard = F.one_hot(soft.argmax(dim=1), soft.shape[1]).movedim(-1, 1)
    return hard + soft - soft.detach()


def hypothesis_of(votes: Tensor, threshold: float) -> Tensor:
    """H (B, C) bool of votes f (B, C): Eq. 6."""
    hypothesis = votes > threshold
    for b in range(len(votes)):
        if not hypothesis[b].any():
            hypothesis[b, votes[b].argmax()] = True
    return hypothesis


def contrastive_loss(features: Tensor, masks: Tensor, query: Tensor, hypothesis: Tensor,
                     scale: float) -> Tensor:
    """Eq. 7. Plain: a loop over the classes of each image's hypothesis."""
    losses = []
    with torch.autocast(features.device.type, enabled=False):
        for b in range(len(features)):
            of_image = []
            for k in hypothesis[b].nonzero().flatten().tolist():
                pooled = (masks[b, k] * features[b]).mean(dim=(1, 2))                               # Z_g (D,)
                logits = scale * query @ pooled                                                     # (C,)
                of_image.append(F.cross_entropy(logits, torch.tensor(k, device=logits.device)))
            losses.append(torch.stack(of_image).mean())
    return torch.stack(losses).mean()


def rectify_step(rectifier: rectify.Rectifier, model: CLIP, images: Tensor, votes: Tensor, query: Tensor,
                 class_names: list[str], recipe: rectify.Recipe, noise: torch.Generator) -> Tensor:
    """The loss of one batch, as the loop of `rectify.main`: Z of the images, then `rectify.train_step`."""
    with torch.no_grad():
        features = model.encode_dense(images, recipe.dense_path)
    decoded = decoded_logits(model, rectifier, features, query, class_names)
    masks = gumbel_masks(decoded, recipe.mask_scale, noise)
    hypothesis = hypothesis_of(votes, recipe.vote_threshold)
    return contrastive_loss(features, masks, query, hypothesis, recipe.loss_scale)


@torch.no_grad()
def count_votes(model: CLIP, query: Tensor, images: dict[str, Path], short_side: int, ratio: float) -> Tensor:
    """f(k) of every image, (images, C), as `rectify.count_votes`. Plain: windows are run one by one."""
    device = model.text_projection.device
    size = math.isqrt(len(model.visual.positional_embedding) - 1) * model.visual.conv1.kernel_size[0]
    rows = []
    for path in images.values():
        image = data.to_tensor(data.short_side_to(read_image(path), short_side)).to(device)
        counts = torch.zeros(len(query))
        for window in rectify.windows(image, ratio):
            window = F.interpolate(window[None], size=(size, size), mode="bicubic", antialias=True)
            counts[(model.encode_image(window).float() @ query.T).argmax().item()] += 1
        rows.append(counts / counts.sum())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------ stage 2


def distill_step(student: distill.Student, rectifier: rectify.Rectifier, model: CLIP, images: Tensor,
                 votes: Tensor, query: Tensor, class_names: list[str], teacher_recipe: rectify.Recipe,
                 recipe: distill.Recipe, noise: torch.Generator) -> Tensor:
    """The loss of one batch, teacher and student, as `distill.teach` and `distill.train_step`.

    The student's network is torchvision's ResNet with four convolutions: there is no plainer one. Plain: the
    teacher is called as it is at test, Reference and bias with it.
    """
    with torch.no_grad():
        teacher_features = model.encode_dense(images, teacher_recipe.dense_path)
        teacher_logits = decoded_logits(model, rectifier, teacher_features, query, class_names)
    features = student.network(images)                                                      # Ẑ (B, D, h, w)
    logits = student.head(features)                                                         # M^D (B, C, h, w)
    size = features.shape[-2:]
    teacher_logits = F.interpolate(teacher_logits, size=size, mode="bilinear", align_corners=False)
    teacher_features = F.interpolate(teacher_features, size=size, mode="bilinear", align_corners=False)
    pseudo_label = teacher_logits.argmax(dim=1)
    of_masks = F.cross_entropy(logits.float(), pseudo_label)                                        # Eq. 8
    of_features = F.l1_loss(features, teacher_features)                                             # Eq. 9
    masks = gumbel_masks(logits, teacher_recipe.mask_scale, noise)
    hypothesis = hypothesis_of(votes, teacher_recipe.vote_threshold)
    of_text = contrastive_loss(features, masks, query, hypothesis, teacher_recipe.loss_scale)       # L_text
    return of_masks + recipe.feature_weight * of_features + recipe.text_weight * of_text


# ------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate_image(rectifier: rectify.Rectifier, model: CLIP, image: Tensor, true_label: Tensor,
                   query: Tensor, class_names: list[str],
                   path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An image (1, 3, h, w), its label (H, W) → for each stage classes (H, W) and confusion matrix (C, C).

    Plain: every stage starts from the pixels; the label stays on the CPU, the prediction comes to it, and
    numpy counts.
    """
    truth, C, found = true_label.numpy(), len(query), {}
    counted = truth != IGNORE
    for stage in ("vanilla", "maskclip", "rectify"):
        features = model.encode_dense(image, "vanilla" if stage == "vanilla" else path)
        if stage == "rectify":
            logits = decoded_logits(model, rectifier, features, query, class_names).float()
        else:
            logits = torch.einsum("bdhw,cd->bchw", features.float(), query)
        up = F.interpolate(logits, size=tuple(true_label.shape), mode="bilinear", align_corners=False)
        predicted = up.argmax(dim=1)[0].cpu().numpy()
        pairs = truth[counted] * C + predicted[counted]
        found[stage] = predicted, np.bincount(pairs, minlength=C * C).reshape(C, C)
    return found
