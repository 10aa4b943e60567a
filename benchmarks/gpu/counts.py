"""Counts one training step on fake CUDA tensors: host waits, launches, FLOPs, bytes and memory. Needs no GPU.

    python -m benchmarks.gpu.counts                                              # the quick start's step
    python -m benchmarks.gpu.counts --student 1B --rows 4 --length 4096 --documents 8 --chunk 4096 --out counts.json

A loss alone, at the target of the fused kernels, and with other objectives:

    python -m benchmarks.gpu.counts --each '[]' --losses '[{}, {"objective": "CE"}, {"chunk": 256}]'

The step is the project's own `train_step` with its CUDA code, bfloat16 by autocast and AdamW, on a batch of its own
collation. A launch is an operation that a GPU computes. Few operations, such as a sort, are more than one kernel.
"""

from benchmarks.gpu import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from benchmarks.gpu import fake_device
from benchmarks.gpu.operation_counter import OperationCounter, with_twin
from benchmarks.gpu.phases import INSIDE, follow_phases
from benchmarks.gpu.shapes import LossShape, StepShape, make_batch, objectives, pin
from kd_core.losses.fused.loss import fused_loss
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import Student, allocate
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step
from kd_core.types import TeacherTopK

CUDA = torch.device("cuda", 0)


def to_fake(value: Any, mode: FakeTensorMode) -> Any:
    """Returns a dataclass or tree of real CPU tensors as fake ones, with the real ones as their twins."""
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: to_fake(getattr(value, f.name), mode) for f in fields(value)})
    return tree_map_only(Tensor, lambda real: with_twin(mode.from_tensor(real), real), value)


@contextlib.contextmanager
def fake_gpu() -> Iterator[tuple[FakeTensorMode, OperationCounter]]:
    """Runs its block with fake tensors and a counter."""
    counter = OperationCounter()
    fake_device.patch(counter.wait)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, counter:
        yield mode, counter


def run_step(shape: StepShape, extra: Callable[[Student], None] | None = None) -> OperationCounter:
    """Runs two training steps, and returns the counter of the second. `extra` is called with the student before."""
    batch, decoder = make_batch(shape), meta_decoder(shape.architecture)
    objective = objectives(shape.chunk)[shape.objective]
    with fake_gpu() as (mode, counter):
        batch, model = pin(to_fake(batch, mode)), allocate(decoder, CUDA)
        optimizer = AdamW(lr=1e-4).build(model)

        def step() -> None:
            train_step(
                model, optimizer, [batch], objective=objective, clip_norm=1.0,
                parallel=Parallel(precision="bfloat16"), world=World(device=CUDA),
            )  # fmt: skip

        # The first step makes the optimiser's moments.
        step()
        follow_phases(counter, model, optimizer)
        if extra is not None:
            extra(model)
        counter.begin()
        step()
    return counter


def run_loss(shape: LossShape) -> OperationCounter:
    """Runs one loss, forward and backward, and returns its counter. `peak` is over inputs."""
    n, dtype = shape.positions, torch.bfloat16 if shape.precision == "bfloat16" else torch.float32
    objective = objectives(shape.chunk)[shape.objective]
    with fake_gpu() as (_, counter):
        made = partial(torch.empty, device=CUDA)
        hidden, weight = (made(rows, shape.width, dtype=dtype, requires_grad=True) for rows in (n, shape.vocab))
        teacher = TeacherTopK(made(n, shape.top_k, dtype=torch.int64), made(n, shape.top_k), made(n))
        labels, mask = made(n, dtype=torch.int64), made(n, dtype=torch.bool)
        counter.begin()
        counter.phase, before = "loss", counter.held
        with torch.autocast("cuda", torch.bfloat16, enabled=shape.precision == "autocast"):
            total = fused_loss(hidden, weight, teacher, labels, mask, objective, 1.0 / n).total
        counter.phase = "backward"
        total.backward()
        counter.peak -= before
    return counter


def launches_of_a_chunk(shape: LossShape) -> float:
    """Returns the launches that one chunk more takes, from the losses of one chunk and of several."""
    several = shape if shape.chunks > 1 else replace(shape, chunk=shape.positions // 2)
    one = replace(shape, chunk=shape.positions)
    loss = [run_loss(sizes).phases["loss"].total.launches for sizes in (several, one)]
    return (loss[0] - loss[1]) / (several.chunks - 1)


def report(shape: StepShape | LossShape, counter: OperationCounter) -> dict[str, Any]:
    """Returns the counts as plain values."""
    phases = {name: counts.total for name, counts in counter.phases.items()}
    waits = Counter((wait.phase, wait.reason, wait.line) for wait in counter.waits)
    launches = {"all": sum(total.launches for total in phases.values())}
    launches["a chunk"] = launches_of_a_chunk(shape.loss if isinstance(shape, StepShape) else shape)
    if isinstance(shape, StepShape):
        layers = shape.architecture.num_layers
        launches["a layer, forward"] = phases["layer forward"].launches / layers
        launches["a layer, backward"] = phases["layer backward"].launches / layers
        launches["optimizer"] = phases["optimizer"].launches
    return {
        "shape": asdict(shape),
        "waits": len(counter.waits),
        "waits_inside": sum(wait.phase in INSIDE for wait in counter.waits),
        "waits_by_line": [
            dict(zip(("phase", "reason", "line"), key, strict=True), times=n) for key, n in waits.items()
        ],
        "copies": [{"kind": kind, "line": line, "times": n} for (kind, line), n in counter.copies.items()],
        "launches": launches,
        "phases": {name: total._asdict() for name, total in phases.items()},
        "operations": {name: dict(counts.operations.most_common()) for name, counts in counter.phases.items()},
        "peak_bytes": counter.peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(StepShape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--each", type=json.loads, default=[{}], help="several steps: a JSON list of changes to these")
    parser.add_argument(
        "--losses", type=json.loads, default=[], help="losses alone: a JSON list of changes to the target"
    )
    parser.add_argument("--out", type=Path, help="a file, in place of the standard output")
    args = vars(parser.parse_args())
    changes_of_steps, losses, out = (args.pop(name) for name in ("each", "losses", "out"))
    steps = [StepShape(**{**args, **changes}) for changes in changes_of_steps]
    counts = {
        "steps": [report(shape, run_step(shape)) for shape in steps],
        "losses": [report(shape, run_loss(shape)) for shape in (LossShape(**changes) for changes in losses)],
    }
    text = json.dumps(counts, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
