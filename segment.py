"""Segment your own photograph with your own words.

    python segment.py photo.jpg --classes "cat, sofa, wall"
    python segment.py photo.jpg                the classes and the best stage of the newest run
    python segment.py                          an image of the newest run's dataset, else a scene of Toyland
    python segment.py --export student.onnx    the distilled student for use elsewhere, without CLIP

Words for which nothing was trained are segmented by MaskCLIP, which needs no training; to rectify and distil
them, give rectify.py a folder of such photographs. Writes <out>/segment/<photo>_overlay.png (classes over the
photo, with a legend) and <photo>_index.png (class numbers in the order of the words, 255 = background). Reads
no label.
"""

from __future__ import annotations

import argparse
import os

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__)
    parser.add_argument("photo", nargs="?", type=common.path, metavar="PHOTO",
                        help="an image file (default: the first that the newest run is measured on, else a "
                             "scene of Toyland)")
    extra = parser.add_argument_group("segmentation")
    extra.add_argument("--stage", choices=("auto", "vanilla", "maskclip", "rectify", "distill"),
                       default="auto",
                       help="auto: the furthest stage that was trained for these classes (default: auto)")
    extra.add_argument("--background", metavar="MODE", default="none",
                       help='none: every pixel gets a class; "words: floor, ceiling": further words whose '
                            'pixels count as background (needs MaskCLIP or vanilla); "threshold: 0.5": '
                            'pixels whose best class has less probability than that (default: none)')
    extra.add_argument("--export", type=common.path, metavar="FILE",
                       help="write the distilled student, without CLIP, as FILE.pt2 (torch.export) or "
                            "FILE.onnx (needs onnx and onnxscript), and segment nothing")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import copy
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import data
import evaluate
import rectify
from datasets import IGNORE, words as class_lists
from datasets.images import open_image, see_through, to_rgb
from harness import files, machine, runs

# ------------------------------------------------------------------------------------------ background


def parse_background(mode: str) -> tuple[str, list[str] | float | None]:
    """`--background` → ("none", None), ("words", [names]) or ("threshold", p). Raises ValueError for anything
    else."""
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
    raise ValueError('--background: expected none, "words: floor, ceiling" or "threshold: 0.5" (between 0 '
                     f'and 1); found {mode!r}.')


def segment(logits: Tensor, size: tuple[int, int], classes: int, scale: float,
            threshold: float | None) -> Tensor:
    """Logits (1, K, h, w) → classes (H, W) uint8 in 0..classes−1, or 255 for background.

    The K − classes last channels are background words. A threshold in (0, 1) makes background of every pixel
    whose highest softmax(scale · logits) is under it.
    """
    best, probability = evaluate.best_class(logits, size, None if threshold is None else scale)  # (H, W) both
    background = best >= classes
    if threshold is not None:
        background |= probability < threshold
    return best.masked_fill(background, IGNORE)


def overlay(image: Image.Image, index: Image.Image, palette) -> Image.Image:
    """The photo, half covered by its classes' colours; background stays as it is. Both of one size."""
    classes, photo = np.asarray(index), np.asarray(image, dtype=np.float32)
    painted = np.asarray(evaluate.colour(torch.from_numpy(classes.copy()), palette), dtype=np.float32)
    covered = (classes != IGNORE)[..., None]
    return Image.fromarray(np.where(covered, 0.45 * photo + 0.55 * painted, photo).astype(np.uint8))


# ----------------------------------------------------------------------------------- in a program of your own


