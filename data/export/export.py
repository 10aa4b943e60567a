"""Corpus and teacher in, two caches out (train and validation):

    documents ─ split ─► windows ─ draw ─► shards of windows ─ teacher ─► records ─► tar by tar ─► manifest

A shard is the unit of work: rank r of n writes shards r, r + n, …; one that is there is not made again. What
a shard holds, and how its windows are batched, is fixed by the plan, so neither ranks nor interruptions change
its bytes.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from data.cache.alignment import check_alignment
from data.cache.manifest import Manifest, Shard, read_manifest
from data.cache.schema import Record
from data.cache.writer import write_shard
from data.export.corpus import Corpus, Window, choose_windows, split_documents, windows_of
from data.export.teacher import score
from data.stream.shards import decode_all
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, read_json, sha256, write_json
from kd_core.students.decoder import Decoder
from kd_core.students.families import read_architecture
from kd_core.students.starts import Pretrained
from kd_core.students.weights import weight_files

SPLITS = ("train", "validation")
LOOKAHEAD = 8  # batches begun while a shard is written
T = TypeVar("T")
R = TypeVar("R")
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


def load_teacher(export: TeacherExport, device: torch.device) -> Decoder:
    """The teacher, ready to score."""
    return Pretrained(export.teacher).build(device, seed=0).to(DTYPES[export.dtype]).eval()


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


def _score(model: Decoder, top_k: int, batch: _Together) -> _Scored:
    device, windows = model.embed_tokens.weight.device, batch.windows
    longest = max(len(window.token_ids) for window in windows)
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    documents = torch.full((len(windows), longest - 1), -1, dtype=torch.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window.token_ids)] = torch.tensor(window.token_ids)
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
            loss_mask=np.ones(positions, np.uint8),
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


def write_missing_shards(plan: CachePlan, export: TeacherExport, model: Decoder, rank: int, ranks: int) -> None:
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

    with bar, scoring_threads(model.embed_tokens.weight.device) as executor:
        batches = _batches(plan, missing, export.batch_rows)
        scored = _in_order(executor, partial(_score, model, export.top_k), batches, ahead=LOOKAHEAD)
        for name, of_shard in groupby(scored, key=lambda each: each.batch.shard):
            write_shard(plan.folder / name, records(of_shard))


def finish(plan: CachePlan, export: TeacherExport) -> Manifest:
    """Read every shard back, strictly, and write the manifest of what was read."""
    arch = read_architecture(Path(export.teacher))
    shards: list[Shard] = []
    nll = mass = 0.0
    for name, start in plan.shards():
        path = plan.folder / name
        records = decode_all(path, arch.vocab_size)
        wanted = [len(w.token_ids) - 1 for w in plan.windows[start : start + export.records_per_shard]]
        lengths = [record.positions for record in records]
        if lengths != wanted:
            raise UsageError(f"{path}: holds records of {lengths} positions, wanted {wanted}. Delete it and run again.")
        check_alignment(records, str(path))
        nll -= sum(float(record.label_log_prob.astype(np.float64).sum()) for record in records)
        mass += sum(float(np.exp(record.topk_log_probs.astype(np.float64)).sum()) for record in records)
        shards.append(Shard(name, path.stat().st_size, sha256(path), tuple(lengths)))
    positions = sum(sum(shard.lengths) for shard in shards)
    manifest = Manifest(
        vocab_size=arch.vocab_size,
        tokenizer=plan.plan["tokenizer"],
        teacher={**plan.plan["teacher"], "architecture": asdict(arch), "dtype": export.dtype},
        top_k=export.top_k,
        row_length=export.row_length,
        codec="zstd of plain arrays, lossless",
        statistics={"teacher_nll": nll / positions, "teacher_mass": mass / positions},
        plan=plan.plan,
        shards=tuple(shards),
    )
    manifest.write(plan.folder)
    return manifest
