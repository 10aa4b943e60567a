"""Rows of tables through pyarrow (extra `parquet`): Parquet, Arrow's files and streams, folders of `save_to_disk`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from data.text_lines import refuse_bomb
from kd_core.errors import UsageError
from kd_core.files import damaged, open_plain, printable, read_json
from kd_core.memory import bounded_memory

BATCH_ROWS = 256
MOST_MEMORY = 4 << 30  # bytes for a batch of rows
ARROW_FILE = b"ARROW1"
Choose = Callable[[Sequence[str]], list[str]]  # the columns to read, of those that a table has


@contextmanager
def _table_file(path: Path, kind: str) -> Generator[BufferedReader]:
    """Open a table's file; whatever pyarrow raises becomes one message."""
    where = printable(path)
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{where}: {kind} needs the extra: pip install 'kd-workspace[parquet]'.") from None
    with open_plain(path, f"a file of {kind}") as file, damaged(where, kind, "Fetch or write it again"):
        try:
            yield file
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise UsageError(f"{where}: not {kind}, or damaged ({error}). Fetch or write it again.") from None


def _row_values(batch: Any) -> list[Any]:
    """Each row's fields, or the error that reading them raises, such as of times that Python's calendar lacks."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, ArithmeticError) as error:
        if batch.num_rows == 1:
            return [error]
        return [value for i in range(batch.num_rows) for value in _row_values(batch.slice(i, 1))]


def _read(batches: Iterator[Any], path: Path) -> Iterator[list[Any]]:
    """Values of batches, within bounds of memory."""
    made = 0
    while True:
        with bounded_memory(MOST_MEMORY):
            if (batch := next(batches, None)) is None:
                return
            made += batch.nbytes
            refuse_bomb(path, made)
            values = _row_values(batch)
        yield values


def parquet_batches(path: Path, choose: Choose) -> Iterator[list[Any]]:
    """Rows of a Parquet file, a few at a time, of the columns that `choose` takes.

    Raises:
        UsageError: it is damaged, or there is no pyarrow.
    """
    with _table_file(path, "Parquet") as file:
        from pyarrow import parquet  # noqa: PLC0415

        with parquet.ParquetFile(file) as opened:
            columns = choose([str(column) for column in opened.schema_arrow.names])
            yield from _read(opened.iter_batches(batch_size=BATCH_ROWS, columns=columns), path)


def _arrow(opened: Any, choose: Choose) -> Iterator[Any]:
    """Batches of an Arrow file or stream, checked: its offsets are trusted by what reads values."""
    columns = choose([str(column) for column in opened.schema.names])
    is_file = hasattr(opened, "num_record_batches")
    whole = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
    for batch in whole:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        for start in range(0, chosen.num_rows, BATCH_ROWS):
            yield chosen.slice(start, BATCH_ROWS)


def arrow_batches(path: Path, choose: Choose) -> Iterator[list[Any]]:
    """Rows of an Arrow file or stream; otherwise as `parquet_batches`."""
    with _table_file(path, "Arrow") as file:
        from pyarrow import ipc  # noqa: PLC0415

        is_file = file.peek(len(ARROW_FILE)).startswith(ARROW_FILE)
        with ipc.open_file(file) if is_file else ipc.open_stream(file) as opened:
            yield from _read(_arrow(opened, choose), path)


def saved_files(folder: Path) -> set[str] | None:
    """The names of the tables of a folder that `save_to_disk` of `datasets` wrote; None where it is no such folder.

    Other tables in it are left over from transformations, and no part of the data set.

    Raises:
        UsageError: its state is damaged, or it selects rows by an index of its own.
    """
    path = folder / "state.json"
    if not path.exists() or not (folder / "dataset_info.json").exists():
        return None
    with damaged(path, "the state of a saved data set", "Save it again"):
        state = read_json(path, "the state of a saved data set")
        if state.get("_indices_data_files"):
            raise UsageError(f"{path}: selects rows by an index. Save it again after flatten_indices().")
        return {str(item["filename"]) for item in state["_data_files"]}
