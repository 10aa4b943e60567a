"""The error file of a rank, from which torchrun takes what it shows in its own report."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

LATE_RANK_SECONDS = 10.0  # ranks that fail alike do so within a few seconds of each other


def report_to_torchrun(message: str) -> None:
    """Writes the message for torchrun's report, in place of a traceback, and waits for the ranks of this machine.

    torchrun stops all ranks once one has ended. Without the wait, a rank that fails a moment earlier would stop the one
    that prints. Nothing is done without torchrun.
    """
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if not path.name:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rank is about to end, with a status of its own
    # torchrun shows `message` where extraInfo has no py_callstack, and takes the earliest timestamp for the root cause.
    failure = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):  # such as a full disk, which may be what the message is about
        path.write_text(json.dumps({"message": failure}), encoding="utf-8")
    files = [folder / path.name for folder in path.parent.parent.glob("[0-9]*")]  # one folder for each local rank
    deadline = time.monotonic() + LATE_RANK_SECONDS
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)
