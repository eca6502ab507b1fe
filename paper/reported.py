"""What the paper reports, as data: tables with their numbers, figures, and claims that can be checked.

    cells      (run, stage, measure): one number of ours for each seed; reproduce.py knows how to get it
    tables     rows, each with a cell of ours, the paper's numbers, or both
    claims     one cell should be above others

The numbers are those of arXiv 2408.06747 v1, mIoU in percent unless a row says otherwise. A run is a system
of systems.py, or a point of Figure 3's sweeps: ReCLIP++ with flags of its own. "Rectified" is stage 1, which
the paper calls "(rec.)"; "distilled" is stage 2. Imports nothing that is heavy: `reproduce.py --help` reads
this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# ---------------------------------------------------------------------------- cells

Cell = tuple[str, str, str]                 # run, stage, measure

# Keys of metrics.json (miou) and scores.json. "space_preference" is the paper's definition, the mean of the
# slopes between neighbouring distances; "space_slope" is ours, least squares over all objects (scores.py).
MEASURES = ("miou", "probe", "class_preference", "space_preference", "space_slope")
OF_MAFT = {"seen": "seen classes", "unseen": "unseen classes", "harmonic": "harmonic mean of the two",
           "spread": "ours, spread of scores", "spread_same": "ours, spread within a true class",
           "spread_other": "ours, spread between true classes"}

THRESHOLDS = (0.0, 0.03, 0.05, 0.1, 0.2, 0.4)       # t of Figure 3
RATIOS = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)   # its r: 1, 9, 25, 49, 121 and 225 windows an image
PATHS = {                                           # through CLIP's last block, as encode_dense has them
    "value": "value alone (MaskCLIP)", "residual": "value within residual and MLP (MaskCLIP's code)",
    "neighbourhood": "near patches of like keys (NACLIP)", "correlative": "like queries, like keys (SCLIP)"}
SWEEPS = {                                          # run: the flags that rectify.py is given for it
    **{f"t={t:g}": ("--vote-threshold", f"{t:g}") for t in THRESHOLDS},
    **{f"r={r:.3g}": ("--window-ratio", repr(r)) for r in RATIOS},
    **{f"path={path}": ("--dense-path", path) for path in PATHS},
}


def stage_1(run: str, measure: str = "miou") -> Cell:
    return run, "rectify", measure


def stage_2(run: str, measure: str = "miou") -> Cell:
    return run, "distill", measure


def of_clip(stage: str, measure: str = "miou") -> Cell:
    """Vanilla CLIP and MaskCLIP are measured beside ReCLIP++: they need no training."""
    return "reclip++", stage, measure


def of_maft(tower: str, measure: str) -> Cell:
    """Frozen or tuned CLIP, as maft.py measures both."""
    return "maft", tower, measure


VANILLA, MASKCLIP, MASKCLIP_PLUS = of_clip("vanilla"), of_clip("maskclip"), stage_2("maskclip+")
RECTIFIED, DISTILLED = stage_1("reclip++"), stage_2("reclip++")
RECLIP, RECLIP_DISTILLED = stage_1("reclip"), stage_2("reclip")
# of clip_s4.py: by the prototypes of the known classes, and by their words
CLIP_S4, CLIP_S4_TEXT = ("clip-s4", "clip_s4", "miou"), ("clip-s4", "clip_s4", "miou_text")

# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    title: str
    cell: Cell | None                       # None: a system that is cited; numbers to show, nothing to run
    paper: dict[str, float] = field(default_factory=dict)       # dataset: the number that is reported


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]
    digits: int = 1
    source: str = "paper"                   # who reports the numbers
    note: str = ""


def on(voc=None, context=None, ade=None, cityscapes=None, coco=None) -> dict[str, float]:
    named = {"voc": voc, "context": context, "ade": ade, "cityscapes": cityscapes, "coco": coco}
    return {name: value for name, value in named.items() if value is not None}


def table_1(voc=None, cityscapes=None, coco=None) -> dict[str, float]:
    """Table I has three datasets."""
    return on(voc=voc, cityscapes=cityscapes, coco=coco)


def preferences(kind: str, title: str, numbers: dict[str, dict[str, float]]) -> tuple[Row, ...]:
    """The four systems of Table VII under one measure, with the paper's numbers where it has them."""
    cells = {"MaskCLIP": of_clip("maskclip", kind), "MaskCLIP+": stage_2("maskclip+", kind),
             "ReCLIP rectified": stage_1("reclip", kind), "ReCLIP++ rectified": stage_1("reclip++", kind)}
    return tuple(Row(f"{title}: {system}", cell, numbers.get(system, {})) for system, cell in cells.items())


