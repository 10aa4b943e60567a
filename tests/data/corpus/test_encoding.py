"""What texts get in front and behind: transformers' ids, for tokenizers of the kinds that are published."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import fiddle as fdl
import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from data.cache.manifest import read_manifest
from data.corpus.corpus import Corpus
from data.corpus.documents import Document
from data.corpus.encoding import Encoder
from data.corpus.windows import cut_windows
from data.export.extend import load_growth
from data.export.plan import make_plans
from data.export.resume_check import record_or_check_plan
from data.tokenizer import AddToken, Tokenizer
from experiments.half_depth import quickstart
from kd_core.errors import UsageError
from tests.tiny import ROW_LENGTH, Tiny, make_corpus, write_caches

TEXTS = ["The old fox sees a river.", "Fox 2024\n\n  naïve 東京 it.", "Fox <s> it.", " leading", "x"]
# The pre-tokenizer of Qwen2's and Qwen3's published tokenizer.json.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Post = processors.PostProcessor | None


def _template(fast: FastTokenizer, single: str) -> processors.TemplateProcessing:
    names = [name for name in ("<s>", "</s>") if name in single.split()]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, fast.token_to_id(name)) for name in names]
    )


def _byte_level(post: Callable[[FastTokenizer], Post]) -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    fast.train_from_iterator(TEXTS * 4, trainer)
    fast.post_processor = post(fast)
    return fast


def _sentencepiece(single: str, *, prefix: bool) -> FastTokenizer:
    """As sentencepiece models are converted: byte fallback, a space as ▁, Llama's with one in front."""
    fast = FastTokenizer(models.BPE({}, [], byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    lone = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *lone], show_progress=False)
    fast.train_from_iterator([word for text in TEXTS * 4 for word in text.split()], trainer)
    value = json.loads(fast.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] in special]
    fast = FastTokenizer.from_str(json.dumps(value))
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = _template(fast, single)
    return fast


def _qwen() -> FastTokenizer:
    fast = _byte_level(lambda _: processors.ByteLevel())
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return fast


def _llama_3(fast: FastTokenizer) -> Post:
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), _template(fast, "<s> $A")])


