"""Scorers: our decoder and transformers say the same; any causal language model of transformers makes a cache."""

import json
import logging
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RoFormerConfig,
    masking_utils,
)
from transformers.modeling_outputs import CausalLMOutput

from data.cache.manifest import read_manifest
from data.cache.selection import Selection
from data.export import export as steps
from data.export.plan import make_plans
from data.export.teacher_export import TeacherExport
from data.teacher import choose_scorer
from data.teacher.choose_scorer import load_scorer, read_teacher_facts
from data.teacher.scorer import TeacherScores, score_rows
from data.teacher.transformers_scorer import HuggingFaceScorer, _divide
from data.tokenizer import Tokenizer
from kd_core.errors import UsageError
from tests.tiny import Tiny, bytes_of, write_caches

CPU = torch.device("cpu")


def _vocab(tiny: Tiny) -> int:
    return read_teacher_facts(tiny.teacher, "decoder").vocab_size


def _other_family(tiny: Tiny, folder: Path, model: PreTrainedModel) -> Path:
    """A folder of a family that our decoder does not cover, with the tiny tokenizer; it has read the corpus."""
    texts = [path.read_text() for path in sorted(tiny.corpus.iterdir())]
    ids = [i for found in Tokenizer(tiny.teacher).encode(texts) for i in found]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    model.eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    shutil.copy(tiny.teacher / "tokenizer.json", folder)
    return folder


