"""`llamakd`: rows of the data set LlamaKD (codys12/LlamaKD on the hub), the top 32 of a teacher:

    inputs       [L] token ids
    targets      [L, 2, K]: log-probabilities and, as numbers of the same list, the ids of the tokens after input t

The row's last targets belong to a token that the row does not have, and are left out.
"""

from collections.abc import Iterator

import numpy as np

from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids
from data.importers.rows import Row
from data.importers.settings import ImportSettings


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a row."""
    tokens = parse_ids(row["inputs"], "inputs", job.ids)
    try:
        targets = np.asarray(row["targets"], np.float64)
    except ValueError:  # lists of several lengths
        targets = np.zeros(0)
    if len(tokens) < 2 or targets.ndim != 3 or targets.shape[:2] != (len(tokens), 2):
        raise ValueError(f"targets: {list(targets.shape)} for {len(tokens)} inputs; wanted [inputs, 2, K]")
    logs, ids = targets[:-1, 0], targets[:-1, 1]
    if not (np.isfinite(ids) & (ids == np.floor(ids))).all():
        raise ValueError("targets: the second list of a position holds numbers that are no ids")
    T = len(logs)
    entries = normalise(*parse_entries(ids.astype(np.int64), logs, T, job.ids), job.values)
    yield make_line(where, tokens, np.ones(T, np.uint8), entries)
