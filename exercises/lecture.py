"""Make the lecture page: the method in the order of its equations, in pictures of a real run in Toyland.

    python exercises/lecture.py                makes exercises/lecture.md and exercises/lecture/*.png

Reads the rectification and the student in --out, and trains where there is none (six minutes on two cores).
Every number on the page comes from that run. Reads labels, to show the truth: nothing here trains with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)                                     # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--out", type=common.path, metavar="DIR", default="runs",
                        help="where the run is, or will be (default: runs)")
    parser.add_argument("--root", type=common.path, metavar="DIR", default="data",
                        help="where datasets lie (default: data)")
    parser.add_argument("--scene", type=common.whole(0), metavar="N",
                        help="the validation scene to show (default: among the first hundred, one where the "
                             "steps change much for the better)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import distill
import evaluate
import rectify
from datasets import images as image_files, labels as ground_truth
from harness import machine, runs

PAGE, PICTURES = ROOT / "exercises" / "lecture.md", ROOT / "exercises" / "lecture"
LOOKED_AT = 100                             # validation scenes, to find one that shows much
HEIGHT = 120                                # of a tile, in pixels

# ------------------------------------------------------------------------------------------ the run


@dataclass
class Seen:
    """All that the method makes of one scene, step by step."""
    name: str
    image: Image.Image
    truth: Tensor                           # (H, W)
    batch: Tensor                           # (1, 3, H, W)
    features: Tensor                        # Z    (1, D, h, w)
    query: Tensor                           # W_q  (C, D)
    query_logits: Tensor                    # M_q  (1, C, h, w)
    reference: Tensor                       # W_r  (C, D)
    positions: Tensor                       # PE   (E, h, w)
    bias: Tensor                            # M_b  (C, h, w)
    logits: Tensor                          # M    (1, C, h, w)
    decoded: Tensor                         # M_o  (1, C, h, w)
    masks: Tensor                           # M̂    (1, C, h, w)
    windows: Tensor                         # (k², 3, size, size)
    votes: Tensor                           # f    (1, C)
    hypothesis: Tensor                      # H    (1, C)
    loss: Tensor
    student: Tensor                         # Ẑ    (1, D, h', w')
    student_logits: Tensor                  # M^D  (1, C, h', w')


def trained(args: argparse.Namespace) -> data.Setup:
    """The setup of the run in --out; what is missing of it is trained."""
    given = ["--data", "toyland", "--out", args.out, "--root", args.root]
    folder = runs.run_folder(args.out, "toyland", "rectify").parent
    for stage in (rectify, distill):
        if not (folder / stage.__name__ / "checkpoint.pt").exists():
            finished = stage.main(stage.flags().parse_args(given))
            evaluate.after_training(finished, stage.__name__)
    checkpoint = runs.find(args.out, "toyland", "rectify", "distill")
    return data.open_setup(evaluate.flags().parse_args(given), checkpoint)


class Run:
    """A finished run: the rectifier, the student, their recipes and their measures."""

    def __init__(self, setup: data.Setup):
        self.setup, self.query = setup, rectify.query_of(setup)
        self.checkpoint = runs.load(setup.folder("rectify") / "checkpoint.pt", "rectify")
        self.recipe, self.rectifier = rectify.load_rectifier(setup, self.checkpoint, rectify.System())
        self.student_recipe, self.student = distill.load_student(setup, self.query, distill.System())
        self.names, self.palette = setup.vocabulary.names, setup.vocabulary.palette
        with torch.no_grad():
            self.reference = rectify.reference_features(setup.clip_model, self.rectifier.prompt, self.names)
        self.labels = ground_truth.true_label_files(setup.data, setup.root, setup.split,
                                                    list(setup.evaluation_images))
        self.read_label = ground_truth.LabelReader(setup.data, len(self.names))
        self.found = evaluate.predictors(setup, self.query, list(evaluate.STAGES))
        self.metrics = evaluate.measure(setup, self.found, self.labels)

    @torch.no_grad()
    def look(self, name: str) -> Seen:
        """One validation scene's way through both stages."""
        setup, recipe, model = self.setup, self.recipe, self.setup.clip_model
        image = image_files.read_image(setup.evaluation_images[name])
        truth = torch.from_numpy(self.read_label(self.labels[name], (image.height, image.width)))
        shown = data.short_side_to(image, recipe.short_side, model.visual.patch_size)
        batch = data.to_tensor(shown)[None].to(setup.device)
        features = self.rectifier.encode(model, batch, recipe.dense_path)
        positions = model.visual.patch_positions(*features.shape[-2:])
        bias = self.rectifier.bias(positions, self.reference)
        logits = self.rectifier.subtract(features, self.query, bias)
        decoded = self.rectifier.decoder(features, logits)
        noise = torch.Generator(setup.device).manual_seed(0)
        uniform = torch.rand(decoded.shape, generator=noise, device=setup.device)
        masks = rectify.rectified_masks(decoded, recipe.mask_scale, uniform)
        windows = rectify.at_input_size(batch[0], recipe.window_ratio, model.visual.input_resolution)
        votes = rectify.window_votes(model.encode_image(windows).float(), self.query)[None]
        hypothesis = rectify.multi_label_hypothesis(votes, recipe.vote_threshold)
        loss = rectify.contrastive_loss(features, masks, self.query, hypothesis, recipe.loss_scale)
        student = self.student.network(batch)
        return Seen(name, image, truth, batch, features, self.query,
                    rectify.query_logits(features, self.query),
                    self.reference, positions, bias, logits, decoded, masks, windows, votes, hypothesis, loss,
                    student,
                    self.student.head(student))


