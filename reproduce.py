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
from world import open_world, recipe_for


def one_seed(args: argparse.Namespace, seed: int) -> dict:
    """The metrics of all stages for one seed; what is in its folder already is used, if it was made with these numbers."""
    known = {name: value for name, value in vars(args).items() if name not in ("seeds", "out", "data")}
    known |= {"seed": seed, "out": str(Path(args.out) / "seeds" / str(seed)), "data": getattr(args, "data", "toyland")}
    world = open_world(argparse.Namespace(**known))
    path = world.folder("evaluate") / "metrics.json"
    for stage in (rectify, distill):
        checkpoint = world.folder(stage.__name__) / "checkpoint.pt"
        if checkpoint.exists():
            made = runs.load(checkpoint, stage.__name__)
            world.refuse_misfit(made)
            recipe = asdict(recipe_for(world, argparse.Namespace(**known), stage.RECIPES))
            runs.refuse_unless(checkpoint, "recipe", expected=runs.plain(recipe), found=made["settings"]["recipe"])
        else:
            print(f"\n==== seed {seed} ====")
            stage.main(argparse.Namespace(**known, resume=True))
            path.unlink(missing_ok=True)
    if path.exists():
        try:
            metrics = json.loads(path.read_text())
            return {stage: metrics[stage] | {"miou": float(metrics[stage]["miou"])} for stage in evaluate.STAGES}
        except (ValueError, TypeError, KeyError):
            print(f"{path} is damaged: measuring again.")
    return evaluate.main(argparse.Namespace(**known, labels=None, prompt_denoising=0.0))


def main(args: argparse.Namespace) -> None:
    data = getattr(args, "data", "toyland")
    if runs.is_folder(data):
        raise ValueError(f"--data {data}: expected toyland or voc, whose labels are known; found another. For a folder of your "
                         "own run rectify.py, distill.py and evaluate.py --labels DIR.")
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
