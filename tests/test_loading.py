"""clip/load.py, clip/weights.py and clip/download.py: every format and wrapping gives the same weights, the
activation is known or told, a hostile file runs nothing, a broken one is named, and a download is either
whole or not there.

    python -m pytest tests/test_loading.py      # seconds; `-m slow` adds an archive of ViT-B/16's real size

Nothing here needs the internet: the downloads come from a web server on this machine.
"""

import argparse
import builtins
import collections
import functools
import hashlib
import importlib
import json
import os
import pickle
import re
import struct
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import clip
from clip.download import download
from helpers import TINY, openai_shapes, openai_state, relative, write_openai_archive

loading = importlib.import_module("clip.load")         # `clip.load` itself is the function of that name
SMALL = TINY | dict(text_vocab=500)
SMALLEST = dict(width=64, layers=1, patch=8, resolution=16, embed_dim=8, text_width=64, text_layers=1,
                text_vocab=20)
KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.bool)


def assert_same_tensors(model: clip.CLIP, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor of the model is exactly the expected one, none is missing and none is left over."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------ OpenAI's archives

@pytest.mark.parametrize("half", [True, False])
def test_openai_archive_is_read_without_torchscript(tmp_path, monkeypatch, half):
    """An archive gives exactly its weights, in float32, without torch.jit, whose loader runs its code."""
    expected = write_openai_archive(tmp_path / "ViT.pt", **SMALL, half=half)

    def refuse(*_args, **_kwargs):
        raise AssertionError("torch.jit was asked to load an archive")

    monkeypatch.setattr(torch.jit, "load", refuse)
    monkeypatch.setattr(torch._C, "import_ir_module", refuse)
    model, _ = clip.load(tmp_path / "ViT.pt", device="cpu")
    assert_same_tensors(model, expected)
    assert not model.training


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_the_archive_of_these_tests_is_a_real_one(tmp_path):
    """torch.jit itself reads what write_openai_archive makes, and finds the same weights and sizes."""
    expected = write_openai_archive(tmp_path / "ViT.pt", **SMALL)
    state = torch.jit.load(tmp_path / "ViT.pt", map_location="cpu").state_dict()
    assert state["visual.conv1.weight"].dtype == torch.float16
    assert state["visual.ln_pre.weight"].dtype == torch.float32
    sizes = {name: state.pop(name).item() for name in ("input_resolution", "context_length", "vocab_size")}
    assert sizes == {"input_resolution": 32, "context_length": 77, "vocab_size": 500}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].float(), tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_archive_of_odd_tensors(tmp_path):
    """Slices and transposes of one storage, every number type, empty tensors, and lists beside them."""
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"whole": whole, "column": whole[:, 2], "turned": whole.T, "rest": whole[1:],
               "none": torch.empty(0, 3)}
    for kind in KINDS:
        tensors[str(kind).replace(".", "_")] = torch.arange(5).to(kind)
    tree = torch.nn.Module()
    tree.part = torch.nn.Module()
    for name, tensor in tensors.items():
        tree.part.register_buffer(name, tensor)
    tree.sizes, tree.scales, tree.flags, tree.note = [3, 4], [0.5, 2.0], [True], "no tensor"
    torch.jit.save(torch.jit.script(tree), tmp_path / "odd.pt")
    found = clip.read_state_dict(tmp_path / "odd.pt")
    assert found.keys() == {f"part.{name}" for name in tensors}
    for name, tensor in tensors.items():
        read = found[f"part.{name}"]
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


@pytest.mark.slow
def test_archive_of_full_size(tmp_path):
    """An archive as large as the ViT-B/16 of the paper (300 MB) loads exactly."""
    expected = write_openai_archive(tmp_path / "ViT-B-16.pt")
    model, _ = clip.load(tmp_path / "ViT-B-16.pt", device="cpu")
    (tmp_path / "ViT-B-16.pt").unlink()
    assert_same_tensors(model, expected)


LAYOUTS = [("ViT-B/32", "ViT-B-32", 224, 151_277_313), ("ViT-B/16", "ViT-B-16", 224, 149_620_737),
           ("ViT-L/14", "ViT-L-14", 224, 427_616_513), ("ViT-L/14@336px", "ViT-L-14-336", 336, 427_944_193)]


@pytest.mark.parametrize("name, config, resolution, parameters", LAYOUTS)
def test_layouts_of_openai(name, config, resolution, parameters):
    """All four ViTs load strictly: open_clip's names and shapes fit, and the sizes are read off them."""
    open_clip = pytest.importorskip("open_clip")
    assert name in clip.available_models()
    with torch.device("meta"):                              # shapes without memory
        state = open_clip.CLIP(**open_clip.get_model_config(config)).state_dict()
    model = clip.build_model(state)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.visual.input_resolution == resolution and model.visual.patch_size == int(name[6:8])
    width, text_width = state["visual.proj"].shape[0], state["text_projection"].shape[0]
    assert {block.attn.heads for block in model.visual.transformer.resblocks} == {width // 64}
    assert {block.attn.heads for block in model.transformer.resblocks} == {text_width // 64}
    if name == "ViT-B/16":
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == openai_shapes()


def test_published_addresses():
    """Each model's address and SHA-256 is the one that open_clip knows for OpenAI's file."""
    open_clip = pytest.importorskip("open_clip")
    for (name, config, *_) in LAYOUTS:
        digest, file = loading.MODELS[name]
        assert f"{loading.OPENAI}/{digest}/{file}" == open_clip.get_pretrained_cfg(config, "openai")["url"]


# ------------------------------------------------------------------------------------------ the other formats

def save_zip(state, path):
    torch.save(state, path)


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)           # PyTorch before 1.6


def save_checkpoint(state, path):
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}   # trained on several GPUs
    torch.save({"epoch": 3, "name": "run", "state_dict": prefixed}, path)


