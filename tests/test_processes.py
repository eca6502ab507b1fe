"""harness/processes.py: two processes take the steps of one, and a run that loses one of them can go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from harness import processes
from helpers import write_photos, write_voc_tree

WORKER = str(ROOT / "tests/processes_worker.py")


def command(count: int, *given) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *(torchrun if count > 1 else []), WORKER, *map(str, given)]


def run_with(count: int, *given, code: int = 0) -> str:
    """Run the worker in `count` processes. Returns what was printed."""
    result = subprocess.run(command(count, *given), capture_output=True, text=True, timeout=300)
    said = result.stdout + result.stderr
    assert (result.returncode != 0) == (code != 0), said
    return said


def weights_of(out: str, stage: str) -> dict:
    [path] = Path(out).glob(f"*/{stage}/checkpoint.pt")
    return torch.load(path, weights_only=True)["weights"]


def furthest(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max((found[name].double() - tensor.double()).abs().max().item()
               for name, tensor in expected.items())


# ------------------------------------------------------------------------------------------ the step


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rectify", "distill"])
def test_ten_steps_of_two_processes_are_those_of_one(tmp_path, stage):
    """Losses, gradients, weights and BatchNorm's statistics, in float64."""
    for count in (1, 2):
        run_with(count, "steps", stage, tmp_path / f"{count}.pt")
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert torch.allclose(torch.stack(two["losses"]), torch.stack(one["losses"]), rtol=0, atol=1e-12)
    assert len(set(map(float, one["losses"]))) == 10
    for found, expected in zip(two["gradients"], one["gradients"]):
        largest = max(gradient.abs().max() for gradient in expected)
        assert largest > 1e-4 and all((one - other).abs().max() < 1e-11 * largest
                                      for one, other in zip(found, expected))
    assert furthest(two["weights"], one["weights"]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batchnorm_of_all_rows_is_batchnorm(dtype):
    """With one process: values, gradients and statistics of torch's own, in training and in evaluation."""
    torch.manual_seed(0)
    expected = torch.nn.BatchNorm2d(5)
    torch.nn.init.normal_(expected.weight), torch.nn.init.normal_(expected.bias)
    found = torch.nn.Sequential(torch.nn.BatchNorm2d(5))
    found[0].load_state_dict(expected.state_dict())
    processes.with_whole_batches(found)
    assert isinstance(found[0], processes.WholeBatchNorm)
    if dtype == torch.float64:
        expected, found = expected.double(), found.double()
    for training in (True, True, False):
        x = (3 * torch.randn(4, 5, 6, 7) + 1).to(dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm.train(training)(one) for norm, one in zip((expected, found), inputs)]
        assert outputs[0].dtype == outputs[1].dtype == dtype
        for one in outputs:
            (one.double() * torch.arange(7)).sum().backward()
        close = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=0.02, atol=0.1)
        assert torch.allclose(*outputs, **close) and torch.allclose(*(one.grad for one in inputs), **close)
        state = found[0].state_dict()
        assert all(torch.allclose(state[name].double(), tensor.double(), rtol=1e-5)
                   for name, tensor in expected.state_dict().items())


def test_only_batchnorms_that_train_are_replaced():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    model[0].requires_grad_(False)
    names = list(model.state_dict())
    processes.with_whole_batches(model)
    assert type(model[0]) is torch.nn.BatchNorm2d and type(model[1][0]) is processes.WholeBatchNorm
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("count, batch, fits", [(2, 1, 2), (4, 6, 8), (3, 16, 18)])
def test_batch_that_cannot_be_shared_is_refused_with_one_that_can(monkeypatch, count, batch, fits):
    monkeypatch.setattr(processes, "COUNT", count)
    with pytest.raises(ValueError, match=rf"{count} processes can share evenly, found {batch} images.*"
                                         rf"--batch-size {fits} --learning-rate ") as error:
        processes.refuse_uneven(batch, 0.01 * batch)
    [rate] = re.findall(r"--learning-rate (\S+)", str(error.value))
    assert float(rate) == pytest.approx(0.01 * fits)
    processes.refuse_uneven(fits, 0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 20])
def test_shares_are_all_of_it_in_order(monkeypatch, count, length):
    monkeypatch.setattr(processes, "COUNT", count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(processes, "RANK", rank)
        parts.append(list(range(length))[processes.share(length)])
    assert sum(parts, []) == list(range(length)) and max(map(len, parts)) - min(map(len, parts)) <= 1


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def voc(tmp_path, tiny_clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_voc_tree(tmp_path / "data")
    return ["--data", "voc", "--clip", tiny_clip]


@pytest.mark.slow
def test_two_processes_count_train_and_measure_as_one(voc):
    """Votes and confusions are equal; weights to rounding. One process writes, and speaks."""
    for count, out in ((1, "one"), (2, "two")):
        said = run_with(count, "run", "rectify", *voc, "--out", out)
        assert said.count("Wrote ") == 1 and said.count("MaskCLIP  ") == 1, said
    votes = [torch.load(next(Path(out).glob("voc/cache/votes-*.pt")), weights_only=True)
             for out in ("one", "two")]
    assert torch.equal(*votes)
    assert furthest(weights_of("two", "rectify"), weights_of("one", "rectify")) < 1e-5
    logs = [[json.loads(line)["loss"] for line in Path(out, "voc/rectify/log.jsonl").open()]
            for out in ("one", "two")]
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    run_with(2, "run", "distill", "--out", "two")
    found = []
    for count in (2, 1):
        run_with(count, "run", "evaluate", "--out", "two")
        found.append(json.loads(Path("two/voc/evaluate/metrics.json").read_text()))
    assert found[0] == found[1] and set(found[0]) == {"vanilla", "maskclip", "rectify", "distill"}


@pytest.mark.slow
def test_killed_process_ends_the_run_and_another_number_goes_on(voc, tmp_path):
    """The message says which; the state is of the last save; four processes end what two began."""
    flags = [*voc, "--batch-size", "4", "--epochs", "40"]
    run_with(2, "run", "rectify", *flags, "--out", "whole")
    run = subprocess.Popen(command(2, "run", "rectify", *flags, "--out", "cut"), text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = Path("cut/voc/rectify/unfinished/log.jsonl")
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.05)
    of_run = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
              if path.read_text().rpartition(")")[2].split()[1] == str(run.pid)]
    [second] = [pid for pid in of_run if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)
    said = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and re.search(r"rank\s*: 1 .*\n.*exitcode\s*: -9", said), said
    saved = torch.load("cut/voc/rectify/unfinished/state.pt", weights_only=True)
    assert 0 < saved["step"] < 40 and not Path("cut/voc/rectify/checkpoint.pt").exists()
    run_with(4, "run", "rectify", *flags, "--out", "cut", "--resume")
    assert furthest(weights_of("cut", "rectify"), weights_of("whole", "rectify")) < 1e-4


@pytest.mark.slow
def test_what_one_process_refuses_ends_all(tmp_path, tiny_clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", *(f"{number}.jpg" for number in range(4)))
    Path("names.txt").write_text("cat\nsofa\n")
    flags = ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip]
    said = run_with(2, "run", "rectify", *flags, "--batch-size", "3", code=2)
    assert "process 0 of 2: expected a batch that 2 processes can share evenly, found 3 images" in said
    Path("photos/3.jpg").write_bytes(Path("photos/3.jpg").read_bytes()[:200])
    said = run_with(2, "run", "rectify", *flags, "--batch-size", "2", code=2)
    assert "process 1 of 2:" in said and "photos/3.jpg" in said and not Path("runs/photos/rectify").exists()
