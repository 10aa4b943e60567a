"""The bars that the fused loss is held to, computed from what a run of `benchmarks/losses.py` saw.

A bar is a ratio, fused over another, at most so much. Each is taken at every point and precision that it speaks of;
the table shows the worst, with one thread (and beside it the worst with two, which no bar speaks of).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.candidates import CE, FUSED_CE, FUSED_KD, MATMULS, RENORMALIZED, Candidate
from benchmarks.inputs import Point
from benchmarks.measure import Seen


class Run(NamedTuple):
    """One table: where it was taken, and what was seen by name."""

    point: Point
    precision: str
    threads: int
    seen: Mapping[str, Seen]


class Ratio(NamedTuple):
    """What a bar looks at in a run, and of which two."""

    value: float
    of: str


Ratios = Callable[[Run], Iterator[Ratio]]


@dataclass(frozen=True)
class Bar:
    """A ratio is wanted to be at most `wanted` in the runs of which `applies` is true."""

    name: str
    wanted: float
    applies: Callable[[Run], bool]
    ratios: Ratios


def _time(run: Run, name: str, base: str) -> Iterator[Ratio]:
    if name in run.seen and base in run.seen:
        yield Ratio(run.seen[name].seconds / run.seen[base].seconds, f"{name} / {base}")


def _memory(run: Run, name: str, base: str) -> Iterator[Ratio]:
    if name in run.seen and base in run.seen:
        a, b = run.seen[name].mib, run.seen[base].mib
        if a is not None and b:
            yield Ratio(a / b, f"{name} / {base}")


def _precision(*names: str) -> Callable[[Run], bool]:
    return lambda run: run.precision in names


def _all_of(*conditions: Callable[[Run], bool]) -> Callable[[Run], bool]:
    return lambda run: all(condition(run) for condition in conditions)


def _default(run: Run) -> bool:
    return run.point == Point(2048, 32768, 512, 64)


def bars(rows: list[Candidate]) -> list[Bar]:
    """All of them. `rows` tells which candidates are divergences of ours and which peers have our objective."""
    divergences = [row.name for row in rows if row.group == "fused" and row.objective == "tail_bucket"]
    same = [row.name for row in rows if row.group == "same"]

    def against_fused_ce(measure: Callable[[Run, str, str], Iterator[Ratio]]) -> Ratios:
        return lambda run: (ratio for name in divergences for ratio in measure(run, name, FUSED_CE))

    def against_peer(measure: Callable[[Run, str, str], Iterator[Ratio]]) -> Ratios:
        def ratios(run: Run) -> Iterator[Ratio]:
            peers = [name for name in same if name in run.seen]
            if peers:
                yield from measure(run, FUSED_KD, min(peers, key=lambda name: run.seen[name].seconds))

        return ratios

    def of(measure: Callable[[Run, str, str], Iterator[Ratio]], name: str, base: str) -> Ratios:
        return lambda run: measure(run, name, base)

    def elsewhere(run: Run) -> bool:
        return not _default(run)

    f32, half, autocast = _precision("float32"), _precision("bfloat16"), _precision("autocast")
    time_to_ce, memory_to_ce = of(_time, FUSED_KD, CE), of(_memory, FUSED_KD, CE)
    found = [
        Bar("any divergence / fused CE, time", 1.05, lambda _: True, against_fused_ce(_time)),
        Bar("any divergence / fused CE, memory", 1.02, lambda _: True, against_fused_ce(_memory)),
        Bar("KD / CE at the default point, float32", 0.82, _all_of(_default, f32), time_to_ce),
        Bar("KD / CE at the default point, bfloat16", 0.67, _all_of(_default, half), time_to_ce),
        Bar("KD / CE at the default point, autocast", 0.67, _all_of(_default, autocast), time_to_ce),
        Bar("KD / CE at the default point, memory", 1 / 6, _default, memory_to_ce),
        Bar("KD / CE elsewhere, float32", 0.97, _all_of(elsewhere, f32), time_to_ce),
        Bar("KD / CE elsewhere, bfloat16", 0.70, _all_of(elsewhere, half), time_to_ce),
        Bar("KD / CE elsewhere, autocast", 0.70, _all_of(elsewhere, autocast), time_to_ce),
        Bar("KD / fastest peer, float32", 0.95, f32, against_peer(_time)),
        Bar("KD / fastest peer, bfloat16", 0.75, half, against_peer(_time)),
        Bar("KD / fastest peer, autocast", 0.75, autocast, against_peer(_time)),
        Bar("KD / fastest peer, memory", 1 / 4, lambda _: True, against_peer(_memory)),
    ]
    for k, wanted in ((8, 0.15), (64, 0.60)):
        where = _all_of(lambda run, k=k: run.point.top_k == k)
        found.append(Bar(f"renormalized alone / CE at K={k}", wanted, where, of(_time, RENORMALIZED, CE)))
    wide = _all_of(lambda run: run.point.width == 1024, f32)
    return [*found, Bar("KD / bare matmuls at D=1024, float32", 1.25, wide, of(_time, FUSED_KD, MATMULS))]


def _worst(bar: Bar, runs: list[Run], threads: int) -> tuple[Ratio, Run] | None:
    seen = [(ratio, run) for run in runs if run.threads == threads and bar.applies(run) for ratio in bar.ratios(run)]
    return max(seen, key=lambda pair: pair[0].value, default=None)


def table(runs: list[Run], rows: list[Candidate]) -> str:
    """One line a bar: wanted, the worst that was seen, reached or not, and where that was."""
    lines = [f"{'bar':42}{'wanted':>8}{'seen':>8}{'reached':>9}{'2 threads':>11}  worst at"]
    for bar in bars(rows):
        worst, beside = _worst(bar, runs, 1), _worst(bar, runs, 2)
        two = f"{beside[0].value:11.3f}" if beside else f"{'':11}"
        if worst is None:
            lines.append(f"{bar.name:42}{bar.wanted:8.3f}{'':8}{'not run':>9}{two}")
            continue
        ratio, run = worst
        reached = "yes" if ratio.value <= bar.wanted else "no"
        where = f"{run.point}, {run.precision}: {ratio.of}"
        lines.append(f"{bar.name:42}{bar.wanted:8.3f}{ratio.value:8.3f}{reached:>9}{two}  {where}")
    return "\n".join(lines)
