"""Checkpoints of models that are sharded by hand: from any layout to any other, tied, frozen, and not stepped yet."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kd_core.errors import UsageError
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.student import allocate
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.checkpoints.checkpoint import Progress
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.monitoring.hang_watchdog import Pulse
from kd_core.training.optimizer import AdamW
from tests.ranks import run_ranks

ARCH = Architecture(
    vocab_size=37, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=2,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=16,
)  # fmt: skip
Layout = tuple[int, int]


def _student(frozen: bool, size: tuple[int, int]) -> tuple[Decoder, torch.optim.Optimizer]:
    """(dp, tp): tensor-parallel linear layers inside of FSDP2, the embedding tied; 37 tokens do not divide."""
    model = allocate(meta_decoder(ARCH), torch.device("cpu"))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    if frozen:
        model.layers[0].requires_grad_(False)
    if size != (1, 1):
        mesh = init_device_mesh("cpu", size, mesh_dim_names=("dp", "tp"))
        if size[1] > 1:
            plan = {f"{n}_proj": ColwiseParallel() for n in "qkv"} | {"o_proj": RowwiseParallel()}
            for block in model.layers:
                parallelize_module(block.self_attn, mesh["tp"], plan)
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model, AdamW().build(model)


def _step(model: Decoder, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step along gradients that depend on names alone, so that every layout takes the same."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number))
            parameter.grad = _placed(whole, parameter)
    optimizer.step()
    optimizer.zero_grad()


def _placed(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part, cut out by the parameter's own placements."""
    if not isinstance(like, DTensor):
        return whole
    part = torch.empty_like(like)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    part.to_local().copy_(whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))])
    return part


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, kept in optimizer.state.items():
        found |= {f"{names[parameter]} {key}": _whole(value) for key, value in kept.items()}
    return found


def _save(world: World, root: Path, layout: Layout, frozen: bool, steps: int) -> None:
    model, optimizer = _student(frozen, layout)
    root.mkdir(exist_ok=True)
    with Saver(root, Checkpoint(), "{}", world, Pulse()) as saver:
        for seed in range(steps):
            _step(model, optimizer, 100 * seed)
        saver.save(Progress(steps, 4 * steps), model, optimizer)
        wanted = _everything(model, optimizer)
        _step(model, optimizer, 999)  # what comes after the copy must not reach the checkpoint
    if world.is_first:
        torch.save(wanted, root / "wanted.pt")


def _load(world: World, root: Path, layout: Layout, frozen: bool, steps: int) -> None:
    model, optimizer = _student(frozen, layout)
    folder = checkpoint.newest_undamaged(root, world)
    assert folder is not None
    assert checkpoint.load(folder, model, optimizer) == Progress(steps, 4 * steps)
    found, wanted = _everything(model, optimizer), torch.load(root / "wanted.pt")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    _step(model, optimizer, 5)  # and it can go on


CASES = {"all": (False, 2), "frozen": (True, 2), "not stepped": (False, 0)}


def _everywhere(world: World, root: Path) -> None:
    """In four processes: saved on 2 × 2 and loaded on other layouts; then what one process has saved, on 2 × 2."""
    for name, (frozen, steps) in CASES.items():
        _save(world, root / name, (2, 2), frozen, steps)
        for layout in ((4, 1), (1, 4), (2, 2)):
            _load(world, root / name, layout, frozen, steps)
    _load(world, root / "by one process", (2, 2), False, 2)


def test_every_layout_reads_every_other_bit_for_bit(tmp_path: Path) -> None:
    _save(World(), tmp_path / "by one process", (1, 1), False, 2)
    run_ranks(4, _everywhere, tmp_path)
    for name, (frozen, steps) in CASES.items():
        _load(World(), tmp_path / name, (1, 1), frozen, steps)


def test_a_start_that_has_changed_is_named(tmp_path: Path) -> None:
    _save(World(), tmp_path, (1, 1), True, 1)
    model, optimizer = _student(True, (1, 1))
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 3] += 0.1
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj\.weight, which is not trained"):
        checkpoint.load(tmp_path / "step_00000001", model, optimizer)