def save_safetensors(state, path):
    """By hand, so that the format's definition is here to read: length, JSON, numbers (all float32)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


FORMATS = [(save_zip, "weights.pt"), (save_zip, "pytorch_model.bin"), (save_legacy, "weights.pth"),
           (save_checkpoint, "epoch_3.pt"), (save_safetensors, "model.safetensors")]


@pytest.mark.parametrize("save, file", FORMATS)
def test_every_format_gives_the_same_weights(tmp_path, save, file):
    """State dicts of all formats load exactly, and the fingerprint does not depend on the format."""
    state = openai_state(**SMALLEST)
    save(state, tmp_path / file)
    model, _ = clip.load(str(tmp_path / file), device="cpu")               # a string is as good as a Path
    assert_same_tensors(model, state)
    assert clip.fingerprint(model) == clip.fingerprint(clip.build_model(state))


def test_safetensors_of_all_kinds(tmp_path):
    """What the safetensors library writes is read back exactly: every number type, no dimension, no entry."""
    library = pytest.importorskip("safetensors.torch")
    tensors = {str(kind): torch.arange(15).view(3, 5).to(kind) for kind in KINDS}
    tensors |= {"scalar": torch.tensor(2.6), "none": torch.empty(0, 3)}
    library.save_file(tensors, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    found = clip.read_state_dict(tmp_path / "weights.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())


def test_half_precision_and_doubles_become_float32(tmp_path):
    """Whatever precision the file has, the model has float32."""
    state = openai_state(**SMALLEST)
    stored = {name: tensor.double() if "ln_" in name else tensor.half() for name, tensor in state.items()}
    torch.save(stored, tmp_path / "weights.pt")
    model, _ = clip.load(tmp_path / "weights.pt", device="cpu")
    assert_same_tensors(model, {name: tensor.float() for name, tensor in stored.items()})


@pytest.mark.parametrize("tower, width", [("visual.", 1280), ("visual.", 80), ("", 1152), ("", 96)])
def test_width_of_unknown_heads_is_refused(tower, width):
    """Where width / 64 may not be the number of heads, no features are better than wrong ones."""
    state = openai_state(**SMALLEST)
    if tower:
        state["visual.conv1.weight"] = torch.zeros(width, 3, 8, 8)
    else:
        state["text_projection"] = torch.zeros(width, 8)
    with pytest.raises(ValueError, match=f"heads of 64; found width {width}"):
        clip.build_model(state)


def test_fingerprint():
    """16 hexadecimal digits, the same for the same weights, others after the smallest change."""
    state = openai_state(**SMALLEST)
    before = clip.fingerprint(clip.build_model(state))
    assert re.fullmatch("[0-9a-f]{16}", before)
    changed = state["ln_final.bias"].clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))             # one bit
    assert clip.fingerprint(clip.build_model(state | {"ln_final.bias": changed})) != before


def test_fingerprint_of_the_other_activation():
    """The activation counts, as a checkpoint fits one of the two; with QuickGELU it is the weights' alone."""
    state = openai_state(**SMALLEST)
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert clip.fingerprint(clip.build_model(state)) == digest.hexdigest()[:16]
    assert clip.fingerprint(clip.build_model(state, activation="quickgelu")) == digest.hexdigest()[:16]
    assert clip.fingerprint(clip.build_model(state, activation="gelu")) != digest.hexdigest()[:16]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(50, 37), (20, 90), (16, 16)])
