"""What one operation costs a GPU, from shapes alone: launches, FLOPs of its matmul, bytes read and written.

Bytes are those of inputs and outputs, each read or written once. An operation that takes several passes, such as a
softmax over a row that fits no cache, moves more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Operation = Any  # torch._ops.OpOverload

# Operations that make views or allocate, and launch nothing.
FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "expand", "split",
    "split_with_sizes", "unbind", "detach", "alias", "as_strided", "_reshape_alias", "reshape", "lift_fresh", "lift",
    "unflatten", "diagonal", "unfold", "chunk", "is_same_size", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "set_", "resize_", "record_stream", "is_pinned", "_pin_memory", "_local_scalar_dense",
}  # fmt: skip
MATMULS = {"mm", "addmm", "bmm", "baddbmm"}
# Operations that overwrite their first argument without reading it, or take its dtype and device alone.
WRITES_ONLY = {
    "copy_", "zero_", "fill_", "_foreach_zero_", "_foreach_copy_", "new_full", "new_zeros", "new_ones", "zeros_like",
    "ones_like", "full_like",
}  # fmt: skip
# A kernel over lists takes at most so many tensors, or so many blocks of elements, a launch.
LISTED_TENSORS, LISTED_ELEMENTS = 36, 320 * 65536


class Cost(NamedTuple):
    """Cost of one operation. `flops` and `matmul_bytes` are those of matmuls and attention, `bytes` of all others."""

    launches: int = 0
    flops: float = 0.0
    matmul_bytes: int = 0
    bytes: int = 0


def nbytes(tensor: Tensor) -> int:
    """Counts the bytes behind a tensor: what `expand` repeats counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0) * tensor.element_size()


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns the tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _gathered(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Reads as many elements as come out, at the places of an index."""
    return sum(map(nbytes, inputs[1:])) + 2 * sum(map(nbytes, outputs))


def _scattered(inputs: list[Tensor], _: list[Tensor], passes: int = 1) -> int:
    """Reads indices and values, and writes as many elements of the first input."""
    target, *indices_and_values = inputs
    index = max(indices_and_values, key=Tensor.numel)
    return sum(map(nbytes, indices_and_values)) + passes * index.numel() * target.element_size()


def _added(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Reads indices and values, and reads and writes as many elements of the first input."""
    return _scattered(inputs, outputs, passes=2)


def _in_one_pass(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Reads all inputs and writes all outputs."""
    return sum(map(nbytes, inputs)) + sum(map(nbytes, outputs))


def _marked(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Reads and writes the logits [n, V] at the columns [n, K + 1] alone."""
    logits, columns, *_ = inputs
    results = [tensor for tensor in outputs if tensor is not logits]
    return sum(map(nbytes, [*inputs[1:], *results])) + 2 * columns.numel() * logits.element_size()


def _written_in_half(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Reads the logits in float32 and writes the gradient in bfloat16, in their memory."""
    return _in_one_pass(inputs, outputs) - nbytes(inputs[0]) // 2


# Bytes of operations that touch a part of their inputs, by name. By default inputs are read once, and results and what
# is changed in place are written once. A kernel of the project's own, `kd::name`, that moves other bytes belongs here.
BYTES: dict[str, Callable[[list[Tensor], list[Tensor]], int]] = {
    "gather": _gathered, "index_select": _gathered, "embedding": _gathered, "index": _gathered,
    "scatter": _scattered, "scatter_": _scattered, "scatter_add_": _added, "index_add_": _added,
    "index_put_": _added,
    "kd::mark_support": _marked, "kd::write_dlogits": _written_in_half,
    # Looks at the factor, which is 1 in training.
    "kd::scale_unless_one": lambda inputs, _: nbytes(inputs[1]),
    # Reads parameter, gradient and two moments, and writes all but the gradient.
    "_fused_adamw_": lambda inputs, _: sum(map(nbytes, inputs)) * 7 // 4,
}  # fmt: skip


def _matmul_flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    # [m, k] @ [k, n] takes 2 · m · k · n. The last dimension of the first factor is k, and outputs count m and n.
    first_factor = inputs[1 if name in ("addmm", "baddbmm") else 0]
    return 2.0 * outputs[0].numel() * first_factor.shape[-1]


def is_attention(name: str) -> bool:
    """Checks for a fused attention kernel, whose FLOPs depend on the documents and not on shapes alone."""
    return "attention" in name or "varlen_attn" in name


def short_name(operation: Operation) -> str:
    """Returns an operation's name without namespace `aten` and overload: `mm`, but `kd::tail`."""
    return operation._schema.name.removeprefix("aten::")


def _list_launches(arguments: tuple[Any, ...]) -> int:
    """Counts the launches of a kernel over the tensors of its first argument."""
    tensors = tensors_of(arguments[0])
    by_elements = sum(tensor.numel() for tensor in tensors) / LISTED_ELEMENTS
    return max(1, math.ceil(len(tensors) / LISTED_TENSORS), math.ceil(by_elements))


def _written(operation: Operation, arguments: tuple[Any, ...], result: Any) -> list[Tensor]:
    """Returns the results of an operation, and the arguments that it writes according to its schema."""
    declared = zip(operation._schema.arguments, arguments, strict=False)
    in_place = tensors_of([value for which, value in declared if which.alias_info and which.alias_info.is_write])
    return list({id(tensor): tensor for tensor in [*tensors_of(result), *in_place]}.values())


def cost_of(operation: Operation, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> Cost:
    """Returns the cost of an operation that had these arguments, keyword arguments and result."""
    name = short_name(operation)
    # `out` is written and not read.
    read = arguments[1:] if name in WRITES_ONLY else arguments, {k: v for k, v in options.items() if k != "out"}
    inputs = [tensor for tensor in tensors_of(read) if tensor.device.type == "cuda"]
    outputs = [tensor for tensor in _written(operation, arguments, result) if tensor.device.type == "cuda"]
    if name in FREE or not (inputs or outputs) or name.startswith("profiler::"):
        return Cost()
    launches = _list_launches(arguments) if name.startswith(("_foreach_", "_fused_adam", "_amp_foreach")) else 1
    if name in MATMULS:
        return Cost(launches, _matmul_flops(name, inputs, outputs), _in_one_pass(inputs, outputs))
    if is_attention(name):
        return Cost(launches, 0.0, _in_one_pass(inputs, outputs))
    return Cost(launches, bytes=BYTES.get(name, _in_one_pass)(inputs, outputs))
