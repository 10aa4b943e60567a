"""Hooks that tell a counter which part of a step runs, without a change to the step.

before the forward → forward → layer forward … → forward → loss → backward → layer backward … → after the backward
→ optimizer → after the optimizer
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_core.students.student import Student

# Between the first forward and the optimiser, in which no host may wait for the device.
INSIDE = ("forward", "layer forward", "loss", "backward", "layer backward", "after the backward")


class Phased(Protocol):
    """A counter with a phase."""

    phase: str


def follow_phases(counter: Phased, model: Student, optimizer: torch.optim.Optimizer) -> None:
    """Registers hooks on a student and its optimiser that set the counter's phase."""

    def set_phase(name: str) -> None:
        counter.phase = name

    def on_forward(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        set_phase("forward")
        # The loss is the function among the model's inputs. Tensors cannot be called.
        return tuple(_with_phase(value, set_phase) if callable(value) else value for value in args)

    def on_layer_end(_: Any, __: Any, output: Tensor) -> None:
        set_phase("forward")
        if output.requires_grad:
            # The gradient by a block's output is there: the block's backward pass begins.
            output.register_hook(lambda _: set_phase("layer backward"))

    def on_first_layer(_: Any, args: tuple[Any, ...]) -> None:
        set_phase("layer forward")
        # The gradient by the embeddings is there: no block is left.
        if args[0].requires_grad:
            args[0].register_hook(lambda _: set_phase("backward"))

    first = model.layers[0]
    model.register_forward_pre_hook(on_forward)
    for layer in model.layers:
        layer.register_forward_pre_hook(on_first_layer if layer is first else lambda *_: set_phase("layer forward"))
        layer.register_forward_hook(on_layer_end)
    optimizer.register_step_pre_hook(lambda *_: set_phase("optimizer"))
    optimizer.register_step_post_hook(lambda *_: set_phase("after the optimizer"))


def _with_phase(loss: Callable[..., Any], set_phase: Callable[[str], None]) -> Callable[..., Any]:
    def on_backward(_: Tensor) -> None:
        set_phase("backward")
        torch.autograd.Variable._execution_engine.queue_callback(lambda: set_phase("after the backward"))

    def run(*args: Any) -> Any:
        set_phase("loss")
        result = loss(*args)
        result.total.register_hook(on_backward)
        set_phase("forward")
        return result

    return run
