"""Export of a teacher's planned windows as a cache:

    pilot: the first windows ─► tables
    windows (plan.py) ─ teacher (scoring.py) ─► records ─► blocks (block_encoders.py) ─► tars
                                                               tars ─ read back ─► indexes ─► manifest (receipts.py)

A shard is the unit of work: rank r of n writes shards r, r + n, …, reads each back, and writes its index. A shard that
is on the storage is not made again. Ranks share nothing but the storage. The plan and the tables fix what a shard
holds, so neither ranks nor interruptions change its bytes.

The ranks of a tensor-parallel group stand for one rank here: they score the same shards, and the first of them writes.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from data.cache.alignment import check_alignment
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.manifest_fields import MAX_TABLES_BYTES, TABLES_FILE
from data.cache.record import Record
from data.cache.writer import file_facts, write_shard, write_tables
from data.export.block_encoders import BlockJob, EncoderSettings, block_encoders
from data.export.plan import CachePlan
from data.export.planned_shards import PlannedShard
from data.export.receipts import read_receipt, verify_earlier_shards, verify_shard
from data.export.scoring import count_batches, pass_along, score_windows, scoring_threads
from data.export.spool.draw import no_window
from data.export.teacher_export import TeacherExport
from data.stream.shards import read_tables
from data.teacher.choose_scorer import load_scorer, load_vllm
from data.teacher.scorer import AnyScorer, ranks_of
from kd_core.errors import UsageError
from kd_core.hub import local_folder
from kd_core.parallel.collectives import run_on_all_ranks
from kd_core.parallel.world import World
from kd_core.precision import dtype_of

PILOT_POSITIONS = 65_536
MOST_ENCODERS = 4  # processes, of about 50,000 positions a second each


def load_teacher(export: TeacherExport, device: torch.device, world: World | None = None) -> AnyScorer:
    """Returns the export's teacher, loaded and ready to score.

    With a `world`, which is laid out as `export.parallel` says, its ranks load the teacher together.
    """
    folder, dtype = local_folder(export.teacher), dtype_of(export.dtype, device)
    if export.scorer == "vllm":
        return load_vllm(folder, dtype, device, export.vllm_settings)
    return load_scorer(folder, export.scorer, dtype, device, export.parallel, world)


def _progress_bar(plan: CachePlan, words: str, total: int, done: int, hidden: bool) -> "tqdm[NoReturn]":
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=1,
                desc=f"{words} {plan.identity['split']}", disable=hidden)  # fmt: skip


def _count_positions(records: Iterable[Record], bar: "tqdm[NoReturn]") -> Iterator[Record]:
    for record in records:
        yield record
        bar.update(record.positions)


def make_tables(plan: CachePlan, model: AnyScorer) -> list[Record]:
    """Scores the first windows, writes the cache's tables from them, and returns their records.

    Returns nothing and scores nothing where the tables are already there. The pilot ends at the end of a batch of the
    first shard, so its records are the same as those that the shard will hold. The ranks of a shared teacher all score
    it, and the first one writes.
    """
    ranks = ranks_of(model)
    if ranks.gather(plan.storage.size(TABLES_FILE) is not None)[0]:
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
    with _progress_bar(plan, "pilot on", total, 0, ranks.rank > 0) as bar, scoring_threads(model) as executor:
        pilot = list(_count_positions(score_windows(executor, model, plan, [pilot_windows]), bar))
    check_alignment(pilot, str(plan.folder))
    if ranks.rank == 0:
        write_tables(plan.storage, fit_tables(pilot, plan.teacher.vocab_size, plan.expected_positions))
    return pilot


def score_pilot(plan: CachePlan, model: AnyScorer, world: World) -> list[Record]:
    """Makes the tables on the first rank, or on all ranks where they share the teacher. Returns the pilot's records.

    Raises:
        UsageError: a rank failed, on every rank.
    """
    pilot: list[Record] = []
    run = partial(run_on_all_ranks, world) if ranks_of(model).is_shared else world.run_on_first
    run(lambda: pilot.extend(make_tables(plan, model)))
    return pilot


def _read_coding(plan: CachePlan) -> Coding:
    tables = read_tables(plan.folder, file_facts(plan.storage.read(TABLES_FILE, MAX_TABLES_BYTES)))
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
    """Makes this rank's share of the missing shards, and the indexes of its shards that have none.

    The teacher goes on scoring while a shard is written and read back.

    Args:
        plan: the plan of the cache.
        model: the teacher.
        pilot: the records of `make_tables`.
        rank: this rank, of so many `ranks`. All ranks of a tensor-parallel group have the number of their group.
        encoders: how many processes encode blocks, by default as many as suit the device. 0 encodes in this one.

    Raises:
        UsageError: a shard is damaged, or does not hold the planned windows.
    """
    coding, shared = _read_coding(plan), ranks_of(model)
    if shared.is_first_of_group:
        verify_earlier_shards(plan, coding, rank, ranks)
    settings = EncoderSettings(coding, plan.export.max_codec_kl)
    processes = _encoder_processes(model.device) if encoders is None else encoders
    late: list[UsageError] = []
    hidden = rank != 0 or not shared.is_first_of_group
    with (
        _progress_bar(plan, "teacher on", plan.expected_positions // ranks, 0, hidden) as bar,
        scoring_threads(model) as executor,
    ):
        missing = _missing_shards(plan, model, coding, (rank, ranks), bar, late)
        missing, passes = _agree_on_passes(plan, model, missing, len(pilot))
        first = next(missing, None)
        to_score, to_encode, to_write = itertools.tee(itertools.chain([first] if first else [], missing), 3)
        # The pilot has already scored the first windows of the first shard. Ranks above 0 get an empty pilot.
        scored = pilot if first and first.windows.start == 0 else []
        ranges = (_unscored(shard, len(pilot)) for shard in to_score)
        records = _count_positions(itertools.chain(scored, score_windows(executor, model, plan, ranges)), bar)
        if not shared.is_first_of_group:
            deque(records, maxlen=0)  # the first rank of the group has the same, and writes it
            to_encode = to_write = iter(())
        with block_encoders(settings, processes if first and shared.is_first_of_group else 0) as encode:
            # One stream of blocks for all shards, so that the next shard is encoded while one is written.
            encoded = encode(
                BlockJob(plan.storage.url(shard.name), plan.first_record + block.start, [next(records) for _ in block])
                for shard in to_encode
                for block in shard.blocks
            )
            for shard in to_write:
                write_shard(plan.storage, shard.name, itertools.islice(encoded, len(shard.blocks)))
                verify_shard(plan, shard.name, coding, shard)
        pass_along(executor, model, plan, passes)
    if late:
        raise late[0]


def _unscored(shard: PlannedShard, pilot: int) -> range:
    """Returns the windows of a shard behind those of the pilot, which are the first of the first shard."""
    return shard.windows[pilot:] if shard.windows.start == 0 else shard.windows


def _agree_on_passes(
    plan: CachePlan, model: AnyScorer, missing: Iterator[PlannedShard], pilot: int
) -> tuple[Iterator[PlannedShard], int]:
    """Returns the missing shards, and how many passes this rank makes for others behind its own.

    Ranks that gather weights from each other make the same number of passes. They agree on it before the first one, and
    so wait for all of a long corpus.
    """
    shared = ranks_of(model)
    if not shared.passes_together:
        return missing, 0
    shards = list(missing)
    passes = count_batches(plan, [_unscored(shard, pilot) for shard in shards])
    return iter(shards), max(shared.gather(passes)) - passes


def _missing_shards(
    plan: CachePlan, model: AnyScorer, coding: Coding, share: tuple[int, int], bar: "tqdm[NoReturn]",
    late: list[UsageError],
) -> Iterator[PlannedShard]:  # fmt: skip
    """Yields the shards of a share (rank, ranks) that are not there, as windows appear. `bar` counts the other ones.

    A shard that is there without a valid index is read back, and gets one. An error of the corpus ends them, and goes
    to `late`, so that shards before it are written.
    """
    # Ranks that score together see the files of the first of them.
    shared = ranks_of(model)
    present_by_rank = shared.gather(set(plan.storage.names()))
    present = present_by_rank[shared.rank // shared.layout.tensor * shared.layout.tensor]
    shards = itertools.islice(plan.each_shard(), share[0], None, share[1])
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
        if shared.is_first_of_group and read_receipt(plan, shard.name, shard) is None:
            verify_shard(plan, shard.name, coding, shard)
        positions = int(plan.windows.positions_of(shard.windows).sum())
        if not bar.disable:
            bar.initial += positions
        bar.update(positions)
