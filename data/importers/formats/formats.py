"""The formats of other people's caches, by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data.importers import server_lines
from data.importers.facts import Facts
from data.importers.formats import axolotl, llamakd, nemo_aligner, trl, vllm
from data.importers.formats.distillkit import DISTILLKIT
from data.importers.formats.huggingface import HUGGINGFACE
from data.importers.formats.megatron import Megatron
from data.importers.parsed_entries import Line
from data.importers.rows import RowFormat
from data.importers.settings import Chunk, ImportSettings
from kd_core.errors import UsageError


class Format(Protocol):
    """A format: how a source is cut into parts, and how a part becomes records.

    `files_beside` are those that its rows are read with, but those that a setting names.
    `takes_values` is False where the format itself says what its numbers are.
    """

    @property
    def takes_values(self) -> bool: ...
    @property
    def endings(self) -> tuple[str, ...]: ...
    def facts(self, job: ImportSettings) -> Facts | None: ...
    def files_beside(self, job: ImportSettings) -> list[Path]: ...
    def chunks(self, job: ImportSettings) -> Iterator[Chunk]: ...
    def lines(self, chunk: Chunk, job: ImportSettings) -> Iterator[Line]: ...


FORMATS: dict[str, Format] = {
    "nemo_aligner": RowFormat(nemo_aligner.parse_row, takes_values=False),
    "jsonl": RowFormat(server_lines.parse_row),
    "distillkit": DISTILLKIT,
    "megatron": Megatron(),
    "axolotl": RowFormat(axolotl.parse_row),
    "trl": RowFormat(trl.parse_row),
    "vllm": RowFormat(vllm.parse_row),
    "llamakd": RowFormat(llamakd.parse_row),
    "huggingface": HUGGINGFACE,
}


def format_of(job: ImportSettings) -> Format:
    """Returns the format of a job.

    Raises:
        UsageError: there is none of its name, or it cannot take one of the settings.
    """
    if job.kind not in FORMATS:
        raise UsageError(f"--format: got {job.kind!r}; wanted one of {', '.join(FORMATS)}.")
    chosen = FORMATS[job.kind]
    if job.values != "auto" and not chosen.takes_values:
        raise UsageError(f"--values: {job.kind} says itself what its numbers are. Leave it out.")
    if (job.tokens or job.loss_mask) and job.kind != "megatron":
        raise UsageError(f"--tokens and --loss_mask: {job.kind} has the tokens in its rows. Leave them out.")
    if job.compression and job.kind != "distillkit":
        raise UsageError(f"--compression is of distillkit; {job.kind} has none. Leave it out.")
    return chosen


def read_lines_of(job: ImportSettings) -> Iterator[Line]:
    """Yields all records of a source, in this process.

    Raises:
        UsageError: a row does not fit the format. The message names its place.
    """
    chosen = format_of(job)
    for chunk in chosen.chunks(job):
        yield from chosen.lines(chunk, job)
