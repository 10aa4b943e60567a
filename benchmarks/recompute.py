"""Memory of activations and time of a pass, for what `parallel.recompute` may be, side by side on one student.

    python -m benchmarks.recompute                          # one thread, bfloat16 where the CPU has it
    python -m benchmarks.recompute --rounds 5 --precision float32 --positions 256

The blocks of `benchmarks.step`'s student (15 layers, D 576) on one row of two documents. Kept are the
bytes that the allocator has given and not got back behind the forward pass, by torch's profiler. Seconds are the CPU's
own, of forward and backward passes through the blocks. Each round takes one pass with each setting, in turn. Ratios are
to `none`.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor
from torch.profiler import profile

from benchmarks.step import STUDENT, make_student
from kd_core.document_lengths import Documents
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import apply_recomputation
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder

SETTINGS = (
    "none",
    "budget:0.9",
    "budget:0.8",
    "budget:0.65",
    "budget:0.5",
    "budget:0.35",
    "budget:0.2",
    "every:2",
    "full",
)


def forward(model: Decoder, x: Tensor) -> Tensor:
    """Runs all blocks on one row of two documents."""
    T = x.shape[1]
    context = model.context(torch.arange(T)[None] % (T // 2), Documents.from_ids(torch.arange(T)[None] // (T // 2)))
    for layer in range(len(model.layers)):
        x = model.run_block(layer, x, context)
    return x


def measure(
    model: Decoder, x: Tensor, settings: list[Parallel], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns MB kept behind the forward pass, and median CPU seconds of a pass, by setting."""
    cpu = torch.device("cpu")
    megabytes, seconds = dict[str, float](), {parallel.recompute: list[float]() for parallel in settings}
    for turn in range(rounds + 1):
        for parallel in settings:
            apply_recomputation(model, parallel, World())
            with parallel.autocast(cpu):
                forward(model, x)  # makes the plan of a budget
            # Autocast keeps casts of weights until its end, so each pass has an autocast of its own, as in training.
            if turn == 0:
                with profile(profile_memory=True) as profiled, parallel.autocast(cpu):
                    output = forward(model, x)
                megabytes[parallel.recompute] = (
                    sum(event.self_cpu_memory_usage for event in profiled.events() or ()) / 1e6
                )
                del output
                continue
            started = time.process_time()
            with parallel.autocast(cpu):
                output = forward(model, x)
            output.square().mean().backward()
            seconds[parallel.recompute].append(time.process_time() - started)
    return megabytes, {name: median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = [Parallel(precision=args.precision, recompute=name) for name in SETTINGS]
    x = torch.randn(1, args.positions, STUDENT.hidden_size, requires_grad=True)
    megabytes, seconds = measure(make_student(), x, settings, args.rounds)
    print(
        f"torch {torch.__version__}, one thread, {args.precision}, {args.positions} positions, {args.rounds} rounds\n"
    )
    print("| recompute | MB kept | / none | s a pass | / none |\n|---|---|---|---|---|")
    for name in SETTINGS:
        memory, slowdown = megabytes[name] / megabytes["none"], seconds[name] / seconds["none"]
        print(f"| `{name}` | {megabytes[name]:.0f} | {memory:.2f} | {seconds[name]:.2f} | {slowdown:.2f} |")


if __name__ == "__main__":
    main()