def scene_to_show(run: Run, wanted: int | None) -> Seen:
    """The scene that was asked for, else one where rectifying helps much and many classes are to be seen."""
    names = list(run.setup.evaluation_images)
    if wanted is not None:
        if wanted >= len(names):
            raise ValueError(f"--scene {wanted}: expected a number under {len(names)}, found a larger one.")
        return run.look(names[wanted])
    best, most = names[0], -1.0
    for name in names[:LOOKED_AT]:
        seen = run.look(name)
        at_first, subtracted, decoded, student = (right(logits, seen.truth) for logits in (
            seen.query_logits, seen.logits, seen.decoded, seen.student_logits))
        value = 2 * (subtracted
                     - at_first) + decoded - at_first + student / 2 + 0.04 * len(seen.truth.unique())
        if value > most:
            best, most = name, value
    return run.look(best)


def said_too_often(run: Run) -> tuple[int, int]:
    """The class that MaskCLIP says most too often, over many scenes, and in how many of them it is too often.
    """
    said, true = [], []
    for name in list(run.setup.evaluation_images)[:LOOKED_AT]:
        seen = run.look(name)
        predicted = evaluate.predict(seen.query_logits, tuple(seen.truth.shape)).cpu()
        for counts, one in ((said, predicted), (true, seen.truth)):
            one = one[seen.truth < len(run.names)].long().flatten()
            counts.append(torch.bincount(one, minlength=len(run.names)))
    more = torch.stack(said) - torch.stack(true)
    k = int(more.sum(dim=0).argmax())
    return k, int((more[:, k] > 0).sum())


def right(logits: Tensor, truth: Tensor) -> float:
    """The share of an image's pixels whose class is right."""
    return (evaluate.predict(logits, tuple(truth.shape)).cpu() == truth).float().mean().item()


# ------------------------------------------------------------------------------------------ pictures


def heat(values: Tensor, low: float, high: float) -> Image.Image:
    """A map (h, w) in colours: low is dark blue, high is yellow."""
    import matplotlib
    table = (255 * matplotlib.colormaps["cividis"](np.linspace(0, 1, 256))[:, :3]).astype(np.uint8)
    scaled = ((values.cpu().float().numpy() - low) / max(high - low, 1e-9)).clip(0, 1)
    return Image.fromarray(table[(255 * scaled).astype(int)])


