"""Device, precision and chance. torch is imported inside, so that `--help` answers at once."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
from pathlib import Path

# As torchrun tells its processes (processes.py): which one this is, of how many. The others draw no bars.
RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if RANK > 0:
    os.environ["TQDM_DISABLE"] = "1"            # read when tqdm is imported


def device_of(name: str | None):
    """The torch device of `--device`, the GPU if it is None and there is one (of several processes, each has
    its own). Raises ValueError if it cannot be used."""
    import torch
    if name is None:
        of_this = "cuda" if COUNT == 1 else f"cuda:{os.environ['LOCAL_RANK']}"
        name = of_this if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:                  # every backend that is not there says so in its own way
        raise ValueError(f"--device {name}: expected a device of this machine, found none by that name "
                         f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}). "
                         "Try --device cpu.") from error
    return device


def workers_of(count: int | None, device) -> int:
    """Processes that decode: at most one a core. None beside a CPU, which decodes an image in a fiftieth of
    the time of its step: another process would take from the step what it saves."""
    return min(count if count is not None else 0 if device.type == "cpu" else 4, os.cpu_count() or 1)


def autocast(device, precision: str):
    """float32 is the truth; `bf16` runs matrix products and convolutions in bfloat16."""
    import torch
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def lacks_bfloat16(device, cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether a CPU is known to have no instruction for products in bfloat16; it then takes tens of times as
    long for them as in float32 (benchmarks/README.md)."""
    try:
        flags = Path(cpuinfo).read_text().split()
    except OSError:                             # no Linux: not known
        return False
    return device.type == "cpu" and "flags" in flags and not {"avx512_bf16", "amx_bf16"} & set(flags)


def in_float32(function):
    """Decorator: autocast does not reach into `function`, whose first argument is a tensor.

    For cosines that are multiplied by 1/τ = 100: bfloat16 has eight bits, and would move those logits by half
    a unit.
    """
    @functools.wraps(function)
    def wrapped(tensor, *args, **kwargs):
        import torch
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(tensor, *args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)
    return wrapped


def forecast(parts: dict) -> None:
    """Do every part, a `(how often, function)`, and print how long all of it will take."""
    minutes = {}
    for name, (count, function) in parts.items():
        function()                                              # the first time takes longer
        started = time.perf_counter()
        float(function().sum())                                 # waits for a GPU
        minutes[name] = count * (time.perf_counter() - started) / 60
    said = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    print(f"This will take about {sum(minutes.values()):.1f} minutes: {said}. What lies in the cache is not "
          "made again.")


def seed_of(*parts) -> int:
    """A 63-bit number from anything: every random draw of a run is a function of (seed, what for, when).

    So a resumed run needs no random states, and the number of workers changes nothing.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def versions() -> str:
    import torch
    import torchvision
    return (f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
            f"{torchvision.__version__}")
