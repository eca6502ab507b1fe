"""A long run needs no more memory than a short one: 1,000 steps of each stage, 2,000 images of differing
sizes measured.

    python -m pytest tests/test_soak.py              # about a minute on one core

All of it happens in one process of its own, this very file run as a script, so that nothing which other tests
left behind blurs the numbers. It writes down the memory it holds after every step and after every image.
"""

import conftest  # noqa: F401               first: as a script, this file finds the project through it alone

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

STEPS, IMAGES = 1000, 2000
MIB = 2 ** 20
# Between the end of the first tenth and the end, measured on Linux: 0 in both trainings, 0.6 MiB in the
# evaluation, whose last new image size comes late. A bound of 8 MiB leaves an allocator room and still finds
# 9 KiB lost per step: a batch of these tiny pictures has 30, a graph that somebody keeps has far more.
BOUND = 8 * MIB


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> dict[str, list[int]]:
    """Bytes held after every step or image of the three long runs."""
    folder = tmp_path_factory.mktemp("soak")
    ended = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "memory.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("run, length", [("rectify", STEPS), ("distill", STEPS), ("evaluate", IMAGES)])
def test_a_long_run_needs_no_more_memory_than_its_first_tenth(memory, run, length):
    """No graph, batch or prediction is kept, and no cache grows with the number of image sizes."""
    held = memory[run]
    assert len(held) == length
    grown = held[-1] - held[length // 10]
    tenths = [round(x / MIB) for x in held[::length // 10]]
    assert grown < BOUND, f"{run} grew by {grown / MIB:.1f} MiB, in tenths: {tenths}"


# -------------------------------------------------------------------------------- the process that is watched

def memory_held() -> int:
    """Bytes that this process holds, libraries apart. Where the system does not tell, the most so far."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024                      # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_pictures(folder: Path, count: int) -> None:
    """Pictures under `photos`, labels of three classes under `labels`: squares to panoramas of 1 : 4, lying
    and standing."""
    from helpers import photo, write_label
    (folder / "photos").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        short = random.integers(24, 41)
        height, width = random.permutation([short, int(short * random.uniform(1, 4))])
        photo(height, width, seed=number).save(folder / "photos" / f"{number:04d}.png")
        write_label(folder / "labels" / f"{number:04d}.png", random.integers(0, 3, (height, width)))


def long_runs(folder: Path) -> dict[str, list[int]]:
    """Both stages through their scripts' `main`, then all stages measured: name → bytes after every step."""
    import data
    import distill
    import evaluate
    import rectify
    from datasets import labels as ground_truth
    from harness import runs
    from helpers import SMALLEST, quick_recipes, run, write_openai_archive

    write_pictures(folder / "taught", 20)                       # ten steps an epoch, and as many times saved
    write_pictures(folder / "measured", IMAGES)
    (folder / "names.txt").write_text("cat\nsofa\nwall\n")
    write_openai_archive(folder / "tiny.pt", **SMALLEST)
    common = ["--classes", folder / "names.txt", "--clip", folder / "tiny.pt", "--out", folder / "runs"]
    memory: dict[str, list[int]] = {"rectify": [], "distill": [], "evaluate": []}
    with pytest.MonkeyPatch.context() as patch:
        quick_recipes(patch, folder)
        booked = runs.Training.done

        def done(self, **losses):
            booked(self, **losses)
            memory[self.stage].append(memory_held())

        def each(images, **_):                                      # in the place of evaluate's progress bar
            for image in images:
                yield image
                memory["evaluate"].append(memory_held())

        patch.setattr(runs.Training, "done", done)
        patch.setattr(evaluate, "tqdm", each)
        for script in (rectify, distill):
            run(script, "--data", folder / "taught" / "photos", *common, "--epochs", STEPS // 10)
        # Measured on another folder, which `open_setup` would refuse: the run is not of its images.
        flags = ["--data", folder / "taught" / "photos", *common, "--device", "cpu"]
        setup = data.open_setup(evaluate.flags().parse_args([str(flag) for flag in flags]))
        setup = replace(setup, data=str(folder / "measured" / "photos"))
        labels = ground_truth.true_label_files(setup.data, setup.root, setup.split,
                                               list(setup.evaluation_images),
                                               str(folder / "measured" / "labels"))
        found = evaluate.predictors(setup, rectify.query_of(setup), list(evaluate.STAGES))
        evaluate.measure(setup, found, labels)
    return memory


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "memory.json").write_text(json.dumps(long_runs(target)))
