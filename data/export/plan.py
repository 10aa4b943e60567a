"""Plans of an export's caches, made before any teacher runs. They are the same on every rank and at every start.

documents ─ encode ─► tokens and masks ─ split ─► windows ─ draw ─► shards of windows
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.cache.codec.levels import Codec
from data.cache.contents import mask_digest, window_digest, windows_digest
from data.cache.manifest import PLAN_BEGINS, PLAN_ENDS, Manifest
from data.cache.selection import Selection
from data.corpus.bad_rows import BadRows
from data.corpus.corpus import Corpus, split_documents
from data.corpus.encoding import Encoded, Encoder
from data.corpus.windows import Window, choose_windows, cut_windows
from data.export.extend import SPLITS, Growth
from data.export.planned_shards import PlannedShard, bytes_per_position, plan_shards
from data.teacher.choose_scorer import ScorerName, TeacherFacts, read_teacher_facts
from data.teacher.vllm_settings import VllmSettings, check_vllm
from kd_core.errors import UsageError
from kd_core.files import content_fingerprint, sha256
from kd_core.hub import local_folder
from kd_core.precision import Precision
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, NOT_NEGATIVE, SHARE_BETWEEN, TEMPERATURE, Range, check_settings
from kd_core.students.decoder.architecture import too_many_tokens
from kd_core.students.huggingface.weights import weight_files

log = logging.getLogger("kd")
# Below, p^(1/t) of a wide vocabulary is 0 in float32 and all draws are one token. Above, it hardly depends on p.
PROPOSAL_TEMPERATURE = Range("0.25 to 4", 0.25, 4)
CPU_BATCH_ROWS, GPU_BATCH_POSITIONS = 2, 8192


@dataclass(frozen=True)
class TeacherExport:
    """Settings of an export: the teacher, the corpus and how much of it, and what is kept of each position.

    Args:
        corpus: documents.
        teacher: a Hugging Face folder, or `hub:OWNER/NAME`.
        train_tokens: positions of the training cache (None: all of its split).
        validation_tokens: positions of the held-out cache (None: all of its split).
        selection: what is kept of a position.
        codec: `standard` (a KL of about 1.5e-4 at 64 entries), `compact` (3e-4, 4 bytes less), or `lossless`.
        max_codec_kl: largest mean KL(original‖decoded) of a block, in nats. The export stops above it.
        row_length: positions of a window.
        overlap: positions at the start of a window that are context only, because the window before scores them.
        validation_share: share of the documents that is held out.
        seed: seed of the split, the draw of windows and the samples.
        dtype: type of the teacher's weights and activations. Its logits are float32. `auto` is bfloat16 where the
            device has instructions for it, otherwise float32, and the cache records which. With the quick start's
            teacher, bfloat16 is a KL of 6e-4 nats from float32 (1,024 positions).
        scorer: `auto`, `decoder`, `transformers` or `vllm`.
        scorer_url: with `vllm`, the server `http://HOST:PORT` that scores. None: vLLM runs in this process.
        vllm: with `vllm`, arguments of its engine, such as {"tensor_parallel_size": 8}. The plan records them.
        block_positions: about the number of positions that are coded together, the unit of reading and shuffling.
        shard_bytes: about the size of a shard, the unit of a rank's work and of what an interruption loses.
        batch_rows: windows that the teacher scores together. None: 2 on a CPU, and on a GPU as many as have about
            8,192 positions. The plan records which.
    """

    corpus: Corpus
    teacher: str
    train_tokens: int | None
    validation_tokens: int | None
    selection: Selection
    codec: Codec = "standard"
    max_codec_kl: float = 1e-3
    row_length: int = 512
    overlap: int = 0
    validation_share: float = 0.1
    seed: int = 0
    dtype: Precision = "auto"
    scorer: ScorerName = "auto"
    scorer_url: str | None = None
    vllm: dict[str, Any] | None = None
    block_positions: int = 8192
    shard_bytes: int = 4_000_000
    batch_rows: int | None = None

    def __post_init__(self) -> None:
        counts = ("row_length", "block_positions", "shard_bytes", "batch_rows", "train_tokens", "validation_tokens")
        shares = {"validation_share": SHARE_BETWEEN, "max_codec_kl": NOT_NEGATIVE}
        check_settings(self, "", **dict.fromkeys(counts, AT_LEAST_1), **shares, seed=AT_LEAST_0)
        # Temperatures are checked here and not in `Selection`: a cache that is already written is read with any.
        check_settings(
            self.selection, "selection.", proposal_temperature=PROPOSAL_TEMPERATURE, tail_temperatures=TEMPERATURE
        )
        check_vllm(self.scorer, self.vllm_settings, self.selection, self.dtype)
        if not 0 <= self.overlap < self.row_length:
            raise UsageError(
                f"overlap: got {self.overlap}; wanted 0 to {self.row_length - 1}, less than row_length: this many "
                "positions of a window repeat the end of the one before, as context."
            )

    @property
    def vllm_settings(self) -> VllmSettings:
        """Returns the settings of vLLM, whose context is a window unless set."""
        context = {} if self.scorer != "vllm" or self.scorer_url else {"max_model_len": self.row_length}
        return VllmSettings({**context, **(self.vllm or {})}, self.scorer_url)


def choose_batch_rows(export: TeacherExport, device: torch.device, recorded: int | None = None) -> int:
    """Returns how many windows are scored together: as set, as `recorded` in the cache, or as suits the device."""
    if rows := export.batch_rows or recorded:
        return rows
    slow = device.type == "cpu" and export.scorer != "vllm"  # whose engine batches by itself
    return CPU_BATCH_ROWS if slow else max(1, GPU_BATCH_POSITIONS // export.row_length)


@dataclass(frozen=True)
class CachePlan:
    """The plan of one cache. `identity` decides its bytes: the JSON of plan.json, and of a plan in the manifest."""

    folder: Path
    export: TeacherExport
    teacher: TeacherFacts
    windows: list[Window]
    identity: dict[str, Any]
    grown_from: Manifest | None = None
    texts: str = ""  # where there are texts, a description of what is added before and after each
    drawn_from: int = 0  # positions that the split has in all
    chat: dict[str, Any] | None = None  # the format of conversations, stored in the manifest only

    @property
    def batch_rows(self) -> int:
        """Returns how many windows are scored together."""
        return self.identity["batch_rows"]

    @property
    def first_record(self) -> int:
        """Returns the number of the first new record. It follows those of the cache that is extended."""
        return self.grown_from.records if self.grown_from else 0

    @cached_property
    def shards(self) -> list[PlannedShard]:
        """Returns all shards. Blocks hold up to `block_positions`, and shards up to about `shard_bytes`."""
        settings = self.export
        most = max(1, int(settings.shard_bytes / bytes_per_position(settings.selection, settings.codec)))
        first = len(self.grown_from.shards) if self.grown_from else 0
        return plan_shards([window.positions for window in self.windows], settings.block_positions, most, first)

    def missing(self) -> list[PlannedShard]:
        """Returns the shards that are not on disk."""
        return [shard for shard in self.shards if not (self.folder / shard.name).exists()]


def _scored_documents(corpus: Corpus, encoder: Encoder, bad_rows: BadRows) -> list[Encoded]:
    """Returns the documents with a scored position, and logs how many have none."""
    documents: list[Encoded] = []
    left_out = 0
    for document in encoder.encode(corpus.documents(bad_rows), bad_rows):
        if document.loss_mask.any():
            documents.append(document)
        else:
            left_out += 1
    bad_rows.finish(corpus.path)
    if left_out:
        log.info(
            "corpus %s: %d of %d documents left out: nothing to score (less than two tokens, or no assistant's turn)",
            corpus.path, left_out, left_out + len(documents),
        )  # fmt: skip
    return documents


def round_trip_json(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the value as it comes back from JSON, with lists in place of tuples and text keys."""
    return json.loads(json.dumps(value))


