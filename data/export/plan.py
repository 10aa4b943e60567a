"""What an export is to make, before any teacher runs: the plan of each cache, the same on every rank and every start.

documents ─ encode ─► tokens and masks ─ split ─► windows ─ draw ─► shards of windows
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.cache.manifest import read_manifest
from data.export.corpus import Corpus, split_documents
from data.export.encoding import Encoded, Encoder
from data.export.huggingface import local_folder
from data.export.scorers import SCORERS, TeacherFacts, read_facts
from data.export.windows import Window, choose_windows, windows_of
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, read_json, sha256, write_json
from kd_core.students.weights import weight_files

SPLITS = ("train", "validation")
log = logging.getLogger("kd")
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
    overlap: int = 0
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    scorer: str = "auto"
    records_per_shard: int = 16
    batch_rows: int = 2

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: got {self.dtype!r}; wanted one of {', '.join(DTYPES)}.")
        if self.scorer not in SCORERS:
            raise UsageError(f"scorer: got {self.scorer!r}; wanted one of {', '.join(SCORERS)}.")
        if not 0 < self.validation_share < 1:
            raise UsageError(f"validation_share: got {self.validation_share}; wanted between 0 and 1.")
        for name in ("top_k", "row_length", "records_per_shard", "batch_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}; wanted at least 1.")
        if not 0 <= self.overlap < self.row_length:
            raise UsageError(
                f"overlap: got {self.overlap}; wanted 0 to {self.row_length - 1}, less than row_length: so many "
                "positions of a window repeat the end of the one before, as context."
            )


@dataclass(frozen=True)
class CachePlan:
    """One cache to be: its windows, its teacher, and the plan that is written beside it and into its manifest."""

    folder: Path
    teacher: TeacherFacts
    windows: list[Window]
    plan: dict[str, Any]

    def shards(self) -> list[tuple[str, int]]:
        """Name and first window of each shard."""
        step = self.plan["records_per_shard"]
        return [(f"shard-{i:06d}.tar", start) for i, start in enumerate(range(0, len(self.windows), step))]

    def missing(self) -> list[tuple[str, int]]:
        """Shards that are not on disk."""
        return [shard for shard in self.shards() if not (self.folder / shard[0]).exists()]


def _scored_documents(corpus: Corpus, encoder: Encoder) -> list[Encoded]:
    """All documents with something to score."""
    kept: list[Encoded] = []
    left_out = 0
    for document in encoder.encode(corpus.documents()):
        if document.loss_mask.any():
            kept.append(document)
        else:
            left_out += 1
    if left_out:
        log.info(
            "corpus %s: %d of %d documents left out: nothing to score (less than two tokens, or no assistant's turn)",
            corpus.path, left_out, left_out + len(kept),
        )  # fmt: skip
    return kept


def make_plans(export: TeacherExport, out: Path) -> list[CachePlan]:
    """Read, tokenize, split and draw; every rank comes to the same plans.

    Raises:
        UsageError: corpus, teacher or tokenizer cannot be read or do not fit each other, or nothing is left.
    """
    folder = local_folder(export.teacher)
    teacher, encoder = read_facts(folder, export.scorer), Encoder(folder)
    if export.top_k >= teacher.vocab_size:
        raise UsageError(f"top_k: got {export.top_k}; the teacher's vocabulary has {teacher.vocab_size} tokens.")
    if teacher.max_positions is not None and export.row_length > teacher.max_positions:
        raise UsageError(f"row_length: got {export.row_length}; the teacher's context is {teacher.max_positions}.")
    documents = _scored_documents(export.corpus, encoder)
    sides = split_documents(documents, export.validation_share, export.seed)
    settings = asdict(export)
    for name in ("corpus", "teacher", "train_tokens", "validation_tokens"):
        del settings[name]
    shared = {
        "corpus": export.corpus.identity(),
        "chat_template": encoder.template.fingerprint() if encoder.template else None,
        "teacher": {
            "weights": content_fingerprint(weight_files(folder)),
            "config": sha256(folder / "config.json"),
        },
        "tokenizer": encoder.tokenizer.fingerprint(),
        **settings,
        "scorer": teacher.scorer,
    }
    plans: list[CachePlan] = []
    for split, tokens in zip(SPLITS, (export.train_tokens, export.validation_tokens), strict=True):
        windows = choose_windows(list(windows_of(sides[split], export.row_length, export.overlap)), tokens, export.seed)
        if not windows:
            raise UsageError(
                f"corpus {export.corpus.path}: the {split} split has no window of two tokens or more within "
                f"{tokens} tokens. Give more text, or a larger {split}_tokens."
            )
        largest = max(int(window.token_ids.max()) for window in windows)
        if largest >= teacher.vocab_size:
            raise UsageError(
                f"{folder}: its tokenizer gives id {largest}, its model knows 0 to {teacher.vocab_size - 1}. "
                "Tokenizer and model do not belong together."
            )
        plans.append(CachePlan(out / split, teacher, windows, {**shared, "split": split, "tokens": tokens}))
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
