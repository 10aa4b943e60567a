"""With the real teacher, after `make quickstart`: parity with transformers, and an export that it agrees with.

Opt-in: `make test-slow`.
"""

from pathlib import Path

import pytest
import torch
import transformers

from data.cache.manifest import read_manifest
from data.stream.shards import ShardReader
from experiments.base.measure import measure_model
from kd_core.parallel.world import World
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, build_student

TEACHER, EXPORT, CACHE = Path("quickstart/teacher"), Path("runs/quickstart/export"), Path("quickstart/cache/validation")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not EXPORT.exists(), reason="run `make quickstart` first")]


def test_logits_equal_those_of_transformers_on_whole_and_packed_rows() -> None:

    theirs = transformers.AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    ours = build_student(Pretrained(str(TEACHER)), torch.device("cpu"), seed=0)
    record = max(ShardReader(CACHE, read_manifest(CACHE)).records(), key=lambda each: len(each.token_ids))
    ids = torch.from_numpy(record.token_ids[:300].astype("int64"))[None]
    positions = torch.cat([torch.arange(120), torch.arange(180)])[None]
    with torch.no_grad():
        whole = ours(ids, torch.arange(300)[None], torch.zeros_like(ids))
        packed = ours(ids, positions, (torch.arange(300) >= 120).long()[None])
        assert (whole - theirs(ids).logits).abs().max() < 1e-4
        assert (packed[:, :120] - theirs(ids[:, :120]).logits).abs().max() < 1e-4
        assert (packed[:, 120:] - theirs(ids[:, 120:]).logits).abs().max() < 1e-4


def test_in_parts_and_bfloat16_transformers_reads_the_same_numbers(tmp_path: Path) -> None:
    """Several files with an index; what is read back is the teacher, rounded once."""
    ours = build_student(Pretrained(str(TEACHER)), torch.device("cpu"), seed=0)
    save_pretrained(ours, tmp_path / "parts", TEACHER, dtype="bfloat16", max_file_bytes=60_000_000)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    back = build_student(Pretrained(str(tmp_path / "parts")), torch.device("cpu"), seed=0)
    for name, one in back.named_parameters():
        assert torch.equal(one, theirs.get_parameter(f"model.{name}").float()), name
        assert torch.equal(one, ours.get_parameter(name).bfloat16().float()), name


def test_transformers_finds_the_same_held_out_nll_in_the_exported_folder() -> None:

    theirs = transformers.AutoModelForCausalLM.from_pretrained(EXPORT).eval()
    manifest = read_manifest(CACHE)
    nll = 0.0
    for record in ShardReader(CACHE, manifest).records():
        ids = torch.from_numpy(record.token_ids.astype("int64"))[None]
        with torch.no_grad():
            log_probs = torch.log_softmax(theirs(ids[:, :-1]).logits.double(), dim=-1)
        nll -= log_probs.gather(2, ids[:, 1:, None]).sum().item()
    ours = build_student(Pretrained(str(EXPORT)), torch.device("cpu"), seed=0)
    (found,) = measure_model(ours, EXPORT, [str(CACHE)], "float32", World()).values()
    assert found["nll"] == pytest.approx(nll / manifest.positions, abs=1e-3)
