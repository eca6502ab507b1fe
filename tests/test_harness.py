"""harness/: files that are whole or not there, errors in one paragraph, and training that can stop anywhere.

    python -m pytest tests/test_harness.py
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness import errors, files, flags, machine, runs
from conftest import ROOT


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------- files, whole or not at all

def test_file_is_written_whole_with_its_folders(tmp_path):
    """The content, readable by everyone, and no temporary file beside it."""
    path = tmp_path / "new" / "deep" / "a.bin"
    files.write_atomically(path, lambda file: file.write(b"content"))
    assert path.read_bytes() == b"content" and names_in(path.parent) == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError("half-way"), OSError(28, "No space left on device"),
                                   KeyboardInterrupt()])
def test_old_file_stays_when_writing_fails(tmp_path, error):
    """Whatever stops a write, also Ctrl-C: the old content stays, and nothing half-written is left."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"ne")
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, write)
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["a.bin"]


def test_new_file_appears_only_when_it_is_whole(tmp_path):
    """While it is being written nothing has its name."""
    path, seen = tmp_path / "a.bin", []
    files.write_atomically(path, lambda file: (file.write(b"new"), seen.append(path.exists())))
    assert seen == [False] and path.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "a.bin", lambda file: file.write(b"new"))
    tmp_path.chmod(0o700)
    assert names_in(tmp_path) == []


def test_file_in_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError):
        files.write_json(tmp_path / "runs" / "voc" / "metrics.json", {})
    assert (tmp_path / "runs").read_text() == "a file" and names_in(tmp_path) == ["runs"]


def test_checkpoint_comes_back_as_it_was_saved(tmp_path):
    """Tensors of every type, numbers and strings, through a reader that admits nothing else."""
    content = {"stage": "rectify",
               "weights": {"a": torch.randn(3), "b": torch.tensor(7), "c": torch.ones(2).half()},
               "settings": {"seed": 0, "names": ["x"], "rate": 0.1, "none": None}}
    files.save(tmp_path / "checkpoint.pt", content)
    found = runs.load(tmp_path / "checkpoint.pt", "rectify", needs={})
    assert found["settings"] == content["settings"]
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in content["weights"].items())


def test_full_disk_is_an_os_error_also_inside_torch(tmp_path, monkeypatch):
    """torch.save hides it behind a RuntimeError of its own, which would end as a traceback."""
    real = open

    class FullDisk:
        def __init__(self, *args):
            self.file, self.room = real(*args), 1000            # of every file that is opened from now on

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.room -= len(content)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    (tmp_path / "a.pt").write_bytes(b"old")
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        files.save(tmp_path / "a.pt", {"stage": "rectify", "weights": torch.zeros(10_000)})
    assert names_in(tmp_path) == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------ loading

def test_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match=r"expected a checkpoint at .*a\.pt, found none.*python rectify\.py"):
        runs.load(tmp_path / "a.pt", "rectify")


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:len(whole) // 2],
                                    lambda whole: b"text" * 99,
                                    lambda whole: whole[:200] + b"\0" * 300 + whole[500:]],
                         ids=["empty", "half", "another file", "a hole"])
def test_damaged_checkpoint_is_named(tmp_path, damage):
    files.save(tmp_path / "a.pt", {"stage": "rectify", "weights": torch.zeros(100)})
    (tmp_path / "a.pt").write_bytes(damage((tmp_path / "a.pt").read_bytes()))
    with pytest.raises(ValueError,
                       match=r"a\.pt: expected a checkpoint, found a damaged file .*python rectify\.py"):
        runs.load(tmp_path / "a.pt", "rectify")


def flipped(whole: bytes, bit: int) -> bytes:
    byte, place = divmod(bit, 8)
    return whole[:byte] + bytes([whole[byte] ^ 1 << place]) + whole[byte + 1:]


def test_single_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    """torch alone would read most of these files and give other weights. Bits that mean nothing may go
    unnoticed."""
    expected = torch.arange(500.0)
    files.save(tmp_path / "a.pt", {"stage": "rectify", "settings": {}, "weights": {"w": expected}})
    whole, noticed = (tmp_path / "a.pt").read_bytes(), 0
    bits = random.Random(0).sample(range(8 * len(whole)), 400)
    for bit in bits:
        (tmp_path / "a.pt").write_bytes(flipped(whole, bit))
        try:
            found = runs.load(tmp_path / "a.pt", "rectify", needs={})
            assert torch.equal(found["weights"]["w"], expected)
        except ValueError as error:
            assert "a.pt" in str(error)
            noticed += 1
    assert noticed > 200                        # 2,000 bytes of tensor are more than half of the file


@pytest.mark.parametrize("content, found",
                         [({"stage": "distill"}, "'distill'"), ({}, "None"), ([1], "'list'")])
