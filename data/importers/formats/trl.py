"""`trl`: what TRL's client of a teacher's vLLM server returns of a sequence (`get_sequence_logprobs`), with its tokens:

    prompt_ids                     P ids, at least one
    completion_ids                 C ids
    logprobs, logprob_token_ids    C rows: log-probabilities and ids of completion token i after all tokens before it
    actual_logprobs                C rows of one number: that of the completion's own token (default: its entry's)

The completion is scored, the prompt is not.
"""

from collections.abc import Iterator

import numpy as np

from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids
from data.importers.rows import Row
from data.importers.settings import ImportSettings


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the record of a row."""
    prompt, completion = (parse_ids(row[name], name, job.ids) for name in ("prompt_ids", "completion_ids"))
    if not len(prompt) or not len(completion):
        raise ValueError(f"has {len(prompt)} prompt_ids and {len(completion)} completion_ids; wanted at least one each")
    # Position t describes token t + 1, so the first completion token stands at the last token of the prompt.
    before = len(prompt) - 1
    none = [np.zeros(0, np.int64)] * before
    T = before + len(completion)
    ids, logs = parse_entries([*none, *row["logprob_token_ids"]], [*none, *row["logprobs"]], T, job.ids)
    labels = row.get("actual_logprobs")
    label_logs = None if labels is None else [*np.zeros(before), *np.asarray(labels, np.float64).reshape(-1)]
    mask = (np.arange(T) >= before).astype(np.uint8)
    yield make_line(where, np.append(prompt, completion), mask, normalise(ids, logs, job.values), label_logs)
