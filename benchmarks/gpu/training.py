"""Training steps on a device: time, MFU, memory, several layouts, and traces of their kernels."""

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.roofline import STEPS, attention_flops
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import StepShape, make_batch, matmul_weights, objectives, pin
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.sharded_values import local_values
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import Student
from kd_core.training.optimizer import AdamW
from kd_core.training.step import StepSums, train_step
from kd_core.types import Batch

PART, COMPILED = "step", "compiled"
PACKED, QUICK_START = STEPS
BF16 = Parallel(precision="bfloat16")


@dataclass(frozen=True)
class MeasuredStep:
    """One step to measure. `seconds` must be left for it."""

    shape: StepShape
    parallel: Parallel = BF16
    seconds: float = 15.0


def steps(session: Session) -> dict[str, MeasuredStep]:
    """Returns the steps by name. Those of `roofline.py` come first, under their names there."""
    packed, quick = STEPS[PACKED], STEPS[QUICK_START]
    alone = replace(packed, documents=1)
    named = {
        QUICK_START: MeasuredStep(quick),
        PACKED: MeasuredStep(packed),
        f"{PACKED}, CE alone": MeasuredStep(replace(packed, objective="CE")),
        "quick start's step, CE alone": MeasuredStep(replace(quick, objective="CE")),
        "quick start's student, 32k tokens": MeasuredStep(replace(quick, rows=8, length=4096, chunk=4096)),
        "1B step, 4 rows of one document": MeasuredStep(alone),
        "1B step, 4 rows of one document, chunk 256": MeasuredStep(replace(alone, chunk=256)),
        "1B step, 8 rows, recomputed": MeasuredStep(replace(packed, rows=8), replace(BF16, recompute="full")),
        "1B step, compiled": MeasuredStep(packed, replace(BF16, compile=True), 60.0),
        "quick start's step, compiled": MeasuredStep(quick, replace(BF16, compile=True), 45.0),
    }
    return {name: smaller(step) for name, step in named.items()} if session.tiny else named


def smaller(step: MeasuredStep) -> MeasuredStep:
    """Returns the same step of a student and rows so small that a CPU takes it in a moment."""
    shape = replace(step.shape, student="small", rows=2, length=32, top_k=4, chunk=32)
    return MeasuredStep(replace(shape, documents=min(3, shape.documents)), replace(step.parallel, compile=False), 0.0)


def random_student(arch: Architecture, parallel: Parallel, world: World) -> Student:
    """Returns a student with random weights."""
    model = parallelize(meta_decoder(arch), parallel, world)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in map(local_values, model.parameters()):
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return model


def model_flops(shape: StepShape) -> float:
    """Returns the FLOPs of a step: 6 per weight of a matmul and position, and attention inside documents."""
    return 6.0 * shape.positions * matmul_weights(shape.architecture) + attention_flops(shape)[0]


class Trainer:
    """A student that trains on batches of one shape."""

    def __init__(self, step: MeasuredStep, world: World) -> None:
        self.step, self.world = step, world
        self.model = random_student(step.shape.architecture, step.parallel, world)
        self.optimizer = AdamW(lr=1e-4).build(self.model)
        self.objective = objectives(step.shape.chunk)[step.shape.objective]

    def take(self, batch: Batch) -> StepSums:
        """Takes one step."""
        return train_step(
            self.model, self.optimizer, [batch], objective=self.objective, clip_norm=1.0, parallel=self.step.parallel,
            world=self.world,
        )  # fmt: skip


def measure(session: Session, part: str, name: str, step: MeasuredStep, world: World, rounds: int = 5) -> None:
    """Records time, MFU, memory and loss of a step, the median of some rounds after two."""
    # The lengths of the documents change with the step.
    batches, seconds, result = [make_batch(step.shape, seed) for seed in range(rounds + 2)], list[float](), None
    batches = list(map(pin, batches)) if session.on_gpu else batches
    with session.peak_gib() as peak:
        trainer = Trainer(step, world)
        for batch in batches:
            session.wait()
            started = time.perf_counter()
            result = trainer.take(batch)
            session.wait()
            seconds.append(time.perf_counter() - started)
    assert result is not None
    ms = 1e3 * median(seconds[2:])
    graphs = {"graphs": counters["stats"]["unique_graphs"]} if step.parallel.compile else {}
    counters.clear()
    lines = session.waits(lambda: trainer.take(batches[0]))
    session.record(
        part, name, ms=ms, **session.mfu(model_flops(step.shape), ms), gib=peak[0],
        tokens_s=step.shape.positions / ms * 1e3, loss=result.sums["loss"] / result.tokens,
        first_ms=1e3 * seconds[0], second_ms=1e3 * seconds[1],
        waits=len(lines), waits_at=", ".join(sorted(set(lines))), **graphs,
    )  # fmt: skip


def run(session: Session) -> None:
    """Measures the steps that are not compiled."""
    _run(session, PART, {name: step for name, step in steps(session).items() if "compiled" not in name})


def run_compiled(session: Session) -> None:
    """Measures the compiled steps. They come last, because compilation takes minutes."""
    _run(session, COMPILED, {name: step for name, step in steps(session).items() if "compiled" in name})


def _run(session: Session, part: str, named: dict[str, MeasuredStep]) -> None:
    for name, step in named.items():
        if session.left() < step.seconds:
            session.record(part, name, skipped="no time is left")
        else:
            session.attempt(part, name, partial(measure, session, part, name, step, World(device=session.device)))


@contextmanager
def one_rank(session: Session) -> Generator[World]:
    """Yields a world of one rank with a mesh, as several ranks have it: NCCL, and FSDP2 with its streams and casts."""
    backend = "cuda:nccl,cpu:gloo" if session.on_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh(session.device.type, (1, 1, 1), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
            yield World(device=session.device, mesh=mesh)
        finally:
            dist.destroy_process_group()


def run_fsdp(session: Session) -> None:
    """Measures one step without sharding, and sharded over one rank. All three begin with the same loss."""
    step = MeasuredStep(replace(STEPS[PACKED], rows=2, length=2048))
    step = smaller(step) if session.tiny else step
    session.attempt("fsdp", "none", partial(measure, session, "fsdp", "none", step, World(device=session.device), 3))
    with one_rank(session) as world:
        for shard in ("gradients", "full"):
            sharded = replace(step, parallel=replace(step.parallel, shard=shard))
            session.attempt("fsdp", shard, partial(measure, session, "fsdp", shard, sharded, world, 3))


def run_trace(session: Session) -> None:
    """Writes a trace and a table of kernels of a packed step, and of the quick start's."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if session.on_gpu else [])]
    order = "self_cuda_time_total" if session.on_gpu else "self_cpu_time_total"
    for name, file in ((PACKED, "packed"), (QUICK_START, "quick_start")):
        step = steps(session)[name]
        trainer, batch = Trainer(step, World(device=session.device)), make_batch(step.shape)
        for _ in range(2):
            trainer.take(batch)
        session.wait()
        with profile(activities=activities) as traced:
            trainer.take(batch)
            session.wait()
        trace: Path = session.out / f"trace_{file}.json.gz"
        traced.export_chrome_trace(str(trace))
        kernels = traced.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
        (session.out / f"kernels_{file}.txt").write_text(kernels)
        session.record("trace", name, file=trace.name, mib=trace.stat().st_size / 2**20)
