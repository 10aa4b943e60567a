"""Families with experts against transformers: gradients, packed rows, adapters, ranks, and a resumed run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_core.errors import UsageError
from kd_core.files import read_json, write_json
from kd_core.losses.objective import Auxiliary, CrossEntropy, Objective
from kd_core.parallel.config import Parallel
from kd_core.parallel.parallelize import parallelize
from kd_core.parallel.world import World
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.families.registry import FAMILIES
from kd_core.students.huggingface.config_json import parse_architecture, read_architecture
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, Random, build_student
from kd_core.training.checkpoints import checkpoint
from kd_core.training.checkpoints.async_saver import Saver
from kd_core.training.checkpoints.checkpoint import Progress
from kd_core.training.checkpoints.checkpoint_settings import Checkpoint
from kd_core.training.generation import continue_greedily
from kd_core.training.monitoring.hang_watchdog import Pulse
from kd_core.training.optimizer import AdamW
from kd_core.training.step import batch_loss, train_step
from kd_core.types import Batch
from tests.kd_core.students.models import CPU, difference, load, rows, their_model
from tests.ranks import run_ranks

NAMES = ["mixtral", "qwen3 moe", "qwen3 moe, dense layers", "gpt-oss"]
FLOAT32 = Parallel(precision="float32")


def batch(T: int = 40, B: int = 1, padding: int = 0) -> Batch:
    """Rows of one document, whose labels are the next tokens, with padding at their end."""
    tokens, positions, documents = rows(B, T + 1)
    is_text = torch.arange(T) < T - padding
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=is_text.expand(B, T),
        position_ids=positions[:, :-1],
        document_ids=torch.where(is_text, documents[:, :-1], -1),
        topk_token_ids=tokens[:, 1:, None],
        topk_log_probs=torch.full((B, T, 1), -0.5),
        tail_log_prob=torch.full((B, T), -1.0),
        label_log_prob=torch.full((B, T), -0.5),
    )


def named_gradients(name: str, theirs: Any) -> dict[str, Tensor]:
    """Their gradients by our names, which differ for routers and sinks alone."""
    renamed = {"mlp.gate.": "mlp.router.", "self_attn.sinks": "self_attn.sinks.weight"}
    if name == "gpt-oss":
        renamed.pop("mlp.gate.")
    found: dict[str, Tensor] = {}
    for key, parameter in theirs.named_parameters():
        for old, new in renamed.items():
            key = key.replace(old, new)  # noqa: PLW2901
        found[key.removeprefix("model.")] = parameter.grad
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_the_balance_loss_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = their_model(name, router_aux_loss_coef=0.5)
    theirs.save_pretrained(tmp_path)
    ours, row = load(tmp_path), batch()
    objective = Objective({"sft": CrossEntropy(), "balance": Auxiliary(weight=0.5, name="router_balance")})
    found = batch_loss(ours, row, objective, 1 / 40)
    found.total.backward()
    # transformers shifts labels itself: the label of a position is the token behind it.
    output = theirs(row.tokens, output_router_logits=True)
    loss = F.cross_entropy(output.logits[0], row.labels[0]) + 0.5 * output.aux_loss
    loss.backward()
    assert found.total.item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.sums["balance_loss"].item() / 40 == pytest.approx(output.aux_loss.item(), rel=1e-5)
    wanted = named_gradients(name, theirs)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - wanted[key]).norm() < 1e-4 * wanted[key].norm(), key
    assert len(wanted) == len(list(ours.parameters()))


@pytest.mark.parametrize("name", ["qwen3 moe, dense layers", "gpt-oss"])
def test_rows_padding_and_passes_change_nothing(name: str, tmp_path: Path) -> None:
    """The values of a row are its own: of rows together, alone, and padded."""
    their_model(name).save_pretrained(tmp_path)
    ours = load(tmp_path)
    objective = Objective(
        {"sft": CrossEntropy(), "b": Auxiliary(name="router_balance"), "z": Auxiliary(name="router_z")}
    )

    def sums(rows_of_pass: list[Batch]) -> dict[str, float]:
        with torch.no_grad():
            losses = [batch_loss(ours, part, objective, 1.0).sums for part in rows_of_pass]
        return {key: sum(float(loss[key]) for loss in losses) for key in ("b_loss", "z_loss", "loss")}

    both = batch(B=2)
    alone = [replace(both, **{k: v[i : i + 1] for k, v in vars(both).items() if isinstance(v, Tensor)}) for i in (0, 1)]
    assert sums([both]) == pytest.approx(sums(alone), rel=1e-5)
    # A row of 30 positions gives what it gives with ten of padding behind it.
    short = replace(alone[0], **{k: v[:, :30] for k, v in vars(alone[0]).items() if isinstance(v, Tensor)})
    is_text = torch.arange(40)[None] < 30
    padded = replace(alone[0], loss_mask=is_text, document_ids=torch.where(is_text, 0, -1))
    assert sums([padded]) == pytest.approx(sums([short]), rel=1e-5)
    assert sums([both.unscored()]) == {"b_loss": 0, "z_loss": 0, "loss": 0}


@pytest.mark.parametrize("name", ["qwen3 moe, dense layers", "gpt-oss"])
def test_a_packed_row_gives_what_its_documents_give_alone(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    tokens, cut = rows(B=1)[0], (1, 9, 30)
    positions = torch.cat([torch.arange(n) for n in cut])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(cut)])[None]
    with torch.no_grad():
        alone = torch.cat([theirs(part[None]).logits[0] for part in tokens[0].split(cut)])
        assert (load(tmp_path)(tokens, positions, documents)[0] - alone).abs().max() < 3e-5


def test_continuations_with_a_cache_and_dropped_layers(tmp_path: Path) -> None:
    theirs = their_model("gpt-oss")
    theirs.save_pretrained(tmp_path)
    start = Pretrained(str(tmp_path), keep_layers=(1, 2, 3))
    ours, ids = build_student(start, CPU, 0), rows(1, 9)[0]
    assert ours.arch.windows == (None, 6, None)
    assert isinstance(ours, Decoder)
    assert Pretrained(str(tmp_path)).architecture().experts == ours.arch.experts
    theirs.model.layers, theirs.config.layer_types = theirs.model.layers[1:], theirs.config.layer_types[1:]
    found = continue_greedily(ours, [ids[0].tolist()], 6, FLOAT32, World())[0]
    for token in found:
        with torch.no_grad():
            assert theirs(ids, use_cache=False).logits[0, -1].argmax() == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["qwen3 moe", "gpt-oss"])
def test_adapters_of_attention_merge_and_are_read_by_peft(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "base")
    ours = build_student(LoraStart(Pretrained(str(tmp_path / "base")), ("attention",), 3), CPU, 0)
    for key, parameter in ours.named_parameters():
        assert parameter.requires_grad == ("lora" in key)
        if key.endswith("lora_B"):
            parameter.data.normal_(0, 0.2)
    save_pretrained(ours, tmp_path / "export", tmp_path / "base")
    assert isinstance(ours, Decoder)
    assert difference(ours, theirs) > 0.1
    assert difference(ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "export" / "adapter").eval()) < 1e-4
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    assert difference(ours, merged.eval()) < 1e-4


def test_rope_without_scaling_stays_so_in_an_export(tmp_path: Path) -> None:
    """Where no field says so, transformers has its YaRN for gpt-oss."""
    theirs = their_model("gpt-oss", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", tmp_path / "theirs")
    assert load(tmp_path / "ours").arch == ours.arch
    assert ours.arch.rope_scaling is None
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert difference(ours, again) < 1e-4
    config = read_json(tmp_path / "ours" / "config.json", "a configuration")
    assert config.pop("rope_scaling") is config.pop("rope_parameters").get("factor") is None
    unset = {**config, "rope_scaling": None, "rope_parameters": None}
    assert parse_architecture(tmp_path, unset).rope_scaling == parse_architecture(tmp_path, config).rope_scaling
    assert parse_architecture(tmp_path, config).rope_scaling


def test_experts_have_no_adapters_which_is_said(tmp_path: Path) -> None:
    their_model("mixtral").save_pretrained(tmp_path)
    for target in ("all", "mlp"):
        with pytest.raises(UsageError, match=f"got '{target}'.*experts, which have no adapters; wanted `attention`"):
            LoraStart(Pretrained(str(tmp_path)), (target,)).build_on_meta()


def in_and_out(world: World, folders: list[Path]) -> None:
    """Each rank reads its experts, and the first writes what all of them hold."""
    for folder in folders:
        start = Pretrained(str(folder / "base"))
        for name, settings in {"tp": {"tensor_parallel": 2}, "dp": {"shard": "full"}}.items():
            parallel = Parallel("float32", **settings)
            model = parallelize(start.build_on_meta(), parallel, world.with_layout(parallel.layout(world.size)))
            start.fill(model, 0)
            held = model.get_parameter("layers.1.mlp.experts.down_proj")
            assert held.to_local().numel() * 2 == held.numel()
            save_pretrained(model, folder / name, folder / "base", first=world.is_first)


def test_two_ranks_read_and_write_their_experts(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("mixtral", "gpt-oss")]
    for folder in folders:
        their_model(folder.name).save_pretrained(folder / "base")
    run_ranks(2, in_and_out, folders)
    for folder in folders:
        wanted = load_file(folder / "base" / "model.safetensors")
        for name in ("tp", "dp"):
            found = load_file(folder / name / "model.safetensors")
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    their_model("gpt-oss").save_pretrained(tmp_path / "base")
    objective = Objective(
        {"sft": CrossEntropy(), "b": Auxiliary(name="router_balance"), "z": Auxiliary(name="router_z")}
    )

    def begin() -> tuple[Any, torch.optim.Optimizer]:
        model = build_student(Pretrained(str(tmp_path / "base")), CPU, 0)
        return model, AdamW(lr=1e-2).build(model)

    def steps(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        world = World()
        return [
            train_step(
                model, optimizer, [batch(T, 2)], objective=objective, clip_norm=1.0, parallel=FLOAT32, world=world
            ).sums["loss"]
            for T in (12, 13)
        ]  # fmt: skip

    model, optimizer = begin()
    steps(model, optimizer)
    (tmp_path / "run").mkdir()
    with Saver(tmp_path / "run", Checkpoint(), "{}", World(), Pulse()) as saver:
        saver.save(Progress(2, 4), model, optimizer)
    wanted = steps(model, optimizer)
    again, again_optimizer = begin()
    folder = checkpoint.newest_undamaged(tmp_path / "run", World())
    assert folder is not None
    checkpoint.load(folder, again, again_optimizer)
    assert steps(again, again_optimizer) == wanted
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_random_experts_have_the_size_of_the_start(tmp_path: Path) -> None:
    their_model("qwen3 moe, dense layers").save_pretrained(tmp_path)
    model = Random(str(tmp_path), 16, 20, 2, 2, 1).build_on_meta()
    assert model.get_parameter("layers.1.mlp.experts.down_proj").shape == (4, 16, 20)


def test_random_students_begin_with_zero_biases(tmp_path: Path) -> None:
    their_model("gpt-oss").save_pretrained(tmp_path)
    model = build_student(Random(str(tmp_path), 16, 24, 2, 2, 1), CPU, 0)
    found = {name: parameter for name, parameter in model.named_parameters() if "bias" in name}
    assert len(found) == 2 * 7
    assert all(not parameter.any() for parameter in found.values())
    assert model.get_parameter("layers.1.mlp.experts.gate_up_proj").shape == (4, 16, 48)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gpt-oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"config\.json: .*quantised \(MXFP4\).*dequantize=True",
        ),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0; only 7.0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts.per_token: got 5; wanted 1 to 4"),
        ("mixtral", {"num_experts": 3}, "num_experts is 3, num_local_experts is 4; wanted one"),
        ("mixtral", {"num_local_experts": 10**9}, "experts.count: got 1000000000"),
        ("qwen3 moe", {"decoder_sparse_step": 0}, "damaged"),
        ("qwen3 moe", {"mlp_only_layers": 3}, "damaged"),
    ],
)
def test_configurations_that_are_not_supported(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    their_model(name).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json", "a configuration"), **change})
    with pytest.raises(UsageError, match=message):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt-oss"])
@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_is_read_by_either_name(name: str, field: str, tmp_path: Path) -> None:
    config = their_model(name).config.to_dict()
    count = config.pop("num_experts", None) or config["num_local_experts"]
    config.pop("num_local_experts", None)
    experts = parse_architecture(tmp_path, {**config, field: count}).experts
    assert experts is not None
    assert experts.count == count < 8


def test_mixtral_has_a_theta_of_its_own_where_none_is_named(tmp_path: Path) -> None:
    config = their_model("mixtral").config.to_dict()
    for name in ("rope_parameters", "rope_theta"):
        config.pop(name, None)
    assert parse_architecture(tmp_path, config).rope_theta == 1e6
    assert parse_architecture(tmp_path, {**config, "rope_parameters": {"rope_theta": 5e3}}).rope_theta == 5e3


def test_kept_layers_without_experts_have_no_router_terms(tmp_path: Path) -> None:
    their_model("qwen3 moe, dense layers").save_pretrained(tmp_path)
    dense = Pretrained(str(tmp_path), keep_layers=(0,)).build_on_meta()
    assert dense.auxiliary_names == ()
    assert Pretrained(str(tmp_path), keep_layers=(0, 1)).build_on_meta().auxiliary_names


def test_names_of_experts_are_complete(tmp_path: Path) -> None:
    their_model("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    assert len(FAMILIES["mixtral"].rows_of_experts("layers.0.mlp.experts.gate_up_proj", 4)) == 8
    experts = "model.layers.1.block_sparse_moe.experts"
    missing = {name: tensor for name, tensor in state.items() if name != f"{experts}.2.w3.weight"}
    for tensors, message in (
        (missing, r"1 tensors are missing.*2\.w3"),
        ({**state, f"{experts}.4.w3.weight": torch.zeros(48, 32)}, r"experts\.4\.w3.*wanted no such tensor"),
        ({**state, f"{experts}.2.w3.weight": torch.zeros(47, 32)}, r"shape \(47, 32\); wanted shape \(48, 32\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(UsageError, match=message):
            load(tmp_path)
