"""Training steps of one student under several layouts on this machine: seconds, memory, and whether they agree.

    python -m benchmarks.layouts                       # two ranks on two cores
    python -m benchmarks.layouts --ranks 4 --steps 3
    python -m benchmarks.layouts --ranks 8 --device cuda --precision bfloat16

The student of `benchmarks.step` with heads that divide (8, of which 4 for keys and values): 80M parameters. A step is
`--ranks` rows of 512 positions, one pass of a row where data parallelism divides them. One process with all threads
comes first; the others share its threads. Memory is the largest rank's peak, above what it had before the student:
resident pages on a CPU, allocated bytes on a GPU.
"""

import argparse
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step import STUDENT, make_batch
from kd_core.files import read_json, write_json
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.starts.start import fill_random
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step

ARCH = replace(STUDENT, num_heads=8, num_kv_heads=4, head_dim=72)
OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)})


def layouts(ranks: int) -> dict[str, Parallel]:
    """What there is for so many ranks, each with one row a pass."""
    whole = Parallel(micro_batch_rows=1)
    found = {
        f"dp {ranks}, whole copies": replace(whole, shard="none"),
        f"dp {ranks}, shard=gradients": whole,
        f"dp {ranks}, shard=full": replace(whole, shard="full"),
        f"dp {ranks}, shard=full, recompute=full": replace(whole, shard="full", recompute="full"),
    }
    if ranks <= ARCH.num_heads:
        found[f"tp {ranks}"] = replace(whole, tensor_parallel=ranks)
        found[f"tp {ranks}, by position"] = replace(whole, tensor_parallel=ranks, sequence_parallel=True)
    if ranks >= 4:
        found[f"dp {ranks // 2} × tp 2, by position"] = replace(whole, tensor_parallel=2, sequence_parallel=True)
        found[f"2 copies × {ranks // 2} shards"] = replace(whole, replicas=2, shard="full")
    return found


def _peak(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(world: World, parallel: Parallel, steps: int, rows: int) -> dict[str, float]:
    """Seconds a step, MB at the peak of the fullest rank, and the last loss."""
    world, before = world.with_layout(parallel.layout(world.size)), _peak(world)
    model = parallelize(meta_decoder(ARCH), parallel, world)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                fill_random(parameter, name, 0, lambda values, g: values.normal_(0.0, 0.02, generator=g))
    optimizer, seconds, loss = AdamW(lr=1e-4).build(model), list[float](), 0.0
    each = rows // world.dp_size
    batch = make_batch(rows, 512, 64)
    own = [range(at, at + 1) for at in range(world.dp_rank * each, (world.dp_rank + 1) * each)]
    batches = [
        replace(batch, **{k: v[list(at)] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}) for at in own
    ]
    for _ in range(steps + 1):
        started = time.perf_counter()
        found = train_step(model, optimizer, batches, objective=OBJECTIVE, clip_norm=1.0, parallel=parallel,
                           world=world)  # fmt: skip
        seconds.append(time.perf_counter() - started)
        loss = found.sums["loss"] / found.tokens
    peak = torch.tensor(_peak(world) - before, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {"seconds": median(seconds[1:]), "MB": float(peak), "loss": loss}


def _rank(rank: int, size: int, store: str, device: str, args: tuple[Any, ...], out: str) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    at = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if size > 1:
        dist.init_process_group("gloo" if device == "cpu" else "nccl", init_method=f"file://{store}", rank=rank,
                                world_size=size)  # fmt: skip
    found = measure(World(rank, size, at), *args)
    if rank == 0:
        write_json(Path(out), found)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def in_processes(size: int, device: str, *args: Any) -> dict[str, float]:
    """Each layout in processes of its own, so that none inherits another's memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torch.multiprocessing.spawn(_rank, (size, f"{folder}/store", device, args, str(out)), nprocs=size)
        return read_json(out, "what rank 0 measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    alone = Parallel(micro_batch_rows=1, precision=args.precision)
    print(f"torch {torch.__version__}, {args.device}, {args.precision}; {args.ranks} rows of 512 a step")
    print(f"| {'layout':42} | s a step | MB of the fullest rank | loss after {args.steps + 1} steps |")
    print(f"|{'-' * 44}|---|---|---|")
    for name, size, parallel in [("one process", 1, alone)] + [
        (name, args.ranks, replace(each, precision=args.precision)) for name, each in layouts(args.ranks).items()
    ]:
        found = in_processes(size, args.device, parallel, args.steps, args.ranks)
        print(f"| {name:42} | {found['seconds']:.2f} | {found['MB']:.0f} | {found['loss']:.6f} |", flush=True)


if __name__ == "__main__":
    main()
