"""Folders whose weights disagree with themselves are read as transformers reads them, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kd_core.errors import UsageError
from kd_core.students.decoder.decoder import Decoder
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.lora_start import LoraStart
from kd_core.students.starts.start import Pretrained, build_student, meta_student
from kd_core.students.student import allocate
from tests.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
Weights = dict[str, Tensor]
SINGLE, INDEX, EMBEDDING = "model.safetensors", "model.safetensors.index.json", "model.embed_tokens.weight"
IDS = torch.tensor([[3, 17, 40, 200, 9, 77]])


def _save(weights: Weights, path: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path, metadata={"format": "pt"})


def _shards(folder: Path, weights: Weights) -> None:
    """Two shards and their index, as transformers writes them."""
    names, places = sorted(weights), {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        _save({name: weights[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _other(weights: Weights) -> Weights:
    torch.manual_seed(0)
    return {name: value + 0.2 * torch.randn_like(value) for name, value in weights.items()}


def _with_head(folder: Path, weights: Weights) -> None:
    _save({**weights, "lm_head.weight": _other(weights)[EMBEDDING]}, folder / SINGLE)


def _with_head_in_shards(folder: Path, weights: Weights) -> None:
    (folder / SINGLE).unlink()
    _shards(folder, {**weights, "lm_head.weight": _other(weights)[EMBEDDING]})


def _with_the_same_head(folder: Path, weights: Weights) -> None:
    _save({**weights, "lm_head.weight": weights[EMBEDDING]}, folder / SINGLE)


def _with_a_head_for_an_embedding(folder: Path, weights: Weights) -> None:
    embedding = weights.pop(EMBEDDING)
    _save({**weights, "lm_head.weight": embedding}, folder / SINGLE)


def _older_shards_beside(folder: Path, weights: Weights) -> None:
    _shards(folder, _other(weights))


def _a_shard_of_no_index_beside(folder: Path, weights: Weights) -> None:
    (folder / SINGLE).unlink()
    _shards(folder, weights)
    _save(_other(weights), folder / "model-00003-of-00003.safetensors")


def _other_formats_beside(folder: Path, weights: Weights) -> None:
    _save(_other(weights), folder / "consolidated.safetensors")
    torch.save(_other(weights), folder / "pytorch_model.bin")


def _named_by_the_config(folder: Path, weights: Weights) -> None:
    _save(_other(weights), folder / "better.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "better.safetensors"}))


def _logits(model: Decoder) -> Tensor:
    positions = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        return model(IDS, positions, torch.zeros_like(IDS))[0]


def _theirs(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits[0]


def _made(tiny: Tiny, folder: Path, change: Callable[[Path, Weights], None]) -> Path:
    shutil.copytree(tiny.teacher, folder)
    change(folder, load_file(folder / SINGLE))
    return folder


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (_with_head, False), (_with_head_in_shards, False), (_with_the_same_head, True),
        (_with_a_head_for_an_embedding, True), (_older_shards_beside, True), (_a_shard_of_no_index_beside, True),
        (_other_formats_beside, True),
    ],
)  # fmt: skip
def test_a_folder_is_read_as_transformers_reads_it(
    tiny: Tiny, tmp_path: Path, change: Callable[[Path, Weights], None], tied: bool
) -> None:
    folder = _made(tiny, tmp_path / "model", change)
    model = build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
    theirs = _theirs(folder)
    torch.testing.assert_close(_logits(model), theirs, atol=1e-4, rtol=1e-4)
    assert model.arch.tie_embeddings == tied
    save_pretrained(model, tmp_path / "export", folder)
    torch.testing.assert_close(_theirs(tmp_path / "export"), theirs, atol=1e-4, rtol=1e-4)


def _nothing(path: Path) -> None:
    path.unlink()


def _whole(path: Path) -> None:
    assert path.is_file()


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_a_missing_shard(path: Path) -> None:
    path.write_text(path.read_text().replace("model-00002-", "model-00003-"))


@pytest.mark.parametrize("index", [_nothing, _whole, _cut_short, _dangling, _a_folder, _of_a_missing_shard])
@pytest.mark.parametrize("single", [_nothing, _whole, _cut_short, _dangling, _a_folder])
def test_a_single_file_and_an_index_are_taken_as_transformers_takes_them(
    tiny: Tiny, tmp_path: Path, single: Callable[[Path], None], index: Callable[[Path], None]
) -> None:
    folder = _made(tiny, tmp_path / "model", _older_shards_beside)
    single(folder / SINGLE)
    index(folder / INDEX)
    try:
        theirs = _theirs(folder)
    except Exception:  # their errors are of many types
        with pytest.raises(UsageError):
            build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
        assert single is _cut_short or (single is not _whole and index is not _whole)
        return
    model = build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)
    torch.testing.assert_close(_logits(model), theirs, atol=1e-4, rtol=1e-4)
    assert single is _whole or (single is not _cut_short and index is _whole)


def _adapter_beside(folder: Path, weights: Weights) -> None:
    del weights
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))


def _pickled_alone(folder: Path, weights: Weights) -> None:
    (folder / SINGLE).unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _a_tensor_twice(folder: Path, weights: Weights) -> None:
    _a_shard_of_no_index_beside(folder, weights)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["extra"] = "model-00003-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_named_by_the_config, "transformers_weights is 'better.safetensors'; only None is supported"),
        (_adapter_beside, "holds adapter_config.json beside a model"),
        (_pickled_alone, r"model.safetensors: no such file.*as .bin are not read"),
        (_a_tensor_twice, "wanted no such tensor"),
    ],
)
def test_a_mixture_is_refused(
    tiny: Tiny, tmp_path: Path, change: Callable[[Path, Weights], None], message: str
) -> None:
    folder = _made(tiny, tmp_path / "model", change)
    with pytest.raises(UsageError, match=message):
        build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0)


def _adapter(tiny: Tiny, folder: Path, settings: dict[str, object]) -> Tensor:
    """An adapter of PEFT that has learnt something; returns the logits that it gives once it is loaded again."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **settings})  # type: ignore[arg-type]
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.teacher), folder)
    with torch.no_grad():
        return again(IDS).logits[0]


