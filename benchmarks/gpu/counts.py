"""Counts one training step on fake CUDA tensors: host waits, launches, FLOPs, bytes and memory. Needs no GPU.

    python -m benchmarks.gpu.counts                                              # the quick start's step
    python -m benchmarks.gpu.counts --student 1B --rows 4 --length 4096 --documents 8 --chunk 4096 --out counts.json

The step is the project's own `train_step` with its CUDA code, bfloat16 by autocast and AdamW, on a batch of its own
collation. A launch is an operation that a GPU computes. Few operations, such as a sort, are more than one kernel.
"""

from benchmarks.gpu import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from benchmarks.gpu import shapes
from benchmarks.gpu.operation_counter import OperationCounter, with_twin
from benchmarks.gpu.phases import INSIDE, follow_phases
from benchmarks.gpu.shapes import StepShape, make_batch
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import Student, allocate
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step

CUDA = torch.device("cuda", 0)


def to_fake(value: Any, mode: FakeTensorMode) -> Any:
    """Returns a dataclass or tree of real CPU tensors as fake ones, with the real ones as their twins."""
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: to_fake(getattr(value, f.name), mode) for f in fields(value)})
    return tree_map_only(Tensor, lambda real: with_twin(mode.from_tensor(real), real), value)


def run_step(shape: StepShape, extra: Callable[[Student], None] | None = None) -> OperationCounter:
    """Runs two training steps, and returns the counter of the second. `extra` is called with the student before."""
    batch, decoder, counter = make_batch(shape), meta_decoder(shape.architecture), OperationCounter()
    fake_cuda.patch(counter.wait)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, counter:
        batch, model = to_fake(batch, mode), allocate(decoder, CUDA)
        optimizer = AdamW(lr=1e-4).build(model)

        def step() -> None:
            train_step(
                model, optimizer, [batch], objective=shape.make_objective(), clip_norm=1.0,
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


def launches_of_a_chunk(shape: StepShape) -> float:
    """Returns the launches that one chunk more takes, from the losses of one chunk and of several."""
    shapes.STUDENTS["one layer"] = replace(shape.architecture, num_layers=1)
    several = replace(shape, student="one layer", documents=1)
    if several.chunks == 1:
        several = replace(several, chunk=several.positions // 2)
    one = replace(several, chunk=several.positions)
    loss = [run_step(each).phases["loss"].total.launches for each in (several, one)]
    return (loss[0] - loss[1]) / (several.chunks - 1)


def report(shape: StepShape, counter: OperationCounter) -> dict[str, Any]:
    """Returns the counts as plain values."""
    layers = shape.architecture.num_layers
    phases = {name: counts.total for name, counts in counter.phases.items()}
    waits = Counter((wait.phase, wait.what, wait.line) for wait in counter.waits)
    return {
        "shape": asdict(shape),
        "waits": len(counter.waits),
        "waits_inside": sum(wait.phase in INSIDE for wait in counter.waits),
        "waits_by_line": [dict(zip(("phase", "what", "line"), key, strict=True), times=n) for key, n in waits.items()],
        "copies": [{"kind": kind, "line": line, "times": n} for (kind, line), n in counter.copies.items()],
        "launches": {
            "step": sum(total.launches for total in phases.values()),
            "a chunk": launches_of_a_chunk(shape),
            "a layer, forward": phases["layer forward"].launches / layers,
            "a layer, backward": phases["layer backward"].launches / layers,
            "optimizer": phases["optimizer"].launches,
        },
        "phases": {name: total._asdict() for name, total in phases.items()},
        "operations": {name: dict(counts.operations.most_common()) for name, counts in counter.phases.items()},
        "peak_bytes": counter.peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(StepShape):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    parser.add_argument("--out", help="a file, in place of the standard output")
    args = vars(parser.parse_args())
    out = args.pop("out")
    shape = StepShape(**args)
    text = json.dumps(report(shape, run_step(shape)), indent=1)
    if out:
        Path(out).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
