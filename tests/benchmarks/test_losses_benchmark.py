"""The benchmarks run, every candidate of them, and their verdicts follow from what was measured."""

import sys
import time

import pytest
import torch

from benchmarks import bars, losses, step
from benchmarks.candidates import CE, FUSED_CE, FUSED_KD, MATMULS, Candidate, candidates
from benchmarks.inputs import Inputs, Point, Step, make_inputs
from benchmarks.measure import Seen, peak_mib, times

TINY = Point(24, 512, 16, 4)
ROWS = [row for row in candidates(8) if isinstance(row, Candidate)]
INSTALLED = ("Liger", "TRL forward", "TRL JSD", "TRL async, itself")


def run_with(seen: dict[str, Seen], point: Point = losses.CPU_POINT, precision: str = "float32") -> bars.Run:
    return bars.Run(point, precision, 1, seen)


def verdict(table: str, bar: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(bar))
    return line[42:].split()[:3]


def test_a_bar_looks_at_the_worst_and_says_where_it_was() -> None:
    good = run_with({CE: Seen(1.0, 600.0), FUSED_CE: Seen(0.8, 100.0), FUSED_KD: Seen(0.81, 100.0)})
    bad = run_with({FUSED_CE: Seen(1.0, 100.0), FUSED_KD: Seen(0.9), "fused JSD": Seen(1.06, 101.0)}, TINY)
    table = bars.table([good, bad], ROWS)
    assert verdict(table, "any divergence / fused CE, time") == ["1.050", "1.060", "no"]
    assert verdict(table, "any divergence / fused CE, memory") == ["1.020", "1.010", "yes"]
    assert verdict(table, "KD / CE at the default point, float32") == ["0.820", "0.810", "yes"]
    assert verdict(table, "KD / CE at the default point, memory") == ["0.167", "0.167", "yes"]
    assert f"{TINY}, float32: fused JSD / fused CE" in table


def test_the_fastest_peer_counts_and_its_memory() -> None:
    peers = {"TRL server": Seen(2.0, 100.0), "Megatron-LM ghost token": Seen(1.0, 400.0), "verl": Seen(0.1, 1.0)}
    table = bars.table([run_with({FUSED_KD: Seen(0.9, 120.0), **peers})], ROWS)
    assert verdict(table, "KD / fastest peer, float32") == ["0.950", "0.900", "yes"]
    assert verdict(table, "KD / fastest peer, memory") == ["0.250", "0.300", "no"]


def test_a_bar_that_nothing_speaks_of_is_not_called_reached() -> None:
    table = bars.table([run_with({CE: Seen(1.0)})], ROWS)
    assert not {"yes", "no"} & {word for line in table.splitlines()[1:] for word in line.split()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_every_candidate_runs_in_every_precision(precision: str) -> None:
    steps = {row.name: row.make() for row in ROWS if not row.name.startswith(INSTALLED)}
    found = times(TINY, precision, steps, 1, "cpu", limit=1e9)
    assert not found.failed
    assert found.seconds.keys() == steps.keys()


def test_a_candidate_that_fails_is_reported_and_the_others_go_on() -> None:
    def broken(_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand a trace")

    steps = {MATMULS: next(row for row in ROWS if row.name == MATMULS).make(), "broken": broken}
    found = times(TINY, "float32", steps, 1, "cpu", limit=1e9)
    assert (list(found.seconds), found.failed) == ([MATMULS], {"broken": "no such kernel"})


def test_what_is_slow_beside_the_first_runs_once_only() -> None:
    calls: list[str] = []

    def of(name: str, seconds: float) -> Step:
        def step(given: Inputs) -> torch.Tensor:
            calls.append(name)
            time.sleep(seconds * (len(given.hidden) == TINY.positions))
            return torch.zeros(())

        return step

    found = times(TINY, "float32", {"first": of("first", 0.01), "slow": of("slow", 0.5)}, 3, "cpu", limit=2)
    assert found.slow == {"slow"}
    assert found.seconds["slow"] >= 0.5
    assert [calls.count(name) for name in ("first", "slow")] == [5, 2]  # both with a pass to warm up


def test_the_command_prints_a_table_a_precision_and_the_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in TINY._asdict().items()]
    settings = ["--rounds=1", "--threads=1", "--memory=no", "--dtypes=float32,bfloat16", "--groups", "basics", "fused"]
    monkeypatch.setattr(sys, "argv", ["losses", *sizes, *settings])
    losses.main()
    out = capsys.readouterr().out
    assert out.count(f"1 thread: {TINY}") == 2
    assert "any divergence / fused CE, time" in out


def test_the_matrix_has_every_point_once() -> None:
    points = [job.point[1:] for job in losses.jobs_of(losses.parsed(["--all"]))]
    assert sorted(points) == sorted({(v, d, k) for v in (32768, 131072) for d in (512, 1024) for k in (8, 64, 256)})


def test_entries_of_the_inputs_are_distinct_and_have_a_tail() -> None:
    teacher = make_inputs(Point(50, 32768, 8, 256), "float32").teacher
    assert all(len(row.unique()) == 256 for row in teacher.ids)
    assert (teacher.tail_log_prob < 0).all()


def test_a_training_step_is_measured_under_each_objective(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"vocab_size": 6400, "hidden_size": 24, "intermediate_size": 16, "num_layers": 1, "num_heads": 3}
    tiny = step.Architecture(**{**vars(step.STUDENT), **small, "num_kv_heads": 1, "head_dim": 8})
    monkeypatch.setattr(step, "STUDENT", tiny)
    monkeypatch.setattr(sys, "argv", ["step", "--rounds=1", "--length=16"])
    step.main()
    out = capsys.readouterr().out
    assert out.count("KD + CE, observing entropy") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_time_and_memory_on_a_gpu() -> None:
    step_of = {row.name: row.make() for row in ROWS if row.name in (CE, FUSED_KD)}
    found = times(TINY, "bfloat16", step_of, 1, "cuda", limit=1e9)
    assert not found.failed
    assert all(value > 0 for value in found.seconds.values())
    assert all(peak_mib(TINY, "bfloat16", each, "cuda") > 0 for each in step_of.values())
