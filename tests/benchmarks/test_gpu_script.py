"""The script of `make gpu` runs as a whole, on a CPU and small sizes, and its page says what the numbers say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import device, results, roofline
from benchmarks.gpu.device import PARTS, RESULTS
from benchmarks.gpu.session import Session, peak_flops
from benchmarks.gpu.shapes import LossShape, StepShape

ROOT = Path(__file__).parent.parent.parent
PEAKS = roofline.Device("H100", 1e15, 1e12)


def test_the_script_measures_every_part_without_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.device", f"--out={tmp_path}", "--device=cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = results.read_numbers(tmp_path / "numbers.jsonl")
    assert [line for line in lines if "failed" in line or "skipped" in line] == []
    assert {line["part"] for line in lines} == {*PARTS}
    # Every row of the estimates was measured, under its name there.
    assert {*roofline.ROWS} - {"loss, KD + CE, chunk 256"} <= {line["name"] for line in lines}
    # A sharded student begins with the same loss as one that is not.
    loss = {line["name"]: line["loss"] for line in lines if line["part"] == "fsdp"}
    assert loss["gradients"] == pytest.approx(loss["none"], rel=1e-3)
    assert loss["full"] == pytest.approx(loss["none"], rel=1e-3)
    page = (tmp_path / "results.md").read_text()
    assert "A trial of the script on small sizes" in page
    for title in results.TITLES.values():
        assert f"## {title}" in page


def measured(times: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"part": "loss", "name": name, **values} for name, values in times.items()]


def test_bars_are_ratios_within_the_run_and_say_what_was_not_measured() -> None:
    lines = measured({
        "the three matmuls": {"ms": 40.0},
        "CE, Liger (Triton)": {"ms": 50.0},
        "CE, QuACK (CuTe)": {"ms": 44.0},
        results.LOSS: {"ms": 46.0, "gib": 5.0},
        "loss, JSD + CE": {"ms": 47.0},
        "loss, KD + CE, chunk 256": {"ms": 200.0},
        results.STEP: {"failed": "OutOfMemoryError"},
    })  # fmt: skip
    # Those with weights in float32 are not meant.
    lines += [{**line, "precision": "autocast", "ms": 1.0} for line in lines]
    # A trace has the name of its step.
    lines += [{"part": "step", "name": results.STEP, "ms": 9.0, "mfu": 0.5, "waits": 0}]
    lines += [{"part": "trace", "name": results.STEP, "file": "trace.json.gz"}]
    rows = {bar.name: bar for bar in results.bars(lines)}
    assert rows["1B step, packed: waits of the host"].value == 0
    assert rows["KD + CE / the three matmuls"].value == pytest.approx(1.15)
    assert rows["KD + CE / CE, QuACK (CuTe)"].value == pytest.approx(46 / 44)
    assert rows["slowest other objective (loss, JSD + CE) / KD + CE"].value == pytest.approx(47 / 46)
    assert str(rows["KD + CE, GiB over inputs"]) == "| KD + CE, GiB over inputs | ≤ 4.0 | 5.000 | not reached |"
    assert str(rows["1B step, packed: MFU"]) == "| 1B step, packed: MFU | ≥ 0.45 | 0.500 | reached |"
    unmeasured = "| scoring / bare forward | ≤ 1.08 |  | not measured |"
    assert str(rows["scoring / bare forward"]) == unmeasured
    assert str(results.Bar("share", 0.5, 0.5, at_most=False)).endswith("| 0.500 | reached |")


def test_a_peer_of_triton_alone_is_no_bar() -> None:
    lines = measured({results.LOSS: {"ms": 46.0}, "CE, Liger (Triton)": {"ms": 44.0}})
    row = next(bar for bar in results.bars(lines) if "Liger" in bar.name)
    assert str(row) == "| KD + CE / CE, QuACK or Liger in CuTe | ≤ 1.05 |  | not measured |"


def test_the_last_line_of_a_name_counts_also_where_it_failed(tmp_path: Path) -> None:
    session = Session(torch.device("cpu"), tmp_path, 100.0)
    for precision in ("bfloat16", "autocast"):
        session.record("loss", results.LOSS, precision=precision, ms=1.0)
    session.attempt("loss", results.LOSS, lambda: 1 / 0, precision="bfloat16")
    first, second = results.read_numbers(tmp_path / "numbers.jsonl")
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["ms"] == 1.0


def test_an_error_that_cuda_repeats_does_not_end_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    session = Session(torch.device("cuda"), tmp_path, 100.0)
    assert session.attempt("loss", "broken", raises) is None
    assert "illegal" in results.read_numbers(tmp_path / "numbers.jsonl")[0]["failed"]


def test_the_page_is_written_where_a_part_ends_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "probe", stop)
    with pytest.raises(KeyboardInterrupt):
        device.main([f"--out={tmp_path}", "--device=cpu", "--tiny", "--parts=probe"])
    assert "not measured" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", None)]
)
def test_mfu_needs_the_peak_of_the_gpu(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
    page = results.page([], "", name, "2026-01-01", is_trial=False)
    assert ("MFU is a share of 989 TFLOP/s" in page) == (peak is not None)


def test_an_estimate_is_the_longer_of_work_and_launches() -> None:
    # 2 ms of matmuls and 3 ms of other bytes beside 1 ms of launches, then 0.4 ms of work beside 5 ms of launches.
    phases = {
        "loss": {"flops": 2e12, "matmul_bytes": 1e9, "bytes": 3e9, "launches": 200},
        "backward": {"flops": 0.0, "matmul_bytes": 4e8, "bytes": 0.0, "launches": 1000},
    }
    seconds = roofline.estimate(LossShape(), phases, PEAKS)
    assert seconds.matmul == pytest.approx(2.4e-3)
    assert seconds.memory == pytest.approx(3e-3)
    assert seconds.launch == pytest.approx(6e-3)
    assert seconds.total == pytest.approx(5e-3 + 5e-3)


def test_attention_counts_the_pairs_inside_documents() -> None:
    shape = StepShape("small", rows=1, length=4, documents=1)
    # 10 pairs, 2 layers, 4 heads of 16, 4 operations each; three times forward in the model.
    assert roofline.attention_flops(shape) == (3 * 10 * 2 * 4 * 16 * 4, 3.5 * 10 * 2 * 4 * 16 * 4)


def test_measured_times_go_into_the_rows_of_their_device() -> None:
    table = max(RESULTS.glob("*-roofline.md")).read_text()
    filled = roofline.fill(table, "NVIDIA H200", {"loss, KD + CE": 47.25})
    changed = [line for line, before in zip(filled.split("\n"), table.split("\n"), strict=True) if line != before]
    assert len(changed) == 1
    assert changed[0].startswith("| loss, KD + CE | H200 |")
    assert changed[0].endswith("| 47.2 |")


def test_the_committed_estimates_have_a_row_for_everything_that_is_estimated() -> None:
    table = max(RESULTS.glob("*-roofline.md")).read_text()
    for name in roofline.ROWS:
        for gpu in roofline.DEVICES:
            assert f"| {name} | {gpu.name} |" in table
