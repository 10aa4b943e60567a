"""Does the teacher say the same twice? Measured before an export begins, on all ranks, and recorded in the manifest.

Some teachers answer differently on every call: kernels that add in another order, batches that are composed anew. What
differs is noise in the cache, which nothing behind it can see.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.cache.selection import Selection
from data.corpus.windows import Window
from data.export.extend import read_object, write_object
from data.export.plan import CachePlan
from data.export.spool.draw import no_window
from data.storage.storage import Storage
from data.teacher.entry_scorer import EntryScorer
from data.teacher.scorer import AnyScorer, ranks_of, score_rows
from data.teacher.select import TeacherScores
from kd_core.errors import UsageError
from kd_core.files import damage_as_usage_error
from kd_core.json_fields import check_list, check_object
from kd_core.parallel.collectives import run_on_all_ranks
from kd_core.parallel.world import World

SCORED_BY_FILE = "scored_by.json"  # until the manifest is written, which holds the same
PROBE_ROWS, PROBE_LENGTH, PROBE_ENTRIES = 2, 128, 64
# A tail of entries is 1 − Σp, whose rounding alone changes the logarithm of a smaller one.
SMALLEST_COMPARED_TAIL = 1e-3


class Spread(NamedTuple):
    """Differences between passes over the same positions, in nats.

    `largest` is that of a log-probability, of an entry or of the tail. `kl` is the mean over positions.
    """

    positions: int
    largest: float
    kl: float


def _score_probe(model: AnyScorer, windows: list[Window], most_entries: int) -> TeacherScores:
    """Scores the beginning of the first windows. Padding is scored as any other token."""
    length = min(PROBE_LENGTH, max(window.positions for window in windows))
    tokens = torch.zeros(len(windows), length + 1, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids = torch.from_numpy(window.token_ids[: length + 1])
        tokens[row, : len(ids)] = ids
    documents = torch.arange(len(windows))[:, None].repeat(1, length)
    selection = Selection(min(PROBE_ENTRIES, most_entries))
    uniforms = torch.zeros(documents.numel(), 0, device=model.device)
    scores = score_rows(model, tokens.to(model.device), documents.to(model.device), selection, uniforms)
    return TeacherScores(*(field.cpu() for field in scores))


def spread_between(one: TeacherScores, other: TeacherScores) -> Spread:
    """Compares two passes over the same positions."""
    # Each entry of the one as the other has it, [n, K]. What is no entry there is at most its smallest entry.
    same = one.ids[:, :, None] == other.ids[:, None, :]  # [n, K, K]
    matched = same.any(dim=2)
    p, q = one.log_probs.double(), other.log_probs.double()
    theirs = torch.where(matched, q.gather(1, same.to(torch.uint8).argmax(dim=2)), q.amin(dim=1, keepdim=True))
    changes = [_difference(p, theirs).flatten(), _difference(one.tail_log_prob, other.tail_log_prob)]
    largest = torch.cat(changes).abs().max()
    # KL over the common entries, and one bucket of all other tokens.  [n]
    unused = torch.where(matched, -torch.inf, p)
    common = torch.where(matched, p.exp() * _difference(p, theirs), 0.0).sum(dim=1)
    rest = torch.logaddexp(one.tail_log_prob.double(), unused.logsumexp(dim=1))
    kl = common + rest.exp() * _difference(rest, _rest(other, same.any(dim=1)))
    return Spread(len(p), float(largest), float(kl.mean().clamp(min=0.0)))


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Returns one − other, which is 0 where both are −inf."""
    return torch.where(one == other, 0.0, one - other)


def _rest(scores: TeacherScores, matched: Tensor) -> Tensor:
    """Returns the log-mass of all tokens but the matched entries.  [n]"""
    unmatched = torch.where(matched, -torch.inf, scores.log_probs.double())
    return torch.logaddexp(scores.tail_log_prob.double(), unmatched.logsumexp(dim=1))


def measure_spread(plan: CachePlan, model: AnyScorer, world: World) -> Spread:
    """Scores some positions twice on every rank, and compares all passes with the first one of the first rank.

    Raises:
        UsageError: they differ by more than `max_spread`, or the cache has no window.
    """
    windows = list(itertools.islice(plan.windows, PROBE_ROWS))
    if not windows:
        raise no_window(plan.export, plan.identity["split"])
    # A server refuses more entries than it was started for (--max-logprobs), so it is asked for no more than later.
    gives_entries = isinstance(model, EntryScorer)
    most_entries = plan.export.selection.top_k if gives_entries else plan.teacher.vocab_size - 1

    def score() -> TeacherScores:
        scores = _score_probe(model, windows, most_entries)
        if not gives_entries:
            return scores
        floor = torch.full_like(scores.tail_log_prob, math.log(SMALLEST_COMPARED_TAIL))
        return scores._replace(tail_log_prob=torch.logaddexp(scores.tail_log_prob, floor))

    passes = [score(), score()]
    reference = world.run_on_first(lambda: passes[0])
    spreads = run_on_all_ranks(world, lambda: [spread_between(reference, scores) for scores in passes])
    # What is no number is the worst.
    worst = max(
        (spread for by_rank in spreads for spread in by_rank), key=lambda s: (s.largest != s.largest, s.largest)
    )
    bound = plan.export.max_spread
    if not worst.largest <= bound:  # also where it is no number
        raise UsageError(
            f"{plan.export.teacher}: gives other log-probabilities each time, by up to {worst.largest:.3g} nats (a KL "
            f"of {worst.kl:.3g}) over {worst.positions} positions scored twice on {world.size} ranks; wanted at most "
            f"max_spread={bound:g}. Use deterministic kernels or another scorer or dtype, or accept it as noise of the "
            "cache: raise max_spread."
        )
    return worst


def _recorded(storage: Storage) -> list[Any]:
    if storage.size(SCORED_BY_FILE) is None:
        return []
    role = "a record of the ranks that scored a cache"
    with damage_as_usage_error(storage.url(SCORED_BY_FILE), role, "Delete it and run again"):
        starts = check_list(read_object(storage, SCORED_BY_FILE, role)["starts"], "starts")
        return [check_object(entry, "an entry") for entry in starts]


def record_scoring(plan: CachePlan, model: AnyScorer, spread: Spread, ranks: int) -> None:
    """Adds this start to the cache's folder: how its teacher was laid out, and how closely it repeated itself."""
    layout = ranks_of(model).layout
    entry = {
        "ranks": ranks, "tensor_parallel": layout.tensor, "shards": layout.shards, "positions": spread.positions,
        "spread": spread.largest, "spread_kl": spread.kl,
    }  # fmt: skip
    write_object(plan.storage, SCORED_BY_FILE, {"starts": [*_recorded(plan.storage), entry]})


def scored_by(plan: CachePlan) -> list[Any]:
    """Returns the records of all starts that scored a cache, those of exports that it has grown by included."""
    before = plan.grown_from.made.get("scored_by", []) if plan.grown_from else []
    return [*(before if isinstance(before, list) else []), *_recorded(plan.storage)]
