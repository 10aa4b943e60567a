"""A start that trains only low-rank adapters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE_BELOW_1, check_settings
from kd_core.sharded_values import errors_on_all_ranks
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import LoraLinear, LoraSettings, adapted_layers
from kd_core.students.huggingface.peft_folder import check_adapter_matches, load_adapter
from kd_core.students.starts.name_patterns import match_names
from kd_core.students.starts.start import StudentInit, fill_random
from kd_core.students.student import Student

QKV, DENSE, FC1, FC2 = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
DENSE_ENDS = tuple(f".{name}" for name in FC1 + FC2)
# NeMo-Aligner's names, and those of folders that join layers.
ALIASES = {
    "qkv_proj": QKV,
    "gate_up_proj": FC1,
    "attention_qkv": QKV,
    "attention_dense": DENSE,
    "mlp_fc1": FC1,
    "mlp_fc2": FC2,
    "attention": QKV + DENSE,
    "mlp": FC1 + FC2,
    "all": QKV + DENSE + FC1 + FC2,
}


def uniform_as_peft(values: Tensor, generator: torch.Generator) -> Tensor:
    """Draws A as PEFT does: Kaiming's uniform distribution with a = √5 (arXiv 1502.01852), within ± 1/√in."""
    bound = 1 / math.sqrt(values.shape[1])
    return values.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class LoraStart:
    """The start `base`, frozen, with trained low-rank adapters beside linear layers of its blocks (LoRA).

    The method is that of arXiv 2106.09685.

    Args:
        base: the start of the frozen weights.
        targets: patterns on the names of linear layers (`q_proj`, `self_attn.*`, `layers.3.mlp.up_proj`), or
            `attention_qkv`, `attention_dense`, `mlp_fc1`, `mlp_fc2`, `attention`, `mlp`, `all`.
        rank: rows of A, columns of B.
        alpha: scales the product B A, by alpha / rank.
        dropout: share of the adapter's inputs that are zeroed in training.
        layers: transformer blocks that get adapters, counted from 0. None: all.
        rank_stabilised: scale by alpha / √rank instead (arXiv 2312.03732).
        adapter: a folder in PEFT's format with these very settings, as first values. None: A random, B zero.
    """

    base: StudentInit
    targets: tuple[str, ...] = ("attention_qkv",)
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    rank_stabilised: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_settings(
            self, "student.", rank=AT_LEAST_1, alpha=ABOVE_0, dropout=SHARE_BELOW_1, layers=AT_LEAST_0
        )  # fmt: skip

    @property
    def folder(self) -> str:
        return self.base.folder

    def architecture(self) -> Architecture:
        return self.base.architecture()

    def _adapted_names(self, model: Student) -> list[str]:
        count = model.arch.num_layers
        if self.layers is not None and not set(self.layers) <= set(range(count)):
            raise UsageError(f"student.layers: got {self.layers}; wanted some of 0 to {count - 1}.")
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and model.block_of(name) is not None
        ]
        is_mixture = model.arch.experts is not None and not any(name.endswith(DENSE_ENDS) for name in linears)
        if is_mixture and (dense := {"all", "mlp"} & set(self.targets)):
            raise UsageError(
                f"student.targets: got {min(dense)!r}, and every feed-forward of this student is a mixture of experts, "
                "which have no adapters; wanted `attention`, or patterns."
            )
        # A layer of that very name comes before what its name stands for.
        last_names = {name.rsplit(".", 1)[1] for name in linears}
        aliases = {name: patterns for name, patterns in ALIASES.items() if name not in last_names}
        patterns = [pattern for target in self.targets for pattern in aliases.get(target, (target,))]
        names = match_names(linears, patterns, f"student.targets (patterns, or {', '.join(ALIASES)})")
        if self.layers is not None:
            names = [name for name in names if model.block_of(name) in self.layers]
        if not names:
            raise UsageError(
                f"student.targets: {self.targets} in layers {self.layers} matches no layer, so there is nothing to "
                "adapt."
            )
        return names

    def build_on_meta(self) -> Student:
        """Returns the decoder of the base, frozen, with adapters.

        Raises:
            UsageError: a target matches nothing, a layer does not exist, or the adapter has other settings.
        """
        model = self.base.build_on_meta().requires_grad_(False)
        settings = LoraSettings(self.rank, self.alpha, self.dropout, self.rank_stabilised)
        for name in self._adapted_names(model):
            parent, last = name.rsplit(".", 1)
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), last, LoraLinear(linear, settings))
        if self.adapter is not None:
            check_adapter_matches(resolve_folder(self.adapter, "student.adapter"), model)
        return model

    def fill(self, model: Student, seed: int) -> None:
        """Fills the base, then adapters from their folder, or A at random by (seed, name) and B with zeros."""
        self.base.fill(model, seed)
        if self.adapter is not None:
            with errors_on_all_ranks(model.parameters()):
                load_adapter(model, resolve_folder(self.adapter, "student.adapter"))
            return
        for name, layer in adapted_layers(model).items():
            fill_random(layer.lora_A, f"{name}.lora_A", seed, uniform_as_peft)
            with torch.no_grad():
                layer.lora_B.zero_()
