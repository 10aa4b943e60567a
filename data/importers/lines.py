"""Readers of other systems' caches in lines of JSON. A line is a record, and only one line is in memory at a time.

`nemo_aligner` is NeMo-Aligner's `chunked_jsonl`:

    tokens, labels (already shifted), loss_mask     T numbers each
    topk_token_ids, topk_logits                     T rows of K
    log_sum_exp_logits                              T numbers (default: the tail is unknown)

Other keys are ignored. The literal CHUNK_ID in a path stands for 0, 1, …. Without `log_sum_exp_logits`, logits do not
show the mass outside the top-k.

`jsonl` holds what any inference server returns:

    tokens                     T + 1 ids
    top_ids, top_log_probs     T rows of any length: true log-probabilities of token t + 1 after tokens 0 … t
    loss_mask                  T numbers (default: all are scored)
    label_log_probs            T numbers (default: those of the labels' entries)
    document                   a name (default: file and line)

The tail is the mass that the entries leave to 1. A label that is no entry has no log-probability in either format. It
is given the highest one that it can have: that of the least likely entry or of the whole tail, whichever is lower.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from data.cache.codec.header import check_size
from data.cache.record import UNUSED, Array, Record
from data.folders import find_files
from data.text_lines import PACKED, decode_utf8, parse_json, read_lines, require_object
from kd_core.errors import UsageError
from kd_core.files import printable
from kd_core.json_fields import short_repr

ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".ndjson") for packed in ("", *PACKED))
CHUNK_ID, CHUNK_NUMBER = "CHUNK_ID", re.compile(r"[0-9]{1,12}")
MOST_MASS = 1.05  # of a position's entries, which exceed 1 by the writer's rounding and are scaled back to 1


class Line(NamedTuple):
    """A record, and the fields that its source did not state."""

    record: Record
    unknown: frozenset[str]


def source_files(source: str) -> list[Path]:
    """Returns the files of a source in order.

    Raises:
        UsageError: there is none, or a chunk between others is missing.
    """
    if CHUNK_ID not in source:
        path = Path(source)
        if path.is_file():
            return [path]
        folder_files = find_files(path, lambda file: file.name.lower().endswith(ENDINGS)) if path.is_dir() else None
        if folder_files is None or not folder_files.files:
            raise UsageError(
                f"{source}: no such file, and no folder of .jsonl files. Name one, or a path with {CHUNK_ID}."
            )
        folder_files.log_left_out("source")
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


def read_records(source: str, kind: str, vocab_size: int, columns: int = 0) -> Iterator[Line]:
    """Yields all records of a source. Entries of padding, ids of `vocab_size` to `columns`, are left out.

    Raises:
        UsageError: a line does not fit the format. The message names file and line.
    """
    root = Path(source)
    for path in source_files(source):
        name = printable(path.relative_to(root) if root.is_dir() else Path(path.name))
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            where = f"{printable(path)}:{number}"
            value = require_object(parse_json(decode_utf8(line, where), where), where)
            try:
                parsed = PARSERS[kind](value, f"{name}:{number}", max(columns, vocab_size))
                yield parsed._replace(record=parsed.record.within(vocab_size))
            except KeyError as error:
                raise UsageError(f"{where}: no field {error}. Is it {kind}?") from None
            except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
                raise UsageError(f"{where}: {error!s:.400}.") from None


def _parse_ids(value: Any, name: str, vocab_size: int) -> Array:
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ValueError(f"{name}: wanted a list of token ids")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name}: ids {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}")
    return ids.astype(np.int32)


def _check_lists(rows: Any, name: str) -> None:
    """Raises for anything but a list of lists, such as a server's null for the first position."""
    if not isinstance(rows, list):
        raise ValueError(f"{name}: a {type(rows).__name__}; wanted a list of a list for each position")
    for i, row in enumerate(cast(list[Any], rows)):
        if not isinstance(row, list):
            raise ValueError(
                f"position {i}: its {name} are {short_repr(row)}; wanted a list, empty for a position without"
            )


def _parse_rows(ids: Any, logs: Any, positions: int, vocab_size: int) -> tuple[Array, Array]:
    """Returns ids and numbers as arrays [T, K]. Shorter rows are padded with unused entries."""
    _check_lists(ids, "ids")
    _check_lists(logs, "numbers")
    if len(ids) != positions or len(logs) != positions:
        raise ValueError(f"has {len(ids)} rows of ids and {len(logs)} of numbers for {positions} positions")
    widest = max(map(len, ids), default=0)
    if not widest:
        raise ValueError("has no entry at any position")
    check_size(positions, widest)
    all_ids, all_logs = np.zeros((positions, widest), np.int32), np.full((positions, widest), UNUSED)
    for row, (row_ids, values) in enumerate(zip(ids, logs, strict=True)):
        if len(row_ids) != len(values) or len(set(row_ids)) != len(row_ids):
            raise ValueError(f"position {row}: {len(row_ids)} ids for {len(values)} numbers, or an id twice")
        all_ids[row, : len(row_ids)] = _parse_ids(row_ids, f"ids of position {row}", vocab_size) if row_ids else 0
        all_logs[row, : len(row_ids)] = values
    if np.isnan(all_logs).any() or (all_logs == np.inf).any():
        raise ValueError("an entry is not a finite number")
    return all_ids, all_logs


