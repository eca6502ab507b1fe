"""The paper's figures, drawn for the newest run.

    python paper/figures.py                          figures 1, 4 and 5
    python paper/figures.py --points points.json     figure 3 too, from points that were measured elsewhere
    python paper/figures.py --only 4 --show 0007:car 0040:grass

figure 1    what a model prefers, and where: mIoU against the distance from the centre; confusion of classes
figure 3    mIoU against the threshold t and the window ratio r of the multi-label hypothesis
figure 4    query, bias and rectified logits of a class as heat maps
figure 5    images, every stage's classes, the truth

Opens labels for figures 1 and 5, after all training, as evaluate.py does; without labels 1 is left out. Reads
the checkpoints of one run, writes runs/<data>/figures/*.png. Nothing here computes a measure: scores.py does.

    C classes · H,W pixels · h,w patches · K bins of distance
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "labels", "seed")
    extra = parser.add_argument_group("figures")
    extra.add_argument("--only", nargs="+", type=int, choices=(1, 3, 4, 5), metavar="N",
                       help="draw these alone, of 1, 3, 4, 5 (default: all that can be drawn)")
    extra.add_argument("--points", type=common.path, metavar="FILE",
                       help='figure 3: JSON {"t": [[share, mIoU], …], "r": [[ratio, mIoU], …], "whole '
                            'image": mIoU}, mIoU in percent, [share, mIoU, spread] for a band; t or r, and '
                            'the last, may be missing')
    extra.add_argument("--show", nargs="+", metavar="ID:CLASS",
                       help="figure 4: these classes on these images of the split (default: on some images "
                            "the class whose area rectification changes most)")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import io
import json
import math

import numpy as np
import torch
from matplotlib.figure import Figure        # without pyplot: no window, no state, always the Agg canvas
from PIL import Image
from torch import Tensor

import data
import evaluate
import rectify
from datasets.images import read_image
from distill import System
from evaluate import STAGES, Predictor, title
from harness import files, runs
from paper import scores, systems

# Okabe and Ito's colours, told apart by nearly everybody; a marker and a dash each for those who see none of
# them.
LINES = {"vanilla": ("#999999", "s", ":"), "maskclip": ("#E69F00", "o", "--"),
         "rectify": ("#0072B2", "^", "-"), "distill": ("#009E73", "D", "-.")}
SHADES = "cividis"              # from dark blue to yellow, evenly brighter: the same order without colour
WIDTH, DPI = 8.3, 100           # inches and dots per inch: 830 pixels are what a README shows
LARGEST = 300_000               # bytes of a picture

# ---------------------------------------------------------------------------- figure 1


def distance_figure(curves: dict[str, Tensor], counts: Tensor, titles: dict[str, str] = STAGES) -> Figure:
    """Figure 1, left: mIoU against the distance of objects from the image's centre, a line a stage.

    curves: stage → (K,) in [0, 1] of `scores.distance_curve`; counts (K,): objects in each bin, the bars
    behind the lines. Bins without objects are gaps. The legend has the paper's space preference and our slope
    of each.
    """
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes, x = figure.subplots(), scores.bin_middles(len(counts)).numpy()
    behind = axes.twinx()
    behind.bar(x, counts.numpy(), width=0.9 / len(counts), color="#E8E8E8", label="objects")
    behind.set_ylabel("objects (bars)", color="#777777")
    behind.tick_params(colors="#777777")
    behind.set_ylim(0, 2.5 * int(counts.max()))
    for stage, curve in curves.items():
        colour, marker, dash = LINES[stage]
        label = (f"{titles[stage]}: space preference {scores.space_preference(curve):.2f}, slope "
                 f"{scores.space_slope(curve, counts):.2f}").replace("-", "−")
        axes.plot(x, 100 * curve.numpy(), color=colour, marker=marker, linestyle=dash, label=label)
    axes.set_zorder(behind.get_zorder() + 1)                # lines before the bars
    axes.patch.set_visible(False)
    axes.set(xlim=(0, 1), ylim=(0, None), ylabel="mIoU (percent)",
             xlabel="distance of an object's centroid from the image's centre (half diagonals)")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return figure


def confusion_figure(confusions: dict[str, Tensor], names: list[str],
                     titles: dict[str, str] = STAGES) -> Figure:
    """Figure 1, right: what each true class is called, in percent of its pixels; two stages side by side.

    confusions: stage → (C, C) counts. Rows of classes that the truth does not hold are white. Up to 30
    classes are named.
    """
    C = len(names)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panels = figure.subplots(1, len(confusions), sharey=True, squeeze=False)[0]
    for axes, (stage, confusion) in zip(panels, confusions.items()):
        picture = axes.imshow(100 * scores.row_shares(confusion).numpy(), vmin=0, vmax=100, cmap=SHADES)
        score = scores.class_preference(confusion)
        axes.set_title(f"{titles[stage]}, class preference {score:.2f}", fontsize=10)
        axes.set_xlabel("predicted class")
        if C <= 30:
            size = 8 if C <= 20 else 6
            axes.set_xticks(range(C), names, rotation=90, fontsize=size)
            axes.set_yticks(range(C), names, fontsize=size)
    panels[0].set_ylabel("true class")
    figure.colorbar(picture, ax=panels, label="share of the true class's pixels (percent)", shrink=0.7)
    return figure


# ---------------------------------------------------------------------------- figure 3


def read_points(path: Path) -> dict:
    """`--points` → {"t": [[share, mIoU], …], "r": …, "whole image": mIoU}. Raises FileNotFoundError,
    ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--points {path}: expected a JSON file of measured points, found no such "
                                "file.")
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: [(float(x), float(y), *map(float, spread)) for x, y, *spread in points[name]]
                for name in ("t", "r") if points.get(name)}
        if "whole image" in points:
            kept["whole image"] = float(points["whole image"])
        numbers = [value for name in ("t", "r") for pair in kept.get(name, []) for value in pair]
        if not numbers or not all(map(math.isfinite, [*numbers, kept.get("whole image", 0.0)])):
            raise ValueError("no points, or infinite ones")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'--points {path}: expected {{"t": [[share, mIoU], …], "r": [[ratio, mIoU], …], '
                         f'"whole image": mIoU}} with numbers, found something else ({error}).') from error
    return kept


