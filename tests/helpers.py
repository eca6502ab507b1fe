"""What several test files share: random CLIP weights, files in OpenAI's format, and a measure of difference.

Weights are random but never zero and never one: an initialisation that leaves biases at 0 and LayerNorm at 1
would hide a forgotten bias or a swapped norm from every parity test.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# Small enough for milliseconds, and no two sizes alike: a test cannot pass because two of them were confused.
TINY = dict(width=128, layers=3, patch=8, resolution=32, embed_dim=48, text_width=192, text_layers=2)


def python_files(root: Path, leave_out=()) -> list[Path]:
    """All sources of the house; what an editor, an environment or a run has put beside them is none of it."""
    top = [path for path in root.iterdir()
           if path.suffix == ".py" or path.is_dir() and any(path.glob("*.py"))]
    return sorted(file for path in top if path.name not in ("tests", *leave_out)
                  for file in (path.rglob("*.py") if path.is_dir() else [path]))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries. The shapes must agree: no silent broadcasting."""
    assert found.shape == expected.shape, \
        f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}"
    return ((found - expected).norm() / expected.norm()).item()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, dim: int = -1, seed: int = 0) -> Tensor:
    """Random vectors of length one along `dim`."""
    return F.normalize(random(*shape, seed=seed), dim=dim)


def openai_shapes(*, width=768, layers=12, patch=16, resolution=224, embed_dim=512, text_width=512,
                  text_layers=12,
                  text_vocab=49408) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a ViT CLIP, as OpenAI's release has them. The defaults are
    ViT-B/16."""
    shapes = {"positional_embedding": (77, text_width), "text_projection": (text_width, embed_dim),
              "logit_scale": (),
              "visual.class_embedding": (width,),
              "visual.positional_embedding": (1 + (resolution // patch) ** 2, width),
              "visual.proj": (width, embed_dim), "visual.conv1.weight": (width, 3, patch, patch),
              "token_embedding.weight": (text_vocab, text_width)}
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    for tower, E, depth in (("visual.", width, layers), ("", text_width, text_layers)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": E, f"{block}.ln_2": E}
            for layer, out, into in (("attn.in_proj_", 3 * E, E), ("attn.out_proj.", E, E),
                                     ("mlp.c_fc.", 4 * E, E), ("mlp.c_proj.", E, 4 * E)):
                shapes |= {f"{block}.{layer}weight": (out, into), f"{block}.{layer}bias": (out,)}
    return shapes | {f"{norm}.{part}": (E,) for norm, E in norms.items() for part in ("weight", "bias")}


def openai_state(*, seed=0, **sizes) -> dict[str, Tensor]:
    """A random float32 state dict under OpenAI's names; `sizes` as in `openai_shapes`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in openai_shapes(**sizes).items():
        # Matrices keep the size of what passes through them; vectors (biases, norms) get a noise one can see.
        std = 0.1 if len(shape) < 2 or "embedding" in name else math.prod(shape[1:]) ** -0.5
        is_norm = ".ln_" in f".{name}" and name.endswith("weight")
        middle = 1.0 if is_norm else 2.6 if name == "logit_scale" else 0.0
        state[name] = middle + std * torch.randn(shape, generator=generator)
    return state


def write_openai_archive(path: str | Path, *, width=768, layers=12, patch=16, resolution=224, embed_dim=512,
                         text_width=512, text_layers=12, seed=0, half=True,
                         text_vocab=49408) -> dict[str, Tensor]:
    """Write a file in the format of OpenAI's release and return the float32 state dict that should come out
    of it.

    That is a TorchScript archive of a module tree with OpenAI's names. Besides the weights it holds, as
    theirs do, three sizes as buffers; and in the text tower's blocks the causal mask, which OpenAI's code
    keeps as a plain attribute: an archive stores such tensors too, though they are no weights, and a reader
    has to cope. `half` rounds to float16 what OpenAI rounds: matrices and their biases; norms, embeddings and
    logit_scale stay in float32.
    """
    state = openai_state(width=width, layers=layers, patch=patch, resolution=resolution, embed_dim=embed_dim,
                         text_width=text_width, text_layers=text_layers, text_vocab=text_vocab, seed=seed)
    if half:
        kept = ("ln_", "embedding", "logit_scale")
        state = {name: tensor if any(word in name for word in kept) else tensor.half() for name,
                 tensor in state.items()}

    tree = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = tree
        # make the modules on the way, as in `a.b.c.weight`
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_parameter(leaf, nn.Parameter(tensor))
    for name, value in (("input_resolution", resolution), ("context_length", 77), ("vocab_size", text_vocab)):
        tree.register_buffer(name, torch.tensor(value))
    for block in tree.transformer.resblocks.children():
        block.attn_mask = torch.full((77, 77), -math.inf).triu(diagonal=1)
    with warnings.catch_warnings():
        # torch calls TorchScript deprecated; the files remain
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(tree.eval()), str(path))
    return {name: tensor.float() for name, tensor in state.items()}


