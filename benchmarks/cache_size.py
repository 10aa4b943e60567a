"""Bytes a position of every kind of cache, of one and the same teacher, everything counted.

    python -m benchmarks.cache_size quickstart/teacher quickstart/corpus [train_tokens]

The teacher scores each window once and every selection is taken from the same logits. Each kind is then written as
the export writes it (tables from the pilot, blocks, shards, manifest), and the folder is weighed. KL is the codec's
KL(original‖decoded) over all positions, in nats.
"""

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.cache.codec.block import encode_block_members
from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.manifest import Manifest
from data.cache.record import Record
from data.cache.selection import Selection
from data.cache.tar import padded_size, read_members
from data.cache.writer import write_shard, write_tables
from data.corpus.corpus import Corpus
from data.export import export as steps
from data.export.plan import CachePlan, make_plans
from data.export.receipts import verify_shard, write_manifest
from data.export.resume_check import record_or_check_plan
from data.export.scoring import score_batch
from data.export.teacher_export import TeacherExport
from data.teacher.scorer import Scorer

KINDS = {
    "K = 64": (Selection(64), "standard"),
    "K = 64, compact": (Selection(64), "compact"),
    "K = 64, lossless": (Selection(64), "lossless"),
    "K = 8": (Selection(8), "standard"),
    "p ≥ 3e-3, at most 64": (Selection(64, min_prob=3e-3), "standard"),
    "p ≥ 3e-3, compact": (Selection(64, min_prob=3e-3), "compact"),
    "mass ≥ 0.8, at most 64": (Selection(64, mass=0.8), "standard"),
    "6 draws": (Selection(0, draws=6), "standard"),
    "12 draws": (Selection(0, draws=12), "standard"),
    "25 draws": (Selection(0, draws=25), "standard"),
    "50 draws": (Selection(0, draws=50), "standard"),
    "K = 8 and 12 draws": (Selection(8, draws=12), "standard"),
}
# What others store, by their own formats: measured or computed from their record layout, on other teachers.
ELSEWHERE = {
    "DistillKit, k = 50": "114 (KL 5e-2)",
    "DistillKit, k = 128": "about 300",
    "Megatron-LM, K = 64": "260 to 320",
    "NeMo-Aligner's JSONL, K = 64": "about 1150",
}


class Known(NamedTuple):
    """A scorer that knows the logits already."""

    device: torch.device
    chunks: list[Tensor]

    def logits(self, tokens: Tensor, document_ids: Tensor) -> Iterator[Tensor]:
        del tokens, document_ids
        return (chunk.clone() for chunk in self.chunks)


def score_all(model: Scorer, plans: dict[str, CachePlan]) -> dict[str, list[Record]]:
    """Records of every kind, from one pass of the teacher."""
    found: dict[str, list[Record]] = defaultdict(list)
    windows = next(iter(plans.values())).windows
    for number, window in enumerate(tqdm(windows, unit="window")):
        tokens = torch.from_numpy(window.token_ids).long()[None, :-1]
        with torch.no_grad():
            known = Known(model.device, [each.clone() for each in model.logits(tokens, torch.zeros_like(tokens))])
        for name, plan in plans.items():
            found[name] += score_batch(known, plan, range(number, number + 1))
    return found


def write(plan: CachePlan, records: list[Record]) -> Manifest:
    """A cache of records, as the export writes it."""
    record_or_check_plan(plan)
    first = len(plan.shards[0].windows)
    most, pilot = 0, []
    for record in records[:first]:
        most += record.positions
        if most > steps.PILOT_POSITIONS:
            break
        pilot.append(record)
    tables = fit_tables(pilot, plan.teacher.vocab_size, sum(window.positions for window in plan.windows))
    write_tables(plan.storage, tables)
    coding = Coding(tables, plan.export.selection, plan.export.codec)
    for shard in plan.shards:
        blocks = [
            encode_block_members(b.start, [records[i] for i in b], coding, plan.export.max_codec_kl)
            for b in shard.blocks
        ]
        write_shard(plan.storage, shard.name, blocks)
        verify_shard(plan, shard.name, coding, shard)
    return write_manifest(plan)


def parts(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Bytes a position by part."""
    sizes: Counter[str] = Counter()
    for shard in manifest.shards:
        for member in read_members((folder / shard.name).read_bytes()):
            sizes[member.name.partition(".")[2].removesuffix(".zst")] += len(member.payload)
            sizes["tar"] += 512 + padded_size(len(member.payload)) - len(member.payload)
        sizes["tar"] += 1024
    sizes["tables"] = manifest.tables["bytes"]
    sizes["manifest"] = sum((folder / name).stat().st_size for name in ("manifest.json", "plan.json"))
    sizes["indexes"] = sum((folder / shard.index_name).stat().st_size for shard in manifest.shards)
    return {name: size / manifest.positions for name, size in sizes.items()}


def main() -> None:
    teacher, corpus = sys.argv[1:3]
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 61_440
    base = TeacherExport(
        Corpus(corpus),
        teacher,
        train_tokens=tokens,
        validation_tokens=512,
        selection=Selection(),
        shard_bytes=900_000,
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        plans = {
            name: make_plans(replace(base, selection=kind, codec=codec), Path(folder) / str(i))[0]
            for i, (name, (kind, codec)) in enumerate(KINDS.items())
        }
        model = steps.load_teacher(base, torch.device("cpu"))
        records = score_all(model, plans)
        print(
            f"{tokens} positions of {corpus} by {teacher}, vocabulary {next(iter(plans.values())).teacher.vocab_size}\n"
        )
        print(f"| kind | entries | bytes a position | KL mean | KL worst | parts |\n|{'---|' * 6}")
        for name, plan in plans.items():
            manifest = write(plan, records[name])
            by_part = parts(plan.folder, manifest)
            shown = ", ".join(f"{part} {size:.2f}" for part, size in by_part.items() if size >= 0.005)
            audit = manifest.audit
            print(
                f"| {name} | {manifest.statistics['entries']:.1f} | **{sum(by_part.values()):.2f}** "
                f"| {audit.kl_mean:.1e} | {audit.kl_worst:.1e} | {shown} |"
            )
    print("\nElsewhere, by their own accounts:", "; ".join(f"{name}: {size}" for name, size in ELSEWHERE.items()))


if __name__ == "__main__":
    main()
