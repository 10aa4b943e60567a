"""The device of a rank, and what a process group is told of it. No GPU is needed: torch is asked about patched ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kd_core.errors import UsageError
from kd_core.parallel import world
from kd_core.parallel.world import joined_world


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices that are chosen on a machine of two GPUs."""
    chosen: list[torch.device] = []
    threads, is_cudnn_used = torch.get_num_threads(), torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield chosen
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_cudnn_sdp(is_cudnn_used)


def test_a_rank_without_a_gpu_of_its_own_is_refused(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "LOCAL_RANK: got 2; this machine has 2 GPUs, and every rank needs one of its own. .*--nproc-per-node=2"
    with pytest.raises(UsageError, match=message), joined_world():
        pass
    assert not two_gpus


def test_a_rank_that_sees_one_gpu_takes_it(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with joined_world() as joined:
        assert joined.device == torch.device("cuda", 0)
    assert two_gpus == [torch.device("cuda", 0)]
    # Without the launcher's choice, ranks share the GPU of the machine, which NCCL refuses.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UsageError, match="LOCAL_RANK: got 3; this machine has 1 GPU, "), joined_world():
        pass


def test_a_rank_binds_its_group_to_its_gpu(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(world, "_rendezvous_store", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: seen.update(settings, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined_world() as joined:
        assert joined.device == seen["device_id"] == torch.device("cuda", 1)
    assert seen["backend"] == "cuda:nccl,cpu:gloo"
    assert two_gpus == [torch.device("cuda", 1)]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_one_process_takes_the_first_gpu(two_gpus: list[torch.device]) -> None:
    with joined_world() as joined:
        assert joined.device == torch.device("cuda", 0)
    assert two_gpus == [torch.device("cuda", 0)]
