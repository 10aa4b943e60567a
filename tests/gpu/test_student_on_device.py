"""A student on a device, packed rows and gradients, against a dense float64 oracle on the CPU that shares no code.

The oracle attends with a mask [T, T] over the whole row, and makes the logits of all positions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SMALL, StepShape, make_batch, pin
from benchmarks.gpu.training import MeasuredStep, Trainer, random_student
from kd_core.losses.objective import CrossEntropy, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.training.step import batch_loss
from kd_core.types import Batch

ARCHITECTURES = {"whole documents": SMALL, "windows": replace(SMALL, windows=(7, None))}


@dataclass(frozen=True)
class Oracle:
    """The decoder written down again: plain torch on whole rows, in the dtype of its weights."""

    arch: Architecture
    weights: dict[str, Tensor]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.arch.norm_eps).sqrt() * self.weights[f"{name}.weight"]

    def heads(self, x: Tensor, name: str, angles: Tensor | None) -> Tensor:
        """Projects [B, T, D] to [B, H, T, d], and turns channel pairs (i, i + d/2) by the angles [B, T, d/2]."""
        d = self.arch.head_dim
        x = (x @ self.weights[f"{name}.weight"].T).unflatten(-1, (-1, d)).transpose(1, 2)
        if angles is not None:
            real, imaginary = x.unflatten(-1, (2, d // 2)).unbind(dim=-2)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            x = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        return x.repeat_interleave(self.arch.num_heads // x.shape[1], dim=1)

    def attention(self, x: Tensor, layer: int, batch: Batch, angles: Tensor) -> Tensor:
        q, k, v = (
            self.heads(x, f"layers.{layer}.self_attn.{name}_proj", None if name == "v" else angles) for name in "qkv"
        )
        # Query i sees key j of the same document, not behind it, and inside the window.  [B, 1, T, T]
        place = torch.arange(x.shape[1])
        distance = place[:, None] - place
        sees = (batch.document_ids[:, :, None] == batch.document_ids[:, None]) & (distance >= 0)
        if (window := self.arch.window(layer)) is not None:
            sees &= distance < window
        scores = (q @ k.transpose(2, 3) / self.arch.head_dim**0.5).masked_fill(~sees[:, None], -torch.inf)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        return out @ self.weights[f"layers.{layer}.self_attn.o_proj.weight"].T

    def loss(self, batch: Batch) -> Tensor:
        """Returns the sum of −log q(label) over all positions."""
        arch, weights = self.arch, self.weights
        x = weights["embed_tokens.weight"][batch.tokens]
        half = torch.arange(0, arch.head_dim, 2).to(x) / arch.head_dim
        angles = batch.position_ids.to(x)[..., None] * arch.rope_theta**-half
        for layer in range(arch.num_layers):
            name = f"layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), layer, batch, angles)
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (y @ weights[f"{name}.mlp.{which}_proj.weight"].T for which in ("gate", "up"))
            x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
        logits = self.norm(x, "norm") @ weights["embed_tokens.weight"].T
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")


def gradients_of_oracle(arch: Architecture, weights: dict[str, Tensor], batch: Batch, dtype: torch.dtype) -> Any:
    leaves = {name: value.detach().cpu().to(dtype).requires_grad_() for name, value in weights.items()}
    loss = Oracle(arch, leaves).loss(batch)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def worst_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest error over parameters, relative to the norm of each gradient."""
    errors = [
        (gradients[name].double().cpu() - value.double()).norm() / value.norm() for name, value in expected.items()
    ]
    return float(max(errors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("documents", [1, 3])
def test_the_host_waits_for_nothing_before_the_numbers_of_a_step(tmp_path: Path, documents: int) -> None:
    session = Session(torch.device("cuda"), tmp_path, 60.0)
    shape = StepShape("small", rows=2, length=64, top_k=8, documents=documents, chunk=64)
    trainer, batch = Trainer(MeasuredStep(shape), World(device=session.device)), pin(make_batch(shape))
    trainer.take(batch)
    assert session.waits(lambda: trainer.take(batch)) == []


@pytest.mark.parametrize("documents", [1, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_against_a_dense_oracle(device: torch.device, name: str, documents: int) -> None:
    arch, shape = ARCHITECTURES[name], StepShape("small", rows=2, length=48, top_k=4, documents=documents)
    batch, objective = make_batch(shape), Objective({"sft": CrossEntropy()})
    model = random_student(arch, Parallel(), World(device=device))
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    expected, by_oracle = gradients_of_oracle(arch, weights, batch, torch.float64)
    errors: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        model.zero_grad()
        with Parallel(precision=precision).autocast(device):
            result = batch_loss(model, batch.to(device), objective, 1.0)
        result.total.backward()
        errors[precision] = worst_error({name: p.grad for name, p in model.named_parameters()}, by_oracle)
        assert float(result.total.detach()) == pytest.approx(
            float(expected), rel=1e-4 if precision == "float32" else 2e-2
        )
    assert errors["float32"] < 1e-4
    # The naive code with all of it in bfloat16 is the budget of autocast.
    _, naive = gradients_of_oracle(arch, weights, batch, torch.bfloat16)
    assert errors["bfloat16"] < worst_error(naive, by_oracle)
