"""What distillation adds to a training step of the quick start's student: KD + CE with all metrics against CE alone.

    python -m benchmarks.step                       # both precisions, one thread
    python -m benchmarks.step --rounds 3 --precisions bfloat16

The student of `experiments/half_depth.py`: 15 layers of SmolLM2-135M, 49,152 tokens, tied. Its weights are random,
which changes no shape; two rows of 512 positions with 64 entries each, as one micro-batch. Each round takes one step
with each objective, in turn, on one and the same student. Bar: 1.03 times the time of CE alone.

"All metrics" are what every training step returns. `observe` is what evaluation asks for, shown beside.
"""

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch

from experiments.half_depth import KEEP_LAYERS
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.student import allocate
from kd_core.training.optimizer import AdamW
from kd_core.training.step import train_step
from kd_core.types import Batch

BAR = 1.03
ALONE = "CE alone"

STUDENT = Architecture(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=len(KEEP_LAYERS),
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=8192,
)


def objectives() -> dict[str, Objective]:
    """CE alone, the quick start's objective, and that with the number that evaluation adds."""
    both = {"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}
    return {
        ALONE: Objective({"sft": CrossEntropy()}),
        "KD + CE": Objective(both),
        "KD + CE, observing entropy": Objective(both, observe=("student_entropy",)),
    }


def make_batch(rows: int, length: int, top_k: int) -> Batch:
    """Random tokens, one document a row, every position scored."""
    torch.manual_seed(0)
    shape, vocab = (rows, length), STUDENT.vocab_size
    log_probs, _ = torch.randn(*shape, top_k).mul(2).log_softmax(dim=-1).sub(0.1).sort(dim=-1, descending=True)
    ids = (torch.randint(vocab, (*shape, 1)) + 97 * torch.arange(top_k)) % vocab
    return Batch(
        tokens=torch.randint(vocab, shape),
        labels=torch.randint(vocab, shape),
        loss_mask=torch.ones(shape).bool(),
        position_ids=torch.arange(length).expand(shape),
        document_ids=torch.arange(rows)[:, None].expand(shape),
        topk_token_ids=ids,
        topk_log_probs=log_probs,
        tail_log_prob=torch.log1p(-log_probs.exp().sum(dim=-1)),
        label_log_prob=torch.full(shape, -3.0),
    )


def make_student() -> Decoder:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    model = allocate(meta_decoder(STUDENT), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return model


@dataclass(frozen=True)
class Student:
    """One student for all objectives, so that none of them has the better place in memory."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    batch: Batch
    parallel: Parallel

    def step(self, objective: Objective) -> float:
        """Seconds of one step as training has it."""
        started = time.perf_counter()
        train_step(
            self.model,
            self.optimizer,
            [self.batch],
            objective=objective,
            clip_norm=1.0,
            parallel=self.parallel,
            world=World(),
        )
        return time.perf_counter() - started


def measure(student: Student, rounds: int) -> dict[str, list[float]]:
    """Seconds by name and round; each round begins with another objective. The first, which allocates, is left out."""
    seen: dict[str, list[float]] = {name: [] for name in objectives()}
    for turn in range(rounds + 1):
        order = list(objectives().items())
        first = turn % len(order)
        for name, objective in order[first:] + order[:first]:
            seen[name].append(student.step(objective))
    return {name: seconds[1:] for name, seconds in seen.items()}


def report(args: argparse.Namespace, precision: str) -> None:
    """Interleaved steps at one precision: medians, their ratios, and the medians of the rounds' own ratios."""
    model = make_student()
    batch = make_batch(args.rows, args.length, args.top_k)
    seen = measure(Student(model, AdamW(lr=1e-5).build(model), batch, Parallel(precision=precision)), args.rounds)
    base = seen[ALONE]
    print(f"\n{precision}: {args.rows} rows of {args.length} positions, K={args.top_k}, {args.rounds} rounds")
    print(f"{'':28}{'median s':>10}{'ratio':>8}{'by round':>10}")
    for name, seconds in seen.items():
        by_round = median(one / other for one, other in zip(seconds, base, strict=True))
        print(f"{name:28}{median(seconds):10.3f}{median(seconds) / median(base):8.3f}{by_round:10.3f}")
    ratio = median(seen["KD + CE"]) / median(base)
    print(f"KD + CE over {ALONE}, wanted {BAR}: {ratio:.3f}, {'reached' if ratio <= BAR else 'not reached'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2), ("length", 512), ("top-k", 64), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precisions", default="float32,bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread{'s' * (args.threads > 1)}")
    for precision in args.precisions.split(","):
        report(args, precision)


if __name__ == "__main__":
    main()
