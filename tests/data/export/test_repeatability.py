"""What two passes of a teacher differ by: measured as float64 measures it, recorded, and bounded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.cache.selection import Selection
from data.export import export as steps
from data.export.plan import CachePlan, make_plans
from data.export.receipts import write_manifest
from data.export.repeatability import SCORED_BY_FILE, Spread, measure_spread, record_scoring, spread_between
from data.export.resume_check import record_or_check_plan
from data.teacher.scorer import Scorer
from data.teacher.select import TeacherScores, select_entries
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from tests.tiny import Tiny, bytes_of

CPU = torch.device("cpu")


@dataclass
class Noisy:
    """A teacher whose logits differ by up to `noise` each time."""

    scorer: Scorer
    noise: float
    device: torch.device = CPU

    def logits(self, tokens: Tensor, document_ids: Tensor) -> Iterator[Tensor]:
        for chunk in self.scorer.logits(tokens, document_ids):
            yield chunk + self.noise * (2 * torch.rand(chunk.shape) - 1)


def _plan(tiny: Tiny, out: str, **changes: object) -> CachePlan:
    return make_plans(tiny.export(**changes), tiny.root / out)[0]


def test_the_spread_is_that_of_float64() -> None:
    """Log-probabilities of every entry by its id, and the KL over common entries and one bucket of all other tokens."""
    torch.manual_seed(0)
    logits, K = 3 * torch.randn(20, 40), 6
    others = logits + 0.3 * torch.randn(20, 40)  # other entries too
    empty, labels = torch.zeros(20, 0), torch.zeros(20, dtype=torch.int64)
    one, other = (select_entries(z.clone(), labels, Selection(K), empty) for z in (logits, others))
    p, q = (torch.log_softmax(z.double(), dim=1).numpy() for z in (logits, others))
    largest, divergences = 0.0, list[float]()
    for row in range(20):
        here, there = (set(scores.ids[row].tolist()) for scores in (one, other))
        common = sorted(here & there)
        # An entry that the other pass lacks is at most its smallest one there.
        largest = max(
            largest, *(abs(p[row, v] - (q[row, v] if v in there else q[row, sorted(there)].min())) for v in here)
        )
        tails = [np.logaddexp.reduce(np.delete(z[row], sorted(ids))) for z, ids in ((p, here), (q, there))]
        largest = max(largest, abs(tails[0] - tails[1]))
        rest, other_rest = (np.logaddexp.reduce(np.delete(z[row], common)) for z in (p, q))
        sides = [(p[row, v], q[row, v]) for v in common] + [(rest, other_rest)]
        divergences.append(sum(np.exp(a) * (a - b) for a, b in sides))
    spread = spread_between(one, other)
    assert spread.positions == 20
    assert spread.largest == pytest.approx(largest, abs=1e-5)
    assert spread.kl == pytest.approx(np.mean(divergences), abs=1e-5)
    assert spread_between(one, one) == Spread(20, 0.0, 0.0)


def test_a_teacher_that_differs_each_time_is_refused(tiny: Tiny) -> None:
    plan = _plan(tiny, "unused")
    model = steps.load_teacher(plan.export, CPU)
    assert measure_spread(plan, model, World())[1:] == (0.0, 0.0)
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"gives other log-probabilities each time, by up to .* wanted at most max_sp"):
        measure_spread(plan, Noisy(model, 0.3), World())
    accepted = measure_spread(_plan(tiny, "unused", max_spread=2.0), Noisy(model, 0.3), World())
    assert 0.1 < accepted.largest < 1.2
    assert 0 < accepted.kl < 0.1
    with pytest.raises(UsageError, match="by up to nan nats"):
        measure_spread(plan, Noisy(model, float("nan")), World())


@dataclass
class RoundedTail:
    """A server whose entries repeat, but for the rounding of their sum."""

    tails: list[float]
    device: torch.device = CPU

    def scores(self, tokens: Tensor, document_ids: Tensor, selection: Selection) -> TeacherScores:
        del tokens
        n, K = document_ids.numel(), selection.top_k
        tail = torch.full((n,), self.tails.pop()).log()
        entries = torch.arange(K).expand(n, K), torch.full((n, K), 1 / K).log()
        return TeacherScores(*entries, tail, torch.zeros(n), torch.zeros(n, 0), torch.zeros(n, 0), torch.zeros(n, 0))


def test_the_rounding_of_a_servers_tail_is_no_difference(tiny: Tiny) -> None:
    plan = _plan(tiny, "unused")
    assert measure_spread(plan, RoundedTail([1e-6, 3e-5]), World()).largest < 0.05
    with pytest.raises(UsageError, match="gives other log-probabilities each time"):
        measure_spread(plan, RoundedTail([0.01, 0.02]), World())


def test_a_cache_without_a_window_is_named(tiny: Tiny) -> None:
    plan = replace(_plan(tiny, "unused"), windows=[])
    with pytest.raises(UsageError, match="the train split has no window"):
        measure_spread(plan, RoundedTail([]), World())


def test_what_was_measured_stands_in_the_manifest_and_changes_no_byte(tiny: Tiny) -> None:
    plan = _plan(tiny, "recorded")
    assert not record_or_check_plan(plan)
    model = steps.load_teacher(plan.export, CPU)
    for number in range(2):  # as after an interruption
        record_scoring(plan, model, Spread(64, 0.25 * number, 0.0), 1 + number)
    steps.write_missing_shards(plan, model, steps.make_tables(plan, model), 0, 1)
    made = write_manifest(plan).made
    assert [(start["ranks"], start["spread"]) for start in made["scored_by"]] == [(1, 0.0), (2, 0.25)]
    assert not (plan.folder / SCORED_BY_FILE).exists()
    assert bytes_of(plan.folder) == bytes_of(tiny.train)


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": 1}', '{"starts": [1]}', "{}"])
def test_a_damaged_record_is_named(tiny: Tiny, text: str) -> None:
    plan = _plan(tiny, "damaged")
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / SCORED_BY_FILE).write_text(text)
    with pytest.raises(UsageError, match=SCORED_BY_FILE):
        record_scoring(plan, steps.load_teacher(plan.export, CPU), Spread(1, 0.0, 0.0), 1)
