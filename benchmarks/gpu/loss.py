"""The loss on a device: this project's objectives beside cross-entropies and the bare matmuls, in one run."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import LossShape, objectives
from benchmarks.inputs import Inputs, Step
from kd_core.losses.fused.loss import fused_loss
from kd_core.types import TeacherTopK

PART = "loss"
CHUNKS = (256, 1024, 2048, 4096)
MATMULS, AS_WRITTEN = "the three matmuls", "CE as users write it"


def make_inputs(session: Session, shape: LossShape) -> Inputs:
    """Returns random inputs that are drawn on the device, the same at every call."""
    generator = torch.Generator(session.device).manual_seed(0)
    n, V, D, K = shape.positions, shape.vocab, shape.width, shape.top_k
    made = partial(torch.randn, device=session.device, generator=generator)
    dtype = torch.bfloat16 if shape.precision == "bfloat16" else torch.float32
    hidden, weight = made(n, D).to(dtype).requires_grad_(), (made(V, D) / D**0.5).to(dtype).requires_grad_()
    log_probs = made(n, K).log_softmax(dim=1).sub(0.1).sort(dim=1, descending=True).values
    draw = partial(torch.randint, V, device=session.device, generator=generator)
    # Distinct in each row.
    ids = (draw((n, 1)) + 97 * torch.arange(K, device=session.device)) % V
    teacher = TeacherTopK(ids, log_probs, torch.log1p(-log_probs.exp().sum(dim=1)))
    return Inputs(hidden, weight, teacher, draw((n,)), torch.ones(n, device=session.device, dtype=torch.bool))


def _installed(module: str, name: str) -> Callable[..., torch.Tensor] | None:
    """Returns a function of a library, or None where the library cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def peers() -> dict[str, Step]:
    """Returns the cross-entropies fused with an lm_head of other projects that can be imported.

    Liger-Kernel has several implementations. The environment variable LIGER_KERNEL_IMPL chooses one.
    """
    peer_losses: dict[str, Step] = {}
    # Liger-Kernel 0.8: (weight, hidden, labels). QuACK: (hidden, weight, labels).
    liger = _installed("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    if liger is not None:
        loss = liger()
        function = _installed("liger_kernel.ops", "LigerFusedLinearCrossEntropyFunction")
        language = "CuTe" if ".cute" in getattr(function, "__module__", "") else "Triton"
        peer_losses[f"CE, Liger ({language})"] = lambda inputs: loss(inputs.weight, inputs.hidden, inputs.labels)
    quack = _installed("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    if quack is not None:
        peer_losses["CE, QuACK (CuTe)"] = lambda inputs: quack(inputs.hidden, inputs.weight, inputs.labels)
    return peer_losses


def ours(objective: str, chunk: int) -> Step:
    """Returns this project's loss, a mean over positions."""
    terms = objectives(chunk)[objective]
    return lambda inputs: fused_loss(*inputs, terms, 1.0 / len(inputs.hidden)).total


def three_matmuls(inputs: Inputs, chunk: int) -> None:
    """Multiplies what no exact loss can do without, in chunks, with the weight's gradient in float32."""
    hidden, weight = inputs.hidden.detach().bfloat16(), inputs.weight.detach().bfloat16()
    total = torch.empty(weight.shape, device=weight.device)
    for index, rows in enumerate(hidden.split(chunk)):
        logits = rows @ weight.t()
        logits @ weight
        # The first chunk writes the gradient, so that nothing is filled with zeros or read first.
        if total.device.type != "cuda":
            product = (logits.t() @ rows).float()
            total.add_(product) if index else total.copy_(product)
        elif index:
            torch.addmm(total, logits.t(), rows, out_dtype=torch.float32, out=total)
        else:
            torch.mm(logits.t(), rows, out_dtype=torch.float32, out=total)


def run(session: Session) -> None:
    shape = LossShape(32, 500, 16, 8, chunk=16) if session.tiny else LossShape()
    chunk, chunks = shape.chunk, (8, 16) if session.tiny else CHUNKS
    other_objectives = [name for name in objectives(chunk) if name not in ("CE", "KD + CE")]
    for precision in ("bfloat16", "autocast"):
        inputs = make_inputs(session, LossShape(*list(vars(shape).values())[:-1], precision))
        measured = _Losses(session, inputs, precision, shape)
        measured.add(MATMULS, None)
        measured.add(AS_WRITTEN, lambda inputs: F.cross_entropy(inputs.hidden @ inputs.weight.t(), inputs.labels))
        for name, step in peers().items():
            measured.add(name, step)
        measured.add("loss, KD + CE", ours("KD + CE", chunk))
        measured.add("loss, CE", ours("CE", chunk))
        for size in chunks:
            measured.add(f"loss, KD + CE, chunk {size}", ours("KD + CE", size))
        for name in other_objectives if precision == "bfloat16" else ():
            measured.add(f"loss, {name}", ours(name, chunk))
        del inputs, measured


class _Losses:
    """Losses on the same inputs."""

    def __init__(self, session: Session, inputs: Inputs, precision: str, shape: LossShape) -> None:
        self.session, self.inputs, self.precision, self.shape = session, inputs, precision, shape

    def add(self, name: str, step: Step | None) -> None:
        """Measures one loss, forward and backward, where time is left. None stands for the bare matmuls."""
        if self.session.left() < 10:
            self.session.record(PART, name, precision=self.precision, skipped="no time is left")
        else:
            self.session.attempt(PART, name, partial(self._measure, name, step), precision=self.precision)

    def _measure(self, name: str, step: Step | None) -> None:
        session, inputs = self.session, self.inputs

        def work() -> None:
            inputs.hidden.grad = inputs.weight.grad = None
            if step is None:
                three_matmuls(inputs, self.shape.chunk)
                return
            with torch.autocast(session.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
                loss = step(inputs)
            loss.backward()

        ms = session.milliseconds(work, 3, 2)
        inputs.hidden.grad = inputs.weight.grad = None
        with session.peak_gib() as peak:
            work()
        rate = self.shape.flops / ms / 1e9
        launches = session.launches(work)
        session.record(
            PART, name, precision=self.precision, ms=ms, gib=peak[0], launches=launches, tflops=rate
        )  # fmt: skip
