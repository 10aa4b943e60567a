"""What other systems' formats change of a teacher, as their caches are read by `launchers.convert`.

    python -m benchmarks.converted_error quickstart/teacher quickstart/corpus [positions]

A teacher scores windows of a corpus. Its likeliest entries are written as each format writes them and read as the
conversion reads them. KL is KL(original‖read) over entries and tail, in nats a position. DistillKit's curves are fitted
here by least squares, as its code does. Decoding is that of `data/importers/formats/distillkit_codec.py`, which is
tested against DistillKit's own code.
"""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.cache.record import Array
from data.importers.formats.distillkit_codec import CurveCodec, LegacyCodec
from data.importers.parsed_entries import Entries, from_log_probs, from_logits
from data.tokenizer import Tokenizer
from kd_core.students.starts.start import Pretrained, build_student

WINDOW = 256
Read = Callable[[Array, Array], tuple[int, Entries]]
"""Writes and reads falling log-probabilities [n, k]; returns the k that it keeps and the entries."""
CURVES = {
    "DistillKit, recommended (k = 128)": CurveCodec(
        1 << 17, 128, 16, torch.bfloat16, (0, 1, 2, 3, 4, "sqrt"), delta_encoding=False
    ),
    "DistillKit, its budget pick (k = 50)": CurveCodec(
        1 << 17, 50, 1, torch.bfloat16, (0, 1, "sqrt"), delta_encoding=False
    ),
    "DistillKit, published captures (k = 128)": CurveCodec(1 << 17, 128, 32, torch.float32, (0, 1, 2)),
}
LEGACY = LegacyCodec(1 << 17, 128, 32, 8)


def _fit(terms: Array, values: Array) -> Array:
    """Returns coefficients [n, terms] of curves through values [n, places], in float32 as they are stored."""
    return np.linalg.lstsq(terms, values.T.astype(np.float64), rcond=None)[0].T.astype(np.float32, order="C")


def _curve(codec: CurveCodec) -> Read:
    at = np.arange(codec.k - codec.exact_k, dtype=np.float64)
    terms = np.stack([np.sqrt(at) if term == "sqrt" else at ** int(term) for term in codec.polynomial_terms], axis=1)

    def read(ids: Array, logs: Array) -> tuple[int, Entries]:
        values = logs[:, : codec.k].astype(np.float32)
        stored = np.diff(values, axis=1, prepend=0) if codec.delta_encoding else values
        exact = torch.from_numpy(stored[:, : codec.exact_k].copy()).to(codec.exact_dtype).view(torch.uint8).numpy()
        curve = _fit(terms, stored[:, codec.exact_k :]).view(np.uint8)
        decoded = codec.decode(np.concatenate([exact, curve], axis=1)).astype(np.float64)
        return codec.k, from_log_probs(ids[:, : codec.k], decoded, most_mass=np.inf)

    return read


def _legacy(ids: Array, logs: Array) -> tuple[int, Entries]:
    at = np.arange(LEGACY.k - LEGACY.exact_k, dtype=np.float64) + 1
    terms = np.stack([at**-i for i in range(LEGACY.polynomial_degree + 1)], axis=1)
    exact = logs[:, : LEGACY.exact_k].astype(np.float16).astype(np.float32)
    decoded = LEGACY.decode(exact, _fit(terms, logs[:, LEGACY.exact_k : LEGACY.k])).astype(np.float64)
    return LEGACY.k, from_logits(ids[:, : LEGACY.k], decoded)


def _rounded(dtype: torch.dtype) -> Read:
    def read(ids: Array, logs: Array) -> tuple[int, Entries]:
        values = torch.from_numpy(logs[:, :64].copy()).to(dtype).double().numpy()
        return 64, from_log_probs(ids[:, :64], values, most_mass=np.inf)

    return read


READERS: dict[str, Read] = {
    **{name: _curve(codec) for name, codec in CURVES.items()},
    "DistillKit, legacy (k = 128), renormalised": _legacy,
    "Megatron-LM, float16 (k = 64)": _rounded(torch.float16),
    "Megatron-LM, bfloat16 (k = 64)": _rounded(torch.bfloat16),
    "float32 (k = 64)": _rounded(torch.float32),
}


def divergence(logs: Array, read: Entries) -> Array:
    """Returns KL(original‖read) of each position, [n]. Where the tail is not known, both sides are renormalised."""
    p, q = logs, read.logs
    if not read.is_tail_known:
        p = p - np.log(np.exp(p).sum(axis=1, keepdims=True))
        return (np.exp(p) * (p - q)).sum(axis=1)
    rest = 1 - np.exp(p).sum(axis=1)
    # A mass that was read above 1 left no tail. Count it as one of 1e-6.
    tail = np.maximum(read.tail, np.log(1e-6))
    return (np.exp(p) * (p - q)).sum(axis=1) + rest * (np.log(rest) - tail)


def score(teacher: Path, corpus: Path, positions: int) -> tuple[Array, Array]:
    """Returns ids and float64 log-probabilities [positions, 128] of the teacher's likeliest entries."""
    model = build_student(Pretrained(str(teacher)), torch.device("cpu"), seed=0)
    tokenizer = Tokenizer(teacher)
    texts = (path.read_text(errors="replace")[:4000] for path in sorted(corpus.rglob("*.txt")))
    windows = (ids for text in texts if len(ids := tokenizer.encode([text])[0][:WINDOW]) == WINDOW)
    found = list[tuple[Array, Array]]()
    for ids in islice(windows, positions // WINDOW):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens, torch.arange(WINDOW)[None], torch.zeros_like(tokens))[0].double()
        best = torch.log_softmax(logits, dim=1).topk(128, dim=1)
        found.append((best.indices.numpy(), best.values.numpy()))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([logs for _, logs in found])


def main() -> None:
    teacher, corpus = map(Path, sys.argv[1:3])
    ids, logs = score(teacher, corpus, int(sys.argv[3]) if len(sys.argv) > 3 else 4096)
    print("| format | KL, mean | KL, 99% | worst entry, nats | mass above 1 |\n|---|---|---|---|---|")
    for name, read in READERS.items():
        k, entries = read(ids, logs)
        kl = divergence(logs[:, :k], entries)
        above = np.isneginf(entries.tail).mean() if entries.is_tail_known else 0.0
        worst = np.abs(entries.logs - logs[:, :k]).max() if entries.is_tail_known else float("nan")
        print(f"| {name} | {kl.mean():.1e} | {np.quantile(kl, 0.99):.1e} | {worst:.3f} | {above:.1%} |")
    print(f"{len(ids)} positions; the teacher's top 64 hold {np.exp(logs[:, :64]).sum(axis=1).mean():.3f}")


if __name__ == "__main__":
    main()