def _parse_mask(value: Any, positions: int) -> Array:
    mask = np.asarray(value, np.float64)
    if mask.shape != (positions,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"loss_mask: wanted {positions} numbers, each 0 or 1")
    return mask.astype(np.uint8)


def _log_probs_and_tail(logs: Array) -> tuple[Array, Array]:
    """Returns the log-probabilities [T, K], scaled to a mass of at most 1, and the tail [T] that is missing to 1."""
    mass = np.exp(logs).sum(axis=1)
    if (mass > MOST_MASS).any():
        raise ValueError(f"position {int(mass.argmax())}: entries sum to {mass.max():.4f}; wanted probabilities")
    logs = logs - np.log(np.maximum(mass, 1))[:, None]
    with np.errstate(divide="ignore"):
        return logs, np.log1p(-np.minimum(np.exp(logs).sum(axis=1), 1))


def _make_record(
    document: str, token_ids: Array, mask: Array, ids: Array, logs: Array, tail: Array
) -> tuple[Record, bool]:
    """Returns the record, and True where every label is an entry."""
    # The label's log-probability is that of its entry, if it has one.  [T]
    labels = token_ids[1:]
    entry_log_prob = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1)
    # Otherwise it is bounded by the least likely entry, and by the tail where there is one.  [T]
    lowest = np.where(logs > UNUSED, logs, 0.0).min(axis=1)
    bound = np.where(tail > UNUSED, np.minimum(tail, lowest), lowest)
    record = Record(
        name="", document=document, start=0, token_ids=token_ids, loss_mask=mask, topk_token_ids=ids,
        topk_log_probs=logs.astype(np.float32), tail_log_prob=tail.astype(np.float32),
        label_log_prob=np.where(entry_log_prob > UNUSED, entry_log_prob, bound).astype(np.float32),
    )  # fmt: skip
    return record, bool((entry_log_prob > UNUSED).all())


def _parse_nemo_aligner(value: dict[str, Any], where: str, vocab_size: int) -> Line:
    tokens, labels = (_parse_ids(value[name], name, vocab_size) for name in ("tokens", "labels"))
    if not len(tokens) or len(labels) != len(tokens):
        raise ValueError(f"has {len(tokens)} tokens and {len(labels)} labels; wanted equally many, and at least one")
    mask = _parse_mask(value["loss_mask"], len(tokens))
    wrong = np.flatnonzero((labels[:-1] != tokens[1:]) & (mask[:-1] > 0))
    if len(wrong):
        raise ValueError(f"position {wrong[0]}: the label is {labels[wrong[0]]}, the next token {tokens[wrong[0] + 1]}")
    ids, logits = _parse_rows(value["topk_token_ids"], value["topk_logits"], len(tokens), vocab_size)
    normaliser = value.get("log_sum_exp_logits")
    if normaliser is None:
        # Renormalise over the top-k: log softmax of the stored logits, with an unknown tail.  [T, K]
        highest = logits.max(axis=1, keepdims=True)
        logs = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
        tail, unknown = np.full(len(tokens), UNUSED), {"tail"}
    else:
        if len(normaliser) != len(tokens):
            raise ValueError(f"log_sum_exp_logits: {len(normaliser)} numbers for {len(tokens)} positions")
        (logs, tail), unknown = _log_probs_and_tail(logits - np.asarray(normaliser, np.float64)[:, None]), set[str]()
    record, complete = _make_record(where, np.append(tokens, labels[-1]), mask, ids, logs, tail)
    return Line(record, frozenset(unknown if complete else {*unknown, "label_log_prob"}))


def _parse_jsonl(value: dict[str, Any], where: str, vocab_size: int) -> Line:
    tokens = _parse_ids(value["tokens"], "tokens", vocab_size)
    T = len(tokens) - 1
    if T < 1:
        raise ValueError(f"tokens: {len(tokens)}; wanted at least two, an input and a label")
    ids, logs = _parse_rows(value["top_ids"], value["top_log_probs"], T, vocab_size)
    logs, tail = _log_probs_and_tail(logs)
    mask = _parse_mask(value.get("loss_mask", np.ones(T)), T)
    record, complete = _make_record(str(value.get("document", where)), tokens, mask, ids, logs, tail)
    if (stated := value.get("label_log_probs")) is not None:
        if len(stated) != T or not all(-math.inf < log_prob <= 0 for log_prob in stated):
            raise ValueError(f"label_log_probs: wanted {T} log-probabilities")
        # Keep the value of an entry, which was scaled with the others, and take the stated one for all other labels.
        is_entry = (record.topk_token_ids == tokens[1:, None]).any(axis=1)
        record = replace(record, label_log_prob=np.where(is_entry, record.label_log_prob, stated).astype(np.float32))
        complete = True
    return Line(record, frozenset() if complete else frozenset({"label_log_prob"}))


PARSERS: dict[str, Callable[[dict[str, Any], str, int], Line]] = {
    "nemo_aligner": _parse_nemo_aligner,
    "jsonl": _parse_jsonl,
}
