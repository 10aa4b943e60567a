"""A point's training as a process of its own: its command line, its share of the machine, its end."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kd_core.errors import visible
from kd_core.files import no_link
from kd_core.training.run_folder import RunFolder
from launchers.sweeps import die_with_parent
from launchers.sweeps.sweep_folder import FAILED, FINISHED, STOPPED, SweepFolder

# Seconds that a point which is told to stop has to end its step and to save. torchrun gives its ranks 30, and from
# torch 2.12 on as many as it is told.
SAVING = 100


@dataclass(frozen=True)
class Slot:
    """A share of this machine: GPUs by the names that CUDA_VISIBLE_DEVICES gives them, and CPU cores."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


def slots(jobs: int, nproc: int, gpus: Sequence[str], cores: Sequence[int]) -> list[Slot]:
    """The machine in `jobs` shares for points of `nproc` ranks; GPUs and cores are shared where there are too few."""

    def share(things: Sequence[str] | Sequence[int], each: int, job: int) -> tuple[str | int, ...]:
        return tuple(dict.fromkeys(things[(job * each + i) % len(things)] for i in range(each))) if things else ()

    per_job = max(1, len(cores) // jobs)
    return [
        Slot(tuple(map(str, share(gpus, nproc, job))), tuple(map(int, share(cores, per_job, job))))
        for job in range(jobs)
    ]


def visible_gpus() -> list[str]:
    """GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()] if torch.cuda.is_available() else []
    return [str(i) for i in range(torch.cuda.device_count())]


def training_line(folder: SweepFolder, point_id: str, launcher: Sequence[str] = ()) -> list[str]:
    """The command that trains a point; `launcher` are torchrun's options, none for a run without torchrun."""
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    run: RunFolder = folder.run_folder(point_id)
    flags = [f"--config=config_file:{folder.config(point_id)}", f"--run_dir={run.path}"]
    return [sys.executable, *torchrun, "-m", "launchers.train", *flags]


def on_this_machine(nproc: int) -> list[str]:
    """torchrun's options for `nproc` ranks here."""
    return ["--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []


def _by_signal(code: int) -> bool:
    return code < 0 or code > 128


def _interrupted(code: int, said: str) -> bool:
    """Whether it ended by a signal, or by itself to be resumed. torchrun ends with 1 for either, and says which."""
    rank = re.search(r"Root Cause.*?exitcode *: (-?\d+)", said, flags=re.DOTALL)
    of_torchrun = "SignalException: " in said or (rank is not None and _by_signal(int(rank[1])))
    return code == 0 or _by_signal(code) or of_torchrun


def _last_words(said: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "%|" not in line]  # no progress bars
    telling = [line for line in lines if ": error: " in line or line.startswith("stopped after step ")]
    return visible((telling or lines or [""])[-1])


def outcome(folder: SweepFolder, point_id: str, code: int, since: int) -> tuple[str, str]:
    """How a start ended that began when the log had `since` bytes: finished, stopped or failed; and its last words.

    Status 0 does not mean finished: a training that is told to stop saves, and ends with it.
    """
    said = folder.said(point_id, since)
    state = FINISHED if folder.run_folder(point_id).is_finished else STOPPED if _interrupted(code, said) else FAILED
    return state, _last_words(said)


def start(command: Sequence[str], folder: SweepFolder, point_id: str, slot: Slot) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that a Ctrl-C reaches us alone; the kernel ends it when we die."""
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING), **os.environ}
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    prefix = [sys.executable, "-I", die_with_parent.__file__, str(os.getpid()), ",".join(map(str, slot.cores))]
    folder.log(point_id).parent.mkdir(parents=True, exist_ok=True)
    with open(folder.log(point_id), "ab", opener=no_link) as log:
        return subprocess.Popen(
            [*prefix, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