def test_preprocess_equals_open_clip(tmp_path, mode, size):
    """preprocess is OpenAI's for all pictures: short side bicubic, centre crop, RGB, CLIP's mean and std."""
    open_clip, image_of = pytest.importorskip("open_clip"), pytest.importorskip("PIL.Image")
    torch.save(openai_state(**SMALLEST), tmp_path / "weights.pt")
    _, preprocess = clip.load(tmp_path / "weights.pt", device="cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    picture = image_of.fromarray(pixels.numpy()).convert(mode)
    expected = open_clip.image_transform(16, is_train=False)(picture)
    assert preprocess(picture).shape == (3, 16, 16)
    assert relative(preprocess(picture), expected) <= 1e-6


# ---------------------------------------------------------------------------- which activation, known or told

TOWER = {"hidden_size": 64, "num_attention_heads": 1}


def hugging_face_config(vision="quick_gelu", text="quick_gelu", **more):
    return {"model_type": "clip", "vision_config": TOWER | {"hidden_act": vision},
            "text_config": TOWER | {"hidden_act": text}} | more


def open_clip_config(vision={}, text={}, more={}, **model):
    """As open_clip writes it, which leaves out what is its default."""
    return {"model_cfg": {"embed_dim": 8, "vision_cfg": {"width": 64, "layers": 1, "patch_size": 8} | vision,
                          "text_cfg": {"width": 64, "heads": 1, "layers": 1} | text} | model,
            "preprocess_cfg": {"mean": list(clip.MEAN), "std": list(clip.STD)}} | more


def assert_activation(model: clip.CLIP, activation: str) -> None:
    """Said by the model, and used in every block of both towers."""
    kind = {"quickgelu": clip.model.QuickGELU, "gelu": torch.nn.GELU}[activation]
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    assert model.activation == activation and {type(block.mlp.gelu) for block in blocks} == {kind}


HF, OC = "config.json", "open_clip_config.json"
KNOWN = [
    ("pytorch_model.bin", {HF: hugging_face_config("gelu", "gelu")}, "gelu"),
    ("pytorch_model.bin", {HF: hugging_face_config()}, "quickgelu"),
    ("pytorch_model.bin", {HF: {"model_type": "clip"}}, "quickgelu"),               # transformers' default
    ("pytorch_model.bin", {HF: hugging_face_config(text_config_dict={"hidden_act": "gelu"},
                                                   vision_config_dict={"hidden_act": "gelu"})}, "gelu"),
    ("open_clip_pytorch_model.bin", {OC: open_clip_config()}, "gelu"),              # open_clip's default
    ("open_clip_pytorch_model.bin", {OC: open_clip_config(quick_gelu=False)}, "gelu"),
    ("open_clip_pytorch_model.bin", {OC: open_clip_config(quick_gelu=True)}, "quickgelu"),
    ("open_clip_pytorch_model.bin", {OC: open_clip_config()["model_cfg"]}, "gelu"),     # as it ships them
    ("open_clip_model.safetensors", {OC: open_clip_config(more={"model_name": "ViT-B-16-quickgelu"})},
     "quickgelu"),
    ("open_clip_pytorch_model.bin", {OC: open_clip_config(more={"pretrained": "openai"})}, "quickgelu"),
    ("epoch_3.pt", {OC: open_clip_config()}, "gelu"),
    ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", {}, "quickgelu"),              # of open_clip's releases
    # Two configs: each library's file goes by its own.
    ("pytorch_model.bin", {HF: hugging_face_config(), OC: open_clip_config()}, "quickgelu"),
    ("open_clip_pytorch_model.bin", {HF: hugging_face_config(), OC: open_clip_config()}, "gelu")]


@pytest.mark.parametrize("file, configs, activation", KNOWN)
def test_activation_is_known_from_a_config(tmp_path, capsys, file, configs, activation):
    """What a config beside the weights says is taken, without a word; saying the same is no contradiction."""
    save = save_safetensors if file.endswith(".safetensors") else save_zip
    save(openai_state(**SMALLEST), tmp_path / file)
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    for asked in (None, activation):
        model, _ = clip.load(tmp_path / file, device="cpu", activation=asked)
        assert_activation(model, activation)
    assert capsys.readouterr().out == ""
    other = {"gelu": "quickgelu", "quickgelu": "gelu"}[activation]
    with pytest.raises(ValueError, match=f"expected the activation {activation}.*{other} is asked for"):
        clip.load(tmp_path / file, device="cpu", activation=other)


@pytest.mark.parametrize("configs", [
    {}, {HF: [1]}, {HF: {"model_type": "bert", "vision_config": {"hidden_act": "gelu"}}}, {HF: {}}, {OC: {}},
    {HF: {"model_type": 3}}, {OC: {"model_cfg": "ViT-B-16"}}, {OC: {"model_cfg": {"vision_cfg": None}}}])
def test_assumed_activation_is_told(tmp_path, capsys, configs):
    """Where nothing tells it, one line says what is assumed, for which weights that is wrong, and a flag."""
    torch.save(openai_state(**SMALLEST), tmp_path / "weights.pt")
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert_activation(clip.load(tmp_path / "weights.pt", device="cpu")[0], "quickgelu")
    said = capsys.readouterr().out
    assert re.fullmatch(r".*weights\.pt does not say which activation.*QuickGELU is assumed; --activation "
                        r"gelu for weights of LAION, DataComp.*\n", said)
    assert_activation(clip.load(tmp_path / "weights.pt", device="cpu", activation="gelu")[0], "gelu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("configs, found", [
    ({HF: hugging_face_config("gelu", "quick_gelu")}, "gelu and quick_gelu"),
    ({HF: hugging_face_config("gelu_new", "gelu_new")}, "gelu_new"),
    ({HF: hugging_face_config(vision_config=TOWER | {"num_attention_heads": 2})}, "2 heads in 64 channels"),
    ({OC: open_clip_config(vision={"head_width": 32})}, "head_width 32"),
    ({OC: open_clip_config(text={"heads": 2})}, "heads 2"),
    ({OC: open_clip_config(vision={"pool_type": "avg"})}, "pool_type avg"),
    ({OC: open_clip_config(text={"no_causal_mask": True})}, "no_causal_mask True"),
    ({OC: open_clip_config(vision={"act_kwargs": {"approximate": "tanh"}})}, "approximate")])
