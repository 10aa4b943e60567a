"""Teachers through transformers (extra `hf`): any causal language model that it supports."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data.teacher.teacher_layout import ALONE, ScorerRanks, TeacherParallel
from data.teacher.transformers_layout import cannot_run, loading_arguments, local_rows
from data.teacher.vocab_slices import vocab_slice
from kd_core.errors import UsageError
from kd_core.logit_products import chunk_positions, multiply_, product_weight
from kd_core.parallel.world import World
from kd_core.students.transformers_student.startup_checks import refuse_later_tokens, typical_change
from kd_core.students.transformers_student.transformers_config import attention_of, meta_model, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("kd")
SINGLE = World()
# Largest relative move of logits where a later token changes. In bfloat16 it is a few roundings of 0.004.
LEAK = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class WideLmHead(torch.nn.Module):
    """An lm_head with float32 logits over this rank's real vocabulary, whatever the dtype of its factors."""

    def __init__(self, lm_head: torch.nn.Linear, vocab_size: int, world: World) -> None:
        super().__init__()
        self.weight = product_weight(local_rows(lm_head.weight, vocab_size, world))
        has_bias = lm_head.bias is not None  # pyright: ignore[reportUnnecessaryComparison] (None without one)
        # A parameter, because some families make the bias of a new lm_head that of their head too.
        bias = local_rows(lm_head.bias, vocab_size, world).float() if has_bias else None
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [..., D] to [..., V]."""
        rows = hidden.flatten(0, -2)
        logits = torch.empty(len(rows), len(self.weight), device=rows.device)
        # Not bfloat16 on a CPU: it would hold for float32 matmuls of other threads, such as those of RoPE angles.
        multiply_(rows, self.weight, logits, self.weight.dtype)
        if self.bias is not None:
            logits += self.bias
        return logits.view(*hidden.shape[:-1], -1)


class _HeadInput(NamedTuple):
    """Output of a base model as its head reads it. Everything but the hidden states is None."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None


