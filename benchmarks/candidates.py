"""What `benchmarks/losses.py` compares: cross-entropies, ours, and other projects' losses, by name and objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import unfused
from benchmarks.inputs import Inputs, Step, factors
from benchmarks.peers import axolotl, distillkit, megatron, nemo, trl, verl
from benchmarks.peers.installed import INSTALLED
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.objective import CrossEntropy, Distillation, Objective, Term

CE, FUSED_CE, FUSED_KD, MATMULS = "CE as users write it", "fused CE", "fused KD", "bare matmuls"
RENORMALIZED = "fused renormalized"


@dataclass(frozen=True)
class Candidate:
    """One row. `group`: basics, fused, same (peers with our default objective), others (peers with another)."""

    name: str
    group: str
    objective: str
    make: Callable[[], Step]


@dataclass(frozen=True)
class Absent:
    """A row that says why it has no numbers."""

    name: str
    why: str


def _ours(chunk: int, **terms: Term) -> Step:
    objective = Objective(terms, chunk_tokens=chunk)
    return lambda given: fused_loss(*given, objective, 1.0 / len(given.hidden)).total


def _as_users_write_it(given: Inputs) -> Tensor:
    return F.cross_entropy(given.hidden @ given.weight.T, given.labels)


def _as_users_write_it_float32(given: Inputs) -> Tensor:
    return F.cross_entropy((given.hidden @ given.weight.T).float(), given.labels)


def _torchs_chunked(**settings: Any) -> Step:
    options = torch.nn.LinearCrossEntropyOptions(**settings)
    return lambda given: F.linear_cross_entropy(*factors(given), given.labels, options=options)


def _bare_matmuls(given: Inputs) -> Tensor:
    """The limit: the three matmuls alone, in chunks of 512, without anything between them."""
    hidden, weight = (x.detach() for x in factors(given))
    of_weight = torch.zeros_like(weight)
    for rows in hidden.split(512):
        logits = rows @ weight.T
        _ = logits @ weight
        of_weight.addmm_(logits.T, rows)
    return hidden.sum()


def _torchs(chunk: int) -> list[Candidate | Absent]:
    """`linear_cross_entropy`, which chunks where it is given options: as it chooses itself, and in our chunks."""
    names = ("torch linear CE", "torch linear CE, auto")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [Absent(name, f"not in torch {torch.__version__}") for name in names]
    # Its own choice is many small chunks, on a CPU several times slower, so it runs where the other peers do.
    ours = {"acc_policy": "compact", "chunking_method": None, "batch_chunk_size": chunk}
    return [
        Candidate(names[0], "basics", "cross-entropy", lambda: _torchs_chunked(**ours)),
        Candidate(names[1], "others", "cross-entropy", _torchs_chunked),
    ]


def _basics(chunk: int) -> list[Candidate | Absent]:
    return [
        Candidate(CE, "basics", "cross-entropy", lambda: _as_users_write_it),
        Candidate("CE, logits to float32", "basics", "cross-entropy", lambda: _as_users_write_it_float32),
        *_torchs(chunk),
        Candidate("KD unfused, closed form", "basics", "tail_bucket", lambda: unfused.tail_bucket),
        Candidate(MATMULS, "basics", "none", lambda: _bare_matmuls),
    ]


def _fused(chunk: int) -> list[Candidate | Absent]:
    kd, sft = Distillation, CrossEntropy

    def of(name: str, objective: str, **terms: Term) -> Candidate:
        return Candidate(name, "fused", objective, lambda: _ours(chunk, **terms))

    return [
        of(FUSED_CE, "cross-entropy", sft=sft()),
        of(FUSED_KD, "tail_bucket", kd=kd()),
        of("fused KD + CE", "tail_bucket + CE", kd=kd(weight=0.9), sft=sft(weight=0.1)),
        of("fused reverse KL", "tail_bucket", kd=kd(divergence="reverse_kl")),
        of("fused JSD", "tail_bucket", kd=kd(divergence="jsd")),
        of("fused skew KL", "tail_bucket", kd=kd(divergence="skew_kl")),
        of("fused adaptive KL", "tail_bucket", kd=kd(divergence="adaptive_kl")),
        of("fused decoupled KL", "tail_bucket", kd=kd(divergence="decoupled_kl")),
        of("fused truncated", "truncated", kd=kd(tail="truncated")),
        of("fused unnormalized", "unnormalized", kd=kd(tail="unnormalized")),
        of(RENORMALIZED, "renormalized", kd=kd(tail="renormalized")),
        of("fused renormalized + CE", "renormalized + CE", kd=kd(tail="renormalized"), sft=sft(weight=0.1)),
        of("fused uniform tail", "uniform_tail", kd=kd(tail="uniform_tail")),
        of(
            "fused KD at tau 2 + CE",
            "truncated, tau 2 + CE",
            kd=kd(tail="truncated", temperature=2.0),
            sft=sft(weight=0.1),
        ),
    ]


def _typed_anew() -> list[Candidate | Absent]:
    steps: list[tuple[str, str, Step]] = [
        ("Megatron-LM ghost token", "tail_bucket", megatron.ghost_token),
        ("TRL async", "tail_bucket", trl.chunked_tail),
        ("TRL server", "tail_bucket", trl.server_tail),
        ("DistillKit symmetric", "tail_bucket", distillkit.symmetric_uniform),
        ("NeMo-Aligner K + 1", "tail_bucket", nemo.aligner_with_rest),
        ("NeMo-Aligner", "renormalized", nemo.aligner),
        ("NeMo-RL", "renormalized", nemo.rl),
        ("Axolotl chunked", "renormalized", axolotl.chunked),
        ("NeMo-RL zero outside", "truncated", nemo.rl_zero_outside),
        ("DistillKit zero", "truncated", distillkit.zero),
        ("Axolotl", "truncated", axolotl.forward_kl),
        ("verl", "unnormalized", verl.fsdp),
        ("VeOmni", "unnormalized", verl.veomni),
        ("TRL GKD, rebuilt teacher", "uniform_tail", trl.dense_teacher),
    ]
    return [
        Candidate(name, "same" if objective == "tail_bucket" else "others", objective, lambda step=step: step)
        for name, objective, step in steps
    ]


def _installed() -> list[Candidate | Absent]:
    return [
        Candidate(name, "same" if objective == "tail_bucket" else "others", objective, make)
        for name, (objective, make) in INSTALLED.items()
    ]


def candidates(chunk: int) -> list[Candidate | Absent]:
    """All rows, in the order of the table. Nothing is imported for them yet."""
    return [*_basics(chunk), *_fused(chunk), *_typed_anew(), *_installed()]


def without_what_is_not_installed(rows: list[Candidate | Absent]) -> list[Candidate | Absent]:
    """The same rows, those of packages that cannot be imported replaced by the reason."""

    def tried(row: Candidate | Absent) -> Candidate | Absent:
        if isinstance(row, Candidate) and row.name in INSTALLED:
            try:
                row.make()
            except ImportError as error:
                return Absent(row.name, str(error).splitlines()[0])
        return row

    return [tried(row) for row in rows]


def select(rows: list[Candidate | Absent], groups: tuple[str, ...], only: list[str] | None) -> list[Candidate]:
    """Those of some groups, or of some names; `CE as users write it` is always among them."""
    runnable = [row for row in rows if isinstance(row, Candidate)]
    wanted = [row for row in runnable if (row.group in groups if only is None else row.name in only)]
    return wanted if any(row.name == CE for row in wanted) else [row for row in runnable if row.name == CE] + wanted