FULL_IN_III_TO_VI, FULL_IN_VIII_IX = on(73.5, 34.0), on(79.2)

TABLES = {
    "stages": Table("The stages of ReCLIP++", (
        Row("vanilla CLIP", VANILLA),
        Row("MaskCLIP", MASKCLIP, on(49.5, 21.7, 9.5, 19.8, 13.6)),
        Row("ReCLIP++ rectified", RECTIFIED, on(73.5, 34.0, 13.5, 21.7, 20.9)),
        Row("ReCLIP++ distilled", DISTILLED, on(79.2, 34.5, 14.5, 26.9, 23.2)))),
    "table1": Table("Table I: beside other unsupervised systems; LP is a linear probe", (
        Row("IIC", None, table_1(9.8, 6.4, 6.7)),
        Row("SegSort", None, table_1(11.7, None, 16.4)),
        Row("DSM", None, table_1(37.2)),
        Row("HSG", None, table_1(41.9, None, 23.8)),
        Row("ACSeg", None, table_1(47.1, None, 16.4)),
        Row("MaskContrast", None, table_1(49.6)),
        Row("EAGLE", None, table_1(None, 22.1, 27.2)),
        Row("DepthSeg", None, table_1(None, 23.1, 29.0)),
        Row("ReCLIP (LP)", stage_2("reclip", "probe"), table_1(76.1, 49.3, 26.2)),
        Row("ReCLIP++ rectified", RECTIFIED, table_1(73.5, 21.7, 21.2)),
        Row("ReCLIP++ distilled", DISTILLED, table_1(79.2, 26.9, 23.2)),
        Row("ReCLIP++ (LP)", stage_2("reclip++", "probe"), table_1(80.3, 54.1, 29.5)),
        Row("not in the paper: CLIP's dense features (LP)", of_clip("maskclip", "probe")),
        Row("not in the paper: ReCLIP++'s decoder output (LP)", stage_1("reclip++", "probe"))),
        note="On COCO-Stuff the paper gives ReCLIP++ rectified 21.2 here and 20.9 in Table II. Both stand as "
             "printed; which of them is right is not known."),
    "table2": Table("Table II: all systems", (
        Row("CLIPpy", None, on(voc=54.6, ade=13.5, cityscapes=22.3)),
        Row("ReCo", None, on(voc=55.2, context=26.2, cityscapes=19.3, coco=26.3)),
        Row("ReCo without context elimination", None, on(voc=54.8, context=23.1, cityscapes=18.2, coco=20.8)),
        Row("CLIP-S4", CLIP_S4, on(voc=72.0, context=33.6)),
        Row("not in the paper: CLIP-S4 by text", CLIP_S4_TEXT),
        Row("not in the paper: vanilla CLIP", VANILLA),
        Row("MaskCLIP", MASKCLIP, on(49.5, 21.7, 9.5, 19.8, 13.6)),
        Row("MaskCLIP+", MASKCLIP_PLUS, on(70.0, 31.1, 12.2, 25.2, 19.5)),
        Row("ReCLIP rectified", RECLIP, on(58.5, 25.8, 11.1, 16.2, 14.6)),
        Row("ReCLIP distilled", RECLIP_DISTILLED, on(75.8, 33.8, 14.3, 19.9, 20.3)),
        Row("ReCLIP++ rectified", RECTIFIED, on(73.5, 34.0, 13.5, 21.7, 20.9)),
        Row("ReCLIP++ distilled", DISTILLED, on(79.2, 34.5, 14.5, 26.9, 23.2)))),
    "table3": Table("Table III: from ReCLIP to ReCLIP++, rectified", (
        Row("ReCLIP", RECLIP, on(58.5, 25.8)),
        Row("+ decoder", stage_1("reclip+decoder"), on(68.6, 27.8)),
        Row("+ multi-label hypothesis from windows", stage_1("reclip+decoder+windows"), on(70.4, 33.1)),
        Row("+ independent encoding = ReCLIP++", RECTIFIED, FULL_IN_III_TO_VI))),
    "table4": Table("Table IV: the Query", (
        Row("learnable", stage_1("learnable-query"), on(71.6, 32.1)),
        Row("fixed", RECTIFIED, FULL_IN_III_TO_VI))),
    "table5": Table("Table V: how the bias is taken away", (
        Row("element-wise addition", stage_1("addition"), on(72.4, 32.9)),
        Row("subtraction", RECTIFIED, FULL_IN_III_TO_VI))),
    "table6": Table("Table VI: CLIP's image tower", (
        Row("fine-tuned", stage_1("fine-tuned"), on(1.2, 0.4)),
        Row("frozen", RECTIFIED, FULL_IN_III_TO_VI))),
    "table7": Table("Table VII: class preference (paper: Context) and space preference (paper: VOC)", (
        *preferences("class_preference", "class preference", {
            "MaskCLIP": on(context=.29), "MaskCLIP+": on(context=.31),
            "ReCLIP rectified": on(context=.33), "ReCLIP++ rectified": on(context=.37)}),
        *preferences("space_preference", "space preference", {
            "MaskCLIP": on(voc=-.50), "MaskCLIP+": on(voc=-.48),
            "ReCLIP rectified": on(voc=-.41), "ReCLIP++ rectified": on(voc=-.29)}),
        *preferences("space_slope", "not in the paper, space slope", {}),
        *(Row(f"not in the paper, {measure.replace('_', ' ')}: {title}", stage_2(run, measure))
          for measure in ("class_preference", "space_preference", "space_slope")
          for run, title in (("reclip", "ReCLIP distilled"), ("reclip++", "ReCLIP++ distilled")))), digits=2,
        note="The paper's ReCLIP and ReCLIP++ are the rectified ones, its MaskCLIP+ is a student. Space "
             "preference is the mean of the slopes between neighbouring distances, as the paper words it; "
             "space slope is ours, the line of least squares over all objects."),
    "table8": Table("Table VIII: losses of the distillation", (
        Row("masks", stage_2("loss-mask"), on(77.7)),
        Row("+ features", stage_2("loss-mask+feature"), on(78.9)),
        Row("+ text", DISTILLED, FULL_IN_VIII_IX))),
    "table9": Table("Table IX: the student's head", (
        Row("its own", stage_2("own-head"), on(76.2)),
        Row("query", stage_2("head-query"), on(48.3)),
        Row("query, bias", stage_2("head-query+bias"), on(50.6)),
        Row("query, bias, rectified mask generation", DISTILLED, FULL_IN_VIII_IX))),
    "grid": Table("Not in the paper: where Eq. 8 and 9 are averaged", (
        Row("over the student's grid: ours", DISTILLED),
        Row("over the image's pixels, as the paper writes it", stage_2("losses-at-image")))),
    "release": Table("Not in the paper: ReCLIP++ rectified, as others report it", (
        Row("the authors' later release", None, on(85.4, 36.1, 16.4, 26.5, 23.8)),
        Row("a third party's own training of that release", None, on(84.5, 24.1, 13.3)),
        Row("ReCLIP++ rectified", RECTIFIED)), source="reported",
        note="The release measures with prompt denoising, whose threshold it chose per dataset with labels; "
             "ours is measured without."),
    "bias": Table("Not in the paper: what the bias map gives beside the decoder; three forms of Eq. 7", (
        Row("neither bias nor decoder: MaskCLIP", MASKCLIP),
        Row("bias alone", stage_1("without-decoder")),
        Row("decoder alone", stage_1("no-bias")),
        Row("both = ReCLIP++", RECTIFIED),
        Row("decoder alone, Eq. 7 as a cosine", stage_1("no-bias+loss-cosine")),
        Row("both, Eq. 7 as a cosine", stage_1("loss-cosine")),
        Row("decoder alone, Eq. 7 over the mask's area", stage_1("no-bias+loss-area")),
        Row("both, Eq. 7 over the mask's area", stage_1("loss-area")))),
    "paths": Table("Not in the paper: rectification on stronger dense paths", tuple(
        Row(f"{title}{', rectified' * (stage == 'rectify')}", (f"path={path}", stage, "miou"))
        for path, title in PATHS.items() for stage in ("maskclip", "rectify"))),
    "windows": Table("Not in the paper: Eq. 6's windows in one pass, rectified", (
        Row("a pass for each window: ReCLIP++", RECTIFIED),
        Row("one pass for all, a class token each", stage_1("one-pass-windows")),
        Row("the same, the image 1.5 times as large", stage_1("one-pass-windows-larger")),
        Row("the same, tokens split at the last block", stage_1("one-pass-windows-late")))),
    "figure3": Table("Figure 3: the hypothesis", (
        Row("the recipe's t and r", RECTIFIED),
        *(Row(f"t = {100 * t:g} %", stage_1(f"t={t:g}")) for t in THRESHOLDS),
        *(Row(f"r = {r:.3g}", stage_1(f"r={r:.3g}")) for r in RATIOS),
        Row("whole-image rule of ReCLIP", stage_1("whole-image")))),
    "maft": Table("Apart from all others: MAFT, zero-shot, trained on the labels of seen classes", (
        *(Row(f"{title}: {tower} CLIP", of_maft(tower, measure), numbers if measure == "unseen" else {})
          for measure, title in OF_MAFT.items()
          for tower, numbers in (("frozen", on(voc=78.6, ade=4.4, coco=42.2)),
                                 ("tuned", on(voc=81.8, ade=8.7, coco=50.4)))),), source="MAFT's paper",
        note="MAFT's numbers are of FreeSeg without and with it, on the proposals of a trained Mask2Former, "
             "which ours are not; its splits of COCO and ADE are others. Spread is between two "
             "proposals of an image, in percent: 0 if their scores are the same, 100 if each is sure of "
             "another class."),
}

