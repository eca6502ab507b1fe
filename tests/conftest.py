"""What all tests share: the project's folder on the path, the mark `slow`, two threads, no network."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes more than a few seconds; leave out with -m "not slow"')


@pytest.fixture(autouse=True)
def quiet_bars(monkeypatch):
    """Progress bars would fill the logs of continuous integration."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
