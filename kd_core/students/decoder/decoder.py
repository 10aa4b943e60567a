"""One decoder for all families of `families/`, which differ by their architecture and by their transformer block.

Parameter names are those of Hugging Face's Llama without the leading `model.`, so that weights need no map of names.
A decoder is built on the meta device, then allocated (`students/student.py`) and filled (`starts/`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.row_shares import WHOLE_ROWS, DividedDocuments, PackedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.experts import BALANCE, Z, router_values
from kd_core.students.decoder.kv_cache import KeyValueCache
from kd_core.students.decoder.norm import RMSNorm
from kd_core.students.decoder.rope import rotary_angles
from kd_core.students.decoder.transformer_block import TransformerBlock, scale
from kd_core.students.student import ShardingRule, Student

MakeBlock = Callable[[Architecture, int], nn.Module]  # of an architecture and the number of a layer


class Context(NamedTuple):
    """Cosine and sine for each layer, and the documents of packed rows or a cache of their earlier positions.

    `block_values` takes what blocks return beside hidden states, in a pass whose auxiliary values are asked for.
    """

    angles: list[tuple[Tensor, Tensor]]
    documents: PackedDocuments | KeyValueCache
    block_values: list[Tensor] | None = None


class Decoder(Student):
    """A decoder of one kind of transformer block: embedding, blocks, a last RMSNorm, lm_head."""

    shares_rows = True

    def __init__(self, arch: Architecture, make_block: MakeBlock = TransformerBlock) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_rows, arch.hidden_size)
        self.layers = nn.ModuleList(make_block(arch, layer) for layer in range(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps, arch.norm_offset)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_rows, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes lm_head share the embedding's weight if the architecture ties them. `to_empty` undoes it."""
        if self.arch.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def sharding_rules(self) -> Mapping[str, ShardingRule]:
        block = cast(TransformerBlock, self.layers[0])
        return {"embed_tokens": "embedding", "norm": "norm", "lm_head": "lm_head", **block.sharding_rules}

    def select_kv_heads(self, heads: slice) -> None:
        for block in self.layers:
            cast(TransformerBlock, block).self_attn.kv_head_slice = heads

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = scale(self.embed_tokens(tokens), self.arch.embedding_scale)
        if not self.arch.root_scaled_embedding:
            return x
        # Rounded to the dtype of the embedding, as Gemma was trained: 55.4256 is 55.5 in bfloat16.
        return x * torch.tensor(self.arch.hidden_size**0.5, dtype=x.dtype).item()

    def context(
        self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"] | PackedDocuments | None
    ) -> Context:
        # Layers of equal RoPE share their angles, and all layers their documents.  cos, sin [B, 1, T, d]
        arch = self.arch
        ropes = [arch.rope(layer) for layer in range(arch.num_layers)]
        by_rope = {
            rope: rotary_angles(position_ids, arch.rotary_dim, *rope, arch.rotary_pairs)
            for rope in dict.fromkeys(ropes)
        }
        angles = [by_rope[rope] for rope in ropes]
        if document_ids is None:
            return Context(angles, Documents.one_a_row(position_ids))
        return Context(angles, Documents.from_ids(document_ids) if isinstance(document_ids, Tensor) else document_ids)

    def packed_context(
        self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"], documents: PackedDocuments | None
    ) -> Context:
        return self.context(position_ids, document_ids if documents is None else documents)

    def new_cache(self, slots: int) -> KeyValueCache:
        return KeyValueCache(self.arch.num_layers, slots)

    def cached_context(self, position_ids: Int[Tensor, "B T"], cache: KeyValueCache) -> Context:
        cache.begin_pass(position_ids)
        return self.context(position_ids, None)._replace(documents=cache)

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        arch = self.arch
        return () if arch.experts is None or len(arch.dense_layers) == arch.num_layers else (BALANCE, Z)

    def auxiliary_values(self, context: Context, is_text: Bool[Tensor, "B T"]) -> dict[str, Float[Tensor, "B T"]]:
        assert self.arch.experts is not None
        share = context.documents.share if isinstance(context.documents, DividedDocuments) else WHOLE_ROWS
        return router_values(context.block_values or [], self.arch.experts.per_token, is_text, share)

    def collecting(self, context: Context) -> Context:
        return context._replace(block_values=[])

    def run_block(self, layer: int, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        documents = context.documents
        of_layer = documents.by_layer[layer] if isinstance(documents, KeyValueCache) else documents
        out = self.layers[layer](x, *context.angles[layer], of_layer)
        if isinstance(out, Tensor):
            return out
        if context.block_values is not None:
            context.block_values.append(out[1])
        return out[0]

    def last_hidden(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        # logit_scale · (hidden · weightᵀ) = (logit_scale · hidden) · weightᵀ.
        return scale(self.norm(x), self.arch.logit_scale)


def meta_decoder(arch: Architecture, make_block: MakeBlock = TransformerBlock) -> Decoder:
    """Returns a decoder on the meta device: names and shapes without memory.

    Raises:
        UsageError: the attention heads are no multiple of the key heads.
    """
    if arch.num_heads % arch.num_kv_heads:
        raise UsageError(f"{arch.num_heads} attention heads, {arch.num_kv_heads} of keys; wanted a multiple of them.")
    with torch.device("meta"):
        return Decoder(arch, make_block)
