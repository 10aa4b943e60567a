"""Dense attention in float64 with a mask of N × N, and the same in place of the kernel behind torch's `varlen_attn`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kd_core.students.decoder import attention

Numbers = tuple[Tensor, Tensor]  # of the documents of queries [N] and of keys [M], whose last ones are at one position


def _from_the_end(documents: Tensor) -> Tensor:
    """How many positions behind it a document has, itself included, [N]."""
    return (documents[:, None] == documents).triu().sum(1)


def _scores(q: Tensor, k: Tensor, documents: Tensor | Numbers, scale: float | None, left: int) -> Tensor:
    """Masked products of queries and repeated keys, float64 [H, N, M]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    of_q, of_k = documents if isinstance(documents, tuple) else (documents, documents)
    distance = _from_the_end(of_k) - _from_the_end(of_q)[:, None]
    seen = (distance >= 0) & (of_q[:, None] == of_k)
    if left >= 0:
        seen &= distance <= left
    return scores.masked_fill(~seen, -torch.inf)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | Numbers, scale: float | None, left: int
) -> tuple[Tensor, Tensor]:
    """Output [N, H, d] and log-sum-exp [H, N] of q [N, H, d] and k, v [M, H_kv, d], documents numbered in [N], [M].

    `left` positions before its own are seen by a position, all of its document where it is negative.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = _scores(q, k, documents, scale, left)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def dense_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | Numbers, scale: float | None, left: int
) -> tuple[Tensor, ...]:
    """Gradients of `dense_attention` by hand, because an operator's kernel runs below autograd."""
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    grad, q, k, v = (x.double() for x in (grad, q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    p = _scores(q, k, documents, scale, left).softmax(-1)
    # dP = dO Vᵀ, dS = P ⊙ (dP − Σ P ⊙ dP).  [H, N, N]
    dp = torch.einsum("qhd,khd->hqk", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * (q.shape[2] ** -0.5 if scale is None else scale)
    dq, dk = torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, q)
    dv = torch.einsum("hqk,qhd->khd", p, grad)
    # A key head's gradient is the sum over its group of queries' heads.
    return dq, *(x.unflatten(1, (heads, groups)).sum(2) for x in (dk, dv))


def _numbers(*cu_seqlens: Tensor) -> Numbers:
    of_q, of_k = (torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff()) for bounds in cu_seqlens)
    return of_q, of_k


class Kernel:
    """What stands in for the kernel: checks its arguments as it would, and computes densely. `calls` keeps bounds."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def _check(self, q: Tensor, cu_seqlens: Tensor, longest: int, window: list[int], is_causal: bool) -> None:
        assert cu_seqlens.dtype == torch.int32
        assert int(cu_seqlens[0]) == 0
        assert int(cu_seqlens[-1]) == len(q)
        assert int(cu_seqlens.diff().min()) >= 0
        assert int(cu_seqlens.diff().max()) <= longest
        assert window[1] == 0
        assert is_causal == (window[0] == -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *more: Any) -> tuple[Tensor, ...]:
        max_q, max_k, is_causal, scale, window = more[:5]
        assert bool((cu_q.diff() <= cu_k.diff()).all())
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in attention.KERNEL_DTYPES
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        self._check(q, cu_q, max_q, window, is_causal)
        self._check(k, cu_k, max_k, window, is_causal)
        self.calls.append((max_q, window))
        out, logsumexp = dense_attention(q, k, v, _numbers(cu_q, cu_k), scale, window[0])
        return torch.empty_like(q).copy_(out), logsumexp.float(), torch.zeros(2, dtype=torch.uint64)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, ...]:
        _, _, cu_q, cu_k, max_q, max_k, is_causal, _, scale, window = more
        self._check(q, cu_q, max_q, window, is_causal)
        self._check(k, cu_k, max_k, window, is_causal)
        found = dense_gradients(grad, q, k, v, _numbers(cu_q, cu_k), scale, window[0])
        return tuple(torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), found, strict=True))


def dense_kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Computes torch's variable-length operators densely on the CPU, and lets attention use them there.

    torch's own wrapper, its checks, its autograd formula and its shapes for tracing stay in place.
    """
    from torch.nn.attention import varlen  # noqa: PLC0415 (imports the compiler)

    kernel = Kernel()
    # Only the innermost function of each operator is replaced: what would launch Flash Attention.
    varlen._varlen_attn.register_kernel("cpu", kernel.forward)
    varlen._varlen_attn_backward.register_kernel("cpu", kernel.backward)
    monkeypatch.setattr(attention, "KERNEL_DEVICES", ("cpu",))
    return kernel