def test_config_of_another_kind_of_clip_is_refused(tmp_path, configs, found):
    """Its weights have OpenAI's names and shapes, would load, and give wrong features."""
    torch.save(openai_state(**SMALLEST), tmp_path / "pytorch_model.bin")
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json: expected a CLIP as OpenAI built it.*{found}"):
        clip.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name, content", [
    (OC, {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
    ("preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})])
def test_other_statistics_of_pixels_are_told(tmp_path, capsys, name, content):
    """Some of LAION's weights were trained on pixels that were normalised in another way."""
    torch.save(openai_state(**SMALLEST), tmp_path / "quickgelu.pt")
    (tmp_path / name).write_text(json.dumps(content))
    clip.load(tmp_path / "quickgelu.pt", device="cpu")
    said = capsys.readouterr().out
    assert name in said and re.search(r"0\.(5|485)", said) and said.count("\n") == 1


def test_activation_of_openai_is_known(tmp_path, capsys, server, monkeypatch):
    """By name, and for an archive of theirs under any file name."""
    write_openai_archive(tmp_path / "mine.pt", **SMALLEST)
    content = (tmp_path / "mine.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(loading.MODELS, "ViT-B/16", (digest, "ViT-B-16.pt"))
    monkeypatch.setattr(loading, "OPENAI", server.url)
    server.pages[f"/{digest}/ViT-B-16.pt"] = page(content)
    for name in (tmp_path / "mine.pt", "ViT-B/16"):
        assert_activation(clip.load(name, device="cpu", download_root=tmp_path / "cache")[0], "quickgelu")
        with pytest.raises(ValueError, match="expected the activation quickgelu.*found that gelu"):
            clip.load(name, device="cpu", activation="gelu", download_root=tmp_path / "cache")
    assert capsys.readouterr().out == ""


def test_unknown_activation_is_refused(tmp_path):
    torch.save(openai_state(**SMALLEST), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt: expected .* quickgelu or gelu, found 'relu'"):
        clip.load(tmp_path / "weights.pt", device="cpu", activation="relu")


# -------------------------------------------------------------------------------------------- wrapped weights


def open_clip_module(quick_gelu: bool = True) -> torch.nn.Module:
    """A tiny model of open_clip, in eval mode."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return open_clip.CLIP(
        8, quick_gelu=quick_gelu,
        vision_cfg=dict(width=64, layers=1, patch_size=8, image_size=16, head_width=64),
        text_cfg=dict(width=64, layers=1, heads=1, vocab_size=20)).eval()


def before(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def blocks_compiled(state: dict) -> dict:
    return {re.sub(r"(resblocks\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in state.items()}


class Recorder:
    """An object of the user's own, as checkpoints are full of."""

    def __init__(self):
        self.best, self.path = {"loss": 0.5}, Path("runs")


OTHER = {"epoch": 3, "args": argparse.Namespace(model="ViT-B-16", lr=1e-3), "best": np.float64(0.5),
         "path": Path("x"), "recorder": Recorder(), "rng": np.random.default_rng(0).bit_generator.state,
         "seen": {1, 2}, "counts": collections.defaultdict(list, a=[1]), "device": torch.device("cpu"),
         "dtype": torch.float16}
WRAPPINGS = {
    **{f"under {key}": lambda state, key=key: {key: state, "epoch": 3}
       for key in ("state_dict", "model_state_dict", "model", "clip", "module", "weights", "state_dict_ema")},
    **{f"behind {prefix}": lambda state, prefix=prefix: before(prefix, state)
       for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "clip.",
                      "clip_model.", "model.clip.", "_fsdp_wrapped_module.")},
    "compiled block by block": blocks_compiled,
    "Lightning": lambda state: {"state_dict": before("model.", state), "pytorch-lightning_version": "2.1",
                                "callbacks": {"best": {"score": torch.tensor(0.5)}}},
    "two levels": lambda state: {"model": {"state_dict": before("module.", state), "arch": "ViT-B-16"}},
    "open_clip's training": lambda state: {
        "epoch": 3, "name": "run", "state_dict": before("module.", state), "scaler": {"scale": 65536.0},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}},
                      "param_groups": [{"lr": 1e-3}]}},
    "with objects beside it": lambda state: OTHER | {"model": state},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_wrapped_state_dict(tmp_path, wrap):
    """A state dict under any key, behind any module's name, with any objects beside it: its weights."""
    state = openai_state(**SMALLEST)
    torch.save(wrap(state), tmp_path / "wrapped.pt")
    model, _ = clip.load(tmp_path / "wrapped.pt", device="cpu")
    assert_same_tensors(model, state)
    assert clip.fingerprint(model) == clip.fingerprint(clip.build_model(state))


WRAPPED_MODULES = {
    "by itself": lambda model: model, "in a checkpoint": lambda model: OTHER | {"model": model},
    "DataParallel": torch.nn.DataParallel,
    "an attribute": lambda model: types.SimpleNamespace(clip=model, epoch=3)}


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("wrap", WRAPPED_MODULES.values(), ids=WRAPPED_MODULES.keys())
def test_whole_module_of_open_clip(tmp_path, capsys, monkeypatch, wrap, quick_gelu):
    """torch.save(model): its weights and its activation, without a class of open_clip being looked up."""
    model = open_clip_module(quick_gelu)
    torch.save(wrap(model), tmp_path / "whole.pt")
    monkeypatch.setitem(sys.modules, "open_clip.model", None)                       # an import would fail
    ours, _ = clip.load(tmp_path / "whole.pt", device="cpu")
    assert_same_tensors(ours, model.state_dict())
    assert_activation(ours, "quickgelu" if quick_gelu else "gelu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_whole_module_of_hugging_face(tmp_path, activation):
    """transformers' CLIPModel, whose parameters carry attributes of their own."""
    model = hugging_face_module(activation)
    torch.save(model, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    ours, _ = clip.load(tmp_path / "whole.pt", device="cpu")
    assert_same_tensors(ours, clip.read_state_dict(tmp_path / "state.pt"))
    assert_activation(ours, activation.replace("_", ""))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("make", ["trace", "script"])
def test_torchscript_of_open_clip(tmp_path, capsys, make, quick_gelu):
    """An archive that is not OpenAI's: its classes tell the activation."""
    model = open_clip_module(quick_gelu)
    script = torch.jit.script(model) if make == "script" else torch.jit.trace(
        model, (torch.randn(1, 3, 16, 16), torch.randint(1, 20, (1, 77))), strict=False, check_trace=False)
    torch.jit.save(script, tmp_path / "script.pt")
    ours, _ = clip.load(tmp_path / "script.pt", device="cpu")
    assert_same_tensors(ours, model.state_dict())
    assert_activation(ours, "quickgelu" if quick_gelu else "gelu")
    assert capsys.readouterr().out == ""


def hugging_face_module(activation: str = "quick_gelu") -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1,
                 hidden_act=activation)
    return transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | dict(vocab_size=20, bos_token_id=1, eos_token_id=2),
        vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=8)).eval()


def in_parts(state: dict, folder: Path, suffix: str, save) -> None:
    """Two files and the index that says which tensor is where, as transformers cuts a large model."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map = list(state), {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{part:05d}-of-00002.{suffix}"
        save({name: state[name] for name in chosen}, folder / file)
        weight_map |= {name: file for name in chosen}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts(tmp_path, suffix):
    """The folder, its index, and each of the parts mean the same: the whole."""
    state = openai_state(**SMALLEST)
    in_parts(state, tmp_path, suffix, save_safetensors if suffix == "safetensors" else save_zip)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config("gelu", "gelu")))
    files = sorted(file for file in tmp_path.iterdir() if file.name != "config.json")
    assert len(files) == 3
    for path in (tmp_path, *files):
        model, _ = clip.load(path, device="cpu")
        assert_same_tensors(model, state)
        assert_activation(model, "gelu")


def test_parts_that_transformers_cut(tmp_path):
    """The same, from the other library: sixteen files of Hugging Face's names."""
    model = hugging_face_module("gelu")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 3
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    ours, _ = clip.load(tmp_path / "parts", device="cpu")
    assert_same_tensors(ours, clip.read_state_dict(tmp_path / "whole.pt"))
    assert_activation(ours, "gelu")


def hub_cache(root: Path, *commits: str, main: str | None = None) -> Path:
    """A model as a hub's program keeps it: files under their digests, links to them for each version."""
    root.mkdir(parents=True)
    (root / "blobs").mkdir()
    for seed, commit in enumerate(commits):
        torch.save(openai_state(**SMALLEST, seed=seed), root / "blobs" / f"digest{seed}")
        folder = root / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "open_clip_pytorch_model.bin").symlink_to(f"../../blobs/digest{seed}")
        (folder / OC).write_text(json.dumps(open_clip_config()))
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(f"{main}\n")
    return root


