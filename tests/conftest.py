"""What all tests share: the project's folder on the path, the mark `slow`, no progress bars."""

import os
import sys
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"            # read when tqdm is imported: bars would fill the logs of the tests

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes more than a few seconds; leave out with -m "not slow"')


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A file in OpenAI's format with a CLIP of the smallest sizes, random weights."""
    from helpers import SMALLEST, write_openai_archive
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    write_openai_archive(path, **SMALLEST)
    return path