class Segmenter:
    """A trained run, or MaskCLIP with your words, in a program of your own. Keywords are the flags of this
    script.

        from segment import Segmenter
        segmenter = Segmenter(out="runs")          # or data="voc", stage="rectify", classes="cat, sofa, wall"
        classes = segmenter(Image.open("photo.jpg"))

    The result is (H, W) uint8: numbers of segmenter.names, 255 for background. A list of images gives a list.
    Raises ValueError, FileNotFoundError as segment.py does, TypeError for another keyword.
    """

    def __init__(self, **keywords):
        usual = vars(flags().parse_args([]))
        if unknown := keywords.keys() - usual:
            raise TypeError(f"Segmenter: expected {', '.join(usual)}, found {', '.join(sorted(unknown))}.")
        args = argparse.Namespace(**usual | keywords)
        kind, value = parse_background(args.background)
        checkpoint = runs.find(args.out, args.data, "rectify", "distill")
        words = wanted_vocabulary(args, checkpoint)
        if words is not None and checkpoint is not None \
                and [list(names) for names in words.synonyms] != checkpoint["settings"]["synonyms"]:
            checkpoint, words = None, wanted_vocabulary(args, None)            # nothing was trained for these
        if checkpoint is None and words is None and args.data is None and args.photo is not None:
            raise ValueError("segment.py: expected words to look for; found no --classes and no trained "
                             f'run. For instance: python segment.py {args.photo} --classes "cat, sofa, wall"')
        self.setup = setup = data.open_setup(args, checkpoint, vocabulary=words)
        self.names, self.palette = setup.vocabulary.names, setup.vocabulary.palette
        stages = evaluate.existing_stages(setup) if checkpoint else ["vanilla", "maskclip"]
        self.stage = stage = stages[-1] if args.stage == "auto" else args.stage
        if stage not in stages:
            raise ValueError(f"--stage {stage}: expected a checkpoint trained for the classes "
                             f"{', '.join(self.names[:8])}; found none under {args.out}. Stages at hand: "
                             f"{', '.join(stages)}. To train: python rectify.py --data FOLDER --classes FILE")
        queried = setup.vocabulary if kind != "words" else with_background(setup.vocabulary, value, stage)
        query = rectify.query_of(setup) if checkpoint and kind != "words" \
            else rectify.query_features(setup.clip_model, queried)
        self.threshold = value if kind == "threshold" else None
        self.found = evaluate.predictors(setup, query, [stage])
        self.title = evaluate.title(stage, self.found[stage].system)

    @torch.no_grad()
    def __call__(self, image: Image.Image | list[Image.Image]) -> np.ndarray | list[np.ndarray]:
        """A PIL image of any size and mode → (H, W) uint8. What is transparent is background."""
        if isinstance(image, list):
            return [self(one) for one in image]
        setup, predictor = self.setup, self.found[self.stage]
        small = data.short_side_to(to_rgb(image), predictor.short_side, setup.clip_model.visual.patch_size)
        with machine.autocast(setup.device, setup.precision):
            seen = data.to_tensor(small)[None].to(setup.device)
            logits = evaluate.logits_of_all(setup, self.found, seen)[self.stage]
        scale = evaluate.DENOISING_SCALE[self.stage]
        size = (image.height, image.width)
        classes = segment(logits, size, len(self.names), scale, self.threshold).cpu().numpy()
        if (hidden := see_through(image)) is not None:
            classes[hidden] = IGNORE
        return classes

    def export(self, path: str | Path) -> Path:
        """Write the distilled student, without CLIP, as a .pt2 (torch.export) or .onnx file. It takes (1, 3,
        H, W) of any size, RGB from 0 to 1, and gives logits (1, C, ⌈H/8⌉, ⌈W/8⌉); its metadata says the
        classes and the rest.

        Raises ValueError for another stage or ending, and where a package that .onnx needs is missing.
        """
        path = Path(path)
        if self.stage != "distill":
            raise ValueError(f"--export {path}: expected a distilled student, found the stage {self.stage}, "
                             "which needs CLIP. Make one with: python distill.py")
        if path.suffix not in (".pt2", ".onnx"):
            raise ValueError(f"--export {path}: expected a name that ends with .pt2 or .onnx, found "
                             f"{path.suffix!r}.")
        student = Exported(self.found["distill"].logits.__self__).cpu().eval()
        image, side = torch.rand(1, 3, 96, 128), torch.export.Dim.AUTO
        program = torch.export.export(student, (image,), dynamic_shapes=({2: side, 3: side},))
        about = self.metadata()
        if path.suffix == ".pt2":
            about = {"metadata.json": json.dumps(about, indent=1)}
            files.write_atomically(path, lambda file: torch.export.save(program, file, extra_files=about))
            return path
        try:
            import onnx
            import onnxscript  # noqa: F401 - torch.onnx works through it
        except ImportError as missing:
            raise ValueError(f"--export {path}: expected the packages onnx and onnxscript, found no "
                             f"{missing.name}. pip install onnx onnxscript, or export to .pt2.") from None
        model = torch.onnx.export(program, (image,), input_names=["image"], output_names=["logits"],
                                  dynamic_shapes=({2: "height", 3: "width"},), dynamo=True).model_proto
        onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
        files.write_atomically(path, lambda file: file.write(model.SerializeToString()))
        return path

    def metadata(self) -> dict:
        """What a program needs to know to use an exported student as segment.py does."""
        return {"classes": self.names, "colours": [list(rgb) for rgb in self.palette],
                "short_side": self.found[self.stage].short_side,
                "multiple": self.setup.clip_model.visual.patch_size,
                "longest_side": data.LONGEST_SIDE,
                "before": "resize the image (bilinear, antialiased) so that its shorter side has short_side "
                          "pixels and no side more than longest_side; round both sides to a multiple of "
                          "`multiple`; RGB, 0 to 1",
                "after": "resize the logits (bilinear, align_corners=False) to the image's own size; argmax "
                         "over dim 1"}


