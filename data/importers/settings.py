"""What a conversion is asked for, and the parts into which its source is cut."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from data.cache.codec.levels import Codec
from data.cache.codec.rank_tables import MAX_VOCABULARY
from data.folders import find_files
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.ranges import check_settings

log = logging.getLogger("kd")
UNKNOWN = "unknown"
CHUNK_ID, CHUNK_NUMBER = "CHUNK_ID", re.compile(r"[0-9]{1,12}")
Values = Literal["auto", "log_probs", "logits"]


@dataclass(frozen=True)
class ImportSettings:
    """Settings of an import.

    Args:
        kind: format of the source, one of `FORMATS`.
        source: a file, a folder, or a path with CHUNK_ID.
        vocab_size: tokens of the real vocabulary.
        tokenizer: the tokenizer's fingerprint, or `UNKNOWN`.
        codec: how blocks are coded.
        max_codec_kl: largest mean KL(original‖decoded) of a block, in nats. The import stops above it.
        block_positions: about the number of positions that are coded together.
        shard_bytes: about the size of a shard.
        columns: columns of a padded model, if more than `vocab_size`. Entries of padding are left out.
        values: what the numbers of entries are. `auto` is what the format's own writer leaves.
        tokens: file with the tokens of each sample, for formats that hold none (`megatron`).
        loss_mask: file with the loss mask of each sample, beside `tokens`.
        compression: DistillKit's configuration of its codec (`distillkit`).
        chunk_bytes: about the bytes of the source that a process reads at once. It bounds memory and what is repeated
            after an interruption.
    """

    kind: str
    source: str
    vocab_size: int
    tokenizer: str
    codec: Codec = "standard"
    max_codec_kl: float = 1e-3
    block_positions: int = 8192
    shard_bytes: int = 4_000_000
    columns: int = 0
    values: Values = "auto"
    tokens: str = ""
    loss_mask: str = ""
    compression: str = ""
    chunk_bytes: int = 1 << 25

    def __post_init__(self) -> None:
        check_settings(self, "--")
        if self.vocab_size > MAX_VOCABULARY:
            raise UsageError(f"--vocab_size: got {self.vocab_size}; a cache has at most {MAX_VOCABULARY}. Correct it.")
        for name in ("vocab_size", "block_positions", "shard_bytes", "chunk_bytes"):
            if (number := getattr(self, name)) < 1:
                raise UsageError(f"--{name}: got {number}; wanted at least 1.")

    @property
    def ids(self) -> int:
        """Returns the number of ids that may stand in the source, padding included."""
        return max(self.columns, self.vocab_size)


@dataclass(frozen=True)
class Chunk:
    """A part of a source that one process reads.

    `name` is that of the file within the source. The meaning of `first` and `count` is the format's: line numbers, rows
    of a table, or bytes of a tar. `lines` are the lines themselves, where the source has lines, and `numbers` what else
    the format knows of the part.
    """

    path: Path
    name: str
    first: int
    count: int
    lines: tuple[bytes, ...] = ()
    numbers: tuple[int, ...] = ()


@cache
def _log_left_out(source: str, count: int, summary: str) -> None:
    """Logs once what is left out, for a conversion lists its source several times."""
    log.info("source %s: %d left out: %s", printable(Path(source)), count, summary)


def source_files(source: str, endings: tuple[str, ...], beside: Sequence[Path] = ()) -> list[Path]:
    """Returns the files of a source in order. Those `beside` them are read too, and do not count as left out.

    Raises:
        UsageError: there is none, or a chunk between others is missing.
    """
    if CHUNK_ID not in source:
        path = Path(source)
        if path.is_file():
            return [path]
        folder_files = find_files(path, lambda file: file.name.lower().endswith(endings)) if path.is_dir() else None
        if folder_files is None or not folder_files.files:
            suffixes = " or ".join(endings[:3])
            raise UsageError(
                f"{source}: no such file, and no folder of {suffixes} files. Name one, or a path with {CHUNK_ID}."
            )
        folder_files.left_out -= Counter(file.suffix for file in beside if path in file.parents)
        if folder_files.left_out:
            _log_left_out(source, folder_files.left_out.total(), folder_files.summary())
        return folder_files.files
    before, _, after = Path(source).name.partition(CHUNK_ID)
    chunks: dict[int, Path] = {}
    for path in Path(source).parent.glob(f"{before}*{after}"):
        number = path.name[len(before) : len(path.name) - len(after)]
        if CHUNK_NUMBER.fullmatch(number):
            chunks[int(number)] = path
    missing = next((number for number in range(max(1, len(chunks))) if number not in chunks), None)
    if missing is not None:
        missing_path = source.replace(CHUNK_ID, str(missing))
        raise UsageError(
            f"{missing_path}: no such chunk; there are {len(chunks)} others. Restore it: chunks count from 0."
        )
    return [chunks[number] for number in sorted(chunks)]


def file_name(source: str, path: Path) -> str:
    """Returns the name of a file within its source, for the names of documents."""
    root = Path(source)
    return printable(path.relative_to(root) if root.is_dir() else Path(path.name))
