"""What the bias map of a trained rectification says of classes and of places, and what it is worth at test.

    python paper/bias.py runs runs-without-decoder    folders that --out named

A line for each:

    alike      mean cosine between the rows of W_r: 1 is one Reference for all classes
    places     standard deviation over places of M_b's mean over classes, which changes no patch's best class
    classes    standard deviation over classes of M_b's mean over places: class-preference bias (Sec. III-B)
    rest       what is neither: a class's own preference of places
    mIoU       of rectified masks, and with the bias left out at test, without training again (percent)

Opens labels of the split that is measured. Writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("out", nargs="+", metavar="RUN", help="run folders")
    common.split_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from dataclasses import replace

import torch
import torch.nn.functional as F

import data
import evaluate
import rectify
from datasets import labels as ground_truth
from harness import runs
from paper import systems


@torch.no_grad()
def look(out: str, split: str | None) -> list[float]:
    """The six numbers of a run's rectification, two of them measured on a split."""
    args = evaluate.flags().parse_args(["--out", out])
    checkpoint = runs.find(out, None, "rectify")
    if checkpoint is None:
        raise ValueError(f"{out}: expected a run folder with a rectification, found none. Name what --out "
                         "named.")
    system, setup = systems.of(checkpoint), data.open_setup(args, checkpoint, split=split)
    recipe, rectifier = rectify.load_rectifier(setup, checkpoint, system)
    visual, names = setup.clip_model.visual, setup.vocabulary.names
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, names)       # W_r (C, D)
    height, width = (side // visual.patch_size for side in recipe.crop)
    bias = rectifier.bias(visual.patch_positions(height, width), reference)                 # M_b (C, h, w)
    if not isinstance(bias, torch.Tensor) or not rectifier.frozen_clip:
        raise ValueError(f"{out}: expected a system with a bias map and a frozen CLIP, found {system.name}.")
    rows = F.normalize(reference, dim=1)
    others = ~torch.eye(len(rows), dtype=torch.bool)
    of_place, of_class = bias.mean(dim=0), bias.mean(dim=(1, 2))
    rest = bias - of_place - of_class[:, None, None] + bias.mean()

    query = rectify.query_of(setup)
    [with_bias] = evaluate.predictors(setup, query, ["rectify"], system).values()
    without = replace(with_bias, logits=lambda features: rectifier(
        features, query, bias.new_zeros(len(query), *features.shape[-2:])))
    labels = ground_truth.true_label_files(setup.data, setup.root, setup.split, list(setup.evaluation_images))
    miou = [evaluate.measure(setup, {"rectify": one}, labels)["rectify"]["miou"]
            for one in (with_bias, without)]
    spread = [part.std().item() for part in (of_place, of_class, rest)]
    return [(rows @ rows.T)[others].mean().item(), *spread, *miou]


def main(args: argparse.Namespace) -> dict[str, list[float]]:
    """Print a line for every run folder; returns the numbers."""
    print(f"{'':40}{'alike':>7}{'places':>9}{'classes':>9}{'rest':>9}{'mIoU':>7}{'without bias':>14}")
    found = {}
    for out in args.out:
        alike, places, classes, rest, with_bias, without = found[out] = look(out, args.split)
        print(f"{out[-40:]:40}{alike:7.2f}{places:9.4f}{classes:9.4f}{rest:9.4f}"
              f"{with_bias:7.1f}{without:14.1f}")
    return found


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