def toy_vocabulary():
    """Four classes: names of one token and of two, and a synonym."""
    from datasets import words
    return words.vocabulary_of("toys", (("cat",), ("potted plant",), ("airplane",), ("sky", "heaven")))


def toy_setup(out: Path, **flags):
    """A tiny random CLIP and the four classes, without images."""
    import clip
    from data import Setup
    model = clip.build_model(openai_state(**TINY)).eval().requires_grad_(False)
    given = dict(out=str(out), cache=None, precision="fp32", workers=0, skip_broken=False, seed=0) | flags
    return Setup("toys", "data", toy_vocabulary(), model, "tiny", Namespace(**given), "all")


# ------------------------------------------------------------------------------------- small datasets on disk

# A CLIP for whole runs of the scripts: every size at its least, yet OpenAI's architecture and the real
# tokenizer.
SMALLEST = dict(width=64, layers=2, patch=8, resolution=32, embed_dim=24, text_width=64, text_layers=1)
VOC_BASE = Path("VOCdevkit", "VOC2012")


def photo(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    """A random picture of soft blobs: what JPEG keeps of it is not noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1 + height // 8, 1 + width // 8, 3),
                                                  dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path, *names: str, height: int = 40, width: int = 56) -> Path:
    """Different photos under the given file names (sub-folders and all); returns the folder."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(height, width, seed).save(folder / name)
    return folder


def write_label(path: Path, values: np.ndarray) -> None:
    """A label as VOC distributes it: an indexed PNG whose palette is VOC's, so that it also looks right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette([channel for index in range(256) for channel in voc_colour(index)])
    picture.save(path)


def voc_colour(index: int) -> tuple[int, int, int]:
    """VOC's colour of a label value: its bits in threes, spread over red, green and blue from the top bit
    down."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index & 1) << 7 - bit
        green |= (index >> 1 & 1) << 7 - bit
        blue |= (index >> 2 & 1) << 7 - bit
        index >>= 3
    return red, green, blue


def write_voc_tree(root: Path, train=("2007_000032", "2007_000039", "2007_000063", "2007_000068"),
                   val=("2007_000033", "2007_000042"), height: int = 40, width: int = 56) -> Path:
    """VOC 2012's tree in small: JPEG photos, indexed labels with background 0 and border 255, and the two
    lists."""
    base = root / VOC_BASE
    write_photos(base / "JPEGImages", *(f"{name}.jpg" for name in (*train, *val)), height=height, width=width)
    for seed, name in enumerate((*train, *val)):
        values = np.random.default_rng(seed).choice([0, 1, 2, 8, 15, 20, 255], (height // 8, width // 8))
        write_label(base / "SegmentationClass" / f"{name}.png", values.repeat(8, axis=0).repeat(8, axis=1))
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", train), ("val", val)):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


# Four training and two validation images of each public dataset: id, and the values that stand in the small
# labels.
TREES = {
    "context": (["2008_000002", "2008_000003", "2009_000010", "2010_000005"], ["2008_000009", "2010_000042"],
                [0, 2, 7, 15, 23, 37, 59]),
    "ade": ([f"ADE_train_{i:08d}" for i in (1, 2, 3, 10)], ["ADE_val_00000001", "ADE_val_00000020"],
            [0, 1, 2, 13, 45, 150]),
    "cityscapes": (["aachen/aachen_000000_000019", "aachen/aachen_000001_000019",
                    "bochum/bochum_000000_000313",
                    "ulm/ulm_000000_000019"],
                   ["frankfurt/frankfurt_000000_000294", "munster/munster_000000_000019"],
                   [0, 3, 7, 8, 11, 23, 26, 33]),
    "coco": (["000000000009", "000000000025", "000000000030", "000000000034"],
             ["000000000139", "000000000285"],
             [0, 15, 77, 93, 156, 181, 255]),
}


def write_public_tree(name: str, root: Path, values: list[int] | None = None) -> Path:
    """A public dataset's tree in small, under the folder and file names that its archive has. Returns where
    it begins.

    Labels are blocks of 8 pixels of the given values; Cityscapes' are labelIds.
    """
    train, val, usual = TREES[name]
    top, folders, photos, labels = {
        "context": ("VOCdevkit/VOC2010", ("train", "val"), "JPEGImages/{id}.jpg",
                    "SegmentationClassContext/{id}.png"),
        "ade": ("ADEChallengeData2016", ("training", "validation"), "images/{split}/{id}.jpg",
                "annotations/{split}/{id}.png"),
        "cityscapes": ("cityscapes", ("train", "val"), "leftImg8bit/{split}/{id}_leftImg8bit.png",
                       "gtFine/{split}/{id}_gtFine_labelIds.png"),
        "coco": ("coco_stuff164k", ("train2017", "val2017"), "images/{split}/{id}.jpg",
                 "annotations/{split}/{id}.png")}[name]
    base = root / top
    for split, folder, ids in (("train", folders[0], train), ("val", folders[1], val)):
        write_photos(base, *(photos.format(split=folder, id=image) for image in ids))
        for seed, image in enumerate(ids):
            blocks = np.random.default_rng(seed).choice(values or usual, (5, 7))
            write_label(base / labels.format(split=folder, id=image),
                        blocks.repeat(8, axis=0).repeat(8, axis=1))
        if name == "context":
            path = base / f"ImageSets/SegmentationContext/{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{image}\n" for image in ids))
    return base


# -------------------------------------------------------------------------------------- the scripts, in small

def quick_recipes(monkeypatch, folder: Path) -> None:
    """Whole runs in seconds: tiny pictures, two epochs, and random weights in place of Toyland's pre-trained
    ResNet."""
    import distill
    import rectify
    from paper import clip_s4
    from toyland import networks
    for stage in (rectify, distill, clip_s4):
        for name, recipe in stage.RECIPES.items():
            small = dict(short_side=32, crop=(32, 40), batch_size=2, epochs=2)
            # Logits × 100 drown the Gumbel noise of such small pictures: a draw that is not repeated would go
            # unseen.
            small |= dict(window_ratio=1 / 2, mask_scale=3.0) if stage is rectify else dict(backbone="small")
            small |= dict(view=(24, 32), unknown=3) if stage is clip_s4 else {}
            monkeypatch.setitem(stage.RECIPES, name, replace(recipe, **small))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.save(networks.small_resnet(pretrained=False).state_dict(), folder / "resnet.pt")
    monkeypatch.setattr(networks, "RESNET_WEIGHTS", folder / "resnet.pt")


def run(script, *flags):
    """A script with the given command line, on the CPU, where equal steps give equal bits: its `main`, and
    after a training what the script's last lines do. Returns what `main` returns."""
    import evaluate
    result = script.main(script.flags().parse_args([*map(str, flags), "--device", "cpu"]))
    if script.__name__ in ("rectify", "distill"):
        evaluate.after_training(result, script.__name__)
    elif script.__name__ == "paper.clip_s4":
        script.report(result, evaluate)
    return result


def refusal(capsys, script, *flags) -> str:
    """What a script says on stderr when it refuses its input: one paragraph, exit code 2, no traceback."""
    from harness import errors
    capsys.readouterr()
    try:
        with errors.one_paragraph():
            run(script, *flags)
    except SystemExit as end:
        said = capsys.readouterr().err.strip()
        assert end.code == 2, said
        assert "Traceback" not in said and "error: " in said and "\n\n" not in said, said
        assert "expected" in said.lower() and "found" in said.lower(), said
        return said
    raise AssertionError(f"{script.__name__} {' '.join(map(str, flags))} was not refused")
