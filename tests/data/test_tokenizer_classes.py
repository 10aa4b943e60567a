"""Folders that transformers reads by a class with rules of its own: a warning exactly where tokens differ."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.tokenizer import Tokenizer
from data.tokenizer_classes import PROBES, QWEN_WORDS

TEXTS = [
    "The old fox sees a river 1234.",
    " The fox hears 12 owls.",
    "  two  spaces\n\n\nlines  end don't cafe\u0301",
] * 9


def _bytes(*, prefix: bool = False) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return fast


def _qwen() -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return fast


def _bars(scheme: str = "first") -> FastTokenizer:
    fast = FastTokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return fast


GPT2, QWEN2, LLAMA = ({"tokenizer_class": f"{name}Tokenizer"} for name in ("GPT2", "Qwen2", "Llama"))
# Tokenizer, settings, the kind of the model; then the field that the warning names, or nothing.
CASES: dict[str, tuple[FastTokenizer, dict[str, Any], str | None, str]] = {
    "GPT2": (_bytes(), GPT2, None, ""),
    "GPT2 with a space": (_bytes(), {**GPT2, "add_prefix_space": True}, None, "add_prefix_space true"),
    "a space in the file alone": (_bytes(prefix=True), GPT2, "llama", "add_prefix_space not set"),
    "the class of the model": (_bytes(prefix=True), {}, "gpt2", "add_prefix_space not set"),
    "Qwen2": (_qwen(), QWEN2, "qwen3", ""),
    "Qwen2 with a space": (_qwen(), {**QWEN2, "add_prefix_space": True}, "qwen3", "add_prefix_space true"),
    "Qwen2 whatever the class": (_bytes(), {"tokenizer_class": "PreTrainedTokenizerFast"}, "qwen2", "tokenizer_class"),
    "another class of Qwen3": (_bytes(), {"tokenizer_class": "PreTrainedTokenizerFast"}, "qwen3", ""),
    "Llama": (_bars(), LLAMA, "llama", ""),
    "Llama without a space": (_bars(), {**LLAMA, "add_prefix_space": False}, None, "add_prefix_space false"),
    "Llama, legacy": (_bars(), {**LLAMA, "legacy": True}, "llama", "legacy true"),
    "Llama of bytes": (_bytes(prefix=True), {"tokenizer_class": "LlamaTokenizerFast"}, "llama", ""),
    "Mistral": (_bars("never"), LLAMA, "mistral", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_warning_names_the_field_exactly_where_transformers_reads_other_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    fast, settings, model, field = CASES[case]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False, special_tokens=["<unk>"]),
    )
    fast.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "unk_token": "<unk>", **settings})
    )
    if model:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    with caplog.at_level(logging.WARNING, "kd"):
        ours, _ = Tokenizer(tmp_path), Tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*PROBES, "<unk>The fox"]
    differing = [text for text in texts if theirs(text, add_special_tokens=False).input_ids != ours.encode([text])[0]]
    assert bool(differing) == bool(field)
    assert [record.name for record in caplog.records].count("kd") == bool(field), "once"
    as_it_says = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [as_it_says(text, add_special_tokens=False).input_ids for text in texts] == ours.encode(texts)
    if field:
        tokens = repr(theirs.convert_ids_to_tokens(theirs(differing[0], add_special_tokens=False).input_ids))
        assert f"{tmp_path}: " in caplog.text
        assert f"(tokenizer_config.json: {field}" in caplog.text
        assert f"for instance into {tokens}; " in caplog.text
