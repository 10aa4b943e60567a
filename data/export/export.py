"""Planned windows in, a cache out:

    shards of windows (plan.py) ─ teacher ─► records ─► tar by tar ─► manifest

A shard is the unit of work: rank r of n writes shards r, r + n, …; one that is there is not made again. What
a shard holds, and how its windows are batched, is fixed by the plan, so neither ranks nor interruptions change
its bytes.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from data.cache.alignment import check_alignment
from data.cache.manifest import Manifest, Shard
from data.cache.schema import Record
from data.cache.writer import write_shard
from data.export.huggingface import local_folder
from data.export.plan import DTYPES, CachePlan, TeacherExport
from data.export.scorers import load_scorer
from data.export.teacher import Scorer, score
from data.export.windows import Window
from data.stream.shards import decode_all
from kd_core.errors import UsageError
from kd_core.files import sha256

LOOKAHEAD = 8  # batches begun while a shard is written
T = TypeVar("T")
R = TypeVar("R")


def load_teacher(export: TeacherExport, device: torch.device) -> Scorer:
    """The teacher, ready to score."""
    return load_scorer(local_folder(export.teacher), export.scorer, DTYPES[export.dtype], device)


class _Together(NamedTuple):
    """Windows that are scored together: their shard, and the number of the first."""

    shard: str
    first: int
    windows: Sequence[Window]

    @property
    def positions(self) -> int:
        """Positions, without padding."""
        return sum(len(window.token_ids) - 1 for window in self.windows)


class _Scored(NamedTuple):
    """A batch with each field of its scores as [rows, T, …]."""

    batch: _Together
    fields: list[np.ndarray[Any, Any]]


def _score(model: Scorer, top_k: int, batch: _Together) -> _Scored:
    device, windows = model.device, batch.windows
    longest = max(len(window.token_ids) for window in windows)
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    documents = torch.full((len(windows), longest - 1), -1, dtype=torch.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window.token_ids)] = torch.from_numpy(window.token_ids)
        documents[row, : len(window.token_ids) - 1] = row
    scores = score(model, tokens.to(device), documents.to(device), top_k)
    return _Scored(batch, [field.unflatten(0, documents.shape).cpu().numpy() for field in scores])


def _records(scored: _Scored) -> Iterator[Record]:
    for row, window in enumerate(scored.batch.windows):
        positions = len(window.token_ids) - 1
        ids, log_probs, tail, label = (field[row, :positions] for field in scored.fields)
        yield Record(
            name=f"{scored.batch.first + row:08d}",
            document=window.document,
            start=window.start,
            token_ids=np.asarray(window.token_ids, np.uint32),
            loss_mask=window.loss_mask,
            topk_token_ids=ids,
            topk_log_probs=log_probs,
            tail_log_prob=tail,
            label_log_prob=label,
        )


@contextmanager
def scoring_threads(device: torch.device) -> Generator[Executor]:
    """As many threads as this process has cores, each computing alone.

    A kernel that is split over threads may add up in another order: scored by one thread each, batches have the
    same bits on any number of cores and ranks. It is no slower. A GPU gets one thread.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as executor:
            yield executor
    finally:
        torch.set_num_threads(threads)


def _in_order(executor: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results of `work` in the order of `items`, with at most `ahead` items begun beyond the one that is taken."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(executor.submit(work, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _batches(plan: CachePlan, shards: Sequence[tuple[str, int]], rows: int) -> Iterator[_Together]:
    for name, first in shards:
        part = plan.windows[first : first + plan.plan["records_per_shard"]]
        for at in range(0, len(part), rows):
            yield _Together(name, first + at, part[at : at + rows])


def write_missing_shards(plan: CachePlan, export: TeacherExport, model: Scorer, rank: int, ranks: int) -> None:
    """Score and write this rank's share of the shards that are not there; the teacher goes on while one is written."""
    own = [shard for i, shard in enumerate(plan.shards()) if i % ranks == rank]
    missing = [(name, first) for name, first in own if not (plan.folder / name).exists()]
    sizes = {name: sum(batch.positions for batch in _batches(plan, [(name, first)], 1)) for name, first in own}
    there = sum(sizes.values()) - sum(sizes[name] for name, _ in missing)
    bar = tqdm(total=sum(sizes.values()), initial=there, unit="tok", unit_scale=True, mininterval=1,
               desc=f"teacher on {plan.plan['split']}", disable=rank != 0)  # fmt: skip

    def records(scored: Iterable[_Scored]) -> Iterator[Record]:
        for each in scored:
            yield from _records(each)
            bar.update(each.batch.positions)

    with bar, scoring_threads(model.device) as executor:
        batches = _batches(plan, missing, export.batch_rows)
        scored = _in_order(executor, partial(_score, model, export.top_k), batches, ahead=LOOKAHEAD)
        for name, of_shard in groupby(scored, key=lambda each: each.batch.shard):
            write_shard(plan.folder / name, records(of_shard))


def finish(plan: CachePlan, export: TeacherExport) -> Manifest:
    """Read every shard back, strictly, and write the manifest of what was read."""
    shards: list[Shard] = []
    nll = mass = 0.0
    scored = 0
    for name, start in plan.shards():
        path = plan.folder / name
        records = decode_all(path, plan.teacher.vocab_size)
        wanted = [len(w.token_ids) - 1 for w in plan.windows[start : start + export.records_per_shard]]
        lengths = [record.positions for record in records]
        if lengths != wanted:
            raise UsageError(f"{path}: holds records of {lengths} positions, wanted {wanted}. Delete it and run again.")
        check_alignment(records, str(path))
        for record in records:
            mask = record.loss_mask.astype(np.float64)
            scored += int(mask.sum())
            nll -= float((record.label_log_prob * mask).sum())
            mass += float((np.exp(record.topk_log_probs.astype(np.float64)).sum(axis=1) * mask).sum())
        shards.append(Shard(name, path.stat().st_size, sha256(path), tuple(lengths)))
    manifest = Manifest(
        vocab_size=plan.teacher.vocab_size,
        tokenizer=plan.plan["tokenizer"],
        teacher={**plan.plan["teacher"], "architecture": plan.teacher.architecture, "dtype": export.dtype},
        top_k=export.top_k,
        row_length=export.row_length,
        codec="zstd of plain arrays, lossless",
        statistics={"teacher_nll": nll / scored, "teacher_mass": mass / scored},
        plan=plan.plan,
        shards=tuple(shards),
    )
    manifest.write(plan.folder)
    return manifest
