"""Mixtures of experts against dense formulas: experts, grouped matmuls, router losses, and attention with sinks."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from kd_core.document_lengths import Documents
from kd_core.parallel.world import World
from kd_core.students.decoder import experts as decoder_experts
from kd_core.students.decoder import flex_kernel
from kd_core.students.decoder.architecture import Architecture, ExpertSettings
from kd_core.students.decoder.experts import Experts, MixtureOfExperts, multiply_groups, router_values
from kd_core.students.decoder.flex_kernel import attend_capped_by_kernel
from kd_core.students.decoder.masked_attention import attend_masked
from kd_core.students.families.gpt_oss import ClampedExperts
from tests.kd_core.students.models import VOCAB
from tests.ranks import run_ranks

ARCH = Architecture(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64, experts=ExpertSettings(5, 2),
)  # fmt: skip


def random_experts(kind: type[Experts], arch: Architecture = ARCH) -> Experts:
    torch.manual_seed(0)
    experts = kind(arch).double()
    for parameter in experts.parameters():
        parameter.data.normal_()
    return experts


def one_by_one(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Each position through each of its experts alone."""
    out = torch.zeros_like(x)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for weight, e in zip(weights[b, t], chosen[b, t].tolist(), strict=True):
                if isinstance(experts, ClampedExperts):
                    both = x[b, t] @ gate_up[e] + experts.gate_up_proj_bias[e]
                    gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
                    y = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down[e] + experts.down_proj_bias[e]
                else:
                    gate, up = (gate_up[e] @ x[b, t]).chunk(2)
                    y = down[e] @ (F.silu(gate) * up)
                out[b, t] = out[b, t] + weight * y
    return out


@pytest.mark.parametrize("kind", [Experts, ClampedExperts])
def test_experts_are_feed_forwards_of_single_positions_also_divided(kind: type[Experts]) -> None:
    """Values and gradients. An expert without a position has gradients of 0."""
    experts = random_experts(kind)
    x, weights = torch.randn(2, 7, 16, dtype=torch.float64), torch.rand(2, 7, 2, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(14)]).view(2, 7, 2)  # expert 4 has none
    inputs = x.requires_grad_(), *experts.parameters(), weights.requires_grad_()
    upstream = torch.randn(2, 7, 16, dtype=torch.float64)
    wanted = one_by_one(experts, x, chosen, weights)
    gradients = torch.autograd.grad(wanted, inputs, upstream, allow_unused=True, materialize_grads=True)
    assert gradients[1][4].abs().max() == 0 < gradients[1][3].abs().max()

    def share(first: int, last: int) -> Experts:
        part = random_experts(kind)
        part.first_expert = first
        for name, parameter in experts.named_parameters():
            setattr(part, name, torch.nn.Parameter(parameter.detach()[first:last].clone()))
        return part

    for parts in ([experts], [share(0, 3), share(3, 5)]):
        outputs = [part(x, chosen, weights) for part in parts]
        assert (torch.stack(outputs).sum(dim=0) - wanted).abs().max() < 1e-10
        found = torch.autograd.grad(
            sum(outputs), [x, weights, *(p for part in parts for p in part.parameters())], upstream
        )
        count = len(list(experts.parameters()))
        by_parameter = [torch.cat(found[2 + i :: count]) for i in range(count)]
        for one, other in zip([found[0], *by_parameter, found[1]], gradients, strict=True):
            assert (one - other).abs().max() < 1e-10


