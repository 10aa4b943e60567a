"""Adapters and frozen parts: PEFT reads what we write, we read what PEFT writes, and only what is said trains."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kd_core.errors import UsageError
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.lora_layers import LoraLinear, LoraSettings, adapted_layers, sharded_dropout
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.frozen_start import FrozenStart
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.optimizer import AdamW
from tests.kd_core.students.models import CPU, difference, rows, their_model

TOLERANCE = 1e-4
# PEFT asks transformers something by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2, whose linear layers have biases."""
    their_model("qwen2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _their_base(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def _randomise(model: Decoder) -> Decoder:
    """As if it had been trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(0, 0.2, generator=generator)
    return model.eval()


CASES = {
    "some": {"targets": ("attention_qkv", "down_proj"), "rank": 4, "alpha": 6.0},
    "all, rank-stabilised": {"targets": ("all",), "rank": 4, "alpha": 6.0, "rank_stabilised": True},
    "some layers": {"targets": ("mlp",), "rank": 2, "alpha": 3.0, "layers": (0, 2)},
    "one by one": {"targets": ("layers.0.self_attn.q_proj", "layers.[12].mlp.*"), "rank": 3, "alpha": 3.0},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_write_and_merging_changes_no_logit(case: str, folder: Path, tmp_path: Path) -> None:
    start = LoraStart(Pretrained(str(folder)), **CASES[case])
    ours = _randomise(build_student(start, CPU, seed=0))
    save_pretrained(ours, tmp_path / "export", folder)
    beside = peft.PeftModel.from_pretrained(_their_base(folder), tmp_path / "export" / "adapter").eval()
    assert difference(ours, beside) < TOLERANCE
    merged = _their_base(tmp_path / "export")
    assert difference(ours, merged) < TOLERANCE
    assert difference(ours, _their_base(folder)) > 0.1
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export" / "adapter").eval()
    assert difference(ours, automatic) < TOLERANCE
    again = replace(start, adapter=str(tmp_path / "export" / "adapter"))
    for (name, one), other in zip(ours.named_parameters(), build_student(again, CPU, seed=1).parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_we_read_what_peft_writes(rank_stabilised: bool, folder: Path, tmp_path: Path) -> None:
    settings = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["q_proj", "o_proj"], layers_to_transform=[1, 2], layers_pattern="layers",
        use_rslora=rank_stabilised, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(_their_base(folder), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    start = LoraStart(
        Pretrained(str(folder)), ("q_proj", "attention_dense"), 5, 7.0, layers=(1, 2), rank_stabilised=rank_stabilised,
        adapter=str(tmp_path / "adapter"),
    )  # fmt: skip
    ours = build_student(start, CPU, seed=0).eval()
    assert difference(ours, theirs) < TOLERANCE
    assert difference(ours, _their_base(folder)) > 0.01
    for changes, message in (
        ({"rank": 4}, "Set student.rank=5"),
        ({"alpha": 8.0}, "Set student.alpha=7.0"),
        ({"rank_stabilised": not rank_stabilised}, "Set student.rank_stabilised"),
        ({"layers": (1,)}, "adapts 4 layers, the student 2"),
        ({"targets": ("all",)}, "adapts 4 layers, the student 14"),
        ({"adapter": str(folder)}, "adapter_config.json: no such file"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(start, **changes).build_on_meta()


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_an_adapter_that_means_something_else_or_is_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    start = LoraStart(Pretrained(str(folder)), ("q_proj",), 2)
    save_pretrained(build_student(start, CPU, seed=0), tmp_path / "export", folder)
    adapter = tmp_path / "export" / "adapter"
    again = replace(start, adapter=str(adapter))
    state = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(state))
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="holds NaN"):
        build_student(again, CPU, seed=0)
    save_file({**state, name: state[name][:1]}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"of shape \(1, 32\); wanted shape \(2, 32\)"):
        build_student(again, CPU, seed=0)
    for key, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3"), ("rank_pattern", {"q_proj": 3})):
        _edit_config(adapter, lambda config, key=key, value=value: config.update({key: value}))
        with pytest.raises(UsageError, match=key):
            again.build_on_meta()
        _edit_config(
            adapter, lambda config, key=key: config.update({key: {"peft_type": "LORA", "bias": "none"}.get(key)})
        )


def test_a_new_adapter_changes_nothing_and_begins_as_pefts(folder: Path) -> None:
    model = build_student(LoraStart(Pretrained(str(folder)), ("all",), 16), CPU, seed=0).eval()
    assert difference(model, _their_base(folder)) < TOLERANCE
    for layer in adapted_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    one, other = (model.layers[i].self_attn.q_proj.lora_A for i in (0, 1))
    assert not torch.equal(one, other)


def test_only_adapters_train(folder: Path) -> None:
    model = build_student(LoraStart(Pretrained(str(folder)), ("q_proj",), 2), CPU, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(lr=0.1).build(model)
    model(*rows()).square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"layers.{i}.self_attn.q_proj.lora_B" for i in range(3)}  # A has no gradient while B is zero


def test_dropout_is_a_function_of_the_random_state_and_rests_in_evaluation() -> None:
    layer = LoraLinear(torch.nn.Linear(64, 8), LoraSettings(4, 4.0, 0.5, False)).to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 64)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    with torch.no_grad():  # whoever evaluates wants no gradient
        assert torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))
    kept = sharded_dropout(torch.ones(100, 1000), 0.25)
    assert kept.mean().item() == pytest.approx(1, abs=0.01)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_prj",)}, "'q_prj' matches nothing. Near it: .*q_proj"),
        ({"targets": ("lm_head",)}, "'lm_head' matches nothing"),
        ({"layers": (3,)}, r"student.layers: got \(3,\); wanted some of 0 to 2"),
        ({"layers": ()}, "nothing to adapt"),
        ({"rank": 0}, "student.rank: got 0"),
        ({"dropout": 1.0}, "student.dropout: got 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        replace(LoraStart(Pretrained(str(folder))), **changes).build_on_meta()


def test_frozen_parts_by_pattern(folder: Path) -> None:
    base = Pretrained(str(folder))
    model = build_student(FrozenStart(base, ("embed_tokens.*", "layers.[01].*", "norm.weight")), CPU, seed=0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert everything - frozen == {"lm_head.weight", *(name for name in everything if name.startswith("layers.2."))}
    assert difference(model.eval(), _their_base(folder)) < TOLERANCE
    with pytest.raises(
        UsageError, match="student.patterns: 'embed_token.weight' matches nothing. Near it: embed_tokens"
    ):
        FrozenStart(base, ("embed_token.weight",)).build_on_meta()
    with pytest.raises(UsageError, match="nothing is left to train"):
        FrozenStart(base, ("*",)).build_on_meta()


def test_a_tied_head_is_frozen_by_either_name(tmp_path: Path) -> None:
    their_model("qwen2, tied").save_pretrained(tmp_path)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        model = build_student(FrozenStart(Pretrained(str(tmp_path)), (name,)), CPU, seed=0)
        assert not model.embed_tokens.weight.requires_grad
        assert model.lm_head.weight is model.embed_tokens.weight
