"""Points under Slurm, through submitit: job arrays, one job a point, which resumes when it is put back.

time limit   Slurm sends SIGUSR2, and submitit calls `PointJob.checkpoint`: the training saves, the job is put back
preemption   Slurm sends SIGTERM to all processes: the training saves, and Slurm puts the job back. Where it leaves a
             job time to end (GraceTime), it takes that end for a failure, so the job puts itself back.
lost node    Slurm puts the job back (`--requeue`), which waits for a training that is still at work elsewhere
all else     the point has stopped or failed, and the same line submits again what has stopped

A job that is put back starts some two minutes later, and trains on from the newest checkpoint.
"""

import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd_core.errors import UsageError
from kd_core.files import is_owned
from launchers.sweeps import point_process, slurm_commands
from launchers.sweeps.point_process import SAVING, Slot
from launchers.sweeps.sweep_folder import FINISHED, RUNNING, STOPPED, SUBMITTED, Status, SweepFolder
from experiments.config.sweep_points import Point

WARNING = 120  # seconds between Slurm's warning and its kill, more than the training takes to save
# How often a job may use up its time: each time it got further, so this only ends what does not.
MOST_TIMEOUTS = 100
FIRST_PORT, PORTS = 29_500, 1_000
PAUSE = 0.2
SAID_EVERY = 60  # seconds
log = logging.getLogger("kd")


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

    @property
    def warning(self) -> int:
        """Seconds between Slurm's warning and the end of the job's time: at most half of it."""
        return min(WARNING, 30 * self.minutes)


@dataclass
class PointJob:
    """A point's training inside of a job; submitit keeps it as a file and calls it on every node."""

    folder: SweepFolder
    point_id: str
    nproc: int
    keep_checkpoints: bool
    saving: float = SAVING
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> str:
        """Train to the end, or from where an earlier start came to.

        Raises:
            RuntimeError: the training failed, so that Slurm counts the job as failed.
        """
        from submitit import JobEnvironment

        here = JobEnvironment()
        is_first = here.global_rank == 0
        if is_first:
            self._wait_for_owner()
        known = self.folder.status(self.point_id)
        if known.state == FINISHED:
            return FINISHED
        status, begun = Status(RUNNING, known.starts + 1, job=here.job_id), self._steps_done()
        if is_first:
            self.folder.set_status(self.point_id, status)
        torchrun = launcher(here.hostnames, here.node, self.nproc, here.raw_job_id)
        line = point_process.training_line(self.folder, self.point_id, torchrun)
        since = self.folder.log_size(self.point_id)
        self.process = point_process.start(line, self.folder, self.point_id, Slot())
        while (code := self.process.poll()) is None:
            time.sleep(PAUSE)
        state, words = point_process.outcome(self.folder, self.point_id, code, since)
        if is_first:
            self._settle(replace(status, state=state, exit_code=code, last_line=words), begun)
        return state

    def _wait_for_owner(self) -> None:
        """Wait for a training of the point on a node that Slurm has lost, and say so once a minute."""
        path = self.folder.run_folder(self.point_id).path
        begun, lines = time.monotonic(), 0
        while is_owned(path):
            waited = time.monotonic() - begun
            if waited >= SAID_EVERY * lines:
                log.warning(
                    "point %s: waits, for %.0f minutes so far: another process is working in %s, such as a training on "
                    "a node that Slurm has lost. It begins once that has ended. End it where it runs, or scancel this "
                    "job.", self.point_id, waited / 60, path,
                )  # fmt: skip
                lines += 1
            time.sleep(1)

    def _settle(self, ended: Status, begun: float) -> None:
        """Note how the training ended, and put the job back where Slurm would take an interruption for a failure.

        A training that was asked to end may go on. One that was killed must have done more steps than when it began.
        """
        self.folder.set_status(self.point_id, ended)
        may_go_on = ended.exit_code in (0, -signal.SIGTERM) or self._steps_done() > begun
        if ended.state == STOPPED and may_go_on and slurm_commands.is_running(ended.job):
            self.folder.set_status(self.point_id, replace(ended, state=SUBMITTED))
            slurm_commands.put_back(ended.job)
        if ended.state != FINISHED:
            raise RuntimeError(f"point {self.point_id} {ended.state} ({ended.exit_code}): {ended.last_line}")
        if not self.keep_checkpoints:
            self.folder.drop_checkpoints([self.point_id])

    def _steps_done(self) -> float:
        lines = self.folder.metrics(self.point_id)
        return lines[-1]["step"] if lines else 0

    def checkpoint(self) -> Any:
        """Called by submitit in a signal's handler: end the training well, and run the same again.

        The process is watched without `Popen.wait`, whose lock the interrupted code may hold.
        """
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            options, deadline = os.WEXITED | os.WNOHANG | os.WNOWAIT, time.monotonic() + self.saving
            while os.waitid(os.P_PID, self.process.pid, options) is None:
                if time.monotonic() > deadline:
                    os.killpg(self.process.pid, signal.SIGKILL)
                time.sleep(PAUSE)
        self.folder.set_status(self.point_id, replace(self.folder.status(self.point_id), state=SUBMITTED))
        return DelayedSubmission(replace(self))


