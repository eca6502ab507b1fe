"""Segment your own photograph with your own words.

    python segment.py photo.jpg --classes "cat, sofa, wall"
    python segment.py photo.jpg                the classes and the best stage of the newest run
    python segment.py                          a validation image of the newest run, else a scene of Toyland

Words for which nothing was trained are segmented by MaskCLIP, which needs no training; to rectify and distil them, give
rectify.py a folder of such photographs. Writes <out>/segment/<photo>_overlay.png (classes over the photo, with a legend)
and <photo>_index.png (class numbers in the order of the words, 255 = background). Reads no label.
"""

from __future__ import annotations

import argparse
import os

import runs


def flags() -> argparse.ArgumentParser:
    parser = runs.common_flags(__doc__, training=False)
    parser.add_argument("photo", nargs="?", metavar="PHOTO", help="an image file (default: a validation image of the newest run, else a scene of Toyland)")
    extra = parser.add_argument_group("segmentation")
    extra.add_argument("--stage", choices=("auto", "vanilla", "maskclip", "rectify", "distill"), default="auto",
                       help="auto: the furthest stage that was trained for these classes")
    extra.add_argument("--background", metavar="MODE", default="none",
                       help='none: every pixel gets a class; "words: floor, ceiling": further words whose pixels count as '
                            'background (needs MaskCLIP or vanilla); "threshold: 0.5": pixels whose best class has less '
                            "probability than that")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import evaluate
import rectify
from rectify import cached_query
from world import open_world

# ------------------------------------------------------------------------------------------ background


def parse_background(mode: str) -> tuple[str, list[str] | float | None]:
    """`--background` → ("none", None), ("words", [names]) or ("threshold", p). Raises ValueError for anything else."""
    kind, _, rest = mode.partition(":")
    kind, rest = kind.strip(), rest.strip()
    if kind == "none" and not rest:
        return "none", None
    if kind == "words" and rest:
        if names := [name for name in (part.strip() for part in rest.split(",")) if name]:
            return "words", names
    if kind == "threshold":
        try:
            if 0 < float(rest) < 1:
                return "threshold", float(rest)
        except ValueError:
            pass
    raise ValueError(f'--background: expected none, "words: floor, ceiling" or "threshold: 0.5" (between 0 and 1); found {mode!r}.')


def segment(logits: Tensor, size: tuple[int, int], classes: int, scale: float, threshold: float | None) -> Tensor:
    """Logits (1, K, h, w) → classes (H, W) in 0..classes−1, or 255 for background.

    The K − classes last channels are background words. A threshold in (0, 1) makes background of every pixel whose highest
    softmax(scale · logits) is under it.
    """
    best, probability = evaluate.best_class(logits, size, scale)                                  # (H, W) both
    background = best >= classes
    if threshold is not None:
        background |= probability < threshold
    return best.masked_fill(background, data.IGNORE)


def overlay(image: Image.Image, classes: Tensor, palette) -> Image.Image:
    """The photo, half covered by its classes' colours; background stays as it is."""
    painted = np.asarray(evaluate.colour(classes, palette), dtype=np.float32)
    photo = np.asarray(image, dtype=np.float32)
    covered = (classes.cpu().numpy() != data.IGNORE)[..., None]
    return Image.fromarray(np.where(covered, 0.45 * photo + 0.55 * painted, photo).astype(np.uint8))


# ------------------------------------------------------------------------------------------ the run


def wanted_vocabulary(args: argparse.Namespace, checkpoint: dict | None) -> data.Vocabulary | None:
    """The words of `--classes`, a file or a comma-separated list; None: those of the newest run."""
    if not hasattr(args, "classes"):
        return None
    name = checkpoint["settings"]["world"]["data"] if checkpoint else getattr(args, "data", "photo")
    if os.path.isfile(args.classes):            # Path.is_file would stumble over a list longer than a file name can be
        return data.vocabulary(name, args.classes)
    if "," not in args.classes:                 # one word has nothing to be told from: a file's name, mistyped
        raise ValueError(f"--classes {args.classes}: expected a text file with one class name a line, or at least two words "
                         "with commas between them; found no such file and one word.")
    words = [word for word in args.classes.split(",") if word.strip()]
    return data.vocabulary_of(name, data.parse_classes(words, source="--classes"))


