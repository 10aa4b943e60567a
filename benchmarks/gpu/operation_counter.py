"""A dispatch mode that counts the operations of a step on fake CUDA tensors, and finds where the host waits.

Fake tensors have no numbers. Small ones that follow from the batch's own numbers have a real twin on the CPU, on which
every operation is repeated. A step that reads them so takes the path that it would take. A number without a twin,
such as a gradient norm, reads as 1.
"""

import sys
import traceback
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.gpu.operation_costs import Cost, Operation, cost_of, short_name, tensors_of

ROOT = Path(__file__).parent.parent.parent
# Largest tensor that has a twin: the documents of a batch have, and entries and activations have not.
TWIN_ELEMENTS = 1 << 18
# Operations that need the numbers of their inputs to know the shape of the result.
READS_SHAPE = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}


class Wait(NamedTuple):
    """A place at which the host waits for the device: the reason, in which phase, and the line."""

    reason: str
    phase: str
    line: str


@dataclass
class PhaseCounts:
    """Sums over the operations of a phase."""

    operations: Counter[str] = field(default_factory=Counter)
    total: Cost = field(default_factory=Cost)

    def add(self, name: str, cost: Cost) -> None:
        self.operations[name] += cost.launches
        self.total = Cost(*(a + b for a, b in zip(self.total, cost, strict=True)))


def project_line() -> str:
    """Returns file, line and text of the innermost frame of the project that is no part of the counting."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if (
            path.is_relative_to(ROOT)
            and not path.is_relative_to(ROOT / "benchmarks" / "gpu")
            and ".venv" not in path.parts
        ):
            entry = traceback.FrameSummary(str(path), frame.f_lineno, frame.f_code.co_name)
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {entry.line}"
        frame = frame.f_back
    return "outside of the project"


class OperationCounter(TorchDispatchMode):
    """Counts by phase. `phase` is set by whoever runs the step (`phases.py`)."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self._storages: set[int] = set()
        self._pinned: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Forgets what was counted. Memory that is held stays counted."""
        self.phase, self.peak = "before the forward", self.held
        self.phases: defaultdict[str, PhaseCounts] = defaultdict(PhaseCounts)
        self.waits: list[Wait] = []
        self.copies: Counter[tuple[str, str]] = Counter()

    def wait(self, reason: str) -> None:
        """Notes that the host waits here."""
        self.waits.append(Wait(reason, self.phase, project_line()))

    def __torch_dispatch__(self, func: Operation, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs, name = kwargs or {}, short_name(func)
        if name.startswith("prim::"):
            return func(*args, **kwargs)
        if name in ("_pin_memory", "is_pinned"):
            return self._pin(args[0]) if name == "_pin_memory" else self._is_pinned(args[0])
        is_pinned = kwargs.get("pin_memory") or False
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        inputs, twins = tensors_of((args, kwargs)), _Twins(func, args, kwargs)
        if name == "_local_scalar_dense":
            return self._read(args[0], twins)
        result = self._read_shape(name, func, args, kwargs, twins)
        if result is None:
            result = func(*args, **kwargs)
        twins.give_to(result)
        outputs = tensors_of(result)
        self._note_copy(name, args, kwargs, inputs, outputs)
        self.phases[self.phase].add(name, cost_of(func, args, kwargs, result))
        for tensor in outputs:
            self._hold(tensor)
            if is_pinned:
                self._pin(tensor)
        return result

    def _read(self, tensor: Tensor, twins: "_Twins") -> Any:
        if tensor.device.type == "cuda":
            self.wait("a number is read")
        if twins.result is not None:
            return twins.result
        return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _read_shape(self, name: str, func: Operation, args: Any, kwargs: Any, twins: "_Twins") -> Any:
        """Returns a result of the twin's shape, where it depends on numbers and FakeTensorMode would raise."""
        is_masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name not in READS_SHAPE and not is_masked:
            return None
        on_device = any(tensor.device.type == "cuda" for tensor in tensors_of(args))
        if on_device:
            self.wait(f"{name} reads a shape")
        if name == "index_put_":
            return func(args[0], [None if i is None else i.nonzero()[:, 0] for i in args[1]], *args[2:], **kwargs)
        device = "cuda" if on_device else "cpu"
        if twins.result is None:
            raise RuntimeError(f"{name} needs numbers that no twin has, at {project_line()}")
        return tree_map_only(
            Tensor, lambda twin: torch.empty(twin.shape, dtype=twin.dtype, device=device), twins.result
        )

    def _note_copy(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if name not in ("_to_copy", "copy_") or not outputs:
            return
        source, target = inputs[-1], outputs[0]
        if source.device.type == target.device.type:
            return
        to_host = target.device.type == "cpu"
        self.copies["device to host" if to_host else "host to device", project_line()] += 1
        is_asked = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        # A copy of its own to the host is to page-locked memory, where it need not wait.
        if to_host and is_asked and name == "_to_copy":
            self._pin(target)
        if not (is_asked and self._is_pinned(target if to_host else source)):
            self.wait("a copy to the host" if to_host else "a copy from memory that is not pinned")

    def _pin(self, tensor: Tensor) -> Tensor:
        """Notes that a tensor's memory on the host is page-locked."""
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _hold(self, tensor: Tensor) -> None:
        """Counts the memory of a new tensor on the device until it is freed."""
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.held -= size


class _Twins:
    """One operation, repeated on the real twins of its fake arguments. `result` is None if one of them has none."""

    def __init__(self, func: Operation, args: Any, kwargs: Any) -> None:
        self.result: Any = None
        inputs = tensors_of((args, kwargs))
        has_numbers = all(tensor.numel() <= TWIN_ELEMENTS and _twin(tensor) is not None for tensor in inputs)
        is_constant = short_name(func) in ("ones_like", "zeros_like", "full_like")
        if not (has_numbers or is_constant) or torch.Tag.nondeterministic_seeded in func.tags:
            return
        # Memory that is not written yet has no numbers, and kernels of other libraries may want a GPU.
        if func.namespace != "aten" or short_name(func).startswith(("empty", "new_empty")):
            return
        if is_constant and inputs[0].numel() > TWIN_ELEMENTS:
            return
        with unset_fake_temporarily(), torch.no_grad():
            try:
                on_cpu = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
                real_args, real_kwargs = tree_map_only(Tensor, lambda t: _twin(t, t.shape), on_cpu)
                self.result = func(*real_args, **real_kwargs)
            except (NotImplementedError, RuntimeError):  # an operation that no CPU has
                self.result = None

    def give_to(self, result: Any) -> None:
        """Attaches the twin's result to the fake one, where it is small."""
        fakes = tensors_of(result)
        reals = tensors_of(self.result) if self.result is not None else [None] * len(fakes)
        for fake, real in zip(fakes, reals, strict=True):
            fake._twin = real if real is not None and real.numel() <= TWIN_ELEMENTS else None


def _twin(tensor: Tensor, shape: torch.Size | None = None) -> Tensor | None:
    """Returns the real twin of a tensor: itself if it is real. With a shape, zeros where there is none."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    twin = getattr(tensor, "_twin", None)
    return torch.zeros(shape, dtype=tensor.dtype) if twin is None and shape is not None else twin


def with_twin(fake: Tensor, real: Tensor) -> Tensor:
    """Attaches a real tensor to the fake one that stands for it."""
    fake._twin = real if real.numel() <= TWIN_ELEMENTS else None
    return fake
