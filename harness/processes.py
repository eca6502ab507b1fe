"""Several processes for one training: `torchrun --nproc-per-node 4 rectify.py --data coco --batch-size 16`.

Every process goes through the same script. Of a batch it takes its rows, of the images its share; gradients
are averaged, BatchNorm sees the whole batch, and process 0 alone writes into run folders. So it is the same
step whatever the number of processes, and a run may be resumed with another one. With one process every
function here does nothing, or what its name says without the others.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.machine import COUNT, RANK


def begin(device: torch.device) -> None:
    """Let the processes that torchrun started find each other. Process 0 speaks for all."""
    if COUNT > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def wait() -> None:
    """Until all processes are here."""
    if COUNT > 1:
        dist.barrier()


def share(length: int) -> slice:
    """The part of a batch, or of a list of images, that is this process's."""
    return slice(length * RANK // COUNT, length * (RANK + 1) // COUNT)


def refuse_uneven(batch: int, rate: float) -> None:
    """Raise ValueError for a batch that the processes cannot share evenly: its mean would be no mean of
    theirs."""
    if batch % COUNT:
        fits = -(-batch // COUNT) * COUNT
        raise ValueError(f"expected a batch that {COUNT} processes can share evenly, found {batch} images. "
                         f"Give --batch-size {fits} --learning-rate {rate * fits / batch:.3g} (the rate goes "
                         "with the batch), or start fewer processes.")


def uniform(shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Numbers in [0, 1) for this process's rows, from one draw for the whole batch."""
    rows, *rest = shape
    drawn = torch.rand(rows * COUNT, *rest, generator=noise, device=noise.device)
    return drawn[share(rows * COUNT)]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if COUNT > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order."""
    if COUNT == 1:
        return rows
    parts = [None] * COUNT
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


def agreed(value: bool) -> bool:
    """What process 0 says."""
    if COUNT == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, for reading."""
    return total(tensor.detach().clone()) / COUNT


class Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return total(x.clone())

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return total(gradient.clone())


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the rows of all processes, which have equally many. On a CPU too, where torch's own
    SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        maps, places = x.float() if x.dtype == torch.bfloat16 else x, x.numel() // x.shape[1] * COUNT
        mean = Sum.apply(maps.sum(dim=(0, 2, 3))) / places                                              # (C,)
        centred = maps - mean[:, None, None]
        variance = Sum.apply(centred.square().sum(dim=(0, 2, 3))) / places                              # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * places / (places - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def with_whole_batches(module: nn.Module) -> None:
    """Put WholeBatchNorm, with the same weights, in the place of every BatchNorm2d that trains."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and child.weight.requires_grad:
            whole = WholeBatchNorm(child.num_features, child.eps, child.momentum, device=child.weight.device,
                                   dtype=child.weight.dtype)
            whole.load_state_dict(child.state_dict())
            module.add_module(name, whole)
        else:
            with_whole_batches(child)


class Step(nn.Module):
    """A function of a module as that module's `forward`, the form in which DistributedDataParallel takes
    it."""

    def __init__(self, function, module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *args):
        return self.function(self.module, *args)


def parallel(function, module: nn.Module):
    """`function(module, …)` as a function of the rest, whose gradients will be the mean over all processes.

    To be called before an optimiser takes the module's parameters.
    """
    if COUNT == 1:
        return functools.partial(function, module)
    with_whole_batches(module)
    return nn.parallel.DistributedDataParallel(Step(function, module), static_graph=True)
