"""What an export is to make, before any teacher runs: the plan of each cache, the same on every rank and every start.

documents ─ split ─► windows ─ draw ─► shards of windows
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.cache.manifest import read_manifest
from data.export.corpus import Corpus, Window, choose_windows, split_documents, windows_of
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, read_json, sha256, write_json
from kd_core.students.families import read_architecture
from kd_core.students.weights import weight_files

SPLITS = ("train", "validation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TeacherExport:
    """What to export: which teacher over which corpus, how much of it, and how many entries a position."""

    corpus: Corpus
    teacher: str
    train_tokens: int | None
    validation_tokens: int | None
    top_k: int = 64
    row_length: int = 512
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    records_per_shard: int = 16
    batch_rows: int = 2

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: got {self.dtype!r}; wanted one of {', '.join(DTYPES)}.")
        if not 0 < self.validation_share < 1:
            raise UsageError(f"validation_share: got {self.validation_share}; wanted between 0 and 1.")
        for name in ("top_k", "row_length", "records_per_shard", "batch_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}; wanted at least 1.")


@dataclass(frozen=True)
class CachePlan:
    """One cache to be: its windows, and the plan that is written beside it and into its manifest."""

    folder: Path
    windows: list[Window]
    plan: dict[str, Any]

    def shards(self) -> list[tuple[str, int]]:
        """Name and first window of each shard."""
        step = self.plan["records_per_shard"]
        return [(f"shard-{i:06d}.tar", start) for i, start in enumerate(range(0, len(self.windows), step))]

    def missing(self) -> list[tuple[str, int]]:
        """Shards that are not on disk."""
        return [shard for shard in self.shards() if not (self.folder / shard[0]).exists()]


def make_plans(export: TeacherExport, out: Path) -> list[CachePlan]:
    """Read, split, tokenize and draw; every rank comes to the same plans.

    Raises:
        UsageError: corpus, teacher or tokenizer cannot be read or do not fit each other, or nothing is left.
    """
    folder = Path(export.teacher)
    arch, tokenizer = read_architecture(folder), Tokenizer(folder)
    if export.top_k >= arch.vocab_size:
        raise UsageError(f"top_k: got {export.top_k}; the teacher's vocabulary has {arch.vocab_size} tokens.")
    if export.row_length > arch.max_positions:
        raise UsageError(f"row_length: got {export.row_length}; the teacher's context is {arch.max_positions}.")
    documents = [d for d in export.corpus.documents() if len(d.text) > 1]
    sides = split_documents(documents, export.validation_share, export.seed)
    shared = {
        "corpus": {"fingerprint": export.corpus.fingerprint(), "text_field": export.corpus.text_field},
        "teacher": {
            "weights": content_fingerprint(weight_files(folder)),
            "config": sha256(folder / "config.json"),
        },
        "tokenizer": tokenizer.fingerprint(),
        **{
            k: v
            for k, v in asdict(export).items()
            if k not in ("corpus", "teacher", "train_tokens", "validation_tokens")
        },
    }
    plans: list[CachePlan] = []
    for split, tokens in zip(SPLITS, (export.train_tokens, export.validation_tokens), strict=True):
        windows = choose_windows(list(windows_of(sides[split], tokenizer, export.row_length)), tokens, export.seed)
        if not windows:
            raise UsageError(
                f"corpus {export.corpus.path}: the {split} split has no window of two tokens or more within "
                f"{tokens} tokens. Give more text, or a larger {split}_tokens."
            )
        largest = max(max(window.token_ids) for window in windows)
        if largest >= arch.vocab_size:
            raise UsageError(
                f"{folder}: its tokenizer gives id {largest}, its model knows 0 to {arch.vocab_size - 1}. "
                "Tokenizer and model do not belong together."
            )
        plans.append(CachePlan(out / split, windows, {**shared, "split": split, "tokens": tokens}))
    return plans


def claim(plan: CachePlan) -> bool:
    """Write the plan beside the cache to be, or check that it is the same; True where the cache is complete.

    Raises:
        UsageError: the folder holds an export of another plan.
    """
    path = plan.folder / "plan.json"
    plan.folder.mkdir(parents=True, exist_ok=True)
    for half_written in plan.folder.glob("*.partial"):
        half_written.unlink()
    if not path.exists():
        write_json(path, plan.plan)
    found = read_json(path, "the plan of an export")
    differing = [name for name in sorted({*found, *plan.plan}) if found.get(name) != plan.plan.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"{plan.folder}: holds an export with another {name} ({found.get(name)}; now {plan.plan.get(name)}). "
            "Name another --out, or delete the folder."
        )
    if not (plan.folder / "manifest.json").exists():
        return False
    read_manifest(plan.folder)
    if plan.missing():
        (plan.folder / "manifest.json").unlink()
    return not plan.missing()
