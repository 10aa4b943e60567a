"""Heads without their bodies: the logits that transformers itself makes of its body's hidden states."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from data.teacher.separate_head import SeparateHead
from kd_core.errors import UsageError
from tests.data.teacher.test_choose_scorer import HEADS

CPU, REAL = torch.device("cpu"), 250  # of 300 tokens


def _hidden_and_logits(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        return hidden, model(input_ids=tokens, use_cache=False).logits[0, :, :REAL]


@pytest.mark.parametrize("name", [name for name, (_, _, divides) in HEADS.items() if divides])
def test_a_head_alone_gives_the_whole_models_logits(tmp_path: Path, name: str) -> None:
    model = HEADS[name][0]()
    with torch.no_grad():
        for module in model.modules():  # a bias that is not zero
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
    model.save_pretrained(tmp_path)
    hidden, logits = _hidden_and_logits(model)
    head = SeparateHead.load(tmp_path, REAL, torch.float32, CPU)
    torch.testing.assert_close(head(hidden), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", ["tied", "tied, with a prefix", "own head in a tied folder"])
def test_a_head_is_found_where_it_is_stored(tmp_path: Path, stored: str) -> None:
    model = HEADS["plain"][0]()
    model.save_pretrained(tmp_path)
    hidden, logits = _hidden_and_logits(model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tmp_path / "model.safetensors")
    if stored != "own head in a tied folder":
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    if "prefix" in stored:
        weights = {f"language_model.{name}": value for name, value in weights.items()}
        # An extra layer for multi-token prediction has an embedding of its own.
        weights["language_model.model.layers.2.embed_tokens.weight"] = torch.zeros(300, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head = SeparateHead.load(tmp_path, REAL, torch.float32, CPU)
    torch.testing.assert_close(head(hidden), logits, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_head_has_float32_logits(tmp_path: Path) -> None:
    model = HEADS["plain"][0]()
    model.save_pretrained(tmp_path)
    hidden = torch.randn(9, 32).bfloat16().float()
    logits = SeparateHead.load(tmp_path, REAL, torch.bfloat16, CPU)(hidden)
    truth = hidden.double() @ model.lm_head.weight[:REAL].bfloat16().double().t()
    assert (logits - truth).abs().max() < 1e-5 < (truth.bfloat16() - truth).abs().median()


def test_a_quantised_head_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = HEADS["plain"][0]()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight").to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="no lm_head.weight of shape .* name that with scorer_url"):
        SeparateHead.load(tmp_path, REAL, torch.float32, CPU)


def test_a_config_without_bounds_gets_no_memory(tmp_path: Path) -> None:
    HEADS["plain"][0]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 30}))
    with pytest.raises(UsageError, match="config.json describes"):
        SeparateHead.load(tmp_path, REAL, torch.float32, CPU)
