"""A causal language model of transformers as a student: its own modules and names, our loss behind them.

    tokens, documents → one pass of the base model (`document_passes.py`) → hidden states → head (our loss)

The student shares the dictionaries of modules, parameters and buffers with the model. So names of parameters are the
model's own, and whatever replaces a module in one is seen by the other.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.experts import BALANCE, Z, router_values
from kd_core.students.student import ShardingRule, Student
from kd_core.students.transformers_student import startup_checks, stored_weights
from kd_core.students.transformers_student.document_passes import (
    DocumentMode,
    DocumentRows,
    document_masks,
    marks_documents,
)
from kd_core.types import LmHeadForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R = TypeVar("R")


@dataclass(frozen=True)
class TransformersSizes(Architecture):
    """Sizes of a model of transformers, and the length of documents up to which its RoPE has the same angles."""

    same_angles: int | None = None

    @property
    def longest_document(self) -> int | None:
        return self.same_angles


def _same_angles(config: Any) -> int | None:
    """Returns the length beyond which the angles of a whole batch change, so that losses depend on its other rows."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer = [rope, *(settings for settings in rope.values() if isinstance(settings, dict))]
    switching = [settings for settings in by_layer if settings.get("rope_type") in ("dynamic", "longrope")]
    name = "original_max_position_embeddings"
    return min((settings.get(name) or config.max_position_embeddings for settings in switching), default=None)


def read_sizes(config: Any) -> Architecture:
    """Returns the sizes of a model as far as its configuration names them. Its arithmetic stays with transformers."""

    def size(*names: str) -> int:
        values = [getattr(config, name, None) for name in names]
        return next((value for value in values if type(value) is int and value > 0), 1)

    heads = size("num_attention_heads", "n_head")
    return TransformersSizes(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size", "n_embd", "d_model"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=min(heads, size("num_key_value_heads")),
        head_dim=size("head_dim"),
        rope_theta=1.0,
        norm_eps=0.0,
        tie_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        max_positions=size("max_position_embeddings", "n_positions"),
        family=str(config.model_type),
        same_angles=_same_angles(config),
    )


@dataclass
class BlockRun:
    """The forward pass of one block of transformers, through `recompute` where that is set and gradients are needed."""

    block: nn.Module

    def __call__(self, *args: Any, **settings: Any) -> Any:
        block: Any = self.block
        if block.recompute and torch.is_grad_enabled():
            return block.recompute(block.run, *args, **settings)
        return block.run(*args, **settings)


def _as_block(block: nn.Module) -> nn.Module:
    """Gives a block of transformers the interface of a student's `Block`."""
    vars(block).update(recompute=None, run=block.forward, forward=BlockRun(block))
    return block


def find_base(model: "PreTrainedModel") -> nn.Module:
    """Returns the model without its output head, or the model itself if it has no such part."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if hasattr(child, "get_input_embeddings")), model)


def find_blocks(model: "PreTrainedModel", base: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks of a model: its first list of as many modules as it has layers.

    Raises:
        UsageError: there is no such list.
    """
    count = read_sizes(model.config).num_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({*module}) == count:
            return [*module]
    raise UsageError(
        f"student: {type(model).__name__} has no list of {count} transformer blocks, so it can be neither sharded nor "
        "recomputed. Take another family."
    )


class Inputs(NamedTuple):
    """Inputs of a pass of the base model, and whether its routers' logits come out."""

    tokens: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    with_routers: bool


def _has_routers(model: "PreTrainedModel") -> bool:
    """Checks whether any module is one whose logits transformers records. Dense sizes of a family have none."""
    recorders: list[Any] = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        recorders += recorded if isinstance(recorded, list) else [recorded]
    return any(
        isinstance(module, getattr(recorder, "target_class", recorder))
        and (getattr(recorder, "layer_name", None) or "") in name
        for name, module in model.named_modules()
        for recorder in recorders
    )


def experts_per_token(model: "PreTrainedModel") -> int | None:
    """Returns how many experts a router chooses, or None without routers whose recorded logits decide.

    Those with a correction of each expert, or with groups of experts (arXiv 2412.19437), choose by other numbers.
    """
    config = model.config
    is_corrected = any(hasattr(module, "e_score_correction_bias") for module in model.modules())
    has_groups = any((getattr(config, name, None) or 1) > 1 for name in ("n_group", "topk_group"))
    if is_corrected or has_groups or not _has_routers(model):
        return None
    values = (getattr(config, name, None) for name in ("num_experts_per_tok", "num_experts_per_token"))
    return next((value for value in values if type(value) is int and value > 0), None)


