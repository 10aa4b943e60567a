"""Students of transformers against transformers itself: logits, packed documents, folders, adapters, routers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from data.teacher.transformers_scorer import HuggingFaceScorer
from kd_core.errors import UsageError
from kd_core.parallel.recompute import recompute_all
from kd_core.students.huggingface.save import is_complete_export, save_pretrained
from kd_core.students.starts.frozen_start import FrozenStart
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import StudentInit, build_student
from kd_core.students.starts.transformers_start import Transformers
from kd_core.students.transformers_student.startup_checks import SCALES, typical_change
from kd_core.students.transformers_student.transformers_student import experts_per_token, read_sizes
from tests.kd_core.students.transformers_models import (
    FAMILIES,
    SIZES,
    STATEFUL,
    VISION,
    VOCAB,
    randomise,
    save,
    save_folder,
    their_model,
)

CPU = torch.device("cpu")
FAST = ("gemma 3", "gpt-oss", "nemotron h")
LENGTHS = (7, 1, 9, 3)
slow = pytest.mark.slow


def load(start: StudentInit) -> Any:
    return build_student(start, CPU, 0)


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of documents and padding: tokens, positions, document ids.  [2, 12]"""
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    positions, documents = torch.zeros(2, 12, dtype=torch.int64), torch.full((2, 12), -1)
    for row, lengths in enumerate((LENGTHS[:2], LENGTHS[2:])):
        start = 0
        for number, length in enumerate(lengths):
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = number
            start += length
    documents[1, 12:] = -1
    return tokens, positions, documents


def by_document(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, documents: Tensor) -> Tensor:
    """Logits of the model, one document after the other, each in a row of its own.  [n, V]"""
    outputs: list[Tensor] = []
    for row, ids in zip(tokens, documents, strict=True):
        outputs += [logits_of(row[ids == number][None])[0] for number in range(int(ids.max()) + 1)]
    return torch.cat(outputs)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=slow) for name in FAMILIES if name not in FAST)])
