"""Students of transformers in their layouts: losses of many steps and first gradients are those of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch

from kd_core.errors import UsageError
from kd_core.parallel import engine
from kd_core.parallel.config import Parallel
from kd_core.parallel.layout import Layout
from kd_core.parallel.parallelize import fullest_rank_holding, parallelize
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import StudentInit, meta_student
from kd_core.students.starts.transformers_start import Transformers
from kd_core.students.student import Student
from kd_core.students.transformers_student import startup_checks, transformers_student
from tests.kd_core.parallel.test_layouts import PLAIN, first_gradient, trajectory, whole
from tests.kd_core.students.transformers_models import VOCAB, save_folder
from tests.ranks import run_ranks

LAYOUTS = {
    "full, recomputed": replace(PLAIN, shard="full", recompute="full"),
    "gradients, every second block": replace(PLAIN, recompute="every:2"),
    "whole copies": replace(PLAIN, shard="none", micro_batch_rows=3),
}


def laid_out(start: StudentInit, parallel: Parallel, world: World) -> tuple[Student, World]:
    world = world.with_layout(parallel.layout(world.size))
    # The tokenizer has fewer tokens than the model has rows.
    model = parallelize(meta_student(start, VOCAB - 5), parallel, world)
    start.fill(model, 0)
    with engine.evaluation(model, parallel, world):
        model.check_start()
    return model, world


def compare(world: World, root: Path, names: tuple[str, ...], layouts: tuple[str, ...]) -> None:
    for name in names:
        folder = root / name
        start: StudentInit = Transformers(str(folder))
        if name == "phi 3":
            start = LoraStart(start, targets=("qkv_proj", "mlp.*"), rank=2, dropout=0.0)
        alone = laid_out(start, PLAIN, World())
        gradient = first_gradient(alone[0], PLAIN, alone[1])
        expected = trajectory(laid_out(start, PLAIN, World())[0], PLAIN, World())
        size = float(torch.stack([value.norm() for value in gradient.values()]).norm())
        for layout in layouts:
            parallel = LAYOUTS[layout]
            model, spread = laid_out(start, parallel, world)
            for parameter, value in first_gradient(model, parallel, spread).items():
                difference = (value - gradient[parameter]).norm()
                assert difference < 1e-5 * gradient[parameter].norm() + 1e-7 * size, (name, layout, parameter)
            model, spread = laid_out(start, parallel, world)
            assert trajectory(model, parallel, spread) == pytest.approx(expected, rel=1e-5), (name, layout)
    check_export(world, root)


def check_export(world: World, root: Path) -> None:
    """The folder of a sharded student is that of a whole one."""
    start = Transformers(str(root / "qwen 3 moe"))
    for place, of in (("whole", World()), ("sharded", world)):
        model, spread = laid_out(start, replace(PLAIN, shard="full"), of)
        save_pretrained(
            model, root / place, root / "qwen 3 moe", first=spread.is_first and (place, world.rank) != ("whole", 1)
        )
    if world.is_first:
        whole, sharded = (
            safetensors.torch.load_file(root / place / "model.safetensors") for place in ("whole", "sharded")
        )
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize(
    ("names", "layouts"),
    [
        (("qwen 3 moe",), ("full, recomputed",)),
        pytest.param(("qwen 3 moe", "phi 3", "qwen 3.5"), tuple(LAYOUTS), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one(names: tuple[str, ...], layouts: tuple[str, ...], tmp_path: Path) -> None:
    """Experts that are stacked as they are read, adapters on joined matrices, and a document a row."""
    for name in names:
        save_folder(name, tmp_path / name)
    run_ranks(2, compare, tmp_path, names, layouts)


def _step_after_a_failed_try(world: World, folder: Path) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no such masks")

    transformers_student.document_masks, startup_checks.TRIED = fail, ("masks",)
    parallel = replace(PLAIN, shard="full")
    model, world = laid_out(Transformers(str(folder)), parallel, world)
    assert cast(Any, model).document_mode == "rows"
    assert all(gradient.any() for gradient in first_gradient(model, parallel, world).values())


def test_a_family_that_takes_no_masks_gets_all_its_gradients(tmp_path: Path) -> None:
    """The failed try at the start ends a pass of the sharded model early."""
    run_ranks(2, _step_after_a_failed_try, save_folder("phi 3", tmp_path / "model"))


def test_tensors_are_not_divided(tmp_path: Path) -> None:
    model = meta_student(Transformers(str(save_folder("phi 3", tmp_path / "model"))), None)
    with pytest.raises(UsageError, match=r"parallel\.tensor_parallel: Phi3ForCausalLM .* Set .*parallel\.shard=full"):
        fullest_rank_holding(model, Layout(tensor=2), sequence_parallel=False)
    held = fullest_rank_holding(model, Layout(shards=2), sequence_parallel=False)
    whole = fullest_rank_holding(model, Layout(), sequence_parallel=False)
    assert held.parameters == pytest.approx(whole.parameters / 2, rel=1e-2)
    assert 2 * whole.largest_block == whole.block_numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch's compiler
def test_compiled_blocks(tmp_path: Path) -> None:
    start = Transformers(str(save_folder("phi 3", tmp_path / "model")))
    plain, compiled = (laid_out(start, replace(PLAIN, compile=c, recompute="full"), World())[0] for c in (False, True))
    tokens, positions = torch.randint(VOCAB, (2, 12)), torch.arange(12).expand(2, 12)
    inputs = tokens, torch.where(positions < 7, positions, positions - 7), (positions >= 7).long()
    for model in (plain, compiled):
        model(*inputs).square().sum().backward()
    for name, parameter in plain.named_parameters():
        difference = whole(compiled.get_parameter(name).grad) - whole(parameter.grad)
        assert difference.norm() < 1e-5 * whole(parameter.grad).norm(), name