class TransformersStudent(Student):
    """A causal language model of transformers, in evaluation mode: dropout of its configuration is not used."""

    measures_blocks = False  # they take arguments by name

    def __init__(self, model: "PreTrainedModel", folder: str) -> None:
        super().__init__()
        head, base = cast(Any, model.get_output_embeddings()), find_base(model)
        if not isinstance(head, nn.Linear) or base is model:
            raise UsageError(
                f"{folder}: {type(model).__name__} has an output head of type {type(head).__name__}; wanted a linear "
                "layer behind a base model, of which the loss takes the weight. Take another family."
            )
        model.eval()
        shared = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
        vars(self).update({name: vars(model)[name] for name in shared})
        # Held as plain values, because `_modules` registers each module once already.
        layers = [_as_block(block) for block in find_blocks(model, base)]
        vars(self).update(theirs=model, layers=layers, lm_head=head, base=base)
        self.theirs: PreTrainedModel
        self.base: nn.Module
        self.folder, self.arch = folder, read_sizes(model.config)
        self.form, self.document_mode = LmHeadForm(), cast(DocumentMode, "rows")
        self.per_token = experts_per_token(model)
        # A tied parameter is under several names: those after the first, and the first.
        first_names: dict[Tensor, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        self.tied = {name: first_names[p] for name, p in named if first_names.setdefault(p, name) != name}

    @property
    def lm_head_form(self) -> LmHeadForm:
        bias = cast(Tensor | None, self.lm_head.bias)
        return replace(self.form, bias=bias, vocab_size=self.arch.vocab_size)

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        return () if self.per_token is None else (BALANCE, Z)

    @property
    def names_in_folder(self) -> str:
        return ""

    def sharding_rules(self) -> Mapping[str, ShardingRule]:
        raise UsageError(
            f"parallel.tensor_parallel: {type(self.theirs).__name__} is a student of transformers, which is not "
            "divided by tensors. Set parallel.tensor_parallel=1 and parallel.shard=full, or take a family of our own "
            "decoder (docs/students.md)."
        )

    def tie(self) -> None:
        for name, first in self.tied.items():
            module, _, parameter = name.rpartition(".")
            setattr(self.theirs.get_submodule(module), parameter, self.theirs.get_parameter(first))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: PLR0913 (those of `Student.forward`)
        self,
        tokens: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        document_ids: Int[Tensor, "B T"],
        head: Callable[[Tensor, Tensor], R] | None = None,
        documents: Documents | None = None,
        cache: Any = None,
        auxiliary: Callable[[R, Mapping[str, Tensor]], R] | None = None,
    ) -> Tensor | R:
        assert cache is None, "transformers' caches are not used"
        inputs = Inputs(tokens, position_ids, auxiliary is not None)
        hidden, *routers = self._pass_documents(inputs, document_ids, documents)
        if head is None:
            return startup_checks.logits_of(hidden, self.lm_head.weight, self.lm_head_form)
        result = head(hidden, self.lm_head.weight)
        if auxiliary is None:
            return result
        assert self.per_token is not None, "checked when the graph was built, by `auxiliary_names`"
        return auxiliary(result, router_values(routers, self.per_token, document_ids >= 0))

    def _pass_documents(
        self, inputs: "Inputs", document_ids: Tensor, documents: Documents | None
    ) -> list[Float[Tensor, "B T _"]]:
        """Returns hidden states, and routers' logits if they are asked for, where no document sees another one."""
        documents = Documents.from_ids(document_ids) if documents is None else documents
        tokens, position_ids, _ = inputs
        if documents.whole_rows:
            # A mask of ones: rows are one document each, whatever the positions are.
            return self._pass(inputs, torch.ones_like(tokens))
        if self.document_mode == "positions" and marks_documents(position_ids, document_ids):
            # Without a mask, transformers makes one for each kind of attention.
            return self._pass(inputs, None)
        if self.document_mode == "masks":
            like = torch.empty(*tokens.shape, 1, device=tokens.device)
            return self._pass(inputs, document_masks(self.theirs.config, documents, like))
        rows = DocumentRows.from_ids(documents, document_ids)
        gathered = inputs._replace(tokens=rows.gather(tokens), position_ids=rows.gather(position_ids))
        states = self._pass(gathered, torch.ones_like(gathered.tokens))
        return [rows.scatter(state, document_ids.shape) for state in states]

    def _pass(self, inputs: "Inputs", mask: Any) -> list[Float[Tensor, "B T _"]]:
        settings: dict[str, Any] = {"use_cache": False, "position_ids": inputs.position_ids, "attention_mask": mask}
        arguments = {name: value for name, value in settings.items() if name in self._arguments}
        if not inputs.with_routers:
            return [self.base(inputs.tokens, **arguments)[0]]
        outputs = self.base(inputs.tokens, **arguments, output_router_logits=True)
        # Some families flatten positions.  [B T, E] → [B, T, E]
        routers = [logits.reshape(*inputs.tokens.shape, -1) for logits in outputs.router_logits]
        return [outputs[0], *routers]

    @functools.cached_property
    def _arguments(self) -> frozenset[str]:
        return startup_checks.argument_names(type(self.base).forward)

    def load(self, folder: Path) -> None:
        """Fills parameters and buffers from a folder, in any layout.

        Raises:
            UsageError: as in `stored_weights.load_weights`.
        """
        stored_weights.fill_temporary_buffers(self.theirs, self)
        stored_weights.load_weights(self.theirs, self, self.tied, folder)

    def check_start(self) -> None:
        """Finds the form of the logits and how documents are kept apart, by passes over a few tokens.

        Raises:
            UsageError: no form gives the model's own logits, or the model is not causal.
        """
        self.form = startup_checks.find_head_form(self)
        startup_checks.check_causal(self)
        self.document_mode = startup_checks.find_document_mode(self)

    def stored_values(self) -> dict[str, Tensor]:
        return stored_weights.stored_values(self)

    def save_itself(self, folder: Path, state: Callable[[], dict[str, Tensor]]) -> bool:
        from transformers.utils import logging  # noqa: PLC0415 (an extra)

        logging.disable_progress_bar()
        self.theirs.save_pretrained(folder, state_dict=state(), max_shard_size="5GB")
        return True
