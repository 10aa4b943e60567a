"""Sweeps under a scheduler that really runs what is submitted (`fake_slurm.py`): the script, preemption, resumption."""

import os
import subprocess
import sys
import time
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
from tests.launchers.sweeping import fake_slurm
from tests.patience import patience
from tests.tiny import Tiny

pytest.importorskip("submitit")
STEPS = 120
REQUEST = slurm.Request(None, 60, 1, 0, None, 2, {})
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Its state; its commands are on the PATH of this test."""
    environment = {**ENVIRONMENT, **fake_slurm.install(tmp_path / "slurm")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = Path(environment["FAKE_SLURM"])
    monkeypatch.setattr(fake_slurm, "STATE", state)
    yield state
    fake_slurm.end()


def _sweep(tiny: Tiny, out: Path, n: int) -> tuple[SweepFolder, list[Point]]:
    items = [*tiny.train_items(STEPS)[1:], "checkpoint.every=5", "evaluation.every=100"]
    points = resolve(Sweep(quickstart) * seeds(n), items, "study")
    folder = SweepFolder(out)
    folder.claim("study", points)
    return folder, points


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(90)
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _steps(folder: SweepFolder, point: Point) -> int:
    return len(folder.metrics(point.id))


def _attempts(folder: SweepFolder, point: Point) -> list[str]:
    logs = sorted((folder.run_folder(point.id).path / "attempts").glob("*/log.txt"))
    return [log.read_text() for log in logs]


@pytest.mark.usefixtures("scheduler")
def test_a_warned_job_and_a_lost_one_are_put_back_and_go_on(tiny: Tiny, tmp_path: Path) -> None:
    folder, points = _sweep(tiny, tmp_path / "out", 2)
    lost_without_a_word = slurm.Status(RUNNING, job="99")  # as a job that was killed and not put back leaves it
    folder.set_status(points[0].id, lost_without_a_word)
    assert slurm.queued(folder, points) == []
    jobs = slurm.submit(folder, points, "study", REQUEST, nproc=1, keep_checkpoints=False)
    assert [folder.status(point.id).job for point in points] == jobs
    assert slurm.queued(folder, points) == [point.id for point in points]
    assert jobs == ["100_0", "100_1"]
    assert all(slurm.in_queue(job) for job in jobs)
    assert not slurm.in_queue("99")
    warned, lost = points
    _wait(lambda: _steps(folder, warned) > 15)
    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    _wait(lambda: _steps(folder, lost) > 15)
    subprocess.run(["scancel", "--full", "--signal=KILL", jobs[1]], check=True)
    fake_slurm.wait_until_idle(patience(100))
    assert not any(slurm.in_queue(job) for job in jobs)
    for point in points:
        assert folder.status(point.id).state == FINISHED
        assert folder.status(point.id).starts == 2
        first, second = _attempts(folder, point)
        assert "done: " not in first
        assert "resumed from" in second
        assert "done: " in second
        assert not folder.run_folder(point.id).checkpoints.exists()
        lines = read_metrics(folder.run_folder(point.id).path / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert "2 of 2 points are finished" in write_results(folder, points)
    said = "".join(path.read_text() for path in (folder.path / "slurm").glob("*/*_log.err"))
    assert "this job is preempted" in said


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
