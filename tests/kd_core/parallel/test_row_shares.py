"""Rows divided by position over ranks: attention, selected positions and counts against whole rows in one process."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_core.document_lengths import Documents
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.losses.token_selection import KeepUncertain
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.row_shares import DividedDocuments, RowShare, RowSlice
from kd_core.students.decoder.attention import attend
from kd_core.training.step import add_losses, batch_loss, count_tokens_and_damage
from tests.kd_core.parallel.test_layouts import PLAIN, ROWS, rows_of, student, tied
from tests.kd_core.students.dense_attention import dense_attention, dense_kernel
from tests.kd_core.students.test_packed_attention import PACKINGS, inputs
from tests.ranks import run_ranks

WINDOWS = (None, 1, 5, 64)


def in_documents(ids: Tensor, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """Output and gradients of queries, keys and values over whole rows, [B, H, T, d] each, by the dense oracle."""
    leaves = [x.detach().double().requires_grad_() for x in tensors[:3]]
    numbers = (ids + 100 * torch.arange(1, len(ids) + 1)[:, None]).flatten()
    flat = (x.transpose(1, 2).flatten(0, 1) for x in leaves)
    out, _ = dense_attention(*flat, numbers, 0.3, -1 if window is None else window - 1)
    out = out.unflatten(0, ids.shape).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].double())]


def shared_attention(world: World) -> None:
    """Values, and gradients that come back through the gather, by documents and by the kernel's operator."""
    share = world.with_layout(Parallel(context_parallel=world.size).layout(world.size)).row_share
    assert (share.rank, share.size) == (world.rank, world.size)
    tolerances, packings = {torch.float64: 1e-12, torch.bfloat16: 2**-7}, map(torch.tensor, PACKINGS.values())
    with pytest.MonkeyPatch.context() as patch:
        kernel = dense_kernel(patch)
        for ids, window, dtype in itertools.product(packings, WINDOWS, tolerances):
            tensors = inputs(ids, 6, 2, dtype)
            own = [share.cut(x, dim=2) for x in tensors]
            documents = DividedDocuments.from_documents(Documents.from_ids(ids), replace(share, rows=len(ids)))
            leaves = [x.detach().requires_grad_() for x in own[:3]]
            out = attend(*leaves, documents, 0.3, window)
            found = [out, *torch.autograd.grad(out, leaves, own[3].to(out.dtype))]
            for one, other in zip(found, in_documents(ids, tensors, window), strict=True):
                wanted = share.cut(other, dim=2)
                assert (one - wanted).norm() <= tolerances[dtype] * (1 + wanted.norm()), (ids, window)
        # One call for each slice, in bfloat16 alone.
        assert len(kernel.calls) == 2 * len(PACKINGS) * len(WINDOWS)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_attention_over_divided_rows(ranks: int) -> None:
    run_ranks(ranks, shared_attention)


@pytest.mark.parametrize("more", [(), (0.5,), (None, torch.linspace(-1, 1, 6).double())], ids=["", "cap", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_attention_of_any_slice_of_rows(packing: str, window: int | None, more: tuple[Any, ...]) -> None:
    """Also of slices that no layout makes. With capped products or sinks, those of whole rows are the oracle."""
    ids = torch.tensor(PACKINGS[packing])
    tensors = inputs(ids, 6, 2, torch.float64)
    wanted = in_documents(ids, tensors, window)[0]
    if more:
        wanted = attend(*tensors[:3], Documents.from_ids(ids), 0.3, window, *more)
    for positions in (range(40), range(1), range(7, 8), range(6, 31), range(39, 40)):
        part = RowSlice.from_documents(Documents.from_ids(ids), len(ids), positions)
        queries, keys, values = (
            x[:, :, positions.start : positions.stop] if x is tensors[0] else x for x in tensors[:3]
        )
        found = attend(queries, part.keys_of(keys), part.keys_of(values), part.documents, 0.3, window, *more)
        torch.testing.assert_close(found, wanted[:, :, positions.start : positions.stop], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_disjoint_and_join_to_whole_rows(size: int) -> None:
    whole = torch.arange(2 * 12).view(2, 12)
    shares = [RowShare(rank, size).cut(whole) for rank in range(size)]
    assert [share.shape for share in shares] == [(2, 12 // size)] * size
    assert torch.equal(RowShare(0, size).join(shares), whole)
    # Every rank has as many pairs of a query and a key before it, up to one pair a position.
    pairs = [int(share[0].sum()) for share in shares]
    assert max(pairs) == min(pairs)


SELECTING = {
    signal: Objective(
        {"kd": Distillation(weight=0.9, keep=KeepUncertain(0.3, signal)), "sft": CrossEntropy(weight=0.1)}
    )
    for signal in ("student_entropy", "teacher_entropy")
}


def selected(world: World) -> None:
    """Positions are selected among those of whole rows. Some teachers' entropies are equal."""
    whole = rows_of(0, range(ROWS))
    equal = torch.full_like(whole.topk_log_probs, math.log(0.1)), torch.full_like(whole.tail_log_prob, math.log(0.5))
    ties = torch.arange(whole.tokens.shape[1]) % 3 == 0
    whole = replace(
        whole, damaged_blocks=3, topk_log_probs=torch.where(ties[:, None], equal[0], whole.topk_log_probs),
        tail_log_prob=torch.where(ties, equal[1], whole.tail_log_prob),
    )  # fmt: skip
    parallel = replace(PLAIN, context_parallel=world.size)
    (alone, single), (model, laid_out) = student(tied, PLAIN, World()), student(tied, parallel, world)
    own = whole.divided(laid_out.row_share)
    assert own.tokens.numel() == whole.tokens.numel() // world.size
    assert count_tokens_and_damage([own], laid_out) == count_tokens_and_damage([whole], single)
    for objective in SELECTING.values():
        names = sorted(objective.sum_names())
        wanted = add_losses([batch_loss(alone, whole, objective, 1.0)], names, single)
        found = add_losses([batch_loss(model, own, objective, 1.0)], names, laid_out)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_positions_are_selected_and_counted_over_whole_rows() -> None:
    run_ranks(2, selected)
