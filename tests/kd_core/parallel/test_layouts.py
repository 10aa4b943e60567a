"""One experiment, any layout: the losses of many steps and the gradient of the first are those of one process."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_core.losses.objective import CrossEntropy, Distillation, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.decoder.lora_layers import LoraLinear, LoraSettings
from kd_core.students.families.registry import family_decoder
from kd_core.training.optimizer import AdamW
from kd_core.training.step import batch_loss, train_step
from kd_core.types import Batch
from tests.ranks import run_ranks

STEPS, ROWS, T, K = 6, 8, 12, 5
ARCH = Architecture(
    vocab_size=51,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e4,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=64,
    padded_vocab_size=53,
    embedding_scale=1.5,
)
OBJECTIVE = Objective({"kd": Distillation(weight=0.9), "sft": CrossEntropy(weight=0.1)}, chunk_tokens=7)
PLAIN = Parallel(precision="float32", micro_batch_rows=2)
OF_TWO = {
    "dp 2": replace(PLAIN, shard="full"),
    "dp 2, whole copies": replace(PLAIN, shard="none"),
    "tp 2": replace(PLAIN, tensor_parallel=2),
    "tp 2, by position": replace(PLAIN, tensor_parallel=2, sequence_parallel=True),
    "cp 2": replace(PLAIN, context_parallel=2),
    "cp 2, three rows a pass": replace(PLAIN, context_parallel=2, micro_batch_rows=3, shard="full", recompute="full"),
}
OF_FOUR = {
    "dp 4": PLAIN,
    "dp 4, three rows a pass": replace(PLAIN, micro_batch_rows=3, shard="full"),
    "dp 2 × tp 2": replace(PLAIN, tensor_parallel=2, shard="full"),
    "dp 2 × tp 2, by position, recomputed": replace(
        PLAIN, tensor_parallel=2, sequence_parallel=True, recompute="every:2", micro_batch_rows=1
    ),
    "hybrid": replace(PLAIN, replicas=2, shard="full", micro_batch_rows=1),
    "copies of tp 2": replace(PLAIN, tensor_parallel=2, shard="none", recompute="full"),
    "tp 4, kv heads repeated": replace(PLAIN, tensor_parallel=4),
    "tp 4, by position": replace(PLAIN, tensor_parallel=4, sequence_parallel=True),
    "dp 2 × cp 2": replace(PLAIN, context_parallel=2, shard="full", micro_batch_rows=1),
    "cp 2 × tp 2, by position": replace(PLAIN, context_parallel=2, tensor_parallel=2, sequence_parallel=True),
    "cp 2 over copies": replace(PLAIN, context_parallel=2, replicas=4, shard="full"),
}


def tied() -> Decoder:
    return meta_decoder(ARCH)


def untied() -> Decoder:
    return meta_decoder(replace(ARCH, tie_embeddings=False))


def adapted() -> Decoder:
    """All that a family may have: biases, norms of queries and keys, windows; frozen, with adapters."""
    biases = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    arch = replace(ARCH, **biases, qk_norm=True, windows=(4, None), family="qwen3")
    model = meta_decoder(arch).requires_grad_(False)
    for name, module in list(model.layers.named_modules(prefix="layers")):
        if isinstance(module, torch.nn.Linear) and "1" not in name:
            parent, last = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), last, LoraLinear(module, LoraSettings(3, 3.0, 0.0, False)))
    return model.train()


def first_weights(make: Callable[[], Decoder]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(p.shape) if p.ndim == 1 else 0.2 * torch.randn(p.shape)
        for name, p in make().named_parameters()
    }


def rows_of(step: int, rows: Iterable[int]) -> Batch:
    """Rows of a step's batch: two documents each, some positions unscored, one row not at all."""
    torch.manual_seed(step)
    log_p = (2 * torch.randn(ROWS, T, 51)).log_softmax(dim=-1)
    ranked, ids = log_p.topk(K, dim=-1)
    border = torch.randint(1, T, (ROWS, 1))
    positions = torch.arange(T).expand(ROWS, T)
    mask = torch.rand(ROWS, T) < 0.8
    mask[3] = False
    whole = Batch(
        tokens=torch.randint(51, (ROWS, T)),
        labels=torch.randint(51, (ROWS, T)),
        loss_mask=mask,
        position_ids=torch.where(positions < border, positions, positions - border),
        document_ids=(positions >= border).long(),
        topk_token_ids=ids,
        topk_log_probs=ranked,
        tail_log_prob=torch.log1p(-ranked.exp().sum(dim=-1)),
        label_log_prob=torch.full((ROWS, T), -3.0),
    )
    at = torch.tensor(list(rows))
    return replace(whole, **{k: v[at] for k, v in vars(whole).items() if isinstance(v, Tensor)})


