"""Families whose blocks or norms are their own: the loss and the gradient of several ranks are those of one process."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.lora_layers import adapted_layers
from kd_core.students.families.registry import family_decoder
from kd_core.students.huggingface.config_json import parse_architecture
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, build_student
from kd_core.training.step import train_step
from tests.kd_core.parallel.test_layouts import OBJECTIVE, PLAIN, Looks, batches, student
from tests.kd_core.students.models import CPU, their_config, their_model
from tests.ranks import run_ranks

TENSOR = replace(PLAIN, tensor_parallel=2)
BY_POSITION = replace(TENSOR, sequence_parallel=True)
FULL_SHARDS = replace(PLAIN, shard="full")
NORMS = {"olmo2": BY_POSITION, "olmo2, tied, with biases": FULL_SHARDS, "glm4": BY_POSITION, "gpt-oss": TENSOR}
OTHERS = {
    "smollm3": TENSOR,
    "smollm3, windows, biases": FULL_SHARDS,
    "phi3": FULL_SHARDS,
    "phi3, partial rotary, tied": TENSOR,
    "olmo3": FULL_SHARDS,
    "olmo3, yarn": TENSOR,
    "glm4, no biases, tied": FULL_SHARDS,
}
TARGETS = ("q_proj", "v_proj", "mlp_fc1")
# Two heads of keys are repeated on four ranks.
REPEATED = {"olmo2": replace(BY_POSITION, tensor_parallel=4), "olmo3": replace(TENSOR, shard="full")}


def _step(arch: Architecture, parallel: Parallel, world: World) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the loss of a step, and the gradients of all parameters."""
    model, world = student(functools.partial(family_decoder, arch), parallel, world)
    optimizer = Looks(model.parameters())
    rows = batches(0, parallel, world)
    made = train_step(model, optimizer, rows, objective=OBJECTIVE, clip_norm=0.0, parallel=parallel, world=world)
    names = [name for name, _ in model.named_parameters()]
    return made.sums["loss"] / made.tokens, dict(zip(names, optimizer.seen, strict=True))


def _compare(world: World, cases: dict[str, tuple[Architecture, Parallel]]) -> None:
    for name, (arch, parallel) in cases.items():
        loss, gradients = _step(arch, parallel, world)
        wanted_loss, wanted = _step(arch, PLAIN, World())
        assert loss == pytest.approx(wanted_loss, rel=1e-5), name
        size = float(torch.stack([value.norm() for value in wanted.values()]).norm())
        for parameter, value in wanted.items():
            assert (gradients[parameter] - value).norm() < 1e-5 * value.norm() + 1e-7 * size, (name, parameter)


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(2, NORMS), pytest.param(2, OTHERS, marks=pytest.mark.slow), pytest.param(4, REPEATED, marks=pytest.mark.slow)],
    ids=["norms and experts", "others", "repeated keys"],
)
def test_ranks_take_the_step_of_one_process(ranks: int, layouts: dict[str, Parallel]) -> None:
    configs = {name: their_config(name).to_dict() for name in layouts}
    cases = {name: (parse_architecture(Path(name), configs[name]), layouts[name]) for name in layouts}
    run_ranks(ranks, _compare, cases)


def _read_and_write(world: World, folder: Path) -> None:
    world = world.with_layout(TENSOR.layout(world.size))
    base = Pretrained(str(folder / "base"))
    start = LoraStart(base, TARGETS, rank=3, alpha=5.0, adapter=str(folder / "alone" / "adapter"))
    model = parallelize(start.build_on_meta(), TENSOR, world)
    start.fill(model, 0)
    save_pretrained(model, folder / "ranks", folder / "base", first=world.is_first)


def test_joined_weights_and_adapters_are_read_and_written_by_ranks(tmp_path: Path) -> None:
    their_model("phi3").save_pretrained(tmp_path / "base")
    alone = build_student(LoraStart(Pretrained(str(tmp_path / "base")), TARGETS, rank=3, alpha=5.0), CPU, seed=0)
    with torch.no_grad():
        for layer in adapted_layers(alone).values():
            layer.lora_B.normal_(0, 0.2)
    save_pretrained(alone, tmp_path / "alone", tmp_path / "base")
    run_ranks(2, _read_and_write, tmp_path)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("alone", "ranks"))
        assert one.keys() == two.keys()
        assert any("qkv_proj" in name for name in one)
        for name, value in one.items():
            # Merging multiplies in parts on ranks.
            torch.testing.assert_close(two[name], value, atol=1e-5 if file == "model.safetensors" else 0.0, rtol=0.0)
