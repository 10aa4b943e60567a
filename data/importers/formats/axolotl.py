"""`axolotl`: rows of Axolotl's data sets for distillation, as its preprocessing leaves them:

    input_ids, labels                  L ids; a label of −100 is not scored
    target_token_ids, target_logprobs  L rows of K: token i after the tokens before it, as in the trainer, which shifts
    target_mask                        L rows of K times 0 or 1: entries of 0 are not used (default: all are)

A null among target_logprobs stands for −inf.

Its preprocessing renormalises over the entries, at the temperature of the training (`kd_temperature`). So the mass
outside is unknown. A row of texts with `token_id:N` has no tokens, and is refused.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.cache.record import UNUSED, Array
from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids
from data.importers.rows import Row
from data.importers.settings import ImportSettings
from kd_core.json_fields import short_repr

NOT_SCORED = -100


def _used(ids: Any, logs: Any, mask: Any, token: int) -> tuple[list[Any], Array]:
    """Returns ids and numbers [K] of a token's targets, with 0 and −inf where they are not used or null."""
    if any(not isinstance(values, list | np.ndarray) for values in (ids, logs)):
        raise ValueError(f"token {token}: its targets are {short_repr(ids)} and {short_repr(logs)}; wanted two lists")
    numbers = np.array([UNUSED if value is None else value for value in logs], np.float64)
    used = np.ones(len(numbers), bool) if mask is None else np.asarray(mask, np.float64) > 0
    if not len(ids) == len(numbers) == len(used):
        raise ValueError(f"token {token}: {len(ids)} ids, {len(numbers)} numbers and {len(used)} of target_mask")
    numbers = np.where(used, numbers, UNUSED)
    return np.where(numbers == UNUSED, 0, np.asarray(ids)).tolist(), numbers


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a row."""
    if "input_ids" not in row:
        raise ValueError(
            "has no input_ids, so its tokens are not known. Run `axolotl preprocess` on it, save the prepared data set "
            "as Parquet, and convert that"
        )
    tokens = parse_ids(row["input_ids"], "input_ids", job.ids)
    labels = np.asarray(row["labels"])
    if labels.shape != tokens.shape or len(tokens) < 2:
        raise ValueError(f"has {len(tokens)} input_ids and {labels.size} labels; wanted equally many, and two at least")
    scored = labels != NOT_SCORED
    if (wrong := np.flatnonzero(scored & (labels != tokens))).size:
        raise ValueError(f"token {wrong[0]}: the label is {labels[wrong[0]]}, the token {tokens[wrong[0]]}")
    masks = [None] * len(tokens) if row.get("target_mask") is None else row["target_mask"]
    lists = [row["target_token_ids"], row["target_logprobs"], masks]
    if any(len(rows) != len(tokens) for rows in lists):
        raise ValueError(f"has targets of {[len(rows) for rows in lists]} tokens; wanted {len(tokens)}")
    # Row i is of token i, and position 0 describes token 1.
    targets = [_used(lists[0][i], lists[1][i], masks[i], i) for i in range(1, len(tokens))]
    ids, logs = parse_entries([ids for ids, _ in targets], [logs for _, logs in targets], len(targets), job.ids)
    # A position without entries, as the prompt's, cannot be distilled.  [T]
    mask = scored[1:] & (logs > UNUSED).any(axis=1)
    yield make_line(where, tokens, mask.astype(np.uint8), normalise(ids, logs, job.values, auto="logits"))
