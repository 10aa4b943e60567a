"""Adapters of layers that the folder joins: PEFT has one for all of them, in both directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kd_core.errors import UsageError
from kd_core.students.decoder.lora_layers import adapted_layers
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, build_student
from tests.kd_core.students.models import CPU, difference, their_model

TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Phi-3, whose folder joins q, k and v, and gate and up."""
    their_model("phi3").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _their_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


CASES: dict[str, dict[str, Any]] = {
    "queries alone": {"targets": ("q_proj",)},
    "keys and values, rank-stabilised": {"targets": ("k_proj", "v_proj"), "rank_stabilised": True},
    "other layers in each block": {
        "targets": ("layers.0.self_attn.*", "layers.1.self_attn.v_proj", "layers.2.mlp.up_proj")
    },
    "by the folder's names": {"targets": ("qkv_proj", "gate_up_proj"), "layers": (1, 2)},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_student_does(case: str, folder: Path, tmp_path: Path) -> None:
    start = LoraStart(Pretrained(str(folder)), rank=3, alpha=5.0, **CASES[case])
    ours, generator = build_student(start, CPU, seed=0).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(ours).values():
            layer.lora_B.normal_(0, 0.2, generator=generator)
    save_pretrained(ours, tmp_path / "export", folder)
    adapter = tmp_path / "export" / "adapter"
    assert difference(ours, peft.PeftModel.from_pretrained(_their_base(folder), adapter).eval()) < TOLERANCE
    assert difference(ours, _their_base(tmp_path / "export")) < TOLERANCE
    assert difference(ours, _their_base(folder)) > 0.1
    again = build_student(replace(start, adapter=str(adapter)), CPU, seed=1)
    for (name, one), other in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def _trained_by_peft(folder: Path, out: Path, **settings: Any) -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv_proj", "o_proj", "gate_up_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM", **settings,
    )  # fmt: skip
    theirs = peft.get_peft_model(_their_base(folder), config).eval()
    theirs.save_pretrained(out)
    return theirs


def test_an_adapter_of_joined_layers_is_read(folder: Path, tmp_path: Path) -> None:
    theirs = _trained_by_peft(folder, tmp_path / "adapter")
    targets = ("attention", "mlp_fc1")
    start = LoraStart(Pretrained(str(folder)), targets, rank=4, alpha=6.0, adapter=str(tmp_path / "adapter"))
    ours = build_student(start, CPU, seed=0).eval()
    assert difference(ours, theirs) < TOLERANCE
    assert difference(ours, _their_base(folder)) > 0.1
    # Exported again, each part has its own A.
    save_pretrained(ours, tmp_path / "export", folder)
    again = peft.PeftModel.from_pretrained(_their_base(folder), tmp_path / "export" / "adapter").eval()
    assert difference(ours, again) < TOLERANCE


def test_an_adapter_that_adapts_more_than_the_student_is_refused(folder: Path, tmp_path: Path) -> None:
    _trained_by_peft(folder, tmp_path / "adapter")
    targets = ("q_proj", "attention_dense", "mlp_fc1")
    start = LoraStart(Pretrained(str(folder)), targets, rank=4, alpha=6.0, adapter=str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match="qkv_proj.lora_B.weight also adapts outputs of layers without an adapter"):
        build_student(start, CPU, seed=0)
    _trained_by_peft(folder, tmp_path / "ranks", rank_pattern={"qkv_proj": 2})
    start = replace(start, targets=("attention", "mlp_fc1"), adapter=str(tmp_path / "ranks"))
    with pytest.raises(UsageError, match="rank_pattern is {'qkv_proj': 2}, which is not supported"):
        start.build_on_meta()


def test_a_joined_adapter_that_mixes_its_parts_is_refused(folder: Path, tmp_path: Path) -> None:
    start = LoraStart(Pretrained(str(folder)), ("attention_qkv",), rank=2, alpha=2.0)
    save_pretrained(build_student(start, CPU, seed=0), tmp_path / "export", folder)
    weights = tmp_path / "export" / "adapter" / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if "lora_B" in name)
    assert state[name].shape == (64, 6)
    state[name][0, 5] = 1.0
    save_file(state, weights)
    with pytest.raises(UsageError, match="also adapts outputs"):
        build_student(replace(start, adapter=str(weights.parent)), CPU, seed=0)
