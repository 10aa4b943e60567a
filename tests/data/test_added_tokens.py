"""Tokens that files add beside `tokenizer.json`: transformers, which shares no code with us, reads the same folder."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from data.stream.source import Shards
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from tests.tiny import Tiny

TEXT = "The <|eot|> fox <end> a <|eot|><|eot|>b The<|eot|>fox <eot_id> hears"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
SIZE = 305


def _token(**flags: object) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": "<|eot|>", **plain, **flags}


def _folder(tiny: Tiny, folder: Path, config: dict[str, Any], files: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny.teacher / "tokenizer.json", folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config.json": config, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "by id": ({"added_tokens_decoder": {SIZE: _token()}}, {}),
    "no special": ({"added_tokens_decoder": {SIZE: _token(special=False)}}, {}),
    "normalized, lstrip": ({"added_tokens_decoder": {SIZE: _token(normalized=True, lstrip=True)}}, {}),
    "rstrip": ({"added_tokens_decoder": {SIZE: _token(rstrip=True)}}, {}),
    "single word": ({"added_tokens_decoder": {SIZE: _token(single_word=True)}}, {}),
    "no special but the EOS": ({"added_tokens_decoder": {SIZE: _token(special=False)}, "eos_token": "<|eot|>"}, {}),
    "several": ({"added_tokens_decoder": {SIZE + 1: _token(content="<eot_id>"), SIZE: _token()}}, {}),
    "flags of one that is there": ({"added_tokens_decoder": {0: _token(content="<end>", lstrip=True)}}, {}),
    "a token of the model": ({"added_tokens_decoder": {258: _token(content="The")}}, {}),
    "older files do not count": (
        {"added_tokens_decoder": {SIZE: _token()}}, {MAP: {"eos_token": "hears"}, ADDED: {"<eot_id>": SIZE + 1}}
    ),
    "EOS": ({"eos_token": "<|eot|>"}, {}),
    "EOS of the model": ({"eos_token": "The"}, {}),
    "EOS with flags": ({"eos_token": {"__type": "AddedToken", **_token(lstrip=True)}}, {}),
    "EOS, BOS, padding": ({"eos_token": "<|eot|>", "pad_token": "hears", "bos_token": "<eot_id>"}, {}),
    "extra": ({"extra_special_tokens": ["<|eot|>", "<eot_id>"]}, {}),
    "extra by name": ({"extra_special_tokens": {"image_token": "<|eot|>"}}, {}),
    "additional": ({"additional_special_tokens": ["<|eot|>"]}, {}),
    "another name": ({"image_token": "<|eot|>", "add_bos_token": True}, {}),
    "map": ({}, {MAP: {"eos_token": "<|eot|>"}}),
    "map before config": ({"eos_token": "hears"}, {MAP: {"eos_token": "<|eot|>"}}),
    "map with flags": ({}, {MAP: {"eos_token": {k: v for k, v in _token(rstrip=True).items() if k != "special"}}}),
    "map, additional": ({}, {MAP: {"additional_special_tokens": ["<|eot|>", "<eot_id>"]}}),
    "added": ({}, {ADDED: {"<eot_id>": SIZE + 1, "<|eot|>": SIZE}}),
    "added, special": ({"eos_token": "<|eot|>"}, {ADDED: {"<|eot|>": SIZE}}),
    "added under an id that is taken": ({}, {ADDED: {"<|eot|>": 0}}),
    "beyond the next id": ({"added_tokens_decoder": {400: _token()}}, {}),
    "special tokens are text": ({"eos_token": "<|eot|>", "split_special_tokens": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_read_as_transformers_reads_it(tiny: Tiny, tmp_path: Path, case: str) -> None:
    folder = _folder(tiny, tmp_path / "model", *CASES[case])
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert ours.encode([TEXT])[0] == theirs(TEXT, add_special_tokens=False).input_ids
    assert sorted(ours.special_tokens()) == sorted(
        token.content for token in theirs.added_tokens_decoder.values() if token.special
    )
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_tokenizers_that_are_read_the_same_are_the_same(tiny: Tiny, tmp_path: Path) -> None:
    beside = Tokenizer(_folder(tiny, tmp_path / "beside", {"eos_token": "<|eot|>"}))
    inside = _folder(tiny, tmp_path / "inside", {})
    fast = FastTokenizer.from_file(str(inside / "tokenizer.json"))
    fast.add_tokens([AddedToken("<|eot|>", special=True)])
    fast.save(str(inside / "tokenizer.json"))
    assert beside.fingerprint() == Tokenizer(inside).fingerprint() != Tokenizer(tiny.teacher).fingerprint()
    known = Tokenizer(_folder(tiny, tmp_path / "known", {"eos_token": "<end>"}))
    assert known.fingerprint() == Tokenizer(tiny.teacher).fingerprint()


def test_a_cache_from_before_they_were_read_is_still_the_tokenizers(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer, cache = Tokenizer(_folder(tiny, tmp_path / "model", {"eos_token": "<|eot|>"})), Shards(str(tiny.train))
    cache.check(cache.manifest.vocab_size, tokenizer.fingerprint_like(cache.manifest.tokenizer))
    assert tokenizer.fingerprint_like("another") == tokenizer.fingerprint() != cache.manifest.tokenizer


def test_another_id_than_in_the_tokenizer_is_refused_and_one_that_is_not_the_next_is_said(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (config, files) in enumerate((
        ({"added_tokens_decoder": {SIZE: _token(content="<end>")}}, {}),
        ({"added_tokens_decoder": {SIZE: _token(content="The")}}, {}),
        ({}, {ADDED: {"<end>": SIZE}}),
    )):  # fmt: skip
        folder = _folder(tiny, tmp_path / str(number), config, files)
        with pytest.raises(UsageError, match=rf"{folder}/(tokenizer_config|added_tokens).json: '.*' has id {SIZE}, in"):
            Tokenizer(folder)
    with caplog.at_level(logging.WARNING, "kd"):
        Tokenizer(_folder(tiny, tmp_path / "model", {"added_tokens_decoder": {400: _token()}}))
    assert f"'<|eot|>' has id 400 there, and gets id {SIZE}" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": _token()}},
        {"added_tokens_decoder": {SIZE: 3}},
        {"added_tokens_decoder": [SIZE]},
        {"eos_token": {"lstrip": True}},
        {"eos_token": {"content": 3}},
        {"extra_special_tokens": [[]]},
    ],
)
def test_files_with_anything_in_them_are_one_message(tiny: Tiny, tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Fetch them again"):
        Tokenizer(_folder(tiny, tmp_path / "model", config))


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_folder_without_a_tokenizer_json_says_how_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UsageError, match=rf"has {name}, which transformers converts.*save_pretrained"):
        Tokenizer(tmp_path)


def test_the_conversion_that_it_names_is_one(tiny: Tiny, tmp_path: Path) -> None:
    value = json.loads((tiny.teacher / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(value["vocab"]))
    merges: Callable[[Any], str] = lambda pair: pair if isinstance(pair, str) else " ".join(pair)  # noqa: E731
    (tmp_path / "merges.txt").write_text("\n".join(map(merges, value["merges"])))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(UsageError, match="vocab.json") as error:
        Tokenizer(tmp_path)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(code)  # noqa: S102 (what the message says)
    assert Tokenizer(tmp_path).encode(["The fox"]) == Tokenizer(tiny.teacher).encode(["The fox"])