class PassThrough(torch.nn.Module):
    """A base model that returns its input embeddings as the last hidden states."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **settings: Any) -> _HeadInput:
        del args, settings
        return _HeadInput(inputs_embeds)


def _head_alone(model: "PreTrainedModel", tokens: Tensor, whole: Tensor) -> "PreTrainedModel | None":
    """Returns the model without its body: what it makes of hidden states, with its scales and soft caps.

    The weights are shared. Returns None where body and head together do not give `whole`, the model's own logits of
    `tokens`.
    """
    try:
        body = model.base_model
        # Copy the module without its weights, and put another body into the copy. It is of the family's own class and
        # has no hooks: FSDP's would gather weights that the head does not read.
        is_fsdp = isinstance(model, FSDPModule)
        head: Any = object.__new__(type(model).__mro__[2] if is_fsdp else type(model))
        modules = {**model._modules, model.base_model_prefix: PassThrough()}  # pyright: ignore[reportPrivateUsage]
        hooks = {"_forward_pre_hooks": {}, "_forward_hooks": {}} if is_fsdp else {}
        head.__dict__.update(model.__dict__, _modules=modules, **hooks)
        with torch.no_grad():
            hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
            divided = head(inputs_embeds=hidden, use_cache=False).logits
    except Exception:  # families differ in what their heads read
        return None
    return head if body is not model and torch.equal(whole, divided) else None


def _divide(
    model: "PreTrainedModel", vocab_size: int, folder: Path, world: World = SINGLE, ranks: ScorerRanks = ALONE
) -> "PreTrainedModel | None":
    """Gives the model an lm_head with float32 logits, and returns its `_head_alone`. Logs what cannot be had.

    Raises:
        UsageError: the model cannot compute in this layout, or sees the tokens that it is to score.
    """
    lm_head: Any = model.get_output_embeddings()
    if isinstance(lm_head, torch.nn.Linear):
        model.set_output_embeddings(WideLmHead(lm_head, vocab_size, world))
    # Two rows whose last tokens differ, over all of the vocabulary: reserved tokens may be alike.  [2, 8]
    tokens = (torch.arange(8, device=model.device) * vocab_size // 8).repeat(2, 1)
    tokens[1, -1] = vocab_size // 3
    try:
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits
    except RuntimeError as error:  # plans divide attention heads whether or not their number is divided
        raise cannot_run(model, folder, world, error) from error
    # Ranks with a part of the vocabulary decide together.
    change = max(ranks.gather(typical_change(whole[1, :-1], whole[0, :-1])))
    refuse_later_tokens(model, folder, change, LEAK.get(model.dtype, LEAK[torch.bfloat16]))
    # Some families multiply by the weight of an lm_head without calling it.
    dtype = whole.dtype if isinstance(lm_head, torch.nn.Linear) else model.dtype
    if dtype != torch.float32:
        log.warning("%s: its lm_head is of another kind, so its logits are rounded to %s", folder, dtype)
    head = _head_alone(model, tokens, whole)
    if head is None:
        log.info("%s: body and head are computed together, so the logits of a whole batch exist at once", folder)
    return head


class HuggingFaceScorer(NamedTuple):
    """Any causal language model of transformers.

    `vocab_size` is the real vocabulary, the tokenizer's. An lm_head may be padded beyond it, and the padding takes no
    probability. `head` is the model without its body. Where it is None, the logits of a whole batch exist at once.
    """

    model: "PreTrainedModel"
    vocab_size: int
    head: "PreTrainedModel | None" = None
    ranks: ScorerRanks = ALONE

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        tokens: int | None = None,
        parallel: TeacherParallel | None = None,
        world: World = SINGLE,
    ) -> "HuggingFaceScorer":
        """Loads a model from safetensors alone: no pickle, and no code from the folder.

        Args:
            folder: a Hugging Face folder.
            dtype: of the weights.
            device: of this process.
            tokens: the real vocabulary, by default all rows of the lm_head.
            parallel: the layout, by default a whole copy on each rank.
            world: the ranks, which load together.

        Raises:
            UsageError: transformers has no such causal language model, weights are missing, or the layout does not fit.
        """
        config = read_config(folder)
        from transformers import AutoModelForCausalLM, utils  # noqa: PLC0415 (an extra)

        utils.logging.disable_progress_bar()  # each rank would draw one
        try:
            shapes = meta_model(config, folder)
            layout = loading_arguments(shapes, parallel or TeacherParallel(), world, folder)
            if (attention := attention_of(config, folder)) is not None:
                layout["attn_implementation"] = attention
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
                trust_remote_code=False, **layout,
            )  # fmt: skip
        except UsageError:
            raise
        except Exception as error:  # each model family raises errors of its own
            raise UsageError(
                f"{folder}: transformers cannot load it as a causal language model ({error!s:.400})."
            ) from None
        model, loading_info = loaded
        # transformers fills missing weights with random numbers and only warns.
        absent = sorted([*loading_info["missing_keys"], *loading_info["mismatched_keys"]], key=str)
        if absent:
            raise UsageError(
                f"{folder}: {len(absent)} weights are missing or of another shape, the first is {absent[0]}. "
                "Fetch the folder again."
            )
        model, vocab_size = model.to(device).eval(), int(config.vocab_size) if tokens is None else tokens
        ranks = ScorerRanks.of_world(world, vocab_slice(world, int(config.vocab_size)))
        head = _divide(model, vocab_size, folder, world, ranks)
        # Ranks divide their passes alike, or one would wait for another's collective.
        return cls(model, vocab_size, head if all(ranks.gather(head is not None)) else None, ranks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(self, tokens: Int[Tensor, "B T"], document_ids: Int[Tensor, "B T"]) -> Iterator[Tensor]:
        # Padding is on the right, where causal attention never looks, so no mask is needed.
        del document_ids
        if self.head is None:
            logits = self.model(input_ids=tokens, use_cache=False).logits
            for chunk in rearrange(logits, "B T V -> (B T) V").split(self._chunk_size):
                yield self._real(chunk).float().contiguous()
            return
        # Hidden states of all positions [N, D]. The head follows chunk by chunk, so that [N, V] never exists.
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        for chunk in rearrange(hidden, "B T D -> (B T) D").split(self._chunk_size):
            yield self._real(self.head(inputs_embeds=chunk[None], use_cache=False).logits[0])

    def _real(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Returns the logits of real tokens. A rank of padding alone has one column of no probability."""
        real = logits[:, : max(0, self.vocab_size - self.ranks.vocab.first)]
        return real if real.shape[1] else logits.new_full((len(logits), 1), -torch.inf)

    @property
    def _chunk_size(self) -> int:
        return chunk_positions(self.vocab_size, self.device)
