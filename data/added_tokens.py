"""Tokens that files beside `tokenizer.json` add to it, as transformers (5.23) reads a folder.

    tokenizer_config.json     `added_tokens_decoder` (id → token), `bos_token` and the like, `extra_special_tokens`
    special_tokens_map.json   the same names } in older folders, read where
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
from kd_core.files import damage_as_usage_error, read_json

log = logging.getLogger("kd")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONFIG, MAP, LEGACY = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def _token(value: Any, *, special: bool = True) -> AddedToken:
    """Builds a token from a text, or from an object with flags. `special` holds where the flags omit it."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    fields = {name: flag for name, flag in cast(dict[str, Any], value).items() if name != "__type"}
    return AddedToken(fields.pop("content"), **{"special": special, **fields})


def _read_optional(path: Path, description: str) -> dict[str, Any]:
    return read_json(path, description) if path.exists() else {}


def _special(settings: dict[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the named special tokens, those of `NAMES` first, and the special tokens without a name."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {
        name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str | dict)
    }
    if isinstance(extra, dict):
        named |= cast(dict[str, Any], extra)
        extra = []
    order = [*(name for name in NAMES if name in named), *(name for name in named if name not in NAMES)]
    return {name: _token(named[name]) for name in order}, [_token(value) for value in extra]


class AddedTokens:
    """Tokens of the files beside a `tokenizer.json`: `stated` by id, `named` (`bos_token`, …), and `extra` ones.

    `file` is the one that states the ids, and `settings` are those of `tokenizer_config.json`.
    """

    def __init__(self, folder: Path, fast: FastTokenizer) -> None:
        self.settings = settings = _read_optional(folder / CONFIG, "the configuration of a tokenizer")
        self.file, stated = CONFIG, settings.get("added_tokens_decoder")
        if stated is not None:
            self.stated = {int(i): _token(value, special=False) for i, value in stated.items()}
            self.named, self.extra = _special(settings)
            return
        self.file = LEGACY
        self.named, self.extra = _special({**settings, **_read_optional(folder / MAP, "a map of special tokens")})
        special = {token.content for token in [*self.named.values(), *self.extra]}
        added = _read_optional(folder / LEGACY, "tokens added to a tokenizer")
        already_added = fast.get_added_tokens_decoder()
        self.stated = {
            int(i): AddedToken(text, special=text in special, normalized=text not in special)
            for text, i in added.items()
            if int(i) not in already_added
        }

    def tokens(self, fast: FastTokenizer) -> list[AddedToken]:
        """Returns the tokens to add, in order."""
        already_added = fast.get_added_tokens_decoder().values()
        # `repr` covers the flags too: a token whose flags differ counts as new.
        unchanged = {repr(token) for token in already_added}
        new_tokens = [token for _, token in sorted(self.stated.items()) if repr(token) not in unchanged]
        contents = {token.content for token in [*already_added, *new_tokens]}
        for token in [*self.named.values(), *self.extra]:
            if token.content not in contents:
                contents.add(token.content)
                new_tokens.append(token)
        special_contents = {token.content for token in self.named.values()}
        for token in new_tokens:
            token.special = token.special or token.content in special_contents
        return new_tokens


def _check_ids(folder: Path, fast: FastTokenizer, added: AddedTokens) -> None:
    """Raises UsageError for a token whose stated id is not that of `tokenizer.json`."""
    for i, token in added.stated.items():
        tokenizer_id = fast.token_to_id(token.content)
        if tokenizer_id is not None and tokenizer_id != i:
            raise UsageError(
                f"{folder / added.file}: {token.content!r} has id {i}, in tokenizer.json {tokenizer_id}. It is not "
                "known with which one the model was trained. Correct one of the files."
            )


def _warn_of_new_ids(path: Path, fast: FastTokenizer, stated: Iterable[tuple[int, AddedToken]]) -> None:
    """Warns of each token that got another id than the stated one."""
    for i, token in stated:
        if (new_id := fast.token_to_id(token.content)) != i:
            log.warning(
                "%s: %r has id %d there, and gets id %d, the next free one, as transformers does",
                path, token.content, i, new_id,
            )  # fmt: skip


def add_tokens_from_files(fast: FastTokenizer, folder: Path) -> AddedTokens:
    """Adds to `fast` the tokens of the files in `folder`, and returns these tokens.

    Raises:
        UsageError: a file is damaged, or states another id for a token of `tokenizer.json`.
    """
    with damage_as_usage_error(folder, "a folder with a tokenizer's files", "Fetch them again"):
        added = AddedTokens(folder, fast)
        _check_ids(folder, fast, added)
        fast.add_tokens(added.tokens(fast))
        fast.encode_special_tokens = added.settings.get("split_special_tokens") is True
        _warn_of_new_ids(folder / added.file, fast, sorted(added.stated.items()))
    return added
