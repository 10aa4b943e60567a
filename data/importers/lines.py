"""Other systems' caches as lines of JSON: each line one record; read one at a time, never a whole file.

`nemo_aligner`: NeMo-Aligner's `chunked_jsonl`. `tokens`, `labels` (already shifted), `loss_mask`, `topk_logits` and
`topk_token_ids` in rows of K, `log_sum_exp_logits`; other keys are left alone. The literal CHUNK_ID in a path stands
for 0, 1, …. Without `log_sum_exp_logits` the logits say nothing of the mass outside the top-k: the tail is unknown.

`jsonl`: what any inference server gives. `tokens` of T + 1 ids; `top_ids` and `top_log_probs` of T rows, of any
length, true log-probabilities of token t + 1 after tokens 0 … t; `loss_mask` of T numbers (default: all scored);
`label_log_probs` of T (default: of the label's entry); `document` (default: file and line).

The tail is what is missing to 1. A label that is no entry has no log-probability in either: it is given the most that
it can have, that of the least likely entry or of the whole tail.
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
MOST_MASS = 1.05  # of entries, by rounding of what wrote them: it is scaled back to 1


class Line(NamedTuple):
    """A record, and what its source did not say."""

    record: Record
    unknown: frozenset[str]


def files_of(source: str) -> list[Path]:
    """The files of a source, in order.

    Raises:
        UsageError: there is none, or a chunk is missing between others.
    """
    if CHUNK_ID not in source:
        path = Path(source)
        if path.is_file():
            return [path]
        found = find_files(path, lambda file: file.name.lower().endswith(ENDINGS)) if path.is_dir() else None
        if found is None or not found.files:
            raise UsageError(
                f"{source}: no such file, and no folder of .jsonl files. Name one, or a path with {CHUNK_ID}."
            )
        found.log_left_out("source")
        return found.files
    before, _, after = Path(source).name.partition(CHUNK_ID)
    chunks: dict[int, Path] = {}
    for path in Path(source).parent.glob(f"{before}*{after}"):
        number = path.name[len(before) : len(path.name) - len(after)]
        if CHUNK_NUMBER.fullmatch(number):
            chunks[int(number)] = path
    missing = next((number for number in range(max(1, len(chunks))) if number not in chunks), None)
    if missing is not None:
        wanted = source.replace(CHUNK_ID, str(missing))
        raise UsageError(f"{wanted}: no such chunk; there are {len(chunks)} others. Restore it: chunks count from 0.")
    return [chunks[number] for number in sorted(chunks)]


def read_records(source: str, kind: str, vocab_size: int, columns: int = 0) -> Iterator[Line]:
    """Yields all records of a source. Entries of padding, which `columns` has beyond the vocabulary, are left out.

    Raises:
        UsageError: file and line, what was found there, what was wanted.
    """
    root = Path(source)
    for path in files_of(source):
        name = printable(path.relative_to(root) if root.is_dir() else Path(path.name))
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            where = f"{printable(path)}:{number}"
            value = require_object(parse_json(decode_utf8(line, where), where), where)
            try:
                found = KINDS[kind](value, f"{name}:{number}", max(columns, vocab_size))
                yield found._replace(record=found.record.within(vocab_size))
            except KeyError as error:
                raise UsageError(f"{where}: no field {error}. Is it {kind}?") from None
            except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
                raise UsageError(f"{where}: {error!s:.400}.") from None


def _ids(value: Any, name: str, vocab_size: int) -> Array:
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ValueError(f"{name}: wanted a list of token ids")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{name}: ids {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}")
    return ids.astype(np.int32)


def _check_lists(rows: Any, name: str) -> None:
    """Refuse what is no list of lists, such as a server's null for the first position."""
    if not isinstance(rows, list):
        raise ValueError(f"{name}: a {type(rows).__name__}; wanted a list of a list for each position")
    for i, row in enumerate(cast(list[Any], rows)):
        if not isinstance(row, list):
            raise ValueError(
                f"position {i}: its {name} are {short_repr(row)}; wanted a list, empty for a position without"
            )


def _rows(ids: Any, logs: Any, positions: int, vocab_size: int) -> tuple[Array, Array]:
    """Ids and numbers as [T, K], padded where rows are shorter."""
    _check_lists(ids, "ids")
    _check_lists(logs, "numbers")
    if len(ids) != positions or len(logs) != positions:
        raise ValueError(f"has {len(ids)} rows of ids and {len(logs)} of numbers for {positions} positions")
    widest = max(map(len, ids), default=0)
    if not widest:
        raise ValueError("has no entry at any position")
    check_size(positions, widest)
    all_ids, all_logs = np.zeros((positions, widest), np.int32), np.full((positions, widest), UNUSED)
    for row, (some, values) in enumerate(zip(ids, logs, strict=True)):
        if len(some) != len(values) or len(set(some)) != len(some):
            raise ValueError(f"position {row}: {len(some)} ids for {len(values)} numbers, or an id twice")
        all_ids[row, : len(some)] = _ids(some, f"ids of position {row}", vocab_size) if some else 0
        all_logs[row, : len(some)] = values
    if np.isnan(all_logs).any() or (all_logs == np.inf).any():
        raise ValueError("an entry is no finite number")
    return all_ids, all_logs


