"""Tokens that files beside `tokenizer.json` add to it, as transformers (5.23) reads a folder.

    tokenizer_config.json     `added_tokens_decoder` (id → token), `bos_token` and the like, `extra_special_tokens`
    special_tokens_map.json   the same names } of older folders, read where
    added_tokens.json         token → id     } there is no `added_tokens_decoder`

A token that `tokenizer.json` lacks gets the next free id, whatever id the files state.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from kd_core.errors import UsageError
from kd_core.files import damaged, read_json

log = logging.getLogger("kd")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG, MAP, LEGACY = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def _token(value: Any, *, special: bool = True) -> AddedToken:
    """Returns the token that a text or an object with flags stands for; `special` where it does not say."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    fields = {name: flag for name, flag in cast(dict[str, Any], value).items() if name != "__type"}
    return AddedToken(fields.pop("content"), **{"special": special, **fields})


def _optional(path: Path, what: str) -> dict[str, Any]:
    return read_json(path, what) if path.exists() else {}


def _special(settings: dict[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the named special tokens, the usual names first, and those without a name."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    own = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str | dict)}
    if isinstance(extra, dict):
        own |= cast(dict[str, Any], extra)
        extra = []
    order = [*(name for name in NAMES if name in own), *(name for name in own if name not in NAMES)]
    return {name: _token(own[name]) for name in order}, [_token(value) for value in extra]


class TokensBeside:
    """Tokens that the files beside a `tokenizer.json` state: by id, by name (`bos_token`, …), and the rest."""

    def __init__(self, folder: Path, fast: FastTokenizer) -> None:
        self.settings = settings = _optional(folder / CONFIG, "the configuration of a tokenizer")
        self.file, stated = CONFIG, settings.get("added_tokens_decoder")
        if stated is not None:
            self.stated = {int(i): _token(value, special=False) for i, value in stated.items()}
            self.named, self.extra = _special(settings)
            return
        self.file = LEGACY
        self.named, self.extra = _special({**settings, **_optional(folder / MAP, "a map of special tokens")})
        special = {token.content for token in [*self.named.values(), *self.extra]}
        added = _optional(folder / LEGACY, "tokens added to a tokenizer")
        own = fast.get_added_tokens_decoder()
        self.stated = {
            int(i): AddedToken(text, special=text in special, normalized=text not in special)
            for text, i in added.items()
            if int(i) not in own
        }

    def tokens(self, fast: FastTokenizer) -> list[AddedToken]:
        """Returns the tokens to add, in order."""
        own = fast.get_added_tokens_decoder().values()
        same = {repr(token) for token in own}
        found = [token for _, token in sorted(self.stated.items()) if repr(token) not in same]
        known = {token.content for token in [*own, *found]}
        for token in [*self.named.values(), *self.extra]:
            if token.content not in known:
                known.add(token.content)
                found.append(token)
        names = {token.content for token in self.named.values()}
        for token in found:
            token.special = token.special or token.content in names
        return found


def _refuse_other_ids(folder: Path, fast: FastTokenizer, beside: TokensBeside) -> None:
    for i, token in beside.stated.items():
        own = fast.token_to_id(token.content)
        if own is not None and own != i:
            raise UsageError(
                f"{folder / beside.file}: {token.content!r} has id {i}, in tokenizer.json {own}. Which one the model "
                "was trained with cannot be told. Correct one of the files."
            )


def _warn_of_other_ids(folder: Path, fast: FastTokenizer, stated: Iterable[tuple[int, AddedToken]]) -> None:
    for i, token in stated:
        if (given := fast.token_to_id(token.content)) != i:
            log.warning(
                "%s: %r stands there with id %d, and gets id %d, the next free one, as transformers gives it",
                folder, token.content, i, given,
            )  # fmt: skip


def add_tokens_beside(fast: FastTokenizer, folder: Path) -> TokensBeside:
    """Adds to `fast` what the files of `folder` add, and returns it.

    Raises:
        UsageError: a file is damaged, or states another id for a token of `tokenizer.json`.
    """
    with damaged(folder, "a folder with a tokenizer's files", "Fetch them again"):
        beside = TokensBeside(folder, fast)
        _refuse_other_ids(folder, fast, beside)
        fast.add_tokens(beside.tokens(fast))
        fast.encode_special_tokens = beside.settings.get("split_special_tokens") is True
        _warn_of_other_ids(folder / beside.file, fast, sorted(beside.stated.items()))
    return beside
