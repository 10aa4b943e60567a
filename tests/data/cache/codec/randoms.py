"""Records that a teacher might have said, and those at the edges of what it can say, from a seed."""

from dataclasses import dataclass

import numpy as np

from data.cache.codec.coding import Coding
from data.cache.codec.rank_tables import fit_tables
from data.cache.record import UNUSED, Array, Record
from data.cache.selection import Selection


@dataclass(frozen=True)
class Case:
    """What records to make. `scale` is how peaked they are: at 3,000 log-probabilities reach −1e4."""

    seed: int
    vocab: int
    lengths: tuple[int, ...]
    selection: Selection
    codec: str
    scale: float
    document: str = "doc"
    ragged: bool = False
    pilot_weight: int = 1  # the tables are those of a cache so many times as large


def _position(rng: np.random.Generator, case: Case, ids: Array) -> dict[str, Array | float]:
    """What the teacher says at one position; `ids` are distinct."""
    K, S = min(case.selection.top_k, case.vocab - 1), case.selection.draws
    count = int(rng.integers(0, K + 1)) if case.ragged else K
    logits = rng.normal(size=count + 1) * case.scale
    if count and rng.random() < 0.2:
        logits[-1] = -np.inf  # no tail at all
    logs = logits - logits.max()
    logs = (logs - np.log(np.exp(logs).sum())).astype(np.float32)
    entries = np.full(K, UNUSED, np.float32)
    entries[:count] = logs[:count]
    tail = float(logs[-1])
    weights = np.full(S, UNUSED, np.float32)
    distinct = int(rng.integers(1, min(S, len(ids) - K) + 1)) if S and tail > UNUSED else 0
    if distinct:
        times = 1 + rng.multinomial(S - distinct, np.full(distinct, 1 / distinct))
        weights[:distinct] = np.log(times / S).astype(np.float32) + np.float32(tail)
        if case.selection.proposal_temperature != 1:
            weights[:distinct] += rng.normal(size=distinct).astype(np.float32)
    label, own = int(ids[-1]), float(min(0.0, tail - rng.exponential()))
    if count and rng.random() < 0.5:
        label, own = int(ids[at := int(rng.integers(count))]), float(logs[at])
    samples = np.resize(ids[K:], S) if S else ids[:0]
    return {"ids": ids[:K], "logs": entries, "tail": tail, "samples": samples, "weights": weights, "label": label,
            "own": own}  # fmt: skip


def _record(rng: np.random.Generator, case: Case, number: int, positions: int) -> Record:
    K, S = min(case.selection.top_k, case.vocab - 1), case.selection.draws
    wanted = min(case.vocab, K + S + 1)
    said = []
    for _ in range(positions):
        ids = rng.choice(case.vocab, wanted, replace=False)
        if rng.random() < 0.3 and not {0, case.vocab - 1} & set(ids.tolist()):
            ids[0], ids[-1] = 0, case.vocab - 1
        said.append(_position(rng, case, ids))
    column = {name: np.array([each[name] for each in said]) for name in said[0]}
    return Record(
        name=f"{number:08d}",
        document=case.document,
        start=int(rng.integers(1 << 20)),
        token_ids=np.concatenate([rng.integers(0, min(case.vocab, 4), 1), column["label"]]).astype(np.int32),
        loss_mask=rng.integers(0, 2, positions).astype(np.uint8),
        topk_token_ids=column["ids"].reshape(positions, K).astype(np.int32),
        topk_log_probs=column["logs"].reshape(positions, K).astype(np.float32),
        tail_log_prob=column["tail"].astype(np.float32),
        label_log_prob=column["own"].astype(np.float32),
        tempered_tails={
            t: rng.uniform(-200, 15, positions).astype(np.float32) for t in case.selection.tail_temperatures
        },
        sampled_token_ids=column["samples"].reshape(positions, S).astype(np.int32) if S else None,
        sampled_log_weights=column["weights"].reshape(positions, S).astype(np.float32) if S else None,
    )


def make(case: Case) -> tuple[list[Record], Coding]:
    """Records, and how they are coded."""
    rng = np.random.default_rng(case.seed)
    records = [_record(rng, case, number, positions) for number, positions in enumerate(case.lengths)]
    tables = fit_tables(records, case.vocab, case.pilot_weight * sum(case.lengths))
    return records, Coding(tables, case.selection, case.codec)


def by_id(ids: Array, logs: Array) -> list[list[tuple[int, float]]]:
    """The used entries of each position, by rising id."""
    rows = zip(ids.tolist(), logs.tolist(), strict=True)
    return [sorted((i, log) for i, log in zip(*row, strict=True) if log > UNUSED) for row in rows]
