"""What a user can mend is told in one paragraph. Our own mistakes, and yours in code of your own, keep their
traceback."""

from __future__ import annotations

import contextlib
import dis
import os
import sys
import traceback
from pathlib import Path

from harness.machine import COUNT, RANK

PROJECT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def one_paragraph(debug: bool = False):
    """Around a script's `main`: exit code 2 with a paragraph, 130 for Ctrl-C, 141 when nobody reads the
    output.

    debug: the traceback is shown before the paragraph.
    """
    try:
        yield
    except BrokenPipeError:         # `| head` has read enough: no error, and nothing to say at the last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {stop or 'What was saved before is untouched.'}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if (text := paragraph(error)) is None:
            raise
        if debug:
            traceback.print_exc()
        which = f" in process {RANK} of {COUNT}" if COUNT > 1 else ""
        print(f"\nerror{which}: {text}", file=sys.stderr)
        raise SystemExit(2) from None


def paragraph(error: Exception) -> str | None:
    """What to tell of an error that a user can mend; None for any other."""
    text = str(error) or type(error).__name__
    if isinstance(error,
                  MemoryError) or isinstance(error, RuntimeError) and "allocate" in text and "memory" in text:
        return (f"expected enough memory, found too little ({' '.join(text.split())[:200]}). Use a smaller "
                "image, a smaller --batch-size, fewer classes, or another --device; close what else uses "
                "the memory.")
    if "Original Traceback" in text:      # from a worker process: torch puts the traceback before the message
        return text.strip().rpartition(f"{type(error).__name__}: ")[2]
    if COUNT > 1 and isinstance(error, RuntimeError) and ("onnection" in text or "NCCL" in text):
        return ("expected all processes to go on, found that another has ended; its own message says why. "
                "The same command and --resume goes on from what was saved last.")
    if isinstance(error, OSError) and error.errno:
        file = error.filename2 or error.filename or "the run folder"
        return (f"expected to use {file}, found: {error.strerror}. Check the path, its permissions and the "
                "free space; what was saved before is untouched.")
    if isinstance(error, OSError) or isinstance(error, (ValueError, NotImplementedError)) \
            and raised_on_purpose(error):               # the second: an exercise that is not written yet
        return text
    return None


def raised_on_purpose(error: Exception) -> bool:
    """Whether a `raise` of this project made it, and not Python or a library that stumbled over our code.

    The code that runs is asked, not its file: that may have been edited since a long training began.
    """
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code, path = last.tb_frame.f_code, Path(last.tb_frame.f_code.co_filename).resolve()
    ours = path.is_relative_to(PROJECT) and "site-packages" not in path.relative_to(PROJECT).parts
    return ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
