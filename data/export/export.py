"""Export of a teacher's planned windows as a cache:

    pilot: the first windows ─► tables
    windows (plan.py) ─ teacher (scoring.py) ─► records ─► blocks (block_encoders.py) ─► tars ─ read back ─► manifest

A shard is the unit of work: rank r of n writes shards r, r + n, …, and reads them back. A shard that is on disk is not
made again. The plan and the tables fix what a shard holds, so neither ranks nor interruptions change its bytes.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from data.cache.alignment import check_alignment
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.manifest import TABLES_FILE, Block, Manifest, Shard, made_now
from data.cache.record import Record
from data.cache.totals import BlockSums, Totals
from data.cache.writer import file_size_and_hash, write_shard, write_tables
from data.export.block_encoders import BlockJob, EncoderSettings, block_encoders
from data.export.plan import CachePlan, TeacherExport
from data.export.planned_shards import PlannedShard
from data.export.scoring import score_windows, scoring_threads
from data.stream.shards import read_tables, read_written_blocks
from data.teacher.choose_scorer import load_scorer
from data.teacher.scorer import AnyScorer
from kd_core.errors import UsageError
from kd_core.files import sha256
from kd_core.hub import local_folder, pin_commit
from kd_core.precision import dtype_of

PILOT_POSITIONS = 65_536
MOST_ENCODERS = 4  # processes, of about 50,000 positions a second each


def load_teacher(export: TeacherExport, device: torch.device) -> AnyScorer:
    """Returns the export's teacher, loaded and ready to score."""
    dtype = dtype_of(export.dtype, device)
    return load_scorer(local_folder(export.teacher), export.scorer, dtype, device, export.vllm_settings)


def _progress_bar(plan: CachePlan, words: str, total: int, done: int, hidden: bool) -> "tqdm[NoReturn]":
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=1,
                desc=f"{words} {plan.identity['split']}", disable=hidden)  # fmt: skip


def _count_positions(records: Iterable[Record], bar: "tqdm[NoReturn]") -> Iterator[Record]:
    for record in records:
        yield record
        bar.update(record.positions)


def make_tables(plan: CachePlan, model: AnyScorer) -> list[Record]:
    """Scores the first windows, writes the cache's tables from them, and returns their records.

    Returns nothing and scores nothing where the tables are already on disk. The pilot ends at the end of a batch of the
    first shard, so its records are the same as those that the shard will hold.
    """
    path = plan.folder / TABLES_FILE
    if path.exists():
        return []
    windows, rows = plan.shards[0].windows, plan.batch_rows
    ends = np.cumsum([plan.windows[i].positions for i in windows])
    # Take whole batches, at least one, of at most PILOT_POSITIONS positions: a batch's records are reused as they are.
    fitting = int(np.searchsorted(ends, PILOT_POSITIONS, side="right"))
    whole_batches = fitting // rows * rows
    pilot_windows = windows if whole_batches >= len(windows) else windows[: max(rows, whole_batches)]
    total = sum(plan.windows[i].positions for i in pilot_windows)
    with _progress_bar(plan, "pilot on", total, 0, False) as bar, scoring_threads(model.device) as executor:
        pilot = list(_count_positions(score_windows(executor, model, plan, [pilot_windows]), bar))
    check_alignment(pilot, str(plan.folder))
    write_tables(path, fit_tables(pilot, plan.teacher.vocab_size, sum(w.positions for w in plan.windows)))
    return pilot


def _read_coding(plan: CachePlan) -> Coding:
    path = plan.folder / TABLES_FILE
    tables = read_tables(plan.folder, file_size_and_hash(path))
    return Coding(tables, plan.export.selection, plan.export.codec)


def _encoder_processes(device: torch.device) -> int:
    """Returns how many processes encode blocks. On a CPU there are none, because the teacher keeps its cores busy."""
    return 0 if device.type == "cpu" else min(MOST_ENCODERS, torch.get_num_threads() - 1)


