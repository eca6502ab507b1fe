"""Train, distil and measure another system of the paper: ReCLIP, MaskCLIP+, ReCLIP++ with one part replaced.

    python paper/run.py no-bias --out runs-no-bias                     all three, one after the other
    python paper/run.py no-bias --out runs-no-bias --stage distill     one of them
    python paper/run.py --list                                         the systems

The flags are those of rectify.py, distill.py and evaluate.py; one that nothing reads is refused. A student of
ReCLIP++'s own rectification (own-head, …) has no stage 1: it takes the one in its folder, or makes it. A run
takes the place of the one in its folder: give each system an --out of its own, and one --cache DIR for all,
so that hypotheses are counted once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "training", "rectify", "student", "labels")
    parser.add_argument("system", nargs="?", metavar="SYSTEM", help="a name of --list")
    parser.add_argument("--list", action="store_true", help="print the systems, and run nothing")
    parser.add_argument("--stage", choices=("rectify", "distill", "evaluate"), help="(default: all)")
    for name in ("--prompt-denoising", "--key-smoothing"):
        parser.add_argument(name, type=common.real(0, 1), metavar="P", default=0.0,
                            help="of evaluate (default: 0)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import data
import distill
import evaluate
import rectify
from distill import System
from harness import runs
from paper import systems

STAGES = {"rectify": rectify, "distill": distill, "evaluate": evaluate}


def main(args: argparse.Namespace) -> dict | None:
    """Run the stages of a system. Returns the metrics of `evaluate`, if that was run."""
    if args.list:
        for system in systems.SYSTEMS.values():
            print(f"{system.name:24}{said_of(system)}")
        return None
    if args.system not in systems.SYSTEMS:
        raise ValueError(f"expected a system of {', '.join(systems.SYSTEMS)}; found {args.system or 'none'}.")
    system = systems.SYSTEMS[args.system]
    has = [stage for stage in STAGES if stage != "rectify" or system.teacher is None]
    stages = [args.stage] if args.stage else has
    if not set(stages) <= set(has):
        raise ValueError("--stage rectify: expected a system with a stage 1 of its own, found "
                         f"{system.name}, a student of {system.teacher.name}'s. Make that with: "
                         f"{system.teacher.command}")
    refuse_unread(args, system, stages)
    metrics = None
    for stage in stages:
        if stage == "rectify" and trains_nothing(system):
            write_teacher(args, system)
        elif stage == "rectify":
            evaluate.after_training(rectify.main(args, systems.rectification_of(system)), stage, system)
        elif stage == "distill":
            if trains_nothing(system) and runs.find(args.out, args.data, "rectify") is None:
                write_teacher(args, system)
            evaluate.after_training(distill.main(args, system), stage, system)
        else:
            metrics = evaluate.main(args, system)
    return metrics


def trains_nothing(system: System) -> bool:
    """Whether stage 1 of a system has nothing to train."""
    return system.rectifier is systems.MaskCLIP


def write_teacher(args: argparse.Namespace, system: System) -> None:
    """The untrained teacher of MaskCLIP+, in the place of a trained rectification."""
    of_student = dict.fromkeys(("epochs", "batch_size", "learning_rate"))
    setup = data.open_setup(argparse.Namespace(**vars(args) | of_student))
    systems.untrained_teacher(setup, system)
    print(f"{system.name} has nothing to train in stage 1: wrote {setup.folder('rectify')}/checkpoint.pt")


def refuse_unread(args: argparse.Namespace, system: System, stages: list[str]) -> None:
    """Raise ValueError for a flag that none of the stages reads, or no part of the system."""
    read = {"system", "stage", "list"}
    for stage in stages:
        read |= vars(STAGES[stage].flags().parse_args([])).keys()
    if "vote_threshold" in system.numbers.get("any", ()) or args.hypotheses:
        read -= {"vote_threshold", "window_ratio"}                  # its hypotheses come from no windows
    if trains_nothing(system):
        read -= {"cache_features", "quick", "mask_scale", "loss_scale", "hypotheses"}
    usual = vars(flags().parse_args([]))
    unread = [name for name, value in vars(args).items() if name not in read and value != usual[name]]
    if unread:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise ValueError(f"{given}: expected flags that {' and '.join(stages)} of {system.name} read, found "
                         "what nothing there reads. Leave it out.")


def said_of(system: System) -> str:
    """What is another than ReCLIP++'s, in a line."""
    said = []
    for part in ("rectifier", "votes", "loss", "head"):
        if (own := getattr(system, part)) is not getattr(System(), part):
            said.append(f"{part} {own.__name__.split()[0]}")
    for part, title in (("numbers", "numbers"), ("student_numbers", "student's numbers")):
        if changed := {name for of_dataset in getattr(system, part).values() for name in of_dataset}:
            said.append(f"{title} {', '.join(sorted(changed))}")
    return "; ".join(said) or "the system of rectify.py and distill.py"


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
