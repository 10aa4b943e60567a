"""Capped attention by chunks of queries, against all pairs at once: time and what the backward pass keeps.

    python -m benchmarks.capped_attention

Both are timed in turns, forward and backward, on one thread in bfloat16, with Gemma 2's cap and grouped heads.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kd_core.document_lengths import Documents
from kd_core.students.decoder.attention import attend

HEADS, KV_HEADS, WIDTH, CAP, ROUNDS = 4, 2, 64, 50.0, 7


def all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products of every query and key, as models of transformers compute them without a kernel."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    products = CAP * torch.tanh(q @ k.mT * WIDTH**-0.5 / CAP)
    mask = torch.full(products.shape[2:], -torch.inf).triu(1)
    return (products + mask).softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Documents.one_a_row(torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64)), soft_cap=CAP)


def seconds(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    begin = time.process_time()
    function(*inputs).sum().backward()
    return time.process_time() - begin


def kept_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*inputs)
    del out
    return sum(storages.values())


def main() -> None:
    torch.set_num_threads(1)
    print("positions | seconds, chunks / all pairs | bytes kept, chunks / all pairs")
    for T in (512, 1024, 2048):
        shapes = [(2, heads, T, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        inputs = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        ways = (in_chunks, all_pairs)
        times = [[seconds(way, inputs) for way in ways] for _ in range(ROUNDS)]
        ours, theirs = (min(column) for column in zip(*times, strict=True))
        kept = [kept_bytes(way, inputs) for way in ways]
        print(f"{T} | {ours:.3f} / {theirs:.3f} = {ours / theirs:.2f} | {kept[0] / kept[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
