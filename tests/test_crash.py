"""The crash test as a part of the suite: see tests/crash.py, which is the same as a command.

    python -m pytest tests/test_crash.py
"""

import json
import subprocess
import sys
import time

import pytest

from conftest import ROOT


@pytest.mark.slow
def test_every_training_that_is_killed_resumes_to_the_same_bits(tmp_path):
    """At least 50 kills at random moments over the three trainings, one before every fifth write to the run
    folder. Then there is what an unkilled run leaves, file for file: no *.part, no `unfinished`, no lock, and
    no process."""
    result = subprocess.run([sys.executable, ROOT / "tests/crash.py"], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert list(found) == ["rectify", "distill", "pretrain"]
    assert sum(counts["killed"] for counts in found.values()) >= 50
    assert all(counts["killed before a write"] >= 8 for counts in found.values())
    assert all(counts["resumed to other bits"] == 0 for counts in found.values()), result.stderr


DRAWING = """
import sys
sys.path.insert(0, {root!r})
from toyland import pretrain
print("begun", flush=True)
pretrain.pretraining_pictures(0, 20000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc which processes there are")
def test_a_pretraining_that_is_killed_while_it_draws_leaves_no_process(tmp_path):
    """Its workers hold more pictures than a pipe does, and nobody reads them any more."""
    from crash import left_running
    program = DRAWING.format(root=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "begun\n"
    deadline = time.monotonic() + 60
    while len(left_running(tmp_path, seconds=1)) < 2 and time.monotonic() < deadline:   # itself and a worker
        pass
    time.sleep(1)
    process.kill()
    process.wait()
    assert left_running(tmp_path) == []
