"""vLLM itself, where it is installed: in process against transformers and our decoder, and behind a server.

Opt-in (`-m slow`), in an environment with vLLM. Each engine needs a process of its own.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from data.cache.manifest import read_manifest
from data.cache.record import Record
from data.cache.selection import Selection
from data.stream.shards import ShardReader
from data.teacher.choose_scorer import load_scorer, load_vllm
from data.teacher.scorer import TeacherScores, score_rows
from data.teacher.vllm_settings import VllmSettings
from tests.data.teacher.vllm_replies import (
    CPU,
    POOLER,
    POOLING,
    ROW_LENGTH,
    make_folders,
    real_server,
    score_some_rows,
    tiny_export,
)
from tests.tiny import write_caches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]
SELECTION = Selection(6, draws=5, tail_temperatures=(0.5, 2.0))
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig, {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    ),
}  # fmt: skip


def _run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


def _rows(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows of mixed lengths, and the numbers of their draws."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(3)[:, None].repeat(1, 40)
    documents[1, 17:], documents[2, 1:] = -1, -1
    uniforms = torch.rand(120, 5, generator=generator, dtype=torch.float64)
    return torch.randint(vocab_size, (3, 41), generator=generator), documents, uniforms


def score_in_process(folder: Path, scorer: str, dtype: str, out: Path) -> None:
    """What a process of its own runs: the scores of `_rows`, written to a file."""
    if scorer == "vllm":
        loaded = load_vllm(folder, getattr(torch, dtype), CPU, VllmSettings({"max_model_len": 64}))
    else:
        loaded = load_scorer(folder, scorer, getattr(torch, dtype), CPU)
    torch.save(tuple(score_rows(loaded, *_rows(300)[:2], SELECTION, _rows(300)[2])), out)


def _scores(folder: Path, scorer: str, dtype: str, out: Path) -> TeacherScores:
    _run("tests.data.teacher.test_vllm", folder, scorer, dtype, out)
    real = (_rows(300)[1] >= 0).flatten()
    return TeacherScores(*(field[real] for field in torch.load(out)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_selection_is_that_of_transformers(tmp_path: Path, name: str, dtype: str) -> None:
    """A random model of a family, through vLLM's kernels and through transformers."""
    if dtype == "bfloat16" and name not in ("llama", "mixtral"):
        pytest.skip("one dense family and one with experts are enough")
    kind, settings = FAMILIES[name]
    size = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(kind(**size, **heads, max_position_embeddings=64, **settings))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    teacher, _ = make_folders(tmp_path)
    shutil.copy(teacher / "tokenizer.json", folder)
    ours = _scores(folder, "transformers", dtype, tmp_path / "ours.pt")
    theirs = _scores(folder, "vllm", dtype, tmp_path / "theirs.pt")
    # In bfloat16 a token may go to another expert, so single positions may differ by any amount.
    tolerance, measure = (1e-4, torch.amax) if dtype == "float32" else (0.05, torch.median)
    for field in ("tail_log_prob", "label_log_prob", "tempered_tails"):
        assert measure((getattr(theirs, field) - getattr(ours, field)).abs()) < tolerance
    if dtype == "float32":
        assert (ours.ids == theirs.ids).float().mean() > 0.99
        assert (ours.sampled_ids == theirs.sampled_ids).float().mean() > 0.99
        torch.testing.assert_close(theirs.log_probs, ours.log_probs, atol=tolerance, rtol=0)


def _records(folder: Path) -> list[Record]:
    return list(ShardReader(folder, read_manifest(folder)).records())


def test_the_command_exports_through_vllm_and_its_cache_trains(tmp_path: Path) -> None:
    teacher, corpus = make_folders(tmp_path)
    write_caches(tiny_export(teacher, corpus, scorer="decoder", selection=SELECTION), tmp_path / "decoder")
    settings = {
        "teacher": teacher, "corpus.path": corpus, "scorer": "vllm", "row_length": ROW_LENGTH, "dtype": "float32",
        "codec": "lossless", "validation_share": 0.25, "batch_rows": 3, "train_tokens": "none", "selection.top_k": 6,
        "validation_tokens": "none", "selection.draws": 5, "selection.tail_temperatures": "(0.5,2.0)",
        "block_positions": 64, "shard_bytes": 1500,
    }  # fmt: skip
    items = [f"--config={name}={value}" for name, value in settings.items()]
    _run("launchers.export_teacher", "--config=quickstart_export", *items, f"--out={tmp_path / 'vllm'}")
    for split in ("train", "validation"):
        ours, theirs = _records(tmp_path / "decoder" / split), _records(tmp_path / "vllm" / split)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            for field, values in a.arrays().items():
                np.testing.assert_allclose(b.arrays()[field], values, atol=1e-4)
    assert read_manifest(tmp_path / "vllm/train").teacher["vllm"]["release"].startswith("vllm")
    training = {
        "student.folder": teacher, "student.keep_layers": "(0,)", "shards.path": tmp_path / "vllm/train",
        "evaluation.shards.path": tmp_path / "vllm/validation", "collate.row_length": ROW_LENGTH, "steps": 3,
        "tokens_per_step": 2 * ROW_LENGTH, "parallel.precision": "float32", "schedule.warmup_steps": 1,
        "loss.terms.kd.tail": "sampled",
    }  # fmt: skip
    items = [f"--config={name}={value}" for name, value in training.items()]
    _run("launchers.train", "--config=quickstart", *items, f"--run_dir={tmp_path / 'run'}")
    assert (tmp_path / "run/export/model.safetensors").exists()


def test_a_real_pooling_server_gives_every_selection_of_our_decoder(tmp_path: Path) -> None:
    teacher, _ = make_folders(tmp_path)
    with real_server(teacher, "--runner", "pooling", "--pooler-config", POOLER) as url:
        theirs = score_some_rows(load_vllm(teacher, torch.float32, CPU, VllmSettings(POOLING, url)))
    ours = score_some_rows(load_scorer(teacher, "decoder", torch.float32, CPU))
    for field, values in ours._asdict().items():
        torch.testing.assert_close(getattr(theirs, field), values, atol=1e-4, rtol=0)


def test_a_real_server_gives_the_entries_of_our_decoder(tmp_path: Path) -> None:
    teacher, corpus = make_folders(tmp_path)
    write_caches(tiny_export(teacher, corpus, scorer="decoder"), tmp_path / "decoder")
    with real_server(teacher, "--max-logprobs", "6", "--max-model-len", "40") as url:
        write_caches(tiny_export(teacher, corpus, scorer_url=url), tmp_path / "served")
    for a, b in zip(_records(tmp_path / "decoder/train"), _records(tmp_path / "served/train"), strict=True):
        for field, values in a.arrays().items():
            np.testing.assert_allclose(b.arrays()[field], values, atol=1e-4)


if __name__ == "__main__":
    score_in_process(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
