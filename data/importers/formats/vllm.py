"""`vllm`: replies of vLLM's server with `prompt_logprobs`, one a line.

Those of `/v1/completions`, of `/inference/v1/generate` and of `vllm run-batch` have:

    choices                 of each prompt, or the fields of one choice at the top; in a batch within response.body
        prompt_token_ids    T + 1 ids (ask for `return_token_ids`, or add them as `prompt`)
        prompt_logprobs     T + 1 objects: entry i is of token i after those before it, and the first is null

An object has an id as key for each token, the actual one first, then the top k. `rank` is the place in the vocabulary.
The actual token is an entry only if it is one of the top k. Its log-probability is the label's either way.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from data.importers.parsed_entries import Line, make_line, normalise, parse_entries, parse_ids
from data.importers.rows import Row
from data.importers.settings import ImportSettings
from kd_core.json_fields import short_repr

LEAST = -9999.0  # what the server writes for −∞, which JSON lacks


def _entry(value: Any, token: int, position: int) -> tuple[list[int], list[float], float]:
    """Returns ids and log-probabilities of a position's top k, and the log-probability of the actual token."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"prompt_logprobs: of token {position} {short_repr(value)}; wanted an object of tokens")
    tokens = {int(key): cast(dict[str, Any], entry) for key, entry in cast(dict[str, Any], value).items()}
    if token not in tokens:
        raise ValueError(f"prompt_logprobs: token {position} is {token}, which has no entry; are these other tokens?")
    actual = tokens[token]
    rank, label = actual.get("rank"), float(actual["logprob"])
    log_probs = {key: float(entry["logprob"]) for key, entry in tokens.items() if key != token}
    # Behind the top k there may be the actual token. It is an entry if no other token lies between.
    if not log_probs or label >= min(log_probs.values()) or (rank is not None and rank <= len(log_probs) + 1):
        log_probs[token] = label
    if any(map(math.isnan, [*log_probs.values(), label])):
        raise ValueError(f"prompt_logprobs: of token {position} an entry that is not a number")
    used = {key: log_prob for key, log_prob in log_probs.items() if log_prob > LEAST}
    return list(used), list(used.values()), label


def _choices(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each prompt of a reply with a name. Tokens that a choice lacks are those of the reply.

    Several samples of one prompt (`n`) have its entries each, and are taken once.
    """
    body = (row["response"] or {}).get("body") if "response" in row else row
    if not isinstance(body, dict) or ("error" in body and "choices" not in body):
        raise ValueError(f"response.body: {short_repr(body)}; wanted the server's reply. Did the request fail?")
    choices = body.get("choices", [body])
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"choices: {short_repr(choices)}; wanted one for each prompt. Did the request fail?")
    prompts: Any = body.get("prompt_token_ids", body.get("prompt", row.get("prompt")))
    is_list = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], list | str)
    if is_list and len(choices) % len(prompts):
        raise ValueError(f"has {len(choices)} choices of {len(prompts)} prompts; wanted equally many of each")
    distinct = list[dict[str, Any]]()
    for index, choice in enumerate(choices):
        # Each prompt of a list has equally many choices, one after the other.
        prompt = prompts[index * len(prompts) // len(choices)] if is_list else prompts
        # A field that is not set is null. The scale-out endpoint has its prompt_logprobs beside the choices.
        stated = {name: value for name, value in choice.items() if value is not None}
        merged = {"prompt_token_ids": prompt, "prompt_logprobs": body.get("prompt_logprobs"), **stated}
        fields = {name: merged[name] for name in ("prompt_token_ids", "prompt_logprobs")}
        if fields not in distinct:
            distinct.append(fields)
    for index, fields in enumerate(distinct):
        yield "" if len(distinct) == 1 else f"/{index}", fields


def parse_row(row: Row, where: str, job: ImportSettings) -> Iterator[Line]:
    """Yields the records of a reply, one for each prompt."""
    for name, choice in _choices(row):
        entries = choice["prompt_logprobs"]
        if choice["prompt_token_ids"] is None or isinstance(choice["prompt_token_ids"], str):
            raise ValueError(
                "has no prompt_token_ids. Ask the server with return_token_ids, or add the ids as `prompt`"
            )
        tokens = parse_ids(choice["prompt_token_ids"], "prompt_token_ids", job.ids)
        if not isinstance(entries, list) or len(entries) != len(tokens) or len(tokens) < 2:
            got = len(entries) if isinstance(entries, list) else short_repr(entries)
            raise ValueError(f"prompt_logprobs: {got} for {len(tokens)} tokens; wanted one for each, and two at least")
        read = [_entry(value, int(token), i) for i, (value, token) in enumerate(zip(entries, tokens, strict=True)) if i]
        T = len(read)
        ids, logs = parse_entries([ids for ids, _, _ in read], [logs for _, logs, _ in read], T, job.ids)
        mask = np.array([label > LEAST for _, _, label in read], np.uint8)
        # An actual token that the teacher excludes has no finite log-probability, and is not scored.
        labels = np.where(mask > 0, [label for _, _, label in read], 0.0)
        parsed = normalise(ids, logs, job.values)
        stated = labels if parsed.is_tail_known else None
        yield make_line(f"{where}{name}", tokens, mask, parsed, stated)
