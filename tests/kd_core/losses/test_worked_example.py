"""The four tokens that README.md works out by hand: its table is the reference, typed from paper and pencil."""

import re
from pathlib import Path

import pytest
import torch

from kd_core.losses.compatibility import ALLOWED_DIVERGENCES
from kd_core.losses.divergences import DIVERGENCES
from kd_core.losses.objective import Distillation
from kd_core.types import TeacherTopK
from tests.kd_core.losses.cases import Case, fused

README = Path(__file__).parents[3] / "kd_core/losses/README.md"
ROWS = re.findall(r"^\| `(\w+)` \| `(\w+)` \| .* \| (\d\.\d{4}) \|$", README.read_text(), re.MULTILINE)


def four_tokens() -> Case:
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ([0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.375, 0.125]))
    teacher = TeacherTopK(torch.tensor([[0, 1]]), p[:, :2].log(), p[:, 2:].sum(dim=1).log())
    weight = torch.eye(4, dtype=torch.float64)  # so that the gradient by hidden states is that by logits
    return Case(q.log(), weight, teacher, torch.tensor([3]), torch.ones(1).bool())


def test_the_table_has_every_divergence_and_every_tail() -> None:
    assert {row[0] for row in ROWS} == set(DIVERGENCES)
    assert {row[1] for row in ROWS} == set(ALLOWED_DIVERGENCES)


@pytest.mark.parametrize(("divergence", "tail", "nats"), ROWS)
def test_a_row_of_the_table(divergence: str, tail: str, nats: str) -> None:
    found, _ = fused(four_tokens(), Distillation(divergence=divergence, tail=tail))
    assert float(found["loss"]) == pytest.approx(float(nats), abs=5.1e-5)


def test_the_gradient_by_hand() -> None:
    found, _ = fused(four_tokens(), Distillation())
    assert found["hidden"][0].tolist() == pytest.approx([-0.25, 0.0, 0.1875, 0.0625], abs=1e-12)


def test_the_two_parts_of_the_decoupled_form_by_hand() -> None:
    for weights, nats in (({"tail_weight": 0.0}, 0.1438), ({"head_weight": 0.0}, 0.0294), ({}, 0.1733)):
        found, _ = fused(four_tokens(), Distillation(divergence="decoupled_kl", head_size=1, **weights))
        assert float(found["loss"]) == pytest.approx(nats, abs=5.1e-5)
