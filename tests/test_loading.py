"""clip/load.py and clip/download.py: every format gives the same weights, a hostile file runs nothing, a broken one is
named, and a download is either whole or not there.

    python -m pytest tests/test_loading.py           # seconds; `-m slow` adds an archive of ViT-B/16's real size

Nothing here needs the internet: the downloads come from a web server on this machine.
"""

import builtins
import functools
import hashlib
import importlib
import json
import os
import pickle
import re
import struct
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import clip
from clip.download import download
from helpers import TINY, openai_shapes, openai_state, relative, write_openai_archive

loading = importlib.import_module("clip.load")         # `clip.load` itself is the function of that name
SMALL = TINY | dict(text_vocab=500)
SMALLEST = dict(width=64, layers=1, patch=8, resolution=16, embed_dim=8, text_width=64, text_layers=1, text_vocab=20)


def assert_same_tensors(model: clip.CLIP, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor of the model is exactly the expected one, none is missing and none is left over."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------ OpenAI's archives

@pytest.mark.parametrize("half", [True, False])
def test_openai_archive_is_read_without_torchscript(tmp_path, monkeypatch, half):
    """An archive gives exactly its weights, in float32, without torch.jit, whose loader would run its code."""
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
    """torch.jit itself reads the file that write_openai_archive makes, and finds the same weights and sizes in it."""
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
    """Slices and transposes of one storage, every number type, empty tensors and lists beside them are read rightly."""
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"whole": whole, "column": whole[:, 2], "turned": whole.T, "rest": whole[1:], "none": torch.empty(0, 3)}
    for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                 torch.uint8, torch.bool):
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
        assert found[f"part.{name}"].dtype == tensor.dtype and torch.equal(found[f"part.{name}"], tensor), name


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
    """All four ViTs load strictly: open_clip's names and shapes fit, and the sizes are read off them (no numbers)."""
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
    """Written by hand, so that the format's definition is here to read: length, JSON, numbers (all float32)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
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
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(15).view(3, 5).to(kind) for kind in kinds}
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


def test_rows_of_used_tokens_fill_the_table(tmp_path):
    """A file that holds some rows of the embedding table (as toyland.pt does): they stand where they belong, others are zero."""
    state = openai_state(**SMALLEST)
    rows = torch.randn(3, SMALLEST["text_width"])
    torch.save(state | {"token_embedding.weight": rows, "token_embedding.used": torch.tensor([7, 320, 49407])},
               tmp_path / "weights.pt")
    table = torch.zeros(49408, SMALLEST["text_width"])
    table[7], table[320], table[49407] = rows
    model, _ = clip.load(tmp_path / "weights.pt", device="cpu")
    assert_same_tensors(model, state | {"token_embedding.weight": table})


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


def test_hugging_face_config_with_another_activation_is_refused(tmp_path):
    """Weights trained with the exact GELU would load and be wrong: the config beside them tells."""
    torch.save(openai_state(**SMALLEST), tmp_path / "pytorch_model.bin")
    for config, refused in (({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, True),
                            ({"model_type": "clip", "text_config": {"hidden_act": "quick_gelu"}}, False),
                            ({"model_type": "bert", "vision_config": {"hidden_act": "gelu"}}, False), ([1], False)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if refused:
            with pytest.raises(ValueError, match="config.json: expected the activation quick_gelu.*found gelu"):
                clip.load(tmp_path, device="cpu")
        else:
            clip.load(tmp_path, device="cpu")


def test_fingerprint():
    """The fingerprint is 16 hexadecimal digits, the same for the same weights, another after the smallest change."""
    state = openai_state(**SMALLEST)
    before = clip.fingerprint(clip.build_model(state))
    assert re.fullmatch("[0-9a-f]{16}", before)
    changed = state["ln_final.bias"].clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))             # one bit
    assert clip.fingerprint(clip.build_model(state | {"ln_final.bias": changed})) != before


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(50, 37), (20, 90), (16, 16)])
def test_preprocess_equals_open_clip(tmp_path, mode, size):
    """preprocess is OpenAI's: short side bicubic, centre crop, RGB, CLIP's mean and std; for pictures of all kinds."""
    open_clip, image_of = pytest.importorskip("open_clip"), pytest.importorskip("PIL.Image")
    torch.save(openai_state(**SMALLEST), tmp_path / "weights.pt")
    _, preprocess = clip.load(tmp_path / "weights.pt", device="cpu")
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = image_of.fromarray(pixels.numpy()).convert(mode)
    expected = open_clip.image_transform(16, is_train=False)(picture)
    assert preprocess(picture).shape == (3, 16, 16)
    assert relative(preprocess(picture), expected) <= 1e-6


# ------------------------------------------------------------------------------------------------ hostile files

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
    """An archive whose pickle calls a function is refused by the function's name, and the function is not called."""
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


# ------------------------------------------------------------------------------------- weights that do not fit

def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


MISFITS = [
    pytest.param(lambda s: without(s, "visual.ln_pre.bias"), "visual.ln_pre.bias", id="missing"),
    pytest.param(lambda s: without(s, "visual.conv1.weight"), "visual.conv1.weight", id="missing what gives the sizes"),
    pytest.param(lambda s: without(s, "transformer.resblocks.0.attn.in_proj_bias"), "in_proj_bias", id="none in block"),
    pytest.param(lambda s: {k: t for k, t in s.items() if "resblocks" not in k}, "resblocks", id="no blocks"),
    pytest.param(lambda s: s | {"visual.extra": torch.ones(3)}, "visual.extra", id="one too many"),
    pytest.param(lambda s: s | {"transformer.resblocks.7.ln_1.weight": torch.ones(64)}, "resblocks.1", id="gap in blocks"),
    pytest.param(lambda s: s | {"visual.ln_post.weight": torch.ones(32)}, "visual.ln_post.weight", id="wrong length"),
    pytest.param(lambda s: s | {"visual.proj": s["visual.proj"].T}, "visual.proj", id="transposed"),
    pytest.param(lambda s: s | {"visual.positional_embedding": torch.ones(6, 64)}, "positional_embedding", id="no square"),
    pytest.param(lambda s: {}, "visual.conv1.weight", id="empty"),
    pytest.param(lambda s: {"fc.weight": torch.ones(2, 2)}, "fc.weight", id="another network")]