def launcher(hosts: Sequence[str], node: int, nproc: int, job: str) -> list[str]:
    """Returns torchrun's options for `nproc` ranks on each of the hosts. They meet at the first one.

    A node's name need not be a host's. The address of the first node is then the one from which srun began the tasks.
    """
    if len(hosts) == 1:
        return point_process.on_this_machine(nproc)
    first = hosts[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", first)
    port = FIRST_PORT + int(job) % PORTS
    meeting = ["--node-rank", str(node), "--rdzv-id", job, "--master-addr", first, "--master-port", str(port)]
    return ["--nnodes", str(len(hosts)), "--nproc-per-node", str(nproc), *meeting]


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
        "slurm_signal_delay_s": request.warning,
        "slurm_additional_parameters": {"requeue": True, **request.more},
    }
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return executor


def submit(
    folder: SweepFolder, points: Sequence[Point], name: str, request: Request, nproc: int, *, keep_checkpoints: bool
) -> list[str]:
    """Submit a job for each point, in as few arrays as the cluster allows; returns their numbers.

    Where a limit on a user's jobs is met, the number returned is less than that of the points.

    Raises:
        UsageError: without submitit or Slurm, or where Slurm refuses.
    """
    executor = _executor(folder, name, request)
    saving = SAVING * request.warning / WARNING
    at = SweepFolder(folder.path.resolve())
    arrays = -(-len(points) // slurm_commands.most_in_array())
    size = -(-len(points) // arrays)
    left, numbers = deque(points[i : i + size] for i in range(0, len(points), size)), list[str]()
    while left:
        array = left.popleft()
        # Arrays run beside each other, each with its share of the jobs that may run at once.
        executor.update_parameters(slurm_array_parallelism=max(1, request.at_once * len(array) // len(points)))
        try:
            jobs = _submit_array(executor, [PointJob(at, each.id, nproc, keep_checkpoints, saving) for each in array])
        except UsageError as refused:
            if len(array) > 1 and "limit" in str(refused).lower():  # of jobs that a user may have
                left.extendleft((array[len(array) // 2 :], array[: len(array) // 2]))
                continue
            if numbers:
                log.warning("%s", refused)
                break
            raise
        for point, job in zip(array, jobs, strict=True):
            known = folder.status(point.id)
            if known.job != job:  # else it has begun at once, and its status is newer
                folder.set_status(point.id, replace(known, state=SUBMITTED, job=job))
        numbers += jobs
    return numbers


def _submit_array(executor: Any, jobs: Sequence[PointJob]) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(
            f"--backend=slurm: sbatch refused {len(jobs)} jobs: {error}. Where you have as many jobs as you may, run "
            "the same line again once some have ended."
        ) from None
    return [str(job.job_id) for job in submitted]
