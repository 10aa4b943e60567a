"""Each family against transformers on random weights: read, computed, packed, written and read back by them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kd_core.errors import UsageError
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.huggingface.config_json import (
    config_fields,
    parse_architecture,
    read_architecture,
    warn_of_unloadable,
)
from kd_core.students.huggingface.save import save_pretrained
from tests.kd_core.students.models import FAMILIES, MODELS, YARN, difference, load, rows, their_model

TOLERANCE = 3e-5
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MODELS.values()])
def test_logits_equal_those_of_transformers_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert difference(ours, theirs) < TOLERANCE
    save_pretrained(ours, tmp_path / "ours", tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert difference(ours, again) < TOLERANCE
    assert read_architecture(tmp_path / "ours") == ours.arch


@pytest.mark.parametrize("name", ["llama 3", "mistral", "qwen3, layer types", "gemma2", "gemma3"])
def test_a_packed_row_gives_what_its_documents_give_alone(name: str, tmp_path: Path) -> None:
    """Also documents longer than the window, beside shorter ones, and rows that are cut differently."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens, _, _ = rows(B=2, T=40)
    cuts = [[1, 9, 30], [22, 18]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in cut]) for cut in cuts])
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(cut)]) for cut in cuts])
    with torch.no_grad():
        packed = ours(tokens, positions, documents)
        alone = torch.stack(
            [
                torch.cat([theirs(part[None]).logits[0] for part in row.split(cut)])
                for row, cut in zip(tokens, cuts, strict=True)
            ]
        )
    assert (packed - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama 3", "llama, yarn", "llama, linear"])
def test_the_older_form_of_rope_fields_means_the_same(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    arch, path = read_architecture(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    fields = config.pop("rope_parameters")
    config["rope_theta"] = fields.pop("rope_theta")
    config["rope_scaling"] = {**fields, "type": fields["rope_type"]}
    path.write_text(json.dumps(config))
    assert read_architecture(tmp_path) == arch
    assert arch.rope_scaling is not None


def test_scaling_matters_on_these_rows(tmp_path: Path) -> None:
    """Else parity would say nothing."""
    for name in ("llama, linear", "llama, yarn", "llama 3"):
        theirs = their_model(name)
        theirs.save_pretrained(tmp_path / name)
        ours = load(tmp_path / name)
        object.__setattr__(ours.arch, "rope_scaling", None)
        assert difference(ours, theirs) > 0.1, name


def test_what_a_file_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    """Mistral without `sliding_window` has one of 4,096; Qwen3 without `head_dim` one of 128."""
    for name, field, attribute in (
        ("mistral", "sliding_window", "windows"),
        ("mistral", "num_key_value_heads", "num_kv_heads"),
        ("qwen3", "head_dim", "head_dim"),
        ("qwen2", "num_key_value_heads", "num_kv_heads"),
    ):
        theirs = their_model(name)
        config = theirs.config.to_dict()
        del config[field]
        (tmp_path / "config.json").write_text(json.dumps(config))
        default = getattr(transformers.AutoConfig.from_pretrained(tmp_path), field)
        found = getattr(read_architecture(tmp_path), attribute)
        assert found == (default if field != "sliding_window" else (default,) * 3), (name, field)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' .its frequencies depend"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'short_factor' is missing"),
        (
            "phi3, longrope",
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
            r"got \[4\] factors; wanted 3",
        ),
        ("phi3, longrope", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "rotary_share: got 1.5"),
        ("glm4", {"partial_rotary_factor": 0.2, "rope_parameters": None}, "got 16, of which RoPE rotates 3 channels"),
        ("smollm3", {"no_rope_layers": [1]}, "IndexError"),
        (
            "olmo3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            "rope_parameters of sliding_attention",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "odd": 1}}, "'odd'"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one setting for all layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "per_layer_config is"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
        ("llama", {"rope_parameters": {}, "rope_theta": 0}, "not finite"),
        ("llama 3", {"rope_parameters": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor is 0.5"),
        # transformers 5 reads these unlike its predecessors, or unlike their names.
        ("smollm3, windows, biases", {"use_sliding_window": False}, "use_sliding_window or sliding_window is not set"),
        ("gemma2", {"layer_types": None, "sliding_window_pattern": 3}, "sliding_window_pattern is 3"),
        ("gemma3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "a field 'type'"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            "sliding_attention is",
        ),
        ("olmo3", {"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, "truncate is False"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta is 10000.0, which transformers 5"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {**their_model(name).config.to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        read_architecture(tmp_path)


def test_sharded_files_and_bfloat16_weights(tmp_path: Path) -> None:
    theirs = their_model("qwen2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = load(tmp_path / "theirs")
    assert ours.norm.weight.dtype == torch.float32
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    assert difference(ours, wide) < TOLERANCE
    save_pretrained(ours, tmp_path / "ours", tmp_path / "theirs", dtype="bfloat16", max_file_bytes=10_000)
    files = list((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 12_000
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert again.dtype == torch.bfloat16
    for (name, one), other in zip(again.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(one.float(), other), name


def test_the_norm_rounds_where_transformers_rounds() -> None:
    """Bit for bit in both types; the rotation of queries and keys is float32 here, and rounded more often there."""
    ours, theirs = RMSNorm(64, 1e-5), LlamaRMSNorm(64, 1e-5)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5)
        ours.weight.copy_(theirs.weight)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)) * 3
    for dtype in (torch.float32, torch.bfloat16):
        one, other = ours.to(dtype)(x.to(dtype)), theirs.to(dtype)(x.to(dtype))
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other) if dtype == torch.bfloat16 else torch.allclose(one, other, rtol=1e-6)


def test_a_window_costs_no_square_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call sees at most the queries of a chunk, and as many keys as their windows reach."""
    their_model("mistral").save_pretrained(tmp_path)
    ours, seen = load(tmp_path), []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return real(q, k, *rest, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        ours(*rows(T=40))
    assert max(queries for queries, _ in seen) == 7
    assert max(keys for _, keys in seen) == 13


@pytest.mark.parametrize("name", MODELS.values())
def test_sizes_that_transformers_does_not_load_are_warned_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A hidden size of 36 beside 8 heads: their configuration of the family takes it, or there is a warning."""
    config = their_model(name).config
    arch = parse_architecture(Path("config.json"), config.to_dict())
    narrow = replace(arch, hidden_size=36, num_heads=8, num_kv_heads=2, head_dim=8)
    warn_of_unloadable(replace(narrow, hidden_size=40))
    assert not caplog.records
    warn_of_unloadable(narrow)
    refusal = ""
    try:
        type(config)(**config_fields(narrow, 1, 2))
    except Exception as error:
        refusal = str(error.__cause__)
    is_warned_of = "Sizes that fit: 32 or 40." in caplog.text
    assert is_warned_of == ("is not a multiple of the number of attention heads" in refusal), refusal
    assert is_warned_of == bool(refusal)
