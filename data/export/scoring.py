"""Scoring of planned windows into records: the teacher runs batch by batch, some batches ahead of the writer.

The plan fixes how windows are batched, and one thread computes each batch. Neither ranks nor threads nor interruptions
change a bit of the result.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from data.cache.record import Array, Record
from data.export.plan import CachePlan
from data.parallel import map_in_order
from data.teacher.scorer import Scorer, score_rows

LOOKAHEAD = 8  # batches that may be under way while a block is written


@contextmanager
def scoring_threads(device: torch.device) -> Generator[Executor]:
    """Yields an executor of as many threads as torch uses. Each of them computes its batches alone.

    A kernel that is split over threads may add up in another order. With one thread each, batches have the same bits
    on any number of cores and ranks. This is no slower. A GPU gets one thread.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as executor:
            yield executor
    finally:
        torch.set_num_threads(threads)


def window_uniforms(plan: CachePlan, number: int) -> Array:
    """Returns the uniform random numbers [T, draws] of a window's samples.

    They are a function of the seed and the window itself, so neither batches nor ranks change them.
    """
    window = plan.windows[number]
    seeds = [plan.export.seed, window.start, *window.document.encode()]
    return np.random.default_rng(seeds).random((window.positions, plan.export.selection.draws))


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


def score_batch(model: Scorer, plan: CachePlan, batch: range) -> list[Record]:
    """Scores the windows of these numbers together, and returns their records."""
    # Pad the windows to the longest. A window of n + 1 tokens has n positions.  tokens [B, T + 1], documents [B, T]
    windows, device = [plan.windows[i] for i in batch], model.device
    T = max(window.positions for window in windows)
    tokens = torch.zeros(len(windows), T + 1, dtype=torch.int64)
    documents = torch.full((len(windows), T), -1, dtype=torch.int64)
    uniforms = torch.zeros(len(windows), T, plan.export.selection.draws, dtype=torch.float64)
    for row, (window, number) in enumerate(zip(windows, batch, strict=True)):
        tokens[row, : window.positions + 1] = torch.from_numpy(window.token_ids)
        documents[row, : window.positions] = row
        if uniforms.shape[2]:
            uniforms[row, : window.positions] = torch.from_numpy(window_uniforms(plan, number))
    # Score all positions [B·T, …], then cut each row's real positions out again.  [B, T, …]
    flat_uniforms = uniforms.flatten(0, 1).to(device)
    scores = score_rows(model, tokens.to(device), documents.to(device), plan.export.selection, flat_uniforms)
    fields = {name: field.unflatten(0, documents.shape).cpu().numpy() for name, field in scores._asdict().items()}
    records: list[Record] = []
    for row, number in enumerate(batch):
        positions = slice(None, plan.windows[number].positions)
        records.append(_make_record(plan, number, {name: field[row, positions] for name, field in fields.items()}))
    return records


def score_windows(executor: Executor, model: Scorer, plan: CachePlan, runs: Sequence[range]) -> Iterator[Record]:
    """Yields the records of each run's windows in order. A batch never holds windows of two runs."""
    rows = plan.batch_rows
    batches = (run[start : start + rows] for run in runs for start in range(0, len(run), rows))
    for records in map_in_order(executor, partial(score_batch, model, plan), batches, ahead=LOOKAHEAD):
        yield from records