@pytest.mark.parametrize("commits, main, seed", [
    (["abc"], None, 0), (["abc"], "abc", 0), (["abc", "def"], "def", 1), (["abc"], "gone", 0)])
def test_hub_cache(tmp_path, commits, main, seed):
    """A hub's folder of a model, its snapshots, and one snapshot; the config lies beside the link."""
    root = hub_cache(tmp_path / "models--laion--CLIP", *commits, main=main)
    for folder in (root, root / "snapshots", root / "snapshots" / commits[seed]):
        model, _ = clip.load(folder, device="cpu")
        assert_same_tensors(model, openai_state(**SMALLEST, seed=seed))
        assert_activation(model, "gelu")
    model, _ = clip.load(root / "blobs" / f"digest{seed}", device="cpu", activation="gelu")
    assert_same_tensors(model, openai_state(**SMALLEST, seed=seed))


@pytest.mark.parametrize("file, save", [("open_clip_pytorch_model.bin", save_zip),
                                        ("open_clip_model.safetensors", save_safetensors)])
def test_folder_of_open_clip(tmp_path, file, save):
    """As open_clip lays a model on a hub."""
    state = openai_state(**SMALLEST)
    save(state, tmp_path / file)
    (tmp_path / OC).write_text(json.dumps(open_clip_config()))
    model, _ = clip.load(tmp_path, device="cpu")
    assert_same_tensors(model, state)
    assert_activation(model, "gelu")


REFUSED = [
    pytest.param(lambda p, s: save_zip({"model": s, "ema": s}, p), r"found 2: \['model'\], \['ema'\]\.",
                 id="two states"),
    pytest.param(lambda p, s: save_zip(s | {"ema": s}, p), r"found 2: the top level, \['ema'\]\.",
                 id="a state in a state"),
    pytest.param(lambda p, s: save_zip(before("student.", s) | before("teacher.", s), p),
                 r"found 2: student\.\*, teacher\.\*\.", id="two prefixes"),
    pytest.param(lambda p, s: save_zip(before("clip.", s) | {"head.weight": torch.ones(2)}, p),
                 r"found head\.weight beside clip\.\*", id="a head beside it"),
    pytest.param(lambda p, s: save_zip(s | {"epoch": 3}, p), "epoch of type int", id="a number in it"),
    pytest.param(lambda p, s: save_zip({"model": {"fc.weight": torch.ones(2)}, "epoch": 3}, p),
                 "model of type dict, epoch of type int", id="another network"),
    pytest.param(lambda p, s: save_zip(Recorder(), p), r"type test_loading\.Recorder", id="an object"),
    pytest.param(lambda p, s: save_legacy({"model": s, "recorder": Recorder()}, p),
                 r"test_loading\.Recorder.*torch\.save\(model\.state_dict", id="an object in an old file"),
    pytest.param(lambda p, s: save_zip(s | {"\x1b[31mred\x1b[0m": torch.ones(2)}, p), r"\\x1b\[31mred",
                 id="escape codes"),
    pytest.param(lambda p, s: save_zip(s | {"\x1b[31mred": 3}, p), r"\\x1b\[31mred of type int",
                 id="escape codes of something else"),
    pytest.param(lambda p, s: zipped(p, {"a.txt": b"", "b/clip.pt": b""}), r"other things \(a\.txt, b/clip",
                 id="a zip file"),
    pytest.param(lambda p, s: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
                 "a text that begins with 'version", id="a pointer of Git LFS"),
    pytest.param(lambda p, s: p.write_bytes(b"\x80\x02garbage"), "damaged or no weights file", id="garbage"),
    pytest.param(lambda p, s: loop(p), "damaged or no weights file", id="a dict in itself")]


def zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def loop(path: Path) -> None:
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, path)


def assert_fit_to_read(said: str) -> None:
    """One paragraph that says what was expected, without escape codes and without advice to trust a file."""
    assert "expected" in said and "found" in said and said.isprintable(), said
    assert not re.search("weights_only|likely succeed|trust|safe_globals|allowlist", said), said


@pytest.mark.parametrize("write, found", REFUSED)
def test_refusal_of_wrapped_weights(tmp_path, write, found):
    """What cannot be read for sure is refused: the message names the key or the class, and the next step."""
    write(tmp_path / "wrapped.pt", openai_state(**SMALLEST))
    with pytest.raises(ValueError, match=rf"wrapped\.pt.*{found}") as error:
        clip.load(tmp_path / "wrapped.pt", device="cpu")
    assert_fit_to_read(str(error.value))


def part_without_index(folder: Path) -> Path:
    in_parts(openai_state(**SMALLEST), folder, "bin", save_zip)
    (folder / "pytorch_model.bin.index.json").unlink()
    return folder / "pytorch_model-00001-of-00002.bin"


def index_without_part(folder: Path) -> Path:
    in_parts(openai_state(**SMALLEST), folder, "safetensors", save_safetensors)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def index_of(content):
    def write(folder: Path) -> Path:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder
    return write


def broken_link(folder: Path) -> Path:
    root = hub_cache(folder / "models--a--b", "abc")
    (root / "blobs" / "digest0").unlink()
    return root


def hub_of_models(folder: Path) -> Path:
    hub_cache(folder / "hub" / "models--laion--CLIP", "abc")
    return folder / "hub"


@pytest.mark.parametrize("make, found", [
    (part_without_index, "one part of several: expected pytorch_model.bin.index.json"),
    (index_without_part, "expected 2 files of weights beside it, found no model-00002-of-00002.safetensors"),
    (index_of([1]), "expected the index of weights"), (index_of({"weight_map": ["x"]}), "expected the index"),
    (index_of({"weight_map": {"logit_scale": "../elsewhere.bin"}}), "expected the index of weights"),
    (lambda folder: hub_cache(folder / "models--a--b", "abc", "def"), "found abc, def. Pass the folder"),
    (broken_link, r"open_clip_pytorch_model.bin \(a broken link\)"),
    (hub_of_models, "found models--laion--CLIP"),
    (lambda folder: folder, "is a folder: expected .* found nothing")])