def strip(tiles: list[tuple[str, Image.Image]], names: list[str] = (), palette=()) -> Image.Image:
    """Pictures of one height side by side, each under its title; below, the colours of the named classes."""
    font, gap = ImageFont.truetype(str(evaluate.FONT), 12), 6
    shown = [(title, tile.resize((round(tile.width * HEIGHT / tile.height), HEIGHT),
                                 Image.Resampling.NEAREST if tile.width < 100 else Image.Resampling.BILINEAR))
             for title, tile in tiles]
    widths = [max(tile.width, round(font.getlength(title)) + 2) for title, tile in shown]
    width = sum(widths) + gap * (len(widths) + 1)
    rows, x = [[]], gap
    for name, colour in zip(names, palette):
        length = 32 + round(font.getlength(name))
        if x + length > width:
            rows, x = [*rows, []], gap
        rows[-1].append((x, name, colour))
        x += length
    foot = 20 * len(rows) if names else 0
    page = Image.new("RGB", (width, 22 + HEIGHT + gap + foot), "white")
    pen, x = ImageDraw.Draw(page), gap
    for (title, tile), room in zip(shown, widths):
        pen.text((x, 4), title, fill="black", font=font)
        page.paste(tile, (x, 22))
        x += room + gap
    for number, row in enumerate(rows):
        y = 24 + HEIGHT + 20 * number
        for x, name, colour in row:
            pen.rectangle((x, y + 2, x + 12, y + 14), fill=tuple(colour), outline="gray")
            pen.text((x + 17, y), name, fill="black", font=font)
    return page


