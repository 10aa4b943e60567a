"""Scoring of planned windows into records: the teacher runs batch by batch, some batches ahead of the writer.

The plan fixes how windows are batched, and one thread computes each batch. Neither ranks nor threads nor interruptions
change a bit of the result.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from data.cache.record import Array, Record
from data.corpus.windows import Window
from data.export.plan import CachePlan
from data.teacher.scorer import AnyScorer, ranks_of, score_rows
from data.worker_processes import map_in_order
from kd_core.parallel.world import use_device

LOOKAHEAD = 8  # batches that may be under way while a block is written


def _begin_thread(device: torch.device) -> None:
    torch.set_num_threads(1)
    use_device(device)


@contextmanager
def scoring_threads(model: AnyScorer) -> Generator[Executor]:
    """Yields an executor of as many threads as torch uses. Each of them computes its batches alone.

    A kernel that is split over threads may add up in another order. With one thread each, batches have the same bits
    on any number of cores and ranks. This is no slower. A GPU gets one thread.

    A teacher that is shared with other ranks also gets one, because its passes are collectives: all ranks must issue
    them in the same order.
    """
    before = torch.get_num_threads()
    threads = before if model.device.type == "cpu" and not ranks_of(model).is_shared else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=_begin_thread, initargs=(model.device,)) as executor:
            yield executor
    finally:
        torch.set_num_threads(before)


def window_uniforms(plan: CachePlan, number: int) -> Array:
    """Returns the uniform random numbers [T, draws] of a window's samples.

    They are a function of the seed and the window itself, so neither batches nor ranks change them.
    """
    window = plan.windows[number]
    seeds = [plan.export.seed, window.start, *window.document.encode()]
    return np.random.default_rng(seeds).random((window.positions, plan.export.selection.draws))


class _TeacherRow(NamedTuple):
    """The tokens that the teacher reads for a window, and where its scores are among theirs.

    Without a context of its own, the teacher reads the window. Otherwise it reads that context and the completion, and
    scores of the window's positions from `first` on are `shift` further on. Those before `first` have none.
    """

    token_ids: Array
    first: int
    shift: int

    @classmethod
    def from_window(cls, window: Window) -> "_TeacherRow":
        """Returns the row of a window."""
        if window.context is None:
            return cls(window.token_ids, 0, 0)
        # Label `first` is the first one that is scored: token first + 1, behind `context` in the teacher's row.
        first = int(window.loss_mask.argmax())
        tokens = np.concatenate([window.context, window.token_ids[first + 1 :]])
        return cls(tokens, first, len(window.context) - 1 - first)

    def align(self, field: Array, filler: float) -> Array:
        """Returns a field of the teacher's positions as one of the window's, with `filler` where there is no score."""
        scored = field[self.first + self.shift : len(self.token_ids) - 1]
        return np.concatenate([np.full((self.first, *scored.shape[1:]), filler, scored.dtype), scored])


# A position without a score has no entry and no sample, and its tail is everything: the fewest bytes that are valid.
NOT_SCORED = {"log_probs": -np.inf, "sampled_log_weights": -np.inf}


def _make_record(plan: CachePlan, number: int, scores: dict[str, Array]) -> Record:
    """Returns the record of a window from its scores [T, …]."""
    window, selection = plan.windows[number], plan.export.selection
    return Record(
        name=f"{number:08d}",
        document=window.document,
        start=window.start,
        token_ids=np.asarray(window.token_ids, np.int32),
        loss_mask=np.asarray(window.loss_mask, np.uint8),
        topk_token_ids=scores["ids"],
        topk_log_probs=scores["log_probs"],
        tail_log_prob=scores["tail_log_prob"],
        label_log_prob=scores["label_log_prob"],
        tempered_tails={t: scores["tempered_tails"][:, i] for i, t in enumerate(selection.tail_temperatures)},
        sampled_token_ids=scores["sampled_ids"] if selection.draws else None,
        sampled_log_weights=scores["sampled_log_weights"] if selection.draws else None,
    )


def score_batch(model: AnyScorer, plan: CachePlan, batch: range) -> list[Record]:
    """Scores the windows of these numbers together, and returns their records."""
    # Pad the rows to the longest. One of n + 1 tokens has n positions.  tokens [B, T + 1], documents [B, T]
    rows, device = [_TeacherRow.from_window(plan.windows[i]) for i in batch], model.device
    T = max(len(row.token_ids) for row in rows) - 1
    tokens = torch.zeros(len(rows), T + 1, dtype=torch.int64)
    documents = torch.full((len(rows), T), -1, dtype=torch.int64)
    uniforms = torch.zeros(len(rows), T, plan.export.selection.draws, dtype=torch.float64)
    for index, (row, number) in enumerate(zip(rows, batch, strict=True)):
        end = len(row.token_ids) - 1
        tokens[index, : end + 1] = torch.from_numpy(row.token_ids)
        documents[index, :end] = index
        if uniforms.shape[2]:
            numbers = torch.from_numpy(window_uniforms(plan, number))
            uniforms[index, row.first + row.shift : end] = numbers[row.first :]
    # Score all positions [B·T, …], then cut each row's real positions out again.  [B, T, …]
    flat_uniforms = uniforms.flatten(0, 1).to(device)
    scores = score_rows(model, tokens.to(device), documents.to(device), plan.export.selection, flat_uniforms)
    fields = {name: field.unflatten(0, documents.shape).cpu().numpy() for name, field in scores._asdict().items()}
    return [
        _make_record(plan, number, {n: row.align(f[i], NOT_SCORED.get(n, 0)) for n, f in fields.items()})
        for i, (row, number) in enumerate(zip(rows, batch, strict=True))
    ]


def score_windows(executor: Executor, model: AnyScorer, plan: CachePlan, runs: Iterable[range]) -> Iterator[Record]:
    """Yields the records of each run's windows in order. A batch never holds windows of two runs."""
    rows = plan.batch_rows
    batches = (run[start : start + rows] for run in runs for start in range(0, len(run), rows))
    for records in map_in_order(executor, partial(score_batch, model, plan), batches, ahead=LOOKAHEAD):
        yield from records


def count_batches(plan: CachePlan, runs: Sequence[range]) -> int:
    """Returns how many batches `score_windows` makes of the runs."""
    return sum(-(-len(run) // plan.batch_rows) for run in runs)


def pass_along(executor: Executor, model: AnyScorer, plan: CachePlan, passes: int) -> None:
    """Makes so many passes for the ranks that still score, which gather weights from this one. Nothing is kept."""
    for _ in range(passes):
        executor.submit(score_batch, model, plan, range(1)).result()