def main(args: argparse.Namespace) -> Path:
    """Segment one photo and return the overlay's path."""
    kind, value = parse_background(args.background)
    photo = None if args.photo is None else data.read_image(Path(args.photo))
    checkpoint = rectify.newest_run(args)
    words = wanted_vocabulary(args, checkpoint)
    if words is not None and checkpoint is not None:
        trained = [list(names) for names in words.synonyms] == checkpoint["settings"]["world"]["synonyms"]
        if not trained:
            checkpoint, words = None, wanted_vocabulary(args, None)
    if checkpoint is None and photo is not None and words is None and not hasattr(args, "data"):
        raise ValueError('segment.py: expected words to look for; found no --classes and no trained run. For instance: '
                         f'python segment.py {args.photo} --classes "cat, sofa, wall"')
    world = open_world(args, checkpoint, vocabulary=words)
    names = world.vocabulary.names
    stages = evaluate.existing_stages(world) if checkpoint else ["vanilla", "maskclip"]
    stage = stages[-1] if args.stage == "auto" else args.stage
    if stage not in stages:
        raise ValueError(f"--stage {stage}: expected a checkpoint trained for the classes {', '.join(names[:8])}; found none "
                         f"under {world.out}. Stages at hand: {', '.join(stages)}. To train: python rectify.py --data FOLDER "
                         "--classes FILE")
    if kind == "words":
        if stage in ("rectify", "distill"):
            raise ValueError(f"--background words: expected the stage maskclip or vanilla, found {stage}, which knows the "
                             f"{len(names)} classes it was trained with and no further words. Add --stage maskclip, train with "
                             "the background among the classes, or use a threshold.")
        queried = data.Vocabulary(world.vocabulary.synonyms + tuple((name,) for name in value), world.vocabulary.palette,
                                  world.vocabulary.templates)
        data.parse_classes([", ".join(synonyms) for synonyms in queried.synonyms], source="--classes and --background")
        query = rectify.query_features(world.clip_model, queried)
    else:
        query = cached_query(world) if checkpoint else rectify.query_features(world.clip_model, world.vocabulary)
    if photo is None:
        photo = data.read_image(next(iter(world.validation_images.values())))
    name = Path(args.photo).stem if args.photo else Path(world.name).name
    found, patch = evaluate.predictors(world, query, [stage]), world.clip_model.visual.patch_size
    title = evaluate.title(stage, found[stage].ablation)
    print(f"{title}, CLIP {world.clip_name}, {len(names)} classes: {', '.join(names)}")
    if stage == "maskclip" and args.stage == "auto":
        print("No rectification was trained for these words. MaskCLIP's biases are still in the picture; to remove them: "
              "python rectify.py --data FOLDER --classes FILE")

    tensor = data.to_tensor(data.short_side_to(photo, found[stage].short_side, patch))[None].to(world.device)
    with torch.no_grad(), runs.autocast(world.device, world.precision):
        logits = evaluate.logits_of_all(world, found, tensor)[stage]
    threshold = value if kind == "threshold" else None
    classes = segment(logits, (photo.height, photo.width), len(names), evaluate.DENOISING_SCALE[stage], threshold)

    folder = Path(world.out) / "segment"
    runs.refuse_folders(folder, f"{name}_index.png", f"{name}_overlay.png")
    index = Image.fromarray(classes.cpu().numpy().astype(np.uint8))
    palette = [channel for rgb in world.vocabulary.palette for channel in rgb]
    index.putpalette(palette + [0] * (768 - len(palette)))      # whole: with a shorter one a PNG keeps fewer bits than 255 has
    page = evaluate.sheet([[photo, overlay(photo, classes, world.vocabulary.palette)]], ["photo", title],
                          world.vocabulary, height=min(480, max(160, photo.height)))
    path = folder / f"{name}_overlay.png"
    runs.write_atomically(folder / f"{name}_index.png", lambda file: index.save(file, format="PNG"))
    runs.write_atomically(path, lambda file: page.save(file, format="PNG"))
    counts = torch.bincount(classes.flatten().cpu(), minlength=256)
    for number in counts[:len(names)].argsort(descending=True).tolist():
        if counts[number]:
            print(f"{100 * counts[number] / counts.sum():6.1f} %  {names[number]}")
    if counts[data.IGNORE]:
        print(f"{100 * counts[data.IGNORE] / counts.sum():6.1f} %  (background)")
    print(f"Wrote {path} and {folder / f'{name}_index.png'}")
    return path


if __name__ == "__main__":
    with runs.errors_in_one_paragraph():
        main(FLAGS)
