"""What all tests share: the project's folder on the path, the mark `slow`, one thread, no progress bars."""

import os
import sys
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"           # read when tqdm is imported: bars would fill the logs of the tests
os.environ.setdefault("OMP_NUM_THREADS", "1")       # read when torch is imported: processes share the cores

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes more than a few seconds; leave out with -m "not slow"')


def pytest_xdist_auto_num_workers(config):
    """Processes that share the whole suite. A single file is done sooner than others have started."""
    return min(4, os.cpu_count() or 1) if all(Path(arg).is_dir() for arg in config.args) else 0


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A file in OpenAI's format with a CLIP of the smallest sizes, random weights."""
    from helpers import SMALLEST, write_openai_archive
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    write_openai_archive(path, **SMALLEST)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, and recipes of a few seconds."""
    from helpers import quick_recipes
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    quick_recipes(monkeypatch, tmp_path / "weights")
    return tmp_path


@pytest.fixture
def trained_voc(place, tiny_clip):
    """VOC's tree in ./data with a rectification and its student."""
    import distill
    import rectify
    from helpers import run, write_voc_tree
    write_voc_tree(place / "data")
    run(rectify, "--data", "voc", "--clip", tiny_clip)
    run(distill)
    return place
