"""Training of a point as a process: its command line, its share of the machine, and its outcome."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kd_core.errors import escape_unprintable
from kd_core.files import open_no_follow
from kd_core.training.run_folder import RunFolder
from launchers.sweeps import die_with_parent
from launchers.sweeps.sweep_folder import FAILED, FINISHED, STOPPED, SweepFolder

# Seconds in which a point that is asked to stop ends its step and saves. torchrun waits 30 seconds for its ranks. From
# torch 2.12 on it waits as long as TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
SAVING = 100


@dataclass(frozen=True)
class Slot:
    """A share of this machine: GPUs as CUDA_VISIBLE_DEVICES names them, and CPU cores."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


def slots(jobs: int, nproc: int, gpus: Sequence[str], cores: Sequence[int]) -> list[Slot]:
    """Divides the machine into `jobs` shares for points of `nproc` ranks.

    Shares have GPUs or cores in common where there are too few.
    """

    def share(devices: Sequence[str] | Sequence[int], count: int, job: int) -> tuple[str | int, ...]:
        # Job j takes devices j·count to (j + 1)·count − 1, modulo their number, each once.
        return tuple(dict.fromkeys(devices[(job * count + i) % len(devices)] for i in range(count))) if devices else ()

    per_job = max(1, len(cores) // jobs)
    return [
        Slot(tuple(map(str, share(gpus, nproc, job))), tuple(map(int, share(cores, per_job, job))))
        for job in range(jobs)
    ]


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [name.strip() for name in names.split(",") if name.strip()] if torch.cuda.is_available() else []
    return [str(i) for i in range(torch.cuda.device_count())]


def training_command(folder: SweepFolder, point_id: str, launcher: Sequence[str] = ()) -> list[str]:
    """Returns the command that trains a point.

    `launcher` holds torchrun's options. If it is empty, the point trains without torchrun.
    """
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    run: RunFolder = folder.run_folder(point_id)
    flags = [f"--config=config_file:{folder.config(point_id)}", f"--run_dir={run.path}"]
    return [sys.executable, *torchrun, "-m", "launchers.train", *flags]


def standalone_options(nproc: int) -> list[str]:
    """Returns torchrun's options for `nproc` ranks on this machine."""
    return ["--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []


def _ended_by_signal(code: int) -> bool:
    return code < 0 or code > 128


def _is_interrupted(code: int, log: str) -> bool:
    """Checks whether a training was ended by a signal, or ended itself to be resumed.

    torchrun exits with 1 in both cases, and its log names the cause.
    """
    # torchrun's summary gives the exit code of the rank that failed first.
    rank = re.search(r"Root Cause.*?exitcode *: (-?\d+)", log, flags=re.DOTALL)
    by_torchrun = "SignalException: " in log or (rank is not None and _ended_by_signal(int(rank[1])))
    return code == 0 or _ended_by_signal(code) or by_torchrun


def _last_line(log: str) -> str:
    """Returns the last error or stop message of a log, or otherwise its last line that is no progress bar."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and "%|" not in line]
    messages = [line for line in lines if ": error: " in line or line.startswith("stopped after step ")]
    return escape_unprintable((messages or lines or [""])[-1])


def outcome(folder: SweepFolder, point_id: str, code: int, since: int) -> tuple[str, str]:
    """Returns how a start ended (finished, stopped or failed), and the last line of its log.

    `since` is the size of the log in bytes when the start began. Exit code 0 does not mean finished: a training that is
    asked to stop saves, and exits with 0.
    """
    log = folder.log_since(point_id, since)
    state = FINISHED if folder.run_folder(point_id).is_finished else STOPPED if _is_interrupted(code, log) else FAILED
    return state, _last_line(log)


def start(command: Sequence[str], folder: SweepFolder, point_id: str, slot: Slot) -> subprocess.Popen[bytes]:
    """Starts a command in its own session, so that Ctrl-C reaches only this process. It ends when this process does."""
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING), **os.environ}
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    prefix = [sys.executable, "-I", die_with_parent.__file__, str(os.getpid()), ",".join(map(str, slot.cores))]
    folder.log(point_id).parent.mkdir(parents=True, exist_ok=True)
    with open(folder.log(point_id), "ab", opener=open_no_follow) as log:
        return subprocess.Popen(
            [*prefix, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
