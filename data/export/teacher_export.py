"""Settings of an export: the teacher, the corpus and how much of it, and what is kept of each position."""

from dataclasses import dataclass
from typing import Any

import torch

from data.cache.codec.levels import Codec
from data.cache.selection import Selection
from data.corpus.corpus import Corpus
from data.teacher.choose_scorer import ScorerName
from data.teacher.teacher_layout import WHOLE_COPIES, TeacherParallel
from data.teacher.vllm_settings import VllmSettings, check_vllm
from kd_core.errors import UsageError
from kd_core.precision import Precision
from kd_core.ranges import AT_LEAST_0, AT_LEAST_1, NOT_NEGATIVE, SHARE_BETWEEN, TEMPERATURE, Range, check_settings

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
        spool: a folder on local disk for the tokenised corpus, 5 to 6 bytes a token until the export is complete. None:
            `OUT.spool` beside the caches, or the temporary folder where OUT is a URL.
        batch_rows: windows that the teacher scores together. None: 2 on a CPU, and on a GPU as many as have about
            8,192 positions. The plan records which.
        parallel: how the teacher is laid out over the ranks that torchrun starts.
        max_spread: largest difference, in nats, between the log-probabilities of two passes over the same positions.
            The export stops before it begins if the teacher does not repeat itself that closely.
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
    spool: str | None = None
    parallel: TeacherParallel = WHOLE_COPIES
    max_spread: float = 0.1

    def __post_init__(self) -> None:
        counts = ("row_length", "block_positions", "shard_bytes", "batch_rows", "train_tokens", "validation_tokens")
        shares = {"validation_share": SHARE_BETWEEN, "max_codec_kl": NOT_NEGATIVE, "max_spread": NOT_NEGATIVE}
        check_settings(self, "", **dict.fromkeys(counts, AT_LEAST_1), **shares, seed=AT_LEAST_0)
        # Temperatures are checked here and not in `Selection`: a cache that is already written is read with any.
        check_settings(
            self.selection, "selection.", proposal_temperature=PROPOSAL_TEMPERATURE, tail_temperatures=TEMPERATURE
        )
        check_vllm(self.scorer, self.vllm_settings, self.selection, self.dtype)
        if self.scorer == "vllm" and self.parallel.is_set:
            raise UsageError(
                'parallel: vLLM lays its model out itself. Leave it out, and set vllm={"tensor_parallel_size": N}.'
            )
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


def choose_scorer(export: TeacherExport, recorded: str | None) -> ScorerName:
    """Returns the scorer as set, or transformers where `auto` was that when the cache began, as in earlier versions."""
    return "transformers" if export.scorer == "auto" and recorded == "transformers" else export.scorer
