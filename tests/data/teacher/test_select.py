"""What a selection keeps of a distribution, against plain float64 over the whole vocabulary."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.cache.selection import Selection
from data.teacher.select import BLOCK, TeacherScores, largest_logits, select_entries

V = 700  # two whole runs of neighbours and a rest


def _logits(rows: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(rows, V) * 3
    logits[0] *= 5  # peaked
    logits[1] = 0.0  # flat, and all equal
    return logits


def _scores(logits: Tensor, selection: Selection, seed: int = 0) -> TeacherScores:
    uniforms = torch.from_numpy(np.random.default_rng(seed).random((len(logits), selection.draws)))
    return select_entries(logits.clone(), torch.arange(len(logits)), selection, uniforms)


SELECTIONS = [
    Selection(8),
    Selection(64, min_prob=3e-3),
    Selection(64, mass=0.8),
    Selection(16, min_prob=0.01, mass=0.5, tail_temperatures=(2.0, 0.5)),
    Selection(0, draws=20, tail_temperatures=(3.0,)),
    Selection(8, min_prob=0.05, draws=20),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=Selection.words)
def test_head_tail_and_label_are_those_of_float64(selection: Selection) -> None:
    logits = _logits(6)
    truth = torch.log_softmax(logits.double(), dim=1)
    found = _scores(logits, selection)
    for row in range(len(logits)):
        ranked = truth[row].sort(descending=True, stable=True).values
        before = ranked.exp().cumsum(0) - ranked.exp()
        wanted = (torch.arange(V) < selection.top_k) & (before < selection.mass)
        if selection.min_prob:
            wanted &= ranked >= np.log(selection.min_prob)
        used = found.log_probs[row] > -torch.inf
        assert int(used.sum()) == int(wanted.sum())
        kept = found.ids[row][used]
        torch.testing.assert_close(found.log_probs[row][used].double(), truth[row, kept], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(truth[row, kept].sort(descending=True).values, ranked[wanted], atol=1e-5, rtol=0)
        rest = torch.ones(V, dtype=torch.bool)
        rest[kept] = False
        assert found.tail_log_prob[row].item() == pytest.approx(truth[row, rest].logsumexp(0).item(), abs=1e-4)
        for index, temperature in enumerate(selection.tail_temperatures):
            tempered = (truth[row, rest] / temperature).logsumexp(0).item()
            assert found.tempered_tails[row, index].item() == pytest.approx(tempered, abs=1e-4)
        assert found.label_log_prob[row].item() == pytest.approx(truth[row, row].item(), abs=1e-4)


@pytest.mark.parametrize(
    "selection",
    [
        Selection(0, draws=40),
        Selection(4, draws=40),
        Selection(8, mass=0.5, draws=40),
        Selection(0, draws=40, proposal_temperature=2.0),
        Selection(4, min_prob=0.02, draws=40, proposal_temperature=0.8),
    ],
    ids=Selection.words,
)
def test_samples_estimate_every_token_without_bias(selection: Selection) -> None:
    """The mean over many draws of head and weights is p; tokens of which little is expected are taken together."""
    logits, repeats = _logits(5), 400
    truth = torch.softmax(logits.double(), dim=1)
    total, square = torch.zeros_like(truth), torch.zeros_like(truth)
    for seed in range(repeats):
        found = _scores(logits, selection, seed)
        estimate = torch.zeros_like(truth)
        estimate.scatter_add_(1, found.ids, found.log_probs.double().exp())
        estimate.scatter_add_(1, found.sampled_ids, found.sampled_log_weights.double().exp())
        total += estimate
        square += estimate**2
    mean = total / repeats
    spread = (square / repeats - mean**2).clamp(min=0).sqrt() / repeats**0.5
    often = truth * selection.draws * repeats > 30
    assert ((mean - truth).abs()[often] <= 5 * spread[often] + 1e-5).all()
    rare, rare_truth = (torch.where(often, 0.0, side).sum(dim=1) for side in (mean, truth))
    torch.testing.assert_close(rare, rare_truth, atol=0.02, rtol=0.1)


def test_equal_draws_are_stored_once_and_weigh_as_often() -> None:
    logits = torch.full((1, V), -30.0)
    logits[0, [3, 650]] = 0.0
    found = _scores(logits, Selection(0, draws=10))
    used = found.sampled_log_weights[0] > -torch.inf
    assert found.sampled_ids[0][used].tolist() == [3, 650]
    times = found.sampled_log_weights[0][used].exp() * 10
    torch.testing.assert_close(times, times.round(), atol=1e-4, rtol=0)
    assert times.sum().item() == pytest.approx(10, abs=1e-4)


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_weight() -> None:
    logits = torch.full((2, V), -torch.inf)
    logits[0, [10, 20]] = 0.0
    logits[1, [255, 256, 699]] = 0.0
    ends = torch.tensor([[0.0, np.nextafter(1.0, 0.0)]] * 2, dtype=torch.float64)
    found = select_entries(logits.clone(), torch.tensor([10, 255]), Selection(0, draws=2), ends)
    assert found.sampled_ids.tolist() == [[10, 20], [255, 699]]


@pytest.mark.parametrize("V", [700, 2 * 9 * BLOCK - 1, 2 * 9 * BLOCK, 5003, 1])
@pytest.mark.parametrize("levels", [None, 40, 1])  # how many different logits there are: many equal ones, all equal
def test_the_largest_logits_are_those_of_a_whole_sort(V: int, levels: int | None) -> None:
    torch.manual_seed(V)
    logits = torch.randn(50, V) if levels is None else torch.randint(levels, (50, V)).float()
    logits[0, V // 2 :] = -torch.inf
    k = min(9, V)
    values, ids = largest_logits(logits, k)
    assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())


def test_two_passes_read_the_vocabulary() -> None:
    class Passes(TorchDispatchMode):
        """Operations on all logits, but for those that touch some of their columns, or only change their shape."""

        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            is_whole = isinstance(args[0], Tensor) and args[0].numel() == logits.numel()
            if is_whole and name not in {"gather", "scatter_", "slice", "view", "alias", "new_zeros"}:
                self.names.append(name)
            return func(*args, **(kwargs or {}))

    logits = torch.randn(4, 1600 * BLOCK)
    with Passes() as passes:
        select_entries(logits, torch.zeros(4, dtype=torch.int64), Selection(8), torch.zeros(4, 0))
    assert passes.names == ["amax", "softmax"]