FIGURES = {                                 # the cells that a figure is drawn from
    "figure1": (MASKCLIP, RECTIFIED, DISTILLED, of_clip("maskclip", "space_slope")),
    "figure3": (),                          # those of its table
    "figure4": (RECTIFIED,),
    "figure5": (MASKCLIP, RECLIP, RECTIFIED, DISTILLED),
}
WHAT = (*TABLES, *(name for name in FIGURES if name not in TABLES))     # what reproduce.py can be asked for

# The released code tests with prompt denoising (evaluate.py --prompt-denoising) at these thresholds. [code]
DENOISING = {"rectify": on(1.0, .85, .5, .5, .95), "distill": on(voc=.95, coco=.95)}


def numbers() -> list[tuple[str, str, str, float]]:
    """Every number of others that stands above: (table, row, dataset, value)."""
    return [(name, row.title, data, value)
            for name, table in TABLES.items() for row in table.rows for data, value in row.paper.items()]


# ---------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """`better` is above every one of `worse`, with the same seed. None in a cell's place is the number 0.

    A text that begins with "ours:" says what the paper does not.
    """
    source: str                             # a key of TABLES or FIGURES
    text: str
    better: Cell | None
    worse: tuple[Cell | None, ...]


def preference_claims(kind: str) -> tuple[Claim, ...]:
    """Table VII's order under one of its two measures."""
    title, measure = f"{kind} preference", f"{kind}_preference"
    maskclip, maskclip_plus = of_clip("maskclip", measure), stage_2("maskclip+", measure)
    reclip, reclip_pp = stage_1("reclip", measure), stage_1("reclip++", measure)
    return (Claim("table7", f"{title}: MaskCLIP+ above MaskCLIP", maskclip_plus, (maskclip,)),
            Claim("table7", f"{title}: ReCLIP rectified above MaskCLIP+", reclip, (maskclip_plus,)),
            Claim("table7", f"{title}: ReCLIP++ rectified above ReCLIP rectified", reclip_pp, (reclip,)),
            Claim("table7", f"{title}: ReCLIP++ rectified above MaskCLIP", reclip_pp, (maskclip,)))


