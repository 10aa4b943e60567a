"""Tokenizers of Hugging Face folders, with offsets, the ids around plain texts, and a fingerprint.

    tokenizer.json + files beside it → Tokenizer → ids, offsets
                                                 → fingerprint: equal for a cache and the students that can read it

A tokenizer.json of any origin is read within bounds: on its size, on its ids, and on how much text its rules make.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tokenizers import Tokenizer as FastTokenizer

from data.added_tokens import add_tokens_from_files
from data.tokenizer_classes import warn_of_other_rules
from kd_core.errors import UsageError
from kd_core.files import is_plain_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger("kd")
AddToken = Literal["auto", "yes", "no"]
MOST_BYTES, MOST_IDS, MOST_GROWTH = 1 << 27, 1 << 22, 1 << 10  # bytes of the file, ids, characters made of one
OTHER_TOKENIZERS = ("tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
PROBES = (
    "Hello, world! 1790–2024",
    "  tabs\tand\nlines  ",
    "naïve façade 東京 😀",
    "def f(x):\n    return x**2",
)


def _growth(rule: Any) -> int:
    """Returns the most characters that a tokenizer's rules, applied in turn, can make of one character."""
    if isinstance(rule, list):
        return math.prod(map(_growth, cast(list[Any], rule)))
    if not isinstance(rule, dict):
        return 1
    fields = cast(dict[str, Any], rule)
    factor = 1
    if fields.get("type") == "Replace":
        factor = max(1, len(fields["content"]))
    elif fields.get("type") == "Prepend":
        factor = 1 + len(fields["prepend"])
    return factor * math.prod(map(_growth, fields.values()))


