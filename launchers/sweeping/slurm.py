"""Points under Slurm, through submitit: one job array, one job a point, which resumes when it is put back.

Before a job's time ends or its place is taken, Slurm sends SIGUSR2; submitit then calls `PointJob.checkpoint`, which
asks the training to save and end, and puts the job back into the queue. A job that is killed without a warning is
put back by Slurm itself (`--requeue`). Either way the same line trains on from the newest checkpoint.
"""

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError
from launchers.sweeping import child
from launchers.sweeping.child import SAVING, Slot
from launchers.sweeping.folder import FINISHED, RUNNING, STOPPED, SUBMITTED, Status, SweepFolder
from launchers.sweeping.points import Point

WARNING = 120  # seconds between Slurm's warning and its kill, more than the training takes to save
# How often a job may use up its time: each time it got further, so this only ends what does not.
MOST_TIMEOUTS = 100
FIRST_PORT, PORTS = 29_500, 1_000
PAUSE = 0.2


@dataclass(frozen=True)
class Request:
    """What a job asks for; `more` are options of sbatch by name."""

    partition: str | None
    minutes: int
    nodes: int
    gpus_per_node: int
    cpus_per_task: int | None
    at_once: int
    more: Mapping[str, str]


@dataclass
class PointJob:
    """A point's training inside of a job; submitit keeps it as a file and calls it on every node."""

    folder: SweepFolder
    point_id: str
    nproc: int
    keep_checkpoints: bool
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> str:
        """Train to the end, or from where an earlier start came to.

        Raises:
            RuntimeError: the training failed, so that Slurm counts the job as failed.
        """
        from submitit import JobEnvironment

        here = JobEnvironment()
        known = self.folder.status(self.point_id)
        if known.state == FINISHED:
            return FINISHED
        status, speaks = Status(RUNNING, known.starts + 1, job=here.job_id), here.global_rank == 0
        if speaks:
            self.folder.set_status(self.point_id, status)
        line = child.training_line(self.folder, self.point_id, launcher(here.hostnames, self.nproc, here.job_id))
        since = self.folder.log_size(self.point_id)
        self.process = child.start(line, self.folder, self.point_id, Slot())
        while (code := self.process.poll()) is None:
            time.sleep(PAUSE)
        state, words = child.outcome(self.folder, self.point_id, code, since)
        if speaks:
            self.folder.set_status(self.point_id, replace(status, state=state, exit_code=code, last_line=words))
            if state == FINISHED and not self.keep_checkpoints:
                self.folder.drop_checkpoints([self.point_id])
            if state != FINISHED:
                raise RuntimeError(f"point {self.point_id} {state} (exit code {code}): {words}")
        return state

    def checkpoint(self) -> Any:
        """Called by submitit in a signal's handler: end the training well, and run the same again.

        The process is watched without `Popen.wait`, whose lock the interrupted code may hold.
        """
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            os.kill(self.process.pid, signal.SIGTERM)
            options, deadline = os.WEXITED | os.WNOHANG | os.WNOWAIT, time.monotonic() + SAVING
            while os.waitid(os.P_PID, self.process.pid, options) is None:
                if time.monotonic() > deadline:
                    os.killpg(self.process.pid, signal.SIGKILL)
                time.sleep(PAUSE)
        self.folder.set_status(self.point_id, replace(self.folder.status(self.point_id), state=SUBMITTED))
        return DelayedSubmission(replace(self))


def launcher(hosts: Sequence[str], nproc: int, job: str) -> list[str]:
    """torchrun's options for `nproc` ranks on each of the hosts; they meet at the first one."""
    if len(hosts) == 1:
        return child.on_this_machine(nproc)
    port = FIRST_PORT + int("".join(filter(str.isdigit, job)) or "0") % PORTS
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", f"{hosts[0]}:{port}"]
    return ["--nnodes", str(len(hosts)), "--nproc-per-node", str(nproc), *meeting]


