"""What a sweep asks of Slurm: scripts, its queue, the limits of a cluster."""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.base.sweep_definition import Sweep, seeds
from experiments.config.sweep_points import resolve_points
from experiments.half_depth import quickstart
from kd_core.errors import UsageError
from kd_core.files import own_folder
from launchers.sweeps import slurm, slurm_commands
from launchers.sweeps.sweep_folder import FINISHED, SUBMITTED, Status, SweepFolder
from tests.launchers.sweeps.real_slurm import REQUEST, STEPS, Cluster, needs_slurm, sweep_of
from tests.tiny import Tiny

pytest.importorskip("submitit")
pytestmark = pytest.mark.timeout(300)


@needs_slurm
def test_a_sweep_is_cut_into_arrays_that_the_cluster_takes_and_asks_for_its_queue_once(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = start_cluster(settings={"MaxArraySize": "21"})
    folder, (point, *_) = sweep_of(tiny, tmp_path / "out", 1)
    points = [replace(point, id=f"{i:012x}") for i in range(50)]
    folder.claim("study", points)
    request = replace(REQUEST, at_once=6, more={"begin": "now+1hour"})
    jobs = slurm.submit(folder, points, "study", request, nproc=1, keep_checkpoints=True)
    first = int(jobs[0].partition("_")[0])
    assert jobs == [f"{first + i // 17}_{i % 17}" for i in range(50)]
    assert sorted(at.jobs()) == sorted(jobs)
    scripts = "".join(path.read_text() for path in (folder.path / "slurm").glob("*/*_submission.sh"))
    assert sorted(re.findall(r"--array='?([^'\n]*)", scripts)) == ["0-15%1", "0-16%2", "0-16%2"]
    asked = _refusing(tmp_path / "bin", "squeue", at, "true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert list(slurm_commands.states_by_point(folder, points)) == [each.id for each in points]
    assert asked.read_text().count("\n") == 1
    at.call("scancel", jobs[7], str(first + 2))
    assert list(slurm_commands.states_by_point(folder, points)) == [
        each.id for i, each in enumerate(points[:34]) if i != 7
    ]


@needs_slurm
def test_where_a_user_may_have_no_more_jobs_as_many_are_submitted_as_fit(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of a user's jobs needs Slurm's accounting, so what refuses here stands before a real sbatch."""
    at = start_cluster()
    folder, (point, *_) = sweep_of(tiny, tmp_path / "out", 1)
    points = [replace(point, id=f"{i:012x}") for i in range(10)]
    folder.claim("study", points)
    refusal = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates policy"
    _refusing(
        tmp_path / "bin",
        "sbatch",
        at,
        f"""
        last=$(sed -n "s/^#SBATCH --array='\\{{0,1\\}}0-\\([0-9]*\\).*/\\1/p" "$1")
        test $(($(squeue -h -r | wc -l) + ${{last:-0}} + 1)) -le 7 || {{ echo "{refusal}" >&2; false; }}""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    request = replace(REQUEST, more={"begin": "now+1hour"})
    assert len(slurm.submit(folder, points, "study", request, 1, keep_checkpoints=True)) == 7
    assert list(slurm_commands.states_by_point(folder, points)) == [each.id for each in points[:7]]
    with pytest.raises(UsageError, match="sbatch refused 1 jobs: .*AssocMaxSubmitJobLimit"):
        slurm.submit(folder, points[7:], "study", request, 1, keep_checkpoints=True)


def _refusing(folder: Path, name: str, at: Cluster, condition: str) -> Path:
    """Put a command of Slurm into a folder that runs where `condition` holds; returns the file of its calls."""
    folder.mkdir()
    real = shutil.which(name, path=at.environment["PATH"])
    (folder / name).write_text(f'#!/bin/sh\necho x >> {folder}/calls\n{condition} && exec {real} "$@"\n')
    (folder / name).chmod(0o755)
    return folder / "calls"


def test_the_script_asks_for_what_was_wanted(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):  # which only have to be there
        (tmp_path / "bin" / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder, points = sweep_of(tiny, tmp_path / "out", 3)
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
        "array": "0-2%3",
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


@needs_slurm
def test_what_is_in_the_queue_is_not_submitted_again(
    start_cluster: Callable[..., Cluster], tiny: Tiny, tmp_path: Path
) -> None:
    at = start_cluster()
    job = at.call("sbatch", "--parsable", "--begin=now+1hour", "--wrap=true").strip()
    (tmp_path / "study.py").write_text(
        "from experiments.half_depth import quickstart\nfrom experiments.base.sweep_definition import Sweep, seeds\n\n"
        "def study():\n    return Sweep(quickstart) * seeds(1)\n"
    )
    items = [f"--config={item}" for item in [*tiny.train_items(STEPS)[1:], "shards.top_k=3"]]
    out = tmp_path / "out"
    flags = [f"--sweep={tmp_path / 'study.py'}:study", f"--out={out}", "--backend=slurm", *items]
    (point,) = resolve_points(Sweep(quickstart) * seeds(1), [*tiny.train_items(STEPS)[1:], "shards.top_k=3"], "study")
    SweepFolder(out).claim("study", [point])
    SweepFolder(out).set_status(point.id, slurm.Status(SUBMITTED, job=job))
    done = subprocess.run(
        [sys.executable, "-m", "launchers.sweep", *flags],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 are in Slurm's queue: 1 PENDING (BeginTime)" in done.stderr
    assert "submitted" not in done.stderr
    flags[2] = "--backend=local"
    command = [sys.executable, "-m", "launchers.sweep", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1
    assert (
        f"1 points are in Slurm's queue ({point.id}). Wait for them, or cancel their jobs with scancel." in done.stderr
    )


def test_a_job_that_waits_for_another_process_says_so_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, clock = SweepFolder(tmp_path / "out"), [0.0]
    run_folder = folder.run_folder("0" * 12).path
    (tmp_path / "out" / "status").mkdir(parents=True)
    folder.set_status("0" * 12, Status(FINISHED, 1))
    with contextlib.ExitStack() as owner:
        owner.enter_context(own_folder(run_folder))

        def sleep(seconds: float) -> None:
            clock[0] += seconds
            if clock[0] >= 150:
                owner.close()

        monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        monkeypatch.setattr("submitit.JobEnvironment", lambda: SimpleNamespace(global_rank=0))
        with caplog.at_level(logging.WARNING, "kd"):
            assert slurm.PointJob(folder, "0" * 12, 1, True)() == FINISHED
    assert clock[0] == 150
    waits = [record.getMessage() for record in caplog.records]
    assert [f"{minutes} minutes" in line for minutes, line in enumerate(waits)] == [True] * 3
    assert all(f"another process is working in {run_folder}" in line for line in waits)


def test_a_scheduler_that_does_not_answer_is_no_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match=r"jobs 12, 7 may run: squeue failed .*Unable to contact slurm controller"):
        slurm_commands.job_states(["7", "12_3", "12_4"])
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    assert not slurm_commands.job_states(["7"])
    command.write_text("#!/bin/sh\necho no such format\n")  # which is no word of an end either
    assert slurm_commands.job_states(["7"]) == {"7": "UNKNOWN"}


def test_without_submitit_or_slurm_the_error_says_what_to_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, points = sweep_of(tiny, tmp_path / "out", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch and srun on the PATH"):
        slurm.submit(folder, points, "study", REQUEST, 1, keep_checkpoints=True)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'kd-workspace\[slurm\]'"):
        slurm.submit(folder, points, "study", REQUEST, 1, keep_checkpoints=True)
