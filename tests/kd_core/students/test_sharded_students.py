"""Students spread over 4 processes, by hand (dp 2 × tp 2): they begin and are saved with one process's numbers."""

import functools
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kd_core.errors import UsageError
from kd_core.files import read_json, write_json
from kd_core.parallel.world import World
from kd_core.sharded_values import fill_sharded, full_tensor, local_box
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.decoder.lora_layers import LoraLinear, LoraSettings, adapted_layers
from kd_core.students.huggingface.config_json import config_fields
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, Random, StudentInit, build_student
from tests.ranks import run_ranks

CPU = torch.device("cpu")
# 91 rows, 18 of queries and 6 of keys do not divide by 4: shards are uneven. Norms of heads and biases are there.
ARCH = Architecture(
    vocab_size=91, hidden_size=24, intermediate_size=36, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_positions=64, qkv_bias=True, o_bias=True, qk_norm=True,
    family="qwen3",
)  # fmt: skip
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def _random(folder: Path) -> Random:
    return Random(str(folder), 24, 36, 2, 6, 2, init_std=0.2)


def _folder(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "config.json", config_fields(ARCH, 0, 1))
    save_pretrained(build_student(_random(folder), CPU, seed=3), folder / "made", folder)
    return folder / "made"


def _place(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = getattr(module, name)
    if parameter is not None:
        placed = nn.Parameter(distribute_tensor(parameter, mesh, [placement]), requires_grad=parameter.requires_grad)
        module.register_parameter(name, placed)


def _placements(name: str) -> dict[str, Placement]:
    last = name.rsplit(".", 1)[-1]
    if last in COLUMNS:
        return {"weight": Shard(0), "bias": Shard(0), "lora_B": Shard(0)}
    if last in ROWS:
        return {"weight": Shard(1), "lora_A": Shard(1)}
    return {"weight": Shard(0)} if last == "embed_tokens" else {}


def _spread(start: StudentInit, fsdp: bool = True) -> Decoder:
    """Tensor parallel over two, then FSDP over two; every parameter a DTensor of the whole mesh."""
    model = start.build_on_meta()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    for name, module in list(model.named_modules()):
        for parameter, _ in list(module.named_parameters(recurse=False)):
            if name != "lm_head":
                _place(module, parameter, mesh["tp"], _placements(name).get(parameter, Replicate()))
    model.tie()
    for block in model.layers if fsdp else ():
        fully_shard(block, mesh=mesh["dp_shard"])
    if fsdp:
        fully_shard(model, mesh=mesh["dp_shard"])
    model.to_empty(device="cpu")
    model.tie()
    return model


def _digest(model: Decoder) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + full_tensor(parameter).numpy().tobytes())
    return digest.hexdigest()


def _fail_on(folder: Path, message: str) -> str:
    """How a rank stops when the start's weights are bad."""
    model = _spread(Pretrained(str(folder)))
    with pytest.raises(UsageError, match=message) as error:
        Pretrained(str(folder)).fill(model, 0)
    return type(error.value).__name__


