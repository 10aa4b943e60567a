"""Conversion of Hugging Face's `config.json` to an `Architecture` and back: what all families of `families/` share.

Missing fields have the defaults of transformers. Unsupported fields that would change the arithmetic are errors.
"""

import logging
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_json
from kd_core.students.decoder.architecture import UPPER_BOUNDS, Architecture
from kd_core.students.decoder.rope import rotary_angles
from kd_core.students.families.family import FULL, SLIDING, Config, Family
from kd_core.students.families.registry import FAMILIES
from kd_core.students.huggingface.rope_config import read_rope, rope_fields

log = logging.getLogger("kd")
# A family may expect another value.
EXPECTED_IN_ALL = {
    "hidden_act": "silu", "quantization_config": None, "transformers_weights": None, "is_causal": True,
    "per_layer_config": None,
}  # fmt: skip


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Names the file in errors, also in one for a missing field."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except KeyError as error:
        raise UsageError(f"{path}: field {error} is missing.") from None


def _named_family(config: Config) -> Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UsageError(f"model_type is {name!r}; wanted one of {sorted(FAMILIES)}.")
    return FAMILIES[name]


def _check_supported(config: Config, family: Family) -> None:
    """Checks that no unsupported field would change the arithmetic."""
    for field, value in {**EXPECTED_IN_ALL, **dict(family.expects)}.items():
        if config.get(field, value) != value:
            model_type = config["model_type"]
            raise UsageError(f"{field} is {config[field]!r}; only {value!r} is supported for {model_type}.")
    layers = config.get("num_hidden_layers", 1)  # checked before anything is built per layer
    if type(layers) is not int or not 1 <= layers <= UPPER_BOUNDS["num_layers"]:
        raise UsageError(f"num_hidden_layers is {layers!a}; wanted 1 to {UPPER_BOUNDS['num_layers']}.")
    kinds = config.get("layer_types")
    if kinds is not None and (len(kinds) != config.get("num_hidden_layers") or not set(kinds) <= {SLIDING, FULL}):
        raise UsageError(f"layer_types is {kinds}; wanted {SLIDING} or {FULL} for each layer.")


def parse_architecture(path: Path, config: Config) -> Architecture:
    """Returns the architecture of a configuration. `path` names it in errors.

    Raises:
        UsageError: a field is missing, or the family or a setting is not supported.
    """
    with _naming(path):
        config = _named_family(config).flatten(config)
        family = _named_family(config)
        _check_supported(config, family)
        heads = int(config["num_attention_heads"])
        theta, scaling = read_rope(config)
        shared: Config = {
            "vocab_size": int(config["vocab_size"]),
            "hidden_size": int(config["hidden_size"]),
            "intermediate_size": int(config["intermediate_size"]),
            "num_layers": int(config["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": int(config.get("num_key_value_heads", family.kv_heads) or heads),
            "head_dim": int(config.get("head_dim") or family.head_dim or config["hidden_size"] // heads),
            "rope_theta": theta,
            "norm_eps": float(config["rms_norm_eps"]),
            "tie_embeddings": bool(config.get("tie_word_embeddings", family.tie_embeddings)),
            "max_positions": int(config["max_position_embeddings"]),
            "rope_scaling": scaling,
            "family": str(config["model_type"]),
        }
        return Architecture(**{**shared, **family.read(config)})


def read_architecture(folder: Path) -> Architecture:
    """Returns the architecture of a Hugging Face folder.

    Raises:
        UsageError: there is no `config.json`, a field is missing, or the family or a setting is not supported.
    """
    path, expected = folder / "config.json", "a Hugging Face model configuration"
    with damage_as_usage_error(path, expected, "Fetch the folder again"):
        arch = parse_architecture(path, read_json(path, expected))
        context, local = torch.zeros(1, 1, dtype=torch.int64), arch.local_rope_theta or arch.rope_theta
        angles = rotary_angles(context, arch.rotary_dim, arch.rope_theta, arch.rope_scaling)
        if not all(values.isfinite().all() for values in (*angles, *rotary_angles(context, arch.rotary_dim, local))):
            raise ValueError("angles of RoPE that are not finite")
        return arch


def _is_described_by(arch: Architecture, config: Config) -> bool:
    """Checks that reading the configuration gives the architecture back, as a family lacks settings of other ones."""
    read_back: dict[str, Any] = {**vars(parse_architecture(Path("config.json"), config))}
    # These settings have no field of their own: a file counts all rows, and Granite always states an attention scale.
    changes: dict[str, Any] = {"vocab_size": arch.vocab_rows, "padded_vocab_size": None}
    if arch.family == "granite" and arch.attention_scale is None:
        changes["attention_scale"] = read_back["attention_scale"]
    expected: dict[str, Any] = {**vars(arch), **changes}
    floats = [name for name, value in expected.items() if isinstance(value, float)]
    are_close = all(math.isclose(read_back.pop(name), expected.pop(name), rel_tol=1e-9) for name in floats)
    return are_close and read_back == expected


def config_fields(arch: Architecture, bos: int | None, eos: int | list[int] | None, dtype: str = "float32") -> Config:
    """Returns the `config.json` of an architecture, as transformers reads it. `dtype` is the type of its weights."""
    family = FAMILIES[arch.family]
    config = {
        "architectures": [family.transformers_class],
        "model_type": arch.family,
        "vocab_size": arch.vocab_rows,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "max_position_embeddings": arch.max_positions,
        "hidden_act": "silu",
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **rope_fields(arch.rope_theta, arch.rope_scaling),
        **family.write(arch),
    }
    assert _is_described_by(arch, config), f"{arch.family} does not have these settings: {arch}"
    return config


def warn_of_unloadable(arch: Architecture) -> None:
    """Warns where transformers does not load folders of an architecture, which train and evaluate here all the same."""
    sizes, family = (arch.hidden_size, arch.num_heads), FAMILIES.get(arch.family)
    if family is not None and family.divided_by_heads and (rest := sizes[0] % sizes[1]):
        log.warning(
            "hidden_size %d is no multiple of %d attention heads: transformers 5 does not load a %s of such sizes, so "
            "the student would be read by this project alone. Sizes that fit: %s or %d.", *sizes, arch.family,
            sizes[0] - rest or "none below", sizes[0] - rest + sizes[1],
        )  # fmt: skip