class EncodedText(NamedTuple):
    """The ids of a text, and for each id the characters [start, end) that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def _read_file(path: Path) -> FastTokenizer:
    fast = FastTokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()
    return fast


def _fingerprint(fast: FastTokenizer) -> str:
    probes = [encoding.ids for encoding in fast.encode_batch(list(PROBES), add_special_tokens=False)]
    return hashlib.sha256(json.dumps([sorted(fast.get_vocab().items()), probes]).encode()).hexdigest()


class SurroundingIds(NamedTuple):
    """The ids in front of each plain text and behind it, such as BOS and EOS."""

    begins: list[int]
    ends: list[int]


def _check_exists(path: Path) -> None:
    """Raises UsageError for a missing `tokenizer.json`, with a hint where the folder has another format."""
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
        """Reads `folder/tokenizer.json`, and adds the tokens of the files beside it.

        Raises:
            UsageError: it is missing, or not a tokenizer.
        """
        path = self.path = folder / "tokenizer.json"
        _check_exists(path)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UsageError(f"{path}: has {size} bytes; a tokenizer has {MOST_BYTES} at most. Fetch it again.")
        try:
            self.fast = _read_file(path)
            self._check()
            self.added_tokens = add_tokens_from_files(self.fast, folder)
            self._check()
            self.default_around = self._around()
            warn_of_other_rules(self.fast, folder, self.added_tokens.settings)
        except (KeyboardInterrupt, SystemExit, UsageError):
            raise
        except BaseException as error:  # the library raises plain Exception, and no Exception at all where it panics
            raise UsageError(f"{path}: not a tokenizer ({error!s:.400}). Fetch it again.") from None
        # A post-processor may cut spaces off the offsets, which must be exact. What it adds is in `default_around`.
        self.fast.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]

    def _check(self) -> None:
        """Raises ValueError for ids above any vocabulary, and for rules that make long texts of short ones."""
        if (largest := max(self.fast.get_vocab().values(), default=0)) >= MOST_IDS:
            raise ValueError(f"an id of {largest}; wanted less than {MOST_IDS}")
        for stage in (self.fast.normalizer, self.fast.pre_tokenizer, self.fast.decoder):
            if stage is not None and (factor := _growth(json.loads(stage.__getstate__()))) > MOST_GROWTH:
                raise ValueError(f"rules by which a character may become {factor}; wanted {MOST_GROWTH} at most")

    def _around(self) -> SurroundingIds:
        """Returns what the tokenizer's post-processor adds around a plain text."""
        encoding = self.fast.encode(PROBES[0])
        # Ids that stand for characters of the text belong to a sequence; added ids belong to none.
        of_text = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        first, last = (of_text[0], of_text[-1] + 1) if of_text else (len(encoding.ids), len(encoding.ids))
        return SurroundingIds(encoding.ids[:first], encoding.ids[last:])

    def around(self, bos: AddToken = "auto", eos: AddToken = "auto") -> SurroundingIds:
        """Returns the ids that a plain text gets in front and behind.

        `auto` takes what the tokenizer's post-processor adds, `yes` and `no` override it.

        Raises:
            UsageError: the choice is `yes`, and the tokenizer names no such token.
        """
        return SurroundingIds(
            self._resolve("bos", bos, self.default_around.begins), self._resolve("eos", eos, self.default_around.ends)
        )

    def _resolve(self, role: str, choice: AddToken, default_ids: list[int]) -> list[int]:
        """Returns the ids for one of the roles `bos` and `eos`, and warns where `auto` ignores `add_bos_token`."""
        if choice == "auto" and not default_ids and self.added_tokens.settings.get(f"add_{role}_token") is True:
            log.warning(
                "%s adds none, so add_%s_token of tokenizer_config.json has no effect, as in transformers. If the "
                "model was trained with it, set corpus.%s=yes.",
                self.path, role, role,
            )  # fmt: skip
        if choice != "yes" or default_ids:
            return default_ids if choice != "no" else []
        token = self.added_tokens.named.get(f"{role}_token")
        token_id = self.fast.token_to_id(token.content) if token else None
        if token_id is None:
            raise UsageError(
                f"corpus.{role}=yes: the tokenizer {self.path} has no {role}_token. Name one in "
                f"tokenizer_config.json beside it, or leave it out: corpus.{role}=no."
            )
        return [token_id]

    def describe(self, around: SurroundingIds) -> str:
        """Describes what texts get in front and behind."""
        tokens = (" ".join(f"{self.fast.id_to_token(i)} (id {i})" for i in ids) for ids in around)
        roles = list(zip(("begins", "ends"), ("BOS", "EOS"), tokens, strict=True))
        added = " and ".join(f"{verb} with {text}" for verb, _, text in roles if text)
        missing = [role for _, role, text in roles if not text]
        settings = ", ".join(f"corpus.{role.lower()}" for role in missing)
        nothing = f"no {' or '.join(missing)} is added ({settings})" if missing else ""
        return ", and ".join(filter(None, [f"each text {added}" if added else "", nothing]))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text, without special tokens added."""
        return [encoding.ids for encoding in self._encode_batch(texts)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encodes each text as `encode` does, and returns the characters of each id too."""
        return [EncodedText(e.ids, e.offsets) for e in self._encode_batch(texts)]

    def _encode_batch(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self.fast.encode_batch(list(texts), add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # for panics, as in `__init__`
            raise UsageError(f"{self.path}: the tokenizer fails on a text ({error!s:.400}). Fetch it again.") from None

    def special_tokens(self) -> list[str]:
        """Returns the texts of all special tokens, such as those that end a turn."""
        return [token.content for token in self.fast.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included."""
        return self.fast.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Returns the real vocabulary V: one more than the largest id.

        A model's embedding may have padding rows beyond it.
        """
        return max(self.fast.get_vocab().values(), default=-1) + 1

    def fingerprint(self) -> str:
        """Returns the sha256 over the vocabulary and over the ids of a few probes: equal for equal tokenizers."""
        return _fingerprint(self.fast)

    def fingerprint_like(self, other: str) -> str:
        """Returns the fingerprint, or `other` if that is the fingerprint of `tokenizer.json` alone.

        A cache with such a fingerprint was written without the tokens of the files beside `tokenizer.json`. Its ids
        mean the same.
        """
        current = self.fingerprint()
        return other if current != other and other == _fingerprint(_read_file(self.path)) else current

    def byte_lengths(self) -> "torch.Tensor":
        """Returns the number of UTF-8 bytes that each id stands for, int [V], which is 0 for special tokens.

        Byte-level vocabularies have a character for each byte. Others write a space as ▁ and a lone byte as <0xNN>.
        """
        import torch  # noqa: PLC0415 (processes that tokenise start in a fifth of the time without it)

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
