"""The student: all that training, evaluation, sharding and checkpoints need of a model, whatever its family.

    tokens → embed → run_block of each layer → last_hidden → lm_head (inside the loss, which makes no N × V logits)

A family of its own is one subclass. It names its parameters as Hugging Face does, without the leading `model.`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.row_shares import PackedDocuments
from kd_core.sharded_values import local_values
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import base_parameters
from kd_core.types import LmHeadForm

R = TypeVar("R")
# How tensor parallelism divides a module. `columns` divides its outputs, `rows` its inputs, `kv_columns` its outputs
# where there are as many kv heads as ranks. `norm` works on the residual stream in front of columns, `residual_norm` on
# what is added to it, and `head_norm` on attention heads, of which `head_values` has a number each. `columns_norm` and
# `kv_columns_norm` work on outputs of `columns` and `normed_kv_columns` over all heads. `experts` divides stacked
# matrices, and `repeated` nothing.
ShardingRule = Literal[
    "embedding", "norm", "residual_norm", "columns", "kv_columns", "normed_kv_columns", "rows", "head_norm",
    "head_values", "columns_norm", "kv_columns_norm", "experts", "repeated", "lm_head",
]  # fmt: skip


class Block(Protocol):
    """One transformer block. `run` computes it, through `recompute` where that is set and gradients are needed."""

    recompute: Callable[..., Any] | None
    run: Callable[..., Any]


class Student(nn.Module):
    """A causal language model of transformer blocks, built on the meta device and filled later (`starts/`)."""

    arch: Architecture
    layers: nn.ModuleList
    lm_head: nn.Linear
    shares_rows = False  # a family whose attention takes `DividedDocuments` sets it, for context parallelism
    measures_blocks = True  # whether a budget of recomputation can be planned from the costs of blocks

    @property
    def lm_head_form(self) -> LmHeadForm:
        """The form of logits as a function of `last_hidden` and the lm_head's weight."""
        return LmHeadForm(vocab_size=self.arch.vocab_size, soft_cap=self.arch.logit_soft_cap)

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        """Returns the names of `auxiliary_values`, which a term `Auxiliary` of the objective may train."""
        return ()

    def sharding_rules(self) -> Mapping[str, ShardingRule]:
        """Returns the rule of each module that has parameters, by its name in the model or inside a block."""
        raise NotImplementedError

    @property
    def names_in_folder(self) -> str:
        """The prefix that names of parameters have in a Hugging Face folder, but that of the lm_head."""
        return "model."

    def stored_values(self) -> dict[str, Tensor]:
        """Returns what a folder holds of the student, by name: all parameters but those of adapters, tied ones once."""
        return {**base_parameters(self)}

    def save_itself(self, folder: Path, state: Callable[[], dict[str, Tensor]]) -> bool:
        """Writes weights and `config.json` by a library of its own. Returns False if the student has none."""
        del folder, state
        return False

    def check_start(self) -> None:
        """Finds out, by passes over a few tokens, what only the filled model tells. All ranks call it together."""

    def block_of(self, name: str) -> int | None:
        """Returns the number of the transformer block that a module or parameter is in, or None outside of blocks."""
        prefixes = {block: number for number, block in enumerate(self.layers)}
        module, parts = self, name.split(".")
        for part in parts:
            if module in prefixes:
                return prefixes[module]
            module = getattr(module, part)
        return None

    def select_kv_heads(self, heads: slice) -> None:
        """Makes attention use these kv heads alone, where a rank computes more of them than it needs."""
        raise NotImplementedError

    def tie(self) -> None:
        """Shares the embedding's weight with the lm_head where the architecture says so."""

    def embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Returns the input of the first block."""
        raise NotImplementedError

    def context(self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"] | None) -> Any:
        """Returns what every block of a pass needs beside its input. Without documents, a row is one document."""
        raise NotImplementedError

    def packed_context(
        self, position_ids: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"], documents: PackedDocuments | None
    ) -> Any:
        """Returns `context`. A family that needs lengths alone overrides it, because reading ids waits for a GPU."""
        del documents
        return self.context(position_ids, document_ids)

    def new_cache(self, slots: int) -> Any | None:
        """Returns an empty cache of keys and values for rows of up to `slots` positions, or None without such."""
        del slots

    def cached_context(self, position_ids: Int[Tensor, "B T"], cache: Any) -> Any:
        """Returns `context` of a pass over new tokens of rows of one document, whose earlier ones are in the cache."""
        raise NotImplementedError

    def collecting(self, context: Any) -> Any:
        """Returns the context of a pass in which blocks leave what `auxiliary_values` computes from."""
        return context

    def auxiliary_values(self, context: Any, is_text: Bool[Tensor, "B T"]) -> dict[str, Float[Tensor, "B T"]]:
        """Returns values by `auxiliary_names`, after the blocks of a pass. `is_text` is false on padding."""
        del context, is_text
        return {}

    def run_block(self, layer: int, x: Float[Tensor, "B T D"], context: Any) -> Float[Tensor, "B T D"]:
        """Returns the output of a block for the input `x`."""
        raise NotImplementedError

    def last_hidden(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Returns hidden states for the lm_head, from the output of the last block."""
        raise NotImplementedError

    @overload
    def forward(self, tokens: Tensor, position_ids: Tensor, document_ids: Tensor) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        head: Callable[[Tensor, Tensor], R],
        documents: PackedDocuments | None = None,
        cache: Any = None,
        auxiliary: Callable[[R, Mapping[str, Tensor]], R] | None = None,
    ) -> R: ...
    def forward(  # noqa: PLR0913 (a pass, and the functions that end it)
        self,
        tokens: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"],
        head: Callable[[Tensor, Tensor], R] | None = None,
        documents: PackedDocuments | None = None,
        cache: Any = None,
        auxiliary: Callable[[R, Mapping[str, Tensor]], R] | None = None,
    ) -> Tensor | R:
        """Returns logits [B, T, V], or with `head` the result of `head(hidden, weight)`.

        `hidden` is [B, T, D] and `weight` [vocab_rows, D]. Logits are those that `lm_head_form` makes of hidden ·
        weightᵀ over the first V rows. Hidden states include the architecture's scale of the logits already.

        With a `cache` (`new_cache`), rows are one document each, and go on behind the tokens of earlier passes.

        The loss enters here as `head` because sharded data parallelism needs every use of the parameters
        inside the root module's forward. `documents` are the lengths in `document_ids`, if the caller knows them.

        With `auxiliary`, the result is `auxiliary(result of head, values)`, with `auxiliary_values` by name.
        """
        if cache is None:
            context = self.packed_context(position_ids, document_ids, documents)
        else:
            context = self.cached_context(position_ids, cache)
        if auxiliary is not None:
            context = self.collecting(context)
        x = self.embed(tokens)
        for layer in range(len(self.layers)):
            x = self.run_block(layer, x, context)
        hidden, form = self.last_hidden(x), self.lm_head_form
        if head is not None:
            result = head(hidden, self.lm_head.weight)
            return result if auxiliary is None else auxiliary(result, self.auxiliary_values(context, document_ids >= 0))
        return form.to_logits(self.lm_head(hidden)[..., : form.vocab_size])


def allocate(model: Student, device: torch.device, dtype: torch.dtype = torch.float32) -> Student:
    """Allocates the student's parameters on `device`, in `dtype`, without filling them.

    Raises:
        UsageError: the machine has less memory than the parameters need.
    """
    # Bytes of this process's parts of the parameters.
    needed = sum(local_values(parameter).numel() for parameter in model.parameters()) * dtype.itemsize
    if device.type == "cpu" and needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise UsageError(f"the student needs {needed / 2**30:.1f} GiB of memory, and {memory / 2**30:.1f} are there.")
    # Cast the shapes first, so that no other dtype takes memory. `to_empty` gives tied parameters separate memory, so
    # they are tied again.
    is_cast = all(parameter.dtype == dtype for parameter in model.parameters())
    model = (model if is_cast else model.to(dtype)).to_empty(device=device)
    model.tie()
    return model
