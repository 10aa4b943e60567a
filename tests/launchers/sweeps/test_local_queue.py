"""Sweeps on this machine, in real processes on the tiny teacher: failures, kills, stops, extension."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.base.sweep_definition import Sweep, grid, seeds
from experiments.config.sweep_points import Point, resolve_points
from experiments.half_depth import quickstart
from kd_core.errors import UsageError
from kd_core.files import own_folder, read_json
from kd_core.training.monitoring.metric_log import read_metrics
from launchers.sweeps.cost_plan import plan
from launchers.sweeps.local_queue import Queue
from launchers.sweeps.point_cost import Cost, cost_of, measured_rate
from launchers.sweeps.point_process import slots
from launchers.sweeps.results import write_results
from launchers.sweeps.sweep_folder import RUNNING, STOPPED, Status, SweepFolder
from tests.forks import ENVIRONMENT
from tests.launchers.command import Command, configs, kill_when, line, run, table
from tests.patience import patience
from tests.tiny import Tiny

STEPS = 4
pytestmark = pytest.mark.timeout(300)  # a dozen processes start


def _study(tmp_path: Path, body: str) -> Path:
    """A user's file with a sweep `study`."""
    path = tmp_path / "study.py"
    path.write_text(
        "from experiments.half_depth import quickstart\n"
        "from experiments.base.sweep_definition import Sweep, grid, seeds\n\n"
        f"def study() -> Sweep:\n    return {body}\n"
    )
    return path


def _flags(file: Path, out: Path, tiny: Tiny, steps: int = STEPS, jobs: int = 2) -> list[str]:
    items = configs(tiny.train_items(steps)[1:])
    return [f"--sweep={file}:study", f"--out={out}", "--backend=local", f"--jobs={jobs}", *items]


def _done(*flags: str) -> subprocess.CompletedProcess[str]:
    done = Command("launchers.sweep", *flags).done(patience(1000))
    assert done.returncode == 0, done.stderr
    return done


def _attempts(out: Path) -> dict[str, int]:
    return {folder.name: len(list(folder.glob("attempts/*"))) for folder in (out / "points").iterdir()}


def _here(sweep: Sweep, out: SweepFolder, items: list[str], retry_failed: bool = False) -> list[Point]:
    """A sweep run by this process, which saves a start."""
    points = resolve_points(sweep, items, "study")
    out.claim("study", points)
    left = out.left(points, retry_failed)
    Queue(out, left, slots(2, 1, [], sorted(os.sched_getaffinity(0))), 1, lambda: write_results(out, points)).run()
    write_results(out, points)
    return left


def test_a_failed_point_stays_alone_and_is_tried_again_when_asked(tiny: Tiny, tmp_path: Path) -> None:
    folder, moved = SweepFolder(tmp_path / "out"), tmp_path / "moved"
    items = [item for item in tiny.train_items(STEPS)[1:] if not item.startswith("shards.path")]
    sweep = Sweep(quickstart) * grid("shards.path", [str(moved), str(tiny.train)])
    assert len(_here(sweep, folder, items)) == 2
    bad, good = resolve_points(sweep, items, "study")
    assert {row["id"]: row["state"] for row in table(folder.path / "results.csv")} == {
        bad.id: "failed",
        good.id: "finished",
    }
    status = folder.status(bad.id)
    assert (status.starts, status.exit_code) == (1, 1)
    assert "train: error: " in status.last_line
    moved.symlink_to(tiny.train)
    # Another value for the one that failed, and the one that finished is no longer in the sweep.
    wider = Sweep(quickstart) * grid("shards.path", [str(moved)]) * grid("optimizer.lr", [4e-4, 8e-4])
    (new,) = _here(wider, folder, items)
    assert new.values["optimizer.lr"] == 8e-4
    assert folder.status(bad.id).starts == 1
    assert _here(wider, folder, items, retry_failed=True) == [resolve_points(wider, items, "study")[0]]
    assert [(row["id"], row["state"]) for row in table(folder.path / "results.csv")] == [
        (bad.id, "finished"),
        (new.id, "finished"),
    ]
    board = folder.path / "tensorboard"  # has the new column, and no run under the old ones
    assert {path.name[-12:] for path in board.iterdir() if path.is_dir()} == {bad.id, new.id}
    assert set(read_json(board / "columns.json", "it")["hparams"]) == {"path", "lr"}
    assert {point["id"] for point in read_json(folder.path / "sweep.json", "it")["points"]} == {
        bad.id,
        new.id,
        good.id,
    }
    assert _attempts(folder.path) == {bad.id: 1, new.id: 1, good.id: 1}  # a failed check is no attempt