class GroupedWithNan(torch.autograd.Function):
    """The kernel, with NaN for the rows behind the last end, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight, offs=ends).index_fill(0, torch.arange(int(ends[-1]), len(x)), torch.nan)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, ends = ctx.saved_tensors
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            of_x, of_weight = torch.autograd.grad(F.grouped_mm(*inputs, offs=ends), inputs, upstream[0])
        return of_x.index_fill(0, torch.arange(int(ends[-1]), len(x)), torch.nan), of_weight, None


@pytest.mark.parametrize("kind", [Experts, ClampedExperts])
def test_rows_of_other_ranks_reach_no_gradient(kind: type[Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel leaves them undefined. A rank with three of five experts has the gradients of its positions alone."""
    monkeypatch.setattr(
        decoder_experts, "_multiply_outside_graphs", lambda *inputs, offs: GroupedWithNan.apply(*inputs, offs)
    )
    experts = random_experts(kind, replace(ARCH, intermediate_size=16)).float()  # rows of whole 16 bytes
    part = random_experts(kind, replace(ARCH, intermediate_size=16)).float()
    for name, parameter in experts.named_parameters():
        setattr(part, name, torch.nn.Parameter(parameter.detach()[:3].clone()))
    x, weights = torch.randn(2, 7, 16), torch.rand(2, 7, 2)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(14)]).view(2, 7, 2)
    gradients = []
    for model, factors in ((experts, weights * (chosen < 3)), (part, weights)):
        inputs = x.clone().requires_grad_()
        model(inputs, chosen, factors).square().sum().backward()
        gradients.append([inputs.grad, *(p.grad[:3] for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_multiplies_as_a_loop_does(dtype: torch.dtype) -> None:
    """Also without rows of an expert, with rows behind the last end, and with sizes that the kernel does not take."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for width in (24, 23):
        x, weight = torch.randn(12, 16, dtype=dtype), torch.randn(3, width, 16, dtype=dtype)
        ends = torch.tensor([5, 5, 9], dtype=torch.int32)
        x_64, weight_64 = x.double().requires_grad_(), weight.double().requires_grad_()
        found = multiply_groups(x.requires_grad_(), weight.requires_grad_().mT, ends)[:9]
        wanted = multiply_groups(x_64, weight_64.mT, ends)[:9]
        assert found.dtype == dtype
        assert (found - wanted).abs().max() < tolerance * 10
        (found * found.detach()).sum().backward()
        (wanted * wanted.detach()).sum().backward()
        for one, other in ((x, x_64), (weight, weight_64)):
            assert one.grad is not None
            assert other.grad is not None
            rows_of_experts = slice(0, 9)  # all of the weight's
            assert (one.grad - other.grad)[rows_of_experts].norm() < tolerance * other.grad.norm()


def test_router_losses_are_those_of_transformers_for_one_row() -> None:
    torch.manual_seed(0)
    logits = [2 * torch.randn(3, 9, 6) for _ in range(4)]
    is_text = torch.arange(9) < torch.tensor([[9], [4], [0]])
    found = router_values(logits, 2, is_text)
    assert torch.isfinite(torch.stack(list(found.values()))).all()
    for row, length in enumerate((9, 4)):
        layers = tuple(layer[row, :length] for layer in logits)
        balance = load_balancing_loss_func(layers, 6, top_k=2)
        assert torch.allclose(found["router_balance"][row], balance)
        masked = load_balancing_loss_func(tuple(layer[row] for layer in logits), 6, 2, is_text[row][None].long())
        assert torch.allclose(found["router_balance"][row], masked)
        # Theirs is a mean over positions, ours a value at each.
        z = torch.stack([router_z_loss_func(layer[None]) for layer in layers]).mean()
        assert torch.allclose(found["router_z"][row, :length].mean(), z)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_with_sinks_is_a_softmax_with_one_more_logit() -> None:
    """Under a mask, and by FlexAttention's formula, which a GPU compiles, and which has no backward pass here."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, dtype=torch.float64) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    inputs = [x.requires_grad_() for x in (q, k, v, 2 * torch.randn(4, dtype=torch.float64))]
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    products = (q @ k.repeat_interleave(2, dim=1).mT / 4).masked_fill(~mask, -torch.inf)
    logits = torch.cat([products, inputs[3][None, :, None, None].expand(2, 4, 9, 1)], dim=-1)
    wanted = logits.softmax(dim=-1)[..., :-1] @ v.repeat_interleave(2, dim=1)
    upstream = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, upstream)
    found = attend_masked(q, k, v, mask, None, None, inputs[3])
    assert (found - wanted).abs().max() < 1e-10
    for one, other in zip(torch.autograd.grad(found, inputs, upstream), gradients, strict=True):
        assert (one - other).norm() < 1e-10 * other.norm()
    with torch.no_grad():
        single = [x.float() for x in inputs]
        by_kernel = attend_capped_by_kernel(*single[:3], Documents.from_ids(ids), None, 4, None, single[3])
    assert (by_kernel - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_the_kernel_of_many_shapes_has_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up after eight graphs, and a kernel that is not compiled has products of all pairs."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compile_with = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_with)
    flex_kernel._compiled.cache_clear()
    kernel = flex_kernel._compiled("cuda")
    monkeypatch.setattr(flex_kernel, "_compiled", lambda _: kernel)
    for positions in range(40, 58, 2):
        q, k = torch.randn(1, 2, positions, 16), torch.randn(1, 1, positions, 16)
        with torch.no_grad():
            attend_capped_by_kernel(q, k, k, Documents.from_lengths([positions], 1), None, None, 5.0)
    assert 0 < len(graphs) <= 6


@pytest.mark.parametrize("window", [None, 100, 300])
def test_the_kernels_blocks_are_those_of_all_pairs(window: int | None) -> None:
    """Without a mask of all pairs, of documents whose keys may be more than their queries."""
    documents = replace(Documents.from_lengths([300, 1, 419], 1), keys=Documents.from_lengths([700, 200, 419], 1))
    for case in (documents, Documents.from_lengths([300, 1, 419], 1)):
        N, M = case.lengths, (case.keys or case).lengths
        mask = flex_kernel._block_mask(case, sum(N), sum(M), window)
        pairs = torch.block_diag(
            *(torch.ones(n, m).tril(m - n).triu(m - n - (window or m) + 1) for n, m in zip(N, M, strict=True))
        )
        assert torch.equal(create_mask(mask.mask_mod, 1, 1, sum(N), sum(M), "cpu")[0, 0], pairs.bool())
        wanted = create_block_mask(mask.mask_mod, 1, 1, sum(N), sum(M), "cpu")
        assert mask.full_kv_num_blocks is not None
        assert wanted.full_kv_num_blocks is not None
        assert torch.equal(mask.full_kv_num_blocks, wanted.full_kv_num_blocks)
        assert (mask.to_dense() >= wanted.to_dense()).all()


def compile_whole(world: World) -> None:
    """In a process of its own, because functions whose arguments are checked are not compiled as a whole."""
    del world
    decoder_experts.GRAPH_DEVICES = ("cpu",)
    torch.manual_seed(0)
    arch = replace(ARCH, intermediate_size=16)  # rows of whole 16 bytes, which the kernel takes
    mixture, x = MixtureOfExperts(arch, ClampedExperts, router_bias=True), torch.randn(1, 24, 16, requires_grad=True)
    for parameter in mixture.parameters():
        parameter.data.normal_(0, 0.3)

    def run(forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y, logits = forward(x)
        return [y, *torch.autograd.grad(y.float().square().sum() + logits.sum(), [x, *mixture.parameters()])]

    wanted = run(mixture)
    for one, other in zip(run(torch.compile(mixture, backend="aot_eager", fullgraph=True)), wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.slow
def test_a_mixture_is_one_graph_where_the_kernel_is() -> None:
    """With gradients, as on a GPU in bfloat16. The kernel itself is not compiled here."""
    run_ranks(1, compile_whole)
