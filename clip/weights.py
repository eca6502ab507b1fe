"""Any weights file → the tensors of a CLIP under OpenAI's names.

    OpenAI's archive            ViT-B-16.pt (TorchScript)
    what torch.save wrote       *.pt *.pth *.bin *.ckpt: a state dict, a checkpoint that holds one under some
                                key, a whole module; the names with "module.", "model.", … before them or not
    Hugging Face's CLIPModel    model.safetensors or pytorch_model.bin, also in several parts
    open_clip's models          open_clip_model.safetensors or open_clip_pytorch_model.bin
    a folder of one of these    or a hub's cache of it, models--owner--name

One function a step: `weights_file` finds the file, `read_file` reads it, `unwrap` finds the state dict in it,
`openai_names` renames the tensors. Nothing is unpickled freely, since a pickle can run any program: `Pickled`
builds tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

# In a folder, the first of these that is there; each also in several parts, with an index (*.index.json).
NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file or folder under OpenAI's names, whatever the format.

    Raises ValueError for a damaged file and for one that holds no state dict or several, FileNotFoundError
    where nothing is.
    """
    return read(weights_file(path))[0]


def read(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """`read_state_dict` of one file; and the activation that the file itself tells, if any."""
    content, activation = read_file(file)
    return openai_names(unwrap(content, file), file), activation


def listed(names, most: int = 4) -> str:
    """The first names, fit for a message: what a file holds may be long, and may be escape codes."""
    names = [str(name) for name in names]
    shown = [name if name.isprintable() else ascii(name) for name in names[:most]]
    shown = [name if len(name) <= 100 else f"{name[:99]}…" for name in shown]
    return (", ".join(shown) or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------------------------------ path → file


def weights_file(path: str | Path) -> Path:
    """The file that a path means: itself, the one in a folder, or the index of the parts it is one of."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a weights file or a folder that holds one, found nothing.")
    if path.is_dir():
        return file_in(path)
    part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name)
    if part is None:
        return path
    index = path.with_name(f"{part[1]}{part[2]}.index.json")
    if not index.exists():
        raise ValueError(f"{path} is one part of several: expected {index.name} beside it, which names the "
                         "others; found none. Fetch the whole folder.")
    return index


def file_in(folder: Path) -> Path:
    """The weights file of a folder. A hub's cache has it in snapshots/<commit>/; refs/main says which."""
    if (folder / "snapshots").is_dir():
        folder = folder / "snapshots"
    if folder.name == "snapshots":
        commits, main = sorted(folder.iterdir()), folder.parent / "refs" / "main"
        if main.is_file() and folder / main.read_text().strip() in commits:
            commits = [folder / main.read_text().strip()]
        if len(commits) != 1:
            raise ValueError(f"{folder}: expected one version of the weights, found "
                             f"{listed(commit.name for commit in commits)}. Pass the folder of one version.")
        folder = commits[0]
    for name in NAMES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.exists():
                return file
    found = [entry.name if entry.exists() else f"{entry.name} (a broken link)" for entry in folder.iterdir()]
    raise ValueError(f"{folder} is a folder: expected {', '.join(NAMES)} in it, or one of them in parts; "
                     f"found {listed(sorted(found))}. Pass the weights file, or the folder that holds it.")


# ------------------------------------------------------------------------------------------ file → content


def read_file(path: Path) -> tuple[object, str | None]:
    """What a file holds, most often a dict, with state dicts in the place of modules; and the activation
    that the classes of those modules tell, if any.

    Raises ValueError, naming the file, for one that is damaged or of another kind.
    """
    if path.name.endswith(".index.json"):
        return read_parts(path), None
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                return Pickled(archive).content()
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return read_safetensors(path), None
        return torch.load(path, map_location="cpu", weights_only=True), None       # PyTorch before 1.6
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:          # garbage can make a reader stumble over anything, also a TypeError
        # When torch refuses, it advises to load without protection, between escape codes. None of that is
        # passed on.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        text = start.isascii() and start.decode().isprintable()         # "cat, …" would be read as an object
        if "Weights only load failed" in reason and not text:
            if objects := re.findall(r"GLOBAL ([\w.]+)", str(error)):
                raise ValueError(f"{path}: expected nothing but tensors, found Python objects "
                                 f"({listed(objects)}), which are not run here. Save the state dict alone: "
                                 "torch.save(model.state_dict(), 'clip.pt').") from error
            reason = "no tensors"
        if text:
            reason = f"a text that begins with {start.decode()!r}" if start else "an empty file"
        raise ValueError(f"{path} is damaged or no weights file: expected OpenAI's archive, a file of "
                         f"torch.save or a .safetensors file; found: {listed([reason])}. Fetch it again, or "
                         "pass another.") from error


def read_parts(index: Path) -> dict:
    """What all files hold that an index names."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        parts = [index.with_name(file) for file in files]               # refuses a name with a folder in it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected the index of weights in parts, JSON with a weight_map from "
                         "tensors to files beside it; found another content. Fetch it again.") from error
    if missing := [part.name for part in parts if not part.exists()]:
        raise ValueError(f"{index}: expected {len(parts)} files of weights beside it, found no "
                         f"{listed(missing)}. Fetch what is missing.")
    content = {}
    for part in parts:
        held, _ = read_file(part)
        content |= held if isinstance(held, dict) else {part.name: held}
    return content


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
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
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"numbers of type {entry['dtype']} in {name!r}")
        numbers = torch.frombuffer(data, dtype=torch.uint8)[begin:end].clone()          # a copy is aligned
        tensors[name] = numbers.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Foreign:
    """Stands for any object that is no tensor. It keeps what it is given and runs nothing."""

    def __init__(self, *_args, **_named):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            vars(self).update(state)

    def __setitem__(self, key, value):
        vars(self)[key] = value

    def ignore(self, *_args):
        """In the place of the methods that a pickle calls to fill a list or a set."""

    append = extend = add = ignore

    def tensors(self, prefix: str = ""):
        """Pairs (dotted name, tensor) of a module and all modules in it, as in its state dict."""
        own = vars(self)
        if "_modules" in own:           # a torch.nn.Module; TorchScript's archives have plain attributes
            lost = own.get("_non_persistent_buffers_set", ())
            kept = {name: buffer for name, buffer in own["_buffers"].items() if name not in lost}
            own = {**own["_parameters"], **kept, **own["_modules"]}
        for name, value in own.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Foreign):
                yield from value.tensors(f"{prefix}{name}.")


class Pickled(pickle.Unpickler):
    """A zip file of torch.save or of TorchScript, read without running anything that is in it.

    `data.pkl` in the zip pickles a tree of objects whose leaves are tensors; their numbers lie raw under
    `data/`. A pickle may name any class or function. This reader looks up none: it rebuilds tensors itself,
    and every other name becomes a class of `Foreign` objects. A TorchScript archive holds its own code and
    tensors, nothing else, so there another name is an error.
    """

    STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
                "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
                "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
                "BoolStorage": torch.bool}
    ACTIVATIONS = {"QuickGELU": "quickgelu", "QuickGELUActivation": "quickgelu",
                   "GELU": "gelu", "GELUActivation": "gelu"}            # of CLIP and open_clip, transformers

    def __init__(self, archive: zipfile.ZipFile):
        names = archive.namelist()
        tops = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if not tops:
            raise ValueError(f"a zip file of other things ({listed(names)})")
        self.archive, self.top, self.classes, self.storages = archive, tops[0], set(), {}
        self.script = f"{self.top}/constants.pkl" in names
        order = f"{self.top}/byteorder"
        if order in names and archive.read(order).decode() != sys.byteorder:
            raise ValueError("numbers whose bytes are in another order than this machine's")
        super().__init__(archive.open(f"{self.top}/data.pkl"))

    def content(self) -> tuple[object, str | None]:
        """What was saved, with state dicts in the place of modules; and the activation that they use."""
        content = state_dicts_in(self.load())
        if self.script and not (isinstance(content, dict) and content):
            raise ValueError("an archive without tensors")
        told = {self.ACTIVATIONS[name] for name in self.classes if name in self.ACTIVATIONS}
        if self.script and not told:                                    # OpenAI's
            told = {"quickgelu"}
        return content, told.pop() if len(told) == 1 else None

    def find_class(self, module: str, name: str):
        if (module, name) in self.ADMITTED:
            return self.ADMITTED[module, name]
        if module == "torch" and name in self.STORAGES:
            return self.STORAGES[name]
        if self.script and not module.startswith("__torch__"):
            raise pickle.UnpicklingError(f"the archive asks for {module}.{name}, which is no tensor")
        self.classes.add(name)
        return type(name, (Foreign,), {"__module__": module})

    def persistent_load(self, entry) -> Tensor:
        _, dtype, key, _, _ = entry
        if key not in self.storages:                    # several tensors may share one
            try:
                data = bytearray(self.archive.read(f"{self.top}/data/{key}"))
            except zipfile.BadZipFile as error:
                raise ValueError(f"a wrong checksum ({error})") from error
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]

    @staticmethod
    def rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_ignored) -> Tensor:
        """A tensor as a view of its storage (`torch._utils._rebuild_tensor_v2` in the pickle)."""
        return storage.as_strided(size, stride, offset)

    ADMITTED = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild.__func__,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        ("torch._tensor", "_rebuild_from_type_v2"): lambda build, _type, arguments, _state: build(*arguments),
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set, ("__builtin__", "set"): set,
        # TorchScript's typed lists of numbers and strings: a list is all that is meant.
        **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value}


def state_dicts_in(content):
    """The same with a state dict in the place of every module."""
    if isinstance(content, Foreign):
        return dict(content.tensors()) or content
    if isinstance(content, dict):
        return {key: state_dicts_in(value) for key, value in content.items()}
    return content


# ------------------------------------------------------------------------------------------ → state dict

# A CLIP is known by these: the first two of OpenAI's names (a ResNet has the first), the others of Hugging
# Face's.
MARKS = ("visual.conv1.weight", "visual.class_embedding", "vision_model.embeddings.patch_embedding.weight",
         "vision_model.embeddings.class_embedding")
INSERTED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(content, path: Path) -> dict[str, Tensor]:
    """The one state dict in what a file holds, without all that wraps it. No other place knows wrappings.

    It may lie under a key (a checkpoint's "state_dict", "model", "clip", …). All its names may begin with
    that of a module that held the CLIP ("module.", "model.", …), and torch.compile and FSDP insert names of
    their own. A dict of tensors that is no CLIP comes back as it is.
    Raises ValueError for no dict of tensors, for several CLIPs, and for a CLIP with other things beside it.
    """
    found = [(key, state, prefix) for key, state in dicts_in(content) for prefix in prefixes(state)]
    if len(found) > 1:
        places = [f"{key} {prefix and prefix + '*'}".strip() or "the top level" for key, _, prefix in found]
        raise ValueError(f"{path}: expected one CLIP, found {len(found)}: {listed(places)}. Save the state "
                         "dict of the one that you want by itself.")
    _, state, prefix = found[0] if found else ("", content, "")
    if not (isinstance(state, dict) and all(is_weight(*item) for item in state.items())):
        raise ValueError(f"{path}: expected a state dict (names → tensors) of a CLIP, by itself or under a "
                         f"key; found {described(state)}. Save model.state_dict() alone.")
    state = {INSERTED.sub("", name): tensor for name, tensor in state.items()}
    if beside := [name for name in state if not name.startswith(prefix)]:
        raise ValueError(f"{path}: expected a CLIP and nothing else; found {listed(beside)} beside "
                         f"{prefix}*. Save the state dict of the CLIP alone.")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def dicts_in(content, where: str = "", depth: int = 0):
    """Pairs (key, dict) of all dicts in the content, four deep."""
    if isinstance(content, dict) and depth <= 4:
        yield where, content
        for key, value in content.items():
            yield from dicts_in(value, f"{where}[{key!r}]", depth + 1)


def prefixes(state: dict) -> list[str]:
    """What stands before a CLIP's names in a dict: [""] for a plain state dict, nothing where no CLIP is."""
    names = [INSERTED.sub("", name) for name, value in state.items() if is_weight(name, value)]
    return sorted({name.removesuffix(mark) for name in names for mark in MARKS
                   if f".{name}".endswith(f".{mark}")})


def is_weight(name, value) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def described(value) -> str:
    """What a thing is that is no state dict, fit for a message."""
    name = type(value).__qualname__
    if isinstance(value, Foreign):
        name = f"{type(value).__module__}.{name}"
    if not isinstance(value, dict):
        return listed([f"an object of type {name}"])
    odd = [f"{key} of type {type(held).__name__}" for key, held in value.items() if not is_weight(key, held)]
    return f"a dict with {listed(odd)}"


# ------------------------------------------------------------------------------------------ → OpenAI's names


def openai_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under OpenAI's names, without what is no weight.

    Raises ValueError when some of Hugging Face's are missing, and for NaN and infinity.
    """
    if "vision_model.embeddings.class_embedding" in state:
        try:
            state = from_hugging_face(state)
        except KeyError as error:
            raise ValueError(f"{path}: expected the weights of Hugging Face's CLIPModel, both towers with "
                             f"their projections; found no {error}. Pass the whole model.") from error
    # No weights: the three sizes in OpenAI's archives, the causal mask (an attribute of every block of the
    # text tower there), and the ranges that older releases of transformers stored.
    extra = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
    state = {name: tensor for name, tensor in state.items() if name.split(".")[-1] not in extra}
    if not_finite := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: expected finite weights, found NaN or infinity in {listed(not_finite)}. "
                         "Fetch the file again.")
    return state


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`transformers.CLIPModel` names → OpenAI's. Projections are transposed; q, k and v are stacked.

    Raises KeyError when one is missing. What has no place in CLIP keeps its name: strict loading refuses it.
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
        layers = [int(name.split(".")[3]) for name in state if name.startswith(f"{tower}.encoder.layers.")]
        for i in range(1 + max(layers, default=-1)):
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