def hypothesis_figure(points: dict) -> Figure:
    """Figure 3: mIoU against t and r of Eq. 6, and the whole-image rule as a level line where it was
    measured.

    points: "t" and "r": pairs (value, mIoU in percent) in any order, either may be missing; "whole image":
    mIoU in percent. Triples have a spread, drawn as a band.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    said = {"t": "threshold t (percent of an image's windows)",
            "r": "window ratio r (of the image's height and width)"}
    shown = [name for name in said if name in points]
    for axes, name in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown):
        x, y, *spread = map(np.array, zip(*sorted(points[name])))
        x = 100 * x if name == "t" else x
        axes.plot(x, y, color="#0072B2", marker="o", label="windows (Eq. 6)")
        for half in spread:
            axes.fill_between(x, y - half, y + half, color="#0072B2", alpha=0.15, linewidth=0)
        if "whole image" in points:
            axes.axhline(points["whole image"], color="#D55E00", linestyle="--", label="whole-image rule")
        axes.set(xlabel=said[name], ylabel="mIoU (percent)" if name == shown[0] else "")
        axes.grid(color="#E8E8E8")
        axes.legend(frameon=False, fontsize=9)
    return figure


# ---------------------------------------------------------------------------- figure 4

MAPS = {"query": "query logits $M_q$", "bias": "bias logits $M_b$", "rectified": "rectified $M_q - M_b$",
        "decoded": "decoded $M_o$"}


@torch.no_grad()
def logit_maps(setup: data.Setup, query: Tensor, picture: Image.Image) -> dict[str, Tensor]:
    """What stage 1 makes of an image, each (C, h, w): M_q, M_b (Eq. 2), M (Eq. 3), M_o (Eq. 4)."""
    checkpoint = runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")
    recipe, rectifier = rectify.load_rectifier(setup, checkpoint, rectify.System())
    resized = data.short_side_to(picture, recipe.short_side, setup.clip_model.visual.patch_size)
    image = data.to_tensor(resized)[None].to(setup.device)
    features = setup.clip_model.encode_dense(image, path=recipe.dense_path)
    reference = rectify.reference_features(setup.clip_model, rectifier.prompt, setup.vocabulary.names)
    bias = rectifier.bias(setup.clip_model.visual.patch_positions(*features.shape[-2:]), reference)
    logits = rectifier.subtract(features, query, bias)
    return {"query": rectify.query_logits(features, query)[0], "bias": bias, "rectified": logits[0],
            "decoded": rectifier.decoder(features, logits)[0]}


def why_no_maps(setup: data.Setup, system: System) -> str:
    """Why figure 4 cannot be drawn: it shows the steps of ReCLIP++ itself; "" where it can."""
    if not (setup.folder("rectify") / "checkpoint.pt").exists():
        return f"no checkpoint in {setup.folder('rectify')}"
    name = systems.rectification_of(system).name
    return "" if name == rectify.System().name else f"{setup.folder('rectify')} is of {name}, by other steps"


def most_changed_class(before: Tensor, after: Tensor) -> int:
    """The class whose area differs most between two label maps (H, W): there a rectification is best seen."""
    classes = 1 + max(int(before.max()), int(after.max()))
    area = [torch.bincount(one.flatten(), minlength=classes) for one in (before, after)]
    return int((area[0] - area[1]).abs().argmax())


def heat_figure(rows: list[tuple[Image.Image, str, dict[str, Tensor]]]) -> Figure:
    """Figure 4: the image, then the logits of one class as heat maps; a row for each pair of image and class.

    rows: image, class name, maps of that class (h, w) under the names of MAPS. A colour bar below each
    column: every column has one range for all its rows, so that rows can be compared. Columns differ: query
    logits are cosines, decoded logits are not.
    """
    shapes = [picture.height / picture.width for picture, *_ in rows]
    height = sum(shapes) * WIDTH / 5.2 + 0.06 * len(rows) + 0.7
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(rows) + 1, 1 + len(MAPS), squeeze=False, height_ratios=[*shapes, 0.07])
    for axes, (picture, name, _) in zip(panels[:, 0], rows):
        axes.imshow(np.asarray(picture))
        axes.set_ylabel(name, fontsize=11)
    for column, (kind, above) in enumerate(MAPS.items(), start=1):
        values = [maps[kind].cpu().numpy() for *_, maps in rows]
        low, high = min(map(np.min, values)), max(map(np.max, values))
        for axes, value, (picture, *_) in zip(panels[:, column], values, rows):
            drawn = axes.imshow(value, vmin=low, vmax=high, cmap=SHADES, interpolation="nearest",
                                extent=(0, picture.width, picture.height, 0))
        panels[0, column].set_title(above, fontsize=10)
        bar = figure.colorbar(drawn, cax=panels[-1, column], orientation="horizontal")
        bar.ax.locator_params(nbins=4)
        bar.ax.tick_params(labelsize=8)
    panels[0, 0].set_title("image, class", fontsize=10)
    panels[-1, 0].axis("off")
    panels[-1, 0].text(0.5, 0.5, "logit", ha="center", va="center", fontsize=9)
    for axes in panels[:-1].flat:
        axes.set(xticks=[], yticks=[])
    return figure


def parse_pairs(given: list[str], ids: list[str], names: list[str]) -> list[tuple[str, int]]:
    """`--show` → image ids with class numbers. Raises ValueError for another image, or no class."""
    pairs = []
    for text in given:
        image, _, name = text.rpartition(":")
        if image not in ids or name not in names:
            other = "class" if image in ids else "image"
            raise ValueError(f"--show {text}: expected ID:CLASS, an image that is measured ({ids[0]}, …) "
                             f"and one of the classes {', '.join(names[:8])}, …; found another {other}.")
        pairs.append((image, names.index(name)))
    return pairs


@torch.no_grad()
def telling_pairs(setup: data.Setup, query: Tensor, count: int = 4) -> list[tuple[str, int]]:
    """Some images of the split, evenly spaced, each with the class that rectification changes most. No
    label."""
    pairs, found = [], evaluate.predictors(setup, query, ["maskclip", "rectify"])
    [short_side] = {predictor.short_side for predictor in found.values()}
    for image in scores.evenly_spaced(list(setup.evaluation_images), count):
        picture = read_image(setup.evaluation_images[image])
        resized = data.short_side_to(picture, short_side, setup.clip_model.visual.patch_size)
        logits = evaluate.logits_of_all(setup, found, data.to_tensor(resized)[None].to(setup.device))
        said = (evaluate.predict(one, (picture.height, picture.width)) for one in logits.values())
        pairs.append((image, most_changed_class(*said)))
    return pairs


# ---------------------------------------------------------------------------- files

FILES = ("figure1_distance", "figure1_confusion", "figure3_hypothesis", "figure4_logits", "figure5_results")


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def small_enough(content: bytes, largest: int) -> bytes:
    """A PNG of at most `largest` bytes: as it is if it fits, else with 256 colours, else smaller in steps of
    a tenth."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    width, height, scale = *picture.size, 1.0
    while len(content) > largest and min(width, height) * scale > 64:
        file = io.BytesIO()
        resized = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        resized.quantize(256, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
        content, scale = file.getvalue(), scale - 0.1
    return content


# ---------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> list[Path]:
    """Draw the figures that can be drawn for the newest run (or for `--data`) and return their paths."""
    wanted = args.only or [1, 3, 4, 5]
    points = read_points(Path(args.points)) if args.points is not None else None
    setup, query, labels, stages, system = scores.open_measured(args)
    names, folder = setup.vocabulary.names, setup.folder("figures")
    files.refuse_folders(folder, *(f"{name}.png" for name in FILES))
    pairs = parse_pairs(args.show, list(setup.evaluation_images), names) if args.show else None
    for number, missing in ((1, "" if labels else f"no labels of {setup.data} for these classes"),
                            (3, "" if points else "no --points, which are measured elsewhere"),
                            (4, why_no_maps(setup, system))):
        if number in wanted and missing:
            print(f"Figure {number} is left out: {missing}.")
            wanted = [other for other in wanted if other != number]
    drawn: dict[str, bytes] = {}
    if 1 in wanted:
        drawn |= figure_1(setup, evaluate.predictors(setup, query, stages, system), labels)
    if 3 in wanted:
        drawn["figure3_hypothesis"] = png(hypothesis_figure(points))
    if 4 in wanted:
        drawn["figure4_logits"] = figure_4(setup, query, pairs or telling_pairs(setup, query))
    folder.mkdir(parents=True, exist_ok=True)
    if 5 in wanted:
        shown = evaluate.predictors(setup, query, [stage for stage in stages if stage != "vanilla"], system)
        drawn["figure5_results"] = figure_5(setup, evaluate.titled(shown), labels)
    return [write(folder / f"{name}.png", content) for name, content in drawn.items()]


def figure_1(setup: data.Setup, found: dict[str, Predictor], labels: dict[str, Path]) -> dict[str, bytes]:
    """Both halves of figure 1, measured anew."""
    titles = {stage: title(stage, predictor.system) for stage, predictor in found.items()}
    of_bins = scores.confusions(setup, found, labels)
    curves = {stage: scores.distance_curve(confusion) for stage, (confusion, _) in of_bins.items()}
    counts = next(iter(of_bins.values()))[1]
    compared = {stage: of_bins[stage][0].sum(dim=0) for stage in ("maskclip", "rectify") if stage in of_bins}
    return {"figure1_distance": png(distance_figure(curves, counts, titles)),
            "figure1_confusion": png(confusion_figure(compared, setup.vocabulary.names, titles))}


def figure_4(setup: data.Setup, query: Tensor, pairs: list[tuple[str, int]]) -> bytes:
    """A row of heat maps for each pair of image and class. PNG."""
    rows = []
    for image, number in pairs:
        picture = read_image(setup.evaluation_images[image])
        maps = {kind: of_all[number] for kind, of_all in logit_maps(setup, query, picture).items()}
        rows.append((picture, setup.vocabulary.names[number], maps))
    return png(heat_figure(rows))


def figure_5(setup: data.Setup, columns: dict[str, Predictor], labels: dict[str, Path]) -> bytes:
    """Images, what each column makes of them, the truth. PNG."""
    path = setup.folder("figures") / "figure5_results.png"
    evaluate.picture_sheet(setup, columns, labels, path, rows=8, height=192)
    return path.read_bytes()


def write(path: Path, content: bytes) -> Path:
    """A picture, made small enough for a page."""
    content = small_enough(content, LARGEST)
    files.write_atomically(path, lambda file: file.write(content))
    print(f"Wrote {path}")
    return path


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
