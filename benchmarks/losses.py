"""What distillation costs against cross-entropy: time side by side, peak memory in processes of their own.

    python -m benchmarks.losses                      # V=32768, D=512, K=64, one and two threads
    python -m benchmarks.losses --vocab 131072 --width 1024 --top-k 8 --rounds 3

`bfloat16` is hidden states and weight in it; `autocast` a float32 weight under autocast, as training has it.
Every round runs each candidate once, in turn, so that a slow minute of the machine hits all; the table shows
medians, and ratios of medians to `F.cross_entropy(hidden @ weight.T)` as users write it. Forward and backward.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_core.losses.fused import fused_loss
from kd_core.losses.objective import CrossEntropy, Distillation, Objective, Term
from kd_core.types import TeacherTopK

Inputs = tuple[Tensor, Tensor, TeacherTopK, Tensor, Tensor]
Step = Callable[[Inputs], Tensor]


def inputs(args: argparse.Namespace, precision: str) -> Inputs:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    n, v, d, k = args.positions, args.vocab, args.width, args.top_k
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = (torch.randn(v, d) / d**0.5).to(dtype).requires_grad_()
    log_probs, _ = torch.randn(n, k).log_softmax(dim=1).sub(0.1).sort(dim=1, descending=True)
    # Distinct in each row; drawn without a permutation of V a row, whose memory the peak would hide behind.
    ids = (torch.randint(v, (n, 1)) + 97 * torch.arange(k)) % v
    tail = torch.log1p(-log_probs.exp().sum(dim=1))
    return hidden, weight, TeacherTopK(ids, log_probs, tail), torch.randint(v, (n,)), torch.ones(n).bool()


def ours(chunk: int, **terms: Term) -> Step:
    objective = Objective(terms, chunk_tokens=chunk)
    return lambda given: fused_loss(*given, objective, 1.0 / len(given[0])).total


def as_users_write_it(given: Inputs) -> Tensor:
    return F.cross_entropy(given[0] @ given[1].T, given[3])


def as_users_write_it_float32(given: Inputs) -> Tensor:
    return F.cross_entropy((given[0] @ given[1].T).float(), given[3])


def bare_matmuls(given: Inputs) -> Tensor:
    """The limit: the three matmuls alone, in chunks of the same size."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else given[1].dtype
    hidden, weight = given[0].detach().to(dtype), given[1].detach().to(dtype)
    of_weight = torch.zeros_like(weight)
    for rows in torch.arange(len(hidden)).split(512):
        logits = hidden[rows] @ weight.T
        _ = logits @ weight
        of_weight.addmm_(logits.T, hidden[rows])
    return hidden.sum()


def candidates(chunk: int) -> dict[str, Step]:
    kd, sft = Distillation, CrossEntropy
    found: dict[str, Step] = {
        "CE as users write it": as_users_write_it,
        "CE, logits to float32": as_users_write_it_float32,
        "bare matmuls": bare_matmuls,
        "fused CE": ours(chunk, sft=sft()),
        "fused KD": ours(chunk, kd=kd()),
        "fused KD + CE": ours(chunk, kd=kd(weight=0.9), sft=sft(weight=0.1)),
        "fused JSD": ours(chunk, kd=kd(divergence="jsd")),
        "fused AKL": ours(chunk, kd=kd(divergence="adaptive_kl")),
        "fused renormalized": ours(chunk, kd=kd(tail="renormalized")),
        "fused uniform tail": ours(chunk, kd=kd(tail="uniform_tail")),
        "fused KD at tau 2 + CE": ours(chunk, kd=kd(tail="truncated", temperature=2.0), sft=sft(weight=0.1)),
    }
    return found


def once(step: Step, given: Inputs, precision: str) -> float:
    given[0].grad = given[1].grad = None
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = step(given)
    if loss.requires_grad:
        loss.backward()
    return time.perf_counter() - started


def times(args: argparse.Namespace, precision: str, steps: dict[str, Step]) -> dict[str, float]:
    given = inputs(args, precision)
    for step in steps.values():
        once(step, given, precision)
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            seen[name].append(once(step, given, precision))
    return {name: median(values) for name, values in seen.items()}


def peak_mib(args: argparse.Namespace, dtype: str, name: str) -> float:
    """Growth of the resident peak over the inputs, in a child that does nothing else."""
    settings = [
        f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("positions", "vocab", "width", "top_k", "chunk")
    ]
    command = [sys.executable, "-m", "benchmarks.losses", *settings, f"--dtypes={dtype}", f"--child={name}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_kib(field: str) -> int:
    """VmRSS is what is resident now, VmHWM the most that was (since `clear_refs`), by Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    given = inputs(args, args.dtypes)
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    once(candidates(args.chunk)[args.child], given, args.dtypes)
    print((resident_kib("VmHWM") - before) / 1024)


def report(args: argparse.Namespace, dtype: str, threads: int, memory: dict[str, float]) -> None:
    torch.set_num_threads(threads)
    steps = {name: step for name, step in candidates(args.chunk).items() if args.only is None or name in args.only}
    found = times(args, dtype, steps)
    base, ce = found["CE as users write it"], found.get("fused CE", float("nan"))
    print(
        f"\n{dtype}, {threads} thread{'s' * (threads > 1)}: "
        f"N={args.positions} V={args.vocab} D={args.width} K={args.top_k}"
    )
    print(f"{'':24}{'seconds':>9}{'/ CE':>8}{'/ fused CE':>12}{'peak MiB':>10}")
    for name, value in found.items():
        mib = f"{memory[name]:10.0f}" if name in memory else ""
        print(f"{name:24}{value:9.3f}{value / base:8.3f}{value / ce:12.3f}{mib}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("positions", 2048),
        ("vocab", 32768),
        ("width", 512),
        ("top-k", 64),
        ("chunk", 512),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", default="float32,bfloat16,autocast")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", nargs="*", help="candidates to run; CE as users write it must be one")
    parser.add_argument("--memory", choices=("yes", "no"), default="yes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, medians of {args.rounds}")
    for dtype in args.dtypes.split(","):
        names = [name for name in candidates(args.chunk) if args.only is None or name in args.only]
        memory = {name: peak_mib(args, dtype, name) for name in names} if args.memory == "yes" else {}
        for threads in args.threads.split(","):
            report(args, dtype, int(threads), memory)
    return None


if __name__ == "__main__":
    main()
