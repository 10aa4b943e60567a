"""A step of a student of transformers with our loss, with its own logits and a dense loss, and of our own decoder.

    python -m benchmarks.students                             # both precisions, two threads
    python -m benchmarks.students --rounds 3 --precisions float32

All three have the weights, batch, optimiser and precision of `benchmarks.step`: 81M parameters, 49,152 tokens, two rows
of 512 positions with 64 entries each, KD + CE, clipped, AdamW. They take their steps in turn, in one process. The dense
loss is the one of `benchmarks.throughput`. The memory of a loss is the growth of a process's peak over its inputs, in a
process of its own.

Bars: our loss 0.95 of the step with a dense loss, and a quarter of its memory; our decoder 1.0 of the same family
through transformers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks.inputs import Inputs, Point
from benchmarks.measure import peak_mib
from benchmarks.step import STUDENT, make_batch, make_student
from benchmarks.throughput import CLIP, OBJECTIVE, dense_loss, transformers_twin
from kd_core.losses.fused.loss import fused_loss
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.starts.start import build_student
from kd_core.students.starts.transformers_start import Transformers
from kd_core.students.student import Student
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step
from kd_core.types import Batch

OURS, DENSE, DECODER = "transformers, our loss", "transformers, dense loss", "our decoder, our loss"
BARS = {(OURS, DENSE): 0.95, (DECODER, OURS): 1.0}
MEMORY_BAR = 0.25


def through_transformers(decoder: Student) -> Student:
    """The same weights as a student of transformers, by a folder."""
    with tempfile.TemporaryDirectory() as folder:
        transformers_twin(cast(Any, decoder)).save_pretrained(folder)
        return build_student(Transformers(folder), torch.device("cpu"), seed=0)


def step_of(model: Student, batch: Batch, parallel: Parallel) -> Callable[[], float]:
    """A step as training takes it, which returns its loss."""
    optimizer = AdamW(lr=1e-5).build(model)

    def step() -> float:
        sums = train_step(model, optimizer, [batch], objective=OBJECTIVE, clip_norm=CLIP, parallel=parallel,
                          world=World())  # fmt: skip
        return sums.sums["loss"] / sums.tokens

    return step


def dense_step_of(model: nn.Module, batch: Batch, parallel: Parallel) -> Callable[[], float]:
    """A step as users write it, which returns its loss."""
    optimizer = AdamW(lr=1e-5).build(model)

    def step() -> float:
        with parallel.autocast(torch.device("cpu")):
            loss = dense_loss(model(batch.tokens, use_cache=False).logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def steps(args: argparse.Namespace, parallel: Parallel) -> dict[str, Callable[[], float]]:
    """The three steps by name, from the same weights."""
    batch, decoder = make_batch(args.rows, args.length, args.top_k), make_student()
    return {
        OURS: step_of(through_transformers(decoder), batch, parallel),
        DENSE: dense_step_of(transformers_twin(decoder), batch, parallel),
        DECODER: step_of(decoder, batch, parallel),
    }


def our_loss(given: Inputs) -> Tensor:
    scale = 1 / len(given.hidden)
    return fused_loss(given.hidden, given.weight, given.teacher, given.labels, given.mask, OBJECTIVE, scale).total


def loss_of_logits(given: Inputs) -> Tensor:
    ids, log_probs, tail, _ = given.teacher
    batch = SimpleNamespace(
        topk_token_ids=ids[None], topk_log_probs=log_probs[None], tail_log_prob=tail[None], labels=given.labels[None]
    )
    return dense_loss(nn.functional.linear(given.hidden, given.weight)[None], cast(Batch, batch))


def memory(args: argparse.Namespace, precision: str, name: str) -> float:
    """MiB of a loss, forward and backward, in a process of its own."""
    sizes = [f"--{size}={getattr(args, size.replace('-', '_'))}" for size in ("rows", "length", "top-k", "threads")]
    command = [sys.executable, "-m", "benchmarks.students", f"--precisions={precision}", f"--child={name}", *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return float(done.stdout)


def report(args: argparse.Namespace, precision: str) -> None:
    seconds: dict[str, list[float]] = {OURS: [], DENSE: [], DECODER: []}
    taken = steps(args, Parallel(precision=cast(Any, precision)))
    for turn in range(args.rounds + 1):
        names, losses = list(taken), list[float]()
        for name in names[turn % 3 :] + names[: turn % 3]:
            started = time.perf_counter()
            losses.append(taken[name]())
            seconds[name].append(time.perf_counter() - started)
        if turn == 0:
            assert max(losses) - min(losses) < 2e-2 * losses[0], losses  # all compute the same
    kept = {name: values[1:] for name, values in seconds.items()}
    print(f"\n{precision}: {args.rows} rows of {args.length} positions, K={args.top_k}, {args.rounds} rounds")
    for name, values in kept.items():
        print(f"{name:28}{median(values):9.3f} s a step")
    for (name, base), bar in BARS.items():
        ratio = median(one / other for one, other in zip(kept[name], kept[base], strict=True))
        print(f"{name} / {base}: {ratio:.3f}, wanted {bar}: {'reached' if ratio <= bar else 'not reached'}")
    ours, dense = memory(args, precision, "ours"), memory(args, precision, "dense")
    reached = "reached" if ours <= MEMORY_BAR * dense else "not reached"
    print(
        f"memory of our loss / dense: {ours:.0f} / {dense:.0f} MiB, {ours / dense:.3f}, wanted {MEMORY_BAR}: {reached}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2), ("length", 512), ("top-k", 64), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--child", choices=("ours", "dense"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        point = Point(args.rows * args.length, STUDENT.vocab_size, STUDENT.hidden_size, args.top_k)
        inputs = "autocast" if args.precisions == "bfloat16" else args.precisions
        print(peak_mib(point, inputs, our_loss if args.child == "ours" else loss_of_logits, "cpu"))
        return
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {args.threads} thread{'s' * (args.threads > 1)}")
    for precision in args.precisions.split(","):
        report(args, precision)


if __name__ == "__main__":
    main()
