"""The losses once more, slowly and plainly, in float64: every position by itself, the full softmax over V, lists of
events, formulas as in a textbook, and autograd through it all. Imports nothing of ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Position:
    """One position: the teacher's used entries as (id, log p), its tail, the label, the student's log q over V."""

    entries: list[tuple[int, float]]
    tail: float
    label: int
    log_q: Tensor


Event = tuple[float, Tensor]  # log p, log q


def outside(position: Position) -> list[int]:
    support = {token for token, _ in position.entries}
    return [token for token in range(len(position.log_q)) if token not in support]


def on_entries(position: Position) -> list[Event]:
    return [(log_p, position.log_q[token]) for token, log_p in position.entries]


def tail_bucket(position: Position) -> list[Event]:
    rest = outside(position)
    if not rest:
        return on_entries(position)
    tail = position.tail if position.tail > -math.inf else -30.0
    return [*on_entries(position), (tail, position.log_q[rest].logsumexp(0))]


def log_sum(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).logsumexp(0))


def teacher_renormalized(position: Position, temperature: float = 1.0) -> list[float]:
    scaled = [log_p / temperature for _, log_p in position.entries]
    return [log_p - log_sum(scaled) for log_p in scaled]


def renormalized(position: Position) -> list[Event]:
    if not position.entries:
        return []
    student = torch.stack([log_q for _, log_q in on_entries(position)])
    return list(zip(teacher_renormalized(position), student - student.logsumexp(0), strict=True))


def truncated(position: Position) -> list[Event]:
    return list(zip(teacher_renormalized(position), [q for _, q in on_entries(position)], strict=True))


def uniform_tail(position: Position) -> list[Event]:
    rest = outside(position)
    if not rest or position.tail == -math.inf:
        return on_entries(position)
    each = position.tail - math.log(len(rest))
    return on_entries(position) + [(each, position.log_q[token]) for token in rest]


def residual_to_label(position: Position) -> list[Event]:
    events = []
    for token, log_p in position.entries:
        grown = log_sum([log_p, position.tail]) if token == position.label else log_p
        events.append((grown, position.log_q[token]))
    if position.label not in {token for token, _ in position.entries} and position.tail > -math.inf:
        events.append((position.tail, position.log_q[position.label]))
    return events


TAILS = {
    "tail_bucket": tail_bucket,
    "renormalized": renormalized,
    "truncated": truncated,
    "unnormalized": on_entries,
    "sampled": on_entries,
    "uniform_tail": uniform_tail,
    "residual_to_label": residual_to_label,
}


def mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share · e^first + (1 − share) · e^second)."""
    return torch.logaddexp(math.log(share) + first, math.log(1 - share) + second)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum()


def adaptive(p: Tensor, q: Tensor, head_mass: float = 0.5) -> Tensor:
    """Both KLs, weighed by the gap between p and q in the teacher's head and in the rest."""
    head, rest, mass = 0.0, 0.0, 0.0
    order = sorted(range(len(p)), key=lambda event: -float(p[event]))
    for rank, event in enumerate(order):
        mass += math.exp(float(p[event]))
        gap = abs(math.exp(float(p[event])) - math.exp(float(q[event].detach())))
        if rank == 0 or mass <= head_mass:
            head += gap
        else:
            rest += gap
    share = head / (head + rest) if head + rest > 0 else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def decoupled(p: Tensor, q: Tensor, bucket: bool, head_size: int, head_weight: float, tail_weight: float) -> Tensor:
    """The bucket is the last event, where there is one, and never in the head: head and rest as one, then the rest."""
    entries = len(p) - 1 if bucket else len(p)
    head = sorted(range(entries), key=lambda event: -float(p[event]))[:head_size]
    rest = [event for event in range(len(p)) if event not in head]
    first = kl(p[head], q[head])
    if not rest:
        return head_weight * first
    mass_p, mass_q = p[rest].logsumexp(0), q[rest].logsumexp(0)
    first = first + mass_p.exp() * (mass_p - mass_q)
    second = mass_p.exp() * kl(p[rest] - mass_p, q[rest] - mass_q)
    return head_weight * first + tail_weight * second


def divergence(name: str, p: Tensor, q: Tensor, **numbers: float) -> Tensor:
    """In nats; p and q are logs."""
    beta, skew, share = numbers.get("beta", 0.5), numbers.get("skew", 0.1), numbers.get("reverse_share", 0.5)
    forms = {
        "forward_kl": lambda: kl(p, q),
        "cross_entropy": lambda: -(p.exp() * q).sum(),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: kl(p, mixture(p, q, beta)) / (1 - beta) + kl(q, mixture(p, q, beta)) / beta,
        "skew_kl": lambda: kl(p, mixture(p, q, skew)),
        "skew_reverse_kl": lambda: kl(q, mixture(q, p, skew)),
        "mixed_kl": lambda: (1 - share) * kl(p, q) + share * kl(q, p),
        "adaptive_kl": lambda: adaptive(p, q, numbers.get("head_mass", 0.5)),
        "total_variation": lambda: (p.exp() - q.exp()).abs().sum() / 2,
    }
    return forms[name]()


def position_loss(position: Position, name: str, tail: str, **numbers: float) -> Tensor:
    events = TAILS[tail](position)
    if not events:
        return torch.zeros((), dtype=torch.float64)
    p = torch.tensor([log_p for log_p, _ in events], dtype=torch.float64)
    q = torch.stack([log_q for _, log_q in events])
    if name == "decoupled_kl":
        weights = numbers.get("head_weight", 1.0), numbers.get("tail_weight", 1.0)
        return decoupled(p, q, bool(outside(position)), int(numbers.get("head_size", 10)), *weights)
    return divergence(name, p, q, **numbers)


def positions(log_q: Tensor, teacher: tuple[Tensor, Tensor, Tensor], labels: Tensor, mask: Tensor) -> list[Position]:
    """The scored ones. Log q is [N, V]; the teacher's are ids, log-probs and tail."""
    ids, log_probs, tail = teacher
    found = []
    for n in range(len(mask)):
        if mask[n]:
            pairs = zip(ids[n].tolist(), log_probs[n].double().tolist(), strict=True)
            entries = [(token, log_p) for token, log_p in pairs if log_p > -math.inf]
            found.append(Position(entries, float(tail[n]), int(labels[n]), log_q[n]))
    return found
