"""A DistillKit capture and Megatron-LM tars through our conversion and training: the losses of the first steps against
dense float64 arithmetic that reads the files itself and shares no code with ours.

The training is `examples/own_loop.py`. The oracle: transformers' Llama in float64, numpy, torch's AdamW.
"""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
import zstandard
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from data.cache.manifest import read_manifest
from data.importers.import_cache import import_cache
from data.importers.settings import ImportSettings
from data.tokenizer import Tokenizer
from tests.data.importers.sources import EXACT, distillkit_bytes, distillkit_config, distillkit_terms, megatron_tars
from tests.tiny import Tiny

T, K, EXAMPLES, STEPS = 24, 8, 8, 3
KD, SFT, LR = 0.9, 0.1, 4e-4  # of examples/own_loop.py
EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"


class Sample(NamedTuple):
    """A sample as the oracle reads it: tokens [T + 1], entries [T, K], and what of the mass is known."""

    tokens: list[int]
    ids: np.ndarray
    logs: np.ndarray


def _model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


@pytest.fixture(scope="module")
def teacher(tiny: Tiny) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [examples, T + 1], and the teacher's top K: ids and log-probabilities [examples, T, K]."""
    text = [int(i) for record in tiny.records() for i in record.token_ids]
    starts = np.random.default_rng(0).integers(0, len(text) - T - 1, EXAMPLES)
    tokens = np.array([text[start : start + T + 1] for start in starts])
    with torch.no_grad():
        logs = torch.log_softmax(_model(tiny.teacher)(torch.from_numpy(tokens[:, :-1])).logits, dim=2)
    best = logs.topk(K, dim=2)
    return tokens, best.indices.numpy(), best.values.numpy()


