"""Weights from files: by name (downloaded once) or by path, in the four formats that people have.

    OpenAI's TorchScript archive      ViT-B-16.pt
    a plain or an open_clip state dict   *.pt, *.pth, *.bin   (also under a "state_dict" key)
    Hugging Face's CLIPModel          model.safetensors or pytorch_model.bin, or the folder that holds it

Nothing is unpickled freely, because a pickle can run any program: state dicts go through
`torch.load(weights_only=True)`, archives through `ArchiveReader`, which admits tensors and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from .download import download
from .model import CLIP
from .tokenizer import VOCABULARY

TOYLAND = Path(__file__).parent / "toyland.pt"          # the small CLIP that ships with the project
CACHE = Path.home() / ".cache" / "clip"

OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name: (SHA-256 of the archive, which is also the folder that OpenAI keeps it in, file name)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}


def available_models() -> list[str]:
    """The names that `load` knows: OpenAI's ViTs and the small CLIP of Toyland."""
    return ["toyland", *MODELS]


def load(name_or_path: str | Path, device: str | torch.device | None = None, download_root: str | Path | None = None):
    """A CLIP by name or by file: `(model, preprocess)`.

    The model is in float32 and in eval mode, on `device` (default: the GPU if there is one). `preprocess` turns a
    PIL image into the normalised `(3, r, r)` tensor that `encode_image` expects. Names are those of
    `available_models()`; OpenAI's weights are kept under `download_root` (default `~/.cache/clip`).
    Raises ValueError for an unknown name or a file that holds no ViT CLIP, FileNotFoundError for a missing file,
    OSError when a download fails.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name_or_path == "toyland":
        path = TOYLAND
    elif name_or_path in MODELS:
        digest, file = MODELS[name_or_path]
        path = download(f"{OPENAI}/{digest}/{file}", Path(download_root or CACHE) / file, digest)
    elif re.fullmatch(r"RN\d+(x\d+)?", str(name_or_path)):
        raise ValueError(f"clip.load: expected a ViT CLIP, for which dense features are defined; found {name_or_path}, a ResNet. "
                         f"Use one of {', '.join(available_models())}.")
    else:
        path = Path(name_or_path)
        if not path.exists():
            raise FileNotFoundError(f"clip.load: expected one of {', '.join(available_models())} or the path of a weights "
                                    f"file; found neither a model nor a file called {str(name_or_path)!r}.")
    model = build_model(read_state_dict(path), source=str(path)).eval().to(device)
    return model, preprocess(model.visual.input_resolution)


def preprocess(size: int):
    """PIL image → (3, size, size), as OpenAI does it: short side to `size` (bicubic), centre crop, CLIP's mean, std."""
    from torchvision.transforms import v2       # imported late: it costs a second that text-only users need not pay
    return v2.Compose([
        v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.RGB(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])


def fingerprint(model: CLIP) -> str:
    """16 hexadecimal digits that change when any weight does; equal for equal weights in different files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ state dict → model

def build_model(state: dict[str, Tensor], source: str = "the state dict") -> CLIP:
    """A CLIP in float32 whose sizes are read off its weights, which are then loaded strictly.

    Number of heads = width / 64, QuickGELU and LayerNorm eps 1e-5, as in every CLIP that OpenAI released: a state
    dict does not say, so weights trained with the exact GELU load but give other features.
    Raises ValueError when keys are missing, left over or of the wrong shape, and for a ResNet CLIP.
    """
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(f"{source}: expected a ViT CLIP, for which dense features are defined; found a ResNet CLIP. "
                         f"Use one of {', '.join(available_models())}.")
    needed = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "text_projection",
              "positional_embedding", "ln_final.weight", "visual.transformer.resblocks.0.ln_1.weight",
              "transformer.resblocks.0.ln_1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{source}: expected the weights of a ViT CLIP; found {len(state)} tensors but no "
                         f"{', '.join(missing)}. First keys: {', '.join(list(state)[:4]) or 'none'}.")
    for key, dims, what in (("visual.conv1.weight", 4, "(width, 3, patch, patch)"), ("text_projection", 2, "(width, dim)")):
        shape = tuple(state[key].shape)
        if len(shape) != dims:
            raise ValueError(f"{source}: expected {key} of shape {what}, found {shape}. These are no weights of OpenAI's CLIP.")

    def depth(tower: str) -> int:
        found = (re.match(rf"{re.escape(tower)}transformer\.resblocks\.(\d+)\.", key) for key in state)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    text_width, embed_dim = state["text_projection"].shape
    for tower, width in (("image", vision_width), ("text", text_width)):
        if width % 64 or width > 1024:          # open_clip's H, g and G are wider, with heads of 80 to 104 channels
            raise ValueError(f"{source}: expected the towers of OpenAI's CLIPs, widths up to 1024 in attention heads of 64; "
                             f"found width {width} in the {tower} tower, whose heads cannot be told from the weights.")
    with torch.device("meta"):                  # no time spent on random weights that are overwritten at once
        model = CLIP(embed_dim=embed_dim, image_resolution=grid * patch, vision_layers=depth("visual."),
                     vision_width=vision_width, vision_patch_size=patch,
                     context_length=len(state["positional_embedding"]), vocab_size=len(state["token_embedding.weight"]),
                     transformer_width=text_width, transformer_heads=text_width // 64, transformer_layers=depth(""))
    try:
        model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source}: expected the weights of one CLIP, found: {' '.join(str(error).split())}") from error
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file under OpenAI's names, whatever the format. Raises ValueError if it holds none."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} is a folder; expected model.safetensors or pytorch_model.bin in it, found neither.")
        path = found[0]
    refuse_other_activation(path.parent / "config.json")
    try:
        if path.suffix == ".safetensors":
            state = read_safetensors(path)
        elif is_torchscript(path):
            state = ArchiveReader(path).tensors()
        else:
            if zipfile.is_zipfile(path):                # torch reads such a file whether its checksums are right or not
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:          # what garbage makes a reader stumble over can be anything, also a TypeError
        # torch opens its refusals with the hint to load without protection: nobody should read that here.
        lines = [line for line in str(error).split("\n") if line.strip() and "weights_only" not in line]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{path} is damaged or no weights file: expected OpenAI's archive, a state dict or Hugging Face's "
                         f"CLIPModel weights; found: {reason}. Fetch the file again.") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]                                     # open_clip's training checkpoints
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(tensor, Tensor)
                                              for key, tensor in state.items()):
        raise ValueError(f"{path}: expected a state dict (names → tensors); found {type(state).__name__} with other things "
                         "in it.")
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if "vision_model.embeddings.class_embedding" in state:
        try:
            state = from_hugging_face(state)
        except KeyError as error:
            raise ValueError(f"{path}: expected the weights of Hugging Face's CLIPModel; found no {error}.") from error
    # No weights: the three sizes in OpenAI's archives, the causal mask (as an attribute, in every block of the text
    # tower), and the ranges that older releases of transformers stored.
    extra = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
    state = {key: tensor for key, tensor in state.items() if key.split(".")[-1] not in extra}
    not_finite = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if not_finite:
        raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {', '.join(not_finite[:4])}. Fetch the "
                         "file again.")
    if "token_embedding.used" in state:         # Toyland's file: only the rows of the forty tokens that its captions use
        used, rows = state.pop("token_embedding.used"), state["token_embedding.weight"]
        state["token_embedding.weight"] = rows.new_zeros(VOCABULARY, rows.shape[1]).index_copy(0, used, rows)
    return state


def refuse_other_activation(config: Path) -> None:
    """Raise ValueError when the config.json beside Hugging Face's weights says that they want no QuickGELU.

    The weights alone do not tell, and would load and give wrong features without a word. No config, no check.
    """
    if not config.exists():
        return
    try:
        content = json.loads(config.read_text())
        towers = [content.get(f"{tower}_config") or {} for tower in ("vision", "text")]
        is_clip = "clip" in content.get("model_type", "")
        found = {tower.get("hidden_act", "quick_gelu") for tower in towers if is_clip}
    except (ValueError, AttributeError, TypeError):
        return                                                          # some other program's config
    if found - {"quick_gelu"}:
        raise ValueError(f"{config}: expected the activation quick_gelu, with which OpenAI's CLIPs were trained; found "
                         f"{', '.join(sorted(found))}. These weights would give wrong features here: use OpenAI's.")


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`transformers.CLIPModel` names → OpenAI's. Linear projections are transposed, q, k and v are stacked.

    Raises KeyError when one is missing. What has no place in CLIP keeps its name, so that strict loading refuses it.
    """
    state = dict(state)                                                 # what is renamed is taken out
    renamed = {
        "logit_scale": state.pop("logit_scale"),
        "visual.class_embedding": state.pop("vision_model.embeddings.class_embedding"),
        "visual.conv1.weight": state.pop("vision_model.embeddings.patch_embedding.weight"),
        "visual.positional_embedding": state.pop("vision_model.embeddings.position_embedding.weight"),
        "visual.proj": state.pop("visual_projection.weight").T,
        "token_embedding.weight": state.pop("text_model.embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("text_model.embeddings.position_embedding.weight"),
        "text_projection": state.pop("text_projection.weight").T,
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm",              # the misspelling is theirs
             "visual.ln_post": "vision_model.post_layernorm", "ln_final": "text_model.final_layer_norm"}
    for ours, tower in (("visual.", "vision_model"), ("", "text_model")):
        depth = 1 + max((int(key.split(".")[3]) for key in state if key.startswith(f"{tower}.encoder.layers.")), default=-1)
        for i in range(depth):
            block, layer = f"{ours}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            norms |= {f"{block}.ln_1": f"{layer}.layer_norm1", f"{block}.ln_2": f"{layer}.layer_norm2",
                      f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
                      f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            for part in ("weight", "bias"):
                renamed[f"{block}.attn.in_proj_{part}"] = torch.cat(
                    [state.pop(f"{layer}.self_attn.{x}_proj.{part}") for x in "qkv"])
    for ours, theirs in norms.items():
        for part in ("weight", "bias"):
            renamed[f"{ours}.{part}"] = state.pop(f"{theirs}.{part}")
    return renamed | state


# ------------------------------------------------------------------------------------------ file → tensors

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file: eight bytes of header length, a JSON header, then the raw numbers."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError(f"the file ends before tensor {name!r}")
        numbers = torch.frombuffer(data, dtype=torch.uint8)[begin:end].clone()          # a copy is aligned
        tensors[name] = numbers.view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def is_torchscript(path: Path) -> bool:
    """TorchScript archives are zip files with program code in them; torch.save's files have none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class ArchiveReader:
    """The tensors of a TorchScript archive, read without TorchScript and without running anything in it.

    Inside the zip, `data.pkl` pickles a tree of module objects whose leaves are tensors; the numbers lie raw under
    `data/`. The pickle may name any class, so ours looks up none: what belongs to the archive's own code becomes an
    empty `Module` that merely collects its attributes, tensors are rebuilt by `rebuild`, every other name is refused.
    """

    STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
                "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
                "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
                "BoolStorage": torch.bool}

    class Module:
        """Stands for any module of the archive: a bag of attributes."""

    def __init__(self, path: Path):
        self.path = path

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the module tree under their dotted names, as `state_dict()` would give them."""
        with zipfile.ZipFile(self.path) as archive:
            top = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).split("/")[0]
            reader = self

            class Unpickler(pickle.Unpickler):
                def find_class(self, module: str, name: str):
                    if module.startswith("__torch__"):
                        return reader.Module
                    if (module, name) in reader.ADMITTED:
                        return reader.ADMITTED[module, name]
                    if module == "torch" and name in reader.STORAGES:
                        return reader.STORAGES[name]
                    raise pickle.UnpicklingError(f"the archive asks for {module}.{name}, which is no tensor")

                def persistent_load(self, entry):
                    _, dtype, key, _, _ = entry
                    data = bytearray(archive.read(f"{top}/data/{key}"))
                    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

            with archive.open(f"{top}/data.pkl") as file:
                root = Unpickler(file).load()
        return dict(self.walk(root, ""))

    def walk(self, module, prefix: str):
        """Pairs (dotted name, tensor) of a module and all modules in it."""
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, self.Module):
                yield from self.walk(value, f"{prefix}{name}.")

    @staticmethod
    def rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_ignored) -> Tensor:
        """A tensor as a view of its storage (`torch._utils._rebuild_tensor_v2` in the pickle)."""
        return storage.as_strided(size, stride, offset)

    ADMITTED = {("torch._utils", "_rebuild_tensor_v2"): rebuild.__func__,
                ("collections", "OrderedDict"): OrderedDict,
                # Typed lists of numbers and strings arrive through these; a list is all that is meant.
                **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
                ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value}
