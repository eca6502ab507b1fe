"""Run all stages with several seeds and tabulate mean and spread: the numbers of the README.

    python reproduce.py                        five seeds in Toyland, about half an hour on two cores
    python reproduce.py --data voc --seeds 3   the same for a real dataset

Writes runs/seeds/<seed>/<data>/… and runs/seeds/<data>.json. What is finished is not run again, so that an interrupted
reproduction continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import runs


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__, training=False, seed=False)
    parser.add_argument("--seeds", type=runs.positive, default=5, metavar="N", help="use the seeds 0..N−1")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import numpy as np

import distill
import evaluate
import rectify
from clip.download import sha256
from public_datasets import DATASETS
from world import World, open_world, recipe_for


def one_seed(args: argparse.Namespace, seed: int) -> dict:
    """The metrics of all stages for one seed; what is in its folder already is used, if it was made with these numbers."""
    known = {name: value for name, value in vars(args).items() if name not in ("seeds", "out", "data")}
    known |= {"seed": seed, "out": str(Path(args.out) / "seeds" / str(seed)), "data": getattr(args, "data", "toyland")}
    world = open_world(argparse.Namespace(**known))
    for stage in (rectify, distill):
        folder = world.folder(stage.__name__)
        if (folder / "checkpoint.pt").exists() and not (folder / "unfinished").exists():
            made = rectify.load_checkpoint(folder / "checkpoint.pt", stage.__name__)
            world.refuse_misfit(made)
            recipe = asdict(recipe_for(world, argparse.Namespace(**known), stage.RECIPES))
            expected = {"recipe": runs.plain(recipe), "precision": world.precision, "seed": seed}
            runs.refuse_unless(folder / "checkpoint.pt", "recipe, precision or seed", expected=expected,
                               found={name: made["settings"].get(name) for name in expected})
        else:
            print(f"\n==== seed {seed} ====")
            stage.main(argparse.Namespace(**known, resume=True))
    metrics = measured(world)
    if metrics is None:
        metrics = evaluate.main(argparse.Namespace(**known, labels=None, prompt_denoising=0.0, key_smoothing=0.0))
    if missing := evaluate.STAGES.keys() - metrics:
        raise ValueError(f"{world.folder('evaluate')}: expected results of every stage, found none of {', '.join(missing)}. "
                         "Remove the folder of this seed and start again.")
    return metrics


def measured(world: World) -> dict | None:
    """What evaluate.py wrote, if it is of these very checkpoints, in this precision and without refinements."""
    path = world.folder("evaluate") / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
        for stage in evaluate.STAGES:
            made, checkpoint = metrics[stage]["fingerprint"], world.folder(stage) / "checkpoint.pt"
            weights = sha256(checkpoint)[:16] if checkpoint.exists() else None
            if made["weights"] != weights or made["precision"] != world.precision or any(made["refinements"].values()):
                return None
            float(metrics[stage]["miou"])
        return metrics
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def main(args: argparse.Namespace) -> None:
    data = getattr(args, "data", "toyland")
    if runs.is_folder(data):
        raise ValueError(f"--data {data}: expected toyland or voc, whose labels are known, or another of {', '.join(DATASETS)}; "
                         "found a folder. For one of your own run rectify.py, distill.py and evaluate.py --labels DIR.")
    found = [one_seed(args, seed) for seed in range(args.seeds)]
    table = {}
    for stage, title in evaluate.STAGES.items():
        values = [metrics[stage]["miou"] for metrics in found]
        table[stage] = {"title": title, "miou": values, "mean": round(float(np.mean(values)), 2),
                        "spread": round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None}
    runs.write_json(Path(args.out) / "seeds" / f"{Path(data).name}.json", {"versions": runs.versions(), "stages": table})
    print(f"\nmIoU in percent on {data}, {args.seeds} seeds (spread: standard deviation over seeds)\n")
    print("| stage | mean | spread | seeds 0, 1, … |\n|---|---|---|---|")
    for row in table.values():
        print(f"| {row['title']} | {row['mean']:.1f} | {'–' if row['spread'] is None else format(row['spread'], '.1f')} | "
              f"{' '.join(format(value, '.1f') for value in row['miou'])} |")


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
