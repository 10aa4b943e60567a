"""Conversion of a GGUF file of the Llama family to a Hugging Face folder: float32 weights, tokenizer, chat template.

Needs the extra `gguf`. In a GGUF, rows of query and key are interleaved for RoPE. Hugging Face's are half-split.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error, write_json
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.gguf_header import check_header

SPECIAL = 3  # GGUF's token type of control tokens
TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PRE_TOKENIZERS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
}


def _read_architecture(fields: dict[str, Any], tied: bool) -> Architecture:
    heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
    return Architecture(
        vocab_size=int(fields["llama.vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_layers=int(fields["llama.block_count"]),
        num_heads=heads,
        num_kv_heads=int(fields["llama.attention.head_count_kv"]),
        head_dim=hidden // heads,
        rope_theta=float(fields["llama.rope.freq_base"]),
        norm_eps=round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 10),
        tie_embeddings=tied,
        max_positions=int(fields["llama.context_length"]),
    )


def _build_tokenizer(fields: dict[str, Any], path: Path) -> Tokenizer:
    kind = fields.get("tokenizer.ggml.pre")
    if kind not in PRE_TOKENIZERS:
        raise UsageError(f"{path}: tokenizer {kind!r}; wanted one of {sorted(PRE_TOKENIZERS)}.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[kind])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if k == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos = (
        [tokens[int(fields[f"tokenizer.ggml.{which}_token_id"])]]
        if fields.get(f"tokenizer.ggml.add_{which}_token")
        else []
        for which in ("bos", "eos")
    )
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[*bos, "$A", *eos], special_tokens=[(token, tokens.index(token)) for token in {*bos, *eos}]
        )
    return tokenizer


def _hugging_face_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight"}[name]  # fmt: skip
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{TENSOR_NAMES[kind]}.weight"


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    # In each attention head, rows (x₀, y₀, x₁, y₁, …) become (x₀, x₁, …, y₀, y₁, …).  [H·d, D]
    return rearrange(rows, "(H d two) D -> (H two d) D", H=heads, two=2)


def convert_gguf(path: Path, folder: Path) -> Architecture:
    """Fills an existing folder with config, weights and tokenizer of the GGUF at `path`.

    Raises:
        UsageError: the architecture is not Llama, the tokenizer is not supported, or the file is damaged.
    """
    check_header(path)
    with damage_as_usage_error(path, "a GGUF file of the Llama family", "Fetch it again"):
        return _convert(path, folder)


def _convert(path: Path, folder: Path) -> Architecture:
    from gguf import GGUFReader, dequantize  # noqa: PLC0415 (an optional extra)

    reader = GGUFReader(path)
    # Sizes of tensors come from the header, and may not exceed the file's.
    if (claimed := sum(tensor.n_bytes for tensor in reader.tensors)) > path.stat().st_size:
        raise ValueError(f"tensors of {claimed} bytes, in a file of {path.stat().st_size}")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise UsageError(f"{path}: architecture {fields['general.architecture']!r}; wanted 'llama'.")
    arch = _read_architecture(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = _half_split(values, arch.num_heads if ".attn_q." in tensor.name else arch.num_kv_heads)
        weights[_hugging_face_name(tensor.name)] = torch.from_numpy(np.array(values, np.float32, order="C"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bos, eos = int(fields["tokenizer.ggml.bos_token_id"]), int(fields["tokenizer.ggml.eos_token_id"])
    write_json(folder / "config.json", config_fields(arch, bos, eos))
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    _build_tokenizer(fields, path).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "unk_token": tokens[int(fields["tokenizer.ggml.unknown_token_id"])],
        "pad_token": tokens[int(fields["tokenizer.ggml.padding_token_id"])],
        "chat_template": fields.get("tokenizer.chat_template"),
        "model_max_length": arch.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return arch
