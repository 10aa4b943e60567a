"""Encoders in processes: the same bytes and errors as in this one, and no process that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import worker_processes as module
from data.cache.codec.coding import Coding
from data.cache.manifest import read_manifest
from data.export import export as steps
from data.export.block_encoders import BlockJob, EncoderSettings, _describe, block_encoders
from data.export.plan import make_plans
from data.export.receipts import write_manifest
from data.export.resume_check import record_or_check_plan
from data.stream.shards import read_tables
from data.worker_processes import WorkerProcess
from kd_core.errors import UsageError
from tests.tiny import Tiny, bytes_of

PARENT = """
import sys, time
from data.worker_processes import WorkerProcess
print([WorkerProcess(print, str)._process.pid for _ in range(2)], flush=True)
time.sleep(600)
"""
PRINTS = """
import pickle
print("begins", flush=True)
dump = pickle.dump
def loud(*args, **settings):
    print("dumps", flush=True)
    dump(*args, **settings)
pickle.dump = loud
"""


def _settings(tiny: Tiny, max_kl: float = 1.0) -> EncoderSettings:
    manifest = read_manifest(tiny.train)
    return EncoderSettings(Coding(read_tables(tiny.train, manifest.tables), manifest.selection, manifest.codec), max_kl)


def _jobs(tiny: Tiny, count: int = 7) -> list[BlockJob]:
    records = tiny.records(tiny.train)
    return [BlockJob(f"shard {i}", 2 * i, records[2 * i : 2 * i + 2]) for i in range(count)]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_and_ranks_do_not_change_a_byte(tiny: Tiny, tmp_path: Path) -> None:
    export = tiny.export()
    model = steps.load_teacher(export, steps.torch.device("cpu"))
    for plan in make_plans(export, tmp_path):
        record_or_check_plan(plan)
        pilot = steps.make_tables(plan, model)
        for rank in (1, 0):
            steps.write_missing_shards(plan, model, pilot, rank, 2, encoders=2)
        write_manifest(plan)
        assert bytes_of(plan.folder) == bytes_of(tiny.root / "cache" / plan.identity["split"])


def test_blocks_come_in_order_and_few_are_ahead(tiny: Tiny) -> None:
    jobs, settings, taken = _jobs(tiny), _settings(tiny), []

    def taking() -> object:
        for job in jobs:
            taken.append(job)
            yield job

    with block_encoders(settings, 1) as encode:
        encoded = encode(taking())  # type: ignore[arg-type]
        assert next(encoded) == settings.encode(jobs[0])
        assert len(taken) == 3
        assert list(encoded) == [settings.encode(job) for job in jobs[1:]]


def test_an_error_of_a_block_is_that_of_encoding_here(tiny: Tiny) -> None:
    settings, messages = _settings(tiny, max_kl=0.0), []
    for processes in (0, 2):
        with pytest.raises(UsageError) as raised, block_encoders(settings, processes) as encode:
            list(encode(_jobs(tiny)))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("shard 0: codec 'standard' changes the teacher by")


def test_a_process_that_ends_is_named(tiny: Tiny) -> None:
    encoder = WorkerProcess(_settings(tiny).encode, _describe)
    encoder.run(_jobs(tiny)[0])
    encoder.kill()
    with pytest.raises(UsageError, match="shard 1: the process that encoded its blocks ended with status -9"):
        encoder.run(_jobs(tiny)[1])
    encoder.end()


@pytest.mark.timeout(60)
def test_what_a_process_prints_is_no_result(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python imports this module when it starts.
    (tmp_path / "sitecustomize.py").write_text(PRINTS)
    monkeypatch.syspath_prepend(tmp_path)
    settings, jobs = _settings(tiny), _jobs(tiny)
    with block_encoders(settings, 1) as encode:
        assert list(encode(jobs)) == [settings.encode(job) for job in jobs]


@pytest.mark.timeout(60)
def test_a_process_with_damaged_results_is_killed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    encoder = WorkerProcess(_settings(tiny).encode, _describe)
    with subprocess.Popen(["echo", "no pickle"], stdout=subprocess.PIPE) as other:
        assert other.stdout
        results, encoder._results = encoder._results, other.stdout
        with pytest.raises(UsageError, match="results that cannot be read, and was killed with status -9"):
            encoder.run(_jobs(tiny)[0])
        encoder._results = results
    encoder.end()


def test_a_process_that_a_bug_ends_is_not_blamed_on_memory(tiny: Tiny) -> None:
    encoder = WorkerProcess(_settings(tiny).encode, _describe)
    job = BlockJob("shard 0", 0, [None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"ended with status 1\. Its own message is above\. Run") as raised:
        encoder.run(job)
    assert "memory" not in str(raised.value)
    encoder.end()


def test_processes_end_with_the_block_that_uses_them_and_with_a_killed_parent(tiny: Tiny) -> None:
    class StopError(Exception):
        pass

    def children() -> set[int]:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}

    before = children()
    with pytest.raises(StopError), block_encoders(_settings(tiny), 2) as encode:
        next(encode(_jobs(tiny)))
        assert len(children() - before) == 2
        raise StopError
    assert children() <= before

    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().strip("[]\n").split(",")]
        assert all(map(_is_running, pids))
        parent.send_signal(signal.SIGKILL)
    ended = time.monotonic() + 60
    while any(map(_is_running, pids)) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))
