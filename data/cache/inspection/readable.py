"""Records as text for people: each position's token and label, the label's surprise, and the teacher's alternatives."""

import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache.manifest import Manifest
from data.cache.record import UNUSED, Array, Record
from data.storage.storage import is_url
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError, escape_unprintable

IdToText = Callable[[int], str]


class Alternative(NamedTuple):
    """A token that the teacher expected, with its probability or its importance weight as a sample."""

    text: str
    prob: float


class ReadablePosition(NamedTuple):
    """One position: after `token` came `label`, to which the teacher gave the probability e^−surprise.

    `surprise` is in nats. `rest` is the probability that is left beside the alternatives.
    """

    token: str
    label: str
    surprise: float
    scored: bool
    alternatives: list[Alternative]
    rest: float


def terminal_width(text: str) -> int:
    """Returns the number of terminal columns that a text takes: 2 for wide characters, 0 for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit_to_width(text: str, width: int) -> str:
    """Pads or cuts a text to exactly `width` terminal columns."""
    if terminal_width(text) > width:
        while text and terminal_width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - terminal_width(text))


def id_to_text(tokenizer: Tokenizer | None) -> IdToText:
    """Returns a function that shows an id: as the tokenizer's text, or as a number where there is no tokenizer."""

    def words(token: int) -> str:
        if tokenizer is None:
            return f"#{token}"
        text = tokenizer.decode([token])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # part of a character
            text = tokenizer.fast.id_to_token(token) or f"#{token}"
        return escape_unprintable(text)

    return words


def tokenizer_folders(folder: Path | str, teacher: str) -> Iterator[Path]:
    """Yields folders that may hold the tokenizer of a cache's teacher.

    They are the teacher's folder, relative to the working directory or to a folder above the cache, and a folder
    `teacher` beside the cache. For a teacher of the hub it is the hub's cache on this machine: nothing is downloaded.
    """
    above = () if is_url(str(folder)) else Path(folder).absolute().parents
    if teacher.startswith("hub:"):
        with suppress(ImportError, ValueError):
            from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (an extra)

            if isinstance(path := try_to_load_from_cache(teacher.removeprefix("hub:"), "tokenizer.json"), str):
                yield Path(path).parent
    elif teacher:
        yield from (start / teacher for start in (Path(), *above))
    yield from (parent / "teacher" for parent in above[:2])


def find_tokenizer(folder: Path | str, manifest: Manifest, named: Path | None) -> Tokenizer | None:
    """Returns the tokenizer of the folder that the user named, or of the teacher that made the cache, or None.

    Raises:
        UsageError: the cache was written with another tokenizer than that of `named`.
    """
    fingerprint, teacher = manifest.tokenizer, manifest.made.get("teacher")
    if named is not None:
        tokenizer = Tokenizer(named)
        if tokenizer.fingerprint_like(fingerprint) != fingerprint:
            raise UsageError(
                f"--tokenizer={named}: fingerprint {tokenizer.fingerprint()[:12]}…; the cache was written with "
                f"{fingerprint[:12]}…. Name the teacher's folder."
            )
        return tokenizer
    for tokenizer_folder in tokenizer_folders(folder, teacher if isinstance(teacher, str) else ""):
        with suppress(UsageError, OSError):  # the cache names the teacher, and others may have written it
            if (tokenizer := Tokenizer(tokenizer_folder)).fingerprint_like(fingerprint) == fingerprint:
                return tokenizer
    return None


def readable_positions(record: Record, words: IdToText, most: int) -> Iterator[ReadablePosition]:
    """Yields the positions of a record, each with its `most` likeliest alternatives.

    Samples are alternatives too, with their importance weight as probability.
    """
    samples, weights = record.samples()
    # Entries and samples side by side.  [T, K + S]
    ids = np.concatenate([record.topk_token_ids, samples], axis=1)
    logs = np.concatenate([record.topk_log_probs, weights], axis=1)
    for position in range(record.positions):
        likely, probs = _likeliest(ids[position], logs[position], most)
        yield ReadablePosition(
            words(int(record.token_ids[position])),
            words(int(record.token_ids[position + 1])),
            -float(record.label_log_prob[position]),
            bool(record.loss_mask[position]),
            [Alternative(words(token), prob) for token, prob in zip(likely, probs, strict=True)],
            max(0.0, 1.0 - sum(probs)),
        )


def _likeliest(ids: Array, logs: Array, most: int) -> tuple[list[int], list[float]]:
    """Returns at most so many used ids of a position, the likeliest first, and their probabilities."""
    order = [i for i in np.argsort(-logs, kind="stable")[:most] if logs[i] > UNUSED]
    return ids[order].tolist(), np.exp(logs[order].astype(np.float64)).tolist()
