"""Export of a teacher's planned windows as a cache:

    pilot: the first windows ─► tables
    windows (plan.py) ─ teacher (scoring.py) ─► records ─► blocks (block_encoders.py) ─► tars
                                                               tars ─ read back ─► indexes ─► manifest (receipts.py)

A shard is the unit of work: rank r of n writes shards r, r + n, …, reads each back, and writes its index. A shard that
is on the storage is not made again. Ranks share nothing but the storage. The plan and the tables fix what a shard
holds, so neither ranks nor interruptions change its bytes.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from data.cache.alignment import check_alignment
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.manifest_fields import MAX_TABLES_BYTES, TABLES_FILE
from data.cache.record import Record
from data.cache.writer import write_shard, write_tables
from data.export.block_encoders import BlockJob, EncoderSettings, block_encoders
from data.export.draw import no_window
from data.export.plan import CachePlan, TeacherExport
from data.export.planned_shards import PlannedShard
from data.export.receipts import read_receipt, verify_earlier_shards, verify_shard
from data.export.scoring import score_windows, scoring_threads
from data.stream.shards import read_tables
from data.teacher.choose_scorer import load_scorer
from data.teacher.scorer import Scorer
from kd_core.errors import UsageError
from kd_core.hub import local_folder
from kd_core.precision import dtype_of

PILOT_POSITIONS = 65_536
MOST_ENCODERS = 4  # processes, of about 50,000 positions a second each


def load_teacher(export: TeacherExport, device: torch.device) -> Scorer:
    """Returns the export's teacher, loaded and ready to score."""
    return load_scorer(local_folder(export.teacher), export.scorer, dtype_of(export.dtype, device), device)


def _progress_bar(plan: CachePlan, words: str, total: int, done: int, hidden: bool) -> "tqdm[NoReturn]":
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=1,
                desc=f"{words} {plan.identity['split']}", disable=hidden)  # fmt: skip


def _count_positions(records: Iterable[Record], bar: "tqdm[NoReturn]") -> Iterator[Record]:
    for record in records:
        yield record
        bar.update(record.positions)


def make_tables(plan: CachePlan, model: Scorer) -> list[Record]:
    """Scores the first windows, writes the cache's tables from them, and returns their records.

    Returns nothing and scores nothing where the tables are already there. The pilot ends at the end of a batch of the
    first shard, so its records are the same as those that the shard will hold.
    """
    if plan.storage.size(TABLES_FILE) is not None:
        return []
    first = next(plan.each_shard(), None)
    if first is None:
        raise no_window(plan.export, plan.identity["split"])
    windows, rows = first.windows, plan.batch_rows
    ends = np.cumsum([plan.windows[i].positions for i in windows])
    # Take whole batches, at least one, of at most PILOT_POSITIONS positions: a batch's records are reused as they are.
    fitting = int(np.searchsorted(ends, PILOT_POSITIONS, side="right"))
    whole_batches = fitting // rows * rows
    pilot_windows = windows if whole_batches >= len(windows) else windows[: max(rows, whole_batches)]
    total = sum(plan.windows[i].positions for i in pilot_windows)
    with _progress_bar(plan, "pilot on", total, 0, False) as bar, scoring_threads(model.device) as executor:
        pilot = list(_count_positions(score_windows(executor, model, plan, [pilot_windows]), bar))
    check_alignment(pilot, str(plan.folder))
    write_tables(plan.storage, fit_tables(pilot, plan.teacher.vocab_size, plan.expected_positions))
    return pilot


def _read_coding(plan: CachePlan) -> Coding:
    tables = read_tables(plan.folder, file_facts(plan.storage.read(TABLES_FILE, MAX_TABLES_BYTES)))
    return Coding(tables, plan.export.selection, plan.export.codec)


def _encoder_processes(device: torch.device) -> int:
    """Returns how many processes encode blocks. On a CPU there are none, because the teacher keeps its cores busy."""
    return 0 if device.type == "cpu" else min(MOST_ENCODERS, torch.get_num_threads() - 1)


def write_missing_shards(
    plan: CachePlan, model: Scorer, pilot: Sequence[Record], rank: int, ranks: int, encoders: int | None = None
) -> None:
    """Makes this rank's share of the missing shards, and the indexes of its shards that have none.

    The teacher goes on scoring while a shard is written and read back.

    Args:
        plan: the plan of the cache.
        model: the teacher.
        pilot: the records of `make_tables`.
        rank: this rank, of so many `ranks`.
        encoders: how many processes encode blocks, by default as many as suit the device. 0 encodes in this one.

    Raises:
        UsageError: a shard is damaged, or does not hold the planned windows.
    """
    coding = _read_coding(plan)
    verify_earlier_shards(plan, coding, rank, ranks)
    settings = EncoderSettings(coding, plan.export.max_codec_kl)
    bar = _progress_bar(plan, "teacher on", plan.expected_positions // ranks, 0, rank != 0)
    late: list[UsageError] = []
    missing = _missing_shards(plan, coding, rank, ranks, bar, late)
    first = next(missing, None)
    if first is None:
        bar.close()
        if late:
            raise late[0]
        return
    processes = _encoder_processes(model.device) if encoders is None else encoders
    with (
        bar,
        scoring_threads(model.device) as executor,
        block_encoders(settings, processes) as encode,
    ):
        # The pilot has already scored the first windows of the first shard. Ranks above 0 get an empty pilot.
        scored = pilot if first.blocks[0].start == 0 else []
        to_score, to_encode, to_write = itertools.tee(itertools.chain([first], missing), 3)
        ranges = (s.windows[len(scored) :] if s.windows.start == 0 else s.windows for s in to_score)
        records = _count_positions(itertools.chain(scored, score_windows(executor, model, plan, ranges)), bar)
        # One stream of blocks for all shards, so that the next shard is encoded while one is written.
        encoded = encode(
            BlockJob(plan.storage.url(shard.name), plan.first_record + block.start, [next(records) for _ in block])
            for shard in to_encode
            for block in shard.blocks
        )
        for shard in to_write:
            write_shard(plan.storage, shard.name, itertools.islice(encoded, len(shard.blocks)))
            verify_shard(plan, shard.name, coding, shard)
    if late:
        raise late[0]


def _missing_shards(
    plan: CachePlan, coding: Coding, rank: int, ranks: int, bar: "tqdm[NoReturn]", late: list[UsageError]
) -> Iterator[PlannedShard]:
    """Yields this rank's share of the shards that are not there, as windows appear. `bar` counts the other ones.

    A shard that is there without a valid index is read back, and gets one.

    An error of the corpus ends them, and goes to `late`, so that shards before it are written.
    """
    shards, present = itertools.islice(plan.each_shard(), rank, None, ranks), set(plan.storage.names())
    while True:
        try:
            shard = next(shards, None)
        except UsageError as error:
            late.append(error)
            return
        if shard is None:
            return
        if shard.name not in present:
            yield shard
            continue
        if read_receipt(plan, shard.name, shard) is None:
            verify_shard(plan, shard.name, coding, shard)
        positions = sum(plan.windows[i].positions for i in shard.windows)
        bar.initial += positions
        bar.update(positions)
