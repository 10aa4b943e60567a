"""Rows out of files, by the file's ending, one at a time: texts, JSON lines and arrays, CSV; tables in `tables.py`.

Text formats may be packed: `.jsonl.gz`, `.txt.zst`. A row that cannot be read stands in its place as a `BadRowError`,
so that others after it can be used.
"""

import codecs
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.corpus.table_rows import Choose, arrow_batches, parquet_batches
from data.text_lines import (
    PACKED,
    BadRowError,
    decoded,
    json_object,
    json_value,
    lines_of,
    open_unpacked,
    refuse_bomb,
    refuse_half_pairs,
    without_nulls,
)
from kd_core.errors import UsageError
from kd_core.files import printable

MOST_DOCUMENT = 1 << 28  # bytes
MOST_ELEMENT = 1 << 25  # characters of an element of a JSON array
JSON_STEP = 1 << 20  # characters of a JSON array at a time


class Row(NamedTuple):
    """A row: its place for messages, a name that stays the same, and its text, its fields or a fault."""

    where: str
    name: str
    value: str | dict[str, Any] | BadRowError


def _row(where: str, name: str, read: Callable[[], Any]) -> Row:
    try:
        return Row(where, name, read())
    except BadRowError as error:
        return Row(where, name, error)
    except RecursionError:
        return Row(where, name, BadRowError(f"{where}: nests too deeply. Drop it.", "nesting too deep"))


def _text_file(path: Path, name: str, choose: Choose) -> Iterator[Row]:
    del choose
    where = printable(path)

    def read() -> str:
        if len(payload) > MOST_DOCUMENT:
            message = f"{where}: has more than {MOST_DOCUMENT} bytes, which a document has at most. Split it."
            raise BadRowError(message, "too long a document")
        return decoded(payload, where).replace("\r\n", "\n").replace("\r", "\n")

    with open_unpacked(path, "a text file") as file:
        payload = file.read(MOST_DOCUMENT + 1)
    refuse_bomb(path, len(payload))
    yield _row(where, name, read)


def _json_lines(path: Path, name: str, choose: Choose) -> Iterator[Row]:
    del choose
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where = f"{printable(path)}:{number}"
        yield _row(
            where,
            f"{name}:{number}",
            lambda line=line, where=where: without_nulls(json_object(json_value(decoded(line, where), where), where)),
        )


def _json(path: Path, name: str, choose: Choose) -> Iterator[Row]:
    """JSON lines, or one array of objects."""
    with open_unpacked(path, "a JSON file") as file:
        head = file.read(JSON_STEP).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if head != b"[":
        yield from _json_lines(path, name, choose)
        return
    for number, (value, text) in enumerate(_json_elements(path), 1):
        where = f"{printable(path)}: row {number}"

        def read(value: Any = value, text: str = text, where: str = where) -> dict[str, Any]:
            refuse_half_pairs(value, text, where)
            return without_nulls(json_object(value, where))

        yield _row(where, f"{name}:{number}", read)


def _json_elements(path: Path) -> Iterator[tuple[Any, str]]:
    """The elements of an array, one at a time, each with its text.

    Raises:
        UsageError: it is no array of JSON, which says nothing of where the next element would begin.
    """
    decoder = json.JSONDecoder()
    number = made = 0
    with open_unpacked(path, "a JSON array") as file:
        text = _utf8(file, path)
        buffer, at = next(text).lstrip()[1:], 0
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if buffer.startswith("]", at):
                _refuse_rest(itertools.chain([buffer[at + 1 :]], text), number, path)
                return
            try:
                value, end = decoder.raw_decode(buffer, at)
                if end == len(buffer):  # a number may go on
                    raise ValueError("the array has no end")
            except (ValueError, RecursionError) as error:
                part = next(text, "") if len(buffer) - at < MOST_ELEMENT else ""
                if not part:
                    message = getattr(error, "msg", error)
                    raise UsageError(
                        f"{printable(path)}: not JSON after {number} elements of its array ({message}). Mend the file, "
                        "or write an object a line: jq -c '.[]'."
                    ) from None
                made += len(part)
                refuse_bomb(path, made)
                buffer, at = buffer[at:] + part, 0
                continue
            number += 1
            yield value, buffer[at:end]
            at = end


