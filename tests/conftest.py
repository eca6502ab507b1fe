"""What all tests share: the project's folder on the path, the mark `slow`, no progress bars."""

import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"            # read when tqdm is imported: bars would fill the logs of the tests

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes more than a few seconds; leave out with -m "not slow"')