def in_queue(job: str) -> bool:
    """Whether Slurm still has the job, waiting or running; a job that it does not know has ended.

    Raises:
        UsageError: Slurm does not answer.
    """
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UsageError(
            f"job {job} may run: no squeue on the PATH to ask. Start it where Slurm takes jobs; or, where the job has "
            "surely ended, delete the sweep's status/ folder, which forgets failures and jobs alone."
        ) from None
    if found.returncode != 0 and "invalid job id" not in found.stderr.lower():
        raise UsageError(f"job {job} may run: squeue failed ({found.stderr.strip()}). Run the same line again later.")
    return found.returncode == 0 and bool(found.stdout.strip())


def queued(folder: SweepFolder, points: Sequence[Point]) -> list[str]:
    """Of the points that are not finished, those whose job Slurm still has; errors as for `in_queue`.

    One that has stopped may have been put back by Slurm.
    """
    known = {point.id: folder.status(point.id) for point in points}
    states = (RUNNING, SUBMITTED, STOPPED)
    return [key for key, each in known.items() if each.state in states and each.job and in_queue(each.job)]


def _jobs_folder(folder: SweepFolder) -> Path:
    """Make a folder for the jobs of one submission: submitit keeps them there as pickles, and nodes unpickle them.

    It is new, has a name that nobody foresees, and only this user gets in, so no pickle of anybody else is met there.
    Results, which are pickles too, are never read: how a point stands is read from its run folder.

    Raises:
        UsageError: the sweep's folder is somebody else's, who could put another folder in its place.
    """
    sweep = folder.path.resolve()
    root = sweep / "slurm"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (sweep, root, *sweep.parents):
        facts, is_own = path.lstat(), path in (sweep, root)
        others_write = facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(facts.st_mode) or (is_own and facts.st_uid != os.getuid()) or others_write:
            raise UsageError(
                f"{path}: belongs to user {facts.st_uid} with mode {stat.filemode(facts.st_mode)}; jobs are unpickled "
                "from it on the nodes, so wanted a folder that is yours and that others cannot write. Name another "
                "--out."
            )
    root.chmod(0o700)
    sweep.chmod(stat.S_IMODE(sweep.stat().st_mode) & ~stat.S_IWGRP)  # a group could put another slurm/ in its place
    return Path(tempfile.mkdtemp(prefix="jobs_", dir=root))


def _executor(folder: SweepFolder, name: str, request: Request) -> Any:
    try:
        import submitit
    except ImportError:
        raise UsageError(
            "--backend=slurm: submitit is not installed. Install the extra `slurm`: pip install 'kd-workspace[slurm]'."
        ) from None
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UsageError("--backend=slurm: no sbatch and srun on the PATH. Start it where Slurm takes jobs.")
    executor = submitit.AutoExecutor(_jobs_folder(folder), cluster="slurm", slurm_max_num_timeout=MOST_TIMEOUTS)
    wanted = {
        "name": name,
        "timeout_min": request.minutes,
        "nodes": request.nodes,
        "tasks_per_node": 1,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task,
        "slurm_partition": request.partition,
        "slurm_signal_delay_s": WARNING,
        "slurm_array_parallelism": request.at_once,
        "slurm_additional_parameters": {"requeue": True, **request.more},
    }
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return executor


def submit(
    folder: SweepFolder, points: Sequence[Point], name: str, request: Request, nproc: int, *, keep_checkpoints: bool
) -> list[str]:
    """One array with a job for each point; returns their numbers.

    Raises:
        UsageError: without submitit or Slurm, or where Slurm refuses.
    """
    executor = _executor(folder, name, request)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    at = SweepFolder(folder.path.resolve())
    try:
        with executor.batch():
            jobs = [executor.submit(PointJob(at, point.id, nproc, keep_checkpoints)) for point in points]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(f"--backend=slurm: sbatch refused: {error}") from None
    for point, job in zip(points, jobs, strict=True):
        known = folder.status(point.id)
        if known.job != job.job_id:  # else it has begun at once, and says itself how it stands
            folder.set_status(point.id, replace(known, state=SUBMITTED, job=job.job_id))
    return [str(job.job_id) for job in jobs]