def _refuse_rest(text: Iterable[str], number: int, path: Path) -> None:
    """Refuse what stands behind an array, such as another one."""
    if rest := next(filter(None, map(str.strip, text)), ""):
        raise UsageError(
            f"{printable(path)}: goes on behind the {number} elements of its array ({rest!a:.40}). Write one array, or "
            "an object a line: jq -c '.[]'."
        )


def _utf8(file: IO[bytes], path: Path) -> Iterator[str]:
    """A file's text in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        payload = file.read(JSON_STEP)
        try:
            yield decoder.decode(payload, final=not payload)
        except UnicodeDecodeError as error:
            raise UsageError(f"{printable(path)}: not UTF-8 text ({error.reason}). Convert it with iconv.") from None
        if not payload:
            return


def _csv(path: Path, name: str, choose: Choose) -> Iterator[Row]:
    """Rows under a header, whose most frequent of comma, semicolon and tab divides cells. Empty cells are not there."""
    del choose
    csv.field_size_limit(MOST_DOCUMENT)
    lines = (line.decode(errors="surrogateescape") for line in lines_of(path))
    header = next(lines, "").removeprefix("\ufeff")
    reader = csv.reader(itertools.chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    where = printable(path)
    try:
        columns = next(reader, [])
        if twice := [column for column in columns if columns.count(column) > 1]:
            raise UsageError(f"{where}: the header has {twice[0]!r} twice. Rename one.")
        for number, cells in enumerate(reader, 1):
            if cells:
                own = f"{where}: row {number}"
                yield _row(own, f"{name}:{number}", lambda cells=cells, own=own: _csv_fields(columns, cells, own))
    except csv.Error as error:
        raise UsageError(f"{where}: not CSV at line {reader.line_num} ({error}). Write it again.") from None


def _csv_fields(columns: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(columns):
        message = f"{where}: has {len(cells)} cells, the header {len(columns)}. Quote cells that hold the delimiter."
        raise BadRowError(message, "cells that the header does not name")
    decoded("".join([*columns, *cells]).encode(errors="surrogateescape"), where)
    return {column: cell for column, cell in zip(columns, cells, strict=True) if cell}


def _table(read_batches: Callable[[Path, Choose], Iterator[list[Any]]]) -> "Reader":
    """A reader of tables, whose batches hold each row's fields, or its fault."""

    def read(path: Path, name: str, choose: Choose) -> Iterator[Row]:
        for number, value in enumerate(itertools.chain.from_iterable(read_batches(path, choose)), 1):
            where = f"{printable(path)}: row {number}"
            if isinstance(value, Exception):
                message = f"{where}: a value that cannot be read ({value!s:.300}). Write the column again, as text."
                yield Row(where, f"{name}:{number}", BadRowError(message, "a value that cannot be read"))
            else:
                yield _row(where, f"{name}:{number}", lambda value=value: without_nulls(value))

    return read


Reader = Callable[[Path, str, Choose], Iterator[Row]]
TEXTS: dict[str, Reader] = {".txt": _text_file, ".md": _text_file, ".markdown": _text_file}
LINES: dict[str, Reader] = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
TABLES = {".parquet": _table(parquet_batches), ".arrow": _table(arrow_batches), ".feather": _table(arrow_batches)}
FORMATS: dict[str, Reader] = {
    **{ending + packed: read for ending, read in {**TEXTS, **LINES}.items() for packed in ("", *PACKED)},
    **TABLES,
}


def reader_of(path: Path) -> Reader | None:
    """The reader of a file's ending; None where it has none of `FORMATS`."""
    return next((read for ending, read in FORMATS.items() if path.name.lower().endswith(ending)), None)


def rows_of(path: Path, name: str, choose: Choose) -> Iterator[Row]:
    """The rows of a file; of a table the columns that `choose` takes. A file of unknown ending is text.

    Raises:
        UsageError: the file is damaged, or not of its ending's format.
    """
    return (reader_of(path) or _text_file)(path, name, choose)
