"""Runs a submission's functions on inputs that come in, and sends out what they return. Judges nothing.

    grade.py starts it: python -I worker.py ROOM < cases

It runs in a process of its own, in a copy of the project where every other exercise is blank. It knows no
expected result, so there is none here to steal or to forge: whatever it sends is compared by grade.py with
what the lecturer's functions return. `perform` is used there too.
"""

from __future__ import annotations

import base64
import json
import os
import sys

MEMORY = 16 * 2 ** 30               # bytes of address space
FILE = 2 ** 26                      # bytes that a file may have

# ------------------------------------------------------------------------------------------ tensors as text
# No pickle: what comes back is read by the lecturer's process.


def to_text(value):
    import torch
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        raw = value.view(torch.uint8) if value.dtype == torch.bool else value
        return {"tensor": base64.b64encode(raw.numpy().tobytes()).decode(), "dtype": str(value.dtype)[6:],
                "shape": list(value.shape)}
    if isinstance(value, (list, tuple)):
        return [to_text(one) for one in value]
    if isinstance(value, dict):
        return {str(name): to_text(one) for name, one in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else f"({type(value).__name__})"


DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "int8", "int16", "bool")


def from_text(value):
    """Raises ValueError, TypeError or KeyError for what `to_text` did not write."""
    import numpy as np
    import torch
    if isinstance(value, dict) and "tensor" in value:
        if value["dtype"] not in DTYPES:
            raise ValueError("unknown dtype")
        raw = bytearray(base64.b64decode(value["tensor"], validate=True))
        kind = np.dtype(value["dtype"])
        shape = [int(side) for side in value["shape"]]
        return torch.from_numpy(np.frombuffer(raw, dtype=kind).reshape(shape).copy())
    if isinstance(value, dict):
        return {name: from_text(one) for name, one in value.items()}
    return [from_text(one) for one in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------ one case


def perform(function: str, arguments: dict, gradients: list[str]) -> dict:
    """What a function makes of a case: {what: tensor}, with the gradient of each named argument; or
    {"raises"}."""
    import torch
    arguments = {name: one.clone().requires_grad_(name in gradients) if isinstance(one, torch.Tensor) else one
                 for name, one in arguments.items()}
    before = {name: one.detach().clone() for name, one in arguments.items() if isinstance(one, torch.Tensor)}
    torch.manual_seed(0)
    try:
        found = CALLS.get(function, plain)(function, **arguments)
    except ValueError as error:
        return {"raises": "ValueError", "says": str(error)[:300]}
    found = found if isinstance(found, dict) else {"the result": found}
    for name in gradients:
        weight = 0
        for one in found.values():
            if isinstance(one, torch.Tensor) and one.requires_grad:
                cotangent = torch.randn(one.shape, generator=torch.Generator().manual_seed(one.numel()))
                weight = weight + (one * cotangent).sum()
        if not isinstance(weight, torch.Tensor):
            return found | {f"the gradient of {name}": "there is none: is something detached?"}
        gradient, = torch.autograd.grad(weight, arguments[name], retain_graph=True, allow_unused=True)
        none = torch.zeros_like(arguments[name])
        found[f"the gradient of {name}"] = none if gradient is None else gradient
    for name, one in before.items():
        if not torch.equal(arguments[name].detach().nan_to_num(), one.nan_to_num()):
            found[f"{name} after the call"] = "it was changed in its place; work on a copy"
    return found


def plain(function: str, **arguments):
    from exercises import probes
    file, _, name = function.partition(":")
    return getattr(probes.module(file), name)(*arguments.values())


def attention_values(_, seed: int, x):
    from exercises import probes
    return probes.tiny_clip(seed).visual.transformer.resblocks[-1].attn.values(x)


def dense(_, seed: int, x, path: str):
    from exercises import probes
    return probes.tiny_clip(seed).visual.dense(x, path)


def query_features(_, seed: int, synonyms: list, templates: list):
    from types import SimpleNamespace

    from exercises import probes
    words = SimpleNamespace(synonyms=tuple(map(tuple, synonyms)), templates=tuple(templates),
                            names=[names[0] for names in synonyms])
    rectify = probes.module("rectify.py")
    found = rectify.query_features(probes.tiny_clip(seed), words)
    return {"the result": found, "whether a gradient is recorded": probes.torch.tensor(found.requires_grad)}


def encode_prompt(_, seed: int, prompt, names: list):
    from exercises import probes
    model = probes.tiny_clip(seed)
    with probes.tokens_seen(model) as seen:
        found = model.encode_prompt(prompt, names)
    naive = len(names) * (1 + len(prompt) + 2)
    return {"the result": found,
            "whether the prefix is shared": probes.torch.tensor(len(names) < 4 or seen[0] < 0.6 * naive)}


def reference_features(_, features, prompt, names: list):
    from exercises import probes
    return probes.module("rectify.py").reference_features(probes.FixedText(features), prompt, names)


def bias_logits(_, positions, weight, bias, reference):
    import torch

    from exercises import probes
    projection = torch.nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1)
    del projection.weight, projection.bias
    projection.weight, projection.bias = weight, bias  # plain tensors, so that gradients come out
    return probes.module("rectify.py").bias_logits(positions, projection, reference)


