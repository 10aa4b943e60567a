"""Recomputation of activations within a budget of memory, by torch's selective checkpointing.

    first pass: a block of each kind is measured → cost and bytes of each product → which outputs each block keeps

A block that recomputes everything keeps its input alone (arXiv 1604.06174). Outputs of matmuls and of attention are the
dearest to compute again, and each budget keeps those with the most arithmetic a byte first. Elementwise operations cost
little, so they are recomputed until blocks fit as a whole.
"""

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kd_core.parallel.collectives import all_gather_values
from kd_core.parallel.world import World
from kd_core.sharded_values import local_values

log = logging.getLogger("kd")
# An operation inside a block, by its name and its number among those of this name.
Operation = tuple[str, int]
# Operations whose outputs a block keeps, or None for a block that recomputes nothing.
Outputs = frozenset[Operation] | None
recompute_all = functools.partial(checkpoint, use_reentrant=False)


class Cost(NamedTuple):
    """Multiplications of an operation, and bytes of its outputs on this rank."""

    products: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class BlockCosts:
    """Bytes that a block keeps for its backward pass without recomputation, bytes of its input, and its operations."""

    kept_bytes: int
    input_bytes: int
    operations: Mapping[Operation, Cost]


def _products(func: Any, args: tuple[Any, ...], output: Tensor) -> int | None:
    """Counts the multiplications of a matmul or of attention, or returns None for other operations."""
    name = str(func.overloadpacket.__name__)
    if "attention" in name or "attn" in name:
        # q kᵀ and the weighted sum of values, each over half of the S keys: [B, H, S, d], or [S, H, d] of documents.
        return output.numel() * args[1].shape[-2 if args[1].ndim == 4 else 0]
    if name.endswith("mm") and "bmm" not in name:
        # Batched products are those of attention without a kernel. They are changed in place (capped attention), and
        # their number differs between windows and documents, so none is kept.
        # [M, in] · [in, N], behind a bias in addmm.
        return output.numel() * args["add" in name].shape[-1]
    return None


def _numbered(func: Any, seen: Counter[str]) -> Operation:
    """Returns the name and number of an operation. Attention has one call a document, so its calls share a number."""
    name = str(func)
    number = -1 if "attention" in name or "attn" in name else seen[name]
    seen[name] += 1
    return name, number


class _Measure(TorchDispatchMode):
    """Records the costs of operations, and as a hook the tensors that they keep for the backward pass."""

    def __init__(self, shared: list[Tensor]) -> None:
        super().__init__()
        self.shared = {_memory(tensor)[0] for tensor in shared}  # weights, and what all blocks have
        self.seen, self.saved = Counter[str](), dict[int, int]()
        self.operations: dict[Operation, Cost] = defaultdict(Cost)
        self.last: list[Operation] = []  # operations behind the last tensor that is kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        operation = _numbered(func, self.seen)  # also of products of no rows: an expert may have some in another pass
        tensors = [tensor for tensor in (output if isinstance(output, tuple) else (output,)) if _is_filled(tensor)]
        if tensors and (products := _products(func, args, tensors[0])):
            before, size = self.operations[operation], sum(local_values(tensor).nbytes for tensor in tensors)
            self.operations[operation] = Cost(before.products + products, before.bytes + size)
            self.last.append(operation)
        elif tensors and "_to_copy" in str(func) and _memory(args[0])[0] in self.shared:
            self.shared.add(_memory(tensors[0])[0])  # a weight in autocast's dtype
        return output

    def pack(self, tensor: Tensor) -> Tensor:
        place, size = _memory(tensor)
        if place not in self.shared:
            self.saved[place] = size
            self.last.clear()
        return tensor