def batches(step: int, parallel: Parallel, world: World) -> list[Batch]:
    own = range(world.dp_rank, ROWS, world.dp_size)
    each = parallel.micro_batch_rows
    return [rows_of(step, own[at : at + each]).divided(world.row_share) for at in range(0, len(own), each)]


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Looks(torch.optim.SGD):
    """Keeps the gradients that a step is taken by."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.seen = [whole(parameter.grad) for group in self.param_groups for parameter in group["params"]]


def first_gradient(model: Decoder, parallel: Parallel, world: World) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, batches_of_rank = Looks(named.values()), batches(0, parallel, world)
    train_step(
        model, optimizer, batches_of_rank, objective=OBJECTIVE, clip_norm=0.0, parallel=parallel, world=world
    )  # fmt: skip
    return dict(zip(named, optimizer.seen, strict=True))


def student(make: Callable[[], Decoder], parallel: Parallel, world: World) -> tuple[Decoder, World]:
    world = world.with_layout(parallel.layout(world.size))
    model = parallelize(make(), parallel, world)
    weights = first_weights(make)
    for name, parameter in model.named_parameters():
        put(parameter, weights[name])
    return model, world


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """This rank's part of the values: first what tensor parallelism divides, then what sharding divides of that."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    mesh, placements = parameter.device_mesh, parameter.placements
    names = mesh.mesh_dim_names or ()
    for at in sorted(range(len(names)), key=lambda i: names[i] != "tp"):
        placement = placements[at]
        if not placement.is_replicate():
            parts = values.chunk(mesh.size(at), dim=placement.dim)
            mine = mesh.get_local_rank(at)
            values = parts[mine] if mine < len(parts) else values[:0]
    parameter.to_local().copy_(values)


def trajectory(model: Decoder, parallel: Parallel, world: World) -> list[float]:
    """Losses and gradient norms of all steps."""
    optimizer, seen = AdamW(lr=1e-3).build(model), []
    for step in range(STEPS):
        found = train_step(
            model,
            optimizer,
            batches(step, parallel, world),
            objective=OBJECTIVE,
            clip_norm=1.0,
            parallel=parallel,
            world=world,
        )
        seen += [found.sums["loss"] / found.tokens, found.grad_norm]
    return seen


def compare(world: World, make: Callable[[], Decoder], layouts: dict[str, Parallel]) -> None:
    alone = World()
    wanted = trajectory(*(student(make, PLAIN, alone)[0], PLAIN, alone))
    gradient = first_gradient(student(make, PLAIN, alone)[0], PLAIN, alone)
    size = float(torch.stack([value.norm() for value in gradient.values()]).norm())
    for name, parallel in layouts.items():
        model, laid_out = student(make, parallel, world)
        found = first_gradient(model, parallel, laid_out)
        assert found.keys() == gradient.keys()
        for parameter, value in gradient.items():
            assert value.abs().max() > 0
            assert (found[parameter] - value).norm() < 1e-5 * value.norm() + 1e-8 * size, (name, parameter)
        model, laid_out = student(make, parallel, world)
        assert trajectory(model, parallel, laid_out) == pytest.approx(wanted, rel=1e-5), name


def test_two_ranks_train_as_one() -> None:
    run_ranks(2, compare, tied, OF_TWO)


def test_four_ranks_train_as_one() -> None:
    run_ranks(4, compare, tied, OF_FOUR)


def test_a_head_of_its_own() -> None:
    """Embedding and head apart: each is divided by rows, and both are in the root's group."""
    run_ranks(4, compare, untied, {"dp 2 × tp 2": OF_FOUR["dp 2 × tp 2"]})


def test_adapters_biases_and_norms_of_heads() -> None:
    run_ranks(4, compare, adapted, {
        "tp 4, recomputed": replace(OF_FOUR["tp 4, by position"], recompute="full"),
        "cp 2 × tp 2": replace(PLAIN, context_parallel=2, tensor_parallel=2),
    })  # fmt: skip


