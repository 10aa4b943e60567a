"""Attention over packed documents: one split of the rows (ours) against a slice for each document.

    python -m benchmarks.packed_attention [--threads 2] [--device cpu]

Forward and backward of one layer's attention, rows of 2,048 positions, the heads of the quick start's student. Both
ways give the same bits, which is checked. Prints medians in turn, and the ratio of the backward passes.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from kd_core.document_lengths import Documents
from kd_core.students.decoder.attention import attend, attend_document

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH, ROUNDS = 2, 2048, 9, 3, 64, 7


def attend_by_slices(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The way before: every slice's backward pass writes a gradient of the whole tensor."""
    rows: list[list[Tensor]] = [[] for _ in range(len(q))]
    begin = 0
    for length in documents.lengths:
        row, start = divmod(begin, LENGTH)
        q_doc, k_doc, v_doc = (x[row : row + 1, :, start : start + length] for x in (q, k, v))
        rows[row].append(attend_document(q_doc, k_doc, v_doc, None, None))
        begin += length
    return torch.cat([torch.cat(row, dim=2) for row in rows])


def seconds(
    way: Callable[..., Tensor], inputs: list[Tensor], documents: Documents, device: str
) -> tuple[float, float, list[Tensor]]:
    """Seconds of forward and of backward, and the output with all gradients."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for x in inputs:
        x.grad = None
    q, k, v = (x.view(ROWS, LENGTH, -1, WIDTH).transpose(1, 2) for x in inputs)
    wait()
    started = time.perf_counter()
    out = way(q, k, v, documents)
    wait()
    between = time.perf_counter()
    out.backward(torch.ones_like(out) / 7)
    wait()
    gradients = [x.grad for x in inputs if x.grad is not None]
    return between - started, time.perf_counter() - between, [out.detach(), *gradients]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    inputs = [
        torch.randn(ROWS, LENGTH, heads * WIDTH, device=options.device).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    print("documents a row    forward, ms: slices  split    backward, ms: slices  split   ratio")
    for number in (2, 4, 8, 16, 32):
        ids = (torch.arange(LENGTH) // (LENGTH // number)).expand(ROWS, LENGTH)
        documents = Documents.from_ids(ids)
        times: dict[str, list[tuple[float, float]]] = {"slices": [], "split": []}
        results: dict[str, list[Tensor]] = {}
        for _ in range(ROUNDS):
            for name, way in (("slices", attend_by_slices), ("split", attend)):
                forward, backward, results[name] = seconds(way, inputs, documents, options.device)
                times[name].append((forward, backward))
        assert all(torch.equal(one, other) for one, other in zip(*results.values(), strict=True)), "other bits"
        forward, backward = ({name: 1e3 * median(t[i] for t in seen) for name, seen in times.items()} for i in (0, 1))
        print(
            f"{number:>15} {forward['slices']:>22.1f} {forward['split']:>6.1f} {backward['slices']:>23.1f} "
            f"{backward['split']:>6.1f} {backward['split'] / backward['slices']:>7.2f}"
        )


if __name__ == "__main__":
    main()
