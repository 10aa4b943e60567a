"""`distillkit`: rows of DistillKit's captures, in Parquet, each a text or several that `distillkit-pack-logits` packed:

    input_ids                                   L ids
    compressed_logprobs, bytepacked_indices     bytes of today's codec, or
    packed_indices, exact_values, coeffs        lists of the legacy codec, or
    token_ids, top_values                       K ids and numbers, not compressed
    attention_mask                              the number of the text in a packed row, 0 of padding (default: one text)
    labels                                      of input_ids; −100 is not scored (default: all are scored)

Row t of the teacher is its distribution of token t + 1. There are L rows, or L − 1. The last row of a text in a packed
row belongs to a token that was cut off, and is left out.

`compressed_logprobs` are log-probabilities. The legacy codec and `top_values` were also written of logits, and are
renormalised over the entries, as DistillKit does, unless `--values=log_probs` says that they are log-probabilities.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.record import Array
from data.importers.formats.axolotl import NOT_SCORED
from data.importers.formats.distillkit_codec import CurveCodec, LegacyCodec, read_codec
from data.importers.parsed_entries import Line, check_entries, make_line, normalise, parse_ids
from data.importers.rows import TABLE_ENDING, Row, RowFormat
from data.importers.settings import ImportSettings, Values
from kd_core.errors import UsageError

CONFIG_FILE = "compression_config.yaml"  # which a capture has beside its rows
# The mass of a decoded position may exceed 1 by the codec's error, and is scaled back. Logits would make far more.
MOST_DECODED_MASS = 10.0


def _config_file(source: str) -> Path:
    return (Path(source) if Path(source).is_dir() else Path(source).parent) / CONFIG_FILE


@cache
def _codec(compression: str, source: str) -> CurveCodec | LegacyCodec:
    """Returns the codec that was named, or the one beside the rows."""
    beside = _config_file(source)
    if not compression and not beside.is_file():
        raise UsageError(
            f"{source}: the rows are compressed, and no {CONFIG_FILE} lies beside them. Name it: --compression=FILE, "
            "DistillKit's configuration of the capture, or that of a training with its logprob_compressor or "
            "legacy_logit_compression."
        )
    return read_codec(Path(compression) if compression else beside)


def _matrix(value: Any, name: str) -> Array:
    """Returns a list of equally long lists of numbers as an array [T, n]."""
    try:
        rows = np.asarray(value)
    except ValueError:  # lists of several lengths
        rows = np.zeros(0)
    if rows.ndim != 2 or rows.dtype.kind not in "iuf":
        raise ValueError(f"{name}: wanted a list of equally many numbers for each position")
    return rows


def _teacher(row: Row, job: ImportSettings) -> tuple[Array, Array, Values]:
    """Returns ids [R, K] and numbers [R, K] of the teacher's rows, and what the numbers are if nothing else is said."""
    if "top_values" in row:
        return _matrix(row["token_ids"], "token_ids"), _matrix(row["top_values"], "top_values"), "logits"
    codec = _codec(job.compression, job.source)
    if "compressed_logprobs" in row and isinstance(codec, CurveCodec):
        packed = _matrix(row["bytepacked_indices"], "bytepacked_indices")
        return codec.ids(packed), codec.decode(_matrix(row["compressed_logprobs"], "compressed_logprobs")), "log_probs"
    if "packed_indices" in row and isinstance(codec, LegacyCodec):
        exact, curve = (_matrix(row[name], name) for name in ("exact_values", "coeffs"))
        return codec.ids(_matrix(row["packed_indices"], "packed_indices")), codec.decode(exact, curve), "logits"
    missing = "logprob_compressor" if "compressed_logprobs" in row else "legacy_logit_compression"
    raise ValueError(f"has columns {', '.join(row)}; --compression has no {missing} for them")


def _texts(row: Row, tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yields the first and the last token + 1 of each text of a row."""
    if (mask := row.get("attention_mask")) is None:
        yield 0, tokens
        return
    numbers = np.asarray(mask)
    if numbers.shape != (tokens,) or numbers.dtype.kind not in "iu":
        raise ValueError(f"attention_mask: {numbers.size} of {numbers.dtype} for {tokens} tokens; wanted whole numbers")
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1), tokens]
    for start, end in itertools.pairwise(edges):
        if numbers[start] and start < rows:
            yield int(start), int(end)


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the records of a row, one for each text that it packs."""
    tokens = parse_ids(row["input_ids"], "input_ids", job.ids)
    ids, numbers, auto = _teacher(row, job)
    if len(ids) != len(numbers) or len(ids) not in (len(tokens), len(tokens) - 1):
        raise ValueError(f"has {len(ids)} rows of ids and {len(numbers)} of numbers for {len(tokens)} tokens")
    scored = np.ones(len(tokens), bool)
    if (labels := row.get("labels")) is not None:
        scored = np.asarray(labels) != NOT_SCORED
        if scored.shape != tokens.shape or (np.asarray(labels) != tokens)[scored].any():
            raise ValueError("labels: wanted those of input_ids, or −100, for each token")
    texts = list(_texts(row, len(tokens), len(ids)))
    for index, (start, end) in enumerate(texts):
        last = min(end - 1, len(ids))  # positions whose next token is of this text
        if last <= start:
            continue
        checked = check_entries(ids[start:last], numbers[start:last], job.ids)
        entries = normalise(*checked, job.values, auto, MOST_DECODED_MASS)
        name = where if len(texts) == 1 else f"{where}/{index}"
        yield make_line(name, tokens[start : last + 1], scored[start + 1 : last + 1].astype(np.uint8), entries)


class _DistillKit(RowFormat):
    def files_beside(self, job: ImportSettings) -> list[Path]:
        beside = _config_file(job.source)
        return [beside] if beside.is_file() and not job.compression else []


DISTILLKIT = _DistillKit(parse_row, endings=(TABLE_ENDING,))
