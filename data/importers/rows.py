"""Rows of other systems' files: objects in lines of JSON, and rows of Parquet.

    file → chunks, in this process → one process a chunk: rows → a format's parser → records

Lines are read in one process, since their ends are not known before, and parsed in others. Only one row is in memory
as Python values at a time. Lists of a table's row are numpy arrays: [n], [n, m], or a list of arrays where they are of
several lengths.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.table_rows import MOST_MEMORY, table_file
from data.importers.facts import Facts
from data.importers.parsed_entries import Line
from data.importers.settings import Chunk, ImportSettings, file_name, source_files
from data.text_lines import PACKED, check_unpacked_size, decode_utf8, parse_json, read_lines, require_object
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.memory import bounded_memory

LINE_ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".ndjson") for packed in ("", *PACKED))
TABLE_ENDING = ".parquet"
ROWS_AT_ONCE = 8  # of a table, in memory as Arrow's arrays
Row = dict[str, Any]
ParseRow = Callable[[Row, str, ImportSettings], Iterable[Line]]
"""Turns a row into records. The text names the row, as `a.jsonl:3`."""


@dataclass(frozen=True)
class RowFormat:
    """A format whose files hold an object for each sample.

    `takes_values` is False where the format itself says what its numbers are.
    """

    parse: ParseRow
    takes_values: bool = True
    endings: tuple[str, ...] = (*LINE_ENDINGS, TABLE_ENDING)

    def facts(self, job: ImportSettings) -> Facts | None:  # noqa: ARG002
        """Returns what the source says beside its rows, if it says anything."""
        return None

    def files_beside(self, job: ImportSettings) -> list[Path]:  # noqa: ARG002
        return []

    def chunks(self, job: ImportSettings) -> Iterator[Chunk]:
        """Yields the parts of a source in order."""
        for path in source_files(job.source, self.endings, self.files_beside(job)):
            name = file_name(job.source, path)
            if path.name.lower().endswith(TABLE_ENDING):
                yield from _table_chunks(path, name, job.chunk_bytes)
            else:
                yield from _line_chunks(path, name, job.chunk_bytes)

    def lines(self, chunk: Chunk, job: ImportSettings) -> Iterator[Line]:
        """Yields the records of a part.

        Raises:
            UsageError: a row does not fit the format. The message names file and line or row.
        """
        rows = _json_rows(chunk) if chunk.lines else _table_rows(chunk)
        for number, row in rows:
            where = f"{printable(chunk.path)}:{number}"
            try:
                for line in self.parse(row() if callable(row) else row, f"{chunk.name}:{number}", job):
                    yield line._replace(record=line.record.within(job.vocab_size))
            except UsageError:
                raise
            except KeyError as error:
                raise UsageError(f"{where}: no field {error}. Is it {job.kind}?") from None
            except (TypeError, AttributeError, LookupError) as error:  # Python's own words
                raise UsageError(
                    f"{where}: a field is of another type than {job.kind} has ({error!s:.200}). Is it {job.kind}?"
                ) from None
            except (ValueError, ArithmeticError, RecursionError) as error:
                raise UsageError(f"{where}: {error!s:.400}.") from None


def _line_chunks(path: Path, name: str, most_bytes: int) -> Iterator[Chunk]:
    """Yields runs of lines of about `most_bytes`."""
    lines, size, first = list[bytes](), 0, 1
    for line in read_lines(path):
        lines.append(line)
        size += len(line)
        if size >= most_bytes:
            yield Chunk(path, name, first, len(lines), tuple(lines))
            lines, size, first = [], 0, first + len(lines)
    if lines:
        yield Chunk(path, name, first, len(lines), tuple(lines))


def _json_rows(chunk: Chunk) -> Iterator[tuple[int, Callable[[], Row]]]:
    """Yields the number of each line that is not blank, and a function that parses it."""
    for number, line in enumerate(chunk.lines, chunk.first):
        if line.strip():
            where = f"{printable(chunk.path)}:{number}"

            def parse(line: bytes = line, where: str = where) -> Row:
                return require_object(parse_json(decode_utf8(line, where), where), where)

            yield number, parse


def _table_chunks(path: Path, name: str, most_bytes: int) -> Iterator[Chunk]:
    """Yields runs of rows of about `most_bytes`, each within a row group."""
    with table_file(path, "Parquet") as file:
        from pyarrow import parquet  # noqa: PLC0415 (an extra)

        first = 0
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            for index in range(opened.metadata.num_row_groups):
                group = opened.metadata.row_group(index)
                rows = max(1, group.num_rows * most_bytes // max(1, group.total_byte_size))
                for start in range(0, group.num_rows, rows):
                    yield Chunk(path, name, first + start, min(rows, group.num_rows - start))
                first += group.num_rows


def _group_of(metadata: Any, row: int) -> tuple[int, int]:
    """Returns the row group that holds a row of the file, and the row's number within it."""
    for index in range(metadata.num_row_groups):
        if row < (rows := metadata.row_group(index).num_rows):
            return index, row
        row -= rows
    raise ValueError("ends before a row that it had before. Do not change it during the conversion")


def _table_rows(chunk: Chunk) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a part, numbered through the file from 1 on."""
    with table_file(chunk.path, "Parquet") as file:
        from pyarrow import parquet  # noqa: PLC0415

        unpacked_bytes, number = 0, chunk.first
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            group, skipped = _group_of(opened.metadata, chunk.first)
            batches = opened.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group])
            while number < chunk.first + chunk.count:
                with bounded_memory(MOST_MEMORY):
                    batch = next(batches)
                    unpacked_bytes += batch.nbytes
                    check_unpacked_size(chunk.path, unpacked_bytes)
                    skip, skipped = min(skipped, batch.num_rows), max(0, skipped - batch.num_rows)
                for index in range(skip, min(batch.num_rows, skip + chunk.first + chunk.count - number)):
                    number += 1
                    yield number, {str(name): _row_value(batch.column(name)[index]) for name in batch.schema.names}


def _row_value(scalar: Any) -> Any:
    """Returns a value of a row: lists as numpy arrays, or as lists of them, and None where there is none."""
    values = getattr(scalar, "values", None)
    if values is None or not hasattr(values, "to_numpy"):  # no list
        return scalar.as_py()
    return _list_value(values)


def _list_value(values: Any) -> Any:
    """Returns a list of Arrow as a numpy array, or as a list of them where its lists are of several lengths."""
    import pyarrow as pa  # noqa: PLC0415

    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if pa.types.is_fixed_size_list(values.type):
        values, is_list = values.cast(pa.list_(values.type.value_type)), True
    if not is_list:
        plain = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        return values.to_numpy(zero_copy_only=False) if plain and not values.null_count else values.to_pylist()
    if values.null_count:
        return [None if item.values is None else _list_value(item.values) for item in values]
    if not len(values):
        return []
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    inner, edges = _list_value(values.flatten()), [0, *np.cumsum(lengths)]
    if isinstance(inner, np.ndarray) and (lengths == lengths[0]).all():
        return inner.reshape(len(lengths), int(lengths[0]), *inner.shape[1:])
    return [inner[start:end] for start, end in itertools.pairwise(edges)]
