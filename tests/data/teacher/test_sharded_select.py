"""Selection from slices of the vocabulary on several ranks: the scores of one rank, and of float64."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.select import select_entries
from data.teacher.vocab_slices import VocabSlice
from kd_core.parallel.world import World
from tests.ranks import run_ranks
from tests.reference.teacher_scores import check_scores

SELECTIONS = [
    Selection(8),
    Selection(40, min_prob=3e-3, tail_temperatures=(2.0,)),
    Selection(16, mass=0.8, tail_temperatures=(0.5, 3.0)),
    Selection(0, draws=30, tail_temperatures=(2.0,)),
    Selection(8, draws=30),
    Selection(40, min_prob=0.05, draws=30, proposal_temperature=2.0),
    Selection(4, mass=0.6, draws=30, proposal_temperature=0.8),
]
LOG_ERROR = 2e-5  # nats between float32 and float64, or between one slice and several. Seen: 6e-6


def _positions(V: int) -> Tensor:
    """Peaked and flat positions, ties, logits of −inf, and entries that are all in one slice."""
    random = torch.Generator().manual_seed(V)
    scale = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1])[:, None]
    logits = torch.cat([scale * torch.randn(5, V, generator=random) for _ in range(4)])
    logits[1] = logits[1].round()  # many equal ones
    logits[2, V // 3 :] -= 60.0  # everything is in the first slice
    logits[3, : max(0, V // 2 - 30)] = -torch.inf  # in wide vocabularies, nothing is in the first slice
    return logits


def _slice(logits: Tensor, rank: int, ranks: int, padded: int) -> tuple[Tensor, int]:
    """A rank's columns as a tensor-parallel lm_head of `padded` rows has them."""
    size = math.ceil(padded / ranks)
    first = rank * size
    columns = logits[:, first : first + size].clone()
    return (columns if columns.shape[1] else logits.new_full((len(logits), 1), -torch.inf)), first


def _compare_with_one_rank(world: World, V: int, padded: int) -> None:
    logits, random = _positions(V), torch.Generator().manual_seed(1)
    group = dist.group.WORLD
    assert group is not None
    for selection in SELECTIONS:
        if selection.top_k >= V:
            continue
        labels = torch.arange(len(logits))
        uniforms = torch.rand(len(logits), selection.draws, generator=random, dtype=torch.float64)
        one = select_entries(logits.clone(), labels, selection, uniforms)
        columns, first = _slice(logits, world.rank, world.size, padded)
        several = select_entries(columns, labels, selection, uniforms, VocabSlice(first, group))
        check_scores(several, logits, labels, uniforms, selection, LOG_ERROR)
        different = [row for row in range(len(logits)) if set(one.ids[row].tolist()) != set(several.ids[row].tolist())]
        assert set(different) <= {1, 6, 11, 16}, "only rounded logits have ties"
        same = torch.tensor([row not in different for row in range(len(logits))])
        for name in ("log_probs", "tail_log_prob", "label_log_prob", "tempered_tails", "sampled_log_weights"):
            pair = (getattr(scores, name)[same] for scores in (one, several))
            torch.testing.assert_close(*pair, atol=LOG_ERROR, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(one.sampled_ids[same], several.sampled_ids[same])
        # Every rank has the same scores, to the bit.
        for field in several:
            fields = [torch.empty_like(field) for _ in range(world.size)]
            dist.all_gather(fields, field.contiguous())
            assert all(torch.equal(field, other) for other in fields)


def _compare(world: World) -> None:
    for V, padded in ((5003, 5003), (700, 720), (47, 47), (47, 90)):
        _compare_with_one_rank(world, V, padded)


def test_slices_give_the_scores_of_one_rank_and_of_float64() -> None:
    """Also where a slice has less columns than entries, and where its columns are all padding."""
    run_ranks(3, _compare)