def decoder(_, features, logits, weight, training: bool):
    from exercises import probes
    module = probes.module("rectify.py").Decoder(features.shape[1], logits.shape[1]).train(training)
    del module.conv.weight
    module.conv.weight = weight
    module.norm.running_mean += 0.3
    module.norm.running_var *= 2.5
    found = module(features, logits)
    return {"the result": found, "the norm's running mean after it": module.norm.running_mean.clone()}


def train_step(_, sizes: list, seed: int, recipe: dict):
    import torch

    from exercises import probes
    parts, loss = probes.step(*sizes, seed=seed, **recipe)
    found = {"the loss": loss}
    for name, calls in parts.given.items():
        if name != "patch_positions":
            found[f"{name}: number of calls"] = torch.tensor(len(calls))
        for given in calls[:1]:
            found |= {f"{name}: its {argument}": one.detach() for argument, one in given.items()}
    gradient, = torch.autograd.grad(loss, parts.prompt, allow_unused=True)
    return found | {"the gradient of the prompt": gradient if gradient is not None else torch.zeros(0)}


def text_loss(_, features, masks, query, hypothesis, scale: float):
    from exercises import probes

    def loss(features, masks, query, hypothesis, scale):
        return (masks.mean() * features.mean() * scale + query.mean() * hypothesis.float().mean())
    return probes.module("distill.py").text_loss(features, masks, query, hypothesis, scale, loss)


CALLS = {"clip/model.py:Attention.values": attention_values, "clip/model.py:VisionTransformer.dense": dense,
         "rectify.py:query_features": query_features, "clip/model.py:CLIP.encode_prompt": encode_prompt,
         "rectify.py:reference_features": reference_features, "rectify.py:bias_logits": bias_logits,
         "rectify.py:Decoder.forward": decoder, "rectify.py:train_step": train_step,
         "distill.py:text_loss": text_loss}


# ------------------------------------------------------------------------------------------ the process


def main() -> None:
    room, seconds = sys.argv[1], int(sys.argv[2])
    cases = json.loads(sys.stdin.readline())
    out = os.dup(1)                                     # what the functions print goes nowhere
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (seconds + 5, seconds + 10))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):          # Windows has none of them
        pass
    sys.path.insert(0, room)
    for number, case in enumerate(cases):
        try:
            answer = to_text(perform(case["function"], from_text(case["arguments"]), case["gradients"]))
        except NotImplementedError as error:
            answer = {"error": f"not written yet ({error})"[:300]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300] + place(error, room)}
        line = json.dumps({"case": number, "answer": answer}) + "\n"
        with os.fdopen(os.dup(out), "w") as file:
            file.write(line)


def place(error: Exception, room: str) -> str:
    import traceback
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith(room) and f"{os.sep}exercises{os.sep}" not in frame.filename]
    return f", {os.path.relpath(frames[-1].filename, room)}, in {frames[-1].name}" if frames else ""


if __name__ == "__main__":
    main()
