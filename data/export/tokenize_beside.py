"""A process that tokenises the rest of a long corpus, while the teacher scores what is there.

It reads rows within bounds on its memory, which are those of a process. So it is none of the threads beside a teacher.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

from data.export.extend import load_growth
from data.export.plan import CachePlan, fill_spool
from data.export.spool.spool import END_FILE, FAILED_FILE
from data.export.teacher_export import TeacherExport
from data.worker_processes import PATIENCE, start_process
from kd_core.errors import UsageError
from kd_core.files import is_owned, own_folder, write_json

LATE = (
    "To keep what was exported, leave the file as it is and add corpus.on_bad_row=skip. A corrected file is another "
    "corpus and needs another --out."
)


@contextlib.contextmanager
def tokenize_beside(plans: list[CachePlan], out: Path | str, *, starts: bool) -> Generator[None]:
    """Lets a process fill the spool of the plans for `out` meanwhile, if this rank `starts` that of its host.

    Hosts without a common file system have a spool each, under the same name.
    """
    process: subprocess.Popen[bytes] | None = None
    spool = plans[0].windows.folder if plans else Path()
    if plans and starts and not (spool / END_FILE).exists() and not is_owned(spool):
        (spool / FAILED_FILE).unlink(missing_ok=True)  # of an earlier start
        process = start_process(__name__)
        assert process.stdin
        pickle.dump((plans[0].export, out, spool, bool(plans[0].grown_from)), process.stdin)
        process.stdin.flush()
    try:
        yield
    finally:
        if process and process.stdin:
            process.stdin.close()  # at which it ends
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """Ends this process at the end of its input, however its parent has ended."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Fills the spool of the export that the parent has sent.

    An error goes into the spool, for those who wait for its windows.
    """
    export, out, spool, grows = pickle.load(sys.stdin.buffer)  # noqa: S301 (a pipe from our own parent)
    assert isinstance(export, TeacherExport)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        with own_folder(spool):
            pass
    except UsageError:
        return  # another process of this host fills it
    try:
        growth = load_growth(out, begin=False) if grows else None
        fill_spool(export, spool, growth, export.corpus.bad_rows(), wait=True)
    except (UsageError, OSError) as error:
        write_json(spool / FAILED_FILE, {"message": f"{error} {LATE}"})
        logging.getLogger("kd").error("tokenizing ended: %s", error)


if __name__ == "__main__":
    main()