def _teacher_facts(export: TeacherExport, folder: Path, tokens: int) -> TeacherFacts:
    """Reads the facts of the teacher. Raises `UsageError` where `top_k` or `row_length` does not fit it."""
    teacher = read_teacher_facts(folder, export.scorer, tokens, export.vllm_settings)
    top_k = export.selection.top_k
    if top_k >= teacher.vocab_size:
        raise UsageError(f"selection.top_k: got {top_k}; the teacher's vocabulary has {teacher.vocab_size} tokens.")
    if teacher.max_positions is not None and export.row_length > teacher.max_positions:
        raise UsageError(f"row_length: got {export.row_length}; the teacher's context is {teacher.max_positions}.")
    return teacher


def _settings(
    export: TeacherExport, folder: Path, teacher: TeacherFacts, encoder: Encoder, bad_rows: BadRows
) -> dict[str, Any]:
    """Returns the part of the plan that both caches share: all that decides what they hold, but split and tokens."""
    skipped = {"skipped": bad_rows.counts()} if bad_rows.bad else {}
    settings = asdict(export)
    for name in ("corpus", "teacher", "train_tokens", "validation_tokens", "scorer_url", "vllm"):
        del settings[name]
    return {
        "corpus": {**export.corpus.identity(), **skipped},
        "chat_template": encoder.template.fingerprint() if encoder.template else None,
        "teacher": {
            "weights": content_fingerprint(weight_files(folder)),
            "config": sha256(folder / "config.json"),
            **({"vllm": teacher.engine} if teacher.engine else {}),
        },
        "tokenizer": encoder.tokenizer.fingerprint(),
        **{name: ids for name, ids in zip((PLAN_BEGINS, PLAN_ENDS), encoder.used or (), strict=False) if ids},
        **settings,
        "scorer": teacher.scorer,
        # Only for a teacher with padding columns, which took probability in earlier versions.
        **({"vocab_size": teacher.vocab_size} if teacher.architecture.get("padded_vocab_size") else {}),
    }


