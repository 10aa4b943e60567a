"""Queries of Slurm's commands: the jobs of the cluster, and how many it takes in an array."""

import logging
import re
import subprocess
from collections.abc import Iterable, Sequence

from kd_core.errors import UsageError
from launchers.sweeps.sweep_folder import FINISHED, SweepFolder
from experiments.config.sweep_points import Point

MOST_IN_ARRAY = 1001  # Slurm's own default of MaxArraySize
log = logging.getLogger("kd")


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Returns the states of those jobs that Slurm still has, asked once. A job that it does not know has ended.

    Of a job that waits, the reason stands behind the state: `PENDING (Resources)`.

    Raises:
        UsageError: Slurm does not answer.
    """
    jobs = set(jobs)
    arrays = sorted({job.partition("_")[0] for job in jobs})
    if not arrays:
        return {}
    command = ["squeue", "--noheader", "--array", "--format", "%i %T (%r)", "--jobs", ",".join(arrays)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(
            f"jobs {', '.join(arrays)} may run: no squeue on the PATH to ask. Start it where Slurm takes jobs; or, "
            "where they have surely ended, delete the sweep's status/ folder, which forgets failures and jobs alone."
        ) from None
    if found.returncode != 0 and "invalid job id" not in found.stderr.lower():
        raise UsageError(
            f"jobs {', '.join(arrays)} may run: squeue failed ({found.stderr.strip()}). Run the same line again later."
        )
    lines = dict(re.findall(r"^(\d+(?:_\d+)?) (\w+.*?)(?: \(None\))?$", found.stdout, flags=re.MULTILINE))
    if found.stdout.strip() and not lines:
        log.warning("squeue answered %r: all of its jobs count as waiting or running", found.stdout.strip()[:100])
        return dict.fromkeys(jobs, "UNKNOWN")
    return {job: lines[job] for job in jobs & lines.keys()}


def of_points(folder: SweepFolder, points: Sequence[Point]) -> dict[str, str]:
    """Returns, by point, the states of the jobs of unfinished points that Slurm still has. Errors as in `states`.

    The job of a point that has stopped or failed may have been put back.
    """
    known = {point.id: folder.status(point.id) for point in points}
    jobs = {key: each.job for key, each in known.items() if each.state != FINISHED and each.job}
    there = states(jobs.values())
    return {key: there[job] for key, job in jobs.items() if job in there}


def is_running(job: str) -> bool:
    """Returns False for a job that Slurm has ended or is about to end. Errors as in `states`."""
    return states([job]).get(job, "").startswith("RUNNING")


def put_back(job: str) -> None:
    """Have Slurm end a running job and start it again later."""
    subprocess.run(["scontrol", "requeue", job], check=True)


def most_in_array() -> int:
    """Returns the number of jobs that the cluster takes in one array."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        shown = ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, flags=re.MULTILINE)
    return max(1, int(found[1])) if found else MOST_IN_ARRAY
