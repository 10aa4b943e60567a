"""Gemma 2 and 3 against transformers: gradients, text models of others, adapters, greedy text, scores."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from data.teacher.choose_scorer import read_teacher_facts
from data.teacher.scorer import DecoderScorer
from data.teacher.teacher_layout import WHOLE_COPIES
from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder import attention, flex_kernel
from kd_core.students.decoder.attention import attend
from kd_core.students.huggingface.config_json import read_architecture
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.layer_importance import LayerwiseText, nll_with_layers
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, Random, build_student
from kd_core.training.generation import continue_greedily
from tests.kd_core.students.models import CPU, VOCAB, difference, load, rows, their_model
from tests.kd_core.students.test_lora_layers import _randomise

TOLERANCE = 1e-4
GEMMAS = ("gemma2", "gemma3")
# PEFT asks transformers something by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("name", [*GEMMAS, "gemma2, no caps, own scale, biases"])
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In chunks of eight queries too, which compute their products again."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    ours = load(tmp_path)
    tokens, positions, documents = rows()
    weights = torch.randn(2, 40, VOCAB, generator=torch.Generator().manual_seed(3))
    (theirs(tokens).logits * weights).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", 8)
        (ours(tokens, positions, documents) * weights).sum().backward()
    gradients = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        expected = gradients.pop(parameter_name)
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() < TOLERANCE * expected.norm(), parameter_name
    assert not gradients


def _dense(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, window: int, cap: float) -> Tensor:
    """Attention with capped products of every pair [B, H, T, T]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    products = cap * torch.tanh(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.7 / cap)
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    seen = (distance >= 0) & (distance < window) & (ids[:, :, None] == ids[:, None])[:, None]
    return torch.einsum("bhqk,bhkd->bhqd", products.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("way", ["chunks", "kernel"])
@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("ids", [[[0] * 7 + [1] * 30 + [2] * 3, [0] * 39 + [-1]], [[0] * 40, [0] * 40]])
def test_capped_attention_is_that_of_all_pairs(
    ids: list[list[int]], window: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention runs by its formula here, without its compiler, and on a CPU it has no backward pass."""
    monkeypatch.setattr(attention, "QUERIES", 8)
    if way == "kernel":
        monkeypatch.setattr(attention, "KERNEL_DEVICES", ("cpu",))
        monkeypatch.setattr(attention, "KERNEL_DTYPES", (torch.float32,))
    calls: list[int] = []
    real = flex_kernel.flex_attention
    monkeypatch.setattr(flex_kernel, "flex_attention", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    flex_kernel._compiled.cache_clear()
    dtype = torch.float32 if way == "kernel" else torch.float64
    documents, random = torch.tensor(ids), torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, heads, 40, 16, generator=random, dtype=dtype) for heads in (6, 2, 2, 6))
    leaves = [x.requires_grad_(way == "chunks") for x in (q, k, v)]
    out = attend(*leaves, Documents.from_ids(documents), 0.7, window, 1.5)
    wanted = _dense(*leaves, documents, window or 40, 1.5)
    assert bool(calls) == (way == "kernel")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if way == "kernel" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(out, wanted, **tolerance)
    flex_kernel._compiled.cache_clear()
    if way == "kernel":
        return
    found, expected = (torch.autograd.grad(x, leaves, grad) for x in (out, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_the_backward_pass_holds_no_products_of_all_pairs() -> None:
    """What autograd keeps grows with the length of a row, as its keys and values do, and not with its square."""

    def kept(T: int) -> int:
        sizes: list[int] = []
        x = torch.randn(1, 2, T, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            attend(x, x, x, Documents.one_a_row(torch.zeros(1, T, dtype=torch.int64)), None, 128, 2.0)
        return sum(sizes)

    assert kept(2048) < 5 * kept(512)


def _image_and_text_model(folder: Path) -> Any:
    text = their_model("gemma3").config.to_dict()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**size, image_size=32, patch_size=16)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    torch.manual_seed(2)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def test_the_text_model_of_an_image_and_text_model_is_read_and_exported_alone(tmp_path: Path) -> None:
    theirs = _image_and_text_model(tmp_path / "both")
    ours = load(tmp_path / "both")
    assert difference(ours, theirs) < TOLERANCE
    save_pretrained(ours, tmp_path / "text", tmp_path / "both")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert difference(ours, again) < TOLERANCE
    assert again.config.eos_token_id == 2
    assert read_architecture(tmp_path / "text") == ours.arch


def test_older_fields_of_gemma_3_mean_the_same(tmp_path: Path) -> None:
    their_model("gemma3, six layers").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    full, local = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    path.write_text(
        json.dumps(config | {"rope_parameters": {"full_attention": full | {"rope_type": "linear", "factor": 8.0}}})
    )
    arch = read_architecture(tmp_path)
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": full["rope_theta"], "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    path.write_text(json.dumps({**config, "rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": 6}))
    assert read_architecture(tmp_path) == arch
    assert [arch.window(layer) for layer in range(6)] == [5] * 5 + [None]
    assert arch.rope(0) == (1e4, None) != arch.rope(5)


NO_SCALARS = (-1, 0, 0.3, math.inf, math.nan)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "'default'"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 1e4}},
            r"config\.json: rope_parameters is .*wanted those of full_attention",
        ),
        ("gemma3", {"model_type": "gemma3"}, "text_config"),
        ("gemma3", {"model_type": "gemma3", "text_config": [1]}, "damaged"),
        ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "damaged"),
        *(("gemma2", {"query_pre_attn_scalar": value}, "scalar is .*; wanted a whole number") for value in NO_SCALARS),
        *(
            ("gemma2", {f"{kind}_logit_softcapping": cap}, rf"config\.json: .*_soft_cap: got {cap}; wanted a finite")
            for kind, cap in (("attn", 0.0), ("final", 0.0), ("attn", math.nan), ("final", math.inf), ("attn", -1.0))
        ),
    ],
)
def test_other_arithmetic_is_refused_by_name(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    their_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=message):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", GEMMAS)
def test_bfloat16_rounds_where_transformers_does(name: str, tmp_path: Path) -> None:
    """√3072 is 55.5 then, and norms round once behind their factor of 1 + weight."""
    size = {"hidden_size": 3072, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    theirs = their_model(name, **size, layer_types=None, intermediate_size=8, vocab_size=8)
    theirs.bfloat16().save_pretrained(tmp_path)
    ours = build_student(Pretrained(str(tmp_path)), CPU, 0, dtype=torch.bfloat16).eval()
    tokens = torch.arange(8)[None]
    embedded, wanted = ours.embed(tokens), theirs.model.embed_tokens(tokens)
    assert torch.equal(embedded, wanted)
    assert torch.equal(embedded, ours.embed_tokens(tokens) * 55.5)
    assert torch.equal(ours.norm(embedded), theirs.model.norm(wanted))


@pytest.mark.parametrize("name", GEMMAS)
def test_adapters_in_peft_and_fewer_layers(name: str, tmp_path: Path) -> None:
    their_model(name).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    start = LoraStart(Pretrained(str(tmp_path / "base")), ("all",), 4, 6.0)
    ours = _randomise(build_student(start, CPU, seed=0))
    save_pretrained(ours, tmp_path / "export", tmp_path / "base")
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "export" / "adapter").eval()
    assert difference(ours, beside) < TOLERANCE
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    assert difference(ours, merged) < TOLERANCE
    assert difference(ours, their_model(name)) > 0.1
    # The middle layer alone: without a window in one of the families, and with one in the other.
    one = build_student(Pretrained(str(tmp_path / "base"), keep_layers=(1,)), CPU, seed=0).eval()
    save_pretrained(one, tmp_path / "one", tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", attn_implementation="eager").eval()
    assert difference(one, again) < TOLERANCE


def test_a_random_student_of_another_width_begins_with_norms_of_factor_one(tmp_path: Path) -> None:
    their_model("gemma3").save_pretrained(tmp_path / "base")
    start = Random(str(tmp_path / "base"), 64, 32, 2, 2, 1)
    model = build_student(start, CPU, seed=0)
    x = torch.randn(3, 64)
    unit = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.layers[1].pre_feedforward_layernorm(x), unit)
    save_pretrained(model, tmp_path / "out", tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert difference(model.eval(), again) < TOLERANCE


@pytest.mark.parametrize("name", GEMMAS)
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """With cached keys and values, over more tokens than the window has."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    prompt, ids = [5, 40, 7, 9], torch.tensor([[5, 40, 7, 9]])
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, theirs(ids).logits[:, -1:].argmax(-1)], dim=1)
    found = continue_greedily(load(tmp_path), [prompt, [3]], 12, Parallel(precision="float32"), World())
    assert found[0] == ids[0, 4:].tolist()


@pytest.mark.parametrize("name", GEMMAS)
def test_scores_and_importance_have_the_cap_of_the_logits(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    assert read_teacher_facts(tmp_path, "auto").scorer == "decoder"
    tokens, _, documents = rows()
    with torch.no_grad():
        logits = theirs(tokens).logits
        scorer = DecoderScorer.load(tmp_path, torch.float32, None, WHOLE_COPIES, World())
        scores = torch.cat([chunk.clone() for chunk in scorer.logits(tokens, documents)])
        text = LayerwiseText(load(tmp_path), tokens)
        nll = nll_with_layers(text, range(3))
    assert logits.abs().max() < 5.0
    torch.testing.assert_close(scores.log_softmax(-1), logits.flatten(0, 1).log_softmax(-1), atol=TOLERANCE, rtol=0)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert nll == pytest.approx(float(expected), rel=1e-5)
