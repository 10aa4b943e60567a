"""Rows out of files, by the file's ending, one at a time: text files, JSON lines (also gzipped), Parquet."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from data.text_lines import lines_of, refuse_bomb
from kd_core.errors import UsageError
from kd_core.files import damaged, open_plain
from kd_core.memory import bounded_memory

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_ROWS = 256
MOST_DOCUMENT = 1 << 28  # bytes
MOST_MEMORY = 4 << 30  # bytes for a batch of Parquet's rows


class BadRowError(UsageError):
    """One row of a corpus that cannot be used; `reason` names its kind in a few words, so that rows can be counted."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """Where it lies (for messages), a name that stays the same between exports, and the text or the fields."""

    where: str
    name: str
    value: str | dict[str, Any]


def _decoded(payload: bytes, where: str) -> str:
    try:
        return payload.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it, e.g. with iconv."
        ) from None


def _text_file(path: Path, name: str, keys: set[str]) -> Iterator[Row]:
    del keys
    with open_plain(path, "a text file") as file:
        payload = file.read(MOST_DOCUMENT + 1)
    if len(payload) > MOST_DOCUMENT:
        raise UsageError(f"{path}: has {path.stat().st_size} bytes; a document has {MOST_DOCUMENT} at most. Split it.")
    text = _decoded(payload, str(path))
    yield Row(str(path), name, text.replace("\r\n", "\n").replace("\r", "\n"))


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    text = _decoded(line, where)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # an escape that may stand alone, and then is no character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: half a surrogate pair ({error.object[error.start]!a}) is no text.") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        hint = " A JSON array? Wanted an object a line: jq -c '.[]'." if text.lstrip().startswith("[") else ""
        raise UsageError(f"{where}: not JSON ({getattr(error, 'msg', error)}).{hint}") from None
    if not isinstance(value, dict):
        hint = " One object a line: jq -c '.[]'." if isinstance(value, list) else ""
        raise UsageError(f"{where}: holds a {type(value).__name__}, wanted a JSON object.{hint}")
    return cast(dict[str, Any], value)


def _json_lines(path: Path, name: str, keys: set[str]) -> Iterator[Row]:
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            found = _json_object(line, f"{path}:{number}")
            yield Row(f"{path}:{number}", f"{name}:{number}", _present(found, keys))


def _present(fields: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """The row without nulls, which Parquet writes for what is not there; other columns keep only their names."""
    return {key: value if key in keys else None for key, value in fields.items() if value is not None}


def _parquet_rows(path: Path, name: str, keys: set[str]) -> Iterator[Row]:
    """A few rows in memory at a time, and of them only the columns that are wanted."""
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise UsageError(f"{path}: Parquet needs the extra: pip install 'kd-workspace[parquet]'.") from None
    with open_plain(path, "a Parquet file") as file, damaged(path, "Parquet", "Fetch or write it again"):
        try:
            yield from _rows_of_parquet(parquet.ParquetFile(file), path, name, keys)
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise UsageError(f"{path}: not Parquet, or damaged ({error}). Fetch or write it again.") from None


def _rows_of_parquet(opened: Any, path: Path, name: str, keys: set[str]) -> Iterator[Row]:
    with opened as file:
        columns = [str(column) for column in file.schema_arrow.names]
        if not keys & set(columns):
            raise UsageError(
                f"{path}: has the columns {', '.join(map(repr, columns)) or '(none)'}; wanted one of "
                f"{', '.join(map(repr, sorted(keys)))}. Name the column of the texts: corpus.text_field."
            )
        batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=[c for c in columns if c in keys])
        number = made = 0
        while True:
            with bounded_memory(MOST_MEMORY):
                if (batch := next(batches, None)) is None:
                    return
                rows = batch.to_pylist()
            made += batch.nbytes
            refuse_bomb(path, made)
            for found in rows:
                number += 1
                yield Row(f"{path}: row {number}", f"{name}:{number}", _present(found, keys))


FORMATS: dict[str, Callable[[Path, str, set[str]], Iterator[Row]]] = {
    ".txt": _text_file,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet_rows,
}


def has_known_ending(path: Path) -> bool:
    """Whether the file's ending is one of `FORMATS`."""
    return path.name.lower().endswith(tuple(FORMATS))


def rows_of(path: Path, name: str, keys: set[str]) -> Iterator[Row]:
    """The rows of a file, of their fields those in `keys`; a file of unknown ending is text.

    Raises:
        UsageError: the file is damaged, not of its ending's format, or has none of the keys.
    """
    read = next((read for ending, read in FORMATS.items() if path.name.lower().endswith(ending)), _text_file)
    return read(path, name, keys)
