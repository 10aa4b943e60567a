"""GGUF to a Hugging Face folder: a small file made with the gguf package gives the model that it was made from."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data.tokenizer import Tokenizer as OurTokenizer
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.huggingface.gguf import TENSOR_NAMES, convert_gguf
from kd_core.students.starts.start import Pretrained, build_student
from tests.tiny import Tiny


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in GGUF's order, written out by hand: pair i of Hugging Face's halves stands at 2i, 2i + 1."""
    per_head = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(per_head // 2):
            rows += [weight[head * per_head + i], weight[head * per_head + per_head // 2 + i]]
    return np.stack(rows)


def _write_gguf(model: Decoder, tokenizer: Tokenizer, path: Path, *, adds_bos: bool = False) -> None:

    arch, writer = model.arch, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_vocab_size(arch.vocab_size)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<end>" else 1 for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    if adds_bos:
        writer.add_add_bos_token(True)
    state = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    writer.add_tensor("token_embd.weight", state["embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["norm.weight"])
    for layer in range(arch.num_layers):
        for theirs, ours in TENSOR_NAMES.items():
            values = state[f"layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                values = _interleaved(values, arch.num_heads if theirs == "attn_q" else arch.num_kv_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: Tokenizer) -> list[str]:
    import json  # noqa: PLC0415

    return [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def test_a_gguf_gives_the_model_and_the_tokenizer_that_it_was_made_from(tiny: Tiny, tmp_path: Path) -> None:
    model = build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0)
    _write_gguf(model, Tokenizer.from_file(str(tiny.teacher / "tokenizer.json")), tmp_path / "model.gguf")
    (tmp_path / "folder").mkdir()
    convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    back = build_student(Pretrained(str(tmp_path / "folder")), torch.device("cpu"), seed=0)
    assert back.arch == model.arch
    for (name, ours), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    text = "The old fox sees a river."
    assert OurTokenizer(tmp_path / "folder").encode([text]) == OurTokenizer(tiny.teacher).encode([text])
    assert OurTokenizer(tmp_path / "folder").around() == ([], [])


def test_the_bos_of_a_gguf_is_that_of_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = (
        build_student(Pretrained(str(tiny.teacher)), torch.device("cpu"), seed=0),
        tiny.teacher / "tokenizer.json",
    )
    _write_gguf(model, Tokenizer.from_file(str(tokenizer)), tmp_path / "model.gguf", adds_bos=True)
    (tmp_path / "folder").mkdir()
    convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    ids = AutoTokenizer.from_pretrained(tmp_path / "folder")("The old fox").input_ids
    assert ids == [0, *OurTokenizer(tiny.teacher).encode(["The old fox"])[0]]
    assert OurTokenizer(tmp_path / "folder").around() == ([0], [])
