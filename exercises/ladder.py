"""The exercises, as data. Hand-out, checks, marks, pages and tests are derived from this list alone.

    python exercises/ladder.py                 writes the list into exercises/README.md

A function is named by its file and its name there. One that does not exist is an error wherever the list is
used. In a hand-out a file, handout.json, says which exercises were chosen and what the project had already.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)                                     # modules are named from the project's folder

from exercises import sources


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    functions: tuple[str, ...]      # "file:name", blanked in the hand-out; none: an open exercise
    marks: int
    minutes: int
    write: str                      # what to write
    satisfies: str                  # what it should satisfy
    hint: str

    @property
    def open(self) -> bool:
        return not self.functions


LADDER = (
    Exercise(
        1, "Dense features by the value path",
        ("clip/model.py:Attention.values", "clip/model.py:VisionTransformer.dense"), 10, 60,
        "The last block of CLIP's image tower, so that every patch keeps what it saw itself: first the "
        "projection of its own value, then the block around it by each of the first three paths that "
        "`CLIP.encode_dense` describes.",
        "Attention over a single token is that token's own value, so `values` of one token is what the whole "
        "layer gives. No token's result depends on another token. The class token is not in the result of "
        "`dense`.",
        "The rows of `in_proj_weight` are three matrices, one upon the other: query, key, value. Which third "
        "do you need?"),
    Exercise(
        2, "Query features and query logits",
        ("rectify.py:query_features", "rectify.py:query_logits"), 10, 45,
        "What CLIP expects each class to look like, from its names in all templates; and the cosine of every "
        "patch with every class: MaskCLIP's prediction.",
        "Rows have length one. Two sentences weigh alike, however long CLIP's two vectors are. A patch that "
        "equals the query of a class has logit 1 there.",
        "Normalise twice: before the mean, so that all sentences weigh alike, and after it."),
    Exercise(
        3, "The bias, Eq. 1 and 2",
        ("clip/model.py:CLIP.encode_prompt", "rectify.py:reference_features", "rectify.py:bias_logits"), 15,
        120,
        "The text features of learned vectors and class names, with the shared prefix computed once; their "
        "normalisation; the bias logit map from positions and Reference.",
        "With the embeddings of real words for vectors, `encode_prompt` gives what `encode_text` gives for "
        "the whole sentence. A class's row does not depend on the other classes. The blocks see the prefix "
        "once and not once a class. A name that does not fit raises ValueError. The whole matrix W_r has "
        "length one.",
        "`in_one_sequence` has done the bookkeeping: call it with P = 1 + L shared tokens, which are the "
        "start token and the vectors, at positions 0 to P − 1. Its tokens come behind them, at the positions "
        "it names. Run the blocks one by one, for they take its mask `seen` and the tower does not; read at "
        "`end`, as encode_text does. `longest` is for the ValueError. With one class a causal mask does too, "
        "with several it does not."),
    Exercise(
        4, "Rectified logits, Eq. 3 and 4",
        ("rectify.py:subtract_bias", "rectify.py:Decoder.forward"), 5, 20,
        "What is left of the query logits without the bias; and the decoder, which smooths them with the "
        "features as a guide.",
        "One bias map serves all images of the batch. The decoder's convolution sees D + C channels, "
        "features first.",
        "In PyTorch, (B, C, h, w) and (C, h, w) fit together as they are."),
    Exercise(
        5, "Masks by Gumbel-Softmax, Eq. 5",
        ("rectify.py:rectified_masks",), 10, 60,
        "One class per patch, drawn at random, with the gradient of a softmax.",
        "Every patch has exactly one 1. If M_o are log-probabilities and the scale is 1, class k is drawn "
        "with its probability. Numbers of `uniform` at 0 and next to 1 give finite results. The gradient is "
        "the softmax's.",
        "Gumbel noise is −log(−log u). A hard value with a soft gradient: add something that is zero, but "
        "whose gradient is not."),
    Exercise(
        6, "Windows, votes, hypothesis, Eq. 6",
        ("rectify.py:windows", "rectify.py:window_votes", "rectify.py:multi_label_hypothesis"), 10, 60,
        "Windows over the image, the share of them that each class wins, and the classes with more than a "
        "threshold of it.",
        "Ratio 1 gives the image itself, 1/2 gives 3 × 3 windows from corner to corner, row by row. Shares "
        "sum to one, whatever the length of the window's vector. A share equal to the threshold is not "
        "enough. No hypothesis is empty.",
        "First window at 0, last at the end, the others evenly between, rounded. The best class is always in "
        "H."),
    Exercise(
        7, "The contrastive loss, Eq. 7",
        ("rectify.py:contrastive_loss",), 15, 75,
        "Pool the features under each mask, compare with every class's query, and ask each class of the "
        "hypothesis to be the best in its own row.",
        "Empty masks cost ln C and still have a gradient. Masks of classes outside H change nothing. An "
        "image counts once, however many classes it has. Larger masks weigh more: Z_g is not normalised "
        "again.",
        "Write the shapes first: Z_g (B, C, D), S (B, C, C). Which dim is the softmax over, and what do you "
        "read of it?"),
    Exercise(
        8, "The training step",
        ("rectify.py:train_step",), 10, 45,
        "Seven lines, Eq. 1 to Eq. 7, each a call of the function or of the rectifier's part that implements "
        "it.",
        "Each part is called once, with what the part before it gave. All randomness comes from `noise`. The "
        "loss that is handed in is the one that is used.",
        "Eq. 2, 3 and 4 are parts of the rectifier: `bias`, `subtract`, `decoder`. The picture at the top of "
        "rectify.py is the order."),
    Exercise(
        9, "Distillation, Eq. 8 to 10",
        ("distill.py:mask_loss", "distill.py:feature_loss", "distill.py:text_loss", "distill.py:total_loss"),
        10, 45,
        "The three losses of the student, and their sum.",
        "A student that knows nothing pays ln C for its masks. Each is a mean, so that a batch of two equal "
        "images costs what one costs. The gradient of the features reaches the student. The teacher's grid "
        "may be another than the student's.",
        "`resized` brings the teacher's features to the student's grid. Detach nothing of the student's."),
    Exercise(
        10, "mIoU",
        ("evaluate.py:confusion_matrix", "evaluate.py:class_iou"), 5, 30,
        "The confusion matrix, and the intersection over union of each class.",
        "Row: truth, column: prediction. Pixels whose truth is 255 are not counted. A class in neither truth "
        "nor prediction has NaN, and so no part in the mean.",
        "A pair of classes (i, j) is one number, i · C + j; count those. The union is what either has, "
        "counted once."),
    Exercise(
        11, "Open: a system of your own",
        (), 10, 240,
        "An ablation in paper/systems.py: say what you expect before you run it. Replace one part of "
        "ReCLIP++ (the rectifier, the votes, the loss, the student's head) or a few numbers, add a line to "
        "SYSTEMS, train it, and compare: `python paper/run.py YOURS --out runs-yours`. Hand in half a page.",
        "It has a name of its own, differs from ReCLIP++ in a part or a number, and takes a training step "
        "with a finite loss. Exercises 1 to 8 are needed for that. What you expected, what came out and why "
        "is for a person to judge.",
        "Start from the class that is nearest to yours, and override one method. Ideas: a 1×1 decoder, a "
        "bias that knows only its row, another temperature, a threshold per image."),
    Exercise(
        12, "Open: another class in Toyland",
        (), 10, 240,
        "Add a stuff or a thing to toyland/world.py: a name, a colour, a drawing, where it is at home. Train "
        "the small CLIP anew with `python toyland/pretrain.py`, run all stages, and say what changed for the "
        "other classes and why.",
        "It is drawn in scenes and in captioned pictures and named in captions, has a colour of its own, and "
        "leaves room for the other classes.",
        "A thing needs an entry in THINGS and in DRAWINGS, a stuff in STUFF and in TEXTURES. Look at `python "
        "toyland/world.py` before you train."),
)

# Pieces of solutions that stand elsewhere too and say nothing by themselves.
HARMLESS = ("torch.cat([features, logits], dim=1)", "clip_model.visual.patch_positions(*features.shape[-2:])")

# Functions outside of the exercises that say a solution in other words: exercise → what is blank with it.
ALIKE = {3: ("paper/released.py:their_reference",), 6: ("paper/systems.py:above_or_best",)}

HANDOUT = "exercises/handout.json"


def said_by_handout(root: Path = ROOT) -> dict:
    """What the hand-out says of itself; of the full project: all exercises, and nothing was there before."""
    path = root / HANDOUT
    if not path.exists():
        return {"exercises": [one.number for one in LADDER], "systems": [], "classes": []}
    return json.loads(path.read_text(encoding="utf-8"))


def chosen(numbers=None) -> list[Exercise]:
    """The exercises with these numbers, in order; None: those of this hand-out, or all. Raises ValueError."""
    there = said_by_handout()["exercises"]
    wanted = there if numbers is None else numbers
    if unknown := [number for number in wanted if number not in there]:
        raise ValueError(f"exercise {unknown[0]}: expected one of {', '.join(map(str, there))}; there is no "
                         "other here.")
    return [one for one in LADDER if one.number in wanted]


def refuse_missing(exercises, root: Path = ROOT) -> None:
    """Raise ValueError for a function that no longer exists."""
    for one in exercises:
        for function in one.functions:
            file, name = sources.split(function)
            if not (root / file).exists():
                raise ValueError(f"exercise {one.number}: expected the file {file}, found none. "
                                 "exercises/ladder.py needs its new name.")
            try:
                sources.found_or_raise((root / file).read_text(encoding="utf-8"), name)
            except ValueError as error:
                raise ValueError(f"exercise {one.number}, {file}: {error}") from None


def message(exercise: Exercise, function: str, docstring: str | None) -> str:
    """What a blanked function says when it is called."""
    name = sources.split(function)[1]
    asked = (docstring or "").strip().split("\n\n")[0].split(". ")[0]
    asked = " ".join(asked.split())
    return f"exercise {exercise.number}: write {name}. {asked}"


# ------------------------------------------------------------------------------------------ the page

BEGIN, END = "<!-- exercises: written by exercises/ladder.py -->", "<!-- end of exercises -->"


def page(exercises=LADDER) -> str:
    """The exercises as Markdown: what to write, what it should satisfy, how long, a hint, how to check it."""
    rows = ["| | exercise | functions | marks | minutes |", "|---|---|---|---|---|"]
    for one in exercises:
        names = ", ".join(f"`{sources.split(function)[1]}`" for function in one.functions) or "open"
        rows.append(f"| {one.number} | {one.title} | {names} | {one.marks} | {one.minutes} |")
    parts = ["\n".join(rows)]
    for one in exercises:
        where = {}
        for function in one.functions:
            file, name = sources.split(function)
            where.setdefault(file, []).append(f"`{name}`")
        place = "; ".join(f"`{file}`: {', '.join(names)}" for file, names in where.items())
        parts += [f"### {one.number}. {one.title}", *([f"In {place}."] if place else []),
                  f"**Write.** {one.write}", f"**It should satisfy.** {one.satisfies}",
                  f"**Time.** About {one.minutes} minutes. **Marks.** {one.marks}"
                  + (", given by a person." if one.open else "."),
                  f"<details><summary>A hint</summary>\n\n{one.hint}\n\n</details>",
                  f"**Check.** `python exercises/check.py --only {one.number}`"]
    return "\n\n".join(parts)


def with_page(readme: str, exercises=LADDER) -> str:
    """The text of README.md with the part between the two marks written anew."""
    head, _, rest = readme.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"exercises/README.md: expected the two lines {BEGIN} and {END}, found not both.")
    return f"{head}{BEGIN}\n\n{wrapped(page(exercises))}\n\n{END}{tail}"


def wrapped(text: str) -> str:
    """Each line as a paragraph of lines of at most 110 characters; tables stay."""
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 110, break_long_words=False,
                                                                     break_on_hyphens=False)
                     for line in text.split("\n"))


def wrapped_paragraphs(text: str) -> str:
    """A page whose paragraphs are filled anew, after numbers were put in; headings, tables, pictures stay."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith(("|", "#", "!")) else wrapped(" ".join(part.split("\n")))
                       for part in parts).rstrip() + "\n"


def flags() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description="Write the list of exercises into exercises/README.md.")


def main(args: argparse.Namespace) -> None:
    refuse_missing(LADDER)
    path = ROOT / "exercises" / "README.md"
    path.write_text(with_page(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {path}: {len(LADDER)} exercises, {sum(one.marks for one in LADDER)} marks.")


if __name__ == "__main__":
    main(flags().parse_args())
