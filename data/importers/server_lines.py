"""`jsonl`: what any inference server can write, an object a line:

tokens                     T + 1 ids
top_ids, top_log_probs     T rows of any length: true log-probabilities of token t + 1 after tokens 0 … t
loss_mask                  T numbers (default: all are scored)
label_log_probs            T numbers (default: those of the labels' entries)
document                   a name (default: file and line)
"""

from collections.abc import Iterator

import numpy as np

from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids, parse_mask
from data.importers.rows import Row
from data.importers.settings import ImportSettings


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a line."""
    tokens = parse_ids(row["tokens"], "tokens", job.ids)
    T = len(tokens) - 1
    if T < 1:
        raise ValueError(f"tokens: {len(tokens)}; wanted at least two, an input and a label")
    entries = normalise(*parse_entries(row["top_ids"], row["top_log_probs"], T, job.ids), job.values)
    mask = parse_mask(row.get("loss_mask", np.ones(T)), T)
    yield make_line(str(row.get("document", where)), tokens, mask, entries, row.get("label_log_probs"))