def test_the_plan_foretells_the_disk_and_finished_points_need_no_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    (held_out := tmp_path / "held_out").symlink_to(tiny.validation)
    items = [*tiny.train_items(STEPS)[1:], "checkpoint.every=1", f"evaluation.shards.path={held_out}"]
    folder = SweepFolder(tmp_path / "out")
    points = _here(Sweep(quickstart) * seeds(2), folder, items)
    cost = cost_of(points[0])
    run = folder.run_folder(points[0].id)
    assert _size(run.export, "*.safetensors") == pytest.approx(cost.export, rel=0.05)
    kept = len(list(run.checkpoints.iterdir()))  # the best may be one of the newest two
    assert kept in (2, 3)
    ratio = _size(run.checkpoints, "*.safetensors") / (cost.checkpoints * kept / 3)
    assert 1 < ratio < 1.5  # a kilobyte a tensor, which this tiny student feels
    before = write_results(folder, points)
    folder.drop_checkpoints(point.id for point in points)
    assert not run.checkpoints.exists()
    assert folder.left(points, retry_failed=True) == []
    assert write_results(folder, points) == before
    text = plan(folder, points, None)
    (said,) = re.findall(r"disk, in the end: up to ([\d.]+)MB \(", text)
    assert float(said) * 1e6 == pytest.approx(2 * (cost.export + cost.checkpoints), rel=0.01)
    held_out.unlink()  # what was measured stays in the tables
    assert write_results(folder, points) == before
    folder.set_status(points[0].id, Status(RUNNING))  # as a queue that was killed leaves it
    shutil.rmtree(run.export)
    with own_folder(folder.path):
        folder.claim("study", points)
        assert folder.status(points[0].id).state == STOPPED


