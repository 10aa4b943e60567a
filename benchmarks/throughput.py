"""A training step of the quick start's student: its share of the machine's own matmul rate, and against transformers.

    python -m benchmarks.throughput                             # both precisions, two threads
    python -m benchmarks.throughput --rounds 3 --precisions float32

The step is the one of `benchmarks.step`: 81M parameters, 49,152 tokens, two rows of 512 positions with 64 entries
each, KD + CE, clipped, AdamW. Both sides share weights, batch, optimiser and precision (autocast in bfloat16). The
other side is written as users write it: `LlamaForCausalLM`, logits of all positions, log-softmax in float32, the KL
over K + 1 events from it, cross-entropy, `backward`, `clip_grad_norm_`, `step`.

Arithmetic of a step: 6 per weight of a matmul and position (head included, the embedding's look-up not), and
6 · T · width per position and layer for causal attention; what is computed again does not count again. The machine's
rate is the best of several matmuls, square and of the student's own shapes, in the precision that the step multiplies
in, measured in every round.

Bars: 75% of the matmul rate in float32, 50% in bfloat16; 1.3 times as fast as transformers.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step import STUDENT, make_batch, make_student
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.precision import DTYPES
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.huggingface.config_json import config_fields
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step
from kd_core.types import Batch

SHARES = {"float32": 0.75, "bfloat16": 0.5}
FASTER = 1.3
OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)})
CLIP = 1.0


def arithmetic(rows: int, length: int) -> float:
    """Operations of a step's matmuls, forward and backward."""
    arch = STUDENT
    width, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    block = arch.hidden_size * (2 * width + 2 * kv + 3 * arch.intermediate_size)
    weights = arch.num_layers * block + arch.vocab_size * arch.hidden_size
    return rows * length * 6.0 * (weights + arch.num_layers * length * width)


def matmul_rate(positions: int, precision: str) -> float:
    """The machine's best rate in operations a second over some shapes, each the faster of two runs."""
    arch, best = STUDENT, 0.0
    D, wide = arch.hidden_size, arch.intermediate_size
    for m, k, n in (
        (2048, 2048, 2048), (positions, D, wide), (positions, wide, D), (positions, D, arch.vocab_size)
    ):  # fmt: skip
        left, right = (torch.randn(shape, dtype=DTYPES[precision]) for shape in ((m, k), (k, n)))
        out = torch.mm(left, right)
        for _ in range(2):
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2.0 * m * k * n / (time.perf_counter() - started))
    return best


def dense_loss(logits: Tensor, batch: Batch) -> Tensor:
    """As it is written by hand: KL over the teacher's entries and the rest, and cross-entropy, means over positions."""
    logs = F.log_softmax(logits.float(), dim=-1)
    student = logs.gather(-1, batch.topk_token_ids.long())
    rest = torch.log1p(-student.exp().sum(dim=-1).clamp(max=1 - 1e-6))
    teacher, tail = batch.topk_log_probs, batch.tail_log_prob
    kl = (teacher.exp() * (teacher - student)).sum(dim=-1) + tail.exp() * (tail - rest)
    ce = F.nll_loss(logs.flatten(0, 1), batch.labels.flatten())
    return 0.9 * kl.mean() + 0.1 * ce


def transformers_twin(model: Decoder) -> Any:
    """The same student as transformers has it, with the same weights."""
    settings = {k: v for k, v in config_fields(STUDENT, None, None, "float32").items() if k != "architectures"}
    twin = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    twin.load_state_dict({f"model.{k}" if k != "lm_head.weight" else k: v for k, v in model.state_dict().items()})
    return twin.train()


@dataclass(frozen=True)
class Sides:
    """Steps by name, each returning its loss."""

    steps: dict[str, Callable[[], float]]

    @classmethod
    def make(cls, batch: Batch, parallel: Parallel) -> "Sides":
        """Ours and transformers', from the same weights."""
        model, device = make_student(), torch.device("cpu")
        twin = transformers_twin(model)
        optimizer, other = (AdamW(lr=1e-5).build(each) for each in (model, twin))

        def ours() -> float:
            found = train_step(model, optimizer, [batch], objective=OBJECTIVE, clip_norm=CLIP, parallel=parallel,
                               world=World())  # fmt: skip
            return found.sums["loss"] / found.tokens

        def theirs() -> float:
            with parallel.autocast(device):
                loss = dense_loss(twin(batch.tokens, use_cache=False).logits, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
            other.step()
            other.zero_grad()
            return float(loss.detach())

        return cls({"ours": ours, "transformers, dense loss": theirs})


def report(args: argparse.Namespace, precision: str) -> None:
    batch = make_batch(args.rows, args.length, args.top_k)
    sides = Sides.make(batch, Parallel(precision=precision))
    seconds: dict[str, list[float]] = {name: [] for name in sides.steps}
    rates: list[float] = []
    for turn in range(args.rounds + 1):
        order = list(sides.steps.items())
        losses: list[float] = []
        for name, step in order[turn % 2 :] + order[: turn % 2]:
            rates.append(matmul_rate(args.rows * args.length, precision))
            started = time.perf_counter()
            losses.append(step())
            seconds[name].append(time.perf_counter() - started)
        if turn == 0:
            assert abs(losses[0] - losses[1]) < 2e-2 * losses[0], losses  # both compute the same
    kept = {name: found[1:] for name, found in seconds.items()}
    rate, wanted = median(rates), arithmetic(args.rows, args.length)
    print(f"\n{precision}: {wanted / 1e9:.0f} G operations a step; the machine multiplies at {rate / 1e9:.0f} G/s")
    for name, found in kept.items():
        print(f"{name:28}{median(found):9.3f} s{wanted / median(found) / rate:9.1%} of the matmul rate")
    share, faster = wanted / median(kept["ours"]) / rate, median(
        b / a for a, b in zip(*kept.values(), strict=True)
    )  # fmt: skip
    for what, found, bar in (("share", share, SHARES[precision]), ("times transformers", faster, FASTER)):
        print(f"{what}: {found:.2f}, wanted {bar}: {'reached' if found >= bar else 'not reached'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2), ("length", 512), ("top-k", 64), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precisions", default="float32,bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads; {args.rows} rows of {args.length}, K={args.top_k}")
    for precision in args.precisions.split(","):
        report(args, precision)


if __name__ == "__main__":
    main()
