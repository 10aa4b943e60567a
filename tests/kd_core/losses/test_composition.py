"""The loss inside what training puts around it: checkpointed activations, a compiled caller, sharded parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kd_core.losses.fused.loss import LossSums, fused_loss
from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder
from kd_core.types import TeacherTopK
from tests.kd_core.losses.cases import Case, Result, error, make

OBJECTIVES = [
    Objective({"kd": Distillation(), "sft": CrossEntropy(0.1)}, chunk_tokens=3),
    Objective({"kd": Distillation(tail="renormalized")}, chunk_tokens=3),
]
Loss = Callable[[Tensor, Tensor], Tensor]


def block(hidden: Tensor) -> Tensor:
    return hidden + torch.tanh(2 * hidden)


def of(case: Case, objective: Objective) -> Loss:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_loss(hidden, weight, case.teacher, case.labels, case.mask, objective, scale=0.5).total * 3

    return loss


def gradients(case: Case, run: Loss) -> Result:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    total = run(hidden, weight)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(loss=total.detach(), hidden=hidden.grad, weight=weight.grad)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["vocabulary", "support"])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_change_nothing(objective: Objective, autocast: bool) -> None:
    """A block below the loss is checkpointed, or the head with the loss, or both in one."""
    case = make("odd sizes").to(torch.float32)
    loss = of(case, objective)

    def below(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(checkpoint(block, hidden, use_reentrant=False), weight)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(loss, block(hidden), weight, use_reentrant=False)

    def both(hidden: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(lambda x, w: loss(block(x), w), hidden, weight, use_reentrant=False)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plainly = gradients(case, lambda hidden, weight: loss(block(hidden), weight))
        for run in (below, head, both):
            assert error(gradients(case, run), plainly) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # read by torch.compile itself
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["vocabulary", "support"])
def test_a_compiled_caller_breaks_its_graph_once_around_the_loss(objective: Objective) -> None:
    case, graphs = make("odd sizes").to(torch.float32), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    def caller(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = fused_loss(block(hidden), weight, case.teacher, case.labels, case.mask, objective)
        return torch.sin(loss.total)

    torch.compiler.reset()
    found = gradients(case, torch.compile(caller, backend=backend))
    assert error(found, gradients(case, caller)) == 0
    before, after = (" ".join(names) for names in graphs)
    assert "tanh" in before
    assert "sin" in after
    torch.compiler.reset()
    with pytest.raises(Exception, match="(?i)graph break|skipped|disable"):
        torch.compile(caller, backend="eager", fullgraph=True)(case.hidden, case.weight)
    torch.compiler.reset()


ARCH = Architecture(
    vocab_size=53,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=32,
)


def student() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ARCH)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def backward(model: nn.Module, rows: slice, objective: Objective) -> None:
    """The loss of some rows of one batch, from within the root module's forward."""
    torch.manual_seed(1)
    tokens, labels = torch.randint(53, (4, 9)), torch.randint(53, (4, 9))
    mask = torch.rand(4, 9) < 0.8
    log_p = torch.randn(4, 9, 53).log_softmax(dim=-1)
    ranked, ids = log_p.topk(5, dim=-1)
    tail = torch.log1p(-ranked.exp().sum(dim=-1))
    scale = 1 / float(mask.sum())

    def head(hidden: Tensor, weight: Tensor) -> LossSums:
        teacher = TeacherTopK(ids[rows].flatten(0, 1), ranked[rows].flatten(0, 1), tail[rows].flatten())
        flat = hidden.flatten(0, 1)
        return fused_loss(flat, weight, teacher, labels[rows].flatten(), mask[rows].flatten(), objective, scale)

    positions = torch.arange(9).expand(4, 9)
    model(tokens[rows], positions[rows], torch.zeros_like(tokens)[rows], head).total.backward()


def shard_and_compare(rank: int, store: str, wanted: dict[str, dict[str, Tensor]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, objective in zip(wanted, OBJECTIVES, strict=True):
        model = student()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sums, since the loss is divided already; gloo can do no other
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        backward(model, slice(rank, 4, 2), objective)
        for parameter_name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name][parameter_name])
    dist.barrier()  # a process that leaves while the other still reads from it makes gloo abort
    dist.destroy_process_group()


def test_sharded_data_parallelism_gives_the_gradient_of_one_process(tmp_path: Path) -> None:
    """FSDP2 on two processes: embedding, norm and tied head in the root's group, each layer in its own."""
    wanted: dict[str, dict[str, Tensor]] = {}
    for name, objective in zip(("vocabulary", "support"), OBJECTIVES, strict=True):
        model = student()
        backward(model, slice(None), objective)
        wanted[name] = {key: parameter.grad for key, parameter in model.named_parameters()}  # type: ignore[misc]
        assert all(gradient.abs().max() > 0 for gradient in wanted[name].values())
    torch.multiprocessing.spawn(shard_and_compare, (str(tmp_path / "store"), wanted), nprocs=2)
