"""torchao's optimisers of 8 bits: checkpoints of codes and scales, resumed bit for bit, on one rank and on several."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kd_core.errors import UsageError
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.sharded_values import local_values
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.checkpoint import CheckpointContent, Progress
from kd_core.training.checkpoints.checkpoint_state import check_resumable, read_group_settings, run_state
from kd_core.training.checkpoints.eight_bit_state import check_blocks, joined_states
from kd_core.training.optimizer import AdamW, Optimizer, TorchOptimizer, set_rates
from kd_core.training.parameter_groups import Group
from kd_core.training.step import train_step
from tests.kd_core.parallel.test_layouts import ARCH, OBJECTIVE, OF_TWO, PLAIN, batches, first_weights, put, whole
from tests.ranks import run_ranks

pytest.importorskip("torchao.optim")

WIDE = replace(ARCH, hidden_size=64, intermediate_size=96, head_dim=16, padded_vocab_size=128)
# Blocks of 16 divide rows of 64 and 96, also where two ranks share them.
EIGHT = TorchOptimizer(
    "AdamW8bit", 1e-2, {"betas": (0.9, 0.95), "block_size": 16}, 0.1, groups={"embed_tokens.*": Group(lr_scale=0.5)}
)


def _make() -> Decoder:
    return meta_decoder(WIDE)


def _student(settings: Optimizer, parallel: Parallel, world: World) -> tuple[Decoder, torch.optim.Optimizer, World]:
    world = world.with_layout(parallel.layout(world.size))
    model = parallelize(_make(), parallel, world)
    for name, parameter in model.named_parameters():
        put(parameter, first_weights(_make)[name])
    return model, settings.build(model), world


def _steps(model: Decoder, optimizer: torch.optim.Optimizer, parallel: Parallel, world: World, which: range) -> None:
    # Each shape of a parameter is compiled otherwise, which takes longer than all of these steps.
    with torch.compiler.set_stance("force_eager"):
        for step in which:
            set_rates(optimizer, 1 / (1 + step))
            found = batches(step, parallel, world)
            train_step(model, optimizer, found, objective=OBJECTIVE, clip_norm=1.0, parallel=parallel, world=world)


def _values(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in run_state(model, optimizer).items()}


def _resumed(world: World, root: Path, parallel: Parallel) -> Path:
    model, optimizer, world = _student(EIGHT, parallel, world)
    as_built = read_group_settings(optimizer)
    _steps(model, optimizer, parallel, world, range(2))
    check_resumable(model, optimizer, as_built)
    state = run_state(model, optimizer)
    folder = checkpoint.write(root, CheckpointContent(state, Progress(2, 8), {}, ""), world, None)
    world.barrier()
    other, fresh, _ = _student(EIGHT, parallel, world)
    checkpoint.load(folder, other, fresh)
    for parameter in other.parameters():
        kind = type(local_values(fresh.state[parameter]["exp_avg"])).__name__
        assert (kind == "OptimState8bit") == (local_values(parameter).numel() >= 4096)
    for each, its in ((model, optimizer), (other, fresh)):
        _steps(each, its, parallel, world, range(2, 4))
    wanted, found = _values(model, optimizer), _values(other, fresh)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    return folder


def test_it_goes_on_bit_for_bit_and_its_file_is_small(tmp_path: Path) -> None:
    stored = load_file(_resumed(World(), tmp_path, PLAIN) / "tensors_00000.safetensors")
    codes = stored["optimizer.embed_tokens.weight.exp_avg@codes"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (128, 64))
    assert stored["optimizer.embed_tokens.weight.exp_avg@scale"].shape == (128, 4)
    assert stored["optimizer.norm.weight.exp_avg"].dtype == torch.float32


def _on_two(world: World, root: Path) -> None:
    """Resumed in each layout, near the student of one process, and gone on with from what one process has saved."""
    alone, its, _ = _student(EIGHT, PLAIN, World())
    _steps(alone, its, PLAIN, World(), range(2))
    wanted, first = _values(alone, its), first_weights(_make)
    content = CheckpointContent(run_state(alone, its), Progress(2, 8), {}, "")
    by_one = checkpoint.write(root / f"one {world.rank}", content, World(), None)
    _steps(alone, its, PLAIN, World(), range(2, 3))
    further = _values(alone, its)
    for layout in ("dp 2", "tp 2"):
        parallel = OF_TWO[layout]
        _resumed(world, root / layout, parallel)
        model, optimizer, laid_out = _student(EIGHT, parallel, world)
        _steps(model, optimizer, parallel, laid_out, range(2))
        found = _values(model, optimizer)
        for name in (name for name in wanted if name.startswith("model.")):
            moved = (wanted[name] - first[name.removeprefix("model.")]).norm()
            assert (found[name] - wanted[name]).norm() <= 0.05 * moved, (layout, name)
        checkpoint.load(by_one, model, optimizer)
        loaded = _values(model, optimizer)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
        _steps(model, optimizer, parallel, laid_out, range(2, 3))
        for name, tensor in _values(model, optimizer).items():
            if name.startswith("model."):
                assert (tensor - further[name]).norm() <= 0.05 * (further[name] - wanted[name]).norm(), (layout, name)


def _uneven(world: World) -> None:
    """97 rows of 64 on two ranks are 49 and 48; 129 are 65 and 64, of which one has 4,096 numbers and one more."""
    mesh = init_device_mesh("cpu", (world.size,))
    for rows, passes in ((127, False), (97, True), (129, True)):
        parameter = distribute_tensor(torch.zeros(rows, 64), mesh, [Shard(0)])
        with nullcontext() if passes else pytest.raises(UsageError, match="w has 4032 to 4096 numbers on a rank"):
            check_blocks({"w": parameter}, 64)
    # 66 and 65 rows of 96, where blocks of 64 divide the numbers of one rank alone: both raise.
    parameter = distribute_tensor(torch.zeros(131, 96), mesh, [Shard(0)])
    with pytest.raises(UsageError, match="block_size: got 64; rows of w have 96 numbers on a rank, .* Set it to 32"):
        check_blocks({"w": parameter}, 64)


def test_moments_of_two_kinds_are_refused() -> None:
    run_ranks(2, _uneven)


def test_shared_by_two_ranks_it_is_that_of_one_process(tmp_path: Path) -> None:
    run_ranks(2, _on_two, tmp_path)


def test_its_moves_are_those_of_adamw_but_for_rounded_moments() -> None:
    groups = {"embed_tokens.*": Group(lr_scale=0.5)}
    plain = AdamW(1e-2, weight_decay=0.1, groups=groups)
    found, wanted = (_values(*_stepped(settings)) for settings in (EIGHT, plain))
    first = first_weights(_make)
    for name, start in first.items():
        ours, theirs = found[f"model.{name}"], wanted[f"model.{name}"]
        assert (ours - theirs).norm() <= 0.1 * (theirs - start).norm(), name


def _stepped(settings: Optimizer) -> tuple[Decoder, torch.optim.Optimizer]:
    model, optimizer, world = _student(settings, PLAIN, World())
    _steps(model, optimizer, PLAIN, world, range(3))
    return model, optimizer


def test_blocks_that_would_cross_rows_are_refused_by_name() -> None:
    settings = TorchOptimizer("AdamW8bit", 1e-2)
    message = "block_size: got 256; rows of embed_tokens.weight have 64 numbers on a rank, .* Set it to 64"
    with pytest.raises(UsageError, match=message):
        settings.check_names(_make())


@pytest.mark.parametrize("size", [0, -64, 1.5, "x", None])
def test_sizes_that_are_no_whole_number_are_refused(size: float | str | None) -> None:
    with pytest.raises(UsageError, match="block_size: got .*wanted a whole number of at least 1"):
        TorchOptimizer("AdamW8bit", 1e-2, {"block_size": size})


@pytest.mark.parametrize("change", ["codes", "scale", "no scale"])
def test_codes_without_their_scales_are_refused_by_name(change: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    tensors = {"exp_avg@codes": torch.zeros(64, 64, dtype=torch.uint8), "exp_avg@scale": torch.ones(64, 2)}
    assert joined_states(tensors, parameter, "w")["exp_avg"].block_size == 32  # type: ignore[attr-defined]
    if change == "codes":
        tensors["exp_avg@codes"] = torch.zeros(64, 32, dtype=torch.uint8)
    elif change == "scale":
        tensors["exp_avg@scale"] = torch.ones(64, 3)
    else:
        del tensors["exp_avg@scale"]
    with pytest.raises(UsageError, match="optimizer.w.exp_avg: its 8-bit blocks do not fit"):
        joined_states(tensors, parameter, "w")
