"""Queries of Slurm's commands: the states of jobs, and how many jobs an array may have."""

import logging
import re
import subprocess
from collections.abc import Iterable, Sequence

from experiments.config.sweep_points import Point
from kd_core.errors import UsageError
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder

MOST_IN_ARRAY = 1001  # Slurm's own default of MaxArraySize
log = logging.getLogger("kd")


def job_states(jobs: Iterable[str]) -> dict[str, str]:
    """Returns the states of those jobs that Slurm still has, with one query. A job that it does not list has ended.

    The reason of a waiting job follows its state: `PENDING (Resources)`.

    Raises:
        UsageError: Slurm does not answer.
    """
    jobs = set(jobs)
    arrays = sorted({job.partition("_")[0] for job in jobs})
    if not arrays:
        return {}
    command = ["squeue", "--noheader", "--array", "--format", "%i %T (%r)", "--jobs", ",".join(arrays)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(
            f"jobs {', '.join(arrays)} may run: no squeue on the PATH to ask. Start it where Slurm takes jobs; or, "
            "where they have surely ended, delete the sweep's status/ folder, which forgets failures and jobs alone."
        ) from None
    if answer.returncode != 0 and "invalid job id" not in answer.stderr.lower():
        raise UsageError(
            f"jobs {', '.join(arrays)} may run: squeue failed ({answer.stderr.strip()}). Run the same line again later."
        )
    lines = dict(re.findall(r"^(\d+(?:_\d+)?) (\w+.*?)(?: \(None\))?$", answer.stdout, flags=re.MULTILINE))
    if answer.stdout.strip() and not lines:
        log.warning("squeue answered %r: all of its jobs count as waiting or running", answer.stdout.strip()[:100])
        return dict.fromkeys(jobs, "UNKNOWN")
    return {job: lines[job] for job in jobs & lines.keys()}


def states_by_point(folder: SweepFolder, points: Sequence[Point]) -> dict[str, str]:
    """Returns, by point, the states of the jobs of unfinished points that Slurm still has.

    The job of a stopped or failed point may have been requeued.

    Raises:
        UsageError: as in `job_states`.
    """
    statuses = {point.id: folder.status(point.id) for point in points}
    jobs = {key: status.job for key, status in statuses.items() if status.state != FINISHED and status.job}
    states = job_states(jobs.values())
    return {key: states[job] for key, job in jobs.items() if job in states}


def is_running(job: str) -> bool:
    """Returns False for a job that Slurm has ended or is about to end.

    Raises:
        UsageError: as in `job_states`.
    """
    return job_states([job]).get(job, "").startswith("RUNNING")


def requeue(job: str) -> None:
    """Requeues a running job: Slurm ends it, and starts it again later."""
    subprocess.run(["scontrol", "requeue", job], check=True)


def most_in_array() -> int:
    """Returns the number of jobs that the cluster accepts in one array."""
    try:
        config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        config = ""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, flags=re.MULTILINE)
    return max(1, int(match[1])) if match else MOST_IN_ARRAY
