"""The flags that mean the same in every script. Imports no torch, so that `--help` answers at once.

A flag that changes a number of the recipe has the name of that number, and None means "as in the recipe":
`with_flags` puts the others in.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shlex

# Of the student. Any other ResNet of torchvision whose blocks are Bottlenecks (wide_resnet50_2, …) may be
# added by its name; those of resnet18 and resnet34 know no dilation.
BACKBONES = "small", "resnet50", "resnet101"

# What --quick stands for. Windows of r = 1/2 would take half of the time of these, 16 an image, but cost nine
# mIoU in Toyland where these cost two (benchmarks/README.md).
QUICK = {"window_ratio": 0.4, "batch_size": 16, "cache_features": 4.0}


def parser(description: str, *groups: str) -> argparse.ArgumentParser:
    """The common flags, and those of the named groups: "training", "rectify", "hypotheses", "student",
    "labels", "split", "seed". "labels" has "split" in it."""
    parser = plain_parser(description)
    what = parser.add_argument_group("what to work on")
    what.add_argument("--data", type=path, metavar="NAME|FOLDER",
                      help="toyland, toyland-things (its ten things, without the six stuffs), voc, context, "
                           "context-voc-first, ade, cityscapes, coco (whatever datasets/ describes), or a "
                           "folder of your own images, ./voc if it is named so "
                           "(default: toyland, or what was trained last in --out)")
    what.add_argument("--root", type=path, metavar="DIR",
                      help="where datasets lie (default: the trained run's, else data)")
    what.add_argument("--download", action="store_true",
                      help="fetch the dataset if it is missing (voc alone)")
    what.add_argument("--classes", type=path, metavar="FILE",
                      help="one class name a line, synonyms after commas; needed for a folder of your own")
    what.add_argument("--clip", type=path, metavar="NAME|PATH",
                      help="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, toyland, or a weights file "
                           "(default: the trained run's, else toyland in Toyland, and for all else "
                           "ViT-B/16, fetched once into ~/.cache/clip)")
    what.add_argument("--activation", choices=("quickgelu", "gelu"),
                      help="of CLIP's towers, where the weights file does not tell (default: what the file "
                           "or a config beside it says, else quickgelu, with which OpenAI trained)")
    if {"training", "hypotheses"} & set(groups):
        what.add_argument("--hypotheses", type=marked, metavar="FILE",
                          help="the classes that each training image may contain, in the place of windows "
                               "(Eq. 6): a JSON list of class numbers a line, in the order of the dataset's "
                               "training list, or a JSON object, image id → list; distill.py takes those of "
                               "its rectification (default: windows vote)")
    where = parser.add_argument_group("where and how")
    where.add_argument("--out", type=path, metavar="DIR", default="runs",
                       help="results go to DIR/<data>/<stage>/ (default: runs)")
    where.add_argument("--device", metavar="D",
                       help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    where.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                       help="bf16 is autocast: faster on a GPU, slow on most laptops' CPUs (default: fp32)")
    where.add_argument("--compile", action="store_true",
                       help="torch.compile the blocks of CLIP's image tower but the last: a start of half a "
                            "minute, for a GPU")
    where.add_argument("--workers", type=whole(0), metavar="N",
                       help="processes that decode images; changes no result (default: 4 beside a GPU, else "
                            "0)")
    where.add_argument("--cache", type=path, metavar="DIR",
                       help="where hypotheses and other things that are slow to make are kept, under a key "
                            "of all they depend on; runs with another --out may share it (default: "
                            "DIR/<data>/cache in --out)")
    where.add_argument("--skip-broken", action="store_true",
                       help="leave out images that cannot be read, and list them (default: the first one is "
                            "an error)")
    where.add_argument("--debug", action="store_true", help="show the traceback of every error")
    if {"training", "seed"} & set(groups):
        where.add_argument("--seed", type=whole(0), metavar="N", default=0,
                           help="of every random draw (default: 0)")
    if "training" in groups:
        train = parser.add_argument_group("training (defaults: the dataset's recipe)")
        train.add_argument("--epochs", type=whole(1), metavar="N", help="passes over the training images")
        train.add_argument("--batch-size", type=whole(1), metavar="N",
                           help="images per step; the learning rate goes with it, linearly, unless it is "
                                "given too")
        train.add_argument("--learning-rate", type=real(0, 1e3, "above 0"), metavar="R",
                           help="of the first step")
        train.add_argument("--resume", action="store_true",
                           help="continue an unfinished run where it was saved last")
        train.add_argument("--save-every", type=real(0, 1e6), metavar="MINUTES", default=10.0,
                           help="save at least so often, besides after every epoch (default: 10)")
    if "rectify" in groups:
        windows = parser.add_argument_group("hypothesis, Eq. 6 (defaults: the dataset's recipe)")
        windows.add_argument("--vote-threshold", type=real(0, 1), metavar="T",
                             help="t: a class needs more than this share of an image's windows; 0: one "
                                  "window is enough")
        windows.add_argument("--window-ratio", type=real(0.05, 1), metavar="R",
                             help="r: a window's share of the image's height and width; cost grows as 1/r²")
        other = parser.add_argument_group("numbers that belong to the CLIP, for another one (defaults: the "
                                          "recipe)")
        other.add_argument("--dense-path",
                           choices=("value", "residual", "vanilla", "neighbourhood", "correlative"),
                           help="through CLIP's last block")
        other.add_argument("--mask-scale", type=real(0, 1e6, "above 0"), metavar="S",
                           help="on M_o before Eq. 5's draw")
        other.add_argument("--loss-scale", type=real(0, 1e6, "above 0"), metavar="S", help="1/τ of Eq. 7")
        speed = parser.add_argument_group("speed")
        speed.add_argument("--cache-features", type=real(0, 1e6, "above 0"), metavar="GB",
                           help="let CLIP look at every image once, under one augmentation, and keep what it "
                                "sees in at most so many GB of memory and disk. Another training, with less "
                                "variety")
        said = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in QUICK.items())
        speed.add_argument("--quick", action=Quick, nargs=0, default=False,
                           help=f"for a first try on a CPU, the same as {said} where they are not given: "
                                "larger and fewer windows, one look at every image; says first what will "
                                "take how long")
    if "student" in groups:
        parser.add_argument_group("student").add_argument(
            "--backbone", choices=BACKBONES,
            help="torchvision's ResNet of that name with its ImageNet weights, or the small one of Toyland "
                 "(default: small in Toyland, else resnet50)")
    if {"labels", "split"} & set(groups):
        labels = parser.add_argument_group("labels")
        split_flag(labels)
        if "labels" in groups:
            labels.add_argument("--labels", type=path, metavar="DIR",
                                help="index pictures of a folder of your own images: same names, .png, value "
                                     "= class, 255 ignored")
    return parser


def split_flag(parser) -> None:
    parser.add_argument("--split", choices=("val", "test"),
                        help="measure on these images of the dataset: val, to choose numbers by, or test, to "
                             "look at once when all is settled; Toyland has one (default: val)")


def plain_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose description is a docstring's first paragraph, and whose flags cannot be shortened."""
    return argparse.ArgumentParser(description=description.strip().split("\n\n")[0], allow_abbrev=False)


