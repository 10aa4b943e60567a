"""Points under Slurm through submitit: job arrays with one job per point, which resumes when it is requeued.

    time limit   Slurm sends SIGUSR2, and submitit calls `PointJob.checkpoint`. The training saves, the job is requeued.
    preemption   Slurm sends SIGTERM to all processes. The training saves, and Slurm requeues the job. If Slurm gives
                 the job time to end (GraceTime), it counts that end as a failure, so the job requeues itself.
    lost node    Slurm requeues the job (`--requeue`), which waits while the training still runs on the lost node.
    all else     The point has stopped or failed. The same command submits stopped points again.

A requeued job starts about two minutes later, and resumes from the newest checkpoint.
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

from experiments.config.sweep_points import Point
from kd_core.errors import UsageError
from kd_core.files import is_owned
from launchers.sweeps import point_process, slurm_commands
from launchers.sweeps.point_process import SAVING, Slot
from launchers.sweeps.sweep_folder import FINISHED, RUNNING, STOPPED, SUBMITTED, Status, SweepFolder

WARNING = 120  # seconds between Slurm's warning and its kill, more than saving takes
# How often a job may reach its time limit. Jobs make progress each time, so this ends only those that make none.
MOST_TIMEOUTS = 100
FIRST_PORT, PORTS = 29_500, 1_000
PAUSE = 0.2
WAIT_LOG_SECONDS = 60  # seconds
log = logging.getLogger("kd")


@dataclass(frozen=True)
class Request:
    """Resources that a job requests. `more` holds further options of sbatch by name."""

    partition: str | None
    minutes: int
    nodes: int
    gpus_per_node: int
    cpus_per_task: int | None
    at_once: int
    more: Mapping[str, str]

    @property
    def warning(self) -> int:
        """Returns the seconds between Slurm's warning and the end of the job's time, at most half of that time."""
        return min(WARNING, 30 * self.minutes)


@dataclass
class PointJob:
    """Training of a point inside a job. submitit pickles it, and calls it on every node."""

    folder: SweepFolder
    point_id: str
    nproc: int
    keep_checkpoints: bool
    saving: float = SAVING
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> str:
        """Trains to the end, from the newest checkpoint if there is one, and returns the point's state.

        Raises:
            RuntimeError: the training failed, so that Slurm counts the job as failed.
        """
        from submitit import JobEnvironment

        environment = JobEnvironment()
        is_first = environment.global_rank == 0
        if is_first:
            self._wait_for_owner()
        earlier = self.folder.status(self.point_id)
        if earlier.state == FINISHED:
            return FINISHED
        # Every node trains its ranks, and the first one keeps the point's status.
        status, steps_before = Status(RUNNING, earlier.starts + 1, job=environment.job_id), self._steps_done()
        if is_first:
            self.folder.set_status(self.point_id, status)
        torchrun = launcher(environment.hostnames, environment.node, self.nproc, environment.raw_job_id)
        command = point_process.training_command(self.folder, self.point_id, torchrun)
        since = self.folder.log_size(self.point_id)
        self.process = point_process.start(command, self.folder, self.point_id, Slot())
        while (code := self.process.poll()) is None:
            time.sleep(PAUSE)
        state, last_line = point_process.outcome(self.folder, self.point_id, code, since)
        if is_first:
            self._settle(replace(status, state=state, exit_code=code, last_line=last_line), steps_before)
        return state

    def _wait_for_owner(self) -> None:
        """Waits for a training of the point on a node that Slurm has lost. Logs it once a minute."""
        path = self.folder.run_folder(self.point_id).path
        started, lines = time.monotonic(), 0
        while is_owned(path):
            seconds = time.monotonic() - started
            if seconds >= WAIT_LOG_SECONDS * lines:
                log.warning(
                    "point %s: waits, for %.0f minutes so far: another process is working in %s, such as a training "
                    "on a node that Slurm has lost. This job begins once that one has ended. Stop it where it runs, "
                    "or cancel this job with scancel.", self.point_id, seconds / 60, path,
                )  # fmt: skip
                lines += 1
            time.sleep(1)

    def _settle(self, ended: Status, steps_before: float) -> None:
        """Records how the training ended, and requeues the job where Slurm would count an interruption as a failure.

        A training that was asked to end may resume. One that was killed may resume only if it has done further steps.

        Raises:
            RuntimeError: the training is not finished.
        """
        self.folder.set_status(self.point_id, ended)
        may_resume = ended.exit_code in (0, -signal.SIGTERM) or self._steps_done() > steps_before
        if ended.state == STOPPED and may_resume and slurm_commands.is_running(ended.job):
            self.folder.set_status(self.point_id, replace(ended, state=SUBMITTED))
            slurm_commands.requeue(ended.job)
        if ended.state != FINISHED:
            raise RuntimeError(f"point {self.point_id} {ended.state} ({ended.exit_code}): {ended.last_line}")
        if not self.keep_checkpoints:
            self.folder.drop_checkpoints([self.point_id])

    def _steps_done(self) -> float:
        lines = self.folder.metrics(self.point_id)
        return lines[-1]["step"] if lines else 0

    def checkpoint(self) -> Any:
        """Ends the training cleanly and returns the same job to submit again. submitit calls it in a signal handler.

        The process is polled without `Popen.wait`, whose lock the interrupted code may hold.
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

    A node's name may not resolve as a host name. The first node is then reached by the address from which srun started
    the tasks.
    """
    if len(hosts) == 1:
        return point_process.standalone_options(nproc)
    first = hosts[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", first)
    port = FIRST_PORT + int(job) % PORTS
    rendezvous = ["--node-rank", str(node), "--rdzv-id", job, "--master-addr", first, "--master-port", str(port)]
    return ["--nnodes", str(len(hosts)), "--nproc-per-node", str(nproc), *rendezvous]


def _jobs_folder(folder: SweepFolder) -> Path:
    """Creates a folder for the jobs of one submission. submitit pickles them there, and nodes unpickle them.

    The folder is new, has an unpredictable name and admits only this user, so it holds nobody else's pickles. Results,
    which are pickles too, are never read. The state of a point is read from its run folder instead.

    Raises:
        UsageError: the sweep's folder belongs to another user, or others could put another folder in its place.
    """
    sweep = folder.path.resolve()
    root = sweep / "slurm"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (sweep, root, *sweep.parents):
        info, is_own = path.lstat(), path in (sweep, root)
        others_write = info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(info.st_mode) or (is_own and info.st_uid != os.getuid()) or others_write:
            raise UsageError(
                f"{path}: belongs to user {info.st_uid} with mode {stat.filemode(info.st_mode)}; jobs are unpickled "
                "from it on the nodes, so wanted a folder that is yours and that others cannot write. Choose another "
                "--out."
            )
    root.chmod(0o700)
    # Its group could otherwise put another slurm/ in its place.
    sweep.chmod(stat.S_IMODE(sweep.stat().st_mode) & ~stat.S_IWGRP)
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
    parameters = {
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
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def submit(
    folder: SweepFolder, points: Sequence[Point], name: str, request: Request, nproc: int, *, keep_checkpoints: bool
) -> list[str]:
    """Submits a job for each point, in as few arrays as the cluster allows, and returns the job numbers.

    Where a limit on a user's jobs is met, fewer numbers than points are returned.

    Raises:
        UsageError: submitit or Slurm is missing, or Slurm refuses the jobs.
    """
    executor = _executor(folder, name, request)
    # A job with a short time limit is warned later, so its training has less time to save.
    saving = SAVING * request.warning / WARNING
    absolute = SweepFolder(folder.path.resolve())
    # Spread the points evenly over the fewest arrays.
    arrays = -(-len(points) // slurm_commands.most_in_array())
    size = -(-len(points) // arrays)
    left, numbers = deque(points[i : i + size] for i in range(0, len(points), size)), list[str]()
    while left:
        array = left.popleft()
        # Arrays run side by side, so each gets its share of the jobs that may run at once.
        executor.update_parameters(slurm_array_parallelism=max(1, request.at_once * len(array) // len(points)))
        try:
            jobs = _submit_array(
                executor, [PointJob(absolute, point.id, nproc, keep_checkpoints, saving) for point in array]
            )
        except UsageError as error:
            if len(array) > 1 and "limit" in str(error).lower():  # on a user's jobs: try halves
                left.extendleft((array[len(array) // 2 :], array[: len(array) // 2]))
                continue
            if numbers:
                log.warning("%s", error)
                break
            raise
        for point, job in zip(array, jobs, strict=True):
            status = folder.status(point.id)
            if status.job != job:  # otherwise it has already begun, and its status is newer
                folder.set_status(point.id, replace(status, state=SUBMITTED, job=job))
        numbers += jobs
    return numbers


def _submit_array(executor: Any, jobs: Sequence[PointJob]) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UsageError(
            f"--backend=slurm: sbatch refused {len(jobs)} jobs: {error}. If you have reached your limit of jobs, run "
            "the same line again once some have ended."
        ) from None
    return [str(job.job_id) for job in submitted]
