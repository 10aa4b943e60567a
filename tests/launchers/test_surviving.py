"""Runs in processes of their own that are told to stop, killed, stopped in the middle, or not alike."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from data.stream import stream
from tests.forks import ENVIRONMENT
from tests.launchers.command import configs, line, run, until, values
from tests.patience import patience
from tests.tiny import Tiny

pytestmark = pytest.mark.timeout(180)  # a torchrun starts, and starts again
STEPS = 60
TIMEOUT = round(patience(1.5))  # seconds that a rank waits for another, above what a slow start takes


def _items(tiny: Tiny, steps: int = STEPS) -> list[str]:
    return [*tiny.train_items(steps), "evaluation.every=20", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run("launchers.train", *configs(_items(tiny)), f"--run_dir={folder}", nproc=2)
    assert done.returncode == 0, done.stderr
    return folder


def _at(folder: Path, step: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") > step


@contextlib.contextmanager
def _started(command: list[str], ready: Callable[[], bool]) -> Generator[subprocess.Popen[str]]:
    """The command, once it is `ready`; ended with the block, however that ends. torchrun's ranks end with it."""
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert until(ready, process), process.communicate()[1]
            yield process
        finally:
            process.kill()


def _ranks(torchrun: subprocess.Popen[str]) -> list[int]:
    """Process ids, by rank: torchrun starts them in order."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return sorted(int(child) for child in children)


def _same(ours: Path, theirs: Path) -> None:
    assert values(ours) == values(theirs)
    exported = Path("export") / "model.safetensors"
    assert (ours / exported).read_bytes() == (theirs / exported).read_bytes()


def test_told_to_stop_it_saves_and_ends_well_and_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    steps = 30
    flags = [*configs(_items(tiny, steps)), "--config=checkpoint.every=1000", f"--run_dir={tmp_path / 'run'}"]
    with _started(line("launchers.train", *flags), _at(tmp_path / "run", 3)) as process:
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=patience(60))
    assert process.returncode == 0, said
    step = int(re.search(rf"stopped after step (\d+) of {steps}, told to by SIGUSR1", said)[1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert not (tmp_path / "run" / "export").exists()
    assert run("launchers.train", *flags).returncode == 0
    assert [found["step"] for found in values(tmp_path / "run")] == list(range(steps + 1))


def test_torchrun_told_to_stop_and_then_the_newest_checkpoint_damaged_it_ends_with_the_same_bits(
    tiny: Tiny, tmp_path: Path, whole: Path
) -> None:
    flags = [*configs(_items(tiny)), f"--run_dir={tmp_path / 'run'}"]
    with _started(line("launchers.train", *flags, nproc=2), _at(tmp_path / "run", 12)) as process:
        process.terminate()
        _, said = process.communicate(timeout=patience(60))
    assert len(re.findall("stopped after step .* told to by SIGTERM", said)) == 1, said
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    part = newest / "tensors_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    done = run("launchers.train", *flags, nproc=2)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged: tensors_00000.safetensors has" in done.stderr
    _same(tmp_path / "run", whole)


def test_its_time_over_it_saves_and_ends_well(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*configs(_items(tiny)), f"--run_dir={tmp_path / 'run'}"]
    done = run("launchers.train", *flags, "--max_time_per_run=00:00:00.1")
    assert done.returncode == 0, done.stderr
    assert f"stopped after step 1 of {STEPS}, its time is over" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_a_rank_killed_the_job_goes_on_by_itself_with_the_same_bits(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    flags = [*configs(_items(tiny)), f"--run_dir={tmp_path / 'run'}"]
    command = line("launchers.train", *flags, nproc=2, torchrun=["--max-restarts=2"])
    with _started(command, _at(tmp_path / "run", 12)) as process:
        os.kill(_ranks(process)[0], signal.SIGKILL)
        _, said = process.communicate(timeout=patience(60))
    assert process.returncode == 0, said
    assert sorted(path.name for path in (tmp_path / "run" / "attempts").iterdir()) == ["001", "002"]
    assert "resumed from" in (tmp_path / "run" / "attempts" / "002" / "log.txt").read_text()
    _same(tmp_path / "run", whole)


def test_a_rank_that_is_stopped_in_the_middle_is_named_in_time(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*configs(_items(tiny, 100_000)), f"--config=parallel.timeout={TIMEOUT}", f"--run_dir={tmp_path / 'run'}"]
    with _started(line("launchers.train", *flags, nproc=2), _at(tmp_path / "run", 12)) as process:
        stopped = _ranks(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        assert process.stderr is not None
        said = next(text for text in process.stderr if text.startswith("error: "))
        assert re.match(rf"error: waited {TIMEOUT} s for rank 1 on \S+, not answering .*last seen .*step \d+", said), (
            said
        )
        os.kill(stopped, signal.SIGKILL)  # torchrun would wait half a minute before it does
        _, rest = process.communicate(timeout=patience(60))
    assert process.returncode != 0
    assert "error: waited" not in rest, "said once"


def _sleep_over_data_on_rank_1() -> None:
    made, calls = stream._batch, itertools.count()

    def slow(*args: Any) -> Any:
        if os.environ["RANK"] == "1" and next(calls) >= 8:
            time.sleep(100_000)
        return made(*args)

    stream._batch = slow


def test_a_rank_that_sleeps_over_its_data_is_named_with_where_it_is(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*configs(_items(tiny)), f"--config=parallel.timeout={TIMEOUT}", f"--run_dir={tmp_path / 'run'}"]
    done = run("launchers.train", *flags, nproc=2, before=_sleep_over_data_on_rank_1)
    assert done.returncode != 0
    said = re.findall("^error: .*", done.stderr, flags=re.MULTILINE)
    assert len(said) == 1, done.stderr
    wanted = rf"waited {TIMEOUT} s for rank 1 on .* reading data of step \d+ \(data/stream/prefetch\.py:\d+\)"
    assert re.search(wanted, said[0])


def _take_another_rate_on_rank_1() -> None:
    sys.argv += ["--config=optimizer.lr=1e-3"] * int(os.environ["RANK"])


def test_ranks_that_are_not_alike_do_not_start(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*configs(_items(tiny)), f"--run_dir={tmp_path / 'run'}"]
    done = run("launchers.train", *flags, nproc=2, before=_take_another_rate_on_rank_1)
    assert done.returncode != 0
    messages = re.findall("^train: error: .*", done.stderr, flags=re.MULTILINE)
    assert len(messages) == 1, done.stderr
    assert "rank 1 differs from rank 0 in config optimizer.lr: 0.0004 on rank 0, 0.001 on rank 1" in messages[0]
    assert not (tmp_path / "run" / "config.json").exists()
