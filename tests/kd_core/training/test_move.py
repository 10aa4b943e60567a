"""Steps that the device decides: the fused kernel clips as the host does, and leaves out what is not finite.

A CPU has the same kernel. Whole steps and runs use it here by a patch of `decides_on_device`.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from torch import Tensor

from experiments.config import config_items
from kd_core.errors import NonFiniteError
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.training import loop
from kd_core.training import step as step_module
from kd_core.training.checkpoints.checkpoint_state import run_state
from kd_core.training.monitoring.histograms import histograms_of_step
from kd_core.training.monitoring.metric_log import read_metrics
from kd_core.training.move import clip_and_step, decides_on_device, step_if_finite
from kd_core.training.optimizer import AdamW
from kd_core.training.run_folder import RunFolder
from kd_core.training.step import train_step
from kd_core.training.step_reader import StepReader
from kd_core.training.stop_signals import StopSignals
from tests.kd_core.parallel.test_layouts import OBJECTIVE, OF_TWO, PLAIN, batches, student, tied, whole
from tests.ranks import run_ranks
from tests.tiny import Tiny

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-8, 0.1


@contextmanager
def decided_on_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "decides_on_device", lambda *_: True)
        yield


def parameters_after(clip_norm: float, decided: bool, gradients: list[list[Tensor]]) -> list[Tensor]:
    """Parameters after a step by each of the gradients."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]
    optimizer = AdamW(LR, BETAS, EPS, DECAY).build_for({"a": parameters[0], "b": parameters[1]}, "optimizer")
    for tensors in gradients:
        for parameter, gradient in zip(parameters, tensors, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if decided:
            step_if_finite(optimizer, torch.zeros((), dtype=torch.float64), norm, clip_norm)
        elif norm.isfinite():
            clip_and_step(optimizer, parameters, norm, clip_norm)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    return [parameter.detach() for parameter in parameters]


def by_hand(clip_norm: float, gradients: list[list[Tensor]]) -> list[Tensor]:
    """AdamW (arXiv 1711.05101, algorithm 2) with clipping, in float64. Steps that are not finite do not happen."""
    torch.manual_seed(0)
    values = [torch.randn(5, 7).double(), torch.randn(3).double()]
    means, squares, t = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values], 0
    for tensors in gradients:
        size = torch.cat([g.double().flatten() for g in tensors]).norm()
        if not size.isfinite():
            continue
        t += 1
        share = min(1.0, clip_norm / float(size)) if clip_norm else 1.0
        for i, gradient in enumerate(tensors):
            g = share * gradient.double()
            means[i] = BETAS[0] * means[i] + (1 - BETAS[0]) * g
            squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * g**2
            mean, square = means[i] / (1 - BETAS[0] ** t), squares[i] / (1 - BETAS[1] ** t)
            decayed = values[i] * (1 - LR * DECAY) if gradient.ndim > 1 else values[i]
            values[i] = decayed - LR * mean / (square.sqrt() + EPS)
    return values


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("decided", [False, True])
def test_both_moves_are_adamw_by_clipped_gradients(clip_norm: float, decided: bool) -> None:
    torch.manual_seed(1)
    # Sizes on both sides of the bound, so that clipping changes their ratio.
    gradients = [[size * torch.randn(5, 7), size * torch.randn(3)] for size in (3.0, 0.01, 20.0)]
    gradients.insert(1, [torch.full((5, 7), torch.inf), torch.zeros(3)])
    gradients.insert(0, [torch.zeros(5, 7), torch.full((3,), torch.nan)])
    found = parameters_after(clip_norm, decided, gradients)
    for value, wanted in zip(found, by_hand(clip_norm, gradients), strict=True):
        assert (value - wanted).abs().max() < 1e-6


def test_below_the_bound_the_host_leaves_the_gradients_as_torch_does() -> None:
    """Bits: torch multiplies by a factor of 1, which is left out here."""
    for clip_norm in (1.0, 1e-7):
        for share in (0.5, 0.998, 1 - 1e-7, 1.0, 1 + 1e-7, 2.0):
            torch.manual_seed(0)
            gradient = torch.randn(100)
            gradient *= share * clip_norm / gradient.norm()
            mine, theirs = (torch.nn.Parameter(torch.zeros(100)) for _ in range(2))
            mine.grad, theirs.grad = gradient.clone(), gradient.clone()
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
            clip_and_step(torch.optim.SGD([mine], lr=1.0), [mine], gradient.norm(), clip_norm)
            assert torch.equal(mine.grad, theirs.grad), (clip_norm, share)


def test_only_a_gpu_and_a_fused_kernel_decide() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    fused, plain = AdamW().build_for({"a": parameters[0]}, "optimizer"), torch.optim.SGD(parameters, lr=1.0)
    assert decides_on_device(fused, torch.device("cuda", 0))
    assert not decides_on_device(fused, torch.device("cpu"))
    assert not decides_on_device(plain, torch.device("cuda", 0))
    # Its first step allocates momentum without filling it, also where the kernel then does nothing.
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, fused=True)
    assert not decides_on_device(sgd, torch.device("cuda", 0))