def with_flags(recipe, args: argparse.Namespace, most: int):
    """The recipe with the numbers that flags give in the place of its own. Without --learning-rate, the rate
    grows with the batch (of at most `most` images), as in [code] for Cityscapes: 16 images, 0.16."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if "batch_size" in given and "learning_rate" not in given:
        larger = min(given["batch_size"], most) / recipe.batch_size
        given["learning_rate"] = recipe.learning_rate * larger
    return dataclasses.replace(recipe, **given)


# ------------------------------------------------------------------------------------------ types of flags


class Quick(argparse.Action):
    """Several flags by one name; what is given by its own name, before or behind it, counts."""

    def __call__(self, _parser, namespace, _values, _flag=None):
        args = vars(namespace)
        args.update({name: value for name, value in QUICK.items() if args[name] is None}, quick=True)


def path(text: str) -> str:
    """`~` is the home folder, also behind `--out=`, where the shell leaves it alone. Nothing (the shell's
    answer to a variable that is not set) is refused: it would be the folder that one works in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name or a path, found nothing")
    return os.path.expanduser(text)


def marked(text: str) -> str:
    """A file with a mark of its content, FILE#0123456789abcdef: a run that remembers it knows when the file
    has become another."""
    name = path(text)
    if not os.path.isfile(name):
        raise argparse.ArgumentTypeError(f"expected a file, found none at {name}")
    with open(name, "rb") as file:
        return f"{name}#{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def whole(least: int):
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, found "
                                             f"{text or 'nothing'}")
        return int(text)
    return read


def real(least: float, most: float, said: str = ""):
    """Numbers from `least` to `most`; `said` replaces these words, and then `least` itself is refused."""
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or said and value == least:
            raise argparse.ArgumentTypeError(f"expected a number {said or f'from {least:g} to {most:g}'}, "
                                             f"found {text or 'nothing'}")
        return value
    return read


def repeated(args: argparse.Namespace) -> str:
    """The flags that the next stage needs to find what this one made."""
    return f" --out {shlex.quote(args.out)}" if args.out != "runs" else ""
