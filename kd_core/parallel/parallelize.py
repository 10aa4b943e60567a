"""Parallelises a student, built on the meta device, over the ranks of a mesh by torch's own engine.

    tensor parallelism (tensor_parallel.py) → re-tie → compile each block → recompute outside of it → fully_shard

Norms, attention and residuals see plain tensors. Norms and residuals get the whole row or, under sequence
parallelism, this rank's positions of it. Attention gets this rank's heads. Parameters are DTensors on one mesh, so
gradient norms, moments and checkpoints are those of the whole student. Names of parameters do not change.
"""

import functools
from collections.abc import Mapping
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import Layout, ParameterFacts, RankHolding, holding_of_fullest_rank
from kd_core.parallel.recompute import BudgetedRecomputation, recompute_all
from kd_core.parallel.tensor_parallel import ExpertParallelStyle, TensorParallelStyle
from kd_core.parallel.world import World
from kd_core.precision import dtype_of
from kd_core.students.student import Block, ShardingRule, Student, allocate

WHOLE = Replicate()
# Placements of a linear layer's parameters: weight [out, in], bias [out], A [rank, in], B [out, rank]. COLUMNS divides
# `out`, ROWS divides `in` (arXiv 1909.08053), REPEATED nothing.
COLUMNS: Mapping[str, Placement] = {"weight": Shard(0), "bias": Shard(0), "lora_A": WHOLE, "lora_B": Shard(0)}
ROWS: Mapping[str, Placement] = {"weight": Shard(1), "bias": WHOLE, "lora_A": Shard(1), "lora_B": WHOLE}
REPEATED: Mapping[str, Placement] = dict.fromkeys(COLUMNS, WHOLE)
# Stacked matrices and biases of experts [E, …].
EXPERTS: Mapping[str, Placement] = dict.fromkeys(
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"), Shard(0)
)
RECOMPILE_LIMIT = 64


def tensor_styles(student: Student, tensor: int, sequence_parallel: bool) -> dict[str, TensorParallelStyle]:
    """Returns by module name how parameters, input and output are divided over `tensor` ranks."""
    # Residual stream [B, T, D]: whole on every rank, or divided by position under sequence parallelism
    # (arXiv 2205.05198). A norm works on its positions and gathers them for the matmuls behind it.
    residual: Placement = Shard(1) if sequence_parallel else WHOLE
    norm = TensorParallelStyle(REPEATED, input_placement=residual, output_placement=WHOLE, use_local_output=False)
    # One on what is added to the residual stream keeps its positions.
    residual_norm = TensorParallelStyle(REPEATED, input_placement=residual, output_placement=residual)
    # Into a block: each rank has [B, T, out/tensor]. Out of it: partial sums over `in` are added up to [B, T, D].
    columns = TensorParallelStyle(COLUMNS, input_placement=WHOLE, output_placement=Shard(-1))
    rows = TensorParallelStyle(ROWS, input_placement=Shard(-1), output_placement=residual)
    # With fewer kv heads than ranks, every rank computes all of them and selects its own. Each rank then has a
    # gradient of some heads only, so gradients are summed over ranks (Partial).
    divides_kv = student.arch.num_kv_heads % tensor == 0
    kv = columns if divides_kv else TensorParallelStyle(REPEATED, WHOLE, WHOLE, grad_placement=Partial())
    # A norm over all channels of queries or keys adds up the squares of all ranks. Behind repeated keys it is the norm
    # whose gradient is summed.
    columns_norm = TensorParallelStyle(COLUMNS, input_placement=Shard(-1), output_placement=Shard(-1))
    repeated_keys = TensorParallelStyle(REPEATED, WHOLE, WHOLE, use_local_output=False)
    # Norms of query and key work on [B, heads/tensor, T, head_dim].
    heads = TensorParallelStyle(REPEATED, input_placement=Shard(1), output_placement=Shard(1))
    styles: dict[ShardingRule, TensorParallelStyle] = {
        "embedding": TensorParallelStyle({"weight": Shard(0)}, input_placement=WHOLE, output_placement=residual),
        "norm": norm,
        "residual_norm": residual_norm,
        "columns": columns,
        "kv_columns": kv,
        "normed_kv_columns": columns if divides_kv else repeated_keys,
        "rows": rows,
        "head_norm": heads,
        "columns_norm": columns_norm,
        "kv_columns_norm": columns_norm if divides_kv else kv,
        "head_values": TensorParallelStyle({"weight": Shard(0)}, input_placement=None, output_placement=WHOLE),
        "repeated": TensorParallelStyle(REPEATED, input_placement=WHOLE, output_placement=WHOLE),
        "experts": ExpertParallelStyle(EXPERTS, input_placement=WHOLE, output_placement=residual),
        "lm_head": TensorParallelStyle({"weight": Shard(0)}, input_placement=WHOLE, output_placement=Shard(-1)),
    }
    # Names inside a block stand for every block that has such a module.
    modules = {name: name for name, _ in student.named_children()}
    for i, block in enumerate(student.layers):
        modules |= {f"layers.{i}.{name}": name for name, _ in block.named_modules()}
    rules = student.sharding_rules()
    return {path: styles[rules[name]] for path, name in modules.items() if name in rules}


