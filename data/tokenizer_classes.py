"""Rules by which transformers (5.23) splits text according to a tokenizer's class and not its `tokenizer.json`.

    GPT2Tokenizer     bytes, `add_prefix_space` of `tokenizer_config.json`, no normalizer
    Qwen2Tokenizer    the same, with its own regular expression and NFC
    LlamaTokenizer    ▁ for a space, added before a text by `add_prefix_space`, after special tokens too by `legacy`

This project reads `tokenizer.json` as it is. It warns where transformers' reading gives other tokens.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from kd_core.errors import UsageError
from kd_core.files import read_json

log = logging.getLogger("kd")
PROBES = ("The fox", " The fox 12 don't", "  x\n\n y  ", "cafe\u0301 1234")
FIELDS = ("add_prefix_space", "legacy")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Settings = dict[str, Any]


class Rules(NamedTuple):
    """The stages of a tokenizer that come before its model."""

    normalizer: Any
    pre_tokenizer: Any


def _gpt2_rules(settings: Settings) -> Rules:
    return Rules(None, pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space"))))


def _qwen2_rules(settings: Settings) -> Rules:
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    prefix = bool(settings.get("add_prefix_space"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return Rules(normalizers.NFC(), pre_tokenizers.Sequence([words, letters]))


def _llama_rules(settings: Settings) -> Rules:
    scheme = "always" if settings.get("legacy") else "first"
    scheme = "never" if settings.get("add_prefix_space") not in (None, True) else scheme
    return Rules(None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


CLASSES: dict[str, Callable[[Settings], Rules]] = {
    "GPT2Tokenizer": _gpt2_rules,
    "Qwen2Tokenizer": _qwen2_rules,
    "LlamaTokenizer": _llama_rules,
}
# The class for a model type where the settings name none. For types that are not listed, `tokenizer.json` counts.
CLASS_BY_MODEL_TYPE = {
    None: None,
    "llama": None,
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


def _class_name(fast: FastTokenizer, folder: Path, settings: Settings) -> str | None:
    """Returns the class by which transformers reads a folder, or None where it reads `tokenizer.json` as it is."""
    config: dict[str, Any] = {}
    with suppress(UsageError):  # a damaged one is reported where it is needed
        config = read_json(folder / "config.json", "a model configuration")
    model = config.get("model_type")
    class_name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(model, str | None) or model not in CLASS_BY_MODEL_TYPE or "auto_map" in settings:
        return None
    if model == "qwen2" or not isinstance(class_name, str):
        return CLASS_BY_MODEL_TYPE[model]
    name = class_name.removesuffix("Fast")
    is_byte_level = '"ByteLevel"' in str([part.__getstate__() for part in (fast.pre_tokenizer, fast.decoder) if part])
    return None if name == "LlamaTokenizer" and is_byte_level else name


def _tokens(fast: FastTokenizer, rules: Rules) -> list[list[str]]:
    """Returns the probes' tokens under these rules. The tokenizer keeps its own."""
    special = next((token.content for token in fast.get_added_tokens_decoder().values() if token.special), "")
    original = Rules(fast.normalizer, fast.pre_tokenizer)
    try:
        fast.normalizer, fast.pre_tokenizer = rules
        probes = [*PROBES, f"{special}The fox"]
        return [encoding.tokens for encoding in fast.encode_batch(probes, add_special_tokens=False)]
    finally:
        fast.normalizer, fast.pre_tokenizer = original


@cache
def _warn_once(folder: Path, name: str, stated: str, theirs: str, ours: str) -> None:
    log.warning(
        "%s: transformers reads it as %s and splits text by that class (tokenizer_config.json: %s), for instance into "
        "%s; tokenizer.json, which is followed here, gives %s. Read a student's text by tokenizer.json, too, as "
        "PreTrainedTokenizerFast.from_pretrained does.",
        folder, name, stated, theirs, ours,
    )  # fmt: skip


def warn_of_other_rules(fast: FastTokenizer, folder: Path, settings: Settings) -> None:
    """Warns once per folder whose text transformers splits in another way. It names the field and both readings."""
    name = _class_name(fast, folder, settings)
    if name not in CLASSES or not isinstance(fast.model, models.BPE):
        return
    rules_of = CLASSES[name]
    try:
        ours = _tokens(fast, Rules(fast.normalizer, fast.pre_tokenizer))
        theirs = _tokens(fast, rules_of(settings))
        # Find the field, if any, that would make transformers' tokens equal to ours with another value.
        field = next(
            (f for f in FIELDS for v in (True, False) if _tokens(fast, rules_of({**settings, f: v})) == ours), ""
        )
    except Exception:  # a tokenizer that fails on a text is reported where it encodes one
        return
    for one, other in zip(theirs, ours, strict=True):
        if one != other:
            field = field or "tokenizer_class"
            value = json.dumps(settings[field]) if field in settings else "not set"
            _warn_once(folder, name, f"{field} {value}", repr(one), repr(other))
            return