def save(page: Image.Image, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.save(PICTURES / f"{name}.png", optimize=True)


def classes_of(run: Run, logits: Tensor, size: tuple[int, int]) -> Image.Image:
    return evaluate.colour(evaluate.predict(logits, size).cpu(), run.palette)


def patches_of(run: Run, logits: Tensor) -> Image.Image:
    """The best class of every patch, a block of colour each."""
    return evaluate.colour(logits[0].argmax(dim=0).cpu(), run.palette)


def with_windows(image: Image.Image, ratio: float) -> Image.Image:
    """The image with four of its windows drawn in."""
    shown = image.resize((image.width * 3, image.height * 3), Image.Resampling.BILINEAR)
    pen, k = ImageDraw.Draw(shown), max(2, round(2 / ratio) - 1)
    width, height = shown.width * ratio, shown.height * ratio
    for row, column in ((0, 0), (0, 1), (k // 2, k // 2), (k - 1, k - 1)):
        x, y = column * (shown.width - width) / (k - 1), row * (shown.height - height) / (k - 1)
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=(255, 0, 80), width=3)
    return shown


def votes_chart(run: Run, seen: Seen) -> Image.Image:
    """The share of windows of each class as a bar, and the threshold as a line."""
    font = ImageFont.truetype(str(evaluate.FONT), 11)
    page = Image.new("RGB", (460, 18 * len(run.names) + 26), "white")
    pen, most = ImageDraw.Draw(page), max(0.3, seen.votes.max().item())
    for number, (name, share) in enumerate(zip(run.names, seen.votes[0].tolist())):
        y, inside = 4 + 18 * number, bool(seen.hypothesis[0, number])
        pen.text((4, y), name, fill="black" if inside else "gray", font=font)
        pen.rectangle((70, y + 1, 71 + 300 * share / most, y + 13), fill=tuple(run.palette[number]),
                      outline="gray")
        pen.text((378, y), f"{100 * share:.1f} %{'  in H' if inside else ''}", fill="black" if inside
                 else "gray",
                 font=font)
    x = 71 + 300 * run.recipe.vote_threshold / most
    pen.line((x, 2, x, page.height - 18), fill=(220, 0, 60), width=1)
    pen.text((x - 4, page.height - 16), f"t = {100 * run.recipe.vote_threshold:g} %", fill=(220, 0, 60),
             font=font)
    return page


# ------------------------------------------------------------------------------------------ the page


def draw(run: Run, seen: Seen) -> dict:
    """All pictures of the page. Returns what the text says about them."""
    (k, often), size = said_too_often(run), (seen.image.height, seen.image.width)
    name, pictures = run.names[k], seen.image
    there = [int(one) for one in seen.truth.unique() if one < len(run.names)]
    said = evaluate.predict(seen.query_logits, size).cpu()
    legend = sorted(set(there) | {int(one) for one in said.unique()}
                    | {int(one) for one in seen.decoded[0].argmax(dim=0).unique()})
    colours = [run.names[one] for one in legend], [run.palette[one] for one in legend]
    save(strip([("image", pictures),
                ("truth, which training never sees", evaluate.colour(seen.truth, run.palette)),
                ("M_q: MaskCLIP", classes_of(run, seen.query_logits, size))], *colours), "query")
    both = torch.cat([seen.query_logits[0, k].flatten(), seen.logits[0, k].flatten()])
    low, high = both.min().item(), both.max().item()
    bias = seen.bias[k]
    save(strip([("image", pictures), (f"M_q of {name}", heat(seen.query_logits[0, k], low, high)),
                (f"M_b of {name}", heat(bias, bias.min().item(), bias.max().item())),
                (f"M of {name}", heat(seen.logits[0, k], low, high))]), "bias")
    save(strip([("M_q, patch by patch", patches_of(run, seen.query_logits)),
                ("M = M_q − M_b", patches_of(run, seen.logits)),
                ("M_o: decoded", patches_of(run, seen.decoded)),
                ("M̂: one draw", patches_of(run, seen.masks))], *colours), "decoder")
    save(strip([(f"{len(seen.windows)} windows, four of them",
                 with_windows(pictures, run.recipe.window_ratio))]),
         "windows")
    save(votes_chart(run, seen), "votes")
    save(strip([("image", pictures), ("rectified: the teacher", classes_of(run, seen.decoded, size)),
                ("distilled: the student", classes_of(run, seen.student_logits, size)),
                ("truth", evaluate.colour(seen.truth, run.palette))], *colours), "student")
    changed = (seen.masks.argmax(dim=1) != seen.decoded.argmax(dim=1)).float().mean().item()
    return {"class": name, "often": often, "true": [run.names[one] for one in there], "changed": changed,
            "said": (said == k).float().mean().item(), "true_share": (seen.truth == k).float().mean().item(),
            "bias_low": bias.min().item(), "bias_high": bias.max().item(), "bias_mean": bias.mean().item(),
            "bias_rank": int((seen.bias.mean(dim=(1, 2)) > bias.mean()).sum()) + 1,
            "hypothesis": [run.names[one] for one in seen.hypothesis[0].nonzero().flatten().tolist()]}


def shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})" if tensor.dim() else "a number"


def shapes(run: Run, seen: Seen) -> str:
    """One image's way from disk to loss, as a table."""
    size = run.setup.clip_model.visual.input_resolution
    recipe = run.recipe
    rows = [
        ("a file", f"`{seen.name}.png`", f"{seen.image.width} × {seen.image.height} pixels, RGB",
         "`datasets/images.py` `read_image`"),
        ("a batch of one", "", shape(seen.batch), "`data.py` `short_side_to`, `to_tensor`"),
        ("features", "Z", shape(seen.features), "`clip/model.py` `encode_dense`"),
        ("query", "W_q", shape(seen.query), "`query_features`"),
        ("query logits", "M_q", shape(seen.query_logits), "`query_logits`"),
        ("Reference prompt", "v", shape(run.rectifier.prompt), "trained"),
        ("Reference, Eq. 1", "W_r", shape(seen.reference), "`reference_features`"),
        ("positions", "PE", shape(seen.positions), "`patch_positions`"),
        ("bias logits, Eq. 2", "M_b", shape(seen.bias), "`bias_logits`"),
        ("what is left, Eq. 3", "M", shape(seen.logits), "`subtract_bias`"),
        ("decoded, Eq. 4", "M_o", shape(seen.decoded), "`Decoder`"),
        ("masks, Eq. 5", "M̂", shape(seen.masks), "`rectified_masks`"),
        ("windows", "", shape(seen.windows), f"`windows`, each resized to {size} × {size}"),
        ("votes", "f", shape(seen.votes), "`window_votes`"),
        ("hypothesis, Eq. 6", "H", shape(seen.hypothesis), "`multi_label_hypothesis`"),
        ("loss, Eq. 7", "", f"{seen.loss.item():.3f}", "`contrastive_loss`"),
        ("the student's features", "Ẑ", shape(seen.student), "`distill.py` `DeepLabV2`"),
        ("the student's logits", "M^D", shape(seen.student_logits), "`distill.py` `Inherited`")]
    assert seen.masks.sum(dim=1).eq(1).all() and recipe.prompt_length == len(run.rectifier.prompt)
    return "\n".join(["| what | symbol | shape or value | where |", "|---|---|---|---|",
                      *(f"| {' | '.join(row)} |" for row in rows)])


