"""A student, built on the meta device, spread over the ranks of a mesh by torch's own engine.

    tensor parallelism (styles.py) → re-tie → compile each block → recompute outside of it → fully_shard

Norms, attention and residuals see plain tensors: of the whole row, or of this rank's positions of it under sequence
parallelism; of this rank's heads. Parameters are DTensors on one mesh, so norms, moments and checkpoints are those of
the whole student. Names of parameters do not change.
"""

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import Holding, Layout, holding
from kd_core.parallel.tensor_parallel import Divided
from kd_core.parallel.world import World
from kd_core.precision import dtype_of
from kd_core.students.decoder.decoder import Block, Decoder, materialised

WHOLE = Replicate()
COLUMNS: Mapping[str, Placement] = {"weight": Shard(0), "bias": Shard(0), "lora_A": WHOLE, "lora_B": Shard(0)}
ROWS: Mapping[str, Placement] = {"weight": Shard(1), "bias": WHOLE, "lora_A": Shard(1), "lora_B": WHOLE}
REPEATED: Mapping[str, Placement] = dict.fromkeys(COLUMNS, WHOLE)


def tensor_styles(decoder: Decoder, tensor: int, sequence_parallel: bool) -> dict[str, Divided]:
    """By module: how its parameters, its input and its output are divided over `tensor` ranks."""
    residual: Placement = Shard(1) if sequence_parallel else WHOLE
    norm = Divided(REPEATED, given=residual, returned=WHOLE, plain=False)
    columns = Divided(COLUMNS, given=WHOLE, returned=Shard(-1))
    rows = Divided(ROWS, given=Shard(-1), returned=residual)
    # Where there are fewer kv heads than ranks, every rank computes all of them and takes its own.
    kv = columns if decoder.arch.num_kv_heads % tensor == 0 else Divided(REPEATED, WHOLE, WHOLE, gradient=Partial())
    heads = Divided(REPEATED, given=Shard(1), returned=Shard(1))
    styles = {
        "embed_tokens": Divided({"weight": Shard(0)}, given=WHOLE, returned=residual),
        "norm": norm,
        "lm_head": Divided({"weight": Shard(0)}, given=WHOLE, returned=Shard(-1)),
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn.q_proj": columns,
        "self_attn.k_proj": kv,
        "self_attn.v_proj": kv,
        "self_attn.q_norm": heads,
        "self_attn.k_norm": heads,
        "self_attn.o_proj": rows,
        "mlp.gate_proj": columns,
        "mlp.up_proj": columns,
        "mlp.down_proj": rows,
    }
    in_block = {name for name, _ in decoder.layers[0].named_modules()}
    return {
        (f"layers.{i}.{name}" if name in in_block else name): style
        for name, style in styles.items()
        for i in range(len(decoder.layers) if name in in_block else 1)
        if name in in_block or hasattr(decoder, name)
    }


def held(decoder: Decoder, layout: Layout, sequence_parallel: bool) -> Holding:
    """What the fullest rank of a layout holds of a decoder, which may be on the meta device."""
    styles = tensor_styles(decoder, layout.tensor, sequence_parallel)

    def divided(name: str) -> int | None:
        module, _, own = name.rpartition(".")
        placement = styles[module].parameters[own]
        return placement.dim if isinstance(placement, Shard) else None

    named = decoder.named_parameters()
    return holding(layout, [(tuple(p.shape), divided(name), p.requires_grad) for name, p in named])


def _share_tensors(decoder: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    tensor, rank = mesh.size(), mesh.get_local_rank()
    parallelize_module(decoder, mesh, dict(tensor_styles(decoder, tensor, sequence_parallel)))
    decoder.tie()
    kv_heads = decoder.arch.num_kv_heads
    if kv_heads % tensor:
        head = rank * kv_heads // tensor
        for block in decoder.layers:
            assert isinstance(block, Block)
            block.self_attn.own_kv_heads = slice(head, head + 1)


def _shard(decoder: Decoder, parallel: Parallel, world: World) -> None:
    assert world.mesh is not None
    mesh = world.mesh["dp_replicate", "dp_shard"] if world.layout.replicas > 1 else world.mesh["dp_shard"]
    # Embedding, last norm and head are gathered in float32: once a pass, and the loss's gradient needs it.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(dtype_of(parallel.precision, world.device), torch.float32, cast_forward_inputs=False)
    for block in decoder.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.shard == "full", mp_policy=rounded)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False, mp_policy=exact)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            # The step has divided by the tokens of all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def spread(decoder: Decoder, parallel: Parallel, world: World) -> Decoder:
    """Carry the plan out on a decoder without values, then give it memory; its first weights are still to be filled.

    With one process it stays plain; compilation and recomputation apply all the same.
    """
    if world.mesh is not None and world.layout.tensor > 1:
        _share_tensors(decoder, world.mesh["tp"], parallel.sequence_parallel)
    every = parallel.recomputed_every()
    for i, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        block.recompute = every is not None and i % every == 0
        if parallel.compile:
            block.run = torch.compile(block.run)
    if world.mesh is not None:
        _shard(decoder, parallel, world)
    return materialised(decoder, world.device)


def let_go(decoder: Decoder) -> None:
    """Back to the parts that each rank keeps, where passes without a backward have left weights gathered."""
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gradients_wait(decoder: Decoder, more_to_come: bool) -> None:
    """Whether the next backward pass keeps its gradients on the rank, for another follows before the step."""
    if isinstance(decoder, FSDPModule):
        decoder.set_requires_gradient_sync(not more_to_come)
