"""Values of the student itself in the objective: counted once, at positions of text, in any layout of the step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.base.checks import check_auxiliary
from kd_core.errors import UsageError
from kd_core.losses.objective import Auxiliary, CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Context, Decoder
from kd_core.students.decoder.transformer_block import TransformerBlock
from kd_core.training.evaluation import EvaluationRequest, evaluate
from kd_core.training.step import StepSums, batch_loss, train_step
from kd_core.types import Batch
from tests.kd_core.parallel.test_layouts import ARCH, PLAIN, ROWS, Looks, first_weights, put, rows_of, whole

TERMS = {"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}
OBJECTIVE = Objective({**TERMS, "energy": Auxiliary(weight=0.3, name="energy")}, chunk_tokens=7)


class EnergyBlock(TransformerBlock):
    """A block that also returns the mean square of its output, [B, T]."""

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Any) -> tuple[Tensor, Tensor]:
        y = super().run(x, cos, sin, documents)
        assert isinstance(y, Tensor)
        return y, y.square().mean(dim=-1)


class Energetic(Decoder):
    """A decoder whose blocks give a value at each position."""

    auxiliary_names = ("energy",)

    def __init__(self) -> None:
        super().__init__(ARCH, EnergyBlock)

    def auxiliary_values(self, context: Context, is_text: Tensor) -> dict[str, Tensor]:
        assert is_text.dtype == torch.bool
        assert context.block_values is not None
        return {"energy": torch.stack(context.block_values).sum(dim=0)}


def energetic() -> Energetic:
    with torch.device("meta"):
        return Energetic()


def student(parallel: Parallel, world: World) -> Energetic:
    model, weights = parallelize(energetic(), parallel, world), first_weights(energetic)
    for name, parameter in model.named_parameters():
        put(parameter, weights[name])
    assert isinstance(model, Energetic)
    return model


def padded(rows: range) -> Batch:
    """Rows whose last two positions are padding."""
    batch = rows_of(0, rows)
    is_text = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens) < batch.tokens.shape[1] - 2
    return replace(
        batch, document_ids=torch.where(is_text, batch.document_ids, -1), loss_mask=batch.loss_mask & is_text
    )


def step(parallel: Parallel, world: World, batches: list[Batch]) -> tuple[StepSums, list[Tensor]]:
    model = student(parallel, world)
    optimizer = Looks(model.parameters())
    found = train_step(
        model, optimizer, batches, objective=OBJECTIVE, clip_norm=0.0, parallel=parallel, world=world
    )  # fmt: skip
    return found, optimizer.seen


def wanted_step() -> tuple[float, float, list[Tensor]]:
    """Energy, loss and gradients by one pass without the door: the hidden states of each layer, squared and added."""
    model, batch = student(PLAIN, World()), padded(range(ROWS))
    states: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out[0]))
    tokens = int(batch.loss_mask.sum())
    loss = batch_loss(model, batch, Objective(TERMS), 1.0)
    energy = sum(x.square().mean(dim=-1)[:, :-2].sum() for x in states)
    ((loss.total + 0.3 * energy) / tokens).backward()
    assert isinstance(energy, Tensor)
    return energy.item(), loss.total.item() + 0.3 * energy.item(), [whole(p.grad) for p in model.parameters()]


def compare(found: StepSums, gradients: list[Tensor]) -> None:
    energy, loss, wanted = wanted_step()
    assert found.sums["energy_loss"] == pytest.approx(energy, rel=1e-5)
    assert found.sums["loss"] == pytest.approx(loss, rel=1e-5)
    for gradient, value in zip(gradients, wanted, strict=True):
        assert (gradient - value).norm() < 1e-5 * value.norm()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("each", [8, 3])
def test_passes_of_a_step_add_up_and_recomputation_counts_once(recompute: str, each: int) -> None:
    batches = [padded(range(at, min(at + each, ROWS))) for at in range(0, ROWS, each)]
    compare(*step(replace(PLAIN, recompute=recompute), World(), [*batches, batches[0].unscored()]))


def test_evaluation_and_passes_that_do_not_ask() -> None:
    model, batch = student(PLAIN, World()), padded(range(ROWS))
    found = evaluate(
        model, [batch], CacheFacts(51, 5), asked=EvaluationRequest(OBJECTIVE), parallel=PLAIN, world=World()
    )  # fmt: skip
    energy, loss, _ = wanted_step()
    tokens = int(batch.loss_mask.sum())
    assert found["val/energy_loss"] == pytest.approx(energy / tokens, rel=1e-5)
    assert found["val/loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert model(batch.tokens, batch.position_ids, batch.document_ids).shape == (ROWS, 12, 51)


def test_the_values_are_given_to_a_function_of_the_caller() -> None:
    model, batch = student(PLAIN, World()), padded(range(2))

    def both(loss: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        assert loss.shape == (2, 12, 16)
        return values["energy"]

    def head(hidden: Tensor, _: Tensor) -> Tensor:
        return hidden

    values = model(batch.tokens, batch.position_ids, batch.document_ids, head, auxiliary=both)
    assert values.shape == (2, 12)


def test_a_student_without_the_values_is_refused() -> None:
    check_auxiliary(OBJECTIVE, energetic())
    with torch.device("meta"), pytest.raises(UsageError, match="loss.terms.energy.name: got 'energy'; wanted no such"):
        check_auxiliary(OBJECTIVE, Decoder(ARCH))
    with pytest.raises(UsageError, match="wanted one of energy. "):
        check_auxiliary(Objective({**TERMS, "balance": Auxiliary()}), energetic())
    with pytest.raises(UsageError, match="every weight is 0"):
        Objective({"energy": Auxiliary()})