def trained(parallel: Parallel, world: World, decided: bool) -> list[float]:
    """Gradient norms and losses of four steps, and between them one that is not finite and moves nothing."""
    model, world = student(tied, parallel, world)
    optimizer, numbers, weight = AdamW(lr=1e-3).build(model), [], model.norm.weight

    def take(number: int) -> None:
        with decided_on_device() if decided else nullcontext():
            found = train_step(
                model, optimizer, batches(number, parallel, world), objective=OBJECTIVE, clip_norm=0.1,
                parallel=parallel, world=world,
            )  # fmt: skip
        numbers.extend([found.grad_norm, found.sums["loss"]])

    for number in range(4):
        take(number)
        if number == 1:
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.mul_(torch.nan)
            before = {name: whole(tensor) for name, tensor in run_state(model, optimizer).items()}
            with pytest.raises(NonFiniteError):
                take(7)
            for name, tensor in run_state(model, optimizer).items():
                assert torch.equal(before[name].nan_to_num(), whole(tensor).nan_to_num()), name
            with torch.no_grad():
                weight.copy_(kept)
    return numbers


def on_ranks(world: World) -> None:
    for name in ("dp 2", "dp 2, whole copies", "tp 2"):
        parallel = OF_TWO[name]
        assert trained(parallel, world, decided=True) == pytest.approx(trained(parallel, world, decided=False)), name


def test_ranks_move_together_or_not_at_all() -> None:
    assert trained(PLAIN, World(), decided=True) == pytest.approx(trained(PLAIN, World(), decided=False))
    run_ranks(2, on_ranks)


def test_histograms_show_gradients_after_clipping() -> None:
    found = []
    for decided in (False, True):
        model, world = student(tied, PLAIN, World())
        optimizer = AdamW(lr=1e-3).build(model)
        with histograms_of_step(model, optimizer, world) as seen, decided_on_device() if decided else nullcontext():
            train_step(
                model, optimizer, batches(0, PLAIN, world), objective=OBJECTIVE, clip_norm=1e-3, parallel=PLAIN,
                world=world,
            )  # fmt: skip
        sums = {name: numbers["sum_squares"] for name, numbers in seen.items()}
        found.append({**sums, "moved": float(model.norm.weight.detach().double().square().sum())})
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    gradients = sum(value for name, value in found[0].items() if name.startswith("gradients/"))
    assert gradients == pytest.approx(1e-6, rel=1e-2)


def run(tiny: Tiny, folder: Path, items: list[str], stopping: StopSignals) -> list[dict[str, Any]]:
    """A run of six steps, and its numbers without its times."""
    config = config_items.resolve_items([*tiny.train_items(6), *items], "Experiment").config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    fdl.build(config).run(RunFolder(folder), World(), stopping)
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]


def test_a_stopped_run_is_saved_with_all_its_numbers_and_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    class AfterFour(StopSignals):
        steps = 0

        def agree_on_stop(self, world: World, has_data: bool = True) -> str | None:  # noqa: ARG002
            self.steps += 1
            return "told to" if self.steps == 4 else None

    items = ["evaluation.every=100", "checkpoint.every=100"]
    with decided_on_device():
        wanted = run(tiny, tmp_path / "whole", items, StopSignals())
        stopped = run(tiny, tmp_path / "stopped", items, AfterFour())
        assert [line["step"] for line in stopped] == [0, 1, 2, 3, 4]
        assert run(tiny, tmp_path / "stopped", items, StopSignals()) == wanted


def test_a_run_that_is_told_to_stop_waits_for_no_further_data(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping, begin_step, read_next, steps_read = StopSignals(), loop._Run.begin_step, StepReader.read_next, list[int]()

    def told_in_step_two(state: Any, step: int, *args: Any) -> Any:
        stopping.received = signal.SIGTERM if step == 2 else 0
        return begin_step(state, step, *args)

    def noted(reader: StepReader) -> None:
        read_next(reader)
        steps_read.append(reader.step)

    monkeypatch.setattr(loop._Run, "begin_step", told_in_step_two)
    monkeypatch.setattr(StepReader, "read_next", noted)
    lines = run(tiny, tmp_path / "run", ["evaluation.every=100"], stopping)
    assert lines[-1]["step"] == 2
    assert steps_read == [1, 2]


def test_a_run_reads_numbers_behind_the_next_step_and_logs_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str) -> None:
        real = getattr(loop._Run, name)

        def call(state: Any, *args: Any) -> Any:
            order.append(name[0] if name == "save" else f"{name[0]}{getattr(args[0], 'step', args[0])}")
            return real(state, *args)

        monkeypatch.setattr(loop._Run, name, call)

    def slow(*args: Any, **settings: Any) -> Any:
        time.sleep(0.02)
        return step_module.begin_step(*args, **settings)

    for name in ("begin_step", "end_step", "validate", "save"):
        noted(name)
    # A step that is read right behind the one before it has its own time.
    monkeypatch.setattr(loop, "begin_step", slow)
    items = ["evaluation.every=4", "checkpoint.every=3", "logger.histograms_every=2"]
    lines = []
    for decided in (False, True):
        order.clear()
        with decided_on_device() if decided else nullcontext():
            lines.append(run(tiny, tmp_path / str(decided), items, StopSignals()))
        times = [line["speed/step_seconds"] for line in read_metrics(tmp_path / str(decided) / "metrics.jsonl")[1:]]
        assert min(times) > 0.02
    assert [list(line) for line in lines[1]] == [list(line) for line in lines[0]]
    for mine, wanted in zip(*lines, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
    assert " ".join(order) == "v0 b1 b2 e1 b3 e2 e3 s b4 e4 v4 b5 b6 e5 e6 v6 s"
