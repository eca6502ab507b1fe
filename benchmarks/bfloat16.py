"""A script with `--precision bf16` on a processor without bfloat16: slow, but with the numbers of one with
it.

    python benchmarks/bfloat16.py rectify.py --out runs-bf16

A tensor core multiplies bfloat16 numbers exactly, adds in float32 and rounds the sum to bfloat16. The same is
computed here by a float32 product of the rounded numbers. PyTorch's own products give the same
(`tests/test_benchmark.py`; its attention also rounds the softmax's weights), but without hardware for them a
training takes many times as long as in float32.

For what bfloat16 does to a result, never for how fast it is. Give it an --out of its own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {getattr(torch.ops.aten, name) for name in (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward")}


def is_bfloat16(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


class Bfloat16Products(TorchDispatchMode):
    """Runs products, convolutions and attention of bfloat16 numbers in float32 and rounds what comes out."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket not in PRODUCTS or not any(map(is_bfloat16, tree_leaves((args, kwargs)))):
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda value: value.float() if is_bfloat16(value) else value, (args, kwargs))
        found = function(*args, **kwargs)
        if function.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            return found[0].bfloat16(), found[1]    # the second: the softmax's logarithm, float32 everywhere
        return tree_map(lambda value: value.bfloat16() if isinstance(value, torch.Tensor) else value, found)


if __name__ == "__main__":
    script = Path(__file__).resolve().parent.parent / (sys.argv[1] if len(sys.argv) > 1 else "")
    if not script.is_file():
        sys.exit("expected a script of this project and its flags, found "
                 f"{' '.join(sys.argv[1:]) or 'nothing'}.\n\n{__doc__}")
    sys.argv = [str(script), *sys.argv[2:], "--precision", "bf16"]
    sys.path[0] = str(script.parent)
    with Bfloat16Products():
        runpy.run_path(str(script), run_name="__main__")
