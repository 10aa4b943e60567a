"""A tokenizer read from a Hugging Face folder, and a fingerprint by which cache and student recognise each other."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tokenizers import Tokenizer as FastTokenizer

from kd_core.errors import UsageError
from kd_core.files import is_plain_file

MOST_BYTES, MOST_IDS, MOST_GROWTH = 1 << 27, 1 << 22, 1 << 10
PROBES = (
    "Hello, world! 1790–2024",
    "  tabs\tand\nlines  ",
    "naïve façade 東京 😀",
    "def f(x):\n    return x**2",
)


def _growth(rule: Any) -> int:
    """Returns how many characters one may become by a tokenizer's rules, one after another."""
    if isinstance(rule, list):
        return math.prod(map(_growth, cast(list[Any], rule)))
    if not isinstance(rule, dict):
        return 1
    found = cast(dict[str, Any], rule)
    own = 1
    if found.get("type") == "Replace":
        own = max(1, len(found["content"]))
    elif found.get("type") == "Prepend":
        own = 1 + len(found["prepend"])
    return own * math.prod(map(_growth, found.values()))


class Pieces(NamedTuple):
    """Ids, and for each the characters [start, end) of the text that it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, folder: Path) -> None:
        """Read `folder/tokenizer.json`.

        Raises:
            UsageError: it is missing or not a tokenizer.
        """
        path = self.path = folder / "tokenizer.json"
        if not is_plain_file(path):
            raise UsageError(f"{path}: no such file; wanted the tokenizer of a Hugging Face folder.")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UsageError(f"{path}: has {size} bytes; a tokenizer has {MOST_BYTES} at most. Fetch it again.")
        try:
            self.fast = FastTokenizer.from_file(str(path))
            self.fast.no_truncation()
            self.fast.no_padding()
            self._check()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower; where it panics, no Exception
            raise UsageError(f"{path}: not a tokenizer ({error!s:.400}). Fetch it again.") from None
        # It adds special tokens, which we never ask for, and may cut spaces off the offsets, which must be exact.
        self.fast.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]

    def _check(self) -> None:
        """Refuse ids that no vocabulary has, and rules that make much text out of little."""
        if (largest := max(self.fast.get_vocab().values(), default=0)) >= MOST_IDS:
            raise ValueError(f"an id of {largest}; wanted less than {MOST_IDS}")
        for part in (self.fast.normalizer, self.fast.pre_tokenizer, self.fast.decoder):
            if part is not None and (factor := _growth(json.loads(part.__getstate__()))) > MOST_GROWTH:
                raise ValueError(f"rules by which a character may become {factor}; wanted {MOST_GROWTH} at most")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens added."""
        return [encoding.ids for encoding in self._encoded(texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Pieces]:
        """Ids of each text with their places in it; the same ids as `encode`."""
        return [Pieces(e.ids, e.offsets) for e in self._encoded(texts)]

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self.fast.encode_batch(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as where it is read
            raise UsageError(f"{self.path}: the tokenizer fails on a text ({error!s:.400}). Fetch it again.") from None

    def special_tokens(self) -> list[str]:
        """The texts of tokens that are special, such as those that end a turn."""
        return [token.content for token in self.fast.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.fast.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """The real vocabulary, V: one more than the largest id. A model's embedding may have padding rows beyond it."""
        return max(self.fast.get_vocab().values(), default=-1) + 1

    def fingerprint(self) -> str:
        """sha256 over the vocabulary and how it splits a few probes: equal for equal tokenizers, however stored."""
        known = json.dumps([sorted(self.fast.get_vocab().items()), self.encode(PROBES)])
        return hashlib.sha256(known.encode()).hexdigest()

    def byte_lengths(self) -> torch.Tensor:
        """Of each id, how many bytes of UTF-8 text it stands for: int [V]; special tokens stand for none.

        Byte-level vocabularies have a character for each byte; others write a space as ▁ and a lone byte as <0xNN>.
        """
        special = {i for i, token in self.fast.get_added_tokens_decoder().items() if token.special}
        added = set(self.fast.get_added_tokens_decoder())
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.fast.to_str())["decoder"])
        vocabulary = self.fast.get_vocab()
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for token, i in vocabulary.items():
            if i in special:
                continue
            if i not in added and byte_level:
                lengths[i] = len(token)
            elif i not in added and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode())
        return lengths