def _work(world: World, folder: Path, bad: Path) -> None:
    starts = {
        "folder": Pretrained(str(folder)),
        "random": _random(folder),
        "lora": LoraStart(_random(folder), ("all",), 3),
    }
    found: dict[str, object] = {}
    for name, start in starts.items():
        model = _spread(start)
        start.fill(model, 7)
        found[name] = _digest(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    weight = model.layers[0].self_attn.q_proj.weight
    local, box = local_box(weight)
    assert local.numel() == weight.numel() // 4
    assert torch.equal(full_tensor(weight)[box], local)
    for layer in adapted_layers(model).values():
        with torch.no_grad():
            layer.lora_B.fill_(0.1)
    first = world.is_first
    save_pretrained(model, folder.parent / "saved", folder, max_file_bytes=10_000, first=first)
    # A disk that cannot be written to on the first stops all, after the same number of collectives.
    blocked = folder.parent / "blocked"
    try:
        save_pretrained(model, blocked / "saved", folder, max_file_bytes=10_000, first=first)
    except (UsageError, OSError) as error:
        found["blocked"] = type(error).__name__
    found["bad"] = _fail_on(bad, "holds NaN")
    write_json(bad / f"rank{world.rank}.json", found)


def test_four_ranks_begin_and_save_as_one_does(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base")
    (folder.parent / "blocked").write_text("a file where a folder should be made")
    bad = tmp_path / "bad"
    bad.mkdir()
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan  # on one rank alone
    save_file(state, bad / "model.safetensors")
    (bad / "config.json").write_bytes((folder / "config.json").read_bytes())

    run_ranks(4, _work, folder, bad)
    ranks = [read_json(bad / f"rank{rank}.json", "what a rank found") for rank in range(4)]

    for name, start in (
        ("folder", Pretrained(str(folder))),
        ("random", _random(folder)),
        ("lora", LoraStart(_random(folder), ("all",), 3)),
    ):
        one = _digest(build_student(start, CPU, seed=7))
        assert [found[name] for found in ranks] == [one] * 4, name
    assert [found["bad"] for found in ranks] == ["UsageError", *["RemoteError"] * 3]
    assert ranks[0]["blocked"] in {"NotADirectoryError", "FileExistsError"}
    assert [found["blocked"] for found in ranks[1:]] == ["RemoteError"] * 3

    alone = build_student(LoraStart(_random(folder), ("all",), 3), CPU, seed=7)
    for layer in adapted_layers(alone).values():
        nn.init.constant_(layer.lora_B, 0.1)
    save_pretrained(alone, tmp_path / "alone", folder)
    files = read_json(folder.parent / "saved" / "model.safetensors.index.json", "an index")["weight_map"]
    assert len(set(files.values())) > 2
    wanted = load_file(tmp_path / "alone" / "model.safetensors")
    assert set(files) == set(wanted)
    for name, file in files.items():
        assert torch.equal(load_file(folder.parent / "saved" / file)[name], wanted[name]), name
    one, four = (at / "adapter" / "adapter_model.safetensors" for at in (tmp_path / "alone", folder.parent / "saved"))
    assert one.read_bytes() == four.read_bytes()


def _boxes() -> None:
    """Values put by box are those that torch itself distributes, whatever the placements."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = torch.arange(11 * 7, dtype=torch.float32).view(11, 7)
    for placements in (
        [Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(0)],
        [Shard(1), Replicate()], [Replicate(), Replicate()],
    ):  # fmt: skip
        wanted = distribute_tensor(full, mesh, placements)
        empty = distribute_tensor(torch.zeros_like(full), mesh, placements)
        fill_sharded(empty, lambda box: full[box])
        assert torch.equal(empty.to_local(), wanted.to_local()), placements


def _adapters() -> None:
    """A tensor-parallel adapted layer gives one process's outputs and gradients, with dropout too."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    for style, placements, shape in (
        (ColwiseParallel(output_layouts=Replicate()), _placements("q_proj"), (12, 24)),
        (RowwiseParallel(input_layouts=Replicate()), _placements("o_proj"), (24, 12)),
    ):
        settings = LoraSettings(rank=3, alpha=6.0, dropout=0.4, rank_stabilised=False)
        layers = []
        for _ in range(2):
            torch.manual_seed(0)
            layer = LoraLinear(nn.Linear(shape[1], shape[0]), settings).to_empty(device="cpu")
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
            layers.append(layer)
        one, spread = layers
        partition = functools.partial(_partition, placements)
        style._partition_linear_fn = partition
        parallelize_module(spread, mesh, style)
        x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1))
        outputs = []
        for layer in layers:
            torch.manual_seed(5)
            out = layer(x)
            out.square().sum().backward()
            outputs.append(out)
        assert torch.allclose(outputs[0], outputs[1], atol=1e-4), style
        for name, parameter in one.named_parameters():
            other = spread.get_parameter(name).grad
            assert (parameter.grad is None) == (other is None), name
            if parameter.grad is not None:
                assert torch.allclose(parameter.grad, full_tensor(other), rtol=1e-4, atol=1e-3), name


def _partition(placements: dict[str, Placement], name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    del name
    for parameter, _ in list(module.named_parameters(recurse=False)):
        _place(module, parameter, mesh, placements.get(parameter, Replicate()))


def _both(world: World) -> None:
    assert world.size == 4
    _boxes()
    _adapters()


def test_parts_and_adapters_of_dtensors() -> None:
    run_ranks(4, _both)