def _digests(windows: Iterable[Window]) -> Iterator[bytes]:
    return (window_digest(window.start, window.token_ids) for window in windows)


def _new_documents(export: TeacherExport, documents: list[Encoded], growth: Growth) -> list[Encoded]:
    """Returns the documents that the caches do not hold, each content once."""
    new_documents: dict[bytes, Encoded] = {}
    for document in documents:
        if not growth.documents.hold(_digests(cut_windows([document], export.row_length, export.overlap))):
            new_documents.setdefault(document.digest, document)
    renewed = [document.name for document in new_documents.values() if document.name in set(growth.documents.name_of)]
    log.info("corpus %s: %d of %d documents are new", export.corpus.path, len(new_documents), len(documents))
    if renewed:
        log.warning(
            "corpus %s: %d of the new documents have the names of documents in the cache whose content differs, and "
            "which stay there (%s%s)",
            export.corpus.path, len(renewed), ", ".join(renewed[:3]), " …" if len(renewed) > 3 else "",
        )  # fmt: skip
    return list(new_documents.values())


def _by_split(export: TeacherExport, documents: list[Encoded], growth: Growth | None) -> dict[str, list[Encoded]]:
    """Returns the documents by split. In an extension, a document goes to the cache that already has windows of it."""
    if not growth:
        return split_documents(documents, export.validation_share, export.seed)
    continued: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
    unseen: list[Encoded] = []
    for document in _new_documents(export, documents, growth):
        windows = _digests(cut_windows([document], export.row_length, export.overlap))
        caches = growth.documents.caches_with_any(windows)
        (continued[min(caches)] if caches else unseen).append(document)  # windows in both caches: to "train"
    if len(unseen) < 2:  # too few to split
        return {**continued, "train": continued["train"] + unseen}
    unseen_by_split = split_documents(unseen, export.validation_share, export.seed)
    return {split: continued[split] + unseen_by_split[split] for split in SPLITS}


def make_plans(
    export: TeacherExport, out: Path, growth: Growth | None = None, bad_rows: BadRows | None = None
) -> list[CachePlan]:
    """Returns the plans of both caches: reads, tokenizes and splits the corpus, and draws windows. All ranks agree.

    `batch_rows` that is not set becomes that of a CPU. With `growth`, plans hold new documents only, and a cache
    without any has no plan. `bad_rows` collects skipped rows.

    Raises:
        UsageError: corpus, teacher or tokenizer cannot be read or do not fit each other, or no window is left.
    """
    export = replace(export, batch_rows=choose_batch_rows(export, torch.device("cpu")))
    folder = local_folder(export.teacher)
    encoder = Encoder(folder, export.corpus.bos, export.corpus.eos)
    teacher = _teacher_facts(export, folder, encoder.tokenizer.vocab_size)
    bad = bad_rows or export.corpus.bad_rows()
    documents = _by_split(export, _scored_documents(export.corpus, encoder, bad), growth)
    settings = _settings(export, folder, teacher, encoder, bad)
    if encoder.doubled:
        log.warning(
            "corpus %s: %d texts begin with the BOS themselves and get a second one; corpus.bos=no adds none",
            export.corpus.path, encoder.doubled,
        )  # fmt: skip
    plans: list[CachePlan] = []
    for split, tokens in zip(SPLITS, (export.train_tokens, export.validation_tokens), strict=True):
        all_windows = list(cut_windows(documents[split], export.row_length, export.overlap))
        if growth:
            all_windows = [window for window in all_windows if not growth.documents.caches_with_any(_digests([window]))]
        windows = choose_windows(all_windows, tokens, export.seed)
        if growth and not windows:
            continue
        if not windows:
            raise UsageError(
                f"corpus {export.corpus.path}: the {split} split has no window of two tokens or more within "
                f"{tokens} tokens. Give more text, or a larger {split}_tokens."
            )
        if (largest := max(int(window.token_ids.max()) for window in windows)) >= teacher.vocab_size:
            raise too_many_tokens(largest + 1, teacher.vocab_size, str(folder), "teacher")
        contents = {"windows": {"number": len(windows), "sha256": windows_digest(_digests(windows))}}
        masks = windows_digest(mask_digest(window.loss_mask) for window in windows)
        plan = round_trip_json({**settings, **contents, "windows_masks": masks, "split": split, "tokens": tokens})
        before = growth.manifests[split] if growth else None
        drawn_from = sum(window.positions for window in all_windows)
        corpus_facts = encoder.describe(), drawn_from, encoder.chat_format()
        plans.append(CachePlan(out / split, export, teacher, windows, plan, before, *corpus_facts))
    return plans
