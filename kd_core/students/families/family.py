"""What a family states: its fields of `config.json`, its names of weights, and its transformer block.

    config.json ── flatten ─► fields that families share (`huggingface/config_json.py`) + read ─► Architecture
    tensors of the folder ── prefixes, ignored, joined ─► parameters of the student (`huggingface/weights.py`)
    Architecture, number of a layer ── block ─► module (`decoder/decoder.py`)

Exports go the other way, by `write` and `joined`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import MakeBlock
from kd_core.students.decoder.transformer_block import TransformerBlock

Config = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"


class Joined(NamedTuple):
    """A linear layer of the folder whose outputs are those of several layers of the student, one after the other.

    Names are those inside a block. Example: `self_attn.qkv_proj` of Phi-3, of `q_proj`, `k_proj` and `v_proj`.
    """

    stored: str
    parts: tuple[str, ...]


class Stacked(NamedTuple):
    """A parameter [E, rows, in] of experts, of which the folder has matrices of each expert, one below the other.

    Names are those inside a block, where `{}` stands for the expert.
    """

    parameter: str
    stored: tuple[str, ...]


class Rows(NamedTuple):
    """The rows of an expert's matrix that a tensor of the folder holds."""

    parameter: str
    expert: int
    part: int
    parts: int


def _unchanged(config: Config) -> Config:
    return config


@dataclass(frozen=True)
class Family:
    """A `model_type`: its fields of arithmetic, its defaults, its limits, its weights and its block.

    Args:
        transformers_class: the class in `architectures`.
        read: returns arguments of `Architecture` from a configuration, over those that all families share.
        write: returns fields of a configuration from an architecture, over those that all families share.
        head_dim: default size of an attention head. None: hidden size over attention heads.
        kv_heads: default number of key and value heads. None: that of attention heads.
        tie_embeddings: default of `tie_word_embeddings`.
        expects: fields that are supported with this one value only.
        flatten: returns a configuration in the form that all families share: that of the text model inside, and one
            setting of RoPE. It may have another `model_type`, whose family then reads it.
        block: builds the transformer block of a layer.
        joined: layers that are joined in the folder.
        stacked: parameters of experts that the folder has in parts.
        prefixes: beginnings of names in the folder that the student's names lack. The first is that of an export.
        ignored: beginnings of names of tensors that are no part of the text model.
        divided_by_heads: transformers loads no model whose hidden size the attention heads do not divide.
    """

    transformers_class: str
    read: Callable[[Config], dict[str, Any]]
    write: Callable[[Architecture], Config]
    head_dim: int | None = None
    kv_heads: int | None = None
    tie_embeddings: bool = False
    expects: tuple[tuple[str, Any], ...] = ()
    flatten: Callable[[Config], Config] = _unchanged
    block: MakeBlock = TransformerBlock
    joined: tuple[Joined, ...] = ()
    stacked: tuple[Stacked, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()
    divided_by_heads: bool = False

    def name_in_student(self, stored: str) -> str | None:
        """Returns the name of a tensor of the folder without its prefix, or None if it is not of the text model."""
        if stored.startswith(self.ignored):
            return None
        return stored.removeprefix(max(filter(stored.startswith, self.prefixes), key=len, default=""))

    def name_in_folder(self, name: str) -> str:
        """Returns the name in an export of a tensor that `name_in_student` names."""
        return name if name.startswith("lm_head.") else self.prefixes[0] + name

    def joined_name(self, name: str) -> str:
        """Returns the name of the tensor that holds a parameter of the student: its own, unless it is joined."""
        for joined in self.joined:
            for part in joined.parts:
                if f".{part}." in f"{name}.":
                    return name.replace(part, joined.stored)
        return name

    def names_of_parts(self, name: str) -> list[str]:
        """Returns the parameters whose rows a tensor holds, in order: one, unless it is joined."""
        for joined in self.joined:
            if f".{joined.stored}." in f"{name}.":
                return [name.replace(joined.stored, part) for part in joined.parts]
        return [name]

    def rows_of_experts(self, name: str, experts: int) -> dict[str, Rows]:
        """Returns the tensors of the folder that hold a parameter of so many experts, none if it is not in parts."""
        return {
            name.replace(stack.parameter, stored.format(expert)): Rows(name, expert, part, len(stack.stored))
            for stack in self.stacked
            if name.endswith(f".{stack.parameter}")
            for expert in range(experts)
            for part, stored in enumerate(stack.stored)
        }


def read_attention_bias(config: Config) -> dict[str, Any]:
    """Returns the biases of attention, which one field turns on."""
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias}


