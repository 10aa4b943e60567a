"""Puts mistakes into a student's forward pass, and prints what the counter of a step sees of them.

A process of its own, because fake CUDA tensors must be there before torch.
"""

from benchmarks.gpu import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.counts import CUDA, fake_gpu, run_step
from benchmarks.gpu.shapes import StepShape
from kd_core.students.student import Student


def read_a_number(x: Tensor) -> None:
    x.sum().item()  # a number


def copy_to_host(x: Tensor) -> None:
    x[0, 0].cpu()  # a copy


def copy_without_waiting(x: Tensor) -> None:
    x[0, 0].to("cpu", non_blocking=True)


def branch(x: Tensor) -> None:
    if (x > 0).any():  # a branch
        x.abs()


def read_a_shape(x: Tensor) -> None:
    torch.arange(4, device=x.device).nonzero()  # a shape


def synchronize(x: Tensor) -> None:
    del x
    torch.cuda.synchronize()  # all


def copy_from_pageable(x: Tensor) -> None:
    torch.zeros(3).to(x.device, non_blocking=True)  # pageable


def copy_from_pinned(x: Tensor) -> None:
    torch.zeros(3).pin_memory().to(x.device, non_blocking=True)


def copy_into_pageable(x: Tensor) -> None:
    torch.empty(4).copy_(x[0, 0, :4].detach(), non_blocking=True)  # into pageable


def copy_into_pinned(x: Tensor) -> None:
    torch.empty(8, pin_memory=True)[2:6].copy_(x[0, 0, :4].detach(), non_blocking=True)


def launch_20(x: Tensor) -> None:
    y = x[0, 0].detach()
    for _ in range(20):
        y = y + 1


@torch.library.custom_op("kd::kernel_of_a_test_", mutates_args=["logits"])
def kernel(logits: Tensor, factors: Tensor) -> None:
    """Stands for a kernel of the project's own, which changes [n, V] in place by numbers [n]."""
    raise NotImplementedError


kernel.register_fake(lambda *_: None)


def costs() -> dict[str, list[float]]:
    """Returns launches, FLOPs, bytes of matmuls and bytes of others of single operations on known shapes."""
    with fake_gpu() as (_, counter):
        made = partial(torch.empty, device=CUDA)
        left, right, total, ids = made(8, 16), made(16, 32), made(8, 32), made(8, 4, dtype=torch.int64)
        many = [made(8, 32) for _ in range(40)]
        works: dict[str, Callable[[], object]] = {
            "mm": lambda: left @ right,
            "addmm in place": lambda: torch.addmm(total, left, right, out=total),
            "add": lambda: total + total,
            "add an expanded row": lambda: total + total[:1].expand(8, 32),
            "mul in place": lambda: total.mul_(2.0),
            "copy": lambda: total.copy_(total.bfloat16()),
            "zero": total.zero_,
            "view": lambda: total.t()[1:],
            "gather": lambda: total.gather(1, ids),
            "scatter_add": lambda: total.scatter_add_(1, ids, total[:, :4]),
            "lists": lambda: torch._foreach_mul_(many, 2.0),
            "own kernel": lambda: kernel(total, total[:, 0]),
        }
        for name, work in works.items():
            counter.phase = name
            work()
    return {name: list(counter.phases[name].total) for name in works}


WAITS = (read_a_number, copy_to_host, branch, read_a_shape, synchronize, copy_from_pageable, copy_into_pageable)
NO_WAITS = (copy_without_waiting, copy_from_pinned, copy_into_pinned)


def counts_with(*mistakes: Callable[[Tensor], None]) -> dict[str, Any]:
    """Returns waits and launches of a step whose second block makes the mistakes before its forward pass."""

    def put_into(model: Student) -> None:
        for mistake in mistakes:
            model.layers[1].register_forward_pre_hook(lambda _, args, mistake=mistake: mistake(args[0]))

    counter = run_step(StepShape(student="small", rows=1, length=32, chunk=32, top_k=4), put_into)
    launches = sum(counts.total.launches for counts in counter.phases.values())
    return {"waits": [wait._asdict() for wait in counter.waits], "launches": launches, "peak": counter.peak}


if __name__ == "__main__":
    print(json.dumps({
        "nothing": counts_with(), "waits": counts_with(*WAITS), "no waits": counts_with(*NO_WAITS),
        "launches": counts_with(launch_20), "costs": costs(),
    }))  # fmt: skip