def test_refusal_of_folders_and_parts(tmp_path, make, found):
    """Of several files or folders the message names the one that is missing or must be chosen."""
    path = make(tmp_path)
    with pytest.raises(ValueError, match=found) as error:
        clip.load(path, device="cpu")
    assert_fit_to_read(str(error.value))


@pytest.mark.parametrize("drop, named", [("visual_projection.weight", "visual_projection.weight"),
                                         ("text_projection.weight", "text_projection.weight")])
def test_projections_of_hugging_face_keep_their_names(tmp_path, drop, named):
    """They are read under transformers' names; and a tower without its projection is refused by that name."""
    state = hugging_face_module().state_dict()
    torch.save({"model": before("clip.", state)}, tmp_path / "weights.pt")
    found = clip.read_state_dict(tmp_path / "weights.pt")
    assert torch.equal(found["visual.proj"], state["visual_projection.weight"].T)
    assert torch.equal(found["text_projection"], state["text_projection.weight"].T)
    torch.save({"model": before("clip.", without(state, drop))}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt: expected .*CLIPModel.*found no '{named}'") as error:
        clip.load(tmp_path / "weights.pt", device="cpu")
    assert_fit_to_read(str(error.value))


# ------------------------------------------------------------------------------------------ hostile files

class Bomb:
    """Unpickling this object calls `function(argument)`."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


BOMBS = [pytest.param(lambda marker: Bomb(os.system, f"echo > {marker}"), id="os.system"),
         pytest.param(lambda marker: Bomb(builtins.eval, f"open({str(marker)!r}, 'w')"), id="eval"),
         pytest.param(lambda marker: Bomb(builtins.exec, f"open({str(marker)!r}, 'w')"), id="exec"),
         pytest.param(lambda marker: Bomb(os.mkdir, str(marker)), id="os.mkdir")]


def replace_in_zip(path: Path, ending: str, content: bytes) -> None:
    """Put other bytes in the place of the one member of a zip file whose name ends so."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in members if name.endswith(ending)]
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, content if member == name else data)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("bomb_for", BOMBS)
def test_hostile_archive_runs_nothing(tmp_path, bomb_for, protocol):
    """An archive whose pickle calls a function is refused by the function's name, and nothing is called."""
    marker = tmp_path / "marker"
    bomb = bomb_for(marker)
    content = pickle.dumps({"weight": bomb}, protocol=protocol)
    pickle.loads(content)
    assert marker.exists(), "the bomb of this test is a dud"
    marker.rmdir() if marker.is_dir() else marker.unlink()

    write_openai_archive(tmp_path / "evil.pt", **SMALLEST)
    replace_in_zip(tmp_path / "evil.pt", "/data.pkl", content)
    with pytest.raises(ValueError, match=rf"evil\.pt.*\.{bomb.function.__name__}"):
        clip.load(tmp_path / "evil.pt", device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["evil.pt", "evil.pth", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("bomb_for", BOMBS)
def test_hostile_state_dict_runs_nothing(tmp_path, bomb_for, file):
    """A state dict or a bare pickle that calls a function is refused, and nobody is advised to trust it."""
    marker = tmp_path / "marker"
    bomb = bomb_for(marker)
    torch.save(openai_state(**SMALLEST) | {"logit_scale": bomb}, tmp_path / "state")
    for content in ((tmp_path / "state").read_bytes(), pickle.dumps(bomb, protocol=2)):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(file)) as error:
            clip.load(tmp_path / file, device="cpu")
        assert not marker.exists()
        # torch's own message begins with the hint that `weights_only=False` "will likely succeed".
        assert "likely succeed" not in str(error.value)


class Disguised(Bomb):
    """The same call, behind the name of a function of torch that the reader admits."""

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, (self.function, torch.Tensor, (self.argument,), None)


@pytest.mark.parametrize("disguise", [Bomb, Disguised])
@pytest.mark.parametrize("bomb_for", BOMBS)
def test_hostile_objects_beside_the_weights_run_nothing(tmp_path, bomb_for, disguise):
    """In a checkpoint, in a module, in the place of a tensor: the weights are read, or refused by name."""
    marker = tmp_path / "marker"
    bomb, state, model = bomb_for(marker), openai_state(**SMALLEST), open_clip_module()
    bomb = disguise(bomb.function, bomb.argument)
    torch.save({"model": state, "args": bomb, bomb.function.__name__: [bomb]}, tmp_path / "checkpoint.pt")
    assert_same_tensors(clip.load(tmp_path / "checkpoint.pt", device="cpu")[0], state)
    model.spy = model.visual.spy = bomb
    torch.save({"model": model}, tmp_path / "module.pt")
    assert_same_tensors(clip.load(tmp_path / "module.pt", device="cpu")[0], model.state_dict())
    torch.save({"model": state | {"logit_scale": bomb}}, tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=f"logit_scale of type {bomb.function.__name__}") as error:
        clip.load(tmp_path / "tensor.pt", device="cpu")
    assert_fit_to_read(str(error.value))
    assert not marker.exists()


@pytest.mark.parametrize("program", [
    pytest.param(b"c__torch__.os\nsystem\n(X\x02\x00\x00\x00lstR.", id="a call disguised as a module"),
    pytest.param(b"\x80\x02K\x01)R.", id="a call of a number"),
    pytest.param(b"\x80\x02K\x01Q.", id="a storage that is a number"),
    pytest.param(b"\x80\x02K\x01K\x02b.", id="an attribute of a number"),
    pytest.param(b"", id="nothing")])
def test_senseless_archive_is_refused(tmp_path, program):
    """Pickles that make no sense end in the same ValueError, not in whatever the unpickler stumbles over."""
    write_openai_archive(tmp_path / "odd.pt", **SMALLEST)
    replace_in_zip(tmp_path / "odd.pt", "/data.pkl", program)
    with pytest.raises(ValueError, match="odd.pt is damaged or no weights file"):
        clip.load(tmp_path / "odd.pt", device="cpu")


# ------------------------------------------------------------------------------------ weights that do not fit

def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


MISFITS = [
    pytest.param(lambda s: without(s, "visual.ln_pre.bias"), "visual.ln_pre.bias", id="missing"),
    pytest.param(lambda s: without(s, "visual.conv1.weight"), "visual.conv1.weight",
                 id="missing what gives the sizes"),
    pytest.param(lambda s: without(s, "transformer.resblocks.0.attn.in_proj_bias"), "in_proj_bias",
                 id="none in block"),
    pytest.param(lambda s: {k: t for k, t in s.items() if "resblocks" not in k}, "resblocks", id="no blocks"),
    pytest.param(lambda s: s | {"visual.extra": torch.ones(3)}, "visual.extra", id="one too many"),
    pytest.param(lambda s: s | {"transformer.resblocks.7.ln_1.weight": torch.ones(64)}, "resblocks.1",
                 id="gap in blocks"),
    pytest.param(lambda s: s | {"visual.ln_post.weight": torch.ones(32)}, "visual.ln_post.weight",
                 id="wrong length"),
    pytest.param(lambda s: s | {"visual.proj": s["visual.proj"].T}, "visual.proj", id="transposed"),
    pytest.param(lambda s: s | {"visual.positional_embedding": torch.ones(6, 64)}, "positional_embedding",
                 id="no square"),
    pytest.param(lambda s: {}, "visual.conv1.weight", id="empty"),
    pytest.param(lambda s: {"fc.weight": torch.ones(2, 2)}, "fc.weight", id="another network")]


@pytest.mark.parametrize("change, named", MISFITS)
def test_weights_that_do_not_fit(tmp_path, change, named):
    """A tensor missing, left over or of a wrong shape: a ValueError with the file's and the tensor's name."""
    torch.save(change(openai_state(**SMALLEST)), tmp_path / "misfit.pt")
    with pytest.raises(ValueError, match=rf"(?s)misfit\.pt.*{re.escape(named)}"):
        clip.load(tmp_path / "misfit.pt", device="cpu")


@pytest.mark.parametrize("change, named", [
    pytest.param(lambda s: without(s, "visual_projection.weight"), "visual_projection.weight", id="missing"),
    pytest.param(lambda s: without(s, "text_model.encoder.layers.0.self_attn.q_proj.bias"), "q_proj.bias",
                 id="no bias"),
    pytest.param(lambda s: {k: t for k, t in s.items() if "vision_model.encoder" not in k}, "resblocks.0",
                 id="no layers"),
    pytest.param(lambda s: s | {"text_model.extra": torch.ones(3)}, "text_model.extra", id="one too many")])
def test_hugging_face_weights_that_do_not_fit(tmp_path, change, named):
    """The same strictness for Hugging Face's names: what is missing or unknown is named."""
    transformers = pytest.importorskip("transformers")
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)
    state = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | dict(vocab_size=20), vision_config=tower | dict(image_size=16, patch_size=8),
        projection_dim=8)).state_dict()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    clip.load(path, device="cpu")                                                   # unchanged, it fits
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=rf"(?s)pytorch_model\.bin.*{re.escape(named)}"):
        clip.load(path, device="cpu")