def _gpt2(tiny: Tiny, folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return _other_family(tiny, folder, GPT2LMHeadModel(GPT2Config(vocab_size=_vocab(tiny), **size)))


def _gemma(tiny: Tiny, folder: Path) -> Path:
    """Scaled embeddings, sliding windows, soft-capped logits: nothing that hidden states times a head would give."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=_vocab(tiny), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=128, final_logit_softcapping=6.0,
        query_pre_attn_scalar=8, initializer_range=0.1,
    )  # fmt: skip
    return _other_family(tiny, folder, Gemma2ForCausalLM(config))


def _scores(tiny: Tiny, scorer: str, dtype: torch.dtype) -> TeacherScores:
    loaded = load_scorer(tiny.teacher, scorer, dtype, CPU)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(_vocab(tiny), (3, 101), generator=generator)  # 300 positions: more than a chunk
    documents = torch.arange(3)[:, None].repeat(1, 100)
    documents[1, 60:] = -1
    found = score_rows(loaded, tokens, documents, Selection(8), torch.zeros(300, 0))
    real = (documents >= 0).flatten()
    return TeacherScores(*(field[real] for field in found))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_both_scorers_say_the_same(tiny: Tiny, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = (_scores(tiny, scorer, dtype) for scorer in ("decoder", "transformers"))
    if dtype == torch.float32:
        assert (ours.ids == theirs.ids).all()
    for name in ("log_probs", "tail_log_prob", "label_log_prob"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=0)
        assert getattr(theirs, name).dtype == torch.float32


@pytest.mark.parametrize("scorer", ["decoder", "transformers"])
def test_a_bfloat16_teacher_has_float32_logits(tiny: Tiny, scorer: str) -> None:
    """The hidden states of transformers' own bfloat16 model, multiplied in float64.

    Rows of one position, where attention adds up nothing, so that both bodies round alike.
    """
    tokens, documents = torch.randint(200, (19, 1)), torch.zeros(19, 1, dtype=torch.int64)
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1][:, 0].double()
        (logits,) = load_scorer(tiny.teacher, scorer, torch.bfloat16, CPU).logits(tokens, documents)
    truth = hidden @ model.lm_head.weight.double().t()
    assert logits.dtype == torch.float32
    assert (logits - truth).abs().max() < 1e-5 < (truth.bfloat16() - truth).abs().median()


def _small(kind: type[PreTrainedConfig], **settings: object) -> PreTrainedModel:
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "ffn_dim": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**size, **heads, max_position_embeddings=512, **settings)).eval()


# The operations of each head on the product of float64, and whether it can run without its body.
HEADS = {
    "plain": (lambda: _small(LlamaConfig), lambda z: z, True),
    "soft cap": (lambda: _small(Gemma2Config, final_logit_softcapping=4.0), lambda z: 4 * torch.tanh(z / 4), True),
    "factor": (lambda: _small(CohereConfig, logit_scale=0.25), lambda z: z * 0.25, True),
    "divisor": (lambda: _small(GraniteConfig, logits_scaling=3.0), lambda z: z / 3, True),
    "experts": (lambda: _small(MixtralConfig, num_local_experts=4), lambda z: z, True),
    "bias": (lambda: _small(PhiConfig), lambda z: z + torch.linspace(-1, 1, 300, dtype=torch.float64), True),
    "within the body": (lambda: _small(OPTConfig, word_embed_proj_dim=32), lambda z: z, False),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_any_form_have_float32_logits_in_chunks(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The hidden states of transformers' own bfloat16 model through the head in float64, 250 of 300 tokens real."""
    make, finish, divides = HEADS[name]
    model = make()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        bias.data = torch.linspace(-1, 1, 300)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens, documents = torch.randint(300, (3, 100)), torch.zeros(3, 100, dtype=torch.int64)
    with caplog.at_level(logging.INFO, logger="kd"), torch.no_grad():
        scorer = HuggingFaceScorer.load(tmp_path, torch.bfloat16, CPU, tokens=250)
        logits = torch.cat([chunk.clone() for chunk in scorer.logits(tokens, documents)])
        hidden = model.get_decoder()(tokens).last_hidden_state.flatten(0, 1).double()
        truth = finish(hidden @ model.get_output_embeddings().weight.double().t())[:, :250]
    assert (scorer.head is not None) == divides
    assert ("body and head are computed together" in caplog.text) != divides
    # The bias is bfloat16, so its own rounding is allowed for.
    assert logits.dtype == torch.float32
    tolerance = 4e-3 if bias is not None else 2e-5
    assert (logits - truth).abs().max() < tolerance < (truth.bfloat16() - truth).abs().max()


@pytest.mark.parametrize("kind", [BertConfig, RoFormerConfig])
def test_a_head_that_shares_the_bias_of_its_lm_head_has_float32_logits(
    tmp_path: Path, kind: type[PreTrainedConfig]
) -> None:
    model = _small(kind, is_decoder=True)
    model.get_output_embeddings().bias.data = torch.linspace(-1, 1, 300)
    model.save_pretrained(tmp_path)
    tokens, documents = torch.randint(300, (2, 9)), torch.zeros(2, 9, dtype=torch.int64)
    with torch.no_grad():
        truth = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits.flatten(0, 1)[:, :250]
        scorer = HuggingFaceScorer.load(tmp_path, torch.float32, CPU, tokens=250)
        torch.testing.assert_close(torch.cat([*scorer.logits(tokens, documents)]), truth, atol=1e-4, rtol=0)
        wide = HuggingFaceScorer.load(tmp_path, torch.bfloat16, CPU, tokens=250)
        assert {chunk.dtype for chunk in wide.logits(tokens, documents)} == {torch.float32}


class _Direct(LlamaForCausalLM):
    """A model that multiplies by the weight of its lm_head without calling it."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        hidden = self.model(input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=F.linear(hidden, self.model.embed_tokens.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_teacher_that_sees_later_tokens_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a family whose configuration does not say so."""
    model = _small(LlamaConfig).to(dtype)
    model.set_attn_implementation("eager")
    _divide(model, 250, Path("teacher"))
    monkeypatch.setattr("transformers.masking_utils.causal_mask_function", masking_utils.bidirectional_mask_function)
    with pytest.raises(UsageError, match="LlamaForCausalLM attends to later positions .*, so it is no causal"):
        _divide(model, 250, Path("teacher"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_are_rounded_are_logged(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = _Direct(_small(LlamaConfig).config).to(dtype).eval()
    with caplog.at_level(logging.INFO, logger="kd"):
        assert _divide(model, 250, Path("teacher")) is None
    warned = "teacher: its lm_head is of another kind, so its logits are rounded to torch.bfloat16" in caplog.text
    assert warned == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("make", "scorer"), [(_gpt2, "transformers"), (_gemma, "decoder")])
def test_a_family_makes_a_cache_of_what_transformers_gives_it(
    tiny: Tiny, tmp_path: Path, make: object, scorer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that our decoder does not cover, and one that caps its logits."""
    assert callable(make)
    folder = make(tiny, tmp_path / "teacher")
    with caplog.at_level(logging.INFO, logger="kd"):
        write_caches(tiny.export(teacher=str(folder), codec="lossless"), tmp_path / "out")
    reason = "scored with transformers, because our decoder does not support it"
    assert (reason in caplog.text) == (scorer == "transformers")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest.vocab_size == _vocab(tiny)
    assert manifest.plans[0]["scorer"] == scorer
    name = "family" if scorer == "decoder" else "model_type"
    assert manifest.teacher["architecture"][name] == model.config.model_type
    for record in tiny.records(tmp_path / "out" / "train"):
        tokens = torch.from_numpy(record.token_ids.astype(np.int64))
        with torch.no_grad():
            truth = torch.log_softmax(model(tokens[None, :-1]).logits[0].double(), dim=-1)
        assert np.abs(truth.topk(8).values.numpy() + np.sort(-record.topk_log_probs, axis=1)).max() < 1e-4
        assert np.abs(truth.gather(1, tokens[1:, None])[:, 0].numpy() - record.label_log_prob).max() < 1e-4


def test_ranks_and_threads_do_not_change_a_byte_of_transformers_cache(tiny: Tiny, tmp_path: Path) -> None:
    export = tiny.export(teacher=str(_gpt2(tiny, tmp_path / "teacher")), train_tokens=400, validation_tokens=100)
    made: list[dict[str, bytes]] = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            write_caches(export, tmp_path / f"out{count}", ranks=count)
        finally:
            torch.set_num_threads(threads)
        made.append(bytes_of(tmp_path / f"out{count}"))
    assert made[0] == made[1]


def test_columns_beyond_the_vocabulary_take_no_probability(tiny: Tiny) -> None:
    cut = HuggingFaceScorer.load(tiny.teacher, torch.float32, CPU, tokens=200)
    tokens, documents = torch.randint(200, (1, 20)), torch.zeros(1, 19, dtype=torch.int64)
    found = score_rows(cut, tokens, documents, Selection(8), torch.zeros(19, 0))
    whole = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32)
    with torch.no_grad():
        truth = torch.log_softmax(whole(tokens[:, :-1]).logits[0, :, :200], dim=-1)
    assert found.ids.max() < 200
    torch.testing.assert_close(found.log_probs, truth.topk(8).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.log_probs.exp().sum(1) + found.tail_log_prob.exp(), torch.ones(19), atol=1e-5, rtol=0
    )


def test_another_scorer_is_another_plan_and_auto_is_what_it_stands_for(tiny: Tiny) -> None:
    plans = {
        scorer: make_plans(tiny.export(scorer=scorer), tiny.root / "unused")[0].identity
        for scorer in ("auto", "decoder", "transformers")
    }
    assert plans["auto"] == plans["decoder"] != plans["transformers"]
    assert plans["transformers"]["scorer"] == "transformers"


def test_a_scorer_that_is_named_is_not_replaced_by_another(tiny: Tiny, tmp_path: Path) -> None:
    folder = _gpt2(tiny, tmp_path / "teacher")
    with pytest.raises(UsageError, match="model_type is 'gpt2'; wanted one of"):
        read_teacher_facts(folder, "decoder")
    with pytest.raises(UsageError, match="scorer: got 'sglang'; wanted one of auto, decoder, transformers, vllm"):
        tiny.export(scorer="sglang")
    with pytest.raises(UsageError, match="row_length: got 65; the teacher's context is 64"):
        make_plans(tiny.export(teacher=str(folder), row_length=65), tmp_path / "out")


def test_without_transformers_the_extra_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _gpt2(tiny, tmp_path / "teacher")
    monkeypatch.setattr(choose_scorer, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"model_type is 'gpt2'.*pip install 'kd-workspace\[hf\]'"):
        read_teacher_facts(folder, "auto")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"a model of transformers needs the extra"):
        read_teacher_facts(tiny.teacher, "transformers")


def test_a_teacher_that_is_no_folder_is_named_and_a_hub_id_is_fetched(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="teacher some/model: no such folder. Wanted one, or hub:OWNER/NAME"):
        make_plans(tiny.export(teacher="some/model"), tmp_path / "out")

    def fetched(name: str, allow_patterns: list[str], **_: object) -> str:
        assert "*.safetensors" in allow_patterns
        if name != "some/model":
            raise OSError("no such repository")
        return str(tiny.teacher)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    export: TeacherExport = tiny.export(teacher="hub:some/model")
    plans = [make_plans(each, tmp_path / "out")[0].identity for each in (export, tiny.export())]
    assert plans[0] == plans[1]
    assert steps.load_teacher(export, CPU).device == CPU
    with pytest.raises(
        UsageError, match=r"teacher hub:no/model: cannot be downloaded from the hub \(no such repository\)"
    ):
        make_plans(tiny.export(teacher="hub:no/model"), tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ('{"model_type": "no_such_family"}', "transformers cannot read its config.json"),
    ],
)
def test_a_config_that_nobody_knows_is_named(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=message):
        read_teacher_facts(tmp_path, "auto")


def test_models_that_cannot_speak_or_lack_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = _gpt2(tiny, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    dropped = next(name for name in weights if "mlp.c_fc.weight" in name)
    save_file({k: v for k, v in weights.items() if k != dropped}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="1 weights are missing or of another shape, the first is .*mlp.c_fc.weight"):
        load_scorer(folder, "auto", torch.float32, CPU)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # a pickle may run what it likes
    with pytest.raises(UsageError, match="model.safetensors: no such file"):
        load_scorer(folder, "auto", torch.float32, CPU)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(UsageError, match="transformers cannot"):
        load_scorer(folder, "auto", torch.float32, CPU)
