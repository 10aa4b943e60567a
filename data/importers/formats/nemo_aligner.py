"""NeMo-Aligner's `chunked_jsonl`, an object a line:

    tokens, labels (already shifted), loss_mask     T numbers each
    topk_token_ids, topk_logits                     T rows of K
    log_sum_exp_logits                              T numbers (default: the tail is unknown)

Other keys are ignored. Without `log_sum_exp_logits`, logits do not show the mass outside the top-k.
"""

from collections.abc import Iterator

import numpy as np

from data.importers.parsed_entries import (
    Line,
    from_log_probs,
    from_logits,
    make_line,
    parse_entries,
    parse_ids,
    parse_mask,
)
from data.importers.rows import Row
from data.importers.settings import ImportSettings


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a line."""
    tokens, labels = (parse_ids(row[name], name, job.ids) for name in ("tokens", "labels"))
    T = len(tokens)
    if not T or len(labels) != T:
        raise ValueError(f"has {T} tokens and {len(labels)} labels; wanted equally many, and at least one")
    mask = parse_mask(row["loss_mask"], T)
    wrong = np.flatnonzero((labels[:-1] != tokens[1:]) & (mask[:-1] > 0))
    if len(wrong):
        raise ValueError(f"position {wrong[0]}: the label is {labels[wrong[0]]}, the next token {tokens[wrong[0] + 1]}")
    ids, logits = parse_entries(row["topk_token_ids"], row["topk_logits"], T, job.ids)
    if (normaliser := row.get("log_sum_exp_logits")) is None:
        entries = from_logits(ids, logits)
    else:
        sums = np.asarray(normaliser, np.float64)
        if sums.shape != (T,) or not np.isfinite(sums).all():
            raise ValueError(f"log_sum_exp_logits: {list(sums.shape)} numbers; wanted {T} finite ones")
        entries = from_log_probs(ids, logits - sums[:, None])
    yield make_line(where, np.append(tokens, labels[-1]), mask, entries)
