"""Planned windows in, a cache out:

    pilot: the first windows ─► tables
    windows (plan.py) ─ teacher (scoring.py) ─► records ─► blocks ─► tars ─► manifest

A shard is the unit of work: rank r of n writes shards r, r + n, …; one that is there is not made again. What a shard
holds is fixed by the plan and the tables, so neither ranks nor interruptions change its bytes.
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
from data.cache.manifest import TABLES_FILE, Manifest, Shard, made_now
from data.cache.record import Record
from data.cache.totals import Totals
from data.cache.writer import encode_block_members, file_size_and_hash, write_shard, write_tables
from data.export.plan import CachePlan, PlannedShard, TeacherExport
from data.export.scoring import score_windows, scoring_threads
from data.stream.shards import read_tables, read_written
from data.teacher.choose_scorer import load_scorer
from data.teacher.scorer import Scorer
from kd_core.errors import UsageError
from kd_core.files import sha256
from kd_core.hub import local_folder, pin_commit
from kd_core.precision import dtype_of

PILOT_POSITIONS = 65_536


def load_teacher(export: TeacherExport, device: torch.device) -> Scorer:
    """The teacher, ready to score."""
    return load_scorer(local_folder(export.teacher), export.scorer, dtype_of(export.dtype, device), device)


def _bar(plan: CachePlan, words: str, total: int, done: int, hidden: bool) -> "tqdm[NoReturn]":
    return tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=1,
                desc=f"{words} {plan.plan['split']}", disable=hidden)  # fmt: skip


def _counted(records: Iterable[Record], bar: "tqdm[NoReturn]") -> Iterator[Record]:
    for record in records:
        yield record
        bar.update(record.positions)


def make_tables(plan: CachePlan, model: Scorer) -> list[Record]:
    """Score the first windows and write the cache's tables, where there are none; returns what was scored.

    The pilot ends with a batch of the first shard, so that its records are those that the shard will hold.
    """
    path = plan.folder / TABLES_FILE
    if path.exists():
        return []
    windows, rows = plan.shards[0].windows, plan.export.batch_rows
    ends = np.cumsum([plan.windows[i].positions for i in windows])
    most = int(np.searchsorted(ends, PILOT_POSITIONS, side="right")) // rows * rows
    run = windows if most >= len(windows) else windows[: max(rows, most)]
    total = sum(plan.windows[i].positions for i in run)
    with _bar(plan, "pilot on", total, 0, False) as bar, scoring_threads(model.device) as executor:
        pilot = list(_counted(score_windows(executor, model, plan, [run]), bar))
    check_alignment(pilot, str(plan.folder))
    write_tables(path, fit_tables(pilot, plan.teacher.vocab_size, sum(w.positions for w in plan.windows)))
    return pilot


def _coding(plan: CachePlan) -> Coding:
    path = plan.folder / TABLES_FILE
    tables = read_tables(plan.folder, file_size_and_hash(path))
    return Coding(tables, plan.export.selection, plan.export.codec)


def _blocks(shard: PlannedShard, records: Iterator[Record], plan: CachePlan, coding: Coding) -> Iterator[bytes]:
    for block in shard.blocks:
        own = [next(records) for _ in block]
        try:
            yield encode_block_members(plan.first_record + block.start, own, coding, plan.export.max_codec_kl)
        except ValueError as error:
            raise UsageError(f"{plan.folder / shard.name}: {error}") from None


def write_missing_shards(plan: CachePlan, model: Scorer, pilot: Sequence[Record], rank: int, ranks: int) -> None:
    """Score and write this rank's share of the shards that are not there; the teacher goes on while one is written."""
    own = plan.shards[rank::ranks]
    missing = [shard for shard in own if not (plan.folder / shard.name).exists()]
    coding = _coding(plan)
    sizes = {shard.name: sum(plan.windows[i].positions for i in shard.windows) for shard in own}
    done = sum(sizes.values()) - sum(sizes[shard.name] for shard in missing)
    bar = _bar(plan, "teacher on", sum(sizes.values()), done, rank != 0)
    with bar, scoring_threads(model.device) as executor:
        known = pilot if missing and missing[0] == plan.shards[0] else []
        runs = [shard.windows for shard in missing]
        if known:
            runs[0] = runs[0][len(known) :]
        records = _counted(itertools.chain(known, score_windows(executor, model, plan, runs)), bar)
        for shard in missing:
            write_shard(plan.folder / shard.name, _blocks(shard, records, plan, coding))


def finish(plan: CachePlan) -> Manifest:
    """Read every shard back, strictly, and write the manifest of what was read."""
    shards: list[Shard] = []
    before = plan.grown_from.made if plan.grown_from else {}
    made = {
        **made_now(pin_commit(plan.export.teacher), [*before.get("corpora", []), plan.export.corpus.path]),
        "drawn_from": plan.drawn_from,
    }
    if chat := plan.chat or before.get("chat"):
        made["chat"] = chat
    totals, coding = Totals.from_manifest(plan.grown_from), _coding(plan)
    for planned in plan.shards:
        path, blocks = plan.folder / planned.name, []
        for written, windows in zip(read_written(path, coding), planned.blocks, strict=True):
            wanted = tuple(plan.windows[i].positions for i in windows)
            if written.block.lengths != wanted:
                raise UsageError(
                    f"{path}: holds records of {written.block.lengths} positions, wanted {wanted}. "
                    "Delete it and run again."
                )
            check_alignment(written.records, str(path))
            totals.add(written.header, written.records)
            blocks.append(written.block)
        shards.append(Shard(planned.name, path.stat().st_size, sha256(path), tuple(blocks)))
    manifest = Manifest(
        vocab_size=plan.teacher.vocab_size,
        tokenizer=plan.plan["tokenizer"],
        teacher={**plan.plan["teacher"], "architecture": plan.teacher.architecture, "dtype": plan.export.dtype},
        selection=plan.export.selection,
        row_length=plan.export.row_length,
        codec=plan.export.codec,
        audit=totals.audit(),
        statistics=totals.statistics(),
        tables=file_size_and_hash(plan.folder / TABLES_FILE),
        plans=(*(plan.grown_from.plans if plan.grown_from else ()), plan.plan),
        shards=(*(plan.grown_from.shards if plan.grown_from else ()), *shards),
        made=made,
    )
    manifest.write(plan.folder)
    return manifest
