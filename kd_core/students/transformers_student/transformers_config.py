"""transformers' configuration of a causal language model, read from a folder that somebody else may have written."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, read_json
from kd_core.hub import NO_EXTRA
from kd_core.memory import bounded_memory
from kd_core.students.decoder.architecture import UPPER_BOUNDS
from kd_core.students.huggingface.weights import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Language models of vision-language families that have no class of their own, and the family with their arithmetic.
PLAIN_FAMILIES = {
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
}  # fmt: skip
MODEL_CONFIG = "a Hugging Face model configuration"
LAYERS, EXPERTS = re.compile("^(?!max_window_).*layers?$|blocks?$|stages?$"), re.compile("experts?$")
MOST_PARTS, MOST_NUMBER, MOST_MEMORY = 1 << 20, 1 << 40, 4 << 30


def read_config(folder: Path) -> "PretrainedConfig":
    """Reads transformers' configuration of the language model in `folder`.

    Of a multimodal model it is the configuration of the text model.

    Raises:
        UsageError: transformers is not installed, or cannot read the configuration.
    """
    try:
        from transformers import AutoConfig  # noqa: PLC0415 (an extra)
    except ImportError:
        raise UsageError(f"{folder}: a model of transformers {NO_EXTRA}") from None
    _check_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        if not 1 <= int(config.vocab_size) <= UPPER_BOUNDS["vocab_size"]:
            raise ValueError(f"a vocabulary of {config.vocab_size}")
        for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
            if getattr(config, name, causal) is (not causal):
                raise ValueError(f"{name} is {not causal}, so it is no causal language model")
    except Exception as error:  # each model family raises errors of its own
        raise UsageError(f"{folder}: transformers cannot read its config.json ({error!s:.400}).") from None
    return config


def _check_config(folder: Path) -> None:
    """Refuses a `config.json` that needs code or weights from elsewhere, or describes a model without bounds.

    Raises:
        UsageError: it names code of the hub, an adapter lies beside it, or it describes too many layers and experts.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder}: holds adapter_config.json, whose base is elsewhere. Wanted a merged model.")
    with damage_as_usage_error(path, MODEL_CONFIG, "Fetch the folder again"):
        parts = _count_parts(read_json(path, MODEL_CONFIG))
    if parts > MOST_PARTS:
        raise UsageError(f"{path}: describes {parts} layers and experts; wanted {MOST_PARTS} at most.")


def _count_parts(config: dict[str, Any]) -> int:
    """Estimates how many modules a configuration describes: layers times experts, summed over nested models.

    Raises:
        ValueError: a field names code of the hub, or is a number beyond `MOST_NUMBER`.
    """
    nested, layers, experts = 0, 1, 1
    for name, value in config.items():
        if "implementation" in name and isinstance(value, str) and "/" in value:
            raise ValueError(f"{name} is {value!a:.80}, which would be fetched and run")
        if isinstance(value, dict):
            nested += _count_parts(cast(dict[str, Any], value))
        elif type(value) is int and abs(value) > MOST_NUMBER:
            raise ValueError(f"{name} is {value!a:.80}")
        elif type(value) is int and LAYERS.search(name):
            layers = max(layers, value)
        elif type(value) is int and EXPERTS.search(name):
            experts = max(experts, value)
    return nested + layers * experts


def meta_model(config: "PretrainedConfig", folder: Path) -> "PreTrainedModel":
    """Returns a model on the meta device, whose weights may all be in its folder, before memory is allocated for it.

    A stored weight has at least 4 bits, so n bytes of safetensors hold at most 2·n weights.

    Raises:
        UsageError: the configuration describes more, or no causal language model.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (an extra)

    try:
        with torch.device("meta"), bounded_memory(MOST_MEMORY):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each model family raises errors of its own
        raise UsageError(
            f"{folder}: transformers cannot load it as a causal language model ({error!s:.400})."
        ) from None
    stored = 2 * sum(path.stat().st_size for path in weight_files(folder))
    needed = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if needed > stored or buffers > stored + MOST_MEMORY:
        raise UsageError(
            f"{folder}: config.json describes {needed} weights (and {buffers} bytes of buffers), but the safetensors "
            f"files hold at most {stored}. Fetch the folder again."
        )
    return model


def attention_of(config: "PretrainedConfig", folder: Path, chosen: str | None = None) -> str | None:
    """Returns transformers' name of the attention that a model takes, or None for transformers' own choice.

    `sdpa` has no soft cap of attention scores. transformers 5.20 and its predecessors choose it for Gemma 2 all the
    same, and leave the cap out.

    Raises:
        UsageError: `sdpa` is chosen for a model with such a cap.
    """
    soft_cap = getattr(config, "attn_logit_softcapping", None)
    if soft_cap is not None and chosen == "sdpa":
        raise UsageError(
            f"{folder}: student.attention=sdpa would leave out its soft cap of attention scores "
            f"({soft_cap:g}). Set student.attention=eager."
        )
    return "eager" if soft_cap is not None and chosen is None else chosen


def is_composite(folder: Path) -> bool:
    """Checks whether a folder's configuration holds that of a language model among others, such as one of images."""
    config = read_json(folder / "config.json", MODEL_CONFIG)
    nested = [name for name, value in config.items() if isinstance(value, dict) and name.endswith("_config")]
    return any(name == "vision_config" or "model_type" in config[name] for name in nested)


def student_config(folder: Path, attention: str | None) -> "PretrainedConfig":
    """Returns the configuration of a student, whose weights are not quantised.

    Args:
        folder: a Hugging Face folder.
        attention: transformers' name of an implementation. None: its choice.

    Raises:
        UsageError: as in `read_config` and `attention_of`, or the weights are quantised.
    """
    config: Any = read_config(folder)
    whole = read_json(folder / "config.json", MODEL_CONFIG)
    if (whole.get("quantization_config") or getattr(config, "quantization_config", None)) is not None:
        raise UsageError(
            f"{folder}: its weights are quantised (quantization_config in config.json), and a student trains whole "
            "numbers of 16 bits or more. Take a folder of its weights in bfloat16."
        )
    if is_composite(folder):
        tied = getattr(config, "tie_word_embeddings", False)
        config.tie_word_embeddings = bool(whole.get("tie_word_embeddings", tied))
    if (plain := PLAIN_FAMILIES.get(config.model_type)) is not None:
        config = _as_family(plain, config)
    config.dtype = torch.float32  # of its parameters, and not of buffers that a family rounds by itself
    if (attention := attention_of(config, folder, attention)) is not None:
        config._attn_implementation = attention
    return config


def _as_family(model_type: str, config: Any) -> Any:
    """Returns the same sizes as a configuration of another family, without sections of positions in images."""
    from transformers import AutoConfig  # noqa: PLC0415 (an extra)

    fields = {**config.to_dict(), "tie_word_embeddings": config.tie_word_embeddings}
    rope = {key: value for key, value in (fields.pop("rope_parameters", None) or {}).items() if "mrope" not in key}
    for name in ("model_type", "architectures"):
        fields.pop(name, None)
    return AutoConfig.for_model(model_type, **fields, rope_parameters=rope)