def test_the_speed_of_finished_points_is_by_steps_and_not_by_scored_tokens(tiny: Tiny, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    for point, seconds in (("a", [9.0, 0.5, 0.5]), ("b", [0.25, 0.25, 4.0]), ("unfinished", [1e-9] * 3)):
        path = folder.run_folder(point).path
        path.mkdir(parents=True)
        lines = [{"step": 0, "val/loss": 2.0}] + [
            {"step": step + 1, "speed/step_seconds": each, "speed/tokens_per_second": 7.0}
            for step, each in enumerate(seconds)
        ]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if point != "unfinished":
            shutil.copytree(tiny.teacher, path / "export")
    costs = {point: Cost(flops=3000.0, export=1, checkpoints=1) for point in ("a", "b", "unfinished")}
    assert measured_rate(folder, costs) == 3000.0  # 1000 FLOP a step: 2000 and 4000 FLOP/s
    assert measured_rate(folder, {"unfinished": costs["a"]}) is None


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def test_a_folder_of_another_sweep_is_refused_and_so_is_one_in_use(tiny: Tiny, tmp_path: Path) -> None:
    points = resolve_points(Sweep(quickstart) * seeds(2), tiny.train_items()[1:], "study")
    SweepFolder(tmp_path / "out").claim("other", points)
    with pytest.raises(UsageError, match="holds the sweep 'other', not study"):
        SweepFolder(tmp_path / "out").claim("study", points)
    with own_folder(tmp_path / "out"):
        done = run("launchers.sweep", *_flags(_study(tmp_path, "Sweep(quickstart) * seeds(2)"), tmp_path / "out", tiny))
    assert done.returncode == 1
    assert "another process" in done.stderr


def _steps_of(out: Path, point: str = "*") -> int:
    return sum(len(read_metrics(path)) for path in out.glob(f"points/{point}/metrics.jsonl"))


def _working_in(out: Path) -> list[int]:
    """Processes that train in the sweep's folder."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().decode(errors="replace")
            if str(out) in text and "launchers.train" in text:
                found.append(int(path.parent.name))
    return found


def _wait(ready: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not ready():
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.05)


def _kill_and_finish(flags: list[str], out: Path, moments: list[Callable[[], bool]]) -> int:
    """SIGKILL the sweep at each of the moments, then let it end; kills that struck. No finished point starts again."""
    struck = 0
    for moment in moments:
        finished = {path.parent.name for path in out.glob("points/*/export")}
        attempts = _attempts(out) if (out / "points").exists() else {}
        struck += kill_when(Command("launchers.sweep", *flags), moment, seconds=600)
        _wait(lambda: not _working_in(out), 10)
        assert {point: _attempts(out)[point] for point in finished} == {point: attempts[point] for point in finished}
    finished, attempts = {path.parent.name for path in out.glob("points/*/export")}, _attempts(out)
    _done(*flags)
    assert {point: _attempts(out)[point] for point in finished} == {point: attempts[point] for point in finished}
    return struck


def _ended(out: Path) -> dict[str, int]:
    """How many starts of each point say that they came to the end."""
    return {
        folder.name: sum("done: " in log.read_text() for log in folder.glob("attempts/*/log.txt"))
        for folder in (out / "points").iterdir()
    }


def _same_tables(one: Path, other: Path) -> None:
    for name in ("results.csv", "summary.csv", "curves.csv", "results.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_with_the_same_tables_and_leaves_no_process(tiny: Tiny, tmp_path: Path) -> None:
    file = _study(tmp_path, "Sweep(quickstart) * seeds(3)")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _done(*_flags(file, whole, tiny, steps=20))
    moments = [lambda: _steps_of(cut) > 6, lambda: _steps_of(cut) > 42]
    assert _kill_and_finish(_flags(file, cut, tiny, steps=20), cut, moments) == 2
    _same_tables(whole, cut)
    assert set(_ended(cut).values()) == {1}
    assert sum(_attempts(cut).values()) > 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_point_goes_on_and_a_sweep_that_is_asked_to_stop_leaves_nothing_running(
    number: signal.Signals, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = _flags(_study(tmp_path, "Sweep(quickstart) * seeds(2)"), out, tiny, steps=1000, jobs=1)
    process = subprocess.Popen(line("launchers.sweep", *flags), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    points = resolve_points(Sweep(quickstart) * seeds(2), tiny.train_items(1000)[1:], "study")
    first, second = (point.id for point in points)
    _wait(lambda: _steps_of(out, first) > 4)
    os.kill(_working_in(out)[0], number)
    _wait(lambda: second in _attempts(out) and _steps_of(out, second) > 4)  # the next one, while the first one waits
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=patience(100))
    assert process.returncode == 130
    assert re.search(f"^{first} stopped .*goes on from its checkpoint$", said, flags=re.MULTILINE)
    assert "Run the same command again" in said
    assert not _working_in(out)
    assert _attempts(out) == {first: 1, second: 1}
    assert {read_json(path, "it")["state"] for path in out.glob("status/*.json")} == {"stopped"}
    status = read_json(out / "status" / f"{first}.json", "it")
    if number == signal.SIGTERM:  # it saved, and ended with 0 far from its last step
        assert status["exit_code"] == 0
        assert re.search(r"stopped after step \d+ of 1000, told to by SIGTERM", status["last_line"])
    else:
        assert status["exit_code"] == -signal.SIGKILL


@pytest.mark.parametrize("answer", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_sweep_on_a_file_system_without_locks_works_and_says_so(answer: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n\n\ndef flock(*_):\n"
        f"    raise OSError(errno.{answer}, os.strerror(errno.{answer}))\n\n\nfcntl.flock = flock\n"
    )
    out = tmp_path / "out"
    flags = _flags(_study(tmp_path, "Sweep(quickstart) * seeds(1)"), out, tiny, jobs=1)
    path = f"{tmp_path / 'site'}:{ENVIRONMENT['PYTHONPATH']}"
    for expected in ("started", "1 points: 0 to run"):
        done = subprocess.run(
            line("launchers.sweep", *flags, "--nokeep_checkpoints"),
            env={**ENVIRONMENT, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stderr
        assert done.stderr.count("the file system has no locks") == 1
    (row,) = table(out / "results.csv")
    assert row["state"] == "finished"
    assert not (out / "points" / row["id"] / "checkpoints").exists()


@pytest.mark.slow
def test_a_point_of_two_ranks_goes_on_after_its_torchrun_is_stopped_and_after_a_rank_is_killed(
    tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = _flags(_study(tmp_path, "Sweep(quickstart) * seeds(1)"), out, tiny, steps=40, jobs=1)
    process = subprocess.Popen(
        line("launchers.sweep", *flags, "--nproc=2"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait(lambda: _steps_of(out) > 4)
    torchrun = min(_working_in(out))
    os.kill(torchrun, signal.SIGTERM)
    _wait(lambda: torchrun not in _working_in(out))
    done = _steps_of(out)
    _wait(lambda: _steps_of(out) > done + 4)
    os.kill(max(_working_in(out)), signal.SIGKILL)
    _, said = process.communicate(timeout=patience(200))
    assert process.returncode == 0, said
    assert re.findall(r"^\w{12} (started|stopped|finished|failed)", said, flags=re.MULTILINE) == [
        *("started", "stopped") * 2,
        "started",
        "finished",
    ]
    (point,) = out.glob("points/*")
    assert [found["step"] for found in read_metrics(point / "metrics.jsonl")] == list(range(41))
    assert read_json(out / "status" / f"{point.name}.json", "it")["last_line"] == f"done: {point}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twelve_points_killed_at_ten_random_moments(tiny: Tiny, tmp_path: Path) -> None:
    axes = 'grid("loss.terms.kd.tail", ["tail_bucket", "truncated"]) * grid("shards.top_k", [1, 8]) * seeds(3)'
    file = _study(tmp_path, f"Sweep(quickstart) * {axes}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _done(*_flags(file, whole, tiny, steps=60))
    moments = random.Random(0)

    def after(steps: int, seconds: float) -> Callable[[], bool]:
        """Some time after so many steps are done, so that it strikes within starts, exports and waits as well."""
        begun: list[float] = []

        def over() -> bool:
            if not begun and _steps_of(cut) > steps:
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() - begun[0] > seconds

        return over

    draws = [after(steps, moments.uniform(0, 4)) for steps in sorted(moments.sample(range(12 * 60 - 80), 10))]
    assert _kill_and_finish(_flags(file, cut, tiny, steps=60), cut, draws) == 10
    _same_tables(whole, cut)
    assert set(_ended(cut).values()) <= {0, 1}  # a kill may strike after the export and before it is said
    assert len(_ended(cut)) == 12