def page(run: Run, seen: Seen, said: dict) -> str:
    recipe, student, metrics = run.recipe, run.student_recipe, run.metrics
    classes, (_, D, h, w) = len(run.names), seen.features.shape
    shares = {stage: 100 * right(logits, seen.truth) for stage, logits in (
        ("maskclip", seen.query_logits), ("M", seen.logits), ("rectify", seen.decoded),
        ("distill", seen.student_logits))}
    rows = "\n".join(f"| {evaluate.STAGES[stage]} | {metrics[stage]['miou']:.1f} | "
                     f"{metrics[stage]['pixel_accuracy']:.1f} | "
                     f"{f'{shares[stage]:.0f}' if stage in shares else '–'} |" for stage in metrics)
    in_truth, in_h = set(said["true"]), set(said["hypothesis"])
    both, missed, extra = (", ".join(sorted(one)) or "none" for one in (in_truth & in_h, in_truth - in_h,
                                                                         in_h - in_truth))
    count = metrics["rectify"]["fingerprint"]["images"]
    grid = " × ".join(map(str, seen.student.shape[-2:]))
    draws = f'{100 * said["changed"]:.0f} % of the patches'
    text = f"""# ReCLIP++ in pictures

This page follows one picture through the whole method, in the order of the equations. The picture is scene
{seen.name} of [Toyland](../toyland/README.md), a drawn world of {classes} classes; nothing was trained on it.
All pictures and numbers come from one run with seed {run.checkpoint["settings"]["seed"]}, and `python
exercises/lecture.py` makes this page anew.

## What CLIP sees: features and query (Sec. III-A)

CLIP was trained on pictures with captions. It gives one vector for a picture and one for a sentence, and the
two are close when they fit. To segment, we need a vector for every *place*. The last layer's values have it:
each of the {h} × {w} patches gets a unit vector Z of {D} numbers. A class is a vector too: its name, in
several sentences, through CLIP's text tower. The cosine of the two is the **query logit** M_q = Z W_qᵀ, and
the class with the highest one is MaskCLIP's answer.

![image, truth, MaskCLIP](lecture/query.png)

In this scene MaskCLIP is right in {shares["maskclip"]:.0f} % of the pixels. Some classes it says too often
whatever the picture. Most of all *{said["class"]}*: in {said["often"]} of the first {min(LOOKED_AT, count)}
validation scenes it covers more pixels than it should. Here it has {100 * said["said"]:.0f} % of them; in
truth it is {100 * said["true_share"]:.0f} %. That is the **bias**: it comes from what captions name, and not
from this picture.

## The bias, learned without labels (Eq. 1 and 2)

What does CLIP say when no picture speaks? The **Reference** is a sentence of {recipe.prompt_length} learned
vectors and the class's name, W_r (Eq. 1): it is to take up which classes CLIP prefers. The **positional
embedding**, projected, is W_p: it knows where a patch is, and nothing of what is there. Their product M_b =
W_p W_rᵀ (Eq. 2) is a map for each class, the same for every picture.

![query logits, bias and the difference for one class](lecture/bias.png)

For *{said["class"]}* the bias is between {said["bias_low"]:+.3f} and {said["bias_high"]:+.3f}, on average
{said["bias_mean"]:+.3f}: number {said["bias_rank"]} of {classes} classes, from the highest down. M_q and M
have the same scale of colours; M_b has one of its own.

## Subtract, decode (Eq. 3 and 4)

M = M_q − M_b (Eq. 3). A **decoder**, one 5×5 convolution over features and logits and a BatchNorm, smooths
what is left: M_o (Eq. 4). In this scene M_q is right in {shares["maskclip"]:.0f} % of the pixels, M in
{shares["M"]:.0f} %, M_o in {shares["rectify"]:.0f} %. The two are trained together, so neither is worth by
itself what the other adds.

![patch by patch: query, rectified, decoded, drawn](lecture/decoder.png)

## Draw masks (Eq. 5)

To learn, each patch has to decide on a class, and the decision must have a gradient. **Gumbel-Softmax** adds
noise to M_o (here times {recipe.mask_scale:g}) and takes the best: exactly one class a patch. In the backward
pass it behaves like a softmax. In the draw above, {draws} got another class than the best one: a class that
is losing is still tried.

## Which classes are there? (Eq. 6)

Nobody has labelled the picture, so CLIP is asked: {len(seen.windows)} windows of
{100 * recipe.window_ratio:g} % of its height and width slide over it, each goes through CLIP as a picture of
its own, and votes for a class. Classes with more than {100 * recipe.vote_threshold:g} % of the votes form the
**hypothesis** H.

![windows](lecture/windows.png)

![votes](lecture/votes.png)

In H and in the picture: {both}. In the picture, but not in H: {missed}. In H, but not in the picture:
{extra}. It is a guess that no label corrects.

## The loss (Eq. 7)

Average the features under the mask of a class of H: CLIP should find that this average looks like the class,
and like no other of the {classes}. That is a cross-entropy for each class of H, and their mean is the loss:
here {seen.loss.item():.3f}, where masks that hold nothing would cost ln {classes} = {np.log(classes):.3f}.
Its gradient reaches the mask, through Eq. 5 the decoder, through Eq. 3 the bias. The {recipe.prompt_length}
vectors, the projection and the decoder learn; CLIP stays as it is.

## Distil (Eq. 8 to 10)

The rectified CLIP was never trained to segment. A **student**, DeepLab V2 on a ResNet, learns from it: its
masks (Eq. 8), its features (Eq. 9, weight {student.feature_weight:g}), and once more the loss of Eq. 7
(weight {student.text_weight:g}); Eq. 10 is the sum. Query, bias and decoder it inherits, frozen. It sees
{grid} places, and needs no CLIP any more.

![teacher, student, truth](lecture/student.png)

## What came out

| | mIoU, {count} scenes | pixels that are right, {count} scenes | pixels that are right, this scene |
|---|---|---|---|
{rows}

All in percent, without refinements. One seed: the spread over five is in [paper/](../paper/README.md).

## One image's way from disk to loss

{shapes(run, seen)}

{classes} classes, D = {D} joint dimensions, {h} × {w} = {h * w} patches. Functions without a file are in
`rectify.py`. A batch of training has {recipe.batch_size} such images, and its masks are drawn anew in every
step.
"""
    from exercises.ladder import wrapped_paragraphs
    return wrapped_paragraphs(text)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(machine.seed_of(0, "lecture"))
    run = Run(trained(args))
    seen = scene_to_show(run, args.scene)
    said = draw(run, seen)
    PAGE.write_text(page(run, seen, said), encoding="utf-8")
    size = sum(path.stat().st_size for path in PICTURES.glob("*.png"))
    print(f"Wrote {PAGE} and {len(list(PICTURES.glob('*.png')))} pictures in {PICTURES}, {size / 1000:.0f} "
          f"kB.")


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