def test_checkpoint_of_another_stage_is_refused(tmp_path, content, found):
    files.save(tmp_path / "a.pt", content)
    with pytest.raises(ValueError,
                       match=rf"a\.pt: expected a checkpoint of the stage 'rectify', found {found}"):
        runs.load(tmp_path / "a.pt", "rectify")


def test_checkpoint_with_a_program_in_it_is_not_run(tmp_path):
    """A pickle may call anything: the reader admits tensors, numbers and strings alone."""
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was run"), "w")

    torch.save({"stage": "rectify", "weights": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="damaged"):
        runs.load(tmp_path / "a.pt", "rectify")
    assert not (tmp_path / "was run").exists()


# ------------------------------------------------------------------------------------- newest, refusal, seeds

def write_checkpoint(path, stage, when, **content):
    settings = {name: kind() for name, kind in runs.SETTINGS.items()}
    files.save(path, {"stage": stage, "settings": settings, "weights": {}} | content)
    os.utime(path, ns=(when, when))


def test_newest_checkpoint_of_a_stage_whatever_the_dataset(tmp_path):
    """The one that was written last; other stages and unfinished runs do not count; none is None."""
    assert runs.find(tmp_path / "nowhere", None, "rectify") is None
    for when, name in enumerate(["voc/rectify/checkpoint.pt", "toyland/rectify/checkpoint.pt",
                                 "photos/rectify/unfinished/state.pt", "voc/distill/checkpoint.pt"]):
        write_checkpoint(tmp_path / name, name.split("/")[1], when)
    assert runs.find(tmp_path, None, "rectify")["path"] == tmp_path / "toyland/rectify/checkpoint.pt"
    os.utime(tmp_path / "voc/rectify/checkpoint.pt", ns=(9, 9))
    assert runs.find(tmp_path, None, "rectify")["path"] == tmp_path / "voc/rectify/checkpoint.pt"
    assert runs.find(tmp_path, None, "evaluate") is None


def test_run_that_is_meant_is_the_newest_of_all_stages_and_then_its_first(tmp_path):
    """A student was written last: its run is meant, and its teacher says what the run is of. --data has the
    last word."""
    for when, name in enumerate(["voc/rectify", "toyland/rectify", "voc/distill", "only/distill"]):
        write_checkpoint(tmp_path / name / "checkpoint.pt", name.split("/")[1], when)
    found = [runs.find(tmp_path, data, "rectify", "distill")["path"].relative_to(tmp_path).parent.as_posix()
             for data in (None, "voc", "toyland", "only")]
    assert found == ["only/distill", "voc/rectify", "toyland/rectify", "only/distill"]
    (tmp_path / "only/distill/checkpoint.pt").unlink()
    assert runs.find(tmp_path, None, "rectify", "distill")["path"] == tmp_path / "voc/rectify/checkpoint.pt"


@pytest.mark.parametrize("name", runs.SETTINGS)
@pytest.mark.parametrize("value", [None, "lacking"], ids=["of another kind", "lacking"])
def test_checkpoint_without_a_setting_is_refused_by_its_name(tmp_path, name, value):
    settings = {name: kind() for name, kind in runs.SETTINGS.items()} | {name: None}
    if value == "lacking":
        del settings[name]
    files.save(tmp_path / "a.pt", {"stage": "rectify", "settings": settings, "weights": {}})
    with pytest.raises(ValueError,
                       match=rf"a\.pt: expected a checkpoint as this version writes it, found no {name} "):
        runs.load(tmp_path / "a.pt", "rectify")


def test_weights_of_another_shape_are_the_files_fault_and_a_typo_is_not(tmp_path):
    """What a module raises by itself is no error of the checkpoint: it keeps its type and its traceback."""
    class Misspelt(torch.nn.Linear):
        def load_state_dict(self, weights):
            return super().load_state_dict(wieghts)                         # noqa: F821

    checkpoint = {"path": "a.pt", "weights": torch.nn.Linear(2, 3).state_dict()}
    runs.load_weights(torch.nn.Linear(2, 3), checkpoint)
    with pytest.raises(ValueError, match="a.pt: expected the weights of Linear .*size mismatch"):
        runs.load_weights(torch.nn.Linear(2, 4), checkpoint)
    with pytest.raises(NameError):
        runs.load_weights(Misspelt(2, 3), checkpoint)


def test_checkpoint_of_another_system_says_the_command_that_knows_it():
    checkpoint = {"path": "a.pt",
                  "settings": {"system": {"name": "other", "command": "python paper/run.py other"}}}
    runs.refuse_other_system(checkpoint, "other")
    with pytest.raises(ValueError,
                       match="expected a checkpoint of reclip.*, found one of other, .*: python paper/run.py "
                             "other"):
        runs.refuse_other_system(checkpoint, "reclip++")


def test_stage_folder_of_a_dataset_and_of_a_folder(tmp_path, monkeypatch):
    """A known name as it is; a folder by its own name, however its path is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert runs.run_folder("runs", "voc", "rectify").as_posix() == "runs/voc/rectify"
    for path in ("photos", "photos/", "./photos/../photos", str(tmp_path / "photos")):
        assert runs.run_folder("runs", path, "rectify").as_posix() == "runs/photos/rectify"
    monkeypatch.chdir(tmp_path / "photos")
    assert runs.run_folder("runs", ".", "rectify").as_posix() == "runs/photos/rectify"


def test_settings_are_compared_and_both_are_shown(tmp_path):
    runs.refuse_unless(tmp_path / "a.pt", "class list", expected=["cat"], found=["cat"])
    with pytest.raises(ValueError,
                       match=r"a\.pt was made with another class list\. Expected \['cat'\]; found \['dog'\]"):
        runs.refuse_unless(tmp_path / "a.pt", "class list", expected=["cat"], found=["dog"])
    with pytest.raises(ValueError) as error:
        runs.refuse_unless(tmp_path / "a.pt", "images", expected=list(range(10_000)), found=[])
    assert len(str(error.value)) < 1000


def test_seed_is_the_same_for_ever_and_another_for_every_purpose():
    """Values written down once: were they to change, no old run could be resumed or repeated."""
    assert machine.seed_of(0, "order", 3) == 8483304753239185838
    seeds = {machine.seed_of(*parts)
             for parts in [(0,), (1,), (0, "order", 0), (0, "order", 1), (0, "gumbel", 0), ("0",),
                                                (0, 1), ((0, 1),), (1, 0)]}
    assert len(seeds) == 9 and all(0 <= seed < 2 ** 63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


HOLDING = """import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from harness import files
with files.locked(Path({path!r})):
    print("held", flush=True)
    time.sleep({seconds})
"""


def holder(path, seconds=60):
    """Another process that holds a lock file."""
    program = HOLDING.format(root=str(ROOT), path=str(path), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    """The second is refused as long as the first lives, however that ends."""
    other = holder(tmp_path / "lock")
    with pytest.raises(ValueError, match="expected no other process that works there"):
        with files.locked(tmp_path / "lock", wait=False):
            pass
    other.kill()
    assert other.wait()
    for _ in range(2):
        with files.locked(tmp_path / "lock", wait=False):
            assert names_in(tmp_path) == ["lock"]
    assert names_in(tmp_path) == []


def test_worker_processes_do_not_keep_the_lock_of_a_killed_run(tmp_path):
    """A forked worker may outlive its run for seconds; --resume must not have to wait for it."""
    program = HOLDING.format(root=str(ROOT), path=str(tmp_path / "lock"), seconds=60).replace(
        "    print(", "    import os\n    os.fork() or time.sleep(60)\n    print(")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with files.locked(tmp_path / "lock", wait=False):
        pass
    os.killpg(process.pid, signal.SIGKILL)


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path):
    """Also when the one who had it removes the file: the lock of a removed file protects nothing."""
    other, started = holder(tmp_path / "lock", seconds=0.5), time.monotonic()
    with files.locked(tmp_path / "lock"):
        assert 0.3 < time.monotonic() - started < 20
        with pytest.raises(AssertionError):
            holder_refused(tmp_path / "lock")
    assert other.wait() == 0


def holder_refused(path):
    program = HOLDING.format(root=str(ROOT), path=str(path), seconds=0).replace(")):", "), wait=False):")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "held" in ended.stdout


def test_two_processes_that_want_the_same_cache_make_it_once(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport time, torch\nfrom pathlib import "
               "Path\nfrom harness import files\ndef make():\n    print('made'); time.sleep(0.5); return "
               f"torch.ones(2)\nfiles.cached(Path({str(tmp_path)!r}), 'x', 'key', (2,), make)")
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    assert "".join(process.communicate()[0] for process in both) == "made\n"
    assert len(names_in(tmp_path)) == 1


def test_leftover_of_a_killed_write_is_overwritten(tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"half" * 99)
    files.write_atomically(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert names_in(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"new"


# ------------------------------------------------------------------------------------------ the cache

def test_what_is_cached_is_made_once_per_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return torch.tensor([len(made)])

    for key, expected in ((("x", 1), 1), (("x", 1), 1), (("x", 2), 2), (("x", 1), 1)):
        assert files.cached(tmp_path / "cache", "query", key, (1,), make).item() == expected
    assert len(made) == 2 and len(names_in(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", [b"", b"nonsense" * 50])
def test_damaged_cache_is_made_again(tmp_path, capsys, damage):
    """It says so, and what it makes is kept."""
    files.cached(tmp_path, "query", "key", (2,), lambda: torch.ones(2))
    [path] = tmp_path.iterdir()
    path.write_bytes(damage)
    assert torch.equal(files.cached(tmp_path, "query", "key", (2,), lambda: torch.zeros(2)), torch.zeros(2))
    assert "is damaged" in capsys.readouterr().out
    assert torch.equal(files.cached(tmp_path, "query", "key", (2,), lambda: 1 / 0), torch.zeros(2))


def test_cache_with_a_flipped_bit_is_not_trusted(tmp_path, capsys):
    expected = torch.arange(500.0)
    files.cached(tmp_path, "query", "key", (500,), lambda: expected)
    [path] = tmp_path.iterdir()
    path.write_bytes(flipped(path.read_bytes(),
                             bit=8 * (path.read_bytes().index(expected.numpy().tobytes()) + 1001)))
    assert torch.equal(files.cached(tmp_path, "query", "key", (500,), lambda: expected.clone()), expected)
    assert "is damaged" in capsys.readouterr().out


def test_nothing_is_cached_when_making_it_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        files.cached(tmp_path / "cache", "query", "key", (1,), lambda: 1 / 0)
    assert names_in(tmp_path / "cache") == []


@pytest.mark.parametrize("content", [torch.ones(3), torch.full((2,), torch.nan), {"a": 1}],
                         ids=["another shape", "not finite", "no tensor"])
def test_cache_of_another_content_is_made_again(tmp_path, capsys, content):
    files.cached(tmp_path, "query", "key", (2,), lambda: torch.ones(2))
    [path] = tmp_path.iterdir()
    files.save(path, content)
    assert torch.equal(files.cached(tmp_path, "query", "key", (2,), lambda: torch.zeros(2)), torch.zeros(2))
    assert "is damaged" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("error, code, message", [
    (ValueError("a.png: expected RGB, found grey."), 2, "error: a.png: expected RGB, found grey."),
    (FileNotFoundError("expected a list, found none"), 2, "error: expected a list, found none"),
    (FileExistsError(17, "File exists", "runs/voc"), 2,
     "error: expected to use runs/voc, found: File exists."),
    (OSError(28, "No space left on device"), 2,
     "expected to use the run folder, found: No space left on device."),
    (ValueError(), 2, "error: ValueError"),
    (KeyboardInterrupt("Saved after step 3."), 130, "stopped. Saved after step 3.")])
def test_what_a_user_can_cause_ends_in_one_paragraph(capsys, error, code, message):
    """On stderr, without a traceback, with the exit code of an error (2) or of Ctrl-C (130)."""
    with pytest.raises(SystemExit) as end, errors.one_paragraph():
        raise error
    said = capsys.readouterr().err
    assert end.value.code == code and message in said and end.value.__suppress_context__
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1


def test_error_from_a_worker_process_is_said_without_its_traceback(capsys):
    """torch puts the worker's traceback into the message of the error that it raises again."""
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, _):
            raise ValueError("a.jpg: expected an image, found text.")

    with pytest.raises(SystemExit) as end, errors.one_paragraph():
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == "error: a.jpg: expected an image, found text."


