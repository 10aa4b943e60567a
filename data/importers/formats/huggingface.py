"""`huggingface`: data sets that `launchers.convert --to=huggingface` wrote of a cache, and their columns.

    document, start            the document's name, and the index in it of the first token
    token_ids                  T + 1 ids: inputs are the first T, labels the last T
    loss_mask                  T times 0 or 1
    topk_token_ids             T lists of the ids of a position's entries
    topk_log_probs             T lists of their log-probabilities, float32, natural and over the whole vocabulary
    tail_log_prob              T times the log of the mass of all other tokens
    label_log_prob             T times that of token t + 1
    tail_log_prob_at_{τ}       T times log Σ p^(1/τ) over the tokens that are no entries, for further temperatures τ
    sampled_token_ids,         T lists of tokens drawn from the tail, and of their log importance weights
    sampled_log_weights

The columns of further temperatures and of samples are there where the cache has them. `cache.json` says what the
columns do not: vocabulary, tokenizer, teacher, what was kept and what is not known.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cache.record import Array, Record
from data.importers.facts import Facts, facts_file, read_facts, tail_column
from data.importers.parsed_entries import Line, check_entries, parse_entries, parse_ids, parse_mask
from data.importers.rows import TABLE_ENDING, Row, RowFormat
from data.importers.settings import ImportSettings
from kd_core.json_fields import check_integer


def _floats(row: Row, name: str, positions: int) -> Array:
    values = np.asarray(row[name], np.float32)
    if values.shape != (positions,):
        raise ValueError(f"{name}: {list(values.shape)} numbers; wanted {positions}")
    return values


def _lists(row: Row, ids: str, logs: str, positions: int, size: int) -> tuple[Array, Array]:
    """Returns two ragged columns as arrays [T, K], or [T, 0] where no position has one."""
    if not any(map(len, row[ids])) and len(row[ids]) == len(row[logs]) == positions:
        return np.zeros((positions, 0), np.int32), np.zeros((positions, 0), np.float32)
    parsed = parse_entries(row[ids], row[logs], positions, size)
    return check_entries(parsed[0], parsed[1].astype(np.float32), size)


def parse_row(row: Row, _: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a row, as the cache had it."""
    facts = read_facts(job.source)
    tokens, T = parse_ids(row["token_ids"], "token_ids", job.ids), len(row["loss_mask"])
    if len(tokens) != T + 1 or not T:
        raise ValueError(f"has {len(tokens)} token_ids and {T} numbers in loss_mask; wanted one more, and at least one")
    ids, logs = _lists(row, "topk_token_ids", "topk_log_probs", T, job.ids)
    drawn, weights = None, None
    if facts.selection.draws:
        drawn, weights = _lists(row, "sampled_token_ids", "sampled_log_weights", T, job.ids)
        weights = weights.astype(np.float32)
    record = Record(
        name="", document=str(row["document"]), start=check_integer(row["start"], "start", 0, 1 << 53),
        token_ids=tokens, loss_mask=parse_mask(row["loss_mask"], T), topk_token_ids=ids,
        topk_log_probs=logs.astype(np.float32), tail_log_prob=_floats(row, "tail_log_prob", T),
        label_log_prob=_floats(row, "label_log_prob", T), sampled_token_ids=drawn, sampled_log_weights=weights,
        tempered_tails={t: _floats(row, tail_column(t), T) for t in facts.selection.tail_temperatures},
    )  # fmt: skip
    yield Line(record, frozenset(facts.unknown))


class _HuggingFace(RowFormat):
    def facts(self, job: ImportSettings) -> Facts:
        return read_facts(job.source)

    def files_beside(self, job: ImportSettings) -> list[Path]:
        return [facts_file(job.source)]


HUGGINGFACE = _HuggingFace(parse_row, takes_values=False, endings=(TABLE_ENDING,))
