"""Rows of tables through pyarrow (extra `parquet`): Parquet, Arrow files and streams, folders of `save_to_disk`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from data.text_lines import check_unpacked_size
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, open_plain, printable, read_json
from kd_core.memory import bounded_memory

BATCH_ROWS = 256
MOST_MEMORY = 4 << 30  # bytes for a batch of rows
ARROW_MAGIC = b"ARROW1"
ChooseColumns = Callable[[Sequence[str]], list[str]]  # picks the columns to read from those of a table


@contextmanager
def table_file(path: Path, kind: str) -> Generator[BufferedReader]:
    """Opens the file of a table, and turns any error of pyarrow into a `UsageError`."""
    where = printable(path)
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{where}: {kind} needs the extra: pip install 'kd-workspace[parquet]'.") from None
    with open_plain(path, f"a file of {kind}") as file, damage_as_usage_error(where, kind, "Fetch or write it again"):
        try:
            yield file
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise UsageError(f"{where}: not {kind}, or damaged ({error}). Fetch or write it again.") from None


def _row_values(batch: Any) -> list[Any]:
    """Returns the fields of each row, or the error that reading them raised.

    Times beyond Python's calendar raise, for example. The rows of a failing batch are read one by one.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, ArithmeticError) as error:
        if batch.num_rows == 1:
            return [error]
        return [value for i in range(batch.num_rows) for value in _row_values(batch.slice(i, 1))]


def _bounded_rows(batches: Iterator[Any], path: Path) -> Iterator[list[Any]]:
    """Yields the rows of each batch, read within a bound on memory."""
    unpacked_bytes = 0
    while True:
        with bounded_memory(MOST_MEMORY):
            if (batch := next(batches, None)) is None:
                return
            unpacked_bytes += batch.nbytes
            check_unpacked_size(path, unpacked_bytes)
            values = _row_values(batch)
        yield values


def parquet_batches(path: Path, choose_columns: ChooseColumns) -> Iterator[list[Any]]:
    """Yields the rows of a Parquet file in batches, with the columns that `choose_columns` picks.

    Raises:
        UsageError: the file is damaged, or pyarrow is not installed.
    """
    with table_file(path, "Parquet") as file:
        from pyarrow import parquet  # noqa: PLC0415

        with parquet.ParquetFile(file) as opened:
            columns = choose_columns([str(column) for column in opened.schema_arrow.names])
            yield from _bounded_rows(opened.iter_batches(batch_size=BATCH_ROWS, columns=columns), path)


def _checked_batches(opened: Any, choose_columns: ChooseColumns) -> Iterator[Any]:
    """Yields the batches of an Arrow file or stream, fully validated.

    Reading values trusts the offsets of a batch, so a damaged one must not get that far.
    """
    columns = choose_columns([str(column) for column in opened.schema.names])
    is_file = hasattr(opened, "num_record_batches")
    batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
    for batch in batches:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        for start in range(0, chosen.num_rows, BATCH_ROWS):
            yield chosen.slice(start, BATCH_ROWS)


def arrow_batches(path: Path, choose_columns: ChooseColumns) -> Iterator[list[Any]]:
    """Yields the rows of an Arrow file or stream in batches, otherwise as `parquet_batches`."""
    with table_file(path, "Arrow") as file:
        from pyarrow import ipc  # noqa: PLC0415

        is_file = file.peek(len(ARROW_MAGIC)).startswith(ARROW_MAGIC)
        with ipc.open_file(file) if is_file else ipc.open_stream(file) as opened:
            yield from _bounded_rows(_checked_batches(opened, choose_columns), path)


def saved_table_files(folder: Path) -> set[str] | None:
    """Returns the names of the tables in a folder written by `save_to_disk` of `datasets`, or None for other folders.

    Other tables in such a folder are left over from transformations, and are not part of the data set.

    Raises:
        UsageError: the folder's state is damaged, or selects rows by an index.
    """
    path = folder / "state.json"
    if not path.exists() or not (folder / "dataset_info.json").exists():
        return None
    with damage_as_usage_error(path, "the state of a saved data set", "Save it again"):
        state = read_json(path, "the state of a saved data set")
        if state.get("_indices_data_files"):
            raise UsageError(f"{path}: selects rows by an index. Save it again after flatten_indices().")
        return {str(item["filename"]) for item in state["_data_files"]}


def table_bytes(path: Path) -> int:
    """Returns the bytes of a Parquet file's columns, unpacked.

    Raises:
        UsageError: the file is damaged, or pyarrow is not installed.
    """
    with table_file(path, "Parquet") as file:
        from pyarrow import parquet  # noqa: PLC0415

        with parquet.ParquetFile(file) as opened:
            metadata = opened.metadata
            return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
