"""Teachers behind a running vLLM server, over its OpenAI interface: one request a window, several at a time.

    window of T + 1 tokens ─ POST /v1/completions, prompt_logprobs=K ─► for each token the K likeliest and itself
    T tokens ─ POST /pooling (a server with --runner pooling) ─► hidden states [T, D], for our own head

For entries the whole window is the prompt, so its last label is scored as the others are. The server must generate a
token, which is dropped. So its context is at least T + 2.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from data.cache.selection import Selection
from data.teacher.entry_scorer import select_from_entries
from data.teacher.hidden_states import HiddenStateScorer
from data.teacher.select import TeacherScores
from data.teacher.separate_head import SeparateHead
from data.teacher.vllm_client import MOST_BYTES, VllmServer
from data.teacher.vllm_settings import VllmSettings
from data.tokenizer import PROBES, Tokenizer
from kd_core.errors import UsageError
from kd_core.files import read_json
from kd_core.json_fields import check_integer, check_list, check_object, check_text

log = logging.getLogger("kd")
MOST_ENTRY_BYTES = 1024  # of JSON, with the text of its token
IMPOSSIBLE = -9999.0  # what the server writes for −inf
MASS_ERROR = 1e-3


def _served_model(server: VllmServer, chosen: str | None) -> dict[str, Any]:
    """Returns the entry of the served model in /v1/models: the chosen one, or the only one."""
    cards = {card["id"]: card for card in check_list(server.request_json("/v1/models")["data"], "data")}
    names = [name for name, card in cards.items() if card.get("parent") is None] if chosen is None else [chosen]
    if len(names) != 1 or names[0] not in cards:
        asked = "" if chosen is None else f", not {chosen}"
        raise UsageError(
            f'{server.url}: serves {", ".join(map(str, cards))}{asked}. Choose one of them: vllm={{"model": "NAME"}}.'
        )
    return cards[check_text(names[0], "id")]


def read_server_facts(settings: VllmSettings) -> tuple[dict[str, Any], int]:
    """Returns what a plan records of a server, and the longest window that its context has room for.

    Raises:
        UsageError: it does not answer, or not as vLLM does.
    """
    assert settings.url
    server = VllmServer(settings.url)
    try:
        card = _served_model(server, settings.engine.get("model"))
        release = check_text(server.request_json("/version")["version"], "version")
        context = check_integer(card.get("max_model_len"), "max_model_len", 3, 1 << 40)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{server.url}: answers with no {error!s:.100}; wanted a vLLM server.") from None
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{server.url}: {error}.") from None
    facts = {"release": f"server {release}", "model": card["id"]}
    return (facts | {"runner": "pooling"}, context) if settings.pools else (facts, context - 2)


def _check_tokenizer(server: VllmServer, model: str, tokenizer: Tokenizer) -> None:
    """Raises UsageError if the server cuts texts into other tokens than the teacher's tokenizer does."""
    for text, ours in zip(PROBES, tokenizer.encode(list(PROBES)), strict=True):
        theirs = server.request_json("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
        if not isinstance(theirs, dict) or cast(dict[str, Any], theirs).get("tokens") != list(ours):
            raise UsageError(
                f"{server.url}: cuts {text!r} into other tokens than {tokenizer.path} does. Name the teacher that it "
                "serves, or the server of this teacher."
            )


def connect_scorer(
    folder: Path, dtype: torch.dtype, device: torch.device, settings: VllmSettings
) -> "VllmServerScorer | HiddenStateScorer":
    """Connects to a server that serves the model in `folder`.

    Raises:
        UsageError: it does not answer, or cuts texts into other tokens than the folder's tokenizer does.
    """
    facts, _ = read_server_facts(settings)
    server, model, tokenizer = VllmServer(str(settings.url)), facts["model"], Tokenizer(folder)
    _check_tokenizer(server, model, tokenizer)
    if not settings.pools:
        config = read_json(folder / "config.json", "a Hugging Face model configuration")
        columns = config.get("vocab_size", check_object(config.get("text_config", {}), "text_config").get("vocab_size"))
        if isinstance(columns, int) and columns > tokenizer.vocab_size:
            log.warning(
                "%s: the lm_head has %d columns for %d tokens; what probability the others take stays in the tails of "
                "a server's entries", server.url, columns, tokenizer.vocab_size,
            )  # fmt: skip
        return VllmServerScorer(server, model, tokenizer.vocab_size)
    head = SeparateHead.load(folder, tokenizer.vocab_size, dtype, device)

    def states(row: list[int]) -> Tensor:
        body = {
            "model": model, "input": row, "task": "token_embed", "use_activation": False,
            "encoding_format": "bytes_only", "embed_dtype": "float32", "endianness": "little",
        }  # fmt: skip
        size = 4 * len(row) * head.width
        data = server.request("/pooling", body, size)
        if len(data) != size:
            raise UsageError(f"{server.url}/pooling: got {len(data)} bytes for {len(row)} tokens; wanted {size}.")
        return torch.from_numpy(np.frombuffer(data, "<f4").reshape(len(row), head.width).copy())

    def all_states(rows: list[list[int]]) -> list[Tensor]:
        with ThreadPoolExecutor(len(rows)) as requests:
            return list(requests.map(states, rows))

    return HiddenStateScorer(all_states, head, device)


class VllmServerScorer:
    """Entries of a model that a vLLM server runs. The rows of a batch are under way at once."""

    def __init__(self, server: VllmServer, model: str, vocab_size: int) -> None:
        self.server, self.model, self.vocab_size = server, model, vocab_size
        self.device = torch.device("cpu")

    def scores(
        self, tokens: Int[Tensor, "B S"], document_ids: Int[Tensor, "B T"], selection: Selection
    ) -> TeacherScores:
        lengths = (document_ids >= 0).sum(dim=1).tolist()
        windows = [row[: n + 1].tolist() for row, n in zip(tokens, lengths, strict=True)]
        B, T = document_ids.shape
        # Entries of all positions. Those of padding are unused, and nobody reads their scores.  [B, T, K] and [B, T]
        ids = np.zeros((B, T, selection.top_k), np.int64)
        log_probs = np.full(ids.shape, -np.inf)
        labels = np.zeros((B, T))

        def fetch(row: int) -> None:
            n = lengths[row]
            reply = self._entries(windows[row], selection.top_k)
            ids[row, :n], log_probs[row, :n], labels[row, :n] = reply

        with ThreadPoolExecutor(B) as requests:
            list(requests.map(fetch, range(B)))
        flat = (torch.from_numpy(array).flatten(0, 1) for array in (ids, log_probs, labels))
        return select_from_entries(next(flat), next(flat), next(flat), selection, self.vocab_size)

    def _entries(self, window: Sequence[int], top_k: int) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
        """Returns ids and log-probabilities of the likeliest tokens [n, K], and those of the labels [n]."""
        body = {"model": self.model, "prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}
        most = MOST_BYTES + len(window) * (top_k + 1) * MOST_ENTRY_BYTES
        reply = self.server.request_json("/v1/completions", body, most)
        try:
            return parse_reply(reply, window, top_k)
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise UsageError(
                f"{self.server.url}/v1/completions: wanted vLLM's prompt_logprobs ({error!s:.200}). Log-probabilities "
                "need a server without --logprobs-mode."
            ) from None


def parse_reply(reply: Any, window: Sequence[int], top_k: int) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Reads the entries of a window from the server's reply: ids and log-probabilities [n, K], and the labels' [n].

    Raises:
        ValueError, KeyError, TypeError, IndexError: the reply is not of this form, or holds no probabilities.
    """
    (choice,) = check_list(reply["choices"], "choices")
    positions = check_list(choice["prompt_logprobs"], "prompt_logprobs")
    if len(positions) != len(window):
        raise ValueError(f"{len(positions)} positions; wanted {len(window)}")
    ids = np.zeros((len(window) - 1, top_k), np.int64)
    log_probs, labels = np.full(ids.shape, -np.inf), np.zeros(len(ids))
    # Nothing comes before the first token, so its place is empty.
    for i, (label, position) in enumerate(zip(window[1:], positions[1:], strict=True)):
        entries = {int(name): float(entry["logprob"]) for name, entry in check_object(position, "a position").items()}
        labels[i] = entries[label]
        if len(entries) == top_k + 1:
            del entries[label]  # the label stands there in any case, beside the K likeliest
        ids[i], log_probs[i] = list(entries), list(entries.values())
    log_probs[log_probs <= IMPOSSIBLE] = -np.inf
    mass = np.exp(log_probs).sum(axis=1)
    if not (ids >= 0).all() or not (mass <= 1 + MASS_ERROR).all() or not (labels <= MASS_ERROR).all():
        raise ValueError(f"entries of a mass of up to {mass.max():.3g}, which are no probabilities")
    labels[labels <= IMPOSSIBLE] = -np.inf
    return ids, log_probs, labels
