"""Eq. 6's windows in one pass: a class token for each window, all in one look of CLIP at the whole image.

    python paper/run.py one-pass-windows --out runs-one-pass
    python paper/windows.py                    times both ways at ViT-B/16's size, with random weights

Eq. 6 asks CLIP about every window as an image of its own: 121 forward passes an image for r = 1/6. MAFT's
image encoder reads any number of masks in one pass; here the masks are the windows. Patches attend to patches
alone; the class token of a window attends to itself and to the patches of that window.

    K windows · n = h·w patches · D joint dimension (512) · E ViT width (768)
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import torch
from torch import Tensor
from tqdm import tqdm

import clip
import data
import rectify
from harness import machine


def patches_of_windows(H: int, W: int, patch: int, ratio: float) -> Tensor:
    """Which patches lie in which window: (K, n) bool, in the order of `rectify.windows`.

    A patch belongs to a window that holds at least half as much of it as of any: half of it, where windows
    are larger than a patch. So no window is empty.
    """
    h, w = -(-H // patch), -(-W // patch)
    number = torch.arange(h * w).view(1, h, w).repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    inside = rectify.windows(number[:, :H, :W], ratio).flatten(start_dim=1)                 # (K, pixels)
    pixels = torch.zeros(len(inside), h * w).scatter_add_(1, inside, torch.ones(inside.shape))
    return pixels >= pixels.amax(dim=1, keepdim=True) / 2


def window_features(visual: clip.model.VisionTransformer, image: Tensor, inside: Tensor,
                    split: int) -> Tensor:
    """One vector for each window of an image (3, H, W), not normalised: inside (K, n) bool → (K, D).

    Before block `split` there is CLIP's one class token, and all is as CLIP has it; from there on it is K.
    """
    *blocks, last = visual.transformer.resblocks
    x, (K, n) = visual.embed(image[None]), inside.shape                                     # (1, 1 + n, E)
    for block in blocks[:split]:
        x = block(x)
    of_tokens = torch.cat([torch.eye(K, dtype=torch.bool, device=x.device), inside], dim=1)     # (K, K + n)
    of_patches = (torch.arange(K + n, device=x.device) >= K).expand(n, -1)                      # (n, K + n)
    seen = torch.cat([of_tokens, of_patches])
    x = torch.cat([x[:, :1].expand(-1, K, -1), x[:, 1:]], dim=1)                            # (1, K + n, E)
    for block in blocks[split:]:
        x = block(x, seen=seen)
    return visual.ln_post(last.only(x[:, :K], x, of_tokens)[0]) @ visual.proj


def one_pass(late: bool = False, magnify: float = 1.0):
    """A system's `votes`: those of the windows of `rectify.count_votes`, from one pass an image.

    late: the class token splits at the last block, not at the first. magnify: of the recipe's short side.
    """
    @torch.no_grad()
    def one_pass_votes(setup: data.Setup, query: Tensor, recipe: rectify.Recipe) -> Tensor:
        visual, rows = setup.clip_model.visual, []
        split = len(visual.transformer.resblocks) - 1 if late else 0
        whole = data.WholeImages(setup.training_images, round(recipe.short_side * magnify))
        loader = torch.utils.data.DataLoader(whole, batch_size=None, num_workers=setup.workers)
        for _, image in tqdm(loader, desc="hypotheses", unit="image"):
            inside = patches_of_windows(*image.shape[1:], visual.patch_size, recipe.window_ratio)
            with machine.autocast(setup.device, setup.precision):
                features = window_features(visual, image.to(setup.device), inside.to(setup.device), split)
            rows.append(rectify.window_votes(features.float(), query).cpu())                # (C,)
        return torch.stack(rows)
    one_pass_votes.__name__ += f" {late} {magnify:g}"       # votes are stored under it
    return one_pass_votes


@torch.no_grad()
def main() -> None:
    """Print the seconds that an image of 336 × 448 takes with 121 passes and with one."""
    model = clip.CLIP(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768,
                      vision_patch_size=16, context_length=77, vocab_size=1, transformer_width=64,
                      transformer_heads=1, transformer_layers=1).eval()
    image, ratio, seconds = torch.rand(3, 336, 448), 1 / 6, []

    def crops() -> None:
        for piece in rectify.at_input_size(image, ratio, 224).chunk(4):
            model.encode_image(piece)

    def one() -> None:
        window_features(model.visual, image, patches_of_windows(336, 448, 16, ratio), 0)

    for run in (one, crops, one):                               # the first is for memory and caches
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(f"121 passes {seconds[1]:.1f} s, one pass {seconds[2]:.2f} s: {seconds[1] / seconds[2]:.0f} times "
          f"as fast, {torch.get_num_threads()} thread(s).")


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main()
