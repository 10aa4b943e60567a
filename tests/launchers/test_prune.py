"""The command that writes a narrower student, on the tiny teacher."""

import json
from pathlib import Path

import fiddle as fdl
import pytest
import torch
import transformers

from data.stream.plain_rows import cache_documents, plain_rows
from experiments.config.config_items import resolve_items
from kd_core.students.huggingface.save import is_complete_export
from tests.launchers.command import Command, kill_when, run
from tests.tiny import Tiny

SIZES = ["--hidden_size=24", "--intermediate_size=40", "--num_kv_heads=1", "--layers=3"]


def _flags(tiny: Tiny, out: Path, *more: str) -> list[str]:
    flags = [f"--teacher={tiny.teacher}", f"--cache={tiny.train}", "--row_length=16", "--tokens=512"]
    return [*flags, "--dtype=float32", f"--out={out}", *more]


def test_a_narrower_student_is_written_measured_and_an_experiment_starts_from_it(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "narrow"
    done = run("launchers.prune", *_flags(tiny, out, *SIZES))
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "pruned.json").read_text())
    assert report["sizes"]["num_heads"] == [2, 4]
    assert [len(channels) for channels in report["feed_forward_channels"]] == [40, 40, 40]
    assert f'--config=\'distill(model="{out}", cache="{tiny.train.parent}")\'' in done.stdout
    assert "is no multiple of" not in done.stderr

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    start = report["starts"]["the pruned student"]
    assert start["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    tokens = plain_rows(cache_documents(tiny.train, tiny.teacher), [16], 512)
    with torch.no_grad():
        log_probs = theirs(tokens[:, :-1]).logits.log_softmax(-1)
    assert start["nll"] == pytest.approx(-log_probs.gather(2, tokens[:, 1:, None]).mean().item(), abs=1e-4)
    # The student that loses layers alone has nearly as many parameters.
    (alone,) = (start for name, start in report["starts"].items() if name.endswith("layers of full width"))
    assert alone["parameters"] == pytest.approx(start["parameters"], rel=0.2)

    items = [*tiny.train_items(), f"student.folder={out}", "student.keep_layers=none"]
    experiment = fdl.build(resolve_items(items, "Experiment").config)
    assert experiment.student.architecture().hidden_size == 24
    experiment.check()


def test_killed_while_it_writes_it_leaves_no_half_folder(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "narrow"
    flags = _flags(tiny, out, "--keep_layers=0,3")
    assert kill_when(Command("launchers.prune", *flags), out.with_name("narrow.partial").exists)
    assert not out.exists()
    done = run("launchers.prune", *flags)
    assert done.returncode == 0, done.stderr
    assert is_complete_export(out)
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]


def test_mistakes_are_one_message(tiny: Tiny, tmp_path: Path) -> None:
    for more, message in (
        ([], "wanted a size of the student: --hidden_size=N"),
        (["--hidden_size=33"], "--hidden_size=33: wanted 1 to 32, which the model has"),
        (["--num_heads=3"], "--num_heads=3: wanted 2, 4, so that each of 2 kv heads"),
        (["--layers=5"], "--layers=5: wanted 1 to 4"),
        (["--keep_layers=0,4"], "--keep_layers=0,4: wanted different layers of 0 to 3"),
        (["--layers=2", "--keep_layers=0,1"], "wanted either --layers=N or --keep_layers"),
        (["--layers=2", f"--text={tiny.corpus / '000.txt'}"], "wanted either --cache=DIR or --text=FILE"),
        (["--layers=2", f"--out={tiny.corpus}"], "holds something"),
        (["--layers=2", f"--teacher={tiny.corpus}"], "config.json"),
    ):
        done = run("launchers.prune", *_flags(tiny, tmp_path / "narrow", *more))
        assert done.returncode == 1, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]
