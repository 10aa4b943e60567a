"""A peer's number means something only if it computes what we compare it with: value and gradients, against ours."""

import warnings

import pytest
import torch
from torch import Tensor

from benchmarks import unfused
from benchmarks.inputs import Inputs, Step
from benchmarks.peers import axolotl, distillkit, megatron, nemo, trl, verl
from benchmarks.peers.installed import liger, stand_in_teacher, trl_dense, trl_tail
from kd_core.losses.fused.loss import fused_loss
from kd_core.losses.objective import Distillation, Objective
from kd_core.types import TeacherTopK

N, V, D, K = 32, 97, 16, 8

PEERS: list[tuple[Step, str]] = [
    (nemo.aligner, "renormalized"),
    (nemo.rl, "renormalized"),
    (axolotl.chunked, "renormalized"),
    (nemo.rl_zero_outside, "truncated"),
    (distillkit.zero, "truncated"),
    (axolotl.forward_kl, "truncated"),
    (verl.fsdp, "unnormalized"),
    (verl.veomni, "unnormalized"),
    (nemo.aligner_with_rest, "tail_bucket"),
    (distillkit.symmetric_uniform, "tail_bucket"),
    (megatron.ghost_token, "tail_bucket"),
    (trl.chunked_tail, "tail_bucket"),
    (trl.server_tail, "tail_bucket"),
    (trl.dense_teacher, "uniform_tail"),
    (unfused.tail_bucket, "tail_bucket"),
]


def small(dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    log_p, ids = torch.randn(N, V, dtype=torch.float64).mul(2).log_softmax(dim=1).sort(dim=1, descending=True)
    teacher = TeacherTopK(ids[:, :K], log_p[:, :K].to(dtype), log_p[:, K:].logsumexp(dim=1).to(dtype))
    return Inputs(hidden, weight, teacher, torch.randint(V, (N,)), torch.arange(N) % 5 != 2)


def found(step: Step, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    loss = step(given)
    return (loss.detach(), *torch.autograd.grad(loss, (given.hidden, given.weight)))


def ours(tail: str, divergence: str = "forward_kl") -> Step:
    objective = Objective({"kd": Distillation(divergence=divergence, tail=tail)})
    return lambda given: fused_loss(*given, objective, 1.0 / int(given.mask.sum())).total


def assert_same(peer: Step, reference: Step, given: Inputs, atol: float) -> None:
    for seen, wanted in zip(found(peer, given), found(reference, given), strict=True):
        torch.testing.assert_close(seen, wanted, atol=atol, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize(("peer", "tail"), PEERS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_peer_is_the_combination_that_it_is_listed_as(peer: Step, tail: str) -> None:
    assert_same(peer, ours(tail), small(torch.float64), 1e-8)


@pytest.mark.parametrize(("peer", "tail"), PEERS, ids=lambda x: x if isinstance(x, str) else None)
def test_peers_also_run_in_bfloat16_and_under_autocast(peer: Step, tail: str) -> None:
    given = small(torch.float32)
    wanted = ours(tail)(given).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = peer(given)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, abs=0.05)
    half = Inputs(*(x.detach().bfloat16().requires_grad_() for x in given[:2]), *given[2:])
    assert found(peer, half)[0].item() == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(("peer", "tail"), PEERS, ids=lambda x: x if isinstance(x, str) else None)
def test_chunks_of_a_peer_add_up(peer: Step, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nemo, axolotl, verl, trl):
        monkeypatch.setattr(module, "CHUNK", 8)
    assert_same(peer, ours(tail), small(torch.float64), 1e-8)


def with_all_tokens(given: Inputs) -> Inputs:
    """The stand-in teacher of the dense losses as entries: all V of them."""
    hidden, weight = stand_in_teacher(given)
    log_p = (hidden @ weight.T).log_softmax(dim=1)
    teacher = TeacherTopK(torch.arange(V).expand(N, V), log_p, torch.full((N,), -torch.inf, dtype=log_p.dtype))
    return given._replace(teacher=teacher)


def test_ligers_forward_kl() -> None:
    pytest.importorskip("liger_kernel")
    peer = liger("LigerFusedLinearJSDLoss", beta=0.0)
    assert_same(peer, ours("unnormalized"), with_all_tokens(small(torch.float64)), 1e-6)


def test_ligers_jsd_is_a_quarter_of_ours() -> None:
    pytest.importorskip("liger_kernel")
    peer = liger("LigerFusedLinearJSDLoss", beta=0.5)
    assert_same(lambda given: 4 * peer(given), ours("renormalized", "jsd"), with_all_tokens(small(torch.float64)), 1e-6)


@pytest.fixture
def _trl() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of its own affairs
        pytest.importorskip("trl")
        pytest.importorskip("datasets")


@pytest.mark.usefixtures("_trl")
def test_trls_forward_kl() -> None:
    assert_same(trl_dense(0.0), ours("unnormalized"), with_all_tokens(small(torch.float32)), 1e-5)


@pytest.mark.usefixtures("_trl")
def test_trls_tail_bucket() -> None:
    assert_same(trl_tail(), ours("tail_bucket"), small(torch.float32), 1e-4)
    assert_same(trl_tail(), trl.chunked_tail, small(torch.float32), 1e-5)