class Exported(torch.nn.Module):
    """A student that takes RGB from 0 to 1: CLIP's mean and standard deviation inside."""

    def __init__(self, student: torch.nn.Module):
        super().__init__()
        self.student = copy.deepcopy(student)
        self.register_buffer("mean", torch.tensor(data.MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(data.STD).view(3, 1, 1))
        for buffer in self.buffers():                   # the positions lie in another order in memory
            buffer.data = buffer.data.contiguous()

    def forward(self, image: Tensor) -> Tensor:
        return self.student.logits((image - self.mean) / self.std)


# ------------------------------------------------------------------------------------------ the run


def wanted_vocabulary(args: argparse.Namespace, checkpoint: dict | None) -> class_lists.Vocabulary | None:
    """The words of `--classes`, a file or a comma-separated list; None: those of the newest run."""
    if args.classes is None:
        return None
    name = checkpoint["settings"]["data"] if checkpoint else args.data or "photo"
    if os.path.isfile(args.classes):   # Path.is_file would stumble over a list longer than a file name can be
        return class_lists.vocabulary(name, args.classes)
    if "," not in args.classes:             # one word has nothing to be told from: a file's name, mistyped
        raise ValueError(f"--classes {args.classes}: expected a text file with one class name a line, or at "
                         "least two words with commas between them; found no such file and one word.")
    given = [word for word in args.classes.split(",") if word.strip()]
    return class_lists.vocabulary_of(name, class_lists.parse_classes(given, source="--classes"))


def with_background(vocabulary: class_lists.Vocabulary, further: list[str],
                    stage: str) -> class_lists.Vocabulary:
    """The classes and, behind them, the words whose pixels are background. Raises ValueError for a trained
    stage."""
    if stage in ("rectify", "distill"):
        raise ValueError(f"--background words: expected the stage maskclip or vanilla, found {stage}, which "
                         f"knows the {len(vocabulary)} classes it was trained with and no further words. Add "
                         "--stage maskclip, train with the background among the classes, or use a threshold.")
    synonyms = vocabulary.synonyms + tuple((name,) for name in further)
    class_lists.parse_classes([", ".join(names) for names in synonyms], source="--classes and --background")
    return class_lists.Vocabulary(synonyms, vocabulary.palette, vocabulary.templates)


def main(args: argparse.Namespace) -> Path:
    """Segment one photo and return the overlay's path; with --export, write the student and return its
    path."""
    photo = None if args.photo is None else open_image(Path(args.photo))
    segmenter = Segmenter(**vars(args))
    if args.export is not None:
        path = segmenter.export(args.export)
        print(f"Wrote {path}: the student of {len(segmenter.names)} classes, without CLIP.")
        return path
    setup, names = segmenter.setup, segmenter.names
    if photo is None:
        photo = open_image(next(iter(setup.evaluation_images.values())))
    print(f"{segmenter.title}, CLIP {setup.clip_name}, {len(names)} classes: {', '.join(names)}")
    if segmenter.stage == "maskclip" and args.stage == "auto":
        print("No rectification was trained for these words. MaskCLIP's biases are still in the picture; to "
              "remove them: python rectify.py --data FOLDER --classes FILE")
    return write_results(args, segmenter, to_rgb(photo), Image.fromarray(segmenter(photo)))


def write_results(args: argparse.Namespace, segmenter: Segmenter, photo: Image.Image,
                  index: Image.Image) -> Path:
    """Write overlay and index picture, print each class's share, and return the overlay's path."""
    folder, names, palette = Path(args.out) / "segment", segmenter.names, segmenter.palette
    name, mark = output_name(args, segmenter.setup, folder)
    files.refuse_folders(folder, f"{name}_index.png", f"{name}_overlay.png")
    height = min(480, max(160, photo.height))
    scale = min(height / photo.height, 4 * height / photo.width)
    small = tuple(max(1, round(scale * side)) for side in photo.size)        # as large as the page shows them
    covered = overlay(photo.resize(small), index.resize(small, Image.Resampling.NEAREST), palette)
    channels = [channel for rgb in palette for channel in rgb]
    # whole: a shorter one leaves fewer bits than 255 has
    index.putpalette(channels + [0] * (768 - len(channels)))
    page = evaluate.sheet([[photo, covered]], ["photo", segmenter.title], segmenter.setup.vocabulary, height)
    info = PngImagePlugin.PngInfo()
    info.add_text("photo", mark)
    path = folder / f"{name}_overlay.png"
    files.write_atomically(folder / f"{name}_index.png",
                           lambda file: index.save(file, format="PNG", pnginfo=info))
    files.write_atomically(path, lambda file: page.save(file, format="PNG"))
    counts = index.histogram()
    for number in sorted(range(len(names)), key=lambda number: -counts[number]):
        if counts[number]:
            print(f"{100 * counts[number] / sum(counts):6.1f} %  {names[number]}")
    if counts[IGNORE]:
        print(f"{100 * counts[IGNORE] / sum(counts):6.1f} %  (background)")
    print(f"Wrote {path} and {folder / f'{name}_index.png'}")
    return path


def output_name(args: argparse.Namespace, setup: data.Setup, folder: Path) -> tuple[str, str]:
    """What the two files are called, and a mark of the photo: its name, with its folders' in front as long as
    the result of another photo of that name is there already."""
    if args.photo is None:
        return Path(setup.data).name, ""
    photo = Path(args.photo).resolve()
    mark, name = f"{machine.seed_of(str(photo)):016x}", photo.stem
    for parent in photo.parents:
        if photo_of(there := folder / f"{name}_index.png") in (None, mark):
            break
        print(f"{there} is of another photo called {name}, and stays.")
        name = f"{parent.name}_{name}"
    return name, mark


def photo_of(index: Path) -> str | None:
    """The mark of the photo that an index picture is of; None where none is there, or one without a mark."""
    try:
        with Image.open(index) as picture:
            return picture.info.get("photo")
    except OSError:                             # none, or one that nobody can read: it may be overwritten
        return None


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
