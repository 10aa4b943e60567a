"""Records for people: each position with the token that came, how it surprised the teacher, and what else could be."""

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache.record import UNUSED, Array, Record
from data.tokenizer import Tokenizer
from kd_core.errors import visible

Words = Callable[[int], str]


class Alternative(NamedTuple):
    """A token that the teacher thought possible."""

    text: str
    prob: float


class Spot(NamedTuple):
    """A position: after `token` came `label`, to which the teacher gave e^−surprise."""

    token: str
    label: str
    surprise: float
    scored: bool
    alternatives: list[Alternative]
    rest: float


def columns(text: str) -> int:
    """Places that a text takes up in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, width: int) -> str:
    """The text in exactly so many places, cut where it is longer."""
    if columns(text) > width:
        while text and columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


def words_of(tokenizer: Tokenizer | None) -> Words:
    """How an id is shown: by the tokenizer, or as a number."""

    def words(token: int) -> str:
        if tokenizer is None:
            return f"#{token}"
        text = tokenizer.decode([token])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # part of a character
            text = tokenizer.fast.id_to_token(token) or f"#{token}"
        return visible(text)

    return words


def tokenizer_folders(folder: Path, teacher: str) -> Iterator[Path]:
    """Yields folders that may hold the tokenizer of a cache's teacher.

    They are its folder as named from here or from above the cache, its place in the hub's own cache, from which
    nothing is fetched here, and a folder `teacher` beside the cache.
    """
    above = folder.absolute().parents
    if teacher.startswith("hub:"):
        with suppress(ImportError, ValueError):
            from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (an extra)

            if isinstance(found := try_to_load_from_cache(teacher.removeprefix("hub:"), "tokenizer.json"), str):
                yield Path(found).parent
    elif teacher:
        yield from (start / teacher for start in (Path(), *above))
    yield from (parent / "teacher" for parent in above[:2])


def spots(record: Record, words: Words, most: int) -> Iterator[Spot]:
    """The positions of a record, each with at most so many alternatives, the likeliest first; samples by weight."""
    samples, weights = record.samples()
    ids = np.concatenate([record.topk_token_ids, samples], axis=1)
    logs = np.concatenate([record.topk_log_probs, weights], axis=1)
    for at in range(record.positions):
        likely, probs = _likeliest(ids[at], logs[at], most)
        yield Spot(
            words(int(record.token_ids[at])),
            words(int(record.token_ids[at + 1])),
            -float(record.label_log_prob[at]),
            bool(record.loss_mask[at]),
            [Alternative(words(token), prob) for token, prob in zip(likely, probs, strict=True)],
            max(0.0, 1.0 - sum(probs)),
        )


def _likeliest(ids: Array, logs: Array, most: int) -> tuple[list[int], list[float]]:
    order = [i for i in np.argsort(-logs, kind="stable")[:most] if logs[i] > UNUSED]
    return ids[order].tolist(), np.exp(logs[order].astype(np.float64)).tolist()