def _ours(tiny: Tiny, folder: Path, **settings: object) -> Tensor:
    start = LoraStart(Pretrained(str(tiny.teacher)), ("q_proj", "v_proj"), rank=4, alpha=4.0, adapter=str(folder))
    start = LoraStart(**{**vars(start), **settings})  # type: ignore[arg-type]
    return _logits(build_student(start, torch.device("cpu"), seed=0))


SAME: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "as usual": ({}, {}),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, {}),
    "mica": ({"init_lora_weights": "mica"}, {}),
    "random B": ({"init_lora_weights": False}, {}),
    "rank-stabilised": ({"use_rslora": True}, {"rank_stabilised": True}),
    "some layers": ({"layers_to_transform": [1, 3]}, {"layers": (1, 3)}),
    "all but some": (
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["o_proj"]}, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), SAME.values(), ids=SAME)
def test_an_adapter_means_what_peft_means_by_it(
    tiny: Tiny, tmp_path: Path, theirs: dict[str, object], ours: dict[str, object]
) -> None:
    wanted = _adapter(tiny, tmp_path / "adapter", theirs)
    torch.testing.assert_close(_ours(tiny, tmp_path / "adapter", **ours), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - _theirs(tiny.teacher)).abs().max() > 0.01


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which also changes the base"),
    "fast pissa": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights is 'pissa_niter_2'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "dora": ({"use_dora": True}, "use_dora is True, which is not supported"),
    "ranks by name": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .*not supported"),
    "alphas by name": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is .*not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*not supported"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is .*not supported"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'; only 'none'"),
    "bias of B": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias is True"),
    "the embedding": ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "student.targets: .*embed_tokens"),
    "the head": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "student.targets: .*lm_head"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("theirs", "message"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_is_more_than_a_product_is_refused(
    tiny: Tiny, tmp_path: Path, theirs: dict[str, object], message: str
) -> None:
    if theirs.get("lora_bias"):  # PEFT wants a base with biases for it
        _adapter(tiny, tmp_path / "adapter", {})
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_bias": True}))
    else:
        _adapter(tiny, tmp_path / "adapter", theirs)
    with pytest.raises(UsageError, match=message):
        _ours(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("begun", ["corda", "loftq", "lora_ga", "something new"])
def test_a_beginning_that_needs_more_than_the_adapter_is_refused(tiny: Tiny, tmp_path: Path, begun: str) -> None:
    _adapter(tiny, tmp_path / "adapter", {})
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": begun}))
    with pytest.raises(UsageError, match=f"init_lora_weights is '{begun}'"):
        _ours(tiny, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")  # of PEFT, on converting
@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_what_peft_has_converted_is_plain(tiny: Tiny, tmp_path: Path, begun: str) -> None:
    """The way out that the message names: twice the rank, on the base as it is."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=begun)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = begun
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        wanted = model(IDS).logits[0]
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    found = _ours(tiny, tmp_path / "plain", rank=config["r"], alpha=float(config["lora_alpha"]))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_a_model_is_allocated_in_its_own_dtype_with_the_values_of_a_cast(tiny: Tiny) -> None:
    class Allocated(TorchDispatchMode):
        """Dtypes of all tensors that operations make outside of the meta device."""

        dtypes: ClassVar[set[torch.dtype]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.dtypes.update(t.dtype for t in [out] if isinstance(t, torch.Tensor) and t.device.type != "meta")
            return out

    start, cpu = Pretrained(str(tiny.teacher)), torch.device("cpu")
    model = meta_student(start, 200)
    with Allocated() as allocated:
        allocate(model, cpu, torch.bfloat16)
    assert allocated.dtypes == {torch.bfloat16}
    wanted, got = build_student(start, cpu, 0).bfloat16(), build_student(start, cpu, 0, dtype=torch.bfloat16)
    assert (got.lm_head.weight is got.embed_tokens.weight) == (wanted.lm_head.weight is wanted.embed_tokens.weight)
    for (name, value), (other, cast) in zip(got.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, cast), name
