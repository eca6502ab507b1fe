"""What has nothing to do with the method: the command line, run folders, checkpoints, errors.

    flags.py      the flags that mean the same in every script
    machine.py    device, precision, seeds
    files.py      files that are whole or not there, and the cache
    processes.py  one training on several GPUs, as torchrun starts it
    runs.py       run folders, checkpoints, and the frame around a training loop: saving, stopping, resuming
    errors.py     what a user can mend is told in one paragraph

Read `rectify.py` first. Come here when you ask how a run resumes, or where a flag is defined.
"""
