"""What the paper reports, as data: systems, tables with their numbers, and claims that can be checked. See reproduce.py.

    runs       what is trained: a system of systems.py, and flags
    cells      (run, stage, measure): one number for each seed
    tables     rows of cells beside the paper's numbers
    claims     one cell should be above others

Numbers are mIoU in percent unless a row says otherwise. They are the paper's (arXiv 2408.06747 v1), those of ReCLIP and
MaskCLIP as it reports them; where a table is known to us in part, so are its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# ------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Run:
    """One thing to train: a system of systems.py, with flags for its stage 1."""
    system: str = "reclip++"
    stages: tuple[str, ...] = ("rectify", "distill")
    flags: tuple[str, ...] = ()
    teacher: str | None = None              # the run whose rectification is taken over instead of training one


THRESHOLDS = (0.0, 0.03, 0.05, 0.1, 0.2, 0.4)       # t of Figure 3
RATIOS = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)   # r of Figure 3: 1, 9, 25, 49, 121 and 225 windows an image

RUNS = {
    "reclip++": Run(),
    "maskclip+": Run("maskclip+", stages=("distill",)),
    "reclip": Run("reclip"),
    **{name: Run(name, stages=("rectify",)) for name in (
        "reclip+decoder", "reclip+decoder+windows", "learnable-query", "addition", "fine-tuned", "no-bias",
        "without-decoder", "whole-image", "loss-cosine", "no-bias+loss-cosine", "loss-area", "no-bias+loss-area")},
    **{name: Run(name, stages=("distill",), teacher="reclip++") for name in (
        "loss-mask", "loss-mask+feature", "own-head", "head-query", "head-query+bias")},
    **{f"t={t:g}": Run(stages=("rectify",), flags=("--vote-threshold", f"{t:g}")) for t in THRESHOLDS},
    **{f"r={r:.3g}": Run(stages=("rectify",), flags=("--window-ratio", repr(r))) for r in RATIOS},
}

# ------------------------------------------------------------------------------------------ cells

Cell = tuple[str, str, str]                 # run, stage, measure

VANILLA, MASKCLIP = ("reclip++", "vanilla", "miou"), ("reclip++", "maskclip", "miou")


def stage_1(system: str) -> Cell:
    return system, "rectify", "miou"


def stage_2(system: str) -> Cell:
    return system, "distill", "miou"


RECTIFIED, DISTILLED, MASKCLIP_PLUS = stage_1("reclip++"), stage_2("reclip++"), stage_2("maskclip+")
RECLIP, RECLIP_DISTILLED = stage_1("reclip"), stage_2("reclip")


# ------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Row:
    title: str
    cell: Cell
    paper: dict[str, float] = field(default_factory=dict)       # dataset: the paper's number


@dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]
    digits: int = 1


def on(voc=None, context=None, ade=None, cityscapes=None, coco=None) -> dict[str, float]:
    named = {"voc": voc, "context": context, "ade": ade, "cityscapes": cityscapes, "coco": coco}
    return {name: value for name, value in named.items() if value is not None}


FULL_IN_III_TO_V, FULL_IN_VIII_IX = on(73.5, 34.0), on(79.2)

TABLES = {
    "stages": Table("The stages of ReCLIP++", (
        Row("vanilla CLIP", VANILLA),
        Row("MaskCLIP", MASKCLIP, on(49.5, 21.7, 9.5, 19.8, 13.6)),
        Row("ReCLIP++ rectified", RECTIFIED, on(73.5, 34.0, 13.5, 21.7, 20.9)),
        Row("ReCLIP++ distilled", DISTILLED, on(79.2, 34.5, 14.5, 26.9, 23.2)))),
    "table1": Table("Table I: linear probe", (
        Row("CLIP's dense features (MaskCLIP)", ("reclip++", "maskclip", "probe")),
        Row("ReCLIP++, what the decoder puts out", ("reclip++", "rectify", "probe")),
        Row("ReCLIP++, the student's features", ("reclip++", "distill", "probe"), on(voc=80.3, cityscapes=54.1, coco=29.5)))),
    "table2": Table("Table II: all systems", (
        Row("vanilla CLIP", VANILLA),
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
        Row("+ independent encoding = ReCLIP++", RECTIFIED, FULL_IN_III_TO_V))),
    "table4": Table("Table IV: the Query", (
        Row("learnable", stage_1("learnable-query"), on(71.6, 32.1)),
        Row("fixed", RECTIFIED, FULL_IN_III_TO_V))),
    "table5": Table("Table V: how the bias is taken away", (
        Row("element-wise addition", stage_1("addition"), on(72.4, 32.9)),
        Row("subtraction", RECTIFIED, FULL_IN_III_TO_V))),
    "table6": Table("Table VI: CLIP's image tower", (
        Row("fine-tuned", stage_1("fine-tuned"), on(1.2, 0.4)),
        Row("frozen", RECTIFIED, FULL_IN_III_TO_V))),
    "table7": Table("Table VII: class preference (paper: Context) and space preference (paper: VOC)", (
        Row("class preference: MaskCLIP", ("reclip++", "maskclip", "class_preference"), on(context=.29)),
        Row("class preference: MaskCLIP+", ("maskclip+", "distill", "class_preference"), on(context=.31)),
        Row("class preference: ReCLIP", ("reclip", "distill", "class_preference"), on(context=.33)),
        Row("class preference: ReCLIP++", ("reclip++", "distill", "class_preference"), on(context=.37)),
        Row("space preference: MaskCLIP", ("reclip++", "maskclip", "space_preference"), on(voc=-.50)),
        Row("space preference: MaskCLIP+", ("maskclip+", "distill", "space_preference"), on(voc=-.48)),
        Row("space preference: ReCLIP", ("reclip", "distill", "space_preference"), on(voc=-.41)),
        Row("space preference: ReCLIP++", ("reclip++", "distill", "space_preference"), on(voc=-.29)),
        Row("class preference: ReCLIP++ rectified", ("reclip++", "rectify", "class_preference")),
        Row("space preference: ReCLIP++ rectified", ("reclip++", "rectify", "space_preference"))), digits=2),
    "table8": Table("Table VIII: losses of the distillation", (
        Row("masks", stage_2("loss-mask"), on(77.7)),
        Row("+ features", stage_2("loss-mask+feature"), on(78.9)),
        Row("+ text", DISTILLED, FULL_IN_VIII_IX))),
    "table9": Table("Table IX: the student's head", (
        Row("its own", stage_2("own-head"), on(76.2)),
        Row("query", stage_2("head-query"), on(48.3)),
        Row("query, bias", stage_2("head-query+bias"), on(50.6)),
        Row("query, bias, rectified mask generation", DISTILLED, FULL_IN_VIII_IX))),
    "bias": Table("Not in the paper: what the bias map gives beside the decoder, under three forms of Eq. 7", (
        Row("neither bias nor decoder: MaskCLIP", MASKCLIP),
        Row("bias alone", stage_1("without-decoder")),
        Row("decoder alone", stage_1("no-bias")),
        Row("both = ReCLIP++", RECTIFIED),
        Row("decoder alone, Eq. 7 as a cosine", stage_1("no-bias+loss-cosine")),
        Row("both, Eq. 7 as a cosine", stage_1("loss-cosine")),
        Row("decoder alone, Eq. 7 over the mask's area", stage_1("no-bias+loss-area")),
        Row("both, Eq. 7 over the mask's area", stage_1("loss-area")))),
    "figure3": Table("Figure 3: the hypothesis", (
        Row("the recipe's t and r", RECTIFIED),
        *(Row(f"t = {100 * t:g} %", stage_1(f"t={t:g}")) for t in THRESHOLDS),
        *(Row(f"r = {r:.3g}", stage_1(f"r={r:.3g}")) for r in RATIOS),
        Row("whole-image rule of ReCLIP", stage_1("whole-image")))),
}

FIGURES = {                                 # the cells that a figure is drawn from
    "figure1": (MASKCLIP, RECTIFIED, DISTILLED, ("reclip++", "maskclip", "space_preference")),
    "figure3": (),                          # those of its table
    "figure4": (RECTIFIED,),
    "figure5": (MASKCLIP, RECLIP, RECTIFIED, DISTILLED),
}

# ------------------------------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Claim:
    """`better` is above every one of `worse`, with the same seed. None in the place of a cell is the number 0."""
    source: str                             # a key of TABLES or FIGURES
    text: str
    better: Cell | None
    worse: tuple[Cell | None, ...]


def preference(kind: str, system: str, stage: str) -> Cell:
    return system, stage, f"{kind}_preference"


CLAIMS = (
    Claim("table1", "a linear probe finds more in the student's features than in CLIP's own",
          ("reclip++", "distill", "probe"), (("reclip++", "maskclip", "probe"),)),
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
    Claim("table3", "the decoder helps ReCLIP", stage_1("reclip+decoder"), (RECLIP,)),
    Claim("table3", "the hypothesis from windows helps", stage_1("reclip+decoder+windows"), (stage_1("reclip+decoder"),)),
    Claim("table3", "encoding class and space bias independently helps", RECTIFIED, (stage_1("reclip+decoder+windows"),)),
    Claim("table4", "a fixed Query is better than a learnable one", RECTIFIED, (stage_1("learnable-query"),)),
    Claim("table5", "subtraction is better than addition", RECTIFIED, (stage_1("addition"),)),
    Claim("table6", "a frozen CLIP is better than a fine-tuned one", RECTIFIED, (stage_1("fine-tuned"),)),
    Claim("table6", "fine-tuned CLIP falls below MaskCLIP", MASKCLIP, (stage_1("fine-tuned"),)),
    Claim("table7", "class preference: MaskCLIP+ above MaskCLIP", preference("class", "maskclip+", "distill"),
          (preference("class", "reclip++", "maskclip"),)),
    Claim("table7", "class preference: ReCLIP above MaskCLIP+", preference("class", "reclip", "distill"),
          (preference("class", "maskclip+", "distill"),)),
    Claim("table7", "class preference: ReCLIP++ above ReCLIP", preference("class", "reclip++", "distill"),
          (preference("class", "reclip", "distill"),)),
    Claim("table7", "class preference: ReCLIP++ above MaskCLIP", preference("class", "reclip++", "distill"),
          (preference("class", "reclip++", "maskclip"),)),
    Claim("table7", "space preference: MaskCLIP+ above MaskCLIP", preference("space", "maskclip+", "distill"),
          (preference("space", "reclip++", "maskclip"),)),
    Claim("table7", "space preference: ReCLIP above MaskCLIP+", preference("space", "reclip", "distill"),
          (preference("space", "maskclip+", "distill"),)),
    Claim("table7", "space preference: ReCLIP++ above ReCLIP", preference("space", "reclip++", "distill"),
          (preference("space", "reclip", "distill"),)),
    Claim("table7", "space preference: ReCLIP++ above MaskCLIP", preference("space", "reclip++", "distill"),
          (preference("space", "reclip++", "maskclip"),)),
    Claim("table8", "the feature loss helps the student", stage_2("loss-mask+feature"), (stage_2("loss-mask"),)),
    Claim("table8", "the text loss helps the student", DISTILLED, (stage_2("loss-mask+feature"),)),
    Claim("table9", "what is inherited is better than a head of the student's own", DISTILLED, (stage_2("own-head"),)),
    Claim("table9", "a head of the student's own is better than the query alone", stage_2("own-head"), (stage_2("head-query"),)),
    Claim("table9", "the bias helps the query", stage_2("head-query+bias"), (stage_2("head-query"),)),
    Claim("table9", "rectified mask generation helps query and bias", DISTILLED, (stage_2("head-query+bias"),)),
    Claim("figure1", "MaskCLIP recognises objects in the centre better than near the border", None,
          (preference("space", "reclip++", "maskclip"),)),
    Claim("figure3", "mIoU over t is bell-shaped: the recipe's t is above both ends", RECTIFIED,
          (stage_1(f"t={THRESHOLDS[0]:g}"), stage_1(f"t={THRESHOLDS[-1]:g}"))),
    Claim("figure3", "mIoU over r is bell-shaped: the recipe's r is above both ends", RECTIFIED,
          (stage_1(f"r={RATIOS[0]:.3g}"), stage_1(f"r={RATIOS[-1]:.3g}"))),
    Claim("figure3", "windows are better than the whole-image rule", RECTIFIED, (stage_1("whole-image"),)),
    Claim("bias", "ours: the bias alone, without a decoder, is better than MaskCLIP", stage_1("without-decoder"), (MASKCLIP,)),
    Claim("bias", "ours: bias and decoder are better than the decoder alone", RECTIFIED, (stage_1("no-bias"),)),
    Claim("bias", "ours: the same with Eq. 7 as a cosine", stage_1("loss-cosine"), (stage_1("no-bias+loss-cosine"),)),
    Claim("bias", "ours: the same with Eq. 7 over the mask's area", stage_1("loss-area"), (stage_1("no-bias+loss-area"),)),
)
