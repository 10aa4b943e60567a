"""Rates of the device itself: copies, the matmuls of the loss, and attention, also of lengths that are new to it."""

import importlib
import inspect
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.session import Session

PART = "probe"


def run(session: Session) -> None:
    session.record(
        PART, "versions", device=session.device_name, torch=torch.__version__, python=sys.version.split()[0],
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
    )  # fmt: skip
    numbers = torch.empty(2**16 if session.tiny else 2**28, device=session.device)
    ms = session.milliseconds(numbers.clone)
    session.record(PART, "copy", ms=ms, tb_s=2 * numbers.nbytes / ms / 1e9)
    del numbers
    for positions in (16,) if session.tiny else (256, 1024, 2048, 4096):
        session.attempt(PART, f"matmuls of {positions}", partial(_matmuls, session, positions))
    if session.on_gpu:
        session.attempt(PART, "in place", partial(_check_in_place, session))
    session.attempt(PART, "attention", partial(_attention, session))


def _matmuls(session: Session, n: int) -> None:
    """Measures the three matmuls of a chunk, as the loss may write them."""
    V, D = (1000, 32) if session.tiny else (151936, 4096)
    hidden, weight, dlogits = (
        torch.randn(shape, device=session.device).bfloat16() for shape in ((n, D), (V, D), (n, V))
    )  # fmt: skip
    logits, total = torch.empty(n, V, device=session.device), torch.zeros(V, D, device=session.device)
    works = {
        "logits, bfloat16": lambda: hidden @ weight.t(),
        "softmax in place": lambda: torch.softmax(logits, 1, out=logits),
    }
    if session.on_gpu:
        wide = {"out_dtype": torch.float32}
        works |= {
            "logits, float32": lambda: torch.mm(hidden, weight.t(), **wide, out=logits),
            "dhidden, float32": lambda: torch.mm(dlogits, weight, **wide),
            "dweight, added": lambda: total.add_(torch.mm(dlogits.t(), hidden, **wide)),
            "dweight, in place": lambda: torch.addmm(total, dlogits.t(), hidden, **wide, out=total),
        }
    for name, work in works.items():
        ms = session.milliseconds(work, 3, 1)
        rate = 0.0 if "softmax" in name else 2 * n * V * D / ms / 1e9
        session.record(PART, f"{name}, {n} positions", ms=ms, tflops=rate)


def _check_in_place(session: Session) -> None:
    """Checks three assumptions: `addmm` adds in place, strided factors are not copied, softmax works in place."""
    hidden, dlogits = (torch.randn(512, 4096, device=session.device).bfloat16() for _ in range(2))
    base = torch.randn(4096, 4096, device=session.device)
    expected = base.double() + dlogits.t().double() @ hidden.double()
    result = base.clone()
    torch.addmm(result, dlogits.t(), hidden, out_dtype=torch.float32, out=result)
    session.record(PART, "addmm in place", error=float((result - expected).abs().max() / expected.abs().max()))
    # bfloat16 gradients in the first half of float32 memory have rows twice as far apart.
    strided = torch.zeros(512, 8192, device=session.device, dtype=torch.bfloat16)[:, :4096].copy_(dlogits)
    weight = torch.randn(4096, 4096, device=session.device).bfloat16()
    with session.peak_gib() as peak:
        product = torch.mm(strided, weight, out_dtype=torch.float32)
    session.record(PART, "strided factor", peak_gib=peak[0], result_gib=product.nbytes / 2**30)
    logits = torch.randn(512, 50257, device=session.device) * 5
    expected = logits.double().softmax(1)
    error = float((torch.softmax(logits, 1, out=logits) - expected).abs().max())
    session.record(PART, "softmax in place", error=error)


def _attention(session: Session) -> None:
    """Measures attention of one document, of lengths never seen before, and of many documents in one call."""
    H, kv_heads, d = 32, 8, 64

    def inputs(length: int) -> list[Tensor]:
        shapes = [(1, heads, length, d) for heads in (H, kv_heads, kv_heads)]
        made = [torch.randn(shape, device=session.device, dtype=torch.bfloat16) for shape in shapes]
        return [tensor.requires_grad_() for tensor in made]

    def forward_backward(q: Tensor, k: Tensor, v: Tensor) -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

    for length in (17, 31) if session.tiny else (97, 211, 509, 1021, 1999, 4096):
        tensors = inputs(length)
        session.wait()
        started = time.perf_counter()
        forward_backward(*tensors)
        session.wait()
        first = 1e3 * (time.perf_counter() - started)
        again = session.milliseconds(partial(forward_backward, *tensors), 5, 1)
        flops = 3.5 * 2 * H * length * length * d
        session.record(PART, f"attention of {length}", first_ms=first, ms=again, tflops=flops / again / 1e9)
    if session.on_gpu:
        session.attempt(PART, "varlen", partial(_varlen, session, inputs(4 * 4096)))


def _varlen(session: Session, tensors: list[Tensor]) -> None:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    names = inspect.signature(varlen_attn).parameters
    session.record(PART, "varlen, signature", names=list(names))
    q, k, v = (tensor.detach()[0].transpose(0, 1).contiguous().requires_grad_() for tensor in tensors)
    cuts = torch.arange(0, len(q) + 1, 512, device=session.device, dtype=torch.int32)
    options = {"enable_gqa": True} if "enable_gqa" in names else {}

    def packed() -> None:
        varlen_attn(q, k, v, cuts, cuts, 512, 512, window_size=(-1, 0), **options).sum().backward()

    session.record(PART, "varlen, 32 documents of 512", ms=session.milliseconds(packed))