def read_expert_count(config: Config, default: int) -> int:
    """Returns the number of experts, a field of two names.

    Raises:
        UsageError: the two differ. Which of them transformers obeys depends on the family.
    """
    counts = {name: config[name] for name in ("num_experts", "num_local_experts") if name in config}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} is {count!a}" for name, count in counts.items())
        raise UsageError(f"{shown}; wanted one number of experts. Delete the field that is not that of the weights.")
    return int(next(iter(counts.values()), default))


def read_windows(kinds: list[str], window: Any) -> tuple[int | None, ...] | None:
    """Returns the window of each layer from the kinds of all, or None if no layer has one."""
    if window is None or SLIDING not in kinds:
        return None
    return tuple(int(window) if kind == SLIDING else None for kind in kinds)


def write_windows(arch: Architecture) -> tuple[list[str], int | None]:
    """Returns the kind of each layer, and the window of those that have one."""
    windows = [arch.window(layer) for layer in range(arch.num_layers)]
    size = max((window for window in windows if window is not None), default=None)
    return [FULL if window is None else SLIDING for window in windows], size


def with_default_theta(theta: float) -> Callable[[Config], Config]:
    """Returns a `flatten` that fills in a theta where a configuration has none."""
    return lambda config: {"rope_theta": theta, **config}


def split_ropes_by_kind(config: Config, full_theta: float, local_theta: float) -> Config:
    """Returns a configuration with RoPE of layers without a window where all families have it.

    The theta of layers with a window stands in `local_rope_theta`.

    Raises:
        UsageError: layers with a window have a scaling, or versions of transformers read a field in unlike ways.
    """
    by_kind, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not by_kind.keys() <= {FULL, SLIDING}:
        raise UsageError(f"rope_parameters is {by_kind}; wanted those of {FULL} and of {SLIDING}.")
    full, local = by_kind.get(FULL) or {}, by_kind.get(SLIDING) or {}
    if local.get("rope_type", local.get("type", "default")) != "default":
        raise UsageError(f"rope_parameters of {SLIDING} is {local!r}; only 'default' is supported.")
    # transformers 5 overlooks both fields, which its predecessors obey.
    if "type" in scaling and "rope_type" not in scaling:
        raise UsageError(
            "rope_scaling has a field 'type', which transformers 5 ignores here. Rename it to 'rope_type'."
        )
    full = {"rope_theta": config.get("rope_theta", full_theta), **full, **scaling}
    if not full.get("truncate", True):
        raise UsageError(
            f"truncate is {full['truncate']!r}, which transformers 5 ignores here. Only true is supported."
        )
    changes = {"rope_scaling": None, "rope_parameters": full, "original_max_position_embeddings": None}
    return {**config, **changes, "local_rope_theta": float(local.get("rope_theta", local_theta))}


def split_rotary_share(config: Config, default: float = 1.0) -> Config:
    """Returns a configuration whose share of rotated channels stands in `rotary_share`, apart from RoPE's fields."""
    config, share = {**config}, config.get("partial_rotary_factor")
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(name), dict):
            config[name] = {**config[name]}
            share = config[name].pop("partial_rotary_factor", share)
    return {**config, "partial_rotary_factor": None, "rotary_share": default if share is None else float(share)}


NO_BIAS = (("attention_bias", False), ("mlp_bias", False))
QKV = Joined("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
GATE_UP = Joined("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))
# Without it transformers takes a default, which may be no row of the embedding.
NO_PADDING: Config = {"pad_token_id": None}