def _is_filled(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Returns where the memory of a tensor begins on this rank, and its bytes. Views share it."""
    local: Any = local_values(tensor)
    storage = getattr(local, "elem", local).untyped_storage()  # a tensor that a collective still fills has an `elem`
    return storage.data_ptr(), storage.nbytes()


def measure_block(run: Callable[..., Any], x: Tensor, *context: Any) -> BlockCosts:
    """Runs a block once more and returns its costs. Random numbers stay as they were."""
    block: nn.Module = run.__self__  # pyright: ignore[reportFunctionMemberAccess]
    measure = _Measure([*block.parameters(), *(value for value in context if isinstance(value, Tensor))])
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(measure.pack, lambda saved: saved):
        with measure:
            output = run(x.detach().requires_grad_(), *context)
        del output
    # Autocast's casts of weights stay for this pass. The block casts again when it recomputes, so it must do so now.
    torch.clear_autocast_cache()
    # The backward pass stops to recompute at the last tensor that it needs.
    operations = {name: cost for name, cost in measure.operations.items() if name not in measure.last}
    return BlockCosts(sum(measure.saved.values()), x.nbytes, operations)


def choose_kept(costs: BlockCosts, share: float, blocks: int) -> list[Outputs]:
    """Returns what each of `blocks` equal blocks keeps, within `share` of what they would keep without recomputation.

    Operations are taken in order of their arithmetic a byte, each in as many blocks as fit. What is left keeps blocks
    as a whole.
    """
    outputs: list[set[Operation]] = [set() for _ in range(blocks)]
    used = [costs.input_bytes] * blocks
    left = share * costs.kept_bytes * blocks - sum(used)
    for operation, cost in sorted(costs.operations.items(), key=lambda item: -item[1].products / item[1].bytes):
        for number in range(min(blocks, max(0, int(left // cost.bytes)))):
            outputs[number].add(operation)
            used[number] += cost.bytes
            left -= cost.bytes
    plan: list[Outputs] = [frozenset(chosen) for chosen in outputs]
    for number in range(blocks):
        if costs.kept_bytes - used[number] <= left:
            left -= costs.kept_bytes - used[number]
            plan[number] = None
    return plan


class BudgetedRecomputation:
    """The plans of a student's blocks, one for each kind of block, made in the first pass that needs gradients.

    Ranks may measure different rows. All follow the plan of the first one, so that collectives computed again meet.
    """

    def __init__(self, share: float, blocks: Iterable[nn.Module], world: World) -> None:
        self.share, self.world, self.plan = share, world, dict[int, Outputs]()
        # Blocks of a kind have parameters of the same shapes.
        self.kinds = [[(name, value.shape) for name, value in block.named_parameters()] for block in blocks]

    def _make_plan(self, number: int, costs: BlockCosts) -> None:
        equal = [block for block, kind in enumerate(self.kinds) if kind == self.kinds[number]]
        outputs = all_gather_values(self.world, choose_kept(costs, self.share, len(equal)))[0]
        self.plan.update(zip(equal, outputs, strict=True))
        log.info(
            "parallel.recompute: a block's activations take %.1f MB. %d of %d such blocks keep all, %d products of the "
            "others are kept.", costs.kept_bytes / 1e6, outputs.count(None), len(equal),
            sum(len(chosen) for chosen in outputs if chosen),
        )  # fmt: skip

    def recompute(self, number: int, run: Callable[..., Any], *args: Any) -> Any:
        """Runs block `number`, which keeps what its plan says. All ranks run the first block of a kind together."""
        if number not in self.plan:
            self._make_plan(number, measure_block(run, *args))
        outputs = self.plan[number]
        if outputs is None:
            return run(*args)
        if not outputs:
            return recompute_all(run, *args)
        return recompute_all(run, *args, context_fn=lambda: create_selective_checkpoint_contexts(_policy(outputs)))


def _policy(outputs: frozenset[Operation]) -> Callable[..., CheckpointPolicy]:
    """Returns the policy of one pass through a block, which numbers operations as `_Measure` does."""
    seen = {False: Counter[str](), True: Counter[str]()}  # forward, and again in the backward pass

    def policy(context: Any, func: Any, *args: Any, **settings: Any) -> CheckpointPolicy:
        del args, settings
        is_kept = _numbered(func, seen[context.is_recompute]) in outputs
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
