"""What the bias map of a trained rectification says of classes and of places, and what it is worth at test.

    python results/bias.py runs/reproduce/toyland/reclip++/0 runs/reproduce/toyland/without-decoder/0

A line for each run folder (what --out named):

    alike      mean cosine between the rows of W_r: 1 is one Reference for all classes
    places     standard deviation over places of M_b's mean over classes, which changes no patch's best class
    classes    standard deviation over classes of M_b's mean over places: what Sec. III-B calls class-preference bias
    rest       what is neither: a class's own preference of places
    mIoU       of rectified masks, and with the bias left out at test, without training again (percent)
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import ablations
import evaluate
import ground_truth
import rectify
import runs
from world import open_world


@torch.no_grad()
def look(out: str) -> None:
    args = evaluate.flags().parse_args(["--out", out])
    checkpoint = rectify.find_checkpoint(args, "rectify")
    if checkpoint is None:
        raise ValueError(f"{out}: expected a run folder with a rectification, found none. Name what --out named.")
    world = open_world(args, checkpoint)
    recipe, rectifier = rectify.load_rectifier(world, checkpoint)
    reference = rectify.reference_features(world.clip_model, rectifier.prompt, world.vocabulary.names)    # W_r (C, D)
    rows = F.normalize(reference, dim=1)
    others = ~torch.eye(len(rows), dtype=torch.bool)
    height, width = (side // world.clip_model.visual.patch_size for side in recipe.crop)
    bias = rectifier.bias(world.clip_model.visual.patch_positions(height, width), reference)              # M_b (C, h, w)
    of_place, of_class = bias.mean(dim=0), bias.mean(dim=(1, 2))
    rest = bias - of_place - of_class[:, None, None] + bias.mean()
    found = [measured(world)]
    kept, rectify.Rectifier.bias = rectify.Rectifier.bias, ablations.NoBias.bias
    found.append(measured(world))
    rectify.Rectifier.bias = kept
    print(f"{out[-40:]:40}{(rows @ rows.T)[others].mean():7.2f}{of_place.std():9.4f}{of_class.std():9.4f}{rest.std():9.4f}"
          f"{found[0]:7.1f}{found[1]:14.1f}")


def measured(world) -> float:
    query = rectify.cached_query(world)
    labels = ground_truth.true_label_files(world.name, world.root, list(world.validation_images))
    return evaluate.measure(world, evaluate.predictors(world, query, ["rectify"]), labels)["rectify"]["miou"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="+", metavar="RUN", help="run folders")
    with runs.errors_in_one_paragraph():
        folders = parser.parse_args().out
        print(f"{'':40}{'alike':>7}{'places':>9}{'classes':>9}{'rest':>9}{'mIoU':>7}{'without bias':>14}")
        for folder in folders:
            look(folder)