CLAIMS = (
    Claim("table1", "a linear probe of ReCLIP++ is better than one of ReCLIP",
          stage_2("reclip++", "probe"), (stage_2("reclip", "probe"),)),
    Claim("table1", "a linear probe of ReCLIP++ is better than ReCLIP++ itself",
          stage_2("reclip++", "probe"), (DISTILLED,)),
    Claim("table1", "ours: a linear probe finds more in the student's features than in CLIP's own",
          stage_2("reclip++", "probe"), (of_clip("maskclip", "probe"),)),
    Claim("table2", "ours: MaskCLIP is better than vanilla CLIP", MASKCLIP, (VANILLA,)),
    Claim("table2", "ReCLIP's rectification is better than MaskCLIP", RECLIP, (MASKCLIP,)),
    Claim("table2", "ReCLIP++'s rectification is better than ReCLIP's", RECTIFIED, (RECLIP,)),
    Claim("table2", "ReCLIP++'s rectification is better than MaskCLIP", RECTIFIED, (MASKCLIP,)),
    Claim("table2", "MaskCLIP+ is better than MaskCLIP", MASKCLIP_PLUS, (MASKCLIP,)),
    Claim("table2", "ReCLIP's student is better than its teacher", RECLIP_DISTILLED, (RECLIP,)),
    Claim("table2", "ReCLIP's student is better than MaskCLIP+", RECLIP_DISTILLED, (MASKCLIP_PLUS,)),
    Claim("table2", "ReCLIP++'s student is better than its teacher", DISTILLED, (RECTIFIED,)),
    Claim("table2", "ReCLIP++'s student is better than ReCLIP's", DISTILLED, (RECLIP_DISTILLED,)),
    Claim("table2", "ReCLIP++'s student is better than MaskCLIP+", DISTILLED, (MASKCLIP_PLUS,)),
    Claim("table2", "CLIP-S4 is better than MaskCLIP", CLIP_S4, (MASKCLIP,)),
    Claim("table2", "ReCLIP++'s student is better than CLIP-S4", DISTILLED, (CLIP_S4,)),
    Claim("table2", "ours: prototypes are better than words for CLIP-S4", CLIP_S4, (CLIP_S4_TEXT,)),
    Claim("table3", "the decoder helps ReCLIP", stage_1("reclip+decoder"), (RECLIP,)),
    Claim("table3", "the hypothesis from windows helps",
          stage_1("reclip+decoder+windows"), (stage_1("reclip+decoder"),)),
    Claim("table3", "encoding class and space bias independently helps",
          RECTIFIED, (stage_1("reclip+decoder+windows"),)),
    Claim("table4", "a fixed Query is better than a learnable one", RECTIFIED, (stage_1("learnable-query"),)),
    Claim("table5", "subtraction is better than addition", RECTIFIED, (stage_1("addition"),)),
    Claim("table6", "a frozen CLIP is better than a fine-tuned one", RECTIFIED, (stage_1("fine-tuned"),)),
    Claim("table6", "fine-tuned CLIP falls below MaskCLIP", MASKCLIP, (stage_1("fine-tuned"),)),
    *preference_claims("class"),
    *preference_claims("space"),
    Claim("table8", "the feature loss helps the student",
          stage_2("loss-mask+feature"), (stage_2("loss-mask"),)),
    Claim("table8", "the text loss helps the student", DISTILLED, (stage_2("loss-mask+feature"),)),
    Claim("table9", "what is inherited is better than a head of the student's own",
          DISTILLED, (stage_2("own-head"),)),
    Claim("table9", "a head of the student's own is better than the query alone",
          stage_2("own-head"), (stage_2("head-query"),)),
    Claim("table9", "the bias helps the query", stage_2("head-query+bias"), (stage_2("head-query"),)),
    Claim("table9", "rectified mask generation helps query and bias",
          DISTILLED, (stage_2("head-query+bias"),)),
    Claim("figure1", "MaskCLIP recognises objects in the centre better than near the border", None,
          (of_clip("maskclip", "space_slope"),)),
    Claim("figure3", "mIoU over t is bell-shaped: the recipe's t is above both ends", RECTIFIED,
          (stage_1(f"t={THRESHOLDS[0]:g}"), stage_1(f"t={THRESHOLDS[-1]:g}"))),
    Claim("figure3", "mIoU over r is bell-shaped: the recipe's r is above both ends", RECTIFIED,
          (stage_1(f"r={RATIOS[0]:.3g}"), stage_1(f"r={RATIOS[-1]:.3g}"))),
    Claim("figure3", "windows are better than the whole-image rule", RECTIFIED, (stage_1("whole-image"),)),
    Claim("bias", "ours: the bias alone, without a decoder, is better than MaskCLIP",
          stage_1("without-decoder"), (MASKCLIP,)),
    Claim("bias", "ours: bias and decoder are better than the decoder alone",
          RECTIFIED, (stage_1("no-bias"),)),
    Claim("bias", "ours: the same with Eq. 7 as a cosine",
          stage_1("loss-cosine"), (stage_1("no-bias+loss-cosine"),)),
    Claim("bias", "ours: the same with Eq. 7 over the mask's area",
          stage_1("loss-area"), (stage_1("no-bias+loss-area"),)),
    Claim("maft", "ours: MAFT's tuned CLIP is better than the frozen one on unseen classes",
          of_maft("tuned", "unseen"), (of_maft("frozen", "unseen"),)),
    Claim("maft", "ours: tuned CLIP's scores differ more between any two proposals of an image",
          of_maft("tuned", "spread"), (of_maft("frozen", "spread"),)),
    Claim("maft", "ours: tuned CLIP's scores differ more between proposals of two true classes",
          of_maft("tuned", "spread_other"), (of_maft("frozen", "spread_other"),)),
)