def test_a_family(name: str, tmp_path: Path) -> None:
    """Logits and gradients of packed rows, against the model that transformers loads, document by document."""
    folder = save_folder(name, tmp_path / "model")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student = load(Transformers(str(folder)))
    assert (student.document_mode == "rows") == (name in STATEFUL)
    tokens, positions, documents = packed()
    expected = by_document(lambda row: model(row).logits, tokens, documents)
    logits = student(tokens, positions, documents)[documents >= 0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    # The gradients of a random function of the logits, by each parameter.
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (logits * seed).sum().backward()
    (expected * seed).sum().backward()
    theirs = {id(p): p.grad for p in model.parameters()}
    named, ours = dict(model.named_parameters()), dict(student.named_parameters())
    assert named.keys() == ours.keys()
    size = max(float(grad.norm()) for grad in theirs.values() if grad is not None)
    for key, parameter in named.items():
        if parameter.grad is None:
            assert ours[key].grad is None or not ours[key].grad.any(), key
            continue
        difference = float((ours[key].grad - parameter.grad).norm())
        assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-6 * size, (key, difference)


def test_an_export_is_the_model(tmp_path: Path) -> None:
    """Stacked experts are stored one by one again, buffers too. Padding of the vocabulary becomes unlikely."""
    folder = save_folder("gpt-oss", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    student = load(Transformers(str(folder), vocab_size=VOCAB - 6))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    save_pretrained(student, tmp_path / "out", folder, dtype="float32")
    assert is_complete_export(tmp_path / "out")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.dtype == torch.float32
    tokens, positions, _ = packed()
    expected = again(tokens, position_ids=positions[:1] * 0 + torch.arange(12)).logits
    logits = student(tokens, torch.arange(12).expand(2, 12), torch.zeros_like(tokens))
    torch.testing.assert_close(logits, expected[..., : VOCAB - 6], rtol=1e-4, atol=1e-4)
    assert (expected.argmax(dim=-1) < VOCAB - 6).all()
    stored, before = (safetensors.torch.load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    assert stored.keys() == before.keys()


def test_bfloat16_is_written_in_the_configuration(tmp_path: Path) -> None:
    folder = save_folder("phi 3", tmp_path / "model", tie_word_embeddings=True)
    (folder / "tokenizer.json").write_text("{}")
    student = load(Transformers(str(folder)))
    assert student.lm_head.weight is student.get_parameter("model.embed_tokens.weight")
    save_pretrained(student, tmp_path / "out", folder, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT's call
def test_adapters_are_peft_s(tmp_path: Path) -> None:
    """Adapters on joined matrices, in PEFT's format and merged."""
    import peft  # noqa: PLC0415 (takes a second)

    folder = save_folder("phi 3", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    start = LoraStart(Transformers(str(folder)), targets=("qkv_proj", "o_proj"), rank=3, alpha=6.0)
    student = load(start)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8
    with torch.no_grad():
        for name in trained:
            student.get_parameter(name).normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    save_pretrained(student, tmp_path / "out", folder)
    tokens, positions, _ = packed()
    ours = student(tokens, torch.arange(12).expand(2, 12), torch.zeros_like(positions))
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted: Any = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(adapted(tokens).logits, ours, rtol=1e-4, atol=1e-4)
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(tokens).logits, ours, rtol=1e-4, atol=1e-4)
    again = load(
        LoraStart(Transformers(str(folder)), ("qkv_proj", "o_proj"), 3, 6.0, adapter=str(tmp_path / "out" / "adapter"))
    )
    torch.testing.assert_close(again(tokens, torch.arange(12).expand(2, 12), torch.zeros_like(positions)), ours)


def test_frozen_parameters_keep_their_names(tmp_path: Path) -> None:
    folder = save_folder("phi 3", tmp_path / "model")
    student = FrozenStart(Transformers(str(folder)), ("embed_tokens.*", "layers.0.*")).build_on_meta()
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in student.named_parameters() if "embed_tokens" in name or "layers.0." in name}


@pytest.mark.parametrize(("name", "recompute"), [("qwen 3 moe", True), ("qwen 3 next", False)])
def test_router_values_are_transformers_losses(name: str, recompute: bool, tmp_path: Path) -> None:
    """The balance of each document alone in its row is transformers' loss of it. A document as a row of a pass too."""
    folder = save_folder(name, tmp_path / "model")
    student, model = load(Transformers(str(folder))), their_model(name)
    if recompute:
        student.layers[0].recompute = recompute_all
    assert student.auxiliary_names == ("router_balance", "router_z")
    tokens, _, _ = packed()
    documents, positions = torch.zeros_like(tokens), torch.arange(12).expand(2, 12)
    if name == "qwen 3 next":
        documents = torch.where(positions < 9, 0, -1)
    values: dict[str, Tensor] = student(
        tokens, positions, documents, lambda *_: {}, auxiliary=lambda _, values: dict(values)
    )
    for row in range(2):
        output = model(tokens[row : row + 1, documents[row] >= 0], output_router_logits=True)
        torch.testing.assert_close(values["router_balance"][row, 0], output.aux_loss.detach())
        z = torch.stack([logits.logsumexp(dim=-1).square() for logits in output.router_logits]).mean(dim=0)
        torch.testing.assert_close(values["router_z"][row, documents[row] >= 0], z)
        output.aux_loss.backward()
    values["router_balance"][:, 0].sum().backward()
    for key, parameter in model.named_parameters():
        if "gate.weight" in key:
            torch.testing.assert_close(student.get_parameter(key).grad, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi 3", {}),
        ("granite 4", {"num_local_experts": 0}),
        ("nemotron h", {}),
        ("deepseek 3", {}),
        ("deepseek 3", {"n_group": 1}),
    ],
)
def test_families_without_routers_that_decide_by_their_logits_have_no_router_values(
    name: str, changes: dict[str, int]
) -> None:
    """Dense ones, and those whose routers add corrections to their logits."""
    assert experts_per_token(their_model(name, **changes)) is None


def test_angles_that_change_with_the_longest_row_limit_documents() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    phi = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config: Any = transformers.Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=phi)
    assert read_sizes(config).longest_document == 16
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert read_sizes(transformers.LlamaConfig(**SIZES, rope_parameters=dynamic)).longest_document == 64
    assert read_sizes(transformers.LlamaConfig(**SIZES)).longest_document is None


def test_blocks_are_run_by_what_recomputes(tmp_path: Path) -> None:
    student, calls = load(Transformers(str(save_folder("phi 3", tmp_path / "model")))), list[str]()

    def run_once(run: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        calls.append("block")
        return run(*args, **settings)

    student.layers[0].recompute = run_once
    student(*packed())
    assert calls == ["block"]


def vision_model(kind: str) -> Any:
    text = {**SIZES, "head_dim": 8}
    if kind == "gemma 3":
        config: Any = transformers.Gemma3Config(
            text_config={**text, "sliding_window": 5}, vision_config=VISION, mm_tokens_per_image=4,
            image_token_index=90, boi_token_index=91, eoi_token_index=92,
        )  # fmt: skip
        return transformers.Gemma3ForConditionalGeneration(config)
    if kind == "mistral 3":
        config = transformers.Mistral3Config(
            text_config={**text, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral"},
            image_token_index=90,
        )  # fmt: skip
        return transformers.Mistral3ForConditionalGeneration(config)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, image_token_id=90, video_token_id=91,
        vision_config={"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32},
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    "kind", ["gemma 3", pytest.param("qwen 2.5 vl", marks=slow), pytest.param("mistral 3", marks=slow)]
)
def test_the_text_model_of_a_vision_language_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = randomise(vision_model(kind).eval())
    folder = save(model, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    student = load(Transformers(str(folder)))
    tokens, positions, _ = packed()
    expected = model(input_ids=tokens).logits
    logits = student(tokens, torch.arange(12).expand(2, 12), torch.zeros_like(positions))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    save_pretrained(student, tmp_path / "out", folder)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert "vision" not in type(again).__name__.lower()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_logits_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder("cohere", tmp_path / "model")
    monkeypatch.setattr("kd_core.students.transformers_student.startup_checks.SCALES", SCALES[1:])
    with pytest.raises(UsageError, match=r"CohereForCausalLM are no scaled .*relative difference 3\.0e\+00"):
        load(Transformers(str(folder)))


@pytest.mark.parametrize(("name", "field"), [("phi 3", "is_causal"), ("gemma 3", "use_bidirectional_attention")])
def test_models_that_see_later_tokens_are_refused(name: str, field: str, tmp_path: Path) -> None:
    """As students, and as teachers."""
    folder = save_folder(name, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: field != "is_causal"}))
    for read in (lambda: load(Transformers(str(folder))), lambda: HuggingFaceScorer.load(folder, torch.float32, CPU)):
        with pytest.raises(UsageError, match=f"{field} is .*, so it is no causal language model"):
            read()


def test_single_positions_that_go_to_other_experts_are_no_sight_of_later_tokens() -> None:
    states = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    routed = states.clone()
    routed[0, 2:5] *= 1.5
    assert typical_change(routed, states) == 0
    assert typical_change(states * 1.1, states) == pytest.approx(0.1, rel=1e-4)


def test_causality_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a family whose configuration has another name for it."""
    monkeypatch.setattr("transformers.masking_utils.causal_mask_function", masking_utils.bidirectional_mask_function)
    folder = save_folder("phi 3", tmp_path / "model")
    with pytest.raises(UsageError, match="Phi3ForCausalLM attends to later positions .*, so it is no causal"):
        load(Transformers(str(folder), attention="eager"))


def test_a_model_whose_masks_let_documents_meet_gets_a_document_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The probe finds it by running the model: here, one whose masks have forgotten documents."""
    folder = save_folder("phi 3", tmp_path / "model")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with caplog.at_level(logging.WARNING, "kd"):
        student = load(Transformers(str(folder)))
    assert student.document_mode == "rows"
    assert "each document becomes a row of its own" in caplog.text
    tokens, positions, documents = packed()
    model = their_model("phi 3")
    expected = by_document(lambda row: model(row).logits, tokens, documents)
    torch.testing.assert_close(student(tokens, positions, documents)[documents >= 0], expected, rtol=1e-4, atol=1e-4)


def test_masks_of_several_rows_may_differ_from_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for documents of unlike lengths find them by their positions in a batch of one row alone."""
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: find(ids) if len(ids) == 1 else None)
    assert load(Transformers(str(save_folder("phi 3", tmp_path / "model")))).document_mode == "rows"


def test_rounding_is_no_leak(tmp_path: Path) -> None:
    student = load(Transformers(str(save_folder("phi 3", tmp_path / "model"))))
    with torch.autocast("cpu", torch.bfloat16):
        student.check_start()
    assert student.document_mode == "positions"


def test_positions_that_do_not_mark_documents(tmp_path: Path) -> None:
    """collate.reset_position_ids and reset_attention_mask may differ: documents decide, and positions are positions."""
    folder = save_folder("gemma 3", tmp_path / "model")
    student, model = load(Transformers(str(folder))), their_model("gemma 3")
    assert student.document_mode == "positions"
    tokens, positions, documents = packed()
    in_row = torch.arange(12).expand(2, 12)
    for row, number in ((0, 1), (1, 1)):
        here = documents[row] == number
        expected = model(tokens[row, here][None], position_ids=in_row[row, here][None]).logits[0]
        torch.testing.assert_close(student(tokens, in_row, documents)[row, here], expected, rtol=1e-4, atol=1e-4)
    one = torch.zeros_like(documents)
    mask = torch.ones(2, 12, dtype=torch.int64)
    expected = model(tokens, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(student(tokens, positions, one), expected, rtol=1e-4, atol=1e-4)


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("norm", "nomr") if name == "model.norm.weight" else name: t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"},
            "1 tensors are missing, the first is model.norm.weight",
        ),
        (rename, "found 'model.nomr.weight' of shape .32,.; wanted no such tensor"),
        (
            lambda tensors: {n: t[:-1] if n == "model.norm.weight" else t for n, t in tensors.items()},
            "model.norm.weight of shape .31,.; wanted shape .32,",
        ),
        (
            lambda tensors: {n: t * torch.nan if n == "model.norm.weight" else t for n, t in tensors.items()},
            "holds NaN or infinite values",
        ),
        (
            lambda tensors: {**tensors, "lm_head.weight": 2 * tensors["model.embed_tokens.weight"]},
            "ties embedding and output head",
        ),
    ],
)
def test_damaged_folders(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    folder = save_folder("gemma 3", tmp_path / "model")
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)
    with pytest.raises(UsageError, match=message):
        load(Transformers(str(folder)))


def test_experts_of_unlike_shapes(tmp_path: Path) -> None:
    file = save_folder("qwen 3 moe", tmp_path / "model") / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if "experts.1.down_proj" in name)
    safetensors.torch.save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(
        UsageError, match=r"model.safetensors: the tensors of model.layers.*down_proj do not fit together"
    ):
        load(Transformers(str(tmp_path / "model")))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = save_folder("gpt-oss", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UsageError, match="its weights are quantised"):
        Transformers(str(folder)).build_on_meta()


def test_another_version_s_mapping_loads_whole_folders_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder("qwen 3 moe", tmp_path / "model")

    def fail(*_: object) -> None:
        raise ImportError("of another name")

    monkeypatch.setattr("kd_core.students.transformers_student.stored_weights.plan_conversions", fail)
    student, (tokens, positions, _) = load(Transformers(str(folder))), packed()
    logits = student(tokens, torch.arange(12).expand(2, 12), torch.zeros_like(positions))
    torch.testing.assert_close(logits, their_model("qwen 3 moe")(tokens).logits, rtol=1e-4, atol=1e-4)


def test_attention_without_soft_caps_is_not_taken_for_a_model_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before transformers 5.22, which chose sdpa for Gemma 2."""
    folder = save_folder("gemma 2", tmp_path / "model")
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)
    student = Transformers(str(folder)).build_on_meta()
    scorer = HuggingFaceScorer.load(folder, torch.float32, CPU)
    assert {student.model.config._attn_implementation, scorer.model.config._attn_implementation} == {"eager"}
    with pytest.raises(UsageError, match="student.attention=sdpa would leave out its soft cap"):
        Transformers(str(folder), attention="sdpa").build_on_meta()
