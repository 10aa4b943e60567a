"""Layout of a transformers teacher over ranks: tensor and expert parallelism by the family's plans, and FSDP2.

transformers divides the body as it loads it, and each rank reads its own part. The lm_head keeps its rows divided over
the tensor-parallel ranks, where transformers' own plan would gather the logits.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from data.teacher.teacher_layout import TeacherParallel
from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.sharded_values import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TESTED = "5.23"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # in configurations


def _module_name(model: "PreTrainedModel", module: Any) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def check_plans(model: "PreTrainedModel", parallel: TeacherParallel, folder: Path) -> None:
    """Checks that the family's plans can divide a model, which is given on the meta device.

    Raises:
        UsageError: they cannot.
    """
    tensor, plans, lm_head = parallel.tensor_parallel, cast(Any, model), model.get_output_embeddings()
    missing = [("tensor_parallel", plans.tp_plan)] * (tensor > 1)
    missing += [("expert_parallel", plans.ep_plan)] * parallel.expert_parallel
    for setting, plan in missing:
        if not plan:
            raise UsageError(
                f"parallel.{setting}: transformers has no plan for {type(model).__name__} ({folder}). Leave it at its "
                "default, and set parallel.shard=full."
            )
    if tensor > 1 and not isinstance(lm_head, torch.nn.Linear):
        raise UsageError(
            f"parallel.tensor_parallel: the lm_head of {type(model).__name__} ({folder}) is no linear layer, so its "
            "rows cannot be divided. Set parallel.shard=full."
        )
    config: Any = model.config.get_text_config()
    experts = next((count for name in EXPERTS if isinstance(count := getattr(config, name, None), int)), 0)
    if parallel.expert_parallel and experts % tensor:
        fitting = ", ".join(str(n) for n in range(2, experts + 1) if experts % n == 0)
        raise UsageError(
            f"parallel.expert_parallel: {tensor} ranks (parallel.tensor_parallel) cannot hold the {experts} experts of "
            f"{folder} in equal parts. Take {fitting} ranks, or leave parallel.expert_parallel out."
        )


def loading_arguments(
    model: "PreTrainedModel", parallel: TeacherParallel, world: World, folder: Path
) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that lay a model out, which is given on the meta device.

    Raises:
        UsageError: this transformers or this family cannot.
    """
    if world.mesh is None:
        return {}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig  # noqa: PLC0415 (an extra)
    except ImportError:
        DistributedConfig = None
    if not {"fsdp_size", "ep_size"} <= set(getattr(DistributedConfig, "__dataclass_fields__", ())):
        raise UsageError(f"parallel: this transformers cannot lay a teacher out over ranks. Install {TESTED} or later.")
    assert DistributedConfig is not None
    check_plans(model, parallel, folder)
    layout, tensor, lm_head = world.layout, world.layout.tensor, model.get_output_embeddings()
    # Groups that score different windows are replicas for FSDP, which shares nothing between them.
    config = DistributedConfig(
        tp_size=tensor,
        tp_plan={_module_name(model, lm_head): "colwise"} if tensor > 1 else None,
        ep_size=tensor if parallel.expert_parallel else 1,
        fsdp_size=layout.shards,
        dp_replicate_size=layout.replicas,
        fsdp_plan=_fsdp_plan(model) if layout.data > 1 else None,
    )
    return {"distributed_config": config}


def _fsdp_plan(model: "PreTrainedModel") -> dict[str, str]:
    """Returns a plan that gathers each transformer block for itself, whatever the family's own plan names."""
    kinds = {*(getattr(model, "_no_split_modules", None) or ())}
    names = (name for name, module in model.named_modules() if type(module).__name__ in kinds)
    # Layers of a list have one rule: "transformer.h.0" becomes "transformer.h.*".
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight" for name in names}


def cannot_run(model: "PreTrainedModel", folder: Path, world: World, error: RuntimeError) -> Exception:
    """Returns the error of a first pass that failed: one that names the layout, where it does not divide the heads."""
    tensor, config = world.layout.tensor, cast(Any, model.config.get_text_config())
    heads = getattr(config, "num_attention_heads", 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % tensor == 0 and kv_heads % tensor == 0:
        return error
    return UsageError(
        f"parallel.tensor_parallel: got {tensor}, with which transformers cannot run {folder} ({error!s:.200}). Take "
        f"one that divides its {heads} attention heads and {kv_heads} heads for keys and values, or shard=full alone."
    )


def local_rows(weight: Tensor, vocab_size: int, world: World) -> Tensor:
    """Returns this rank's rows [V_r, …] of an lm_head's weight or bias, of real tokens alone.

    Every rank of the model calls it together.
    """
    whole = full_tensor(weight)
    size = math.ceil(len(whole) / world.layout.tensor)
    first = world.tp_rank * size
    rows = whole[first : min(first + size, vocab_size)]
    # A copy, so that the whole weight does not stay in memory.
    return rows if world.mesh is None else rows.clone()