def fullest_rank_holding(student: Student, layout: Layout, sequence_parallel: bool) -> RankHolding:
    """Returns what the fullest rank of a layout holds of a student, which may be on the meta device."""
    styles = tensor_styles(student, layout.tensor, sequence_parallel) if layout.tensor > 1 else {}

    def divided_dimension(name: str) -> int | None:
        module, _, parameter = name.rpartition(".")
        placement = styles[module].parameters[parameter] if styles else WHOLE
        return placement.dim if isinstance(placement, Shard) else None

    facts = [
        ParameterFacts(tuple(parameter.shape), divided_dimension(name), student.block_of(name), parameter.requires_grad)
        for name, parameter in student.named_parameters()
    ]
    return holding_of_fullest_rank(layout, facts)


def bytes_of_a_step(
    holding: RankHolding, layout: Layout, parallel: Parallel, passes: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Returns the bytes of gradients, and of weights gathered or rounded to `dtype` for matmuls, in a rank's step."""
    # More than one pass leaves whole gradients on a rank, unless each pass reduces them (`accumulate_gradients`).
    are_whole = passes > 1 and parallel.shard != "full"
    gradients = 4 * (holding.gathered_trained if are_whole else holding.trained)
    if layout.size == 1:
        # Autocast rounds copies.
        return gradients, 0 if dtype == torch.float32 else dtype.itemsize * holding.parameters
    # Under full sharding one block computes while the next one is gathered.
    blocks = (
        min(2 * holding.largest_block, holding.block_numbers) if parallel.shard == "full" else holding.block_numbers
    )
    return gradients, dtype.itemsize * blocks + 4 * holding.root_numbers


def _apply_tensor_parallel(student: Student, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    tensor, rank = mesh.size(), mesh.get_local_rank()
    parallelize_module(student, mesh, dict(tensor_styles(student, tensor, sequence_parallel)))
    # Distributing replaced the parameters, so a tied lm_head must be tied again.
    student.tie()
    # With fewer kv heads than ranks, rank r reads head ⌊r · kv_heads / tensor⌋ of the keys and values [B, H_kv, T, d].
    kv_heads = student.arch.num_kv_heads
    if kv_heads % tensor:
        head = rank * kv_heads // tensor
        student.select_kv_heads(slice(head, head + 1))


def _apply_sharding(student: Student, parallel: Parallel, world: World) -> None:
    assert world.mesh is not None
    # Hybrid sharding (arXiv 2304.11277) takes a mesh of two dimensions: copies, and shards of one copy.
    mesh = world.mesh["dp_replicate", "dp_shard"] if world.layout.replicas > 1 else world.mesh["dp_shard"]
    # Embedding, last norm and lm_head are gathered in float32. That is once a step, and the loss's gradient
    # needs the precision. Blocks are gathered in the precision of matmuls. All gradients are reduced in float32.
    float32_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    block_policy = MixedPrecisionPolicy(
        dtype_of(parallel.precision, world.device), torch.float32, cast_forward_inputs=False
    )
    for block in student.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.shard == "full", mp_policy=block_policy)
    fully_shard(student, mesh=mesh, reshard_after_forward=False, mp_policy=float32_policy)
    for module in student.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients without dividing: the step has divided by the scored tokens of all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _begin_generation(*_: object) -> None:
    """Makes a pass through all blocks one generation of their CUDA graphs' memory, as a forward hook.

    Otherwise each block's call without gradients would begin another one, and take the memory of its own input.
    """
    torch.compiler.cudagraph_mark_step_begin()


def _compile_blocks(student: Student, cuda_graphs: bool, world: World) -> None:
    """Compiles each block for itself, so that equal blocks share their graphs.

    Raises:
        UsageError: CUDA graphs are wanted where they cannot be.
    """
    if cuda_graphs and world.device.type != "cuda":
        raise UsageError(
            f"parallel.cuda_graphs: got a student on {world.device.type}; wanted one on a GPU. Set it false."
        )
    if cuda_graphs and world.mesh is not None:
        # A graph replays fixed addresses, and gathered weights lie at others in each pass.
        raise UsageError(f"parallel.cuda_graphs: got {world.size} processes; wanted one. Set it false.")
    # Graphs differ by gradients, row length, windows and rows of one document, and each has two variants: for the
    # first sizes, and for all others. Beyond the limit, which is 8 otherwise, torch runs blocks uncompiled.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # pyright: ignore[reportPrivateUsage]
    for block in student.layers:
        run = torch.compile(cast(Block, block).run, mode="reduce-overhead" if cuda_graphs else None)
        cast(Block, block).run = run
    if cuda_graphs:
        student.register_forward_pre_hook(_begin_generation)


def apply_recomputation(student: Student, parallel: Parallel, world: World) -> None:
    """Sets which activations blocks compute again in the backward pass."""
    every, share = parallel.recomputed_every(), parallel.recompute_budget()
    budget = BudgetedRecomputation(share or 1.0, student.layers, world)
    # The compiler has a budget of its own for the graphs of a block.
    if parallel.compile:
        from torch._functorch import config  # noqa: PLC0415 (imports the compiler)

        config.activation_memory_budget = share or 1.0
    for i, module in enumerate(student.layers):
        block = cast(Block, module)
        if share is not None:
            block.recompute = None if parallel.compile else functools.partial(budget.recompute, i)
        else:
            block.recompute = recompute_all if every is not None and i % every == 0 else None


def parallelize(student: Student, parallel: Parallel, world: World) -> Student:
    """Parallelises a student on the meta device, then allocates its memory without filling it.

    With one process parameters stay plain tensors. Compilation and recomputation apply all the same.
    """
    if world.mesh is not None and world.layout.tensor > 1:
        _apply_tensor_parallel(student, world.mesh["tp"], parallel.sequence_parallel)
    # Recomputation wraps the compiled function of a block, so that a compiled graph is one unit of it.
    apply_recomputation(student, parallel, world)
    if parallel.compile:
        _compile_blocks(student, parallel.cuda_graphs, world)
    if world.mesh is not None:
        _apply_sharding(student, parallel, world)
    return allocate(student, world.device)


def parallelize_frozen(model: Student, parallel: Parallel, world: World, dtype: torch.dtype) -> Student:
    """Parallelises a model on the meta device that is never trained, and allocates it in `dtype` without filling it.

    Ranks that share no weights with others have plain tensors.
    """
    # Cast the shapes first, so that FSDP's groups and the memory are of this dtype.
    model = model.to(dtype).requires_grad_(requires_grad=False)
    if world.mesh is not None and world.layout.tensor > 1:
        _apply_tensor_parallel(model, world.mesh["tp"], sequence_parallel=False)
    if world.mesh is not None and world.layout.shards > 1:
        _apply_sharding(model, parallel, world)
    return allocate(model, world.device, dtype)