def test_flipped_bit_in_a_weights_file_is_noticed(tmp_path):
    """torch alone would read other weights without a word."""
    path, state = tmp_path / "weights.pt", openai_state(**TINY)
    torch.save(state, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(state["text_projection"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="weights.pt is damaged or no weights file.*checksum"):
        clip.read_state_dict(path)


def test_resnet_is_refused(tmp_path):
    """A ResNet CLIP, by name or by file, is told apart from a broken ViT: the message says what to use."""
    for name in ("RN50", "RN101", "RN50x64"):
        with pytest.raises(ValueError, match=f"found {name}, a ResNet.*ViT-B/16"):
            clip.load(name)
    open_clip = pytest.importorskip("open_clip")
    resnet = open_clip.CLIP(64, vision_cfg=dict(layers=(1, 1, 1, 1), width=8, image_size=32, head_width=64),
                            text_cfg=dict(width=64, heads=1, layers=1, vocab_size=20))
    torch.save(resnet.state_dict(), tmp_path / "RN.pt")
    with pytest.raises(ValueError, match=r"RN\.pt: expected a ViT CLIP.*found a ResNet CLIP.*ViT-B/16"):
        clip.load(tmp_path / "RN.pt", device="cpu")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"epoch": 3, "weight": torch.ones(2)},
                                     "text", {0: torch.ones(2)}])
def test_files_that_hold_something_else(tmp_path, content):
    """A file that torch can read but that holds no state dict is refused."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: expected a state dict"):
        clip.load(tmp_path / "other.pt", device="cpu")


# ------------------------------------------------------------------------------- broken files and wrong paths

BREAKABLE = [pytest.param(lambda _, path: write_openai_archive(path, **SMALLEST), "archive.pt", id="archive"),
             *(pytest.param(save, file, id=f"{save.__name__} {file}") for save, file in FORMATS)]


@pytest.mark.parametrize("save, file", BREAKABLE)
def test_broken_files(tmp_path, save, file):
    """A file cut off anywhere, an empty file and a text file are "damaged", with the file's name."""
    path = tmp_path / file
    save(openai_state(**SMALLEST), path)
    whole = path.read_bytes()
    lengths = (1, 7, 8, 9, 100, *range(5000, len(whole), len(whole) // 15), len(whole) - 1)
    cuts = [whole[:length] for length in lengths]
    pointer = b"version https://git-lfs.github.com/spec/v1\nsize 353976522\n"
    web_page = b"<html>404</html>\n" * 999
    for content in (b"", pointer, web_page, *cuts):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(file)} is damaged or no weights file"):
            clip.load(path, device="cpu")


def test_paths_that_hold_no_weights(tmp_path):
    """A missing file and a mistyped name are FileNotFoundError; of an empty folder is said what it lacks."""
    for wrong in ("ViT-B/17", "vit-b/16", tmp_path / "no.pt", tmp_path / "no.safetensors", tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match=f"ViT-B/16.*{re.escape(str(wrong))}"):
            clip.load(wrong, device="cpu")
    with pytest.raises(FileNotFoundError):
        clip.read_state_dict(tmp_path / "no.pt")
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="is a folder: expected model.safetensors, .* found README.md"):
        clip.load(tmp_path, device="cpu")


