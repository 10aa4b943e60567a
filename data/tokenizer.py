"""A tokenizer read from a Hugging Face folder, and a fingerprint by which cache and student recognise each other."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from tokenizers import Tokenizer as FastTokenizer

from data.added_tokens import add_tokens_beside
from data.tokenizer_classes import warn_of_other_rules
from kd_core.errors import UsageError
from kd_core.files import is_plain_file

log = logging.getLogger("kd")
Choice = Literal["auto", "yes", "no"]
MOST_BYTES, MOST_IDS, MOST_GROWTH = 1 << 27, 1 << 22, 1 << 10
OTHER_TOKENIZERS = ("tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
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


def _read_alone(path: Path) -> FastTokenizer:
    fast = FastTokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()
    return fast


def _fingerprint(fast: FastTokenizer) -> str:
    probes = [encoding.ids for encoding in fast.encode_batch(list(PROBES), add_special_tokens=False)]
    return hashlib.sha256(json.dumps([sorted(fast.get_vocab().items()), probes]).encode()).hexdigest()


class Around(NamedTuple):
    """Ids in front of each plain text, and behind it."""

    begins: list[int]
    ends: list[int]


def _refuse_missing(path: Path) -> None:
    if is_plain_file(path):
        return
    folder = path.parent
    other = [name for name in OTHER_TOKENIZERS if is_plain_file(folder / name)]
    if not other:
        raise UsageError(f"{path}: no such file; wanted the tokenizer of a Hugging Face folder.")
    raise UsageError(
        f"{path}: no such file; the folder has {' and '.join(other)}, which transformers converts. Once, where "
        'transformers and sentencepiece are installed: python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


class Tokenizer:
    """Text to ids and back, as transformers reads the folder but for classes with rules of their own."""

    def __init__(self, folder: Path) -> None:
        """Read `folder/tokenizer.json`, and the tokens that files beside it add.

        Raises:
            UsageError: it is missing or not a tokenizer.
        """
        path = self.path = folder / "tokenizer.json"
        _refuse_missing(path)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UsageError(f"{path}: has {size} bytes; a tokenizer has {MOST_BYTES} at most. Fetch it again.")
        try:
            self.fast = _read_alone(path)
            self._check()
            self.beside = add_tokens_beside(self.fast, folder)
            self._check()
            self.own_around = self._around()
            warn_of_other_rules(self.fast, folder, self.beside.settings)
        except (KeyboardInterrupt, SystemExit, UsageError):
            raise
        except BaseException as error:  # the library raises nothing narrower; where it panics, no Exception
            raise UsageError(f"{path}: not a tokenizer ({error!s:.400}). Fetch it again.") from None
        # It may cut spaces off the offsets, which must be exact; what it adds around a text is known by now.
        self.fast.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]

    def _check(self) -> None:
        """Refuse ids that no vocabulary has, and rules that make much text out of little."""
        if (largest := max(self.fast.get_vocab().values(), default=0)) >= MOST_IDS:
            raise ValueError(f"an id of {largest}; wanted less than {MOST_IDS}")
        for part in (self.fast.normalizer, self.fast.pre_tokenizer, self.fast.decoder):
            if part is not None and (factor := _growth(json.loads(part.__getstate__()))) > MOST_GROWTH:
                raise ValueError(f"rules by which a character may become {factor}; wanted {MOST_GROWTH} at most")

    def _around(self) -> Around:
        """Returns what the tokenizer itself adds around a plain text."""
        encoding = self.fast.encode(PROBES[0])
        of_text = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        first, last = (of_text[0], of_text[-1] + 1) if of_text else (len(encoding.ids), len(encoding.ids))
        return Around(encoding.ids[:first], encoding.ids[last:])

    def around(self, bos: Choice = "auto", eos: Choice = "auto") -> Around:
        """Returns the ids that a plain text gets in front and behind.

        Raises:
            UsageError: `yes`, and the tokenizer names no such token.
        """
        return Around(
            self._resolved("bos", bos, self.own_around.begins), self._resolved("eos", eos, self.own_around.ends)
        )

    def _resolved(self, which: str, choice: Choice, own: list[int]) -> list[int]:
        if choice == "auto" and not own and self.beside.settings.get(f"add_{which}_token") is True:
            log.warning(
                "%s adds none, so add_%s_token of tokenizer_config.json has no effect, as in transformers. If the "
                "model was trained with it, set corpus.%s=yes.",
                self.path, which, which,
            )  # fmt: skip
        if choice != "yes" or own:
            return own if choice != "no" else []
        named = self.beside.named.get(f"{which}_token")
        token = self.fast.token_to_id(named.content) if named else None
        if token is None:
            raise UsageError(
                f"corpus.{which}=yes: the tokenizer {self.path} has no {which}_token. Name one in "
                f"tokenizer_config.json beside it, or leave it out: corpus.{which}=no."
            )
        return [token]

    def describe(self, around: Around) -> str:
        """Returns in words what texts get in front and behind."""
        begins, ends = (
            " ".join(f"{self.fast.id_to_token(i)} (id {i})" for i in ids) or "nothing more" for ids in around
        )
        return f"each text begins with {begins} and ends with {ends}"

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
        """Returns the sha256 over the vocabulary and how it splits a few probes: equal for equal tokenizers."""
        return _fingerprint(self.fast)

    def fingerprint_like(self, other: str) -> str:
        """Returns the fingerprint, or `other` where that is the one of `tokenizer.json` alone.

        A cache of such a fingerprint was written without the tokens that files beside it add. Its ids mean the same.
        """
        own = self.fingerprint()
        return other if own != other and other == _fingerprint(_read_alone(self.path)) else own

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