@pytest.fixture(scope="module")
def student(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with noise in its weights."""
    folder = tmp_path_factory.mktemp("student")
    random = torch.Generator().manual_seed(0)
    weights = load_file(tiny.teacher / "model.safetensors")
    noisy = {name: w + 0.05 * w.std() * torch.randn(w.shape, generator=random) for name, w in weights.items()}
    for path in tiny.teacher.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _distillkit(folder: Path, teacher: tuple[np.ndarray, ...], size: int) -> dict[str, str]:
    """Writes a capture of two files."""
    tokens, ids, logs = teacher
    rows = []
    for sample in range(EXAMPLES):
        packed, values = distillkit_bytes(ids[sample], logs[sample].astype(np.float32), size)
        rows.append({"input_ids": tokens[sample].tolist(), "compressed_logprobs": values.tolist(),
                     "bytepacked_indices": packed.tolist()})  # fmt: skip
    for part in range(2):
        table = pa.Table.from_pylist(rows[part * EXAMPLES // 2 : (part + 1) * EXAMPLES // 2])
        parquet.write_table(table, folder / f"data_{part}.parquet")
    (folder / "compression_config.yaml").write_text(json.dumps(distillkit_config(size, K)))
    return {}


def _read_distillkit(folder: Path, size: int) -> list[Sample]:
    """Decodes the bytes with numpy: exact values, then the curve at the other places."""
    bits, samples = int(np.ceil(np.log2(size))), []
    for row in (row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()):
        flat = np.unpackbits(np.array(row["bytepacked_indices"], np.uint8), axis=1)[:, : K * bits]
        ids = flat.reshape(T, K, bits) @ (2 ** np.arange(bits - 1, -1, -1))
        numbers = np.array(row["compressed_logprobs"], np.uint8).view("<f4").astype(np.float64)
        curve = numbers[:, EXACT:] @ distillkit_terms(K - EXACT).T
        samples.append(Sample(row["input_ids"], ids, np.concatenate([numbers[:, :EXACT], curve], axis=1)))
    return samples


def _megatron(folder: Path, teacher: tuple[np.ndarray, ...], _: int, version: int) -> dict[str, str]:
    megatron_tars(folder, *teacher[1:], version=version)
    np.save(folder / "tokens.npy", teacher[0])
    return {"tokens": str(folder / "tokens.npy")}


def _read_megatron(folder: Path, _: int) -> list[Sample]:
    """Reads the tars of two ranks with micro-batches of two samples. All ids are below 2¹⁶."""
    tokens, samples = np.load(folder / "tokens.npy"), dict[int, Sample]()
    for rank in range(2):
        with tarfile.open(next(folder.glob(f"*dp{rank}__*.tar"))) as tar:
            payload = tar.extractfile(tar.getmembers()[1]).read()  # type: ignore[union-attr]
        member = torch.load(io.BytesIO(zstandard.decompress(payload)), weights_only=True)
        values, low = (member[name] for name in ("values", "indices_low"))
        if isinstance(values, list):
            values, low = torch.cat(values, dim=1), torch.cat(low, dim=1)
        for row, sample in enumerate((0, 1, 4, 5) if rank == 0 else (2, 3, 6, 7)):
            logs = values[:, row].double().numpy()
            samples[sample] = Sample(tokens[sample].tolist(), low[:, row].numpy().astype(np.int64), logs)
    return [samples[i] for i in range(EXAMPLES)]


def _loss(model: LlamaForCausalLM, sample: Sample) -> torch.Tensor:
    """Forward KL over entries and tail, and cross-entropy, summed over the positions."""
    q = torch.log_softmax(model(torch.tensor([sample.tokens[:-1]])).logits[0], dim=1)
    p = torch.from_numpy(sample.logs)
    p = p - p.exp().sum(dim=1, keepdim=True).clamp(min=1).log()  # its codec's error may make a mass above 1
    entries = q.gather(1, torch.from_numpy(sample.ids))
    rest, rest_q = 1 - p.exp().sum(dim=1), 1 - entries.exp().sum(dim=1)
    tail = torch.where(rest > 1e-12, rest * (rest.clamp(min=1e-30).log() - rest_q.log()), 0.0)
    kd = (p.exp() * (p - entries)).sum(dim=1) + tail
    labels = torch.tensor(sample.tokens[1:])
    return (KD * kd - SFT * q.gather(1, labels[:, None])[:, 0]).sum()


def _oracle(folder: Path, samples: list[Sample]) -> list[float]:
    model = _model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses: list[float] = []
    for _ in range(STEPS):
        loss = sum((_loss(model, sample) for sample in samples), torch.zeros(())) / (T * EXAMPLES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _train() -> Callable[..., list[float]]:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


CASES: dict[str, tuple[str, Callable[..., dict[str, str]], Callable[[Path, int], list[Sample]]]] = {
    "distillkit": ("distillkit", _distillkit, _read_distillkit),
    "megatron, version 1": ("megatron", lambda *given: _megatron(*given, version=1), _read_megatron),
    "megatron, version 2": ("megatron", lambda *given: _megatron(*given, version=2), _read_megatron),
}


@pytest.mark.parametrize(("kind", "write", "read"), CASES.values(), ids=CASES)
def test_training_on_a_converted_cache_has_the_losses_of_its_source(
    tiny: Tiny, student: Path, teacher: tuple[np.ndarray, ...], tmp_path: Path, kind: str,
    write: Callable[..., dict[str, str]], read: Callable[[Path, int], list[Sample]],
) -> None:  # fmt: skip
    source, size = tmp_path / "source", read_manifest(tiny.train).vocab_size
    source.mkdir()
    settings: Any = write(source, teacher, size)
    job = ImportSettings(kind, str(source), size, Tokenizer(tiny.teacher).fingerprint(), codec="lossless", **settings)
    manifest = import_cache(job, tmp_path / "cache")
    assert manifest.selection.top_k == K
    assert "tail" not in manifest.unknown
    found = _train()(str(student), str(tmp_path / "cache"), STEPS, EXAMPLES, T)
    wanted = _oracle(student, read(source, size))
    assert found == pytest.approx(wanted, rel=2e-5)
    assert wanted[-1] < 0.99 * wanted[0], "the steps moved nothing, so they prove nothing"