def _mask(value: Any, positions: int) -> Array:
    mask = np.asarray(value, np.float64)
    if mask.shape != (positions,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"loss_mask: wanted {positions} numbers, each 0 or 1")
    return mask.astype(np.uint8)


def _tail(logs: Array) -> tuple[Array, Array]:
    """Log-probabilities that sum to 1 at most, and what is missing to it."""
    mass = np.exp(logs).sum(axis=1)
    if (mass > MOST_MASS).any():
        raise ValueError(f"position {int(mass.argmax())}: entries sum to {mass.max():.4f}; wanted probabilities")
    logs = logs - np.log(np.maximum(mass, 1))[:, None]
    with np.errstate(divide="ignore"):
        return logs, np.log1p(-np.minimum(np.exp(logs).sum(axis=1), 1))


def _record(document: str, token_ids: Array, mask: Array, ids: Array, logs: Array, tail: Array) -> tuple[Record, bool]:
    """The record, and whether every label is an entry."""
    labels = token_ids[1:]
    own = np.where(ids == labels[:, None], logs, UNUSED).max(axis=1)
    lowest = np.where(logs > UNUSED, logs, 0.0).min(axis=1)
    most = np.where(tail > UNUSED, np.minimum(tail, lowest), lowest)
    record = Record(
        name="", document=document, start=0, token_ids=token_ids, loss_mask=mask, topk_token_ids=ids,
        topk_log_probs=logs.astype(np.float32), tail_log_prob=tail.astype(np.float32),
        label_log_prob=np.where(own > UNUSED, own, most).astype(np.float32),
    )  # fmt: skip
    return record, bool((own > UNUSED).all())


def _nemo_aligner(value: dict[str, Any], where: str, vocab_size: int) -> Line:
    tokens, labels = (_ids(value[name], name, vocab_size) for name in ("tokens", "labels"))
    if not len(tokens) or len(labels) != len(tokens):
        raise ValueError(f"has {len(tokens)} tokens and {len(labels)} labels; wanted as many, and one at least")
    mask = _mask(value["loss_mask"], len(tokens))
    wrong = np.flatnonzero((labels[:-1] != tokens[1:]) & (mask[:-1] > 0))
    if len(wrong):
        raise ValueError(f"position {wrong[0]}: the label is {labels[wrong[0]]}, the next token {tokens[wrong[0] + 1]}")
    ids, logits = _rows(value["topk_token_ids"], value["topk_logits"], len(tokens), vocab_size)
    normaliser = value.get("log_sum_exp_logits")
    if normaliser is None:
        highest = logits.max(axis=1, keepdims=True)
        logs = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
        tail, unknown = np.full(len(tokens), UNUSED), {"tail"}
    else:
        if len(normaliser) != len(tokens):
            raise ValueError(f"log_sum_exp_logits: {len(normaliser)} numbers for {len(tokens)} positions")
        (logs, tail), unknown = _tail(logits - np.asarray(normaliser, np.float64)[:, None]), set[str]()
    record, complete = _record(where, np.append(tokens, labels[-1]), mask, ids, logs, tail)
    return Line(record, frozenset(unknown if complete else {*unknown, "label_log_prob"}))


def _jsonl(value: dict[str, Any], where: str, vocab_size: int) -> Line:
    tokens = _ids(value["tokens"], "tokens", vocab_size)
    T = len(tokens) - 1
    if T < 1:
        raise ValueError(f"tokens: {len(tokens)}; wanted two at least, an input and a label")
    ids, logs = _rows(value["top_ids"], value["top_log_probs"], T, vocab_size)
    logs, tail = _tail(logs)
    mask = _mask(value.get("loss_mask", np.ones(T)), T)
    record, complete = _record(str(value.get("document", where)), tokens, mask, ids, logs, tail)
    if (given := value.get("label_log_probs")) is not None:
        if len(given) != T or not all(-math.inf < each <= 0 for each in given):
            raise ValueError(f"label_log_probs: wanted {T} log-probabilities")
        own = (record.topk_token_ids == tokens[1:, None]).any(axis=1)
        record = replace(record, label_log_prob=np.where(own, record.label_log_prob, given).astype(np.float32))
        complete = True
    return Line(record, frozenset() if complete else frozenset({"label_log_prob"}))


KINDS: dict[str, Callable[[dict[str, Any], str, int], Line]] = {"nemo_aligner": _nemo_aligner, "jsonl": _jsonl}
