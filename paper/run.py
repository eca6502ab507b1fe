"""Train, distil and measure one of the paper's systems: ReCLIP, MaskCLIP+, or ReCLIP++ with one part replaced.

    python paper/run.py no-bias --out runs-no-bias                     all three, one after the other
    python paper/run.py no-bias --out runs-no-bias --stage distill     one of them
    python paper/run.py --list                                         the systems

The flags are those of rectify.py, distill.py and evaluate.py; each stage takes the ones that it knows. A run takes the
place of the one in its folder: give each system an --out of its own, and one --cache DIR for all, so that hypotheses
are counted once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors
from harness import flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "training", "rectify", "labels")
    parser.add_argument("system", nargs="?", metavar="SYSTEM", help="a name of --list")
    parser.add_argument("--stage", choices=("rectify", "distill", "evaluate"), help="this one alone (default: all)")
    parser.add_argument("--list", action="store_true", help="print the systems, and run nothing")
    parser.add_argument("--backbone", choices=("small", "resnet50", "resnet101"), help="of the student")
    parser.add_argument("--prompt-denoising", type=common.real(0, 1), metavar="P", default=0.0, help="of evaluate")
    parser.add_argument("--key-smoothing", type=common.real(0, 1), metavar="P", default=0.0, help="of evaluate")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import data
import distill
import evaluate
import rectify
from harness import runs
from paper import systems

OF_RECTIFY = ("cache_features", "vote_threshold", "window_ratio", "dense_path", "mask_scale", "loss_scale")
OF_DISTILL = ("backbone",)


def main(args: argparse.Namespace) -> dict | None:
    """Run the stages of a system; returns the metrics of `evaluate`, if that was run."""
    if args.list:
        for name, system in systems.SYSTEMS.items():
            print(f"{name:24}{said_of(system)}")
        return None
    if args.system not in systems.SYSTEMS:
        raise ValueError(f"expected a system of {', '.join(systems.SYSTEMS)}; found {args.system or 'none'}.")
    system = systems.SYSTEMS[args.system]
    if system.votes is not rectify.count_votes and (args.vote_threshold, args.window_ratio) != (None, None):
        raise ValueError(f"--vote-threshold, --window-ratio: expected hypotheses from windows, found {system.name}, which "
                         "looks at whole images. Leave them out.")
    metrics = None
    for stage in [args.stage] if args.stage else ["rectify", "distill", "evaluate"]:
        if stage == "rectify":
            rectify_with(without(args, OF_DISTILL), system)
        elif stage == "distill":
            if system.rectifier is systems.MaskCLIP and runs.find(args.out, args.data, "rectify") is None:
                rectify_with(args, system)
            setup = distill.main(without(args, OF_RECTIFY if args.stage is None else ()), system)
            evaluate.after_training(setup, "distill", system)
        else:
            metrics = evaluate.main(args, system)
    return metrics


def rectify_with(args: argparse.Namespace, system: distill.System) -> None:
    """Stage 1 of a system: that of its teacher, if it has one; nothing is trained where there is nothing to train."""
    if system.rectifier is systems.MaskCLIP:
        setup = data.open_setup(args)
        systems.untrained_teacher(setup, system)
        print(f"{system.name} has nothing to train in stage 1: wrote {setup.folder('rectify')}/checkpoint.pt")
        return
    evaluate.after_training(rectify.main(args, system.teacher or system), "rectify", system)


def without(args: argparse.Namespace, names: tuple[str, ...]) -> argparse.Namespace:
    """The flags, as if those were not given that another stage knows."""
    return argparse.Namespace(**vars(args) | dict.fromkeys(names))


def said_of(system: distill.System) -> str:
    """What is another than ReCLIP++'s, in a line."""
    usual = distill.System()
    parts = [f"{name}: {getattr(system, name).__name__}" for name in ("rectifier", "votes", "loss", "head")
             if getattr(system, name) is not getattr(usual, name)]
    numbers = [f"{name}: {getattr(system, name)}" for name in ("numbers", "student_numbers") if getattr(system, name)]
    return ", ".join(parts + numbers) or "the system of rectify.py and distill.py"


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