def test_who_stops_reading_gets_no_complaint():
    """`| head` closes the pipe: that is no fault of the run folder."""
    program = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom harness import errors\nwith "
               "errors.one_paragraph():\n    while True: print('line', flush=True)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


@pytest.mark.parametrize("error", [AssertionError, TypeError, RuntimeError, ZeroDivisionError])
def test_our_own_mistakes_keep_their_traceback(error):
    with pytest.raises(error), errors.one_paragraph():
        raise error("ours")


# ------------------------------------------------------------------------------------------ flags

def test_numbers_that_must_be_positive():
    assert flags.whole(1)("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 1 on, found"):
            flags.whole(1)(text)


@pytest.mark.parametrize("read, good, bad", [
    (flags.real(0, 1), ["0", "1", "0.25"], ["-0.1", "1.1", "nan", "inf", "", "half"]),
    (flags.real(0, 1e3, "above 0"), ["1e-5", "1000"], ["0", "-1", "1001", "nan", ""])])
def test_real_numbers_in_their_range(read, good, bad):
    assert [read(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
            read(text)


def test_home_folder_is_meant_by_its_sign_also_behind_an_equals_sign(monkeypatch):
    """The shell leaves ~ alone in --out=~/runs, and a folder called "~" is nobody's wish."""
    monkeypatch.setenv("HOME", "/home/somebody")
    args = flags.parser("What.").parse_args(["--out=~/runs", "--data=~/photos", "--classes", "~/names.txt"])
    assert (args.out, args.data,
            args.classes) == ("/home/somebody/runs", "/home/somebody/photos", "/home/somebody/names.txt")


def test_flags_that_are_not_given_are_none():
    """So that a later stage can tell "as in the checkpoint" from a value that the user chose."""
    args = flags.parser("What.", "training", "rectify", "labels").parse_args([])
    for name in ("data", "root", "classes", "clip", "activation", "device", "epochs", "batch_size",
                 "learning_rate", "labels",
                 "vote_threshold", "window_ratio", "dense_path", "mask_scale", "loss_scale", "cache_features",
                 "cache"):
        assert getattr(args, name) is None, name
    assert (args.out, args.seed, args.precision, args.resume,
            args.download) == ("runs", 0, "fp32", False, False)
    assert (args.save_every, args.debug) == (10.0, False)
    assert not hasattr(flags.parser("What.").parse_args([]), "resume")


def test_recipe_takes_what_flags_give_and_keeps_the_rest():
    """The rate goes with the batch, unless it is given too."""
    @dataclasses.dataclass(frozen=True)
    class Recipe:
        batch_size: int = 4
        learning_rate: float = 0.1
        epochs: int = 3
        momentum: float = 0.9

    def read(*given):
        return dataclasses.astuple(flags.with_flags(Recipe(),
                                                    flags.parser("What.", "training").parse_args(given),
                                                    most=10))

    assert read() == (4, 0.1, 3, 0.9)
    assert read("--batch-size", "8", "--epochs", "5") == (8, 0.2, 5, 0.9)
    assert read("--batch-size", "8", "--learning-rate", "0.3") == (8, 0.3, 3, 0.9)
    assert read("--learning-rate", "0.3") == (4, 0.3, 3, 0.9)
    assert read("--batch-size", "40") == (40, 0.25, 3, 0.9)             # of ten images: no batch has more


def test_abbreviated_flags_are_refused(capsys):
    """--epoch must not quietly mean --epochs: a later flag could make it ambiguous."""
    with pytest.raises(SystemExit):
        flags.parser("What.", "training").parse_args(["--epoch", "3"])


@pytest.mark.parametrize("name",
                         ["nonsense", "cpu:x", "meta", "cuda:99", "hpu", "xla", "mps:7", "privateuseone"])
def test_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError,
                       match=rf"--device {name}: expected a device of this machine, found none.*cpu"):
        machine.device_of(name)
    assert machine.device_of("cpu").type == "cpu"


@pytest.mark.parametrize("said, lacks", [
    ("flags\t\t: fpu avx2 avx512f\n", True), ("flags\t\t: fpu avx512_bf16\n", False),
    ("flags\t\t: amx_bf16 amx_tile\n", False), ("Features\t: fp asimd bf16\n", False)])
def test_processor_without_bfloat16_is_known_by_its_flags(tmp_path, said, lacks):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + said)
    assert machine.lacks_bfloat16(torch.device("cpu"), str(tmp_path / "cpuinfo")) is lacks
    assert not machine.lacks_bfloat16(torch.device("cuda"), str(tmp_path / "cpuinfo"))
    assert not machine.lacks_bfloat16(torch.device("cpu"), str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------ training

STEPS, PER_EPOCH = 12, 4
SETTINGS = {"seed": 0, "recipe": {"rate": 0.1, "scale": (0.5, 2.0)}}


class Interrupted(Exception):
    pass


def toy(seed=0):
    """A model with weights and BatchNorm statistics, and an optimiser with momentum: all that has to be
    resumed."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(folder, resume=False, settings=SETTINGS, steps=STEPS, at_step=lambda step: None, seed=0,
          poison=None, save_every=10.0, look_every=1):
    """A little training as the stages do it: what is random in a step depends on the step alone."""
    model, optimizer = toy(seed)
    with runs.Training(folder, "toy", settings, {"stage": "toy", "recipe": {"rate": 0.1}}, model, optimizer,
                       steps=steps,
                       steps_per_epoch=PER_EPOCH, resume=resume, save_every=save_every) as training:
        training.look_every = look_every
        for step in range(training.first_step, steps):
            at_step(step)
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(machine.seed_of(0, step)))
            loss = model(inputs).square().mean() + model(inputs).mean()
            training.descend(loss * poison[1] if poison and step == poison[0] else loss, 0.1 / (1 + step),
                             [f"a{step}", f"b{step}"])
            training.done(loss=loss)
    return folder / "checkpoint.pt"


def weights_of(path):
    return torch.load(path, weights_only=True)["weights"]


def assert_same_weights(found, expected):
    found, expected = weights_of(found), weights_of(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def logged_steps(folder, finished=False):
    log = folder / ("unfinished" if (folder / "unfinished").exists() and not finished else "") / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raise_at(when, error):
    def at_step(step):
        if step == when:
            raise error
    return at_step


def send_sigint_at(when):
    return lambda step: os.kill(os.getpid(), signal.SIGINT) if step == when else None


def test_finished_run_leaves_checkpoint_recipe_and_log(tmp_path, capsys):
    """And no folder `unfinished`."""
    path = train(tmp_path / "run")
    assert path == tmp_path / "run" / "checkpoint.pt"
    assert names_in(tmp_path / "run") == ["checkpoint.pt", "log.jsonl", "recipe.json"]
    assert logged_steps(tmp_path / "run") == list(range(STEPS))
    assert json.loads((tmp_path / "run/recipe.json").read_text()) == {"stage": "toy", "recipe": {"rate": 0.1}}
    content = runs.load(path, "toy", needs={})
    assert content["settings"] == runs.plain(SETTINGS) and content["step"] == STEPS
    assert "optimizer" not in content
    assert "toy" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [1, PER_EPOCH, PER_EPOCH + 2, STEPS - 1])
def test_killed_run_continues_to_the_same_weights(tmp_path, stop):
    """A run that broke off in step `stop` goes on from the last whole epoch and ends bit for bit like one
    that did not."""
    expected = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", at_step=raise_at(stop, Interrupted()))
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert torch.load(tmp_path / "run/unfinished/state.pt",
                      weights_only=True)["step"] == stop // PER_EPOCH * PER_EPOCH
    assert_same_weights(train(tmp_path / "run", resume=True, seed=1), expected)
    assert logged_steps(tmp_path / "run") == list(range(STEPS))
    assert names_in(tmp_path / "run") == ["checkpoint.pt", "log.jsonl", "recipe.json"]


@pytest.mark.parametrize("stop", [0, 2, PER_EPOCH - 1, STEPS - 1])
def test_ctrl_c_finishes_the_step_saves_and_resumes_to_the_same_weights(tmp_path, stop):
    """Not a step is lost or done twice, whether the signal comes in the first step, the last or between
    epochs."""
    expected = train(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", at_step=send_sigint_at(stop))
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "run/unfinished/state.pt", weights_only=True)["step"] == stop + 1
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert logged_steps(tmp_path / "run") == list(range(stop + 1))
    done = []
    assert_same_weights(train(tmp_path / "run", resume=True, at_step=done.append, seed=1), expected)
    assert done == list(range(stop + 1, STEPS)) and logged_steps(tmp_path / "run") == list(range(STEPS))


def test_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    """The first waits for the step to end; who presses again means now. What was saved before stays."""
    def twice(step):
        if step == PER_EPOCH + 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            raise AssertionError("the second Ctrl-C was not taken")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, at_step=twice)
    assert torch.load(tmp_path / "unfinished/state.pt", weights_only=True)["step"] == PER_EPOCH


def test_finished_run_is_not_trained_again(tmp_path, capsys):
    """--resume on a finished run: its weights, not a step of training."""
    expected = weights_of(train(tmp_path))
    done = []
    found = weights_of(train(tmp_path, resume=True, at_step=done.append, seed=1))
    assert done == [] and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "finished already" in capsys.readouterr().out and logged_steps(tmp_path) == list(range(STEPS))


def test_resume_of_a_run_that_did_no_step_yet_starts_from_its_beginning(tmp_path):
    """Also where the checkpoint of an earlier run with other settings stands: it is not this run's."""
    train(tmp_path / "run")
    other = SETTINGS | {"recipe": {"rate": 0.2}}
    with pytest.raises(Interrupted):
        train(tmp_path / "run", settings=other, at_step=raise_at(1, Interrupted()))
    assert_same_weights(train(tmp_path / "run", settings=other, resume=True),
                        train(tmp_path / "whole", settings=other))
    before = contents(tmp_path / "run")
    for _ in range(2):                                        # finished now, and asked for with other numbers
        with pytest.raises(ValueError, match="another recipe"):
            train(tmp_path / "run", resume=True)
        assert contents(tmp_path / "run") == before


def test_resume_of_a_newer_run_is_not_hindered_by_an_older_one(tmp_path):
    """Seed 0 stopped in its second epoch, seed 5 was begun in its place and stopped in its first: seed 5 goes
    on."""
    other = SETTINGS | {"seed": 5}
    for settings, stop in ((SETTINGS, PER_EPOCH + 1), (other, 1)):
        with pytest.raises(Interrupted):
            train(tmp_path, settings=settings, at_step=raise_at(stop, Interrupted()))
    done = []
    train(tmp_path, settings=other, resume=True, at_step=done.append)
    assert done == list(range(STEPS)) and logged_steps(tmp_path) == list(range(STEPS))


def test_resume_of_what_is_finished_changes_no_file(tmp_path):
    """And the same run, begun again and killed, goes on to the same files."""
    train(tmp_path)
    before = contents(tmp_path)
    for name in ("metrics.json", "preview.png"):
        (tmp_path / name).write_text("results")
    with_results = contents(tmp_path)
    train(tmp_path, resume=True)
    assert contents(tmp_path) == with_results
    with pytest.raises(Interrupted):
        train(tmp_path, at_step=raise_at(1, Interrupted()))
    train(tmp_path, resume=True)
    without_time = [{name: content for name, content in found.items() if name.name != "log.jsonl"}
                    for found in (contents(tmp_path), before)]
    assert without_time[0] == without_time[1]


def test_resume_without_anything_to_resume_starts_from_the_beginning(tmp_path, capsys):
    done = []
    assert_same_weights(train(tmp_path / "a", resume=True, at_step=done.append), train(tmp_path / "b"))
    assert done == list(range(STEPS)) and "Nothing to resume" in capsys.readouterr().out


def test_resume_with_other_settings_is_refused_and_changes_nothing(tmp_path):
    """The error names the setting; the unfinished run can still be continued with its own."""
    with pytest.raises(Interrupted):
        train(tmp_path, at_step=raise_at(6, Interrupted()))
    before = contents(tmp_path)
    with pytest.raises(ValueError,
                       match=r"state\.pt was made with another recipe\. Expected .*0\.2.*; found .*0\.1"):
        train(tmp_path, resume=True, settings=SETTINGS | {"recipe": {"rate": 0.2, "scale": (0.5, 2.0)}})
    with pytest.raises(ValueError, match="another seed"):
        train(tmp_path, resume=True, settings=SETTINGS | {"seed": 1})
    assert contents(tmp_path) == before
    train(tmp_path, resume=True)


def test_without_resume_a_run_starts_anew(tmp_path):
    """An unfinished run of before is not continued by accident, and its log is not added to."""
    with pytest.raises(Interrupted):
        train(tmp_path / "run", at_step=raise_at(6, Interrupted()))
    done = []
    train(tmp_path / "run", at_step=done.append)
    assert done == list(range(STEPS)) and logged_steps(tmp_path / "run") == list(range(STEPS))
    assert not (tmp_path / "run/unfinished").exists()


def test_a_run_that_is_begun_anew_leaves_the_finished_one_alone_until_it_ends(tmp_path):
    """Another recipe, killed: checkpoint, recipe and log are still those of the run before, and so are its
    results."""
    train(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    before = contents(tmp_path)
    other = SETTINGS | {"recipe": {"rate": 0.2}}
    with pytest.raises(Interrupted):
        train(tmp_path, settings=other, at_step=raise_at(6, Interrupted()))
    assert {name: content for name, content in contents(tmp_path).items()
            if name.parts[0] != "unfinished"} == before
    train(tmp_path, settings=other, resume=True)
    assert runs.load(tmp_path / "checkpoint.pt", "toy", needs={})["settings"] == other
    assert names_in(tmp_path) == ["checkpoint.pt", "log.jsonl", "recipe.json"]   # no results of other weights


@pytest.mark.parametrize("when", ["checkpoint.pt", "recipe.json", "log.jsonl", "state.pt"])
def test_a_run_that_is_killed_while_it_ends_can_be_ended_again(tmp_path, when, monkeypatch):
    """After each of the steps of `finish`; the same weights, and nothing is left over."""
    expected = train(tmp_path / "whole")
    for owner, name in ((os, "replace"), (Path, "unlink")):
        original = getattr(owner, name)

        def die_after(*args, original=original, **kwargs):
            original(*args, **kwargs)
            last = Path(args[-1])
            if last.name == when and (last.parent == tmp_path / "run" or original is not os_replace
                                      and when == "state.pt"):
                raise Interrupted
        os_replace = os.replace if owner is os else os_replace
        monkeypatch.setattr(owner, name, die_after)
    with pytest.raises(Interrupted):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert_same_weights(train(tmp_path / "run", resume=True), expected)
    assert names_in(tmp_path / "run") == ["checkpoint.pt", "log.jsonl", "recipe.json"]
    assert logged_steps(tmp_path / "run", finished=True) == list(range(STEPS))


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for name in ("checkpoint.pt.part", "state.pt.part", "recipe.json"):
        (tmp_path / "unfinished").mkdir(exist_ok=True)
        (tmp_path / "unfinished" / name).write_text("half")
    train(tmp_path)
    assert names_in(tmp_path) == ["checkpoint.pt", "log.jsonl", "recipe.json"]


@pytest.mark.parametrize("damage", [lambda log: log.unlink(),
                                    lambda log: log.write_text(log.read_text() + '{"step": 5, "lo')],
                         ids=["lost", "last line torn"])
def test_damaged_log_does_not_hinder_a_resume(tmp_path, damage):
    """A machine that lost power tore the line that it was writing."""
    expected = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", at_step=raise_at(6, Interrupted()))
    damage(tmp_path / "run/unfinished/log.jsonl")
    assert_same_weights(train(tmp_path / "run", resume=True), expected)
    assert logged_steps(tmp_path / "run")[-8:] == list(range(PER_EPOCH, STEPS))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss_stops_the_run_and_names_the_images(tmp_path, bad):
    """Before it touches a weight. What was saved before stays: the last whole epoch."""
    with pytest.raises(ValueError,
                       match=r"loss of step 5 is (nan|-?inf), expected a finite number.*a5, b5\..*unfini"):
        train(tmp_path, poison=(5, bad))
    saved = torch.load(tmp_path / "unfinished/state.pt", weights_only=True)
    assert saved["step"] == PER_EPOCH and not (tmp_path / "checkpoint.pt").exists()
    assert all(tensor.isfinite().all() for tensor in saved["weights"].values())


@pytest.mark.parametrize("step", [0, 1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 2, STEPS - 1])
@pytest.mark.parametrize("look_every", [3, 5, 100])
def test_loss_that_is_looked_at_later_is_told_with_its_step_and_never_saved(tmp_path, step, look_every):
    """As beside a GPU: the weights are spoilt meanwhile, but no file holds them, and the run can go on."""
    with pytest.raises(ValueError, match=rf"loss of step {step} is nan.* images were a{step}, b{step}\."):
        train(tmp_path / "run", poison=(step, float("nan")), look_every=look_every)
    saved = torch.load(tmp_path / "run/unfinished/state.pt", weights_only=True)
    assert saved["step"] == step // PER_EPOCH * PER_EPOCH and not (tmp_path / "run/checkpoint.pt").exists()
    assert all(tensor.isfinite().all() for tensor in saved["weights"].values())
    assert_same_weights(train(tmp_path / "run", resume=True, seed=1), train(tmp_path / "whole"))


def test_steps_beside_a_gpu_read_no_loss(tmp_path, monkeypatch):
    """Only every third step, and before every save."""
    looks, look = [], runs.Training.look
    monkeypatch.setattr(runs.Training, "look", lambda self: looks.append(self.step) or look(self))
    train(tmp_path, look_every=3)
    assert looks == [2, 4, 6, 8, 10, 12]


def test_advice_for_a_loss_that_is_not_finite_can_be_followed(tmp_path):
    """The flag that it names exists, its value can be read, and the run that it says to keep is kept."""
    with pytest.raises(ValueError) as error:
        train(tmp_path / "run", poison=(PER_EPOCH + 1, float("nan")))
    [given] = re.findall(r"--learning-rate \S+", str(error.value))
    args = flags.parser("What.", "training").parse_args([*given.split(), "--out", "another"])
    assert args.learning_rate == pytest.approx(0.1 / (PER_EPOCH + 2) / 10, rel=0.4)
    before = contents(tmp_path / "run")
    train(tmp_path / "another")
    assert contents(tmp_path / "run") == before
    train(tmp_path / "run", resume=True)


def test_run_is_saved_by_time_too(tmp_path, monkeypatch):
    """An epoch may take days: the state is not older than `save_every` minutes, and resumes to the same
    bits."""
    expected, now = train(tmp_path / "whole"), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick(step):
        now[0] += 40.0                                          # a step takes 40 seconds
        if step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "run", at_step=tick, save_every=1.0)
    assert torch.load(tmp_path / "run/unfinished/state.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    assert_same_weights(train(tmp_path / "run", resume=True, seed=1), expected)
    assert logged_steps(tmp_path / "run") == list(range(STEPS))


def test_optimiser_is_given_the_rate_of_every_step_and_fresh_gradients(tmp_path):
    """`descend` alone: all groups get the rate, a gradient of the step before is gone, None leaves the rate
    as it is."""
    weight = torch.nn.Parameter(torch.zeros(2))
    other = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [other], "lr": 7.0}], lr=1.0)
    model = torch.nn.ParameterList([weight, other])
    seen = []
    original = optimizer.step
    optimizer.step = lambda: (seen.append(([group["lr"] for group in optimizer.param_groups],
                                           weight.grad.tolist())),
                              original())
    with runs.Training(tmp_path, "toy", {}, {}, model, optimizer, steps=3, steps_per_epoch=3,
                       resume=False) as training:
        for rate in (0.5, 0.25, None):
            training.descend((weight * torch.tensor([1.0, 2.0])).sum() + other.sum(), rate, ["a"])
            training.done(loss=torch.tensor(0.0))
    assert seen == [([0.5, 0.5], [1, 2]), ([0.25, 0.25], [1, 2]), ([0.25, 0.25], [1, 2])]
    assert weight.tolist() == [-1.0, -2.0]


def test_run_that_replaces_a_finished_one_says_so(tmp_path, capsys):
    train(tmp_path)
    assert "replace" not in capsys.readouterr().out
    train(tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path}/checkpoint.pt is of an earlier run, and is replaced when this one ends" in said


def test_long_run_is_logged_at_most_some_200_times(tmp_path):
    """And its last step always is."""
    train(tmp_path, steps=500)
    steps = logged_steps(tmp_path)
    assert 200 <= len(steps) <= 260 and steps[0] == 0 and steps[-1] == 499


def test_run_that_is_killed_hard_leaves_whole_files(tmp_path):
    """SIGKILL while it is saving all the time: every file that has a final name can be read."""
    program = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
               "import torch\n"
               "from harness import files\n"
               "from pathlib import Path\n"
               "print('go', flush=True)\n"
               f"while True: files.save(Path({str(tmp_path)!r}, 'a.pt'), {{'stage': 'toy', 'settings': {{}}, "
               f"'weights': {{'a': torch.zeros(200_000)}}}})")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not (tmp_path / "a.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
    assert runs.load(tmp_path / "a.pt", "toy", needs={})["weights"]["a"].shape == (200_000,)
