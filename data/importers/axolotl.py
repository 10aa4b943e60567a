"""`axolotl`: rows of Axolotl's data sets for distillation, as its preprocessing leaves them:

    input_ids, labels                  L ids; a label of −100 is not scored
    target_token_ids, target_logprobs  L rows of K: token i after the tokens before it, as in the trainer, which shifts
    target_mask                        L rows of K times 0 or 1: entries of 0 are not used (default: all are)

Its preprocessing renormalises over the entries, at the temperature of the training (`kd_temperature`). So the mass
outside is unknown. A row of texts with `token_id:N` has no tokens, and is refused.
"""

from collections.abc import Iterator

import numpy as np

from data.cache.record import UNUSED
from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids
from data.importers.rows import Row
from data.importers.settings import ImportSettings

NOT_SCORED = -100


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
    lists = [row["target_token_ids"], row["target_logprobs"], row.get("target_mask", row["target_logprobs"])]
    if any(len(rows) != len(tokens) for rows in lists):
        raise ValueError(f"has targets of {[len(rows) for rows in lists]} tokens; wanted {len(tokens)}")
    T = len(tokens) - 1
    ids, logs = parse_entries(list(lists[0][1:]), list(lists[1][1:]), T, job.ids)
    if "target_mask" in row:
        _, used = parse_entries(list(lists[0][1:]), list(lists[2][1:]), T, job.ids)
        logs = np.where(used > 0, logs, UNUSED)
    # A position without entries, as the prompt's, cannot be distilled.  [T]
    mask = scored[1:] & (logs > UNUSED).any(axis=1)
    yield make_line(where, tokens, mask.astype(np.uint8), normalise(ids, logs, job.values, auto="logits"))
