"""CLIP: an image encoder and a text encoder that meet in one joint space. Plus the two calls that
segmentation needs and classification does not.

    encode_image   (B, 3, H, W)    → (B, D)         one vector per image      [Radford et al. 2021]
    encode_text    (N, 77)         → (N, D)         one vector per sentence   [Radford et al. 2021]
    encode_dense   (B, 3, H, W)    → (B, D, h, w)   one unit vector per patch [MaskCLIP, ECCV 2022]
    encode_prompt  (L, Et), names  → (C, D)         learned words + class names [ReCLIP++, Eq. 1]

The parameter names are those of OpenAI's release, so that its weights load strictly: no key is missing
and none is left over. Only the ViT family is here; the paper uses ViT-B/16.

    B images · N sentences · C classes · D joint dimension (512) · E ViT width (768) · Et text width (512)
    H,W pixels · h,w patches · n = h·w · T tokens · L learned prompt vectors (73)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokenizer import END, START, encode

DENSE_PATHS = ("value", "residual", "vanilla", "neighbourhood", "correlative")


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU: x · sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        gate = (1.702 * x).sigmoid_()
        # The same bits either way. A backward pass needs the gate. Without one, the result takes the gate's
        # memory: on a CPU, new memory takes longer than the product.
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


# What stands between the two layers of each MLP. Weights work with the one that they were trained with:
# OpenAI's with QuickGELU, most of LAION's, DataComp's and open_clip's with the exact GELU.
ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention, heads of 64 channels.

    The parameters are those of `nn.MultiheadAttention` (query, key and value stacked in one matrix). It is
    written out because MaskCLIP takes the values alone. The fused kernel never stores the attention weights.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, T, 64), of tokens x (B, T, E)."""
        B, T, E = x.shape
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias)             # (B, T, 3E)
        x = x.view(B, T, 3, self.heads, E // self.heads)                    # (B, T, 3, heads, 64)
        return x.permute(2, 0, 3, 1, 4).unbind(dim=0)                       # 3 × (B, heads, T, 64)

    def merge(self, x: Tensor) -> Tensor:
        """Heads back into channels and through the output projection: (B, heads, T, 64) → (B, T, E)."""
        return self.out_proj(x.transpose(1, 2).flatten(start_dim=2))

    def forward(self, x: Tensor, causal: bool, seen: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, T, E). `seen` (T, T) bool, in place of `causal`: what a token (row) attends to."""
        q, k, v = self.qkv(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal))

    def only(self, few: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """The same for a few of the tokens: queries of `few` (B, K, E), keys and values of x (B, T, E).

        Returns (B, K, E). `seen` is bool, of the shape of the scores (B, heads, K, T) or broadcast to it.
        """
        E = x.shape[-1]
        q = F.linear(few, self.in_proj_weight[:E], self.in_proj_bias[:E])                    # (B, K, E)
        k, v = F.linear(x, self.in_proj_weight[E:], self.in_proj_bias[E:]).chunk(2, dim=-1)  # (B, T, E)
        q, k, v = (part.unflatten(dim=2, sizes=(self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))

    def values(self, x: Tensor) -> Tensor:
        """Every token attends to itself alone: the projection of its own value. (B, T, E) → (B, T, E).

        This is what MaskCLIP's 1×1 convolutions do (Sec. 3.2 there). It needs no queries and no keys.
        """
        E = x.shape[-1]
        return self.out_proj(F.linear(x, self.in_proj_weight[2 * E:], self.in_proj_bias[2 * E:]))

    def keys(self, x: Tensor) -> Tensor:
        """Every token's key, all heads side by side, as a unit vector: (B, T, E) → (B, T, E)."""
        E = x.shape[-1]
        return F.normalize(F.linear(x, self.in_proj_weight[E:2 * E], self.in_proj_bias[E:2 * E]), dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, activation: str = "quickgelu"):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False, seen: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal, seen)
        return x + self.mlp(self.ln_2(x))

    def only(self, few: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """The block's output for `few` (B, K, E) of the tokens x (B, T, E); `seen` as in `Attention.only`."""
        few = few + self.attn.only(self.ln_1(few), self.ln_1(x), seen)
        return few + self.mlp(self.ln_2(few))


class Transformer(nn.Module):
    """A stack of blocks; `causal` lets a token see only what stands before it (the text tower)."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool = False,
                 activation: str = "quickgelu"):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    """The image tower. `forward` gives a vector per image, `encode_dense` one per patch."""

    def __init__(self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int,
                 output_dim: int, activation: str = "quickgelu"):
        super().__init__()
        self.input_resolution, self.patch_size = input_resolution, patch_size
        grid = input_resolution // patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1 + grid * grid, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation=activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, output_dim))

    def patch_positions(self, h: int, w: int) -> Tensor:
        """CLIP's positional embedding without the class token, resampled to a grid: (E, h, w).

        Bicubic, align_corners=False. This is the PE of Eq. 2, the only thing the spatial bias may depend on.
        """
        grid = math.isqrt(self.positional_embedding.shape[0] - 1)
        positions = self.positional_embedding[1:].T.unflatten(dim=1, sizes=(grid, grid))    # (E, grid, grid)
        if (h, w) == (grid, grid):
            return positions                    # nothing to resample
        return F.interpolate(positions[None], size=(h, w), mode="bicubic", align_corners=False)[0]

    def embed(self, images: Tensor) -> Tensor:
        """Patches plus class token, with their positions added: (B, 3, H, W) → (B, 1 + n, E).

        An image whose sides are no multiple of the patch is padded with zeros, that is with the mean colour
        of the normalised image, on the right and at the bottom: h = ⌈H / patch⌉, w = ⌈W / patch⌉.
        """
        _, _, H, W = images.shape
        images = F.pad(images, (0, -W % self.patch_size, 0, -H % self.patch_size))
        patches = self.conv1(images)                                                        # (B, E, h, w)
        patches = patches + self.patch_positions(*patches.shape[-2:])
        patches = patches.flatten(start_dim=2).transpose(1, 2)                              # (B, n, E)
        class_token = self.class_embedding + self.positional_embedding[0]
        class_token = class_token.to(patches.dtype).expand(len(images), 1, -1)              # (B, 1, E)
        return self.ln_pre(torch.cat([class_token, patches], dim=1))

    def pool(self, x: Tensor) -> Tensor:
        """The class token in the joint space: (B, T, E) → (B, D)."""
        return self.ln_post(x[:, 0]) @ self.proj

    def trunk(self, images: Tensor) -> Tensor:
        """All blocks but the last, which is where the calls differ: (B, 3, H, W) → (B, 1 + n, E)."""
        x = self.embed(images)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """One vector per image, not normalised: (B, 3, H, W) → (B, D)."""
        x, last = self.trunk(images), self.transformer.resblocks[-1]
        return self.pool(last.only(x[:, :1], x))        # exact: the last block's other outputs are never read

    def encode_dense(self, images: Tensor, path: str) -> Tensor:
        """`CLIP.encode_dense` of a tower by itself: (B, 3, H, W) → unit vectors (B, D, h, w)."""
        return self.encode_dense_paths(images, [path])[path]

    def encode_dense_paths(self, images: Tensor, paths: Iterable[str]) -> dict[str, Tensor]:
        """`encode_dense` by several paths for little more than the price of one: only the last block differs.

        Raises ValueError for a path that is not in DENSE_PATHS.
        """
        paths = list(paths)
        for path in paths:
            if path not in DENSE_PATHS:
                raise ValueError(f"encode_dense: expected a path of {', '.join(DENSE_PATHS)}; found "
                                 f"{path!r}.")
        x = self.trunk(images.to(self.proj.dtype))                                          # (B, 1 + n, E)
        grid = self.grid_of(images)
        features = {path: self.dense_alike(x, path, grid) if path in ("neighbourhood", "correlative")
                    else self.dense(x, path) for path in paths}
        features = {path: F.normalize(one.float(), dim=-1) for path, one in features.items()}   # (B, n, D)
        return {path: self.on_grid(one, images) for path, one in features.items()}

    def encode_keys(self, images: Tensor) -> Tensor:
        """`CLIP.encode_keys` of a tower by itself: (B, 3, H, W) → unit vectors (B, E, h, w)."""
        last = self.transformer.resblocks[-1]
        x = self.trunk(images.to(self.proj.dtype))                                          # (B, 1 + n, E)
        return self.on_grid(last.attn.keys(last.ln_1(x))[:, 1:].float(), images)

    def dense(self, x: Tensor, path: str) -> Tensor:
        """The last block, by one of three paths: x (B, 1 + n, E) of the trunk → (B, n, D), not normalised."""
        last = self.transformer.resblocks[-1]
        if path == "vanilla":
            x = last(x)[:, 1:]                  # what CLIP itself computes for its patch tokens
        else:
            x = x[:, 1:]                        # the class token adds nothing to a patch's own value
            value = last.attn.values(last.ln_1(x))
            if path == "value":                 # the text of both papers: the value path alone
                x = value
            else:                               # the released code: residual and MLP stay around it
                x = x + value
                x = x + last.mlp(last.ln_2(x))
        return self.ln_post(x) @ self.proj

    def dense_alike(self, x: Tensor, path: str, grid: tuple[int, int]) -> Tensor:
        """The last block where a patch takes the values of patches like itself: as `dense`, grid (h, w)."""
        last, x = self.transformer.resblocks[-1], x[:, 1:]
        q, k, v = last.attn.qkv(last.ln_1(x))                                   # 3 × (B, heads, n, 64)
        attend = F.scaled_dot_product_attention                     # (q, k, v) → softmax(q kᵀ / 8 + mask) v
        if path == "neighbourhood":
            x = last.attn.merge(attend(k, k, v, attn_mask=nearness(grid, k)))
        else:
            x = x + last.attn.merge(attend(q, q, v) + attend(k, k, v))
            x = x + last.mlp(last.ln_2(x))
        return self.ln_post(x) @ self.proj

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """How many patches (h, w) an image has, rounded up."""
        return tuple(-(-side // self.patch_size) for side in images.shape[-2:])

    def on_grid(self, x: Tensor, images: Tensor) -> Tensor:
        """The patches' vectors where the patches lie: (B, n, C) → (B, C, h, w)."""
        return x.transpose(1, 2).unflatten(dim=2, sizes=self.grid_of(images))


def nearness(grid: tuple[int, int], like: Tensor, spread: float = 5.0) -> Tensor:
    """exp(−d² / 2σ²) of every two patches d apart, σ = `spread` patches: grid (h, w) → (n, n), as `like`."""
    places = torch.cartesian_prod(*(torch.arange(side, device=like.device).float() for side in grid))
    squares = (places[:, None] - places).square().sum(dim=-1)                               # d² (n, n)
    return torch.exp(-squares / (2 * spread ** 2)).to(like.dtype)


@lru_cache(maxsize=8)                                           # every step of a training asks for the same
@torch.inference_mode(False)                                    # what is kept may be part of a training later
def in_one_sequence(names: tuple[str, ...], P: int, device: torch.device) \
        -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """C sentences of P shared tokens and a class name, laid out as one sequence: the P, then M of their own.

    Returns
        tokens (M,)             ids of name and end token, class after class
        place (M,)              the position of each in its own sentence
        end (C,)                where in the sequence each sentence is read
        seen (P + M, P + M)     bool: a token (row) attends to the shared tokens and to its own class, up to
                                itself
        longest                 the length of the longest name with its end token
    """
    own = [encode(name) + [END] for name in names]
    lengths = torch.tensor([len(tokens) for tokens in own])                             # (C,)
    end = lengths.cumsum(dim=0)                                                         # (C,)
    owner = torch.arange(len(names)).repeat_interleave(lengths)                         # (M,) whose token
    place = torch.arange(len(owner)) - (end - lengths)[owner]                           # (M,) 0, 1, …
    owner = torch.cat([owner.new_full((P,), -1), owner])                                # −1: everyone's
    seen = ((owner == owner[:, None]) | (owner == -1)).tril()
    tokens = torch.tensor([token for tokens in own for token in tokens])
    tokens, place, end, seen = (x.to(device) for x in (tokens, P + place, P + end - 1, seen))
    return tokens, place, end, seen, int(lengths.max())


class CLIP(nn.Module):
    """Both towers. Build it from a file with `clip.load`, which reads the sizes off the weights.

    `activation` is "quickgelu" or "gelu". It is no weight: the weights fit either and work with one.
    """

    def __init__(self, *, embed_dim: int, image_resolution: int, vision_layers: int, vision_width: int,
                 vision_patch_size: int, context_length: int, vocab_size: int, transformer_width: int,
                 transformer_heads: int, transformer_layers: int, activation: str = "quickgelu"):
        super().__init__()
        self.context_length, self.activation = context_length, activation
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width, vision_layers,
                                        heads=vision_width // 64, output_dim=embed_dim, activation=activation)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, causal=True,
                                       activation=activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialize()

    def initialize(self) -> None:
        """The initialisation of CLIP's paper (Sec. 2.4, after GPT-2): narrower for deeper towers."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.transformer.resblocks[0].ln_1.weight.numel() ** -0.5)
        for tower in (self.transformer, self.visual.transformer):
            width, depth = tower.resblocks[0].ln_1.weight.numel(), len(tower.resblocks)
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)
                nn.init.zeros_(block.attn.out_proj.bias)

    @property
    def device(self) -> torch.device:
        return self.positional_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.positional_embedding.dtype

    # ------------------------------------------------------------------ what OpenAI's CLIP does

    def encode_image(self, images: Tensor) -> Tensor:
        """One vector per image, not normalised: (B, 3, H, W) → (B, D).

        At the training resolution (`model.visual.input_resolution`) this is OpenAI's call. Other sizes work
        too: the positional embedding is resampled as in `encode_dense`.
        """
        return self.visual(images.to(self.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """One vector per sentence, not normalised: (N, 77) token ids → (N, D), read at the end token.

        The tower is causal: what stands behind the end token changes nothing. So the batch is cut to its
        longest sentence, which is exact, and several times cheaper for class names. The last block runs for
        all tokens, unlike the image tower's: `Block.only` rounds differently, and a CLIP that was trained
        through this call could not be trained again to the same bits.
        """
        end = tokens.argmax(dim=-1)                             # the end token has the largest id of all
        T = int(end.max()) + 1
        x = self.token_embedding(tokens[:, :T]) + self.positional_embedding[:T]             # (N, T, Et)
        x = self.transformer(x)
        x = x[torch.arange(len(x), device=x.device), end]                                   # (N, Et)
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines, `(logits_per_image (B, N), logits_per_text (N, B))`."""
        image_features = F.normalize(self.encode_image(images), dim=-1)
        text_features = F.normalize(self.encode_text(tokens), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    # ------------------------------------------------------------------ what segmentation adds

    def encode_dense(self, images: Tensor, path: str = "residual") -> Tensor:
        """One unit vector per patch: (B, 3, H, W) at any size → (B, D, h, w), with h = ⌈H / patch⌉.

        `path` names the way through the last block (ReCLIP++ Sec. III-A, MaskCLIP Sec. 3.2):

        value      every patch keeps its own value; no residual, no MLP. What both papers write.
        residual   the same value inside the block's residual and MLP. What the released code of MaskCLIP and
                   ReCLIP computes and what their published numbers were measured with: the default.
        vanilla    the block as CLIP runs it. Attention mixes the patches: the baseline that MaskCLIP mends.
        neighbourhood   a patch takes the values of patches with like keys, near ones first; no residual, no
                   MLP. After NACLIP [Hajimiri et al., WACV 2025]: softmax(k kᵀ / 8 + nearness) v.
        correlative   the values of patches with like queries plus those of patches with like keys, inside
                   residual and MLP. After SCLIP [Wang et al., ECCV 2024]: (softmax(q qᵀ / 8) +
                   softmax(k kᵀ / 8)) v.

        The last two leave the class token out [ours]. paper/results/ says what they are worth in Toyland.
        Raises ValueError for another path.
        """
        return self.visual.encode_dense(images, path)

    def encode_dense_paths(self, images: Tensor, paths: Iterable[str]) -> dict[str, Tensor]:
        """`encode_dense` by several paths for little more than the price of one (see `VisionTransformer`)."""
        return self.visual.encode_dense_paths(images, paths)

    def encode_keys(self, images: Tensor) -> Tensor:
        """The last block's key of every patch, a unit vector: (B, 3, H, W) → (B, E, h, w).

        For MaskCLIP's key smoothing. Normalised over the channels, as in the paper's equation; MaskCLIP's
        code normalises over the patches.
        """
        return self.visual.encode_keys(images)

    def prompt_room(self, class_names: list[str]) -> int:
        """How many learned vectors fit before the longest name: 77 − start − name − end. None: 0 or less."""
        return self.context_length - 2 - max(len(encode(name)) for name in class_names)

    def encode_prompt(self, prompt: Tensor, class_names: list[str]) -> Tensor:
        """The text features of `[start][v_1]…[v_L][class name][end]` for every class, not normalised.

        Eq. 1, Sec. III-B. prompt (L, Et): learned word embeddings, shared by all classes. Returns (C, D).
        Raises ValueError when a name does not fit behind L vectors: its end token, where the sentence is
        read, would lie beyond the 77 positions (the released code then reads at a wrong place).

        All sentences begin with the same 1 + L tokens, and a causal tower computes those without looking at
        what follows. So all classes run as one sequence (`in_one_sequence`): the shared prefix once, then the
        tokens of each class, each at the position it has in its own sentence. They see the prefix and their
        own class up to themselves, no other class. The sums are those of the naive way, over 13 times fewer
        tokens for the 20 classes of VOC, 28 times fewer for the 150 of ADE20K.
        """
        P = 1 + len(prompt)
        tokens, place, end, seen, longest = in_one_sequence(tuple(class_names), P, self.device)
        if P + longest > self.context_length:
            worst = max(class_names, key=lambda name: len(encode(name)))
            raise ValueError(
                f"encode_prompt: {P - 1} learned vectors and the class name {worst!r} ({longest - 1} tokens) "
                f"need {P + longest} positions; CLIP has {self.context_length}. Use at most "
                f"{self.prompt_room(class_names)} vectors or a shorter name.")
        prefix = torch.cat([self.token_embedding.weight[START:START + 1], prompt])          # (P, Et)
        prefix = prefix + self.positional_embedding[:P]                                     # (P, Et)
        suffix = self.token_embedding(tokens) + self.positional_embedding[place]            # (M, Et)
        x = torch.cat([prefix, suffix])[None]                                               # (1, P + M, Et)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, seen=seen)
        x = last.only(x[:, end], x, seen[end])          # (1, C, Et), exact: its other outputs are never read
        return self.ln_final(x[0]) @ self.text_projection
