"""Readers of corpus rows, chosen by a file's ending: texts, JSON lines and arrays, CSV, and tables (`table_rows.py`).

Readers yield one row at a time. Text formats may be packed: `.jsonl.gz`, `.txt.zst`. A row that cannot be read is a
`BadRowError` in its place, so that rows after it can be used.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.corpus.table_rows import ChooseColumns, arrow_batches, parquet_batches
from data.text_lines import (
    PACKED,
    BadRowError,
    check_surrogates,
    check_unpacked_size,
    decode_utf8,
    drop_nulls,
    open_unpacked,
    parse_json,
    read_lines,
    require_object,
)
from kd_core.errors import UsageError
from kd_core.files import printable

MAX_DOCUMENT_BYTES = 1 << 28  # bytes of a text file
MOST_ELEMENT = 1 << 25  # characters of an element of a JSON array
JSON_CHUNK_BYTES = 1 << 20  # bytes of a JSON file that are read at a time


class Row(NamedTuple):
    """A row: its place in a file for messages, a stable name, and its text, its fields or the error of reading it."""

    where: str
    name: str
    value: str | dict[str, Any] | BadRowError


def _try_row(where: str, name: str, read: Callable[[], Any]) -> Row:
    """Returns a row with the value that `read` returns, or with the error that it raises."""
    try:
        return Row(where, name, read())
    except BadRowError as error:
        return Row(where, name, error)
    except RecursionError:
        return Row(where, name, BadRowError(f"{where}: nests too deeply. Drop it.", "nesting too deep"))


def _read_text(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    del choose_columns
    where = printable(path)

    def read() -> str:
        if len(payload) > MAX_DOCUMENT_BYTES:
            message = f"{where}: has more than {MAX_DOCUMENT_BYTES} bytes, the most that a document may have. Split it."
            raise BadRowError(message, "too long a document")
        return decode_utf8(payload, where).replace("\r\n", "\n").replace("\r", "\n")

    with open_unpacked(path, "a text file") as file:
        payload = file.read(MAX_DOCUMENT_BYTES + 1)
    check_unpacked_size(path, len(payload))
    yield _try_row(where, name, read)


def _read_json_lines(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    del choose_columns
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{printable(path)}:{number}"
        yield _try_row(
            where,
            f"{name}:{number}",
            lambda line=line, where=where: drop_nulls(
                require_object(parse_json(decode_utf8(line, where), where), where)
            ),
        )


def _read_json(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, or of one array of objects."""
    with open_unpacked(path, "a JSON file") as file:
        first_byte = file.read(JSON_CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first_byte != b"[":
        yield from _read_json_lines(path, name, choose_columns)
        return
    for number, (value, text) in enumerate(_json_elements(path), 1):
        where = f"{printable(path)}: row {number}"

        def read(value: Any = value, text: str = text, where: str = where) -> dict[str, Any]:
            check_surrogates(value, text, where)
            return drop_nulls(require_object(value, where))

        yield _try_row(where, f"{name}:{number}", read)


def _json_elements(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields the elements of an array one at a time, each with its JSON text.

    Raises:
        UsageError: the array is not JSON. The rest cannot be read, since nothing shows where the next element begins.
    """
    decoder = json.JSONDecoder()
    number = characters = 0
    with open_unpacked(path, "a JSON array") as file:
        text = _utf8_chunks(file, path)
        buffer, position = next(text).lstrip()[1:], 0
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n,":
                position += 1
            if buffer.startswith("]", position):
                _refuse_rest(itertools.chain([buffer[position + 1 :]], text), number, path)
                return
            try:
                value, end = decoder.raw_decode(buffer, position)
                if end == len(buffer):  # a number may go on
                    raise ValueError("the array has no end")
            except (ValueError, RecursionError) as error:
                # The element may be cut off at the end of the buffer: read on and decode it again from its start.
                chunk = next(text, "") if len(buffer) - position < MOST_ELEMENT else ""
                if not chunk:
                    message = getattr(error, "msg", error)
                    raise UsageError(
                        f"{printable(path)}: not JSON after {number} elements of its array ({message}). Fix the file, "
                        "or write an object a line: jq -c '.[]'."
                    ) from None
                characters += len(chunk)
                check_unpacked_size(path, characters)
                buffer, position = buffer[position:] + chunk, 0
                continue
            number += 1
            yield value, buffer[position:end]
            position = end


def _refuse_rest(text: Iterable[str], number: int, path: Path) -> None:
    """Refuses text behind an array, such as another array."""
    if rest := next(filter(None, map(str.strip, text)), ""):
        raise UsageError(
            f"{printable(path)}: continues after the {number} elements of its array ({rest!a:.40}). Write one array, "
            "or an object a line: jq -c '.[]'."
        )


def _utf8_chunks(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yields the text of a file in chunks."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        payload = file.read(JSON_CHUNK_BYTES)
        try:
            yield decoder.decode(payload, final=not payload)
        except UnicodeDecodeError as error:
            raise UsageError(f"{printable(path)}: not UTF-8 text ({error.reason}). Convert it with iconv.") from None
        if not payload:
            return


def _read_csv(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    """Yields the rows under a header. Empty cells are left out of a row.

    The delimiter is the most frequent in the header of comma, semicolon and tab.
    """
    del choose_columns
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    lines = (line.decode(errors="surrogateescape") for line in read_lines(path))
    header = next(lines, "").removeprefix("\ufeff")
    reader = csv.reader(itertools.chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    where = printable(path)
    try:
        columns = next(reader, [])
        if repeated := [column for column in columns if columns.count(column) > 1]:
            raise UsageError(f"{where}: the header has {repeated[0]!r} twice. Rename one.")
        for number, cells in enumerate(reader, 1):
            if cells:
                row_where = f"{where}: row {number}"
                yield _try_row(
                    row_where,
                    f"{name}:{number}",
                    lambda cells=cells, row_where=row_where: _csv_fields(columns, cells, row_where),
                )
    except csv.Error as error:
        raise UsageError(f"{where}: not CSV at line {reader.line_num} ({error}). Write it again.") from None


def _csv_fields(columns: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(columns):
        message = f"{where}: has {len(cells)} cells, the header {len(columns)}. Quote cells that hold the delimiter."
        raise BadRowError(message, "cells that the header does not name")
    # Bytes that are not UTF-8 were kept as surrogates, so that the error names this row.
    decode_utf8("".join([*columns, *cells]).encode(errors="surrogateescape"), where)
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell}


def _table_reader(read_batches: Callable[[Path, ChooseColumns], Iterator[list[Any]]]) -> "Reader":
    """Returns a reader of tables. `read_batches` yields lists of rows: the fields of each, or the error it raised."""

    def read(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
        for number, value in enumerate(itertools.chain.from_iterable(read_batches(path, choose_columns)), 1):
            where = f"{printable(path)}: row {number}"
            if isinstance(value, Exception):
                message = f"{where}: a value that cannot be read ({value!s:.300}). Write the column again, as text."
                yield Row(where, f"{name}:{number}", BadRowError(message, "a value that cannot be read"))
            else:
                yield _try_row(where, f"{name}:{number}", lambda value=value: drop_nulls(value))

    return read


Reader = Callable[[Path, str, ChooseColumns], Iterator[Row]]
TEXT_READERS: dict[str, Reader] = {".txt": _read_text, ".md": _read_text, ".markdown": _read_text}
ROW_READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
TABLE_READERS = {
    ".parquet": _table_reader(parquet_batches),
    ".arrow": _table_reader(arrow_batches),
    ".feather": _table_reader(arrow_batches),
}
READERS: dict[str, Reader] = {
    **{ending + packed: read for ending, read in {**TEXT_READERS, **ROW_READERS}.items() for packed in ("", *PACKED)},
    **TABLE_READERS,
}


def choose_reader(path: Path) -> Reader | None:
    """Returns the reader for a file's ending, or None where `READERS` has none."""
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)


def read_rows(path: Path, name: str, choose_columns: ChooseColumns) -> Iterator[Row]:
    """Yields the rows of a file, by its ending. A file of unknown ending is read as text.

    Args:
        choose_columns: picks the columns to read of a table.

    Raises:
        UsageError: the file is damaged, or not of its ending's format.
    """
    return (choose_reader(path) or _read_text)(path, name, choose_columns)