@pytest.mark.parametrize("change, named", MISFITS)
def test_weights_that_do_not_fit(tmp_path, change, named):
    """A tensor missing, left over or of a wrong shape is a ValueError with the file's and the tensor's name."""
    torch.save(change(openai_state(**SMALLEST)), tmp_path / "misfit.pt")
    with pytest.raises(ValueError, match=rf"(?s)misfit\.pt.*{re.escape(named)}"):
        clip.load(tmp_path / "misfit.pt", device="cpu")


@pytest.mark.parametrize("change, named", [
    pytest.param(lambda s: without(s, "visual_projection.weight"), "visual_projection.weight", id="missing"),
    pytest.param(lambda s: without(s, "text_model.encoder.layers.0.self_attn.q_proj.bias"), "q_proj.bias", id="no bias"),
    pytest.param(lambda s: {k: t for k, t in s.items() if "vision_model.encoder" not in k}, "resblocks.0", id="no layers"),
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
    """A ResNet CLIP, by name or by file, is told apart from a broken ViT: the message says what to use instead."""
    for name in ("RN50", "RN101", "RN50x64"):
        with pytest.raises(ValueError, match=f"found {name}, a ResNet.*ViT-B/16"):
            clip.load(name)
    open_clip = pytest.importorskip("open_clip")
    resnet = open_clip.CLIP(64, vision_cfg=dict(layers=(1, 1, 1, 1), width=8, image_size=32, head_width=64),
                            text_cfg=dict(width=64, heads=1, layers=1, vocab_size=20))
    torch.save(resnet.state_dict(), tmp_path / "RN.pt")
    with pytest.raises(ValueError, match=r"RN\.pt: expected a ViT CLIP.*found a ResNet CLIP.*ViT-B/16"):
        clip.load(tmp_path / "RN.pt", device="cpu")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"epoch": 3, "weight": torch.ones(2)}, "text",
                                     {0: torch.ones(2)}])
def test_files_that_hold_something_else(tmp_path, content):
    """A file that torch can read but that holds no state dict is refused."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: expected a state dict"):
        clip.load(tmp_path / "other.pt", device="cpu")


# -------------------------------------------------------------------------------- broken files and wrong paths

BREAKABLE = [pytest.param(lambda state, path: write_openai_archive(path, **SMALLEST), "archive.pt", id="archive"),
             *(pytest.param(save, file, id=f"{save.__name__} {file}") for save, file in FORMATS)]


@pytest.mark.parametrize("save, file", BREAKABLE)
def test_broken_files(tmp_path, save, file):
    """A file cut off anywhere, an empty file and a text file are "damaged", with the file's name."""
    path = tmp_path / file
    save(openai_state(**SMALLEST), path)
    whole = path.read_bytes()
    cuts = [whole[:length] for length in (1, 7, 8, 9, 100, *range(5000, len(whole), len(whole) // 15), len(whole) - 1)]
    pointer, web_page = b"version https://git-lfs.github.com/spec/v1\nsize 353976522\n", b"<html>404</html>\n" * 999
    for content in (b"", pointer, web_page, *cuts):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(file)} is damaged or no weights file"):
            clip.load(path, device="cpu")


def test_paths_that_hold_no_weights(tmp_path):
    """A missing file and a mistyped name are FileNotFoundError, a folder without weights says what it expected."""
    for wrong in ("ViT-B/17", "vit-b/16", tmp_path / "no.pt", tmp_path / "no.safetensors", tmp_path / "no.bin"):
        with pytest.raises(FileNotFoundError, match=f"ViT-B/16.*{re.escape(str(wrong))}"):
            clip.load(wrong, device="cpu")
    with pytest.raises(FileNotFoundError):
        clip.read_state_dict(tmp_path / "no.pt")
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="is a folder; expected model.safetensors or pytorch_model.bin"):
        clip.load(tmp_path, device="cpu")


# ---------------------------------------------------------------------------------------------------- downloads

CONTENT = bytes(range(256)) * 20_000                                                # 5 MB: several chunks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: `pages[path]` is a function that answers, `requests` lists what was asked for."""
    pages, requests = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            pages.get(self.path, lambda handler: handler.send_error(404))(self)

        def log_message(self, *_):
            pass                                                                    # quiet

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *_: None                    # a client that hangs up is what some tests are about
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
    """A file is fetched once into a new folder, with a progress bar; the second call does not ask the server."""
    monkeypatch.setattr("clip.download.tqdm", functools.partial(tqdm, disable=False))      # conftest.py turned bars off
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
    pytest.param(page(CONTENT[:3_000_000], promised=len(CONTENT)), OSError, "5120000 bytes.*after 3000000", id="broken off"),
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
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"weights.pt": cached} if cached else {})


def test_no_server(tmp_path, server):
    """Where nobody answers, the error says so and what to do instead."""
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)    # take a free port, and give it back
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
    assert len(parts) == 1                                                          # it really was in the middle
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"] and target.read_bytes() == b"old"


def test_load_by_name(server, tmp_path, monkeypatch):
    """clip.load("ViT-B/32") fetches the archive into download_root, checks it, loads it, and next time only loads it."""
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