def gemma2() -> Decoder:
    """Norms behind attention and feed-forward, caps, and embeddings scaled by the width."""
    return family_decoder(
        replace(
            ARCH, family="gemma2", windows=(4, None), norm_offset=1.0, root_scaled_embedding=True, embedding_scale=1.0,
            attention_soft_cap=2.0, logit_soft_cap=3.0,
        )
    )  # fmt: skip


def gemma3() -> Decoder:
    """One kv head, norms of heads, and RoPE of its own for layers with a window."""
    return family_decoder(
        replace(
            gemma2().arch, family="gemma3_text", qk_norm=True, local_rope_theta=1e2, num_kv_heads=1,
            attention_soft_cap=None, logit_soft_cap=None,
        )
    )  # fmt: skip


def _gemmas(world: World) -> None:
    compare(world, gemma2, {name: OF_TWO[name] for name in ("dp 2", "tp 2", "tp 2, by position")})
    compare(world, gemma3, {"tp 2, recomputed": replace(OF_TWO["tp 2, by position"], recompute="full")})


def test_two_ranks_train_gemmas_as_one() -> None:
    run_ranks(2, _gemmas)


def rounded(world: World) -> None:
    """In bfloat16 a layout rounds elsewhere; the loss stays that of one process, up to rounding."""
    for parallel in (
        Parallel(tensor_parallel=2, micro_batch_rows=2),
        Parallel(shard="full", recompute="full", micro_batch_rows=2),
    ):
        model, laid_out = student(tied, parallel, world)
        alone = Parallel(micro_batch_rows=2)
        wanted = trajectory(student(tied, alone, World())[0], alone, World())
        assert trajectory(model, parallel, laid_out) == pytest.approx(wanted, rel=2e-2)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_on_two_ranks() -> None:
    run_ranks(2, rounded)


def same_bits(world: World) -> None:
    for name in ("dp 2 × tp 2", "hybrid"):
        parallel = OF_FOUR[name]
        first, again = (trajectory(*with_plan(parallel, world)) for _ in range(2))
        assert first == again, name


def with_plan(parallel: Parallel, world: World) -> tuple[Decoder, Parallel, World]:
    model, laid_out = student(tied, parallel, world)
    return model, parallel, laid_out


def test_the_same_layout_has_the_same_bits_twice() -> None:
    run_ranks(4, same_bits)


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """Alone, with tensor parallelism by position around recomputation, and with divided rows; a minute each."""
    run_ranks(1, compare, tied, {"alone": replace(PLAIN, compile=True)})
    names = ("dp 2", "tp 2, by position", "cp 2")
    layouts = {name: replace(OF_TWO[name], compile=True, recompute="full") for name in names}
    run_ranks(2, compare, tied, layouts)


def test_recomputed_and_accumulated_alone() -> None:
    alone = World()
    wanted = trajectory(student(tied, PLAIN, alone)[0], PLAIN, alone)
    for parallel in (replace(PLAIN, recompute="full"), replace(PLAIN, micro_batch_rows=8)):
        assert trajectory(student(tied, parallel, alone)[0], parallel, alone) == pytest.approx(wanted, rel=1e-5)


def test_a_gradient_of_the_loss_alone_needs_no_ranks() -> None:
    """The oracle of this file: one backward pass over the whole step, without the step's code."""
    alone = World()
    found = first_gradient(student(tied, PLAIN, alone)[0], PLAIN, alone)
    model, batch = student(tied, PLAIN, alone)[0], rows_of(0, range(ROWS))
    batch_loss(model, batch, OBJECTIVE, 1 / float(batch.loss_mask.sum())).total.backward()
    for name, parameter in model.named_parameters():
        assert (found[name] - whole(parameter.grad)).norm() < 1e-5 * whole(parameter.grad).norm()


def test_deterministic_kernels_are_a_choice_and_change_no_bit_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    alone, found, seen, only_warns = World(), [], [], torch.is_deterministic_algorithms_warn_only_enabled
    try:
        for chosen in (False, True):
            parallel = replace(PLAIN, deterministic=chosen)
            parallel.choose_kernels()
            assert torch.are_deterministic_algorithms_enabled() == chosen
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == chosen
            # Attention's kernels add in a fixed order only where torch would raise, not warn.
            model = student(tied, parallel, alone)[0]
            model.norm.weight.register_hook(lambda _: seen.append(only_warns()))
            found.append(trajectory(model, parallel, alone))
            assert set(seen[-2:]) == {not chosen}
            assert only_warns()
    finally:
        PLAIN.choose_kernels()
    assert not torch.are_deterministic_algorithms_enabled()
    assert found[0] == found[1]
