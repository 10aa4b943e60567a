"""Sweeps under a real Slurm of two nodes on this machine: preemption, lost nodes, time limits, limits of the cluster."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from experiments.quickstart import quickstart
from experiments.sweep import Sweep, seeds
from kd_core.errors import UsageError
from kd_core.training.metrics import read_metrics
from launchers.sweeping import slurm
from launchers.sweeping.folder import FINISHED, RUNNING, SUBMITTED, SweepFolder
from launchers.sweeping.points import Point, resolve
from launchers.sweeping.results import write_results
from tests.forks import ENVIRONMENT
from tests.launchers.sweeping.real_slurm import MISSING, Cluster, cluster, wait
from tests.tiny import Tiny

pytest.importorskip("submitit")
STEPS = 60
REQUEST = slurm.Request(None, 60, 1, 0, 2, 2, {})  # two cores: a job has a node of its own
pytestmark = pytest.mark.timeout(300)


needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} not found")


@pytest.fixture
def start_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Cluster]]:
    """Starts a cluster whose commands are on the PATH of this test."""
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> Cluster:
            made = stack.enter_context(cluster(tmp_path / "slurm", **options))
            for name, value in {**ENVIRONMENT, **made.environment}.items():
                monkeypatch.setenv(name, value)
            return made

        yield start


def _sweep(tiny: Tiny, out: Path, n: int) -> tuple[SweepFolder, list[Point]]:
    items = [*tiny.train_items(STEPS)[1:], "checkpoint.every=5", "evaluation.every=100"]
    points = resolve(Sweep(quickstart) * seeds(n), items, "study")
    folder = SweepFolder(out)
    folder.claim("study", points)
    return folder, points


def _steps(folder: SweepFolder, point: Point) -> int:
    return len(folder.metrics(point.id))


def _attempts(folder: SweepFolder, point: Point) -> list[str]:
    logs = sorted((folder.run_folder(point.id).path / "attempts").glob("*/log.txt"))
    return [log.read_text() for log in logs]


def _ended_once(folder: SweepFolder, point: Point, starts: int) -> None:
    """The point is finished, after so many starts of which the last one alone came to the end, and no step is lost."""
    assert folder.status(point.id).state == FINISHED
    assert folder.status(point.id).starts == starts
    *earlier, last = _attempts(folder, point)
    assert len(earlier) == starts - 1
    assert not any("done: " in log for log in earlier)
    assert "done: " in last
    assert starts == 1 or "resumed from" in last
    lines = read_metrics(folder.run_folder(point.id).path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(point.steps + 1))


@needs_slurm
def test_a_warned_job_and_one_of_a_lost_node_are_put_back_and_go_on(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path
) -> None:
    at = start_cluster()
    folder, points = _sweep(tiny, tmp_path / "out", 2)
    lost_without_a_word = slurm.Status(RUNNING, job="99")  # as a job that was killed and not put back leaves it
    folder.set_status(points[0].id, lost_without_a_word)
    assert slurm.queued(folder, points) == []
    jobs = slurm.submit(folder, points, "study", REQUEST, nproc=1, keep_checkpoints=False)
    assert [folder.status(point.id).job for point in points] == jobs
    assert slurm.queued(folder, points) == [point.id for point in points]
    assert set(slurm.in_queue([*jobs, "99"])) == set(jobs)
    warned, lost = points
    wait(lambda: _steps(folder, warned) > 15)
    at.call("scancel", "--signal=USR2", jobs[0])
    wait(lambda: _steps(folder, lost) > 15)
    node = at.jobs("RUNNING")[jobs[1]][2]
    at.lose_node(node)
    at.start_node(node)
    at.wait_until_idle(100)
    assert not slurm.in_queue(jobs)
    for point in points:
        _ended_once(folder, point, starts=2)
        assert not folder.run_folder(point.id).checkpoints.exists()
    assert "2 of 2 points are finished" in write_results(folder, points)
    said = "".join(path.read_text() for path in (folder.path / "slurm").glob("*/*_log.err"))
    assert "Caught signal SIGUSR2" in said


def test_the_script_asks_for_what_was_wanted(scheduler: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder, points = _sweep(tiny, tmp_path / "out", 3)
    executor = slurm._executor(
        folder, "study", slurm.Request("gpu", 240, 2, 8, 16, 2, {"account": "lab", "exclude": "n1,n2"})
    )
    executor._executor.parameters["map_count"] = len(points)
    text = executor._executor._make_submission_file_text("COMMAND", "uid")
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    (logs,) = (folder.path / "slurm").iterdir()
    assert options == {
        "job-name": "study",
        "array": "0-2%2",
        "partition": "gpu",
        "time": "240",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "16",
        "signal": f"USR2@{slurm.WARNING}",
        "requeue": "",
        "open-mode": "append",
        "account": "lab",
        "exclude": "n1,n2",
        "wckey": "submitit",
        "output": str(logs / "%A_%a_0_log.out"),
        "error": str(logs / "%A_%a_0_log.err"),
    }
    assert (
        text.splitlines()[-1]
        == f"srun --unbuffered --output {logs}/%A_%a_%t_log.out --error {logs}/%A_%a_%t_log.err COMMAND"
    )
    assert executor._executor._submitit_command_str == f"{sys.executable} -u -m submitit.core._submit {logs}"
    assert not list(scheduler.iterdir())


@pytest.mark.usefixtures("scheduler")
def test_what_is_in_the_queue_is_not_submitted_again(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(
        "from experiments.quickstart import quickstart\nfrom experiments.sweep import Sweep, seeds\n\n"
        "def study():\n    return Sweep(quickstart) * seeds(1)\n"
    )
    items = [f"--config={item}" for item in [*tiny.train_items(STEPS)[1:], "shards.top_k=3"]]
    out = tmp_path / "out"
    flags = [f"--sweep={tmp_path / 'study.py'}:study", f"--out={out}", "--backend=slurm", *items]
    (point,) = resolve(Sweep(quickstart) * seeds(1), [*tiny.train_items(STEPS)[1:], "shards.top_k=3"], "study")
    (fake_slurm.STATE / "77.state").write_text("PENDING")
    SweepFolder(out).claim("study", [point])
    SweepFolder(out).set_status(point.id, slurm.Status(SUBMITTED, job="77"))
    done = subprocess.run(
        [sys.executable, "-m", "launchers.sweep", *flags],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 are in Slurm's queue" in done.stderr
    assert "submitted" not in done.stderr
    flags[2] = "--backend=local"
    command = [sys.executable, "-m", "launchers.sweep", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1
    assert f"1 points are in Slurm's queue ({point.id}). Wait for them, or scancel their jobs." in done.stderr


def test_a_scheduler_that_does_not_answer_is_no_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match=r"job 7 may run: squeue failed .*Unable to contact slurm controller"):
        slurm.in_queue("7")
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    assert not slurm.in_queue("7")


def test_without_submitit_or_slurm_the_error_says_what_to_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, points = _sweep(tiny, tmp_path / "out", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch and srun on the PATH"):
        slurm.submit(folder, points, "study", REQUEST, 1, keep_checkpoints=True)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'kd-workspace\[slurm\]'"):
        slurm.submit(folder, points, "study", REQUEST, 1, keep_checkpoints=True)