# ------------------------------------------------------------------------------------------ downloads

CONTENT = bytes(range(256)) * 20_000                                                # 5 MB: several chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: `pages[path]` answers for a path, `requests` lists the requests."""
    pages, requests = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            pages.get(self.path, lambda handler: handler.send_error(404))(self)

        def log_message(self, *_):
            pass                                                                    # quiet

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *_: None                 # a client that hangs up is what some tests are about
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}", pages=pages, requests=requests)
    httpd.shutdown()
    httpd.server_close()


def page(content: bytes, promised: int | None = None):
    """An answer with this content, which promises `promised` bytes (default: as many as it has)."""
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if promised is None else promised))
        handler.end_headers()
        handler.wfile.write(content)
    return answer


def chunked(handler):
    """An answer in HTTP's chunked form that breaks off within a chunk."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5000\r\n" + CONTENT[:1000])


def babble(handler):
    """An answer that is not HTTP."""
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


def test_download(server, tmp_path, capsys, monkeypatch):
    """A file is fetched once into a new folder, with a progress bar; the second call asks no server."""
    monkeypatch.setattr("clip.download.tqdm", functools.partial(tqdm, disable=False))   # off in conftest.py
    server.pages["/weights.pt"] = page(CONTENT)
    target = tmp_path / "new" / "folder" / "weights.pt"
    for _ in range(2):
        assert download(f"{server.url}/weights.pt", target, DIGEST) == target
        assert target.read_bytes() == CONTENT
        assert [file.name for file in target.parent.iterdir()] == ["weights.pt"]
    assert server.requests == ["/weights.pt"]
    assert re.search(r"weights\.pt: 100%.*4\.88M/4\.88M", capsys.readouterr().err)


FAILURES = [
    pytest.param(page(CONTENT[:-1] + b"?"), ValueError, f"SHA-256 {DIGEST}, found", id="another content"),
    pytest.param(page(CONTENT[:-1]), ValueError, f"SHA-256 {DIGEST}, found", id="shorter than it should be"),
    pytest.param(page(b""), ValueError, f"SHA-256 {DIGEST}, found", id="empty"),
    pytest.param(page(CONTENT[:3_000_000], promised=len(CONTENT)), OSError, "5120000 bytes.*after 3000000",
                 id="broken off"),
    pytest.param(chunked, OSError, "download failed", id="broken off in a chunk"),
    pytest.param(babble, OSError, "download failed", id="no HTTP"),
    pytest.param(lambda handler: handler.send_error(404), OSError, "download failed.*404", id="not found"),
    pytest.param(lambda handler: handler.send_error(503), OSError, "download failed.*503", id="server error"),
    pytest.param(lambda handler: None, OSError, "download failed", id="hung up")]


@pytest.mark.parametrize("answer, kind, message", FAILURES)
@pytest.mark.parametrize("cached", [None, b"a damaged file from last year"])
def test_failed_download_leaves_nothing(server, tmp_path, answer, kind, message, cached):
    """Whatever goes wrong, the error names the URL; no new file is there, and an old one is untouched."""
    server.pages["/weights.pt"] = answer
    target = tmp_path / "weights.pt"
    if cached is not None:
        target.write_bytes(cached)
    with pytest.raises(kind, match=rf"{server.url}/weights\.pt.*{message}"):
        download(f"{server.url}/weights.pt", target, DIGEST)
    assert server.requests == ["/weights.pt"]
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert left == ({"weights.pt": cached} if cached else {})


def test_no_server(tmp_path, server):
    """Where nobody answers, the error says so and what to do instead."""
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # take a free port, and give it back
    free.server_close()
    with pytest.raises(OSError, match=f"127.0.0.1:{free.server_port}/weights.pt.*pass its path instead"):
        download(f"http://127.0.0.1:{free.server_port}/weights.pt", tmp_path / "weights.pt", DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_replaced(server, tmp_path, capsys):
    """A cached file with a wrong SHA-256 is announced, fetched again and replaced."""
    server.pages["/weights.pt"] = page(CONTENT)
    target = tmp_path / "weights.pt"
    target.write_bytes(CONTENT[:-1])
    download(f"{server.url}/weights.pt", target, DIGEST)
    assert target.read_bytes() == CONTENT and len(list(tmp_path.iterdir())) == 1
    assert "weights.pt is damaged" in capsys.readouterr().out


def test_interrupted_download_leaves_the_old_file(server, tmp_path, monkeypatch):
    """Ctrl-C in the middle removes the part that had arrived and keeps the file that was there."""
    server.pages["/weights.pt"] = page(CONTENT)
    target = tmp_path / "weights.pt"
    target.write_bytes(b"old")
    parts = []

    class Interrupted(clip.download.tqdm):
        def update(self, n=1):
            parts.extend(tmp_path.glob("*.part"))
            raise KeyboardInterrupt

    monkeypatch.setattr(clip.download, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/weights.pt", target, DIGEST)
    assert len(parts) == 1                                                       # it really was in the middle
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"] and target.read_bytes() == b"old"


def test_load_by_name(server, tmp_path, monkeypatch):
    """clip.load("ViT-B/32") fetches the archive into download_root and checks it; then it only loads it."""
    expected = write_openai_archive(tmp_path / "made.pt", **SMALLEST)
    content = (tmp_path / "made.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(loading.MODELS, "ViT-B/32", (digest, "ViT-B-32.pt"))
    monkeypatch.setattr(loading, "OPENAI", f"{server.url}/clip/models")
    server.pages[f"/clip/models/{digest}/ViT-B-32.pt"] = page(content)
    for _ in range(2):
        model, preprocess = clip.load("ViT-B/32", device="cpu", download_root=tmp_path / "cache")
        assert_same_tensors(model, expected)
    assert len(server.requests) == 1
    assert (tmp_path / "cache" / "ViT-B-32.pt").read_bytes() == content
