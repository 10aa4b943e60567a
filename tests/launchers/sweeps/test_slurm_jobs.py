"""Jobs of a sweep under a real Slurm of two nodes on this machine, through all that interrupts them."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.sweep_points import Point
from kd_core.files import read_json
from kd_core.training.monitoring.metric_log import read_metrics
from launchers.sweeps import slurm, slurm_commands
from launchers.sweeps.results import write_results
from launchers.sweeps.sweep_folder import FINISHED, RUNNING, SUBMITTED, SweepFolder
from tests.launchers.command import run
from tests.launchers.sweeps.real_slurm import HELD, REQUEST, Cluster, needs_slurm, sweep_of, wait
from tests.tiny import Tiny

pytest.importorskip("submitit")
pytestmark = pytest.mark.timeout(300)


def _steps(folder: SweepFolder, point: Point) -> int:
    return len(folder.metrics(point.id))


def _attempts(folder: SweepFolder, point: Point) -> list[str]:
    logs = sorted((folder.run_folder(point.id).path / "attempts").glob("*/log.txt"))
    return [log.read_text() for log in logs]


def _training(folder: SweepFolder, point: Point) -> int:
    """The process that trains the point."""
    attempt = folder.run_folder(point.id).attempts()[-1] / "attempt.json"
    return int(read_json(attempt, "the facts of a start")["world"]["pid"])


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
    folder, points = sweep_of(tiny, tmp_path / "out", 2)
    lost_without_a_word = slurm.Status(RUNNING, job="99")  # as a job that was killed and not put back leaves it
    folder.set_status(points[0].id, lost_without_a_word)
    assert not slurm_commands.states_by_point(folder, points)
    # One after the other, so that neither ends while the test looks at the other.
    request = replace(REQUEST, at_once=1)
    jobs = slurm.submit(folder, points, "study", request, nproc=1, keep_checkpoints=False)
    assert [folder.status(point.id).job for point in points] == jobs
    assert list(slurm_commands.states_by_point(folder, points)) == [point.id for point in points]
    assert set(slurm_commands.job_states([*jobs, "99"])) == set(jobs)
    warned, lost = points
    wait(lambda: _steps(folder, warned) > 15)
    at.call("scancel", "--signal=USR2", jobs[0])
    wait(lambda: _steps(folder, lost) > 15)
    at.lose_node(node := at.node_of(jobs[1]))
    at.start_node(node)
    at.wait_until_idle(100)
    assert not slurm_commands.job_states(jobs)
    for point in points:
        _ended_once(folder, point, starts=2)
        assert not folder.run_folder(point.id).checkpoints.exists()
    assert "2 of 2 points are finished" in write_results(folder, points)
    said = "".join(path.read_text() for path in (folder.path / "slurm").glob("*/*_log.err"))
    assert "Caught signal SIGUSR2" in said


@needs_slurm
def test_a_preempted_job_that_is_left_time_to_save_puts_itself_back(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path
) -> None:
    at = start_cluster(nodes=1, main="GraceTime=60")
    folder, points = sweep_of(tiny, tmp_path / "out", 1)
    (job,) = slurm.submit(folder, points, "study", REQUEST, nproc=1, keep_checkpoints=True)
    wait(lambda: _steps(folder, points[0]) > 5)
    at.preempt("n1")
    wait(lambda: at.jobs("PENDING").get(job, ("", ""))[1] == HELD)
    assert folder.status(points[0].id).state == SUBMITTED
    assert "told to by SIGTERM" in folder.status(points[0].id).last_line
    at.wait_until_idle(60)
    _ended_once(folder, points[0], starts=2)


@needs_slurm
@pytest.mark.slow
def test_a_job_that_is_put_back_waits_for_its_training_on_a_node_that_nobody_reaches(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path
) -> None:
    at = start_cluster()
    folder, points = sweep_of(tiny, tmp_path / "out", 1)
    (job,) = slurm.submit(folder, points, "study", REQUEST, nproc=1, keep_checkpoints=True)
    wait(lambda: _steps(folder, points[0]) > 2)
    training = _training(folder, points[0])
    os.kill(training, signal.SIGSTOP)
    at.lose_node(at.node_of(job), still_at_work=True)
    (log,) = (folder.path / "slurm").glob(f"*/{job}_0_log.err")
    said = f"point {points[0].id}: waits, for 0 minutes so far: another process is working in"

    def waits() -> bool:
        at.hasten()
        return said in log.read_text()

    wait(waits, seconds=90)
    os.kill(training, signal.SIGCONT)
    at.wait_until_idle(60)
    _ended_once(folder, points[0], starts=1)


def _undisturbed(tiny: Tiny, out: Path, n: int, steps: int) -> SweepFolder:
    """The same sweep, each point trained in one go without Slurm."""
    folder, points = sweep_of(tiny, out, n, steps)

    def train(point: Point) -> None:
        files = [f"--config=config_file:{folder.config(point.id)}", f"--run_dir={folder.run_folder(point.id).path}"]
        assert run("launchers.train", *files).returncode == 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, points))
    write_results(folder, points)
    return folder


def _end_its_time(at: Cluster, job: str, folder: SweepFolder, point: Point) -> None:
    """Have Slurm warn a job of the end of its time, which it looks at twice a minute; its training waits so long."""
    training = _training(folder, point)
    os.kill(training, signal.SIGSTOP)
    at.call("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # less than the warning before it
    (log,) = (folder.path / "slurm").glob(f"*/{job}_0_log.err")
    wait(lambda: "Caught signal SIGUSR2" in log.read_text(), seconds=90)
    os.kill(training, signal.SIGCONT)
    wait(lambda: at.jobs().get(job, ("",))[0] == "PENDING")
    at.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twelve_points_through_all_that_interrupts_a_job_end_in_the_same_tables(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path
) -> None:
    at = start_cluster()
    folder, points = sweep_of(tiny, tmp_path / "out", 12, steps=80)
    slurm.submit(folder, points, "study", REQUEST, nproc=1, keep_checkpoints=False)
    by_job = {folder.status(point.id).job: point for point in points}
    met: list[str] = []

    def at_work() -> str:
        """Another job than those before that has done some steps of its point, and has many before it."""

        def found() -> bool:
            at.hasten()
            there = [job for job in at.jobs("RUNNING") if job in by_job and job not in met]
            met.extend([job for job in there if 15 < _steps(folder, by_job[job]) < 40][:1])
            return len(met) > before

        before = len(met)
        wait(found, seconds=200, pause=0.02)
        return met[-1]

    at.preempt(at.node_of(at_work()))
    at.lose_node(node := at.node_of(at_work()))
    at.start_node(node)
    _end_its_time(at, limited := at_work(), folder, by_job[limited])
    at.call("scancel", "--full", "--signal=KILL", at_work())
    at.wait_until_idle(1000)
    left = folder.left(points, retry_failed=False)
    assert len(left) == 1
    slurm.submit(folder, left, "study", REQUEST, nproc=1, keep_checkpoints=False)
    at.wait_until_idle(200)
    assert sorted(folder.status(point.id).starts for point in points) == [1] * 8 + [2] * 4
    for point in points:
        _ended_once(folder, point, folder.status(point.id).starts)
    write_results(folder, points)
    calm = _undisturbed(tiny, tmp_path / "calm", 12, steps=80)
    for name in ("results.csv", "summary.csv", "curves.csv", "results.md"):
        assert (folder.path / name).read_bytes() == (calm.path / name).read_bytes(), name


@needs_slurm
@pytest.mark.slow
def test_nodes_whose_names_are_no_hosts_meet(start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path) -> None:
    at = start_cluster()
    folder, points = sweep_of(tiny, tmp_path / "out", 1)
    request = replace(REQUEST, nodes=2)
    slurm.submit(folder, points, "study", request, nproc=1, keep_checkpoints=True)
    at.wait_until_idle(200)
    _ended_once(folder, points[0], starts=1)
    assert "layout: 2 ranks" in _attempts(folder, points[0])[0]
