"""A CLIP by name, downloaded once, or from a file: which weights, with which activation.

How the many kinds of files are read is in weights.py. The sizes of a model are read off its weights. Its
activation is not among them: `load` takes it from whoever knows.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from .download import download
from .model import ACTIVATIONS, CLIP
from .weights import listed, read, weights_file

CACHE = Path.home() / ".cache" / "clip"

# Of the red, green and blue values in 0..1 of the pixels that CLIP was trained on.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name: (SHA-256 of the archive, which is also the folder that OpenAI keeps it in, file name)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                       "ViT-L-14-336px.pt"),
}


def available_models() -> list[str]:
    """The names that `load` knows: OpenAI's ViTs."""
    return [*MODELS]


def load(name_or_path: str | Path, device: str | torch.device | None = None, activation: str | None = None,
         download_root: str | Path | None = None):
    """A CLIP by name, or from a weights file or folder: `(model, preprocess)`.

    The model is in float32 and in eval mode, on `device` (default: the GPU if there is one). `preprocess`
    turns a PIL image into the normalised `(3, r, r)` tensor that `encode_image` expects. Names are those of
    `available_models()`; OpenAI's weights are kept under `download_root` (default `~/.cache/clip`).
    `activation` is "quickgelu" or "gelu". Where neither it nor a file tells (`told_activation`), QuickGELU
    is assumed, and a printed line says so.
    Raises ValueError for a file that holds no ViT CLIP and for an activation that contradicts what the file
    tells, FileNotFoundError for what is neither a name nor a file, OSError when a download fails.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name_or_path in MODELS:
        digest, file = MODELS[name_or_path]
        path = download(f"{OPENAI}/{digest}/{file}", Path(download_root or CACHE) / file, digest)
    elif re.fullmatch(r"RN\d+(x\d+)?", str(name_or_path)):
        raise ValueError("clip.load: expected a ViT CLIP, for which dense features are defined; found "
                         f"{name_or_path}, a ResNet. Use one of {', '.join(MODELS)}.")
    else:
        path = Path(name_or_path)
        if not path.exists():
            raise FileNotFoundError(f"clip.load: expected one of {', '.join(MODELS)} or the path of a "
                                    "weights file; found neither a model nor a file called "
                                    f"{str(name_or_path)!r}. For a hub's model, pass the downloaded folder.")
    file = weights_file(path)
    state, own = read(file)
    told, by = ("quickgelu", name_or_path) if name_or_path in MODELS else told_activation(file, own)
    if activation and told and activation != told:
        raise ValueError(f"{by}: expected the activation {told}, with which these weights were trained; "
                         f"found that {activation} is asked for. Leave --activation out.")
    model = build_model(state, source=str(path), activation=activation or told or "quickgelu")
    if not (activation or told):
        print(f"{path} does not say which activation it was trained with: QuickGELU is assumed; --activation "
              "gelu for weights of LAION, DataComp and others that open_clip trained without QuickGELU.")
    tell_statistics(file)
    return model.eval().to(device), preprocess(model.visual.input_resolution)


def preprocess(size: int):
    """PIL image → (3, size, size) as OpenAI does it: short side bicubic to `size`, centre crop, MEAN, STD."""
    from torchvision.transforms import v2       # takes a second to import, and who uses text alone needs none
    return v2.Compose([
        v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.RGB(),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def fingerprint(model: CLIP) -> str:
    """16 hexadecimal digits that change with any weight and with the activation, not with the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    if model.activation != "quickgelu":
        digest.update(model.activation.encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ → model


def build_model(state: dict[str, Tensor], source: str = "the state dict",
                activation: str = "quickgelu") -> CLIP:
    """A CLIP in float32 whose sizes are read off its weights, which are then loaded strictly.

    A state dict does not tell all: heads have 64 channels and LayerNorm's eps is 1e-5, as in every CLIP that
    OpenAI released, and `activation` is "quickgelu", as there, or "gelu".
    Raises ValueError for an unknown activation, for a ResNet CLIP, and when weights are missing, left over or
    of the wrong shape.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: expected the activation {' or '.join(ACTIVATIONS)}, found "
                         f"{activation!r}.")
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{source}: expected a ViT CLIP, for which dense features are defined; found a "
                         f"ResNet CLIP. Use one of {', '.join(MODELS)}.")
    needed = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight",
              "text_projection", "positional_embedding", "ln_final.weight",
              "visual.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"{source}: expected the weights of a ViT CLIP; found {len(state)} tensors but no "
                         f"{', '.join(missing)}. The first are: {listed(state)}.")
    for name, shape in (("visual.conv1.weight", "(width, 3, patch, patch)"),
                        ("text_projection", "(width, dim)")):
        found = tuple(state[name].shape)
        if len(found) != len(shape.split(",")):
            raise ValueError(f"{source}: expected {name} of shape {shape}, found {found}. These are no "
                             "weights of OpenAI's CLIP.")

    def depth(tower: str) -> int:
        found = (re.match(rf"{re.escape(tower)}transformer\.resblocks\.(\d+)\.", name) for name in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    text_width, embed_dim = state["text_projection"].shape
    for tower, width in (("image", vision_width), ("text", text_width)):
        if width % 64 or width > 1024:          # open_clip's H, g and G are wider, with heads of 80 to 104
            raise ValueError(f"{source}: expected the towers of OpenAI's CLIPs, widths up to 1024 in "
                             f"attention heads of 64; found width {width} in the {tower} tower, whose heads "
                             "cannot be told from the weights.")
    with torch.device("meta"):                  # no time spent on random weights that are overwritten at once
        model = CLIP(embed_dim=embed_dim, image_resolution=grid * patch, vision_layers=depth("visual."),
                     vision_width=vision_width, vision_patch_size=patch,
                     context_length=len(state["positional_embedding"]),
                     vocab_size=len(state["token_embedding.weight"]), transformer_width=text_width,
                     transformer_heads=text_width // 64, transformer_layers=depth(""), activation=activation)
    expected, found = ({name: tuple(tensor.shape) for name, tensor in weights.items()}
                       for weights in (model.state_dict(), state))
    if found != expected:
        wrong = [f"no {name}" for name in expected if name not in found]
        wrong += [f"{name} too many" for name in found if name not in expected]
        wrong += [f"{name} of shape {found[name]} in the place of {shape}" for name, shape in expected.items()
                  if found.get(name, shape) != shape]
        raise ValueError(f"{source}: expected the weights of one CLIP alone, found {listed(wrong)}. Save all "
                         "of model.state_dict() and nothing else.")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


# ------------------------------------------------------------------------------------------ what is no weight


def told_activation(file: Path, own: str | None) -> tuple[str | None, Path]:
    """The activation that weights were trained with, and the file that tells it; None where none does.

    `own` is what the weights file itself tells (`weights.read`). Else a config beside it does, Hugging Face's
    or open_clip's, its own first; else its name. Raises ValueError for a config of another kind of CLIP,
    whose weights would load and give wrong features.
    """
    if own:
        return own, file
    readers = {"config.json": hugging_face_design, "open_clip_config.json": open_clip_design}
    for name in sorted(readers, key=lambda name: name[:4] != file.name[:4]):        # "open" beside "open"
        config = file.parent / name
        try:
            activations, others = readers[name](json.loads(config.read_text()))
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            continue                                                    # there is none, or another program's
        known = {"quick_gelu": "quickgelu", "gelu": "gelu"}
        if others or len(activations) > 1 or not activations <= set(known):
            found = [*others, f"the activation {' and '.join(sorted(activations))}"]
            raise ValueError(f"{config}: expected a CLIP as OpenAI built it, with heads of 64 channels and "
                             f"quick_gelu or gelu in both towers; found {listed(found)}. These weights would "
                             "give wrong features here: use others.")
        if activations:
            return known[activations.pop()], config
    return ("quickgelu" if "quickgelu" in file.name.lower() else None), file


def hugging_face_design(config: dict) -> tuple[set[str], list[str]]:
    """Of a config.json: the activations of both towers, and what else is not as OpenAI has it.

    What it does not say is the default of transformers. The config of another model tells nothing.
    """
    if "clip" not in config["model_type"]:
        return set(), []
    activations, others = set(), []
    for tower, width, heads in (("vision", 768, 12), ("text", 512, 8)):
        said = {"hidden_act": "quick_gelu", "hidden_size": width, "num_attention_heads": heads}
        said |= config.get(f"{tower}_config") or {}
        said |= config.get(f"{tower}_config_dict") or {}                # of old releases: the last word
        activations.add(str(said["hidden_act"]))
        if said["hidden_size"] != 64 * said["num_attention_heads"]:
            others.append(f"{said['num_attention_heads']} heads in {said['hidden_size']} channels")
    return activations, others


def open_clip_design(config: dict) -> tuple[set[str], list[str]]:
    """The same of an open_clip_config.json, read as open_clip does: without "quick_gelu" it is GELU.

    Models called …-quickgelu and weights tagged "openai" have QuickGELU in any case.
    """
    model = config.get("model_cfg", config)
    quick = model.get("quick_gelu") or "-quickgelu" in config.get("model_name", "") \
        or config.get("pretrained") == "openai"
    vision, text = model["vision_cfg"], {"width": 512, "heads": 8} | model["text_cfg"]
    usual = [(vision, "head_width", 64), (vision, "pool_type", "tok"), (vision, "act_kwargs", {}),
             (text, "heads", text["width"] / 64), (text, "pool_type", "argmax"), (text, "act_kwargs", {}),
             (text, "no_causal_mask", False)]
    others = [f"{key} {tower[key]}" for tower, key, value in usual if (tower.get(key) or value) != value]
    return {"quick_gelu" if quick else "gelu"}, others


def tell_statistics(file: Path) -> None:
    """Print a line when a config beside a weights file names another mean or deviation of the pixels.

    Some of LAION's were trained with 0.5 and 0.5, for example. Here MEAN and STD go for all.
    """
    for name in ("open_clip_config.json", "preprocessor_config.json"):
        try:
            content = json.loads((file.parent / name).read_text())
            content = content.get("preprocess_cfg", content)
            theirs = [content.get(key, content.get(f"image_{key}")) for key in ("mean", "std")]
            far = max(abs(a - b) for pair in zip(theirs, (MEAN, STD)) for a, b in zip(*pair)) > 0.01
        except (OSError, ValueError, AttributeError, TypeError):
            continue                                                    # there is none, or another program's
        if far:
            print(f"{file.parent / name} names {theirs[0]} as the mean and {theirs[1]} as the deviation of "
                  "the pixels. Here OpenAI's are used: features will be less exact.")