# By kind: tokenizer.json; what tokenizer_config.json names beside BOS and EOS; model_type; what stands around a text.
KINDS = {
    "Llama 3": (lambda: _byte_level(_llama_3), "PreTrainedTokenizerFast", "llama", ["<s>"], []),
    "Llama 2": (lambda: _sentencepiece("<s> $A", prefix=True), "LlamaTokenizerFast", "llama", ["<s>"], []),
    "Mistral": (lambda: _sentencepiece("<s> $A", prefix=True), "LlamaTokenizer", "mistral", ["<s>"], []),
    "Gemma": (lambda: _sentencepiece("<s> $A", prefix=False), "GemmaTokenizerFast", "gemma2", ["<s>"], []),
    "GPT-2, SmolLM2": (lambda: _byte_level(lambda _: processors.ByteLevel()), "GPT2Tokenizer", "llama", [], []),
    "Qwen": (_qwen, "PreTrainedTokenizerFast", "qwen2", [], []),
    "none": (lambda: _byte_level(lambda _: None), "PreTrainedTokenizerFast", "llama", [], []),
    "EOS": (lambda: _byte_level(lambda f: _template(f, "$A </s>")), "PreTrainedTokenizerFast", "llama", [], ["</s>"]),
    "both": (
        lambda: _byte_level(lambda f: _template(f, "<s> $A </s>")),
        "PreTrainedTokenizerFast", "llama", ["<s>"], ["</s>"],
    ),
    "BERT": (
        lambda: _byte_level(lambda _: processors.BertProcessing(("</s>", 1), ("<s>", 0))),
        "PreTrainedTokenizerFast", "llama", ["<s>"], ["</s>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_what_transformers_gives(tmp_path: Path, kind: str, add_bos: bool) -> None:
    make, name, model_type, begins, ends = KINDS[kind]
    make().save(str(tmp_path / "tokenizer.json"))
    special = {name: f"<{name}>" for name in ("unk", "pad", "mask")} | {"bos": "<s>", "eos": "</s>"}
    settings = {"tokenizer_class": name, "add_bos_token": add_bos, "legacy": False}
    settings |= {f"{name}_token": token for name, token in special.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, encoder = AutoTokenizer.from_pretrained(tmp_path), Encoder(tmp_path)
    # For Llama 2's class transformers puts another rule in place of ▁ before spaces and behind special tokens.
    texts = [text for text in TEXTS if kind != "Llama 2" or (text.strip() == text and "<s>" not in text)]
    for text, found in zip(texts, encoder.encode(Document(t, t) for t in texts), strict=True):
        ids = theirs(text).input_ids
        assert found.token_ids.tolist() == ids
        assert found.loss_mask.tolist() == [1] * (len(ids) - 1), "the EOS is a label, and what follows the BOS"
    around = [[encoder.tokenizer.fast.id_to_token(i) for i in side] for side in encoder.tokenizer.around()]
    assert around == [begins, ends]


def _with_bos(tiny: Tiny, folder: Path, single: str = "<end> $A") -> Path:
    """The tiny teacher, with a tokenizer that begins each text with its one special token."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((tiny.teacher / name).read_bytes())
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<end>", 0)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.mark.parametrize(("bos", "eos", "around"), [
    ("auto", "auto", ([0], [])), ("no", "auto", ([], [])), ("no", "yes", ([], [0])), ("yes", "yes", ([0], [0])),
])  # fmt: skip
def test_the_setting_goes_before_the_tokenizer(
    tiny: Tiny, tmp_path: Path, bos: AddToken, eos: AddToken, around: tuple[list[int], list[int]]
) -> None:
    encoder = Encoder(_with_bos(tiny, tmp_path / "model"), bos, eos)
    (found,) = encoder.encode([Document("a", "The old fox")])
    begins, ends = around
    assert found.token_ids.tolist() == [*begins, *encoder.tokenizer.encode(["The old fox"])[0], *ends]
    assert found.loss_mask.all()
    assert [each.token_ids.tolist() for each in encoder.encode([Document("b", "")])] == [[]]


def test_yes_without_such_a_token_is_one_message(tiny: Tiny) -> None:
    for bos, eos, name in (("yes", "no", "bos"), ("auto", "yes", "eos")):
        with pytest.raises(
            UsageError, match=f"corpus.{name}=yes: the tokenizer .* has no {name}_token.*corpus.{name}=no"
        ):
            Encoder(tiny.teacher, bos, eos)  # type: ignore[arg-type]


def test_a_tokenizer_that_asks_for_a_bos_in_vain_is_named(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _with_bos(tiny, tmp_path / "model", "$A")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<end>", "add_bos_token": True}))
    with caplog.at_level(logging.WARNING, "kd"):
        assert AutoTokenizer.from_pretrained(folder)("The").input_ids == [258]
        assert Encoder(folder).around == ([], [])
    assert "set corpus.bos=yes" in caplog.text
    assert Encoder(folder, "yes").around == ([0], [])


def test_windows_go_on_without_another_bos_and_the_last_ends_with_the_eos(tiny: Tiny, tmp_path: Path) -> None:
    encoder = Encoder(_with_bos(tiny, tmp_path / "model"), "auto", "yes")
    text = "The old fox sees a river. " * 9
    windows = list(cut_windows(encoder.encode([Document("a", text)]), ROW_LENGTH, 4))
    assert len(windows) > 2
    labels = np.concatenate([window.token_ids[1:][window.loss_mask.astype(bool)] for window in windows])
    assert [0, *labels.tolist()] == [0, *encoder.tokenizer.encode([text])[0], 0], "each label once, the EOS the last"
    assert [window.token_ids[0] == 0 for window in windows] == [True] + [False] * (len(windows) - 1)


def test_conversations_get_what_their_template_writes_alone(tiny: Tiny, tmp_path: Path) -> None:
    folder = _with_bos(tiny, tmp_path / "model", "<end> $A <end>")
    (folder / "chat_template.jinja").write_text(
        "<end>{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}"
    )
    rows = [{"messages": [{"role": "assistant", "content": word * 3}]} for word in ("The old ", "fox ", "river ")]
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = make_plans(tiny.export(teacher=str(folder), corpus=Corpus(str(corpus))), tmp_path / "cache")
    for plan in plans:
        assert not plan.texts
        assert not {"text_begins_with", "text_ends_with"} & plan.identity.keys()
        assert [window.token_ids.tolist().count(0) for window in plan.windows] == [1] * len(plan.windows)


def test_plan_and_manifest_say_so_and_prompts_begin_alike(tiny: Tiny, tmp_path: Path) -> None:
    teacher = _with_bos(tiny, tmp_path / "model")
    export = tiny.export(teacher=str(teacher))
    write_caches(export, tmp_path / "cache")
    manifest = read_manifest(tmp_path / "cache" / "train")
    assert manifest.plans[0]["text_begins_with"] == manifest.text_begins_with == [0]
    assert "text_ends_with" not in manifest.plans[0]
    assert all(record.token_ids[0] == 0 for record in tiny.records(tmp_path / "cache" / "train") if not record.start)
    plan, _ = make_plans(export, tmp_path / "cache")
    assert plan.texts == "each text begins with <end> (id 0), and no EOS is added (corpus.eos)"
    assert record_or_check_plan(plan), "complete"
    before = read_manifest(tiny.train)
    assert not {"text_begins_with", "text_ends_with"} & before.plans[0].keys()
    assert before.text_begins_with == []


def test_a_cache_without_is_neither_taken_for_one_with_nor_grown_by_it(tiny: Tiny, tmp_path: Path) -> None:
    teacher = _with_bos(tiny, tmp_path / "model")
    make_corpus(tmp_path / "corpus", documents=40)
    out, more = tmp_path / "cache", Corpus(str(tmp_path / "corpus"))
    write_caches(tiny.export(teacher=str(teacher), corpus=Corpus(str(tiny.corpus), bos="no")), out)
    plan = json.loads((out / "train" / "plan.json").read_text())
    assert plan["corpus"].keys() == {"fingerprint", "text_field", "content"}, "as before the setting was there"
    for export, extend in (
        (tiny.export(teacher=str(teacher)), False),
        (tiny.export(teacher=str(teacher), corpus=more), True),
    ):
        with pytest.raises(UsageError, match=r"another text_begins_with \(None; now \[0\]\).*with corpus.bos=no"):
            write_caches(export, out, extend=extend)
    (out / "growth.json").unlink()
    grown = Corpus(more.path, bos="no")
    write_caches(tiny.export(teacher=str(teacher), corpus=grown), out, extend=True)
    assert len(read_manifest(out / "train").plans) == 2
    assert load_growth(out, begin=False).manifests["train"].text_begins_with == []


def test_texts_that_begin_with_their_bos_are_counted(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{'<end>' * (n % 2)}The fox {n}"}) + "\n" for n in range(6)))
    with caplog.at_level(logging.WARNING, "kd"):
        make_plans(
            tiny.export(teacher=str(_with_bos(tiny, tmp_path / "m")), corpus=Corpus(str(corpus))), tmp_path / "c"
        )
    assert "3 texts begin with the BOS themselves" in caplog.text


def test_prompts_of_a_run_begin_as_the_texts_of_its_cache(tiny: Tiny, tmp_path: Path) -> None:
    teacher = _with_bos(tiny, tmp_path / "model")
    write_caches(tiny.export(teacher=str(teacher)), tmp_path / "cache")
    for cache, begins in ((tmp_path / "cache", [0]), (tiny.root / "cache", [])):
        config = quickstart()
        config.shards.path = config.evaluation.shards.path = str(cache / "train")
        config.evaluation.prompts = ("The old",)
        prompts = fdl.build(config)._prompts(Tokenizer(teacher))
        assert prompts.ids == [[*begins, *Tokenizer(teacher).encode(["The old"])[0]]]
