"""Conversion of RoPE's fields of a `config.json` to a theta and a scaling, and back.

Older files have `rope_theta` and `rope_scaling`. Files of transformers 5 have `rope_parameters` with both.
"""

import math
from typing import Any

from kd_core.errors import UsageError
from kd_core.students.decoder.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling

DEFAULT_THETA = 10_000.0
KINDS = ("default", "linear", "llama3", "yarn", "longrope")
UNSUPPORTED_KINDS = {
    "dynamic": "its frequencies depend on the longest row seen, so a position would have no fixed angle",
}
KNOWN_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip


def _fields(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the kind of scaling and its fields, theta included, from either form."""
    stored = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stored, dict) or any(isinstance(value, dict) for value in stored.values()):
        raise UsageError(f"rope_parameters is {stored!r}; only one setting for all layers is supported.")
    fields: dict[str, Any] = {**stored}
    older = fields.pop("type", None)
    kind = str(fields.pop("rope_type", older) or "default")
    if kind not in KINDS:
        why = f" ({UNSUPPORTED_KINDS[kind]})" if kind in UNSUPPORTED_KINDS else ""
        raise UsageError(f"rope_type is {kind!r}{why}; only {', '.join(KINDS)} are supported.")
    fields.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if not isinstance(fields["rope_theta"], int | float):
        raise UsageError(f"rope_theta is {fields['rope_theta']!r}; wanted a number.")
    share = fields.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share not in (None, 1, 1.0):
        raise UsageError(f"partial_rotary_factor is {share}; only 1.0 is supported.")
    unknown = sorted(set(fields) - KNOWN_FIELDS[kind] - {"rope_theta"})
    # Files of unscaled models often carry fields of other kinds. With `default` these have no effect.
    if unknown and kind != "default":
        raise UsageError(f"rope_type {kind!r} has {unknown[0]!r}, which is not supported.")
    return kind, fields


def _yarn_amplitude(fields: dict[str, Any], factor: float) -> float:
    # √(1/t) = 0.1 · mscale · ln(factor) + 1 (YaRN), or the quotient of two of them (DeepSeek).
    def amplitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return amplitude(fields["mscale"]) / amplitude(fields["mscale_all_dim"])
    return amplitude(1.0)


def longrope_amplitude(factor: float, original: int) -> float:
    """Returns LongRoPE's default amplitude for a context that is `factor` times the original one."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _read_longrope(fields: dict[str, Any], factor: float, original: int) -> LongRopeScaling:
    amplitude = fields.get("attention_factor")
    short, long = (tuple(float(number) for number in fields[name]) for name in ("short_factor", "long_factor"))
    return LongRopeScaling(
        short, long, original, longrope_amplitude(factor, original) if amplitude is None else float(amplitude)
    )


def read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling of a configuration.

    Raises:
        UsageError: a kind of scaling, or a field of one, is not supported.
        KeyError: a field that the kind needs is missing.
    """
    kind, fields = _fields(config)
    theta = float(fields["rope_theta"])
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(float(fields["factor"]))
    stretched = int(config["max_position_embeddings"])
    # Some older files have this field at the top level. It takes precedence there, as in transformers.
    top_level = config.get("original_max_position_embeddings")
    original = int(top_level or fields.get("original_max_position_embeddings") or stretched)
    if kind == "llama3":
        low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
        if high < low:
            raise UsageError(f"high_freq_factor is {high}; wanted at least the low_freq_factor {low}.")
        return theta, Llama3Scaling(float(fields["factor"]), low, high, original)
    factor = float(fields["factor"] if fields.get("factor") is not None else stretched / original)
    if kind == "longrope":
        return theta, _read_longrope(fields, factor, original)
    scaling = YarnScaling(
        factor,
        original,
        _yarn_amplitude(fields, factor),
        float(fields.get("beta_fast") or 32),
        float(fields.get("beta_slow") or 1),
        bool(fields.get("truncate", True)),
    )
    return theta, scaling


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, LongRopeScaling):
        factors = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        context = {"original_max_position_embeddings": scaling.original_positions}
        return {"rope_type": "longrope", **factors, **context, "attention_factor": scaling.amplitude}
    original = {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_positions}
    if isinstance(scaling, Llama3Scaling):
        bounds = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        return {"rope_type": "llama3", **original, **bounds}
    turns = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.whole_pairs}
    return {"rope_type": "yarn", **original, **turns, "attention_factor": scaling.amplitude}


def rope_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns the fields in the older form, which every version of transformers reads."""
    return {"rope_theta": theta, "rope_scaling": None if scaling is None else _scaling_fields(scaling)}