def write_missing_shards(
    plan: CachePlan,
    model: AnyScorer,
    pilot: Sequence[Record],
    rank: int,
    ranks: int,
    encoders: int | None = None,
) -> None:
    """Scores and writes this rank's share of the missing shards. The teacher goes on scoring while one is written.

    Args:
        plan: the plan of the cache.
        model: the teacher.
        pilot: the records of `make_tables`.
        rank: this rank, of so many `ranks`.
        encoders: how many processes encode blocks, by default as many as suit the device. 0 encodes in this one.
    """
    rank_shards = plan.shards[rank::ranks]
    missing = [shard for shard in rank_shards if not (plan.folder / shard.name).exists()]
    settings = EncoderSettings(_read_coding(plan), plan.export.max_codec_kl)
    sizes = {shard.name: sum(plan.windows[i].positions for i in shard.windows) for shard in rank_shards}
    done = sum(sizes.values()) - sum(sizes[shard.name] for shard in missing)
    bar = _progress_bar(plan, "teacher on", sum(sizes.values()), done, rank != 0)
    processes = _encoder_processes(model.device) if encoders is None else encoders
    with (
        bar,
        scoring_threads(model.device) as executor,
        block_encoders(settings, processes if missing else 0) as encode,
    ):
        # The pilot has already scored the first windows of the first shard. Ranks above 0 get an empty pilot.
        scored = pilot if missing and missing[0] == plan.shards[0] else []
        window_ranges = [shard.windows for shard in missing]
        if scored:
            window_ranges[0] = window_ranges[0][len(scored) :]
        records = _count_positions(itertools.chain(scored, score_windows(executor, model, plan, window_ranges)), bar)
        # One stream of blocks for all shards, so that the next shard is encoded while one is written.
        encoded = encode(
            BlockJob(str(plan.folder / shard.name), plan.first_record + block.start, [next(records) for _ in block])
            for shard in missing
            for block in shard.blocks
        )
        for shard in missing:
            write_shard(plan.folder / shard.name, itertools.islice(encoded, len(shard.blocks)))


class ReadShard(NamedTuple):
    """A shard as it was read back: its entry in the manifest, and the sums of its blocks."""

    shard: Shard
    sums: list[BlockSums]


def _read_shard(plan: CachePlan, planned: PlannedShard, coding: Coding) -> ReadShard:
    path, blocks, sums = plan.folder / planned.name, list[Block](), list[BlockSums]()
    for written, windows in zip(read_written_blocks(path, coding), planned.blocks, strict=True):
        planned_lengths = tuple(plan.windows[i].positions for i in windows)
        if written.block.lengths != planned_lengths:
            raise UsageError(
                f"{path}: holds records of {written.block.lengths} positions, wanted {planned_lengths}. "
                "Delete it and run again."
            )
        check_alignment(written.records, str(path))
        sums.append(BlockSums.from_block(written.header, written.records))
        blocks.append(written.block)
    return ReadShard(Shard(planned.name, path.stat().st_size, sha256(path), tuple(blocks)), sums)


def read_back(plan: CachePlan, rank: int, ranks: int) -> list[ReadShard]:
    """Reads this rank's share of all shards back strictly.

    Raises:
        UsageError: a shard is damaged, does not hold the planned windows, or its labels and entries are shifted.
    """
    coding = _read_coding(plan)
    return [_read_shard(plan, planned, coding) for planned in plan.shards[rank::ranks]]


def write_manifest(plan: CachePlan, by_rank: Sequence[Sequence[ReadShard]] | None = None) -> Manifest:
    """Writes and returns the manifest of what was read back, by default by this process alone.

    `by_rank` has the results of `read_back` on all ranks. Their number does not change a byte.
    """
    by_rank = by_rank or [read_back(plan, 0, 1)]
    read = [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(len(plan.shards))]
    before = plan.grown_from.made if plan.grown_from else {}
    made = {
        **made_now(pin_commit(plan.export.teacher), [*before.get("corpora", []), plan.export.corpus.path]),
        "drawn_from": plan.drawn_from,
    }
    if chat := plan.chat or before.get("chat"):
        made["chat"] = chat
    totals = Totals.from_manifest(plan.grown_from)
    for block in itertools.chain.from_iterable(shard.sums for shard in read):
        totals.add(block)
    manifest = Manifest(
        vocab_size=plan.teacher.vocab_size,
        tokenizer=plan.identity["tokenizer"],
        teacher={**plan.identity["teacher"], "architecture": plan.teacher.architecture, "dtype": plan.export.dtype},
        selection=plan.export.selection,
        row_length=plan.export.row_length,
        codec=plan.export.codec,
        audit=totals.audit(),
        statistics=totals.statistics(),
        tables=file_size_and_hash(plan.folder / TABLES_FILE),
        plans=(*(plan.grown_from.plans if plan.grown_from else ()), plan.identity),
        shards=(*(plan.grown_from.shards if plan.grown_from else ()), *(shard.shard for shard in read)),
        made=made,
    )
    manifest.write(plan.folder)
    return manifest
