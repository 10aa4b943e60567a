"""Commands end to end on the tiny teacher: train, resume after SIGKILL, ranks, mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.stream.source import Shards
from experiments.config.saved_students import find_student
from kd_core.errors import UsageError
from kd_core.files import own_folder
from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.training.evaluation import metric_names
from kd_core.training.monitoring.metric_log import read_metrics
from launchers.cli.folder_guard import A_RUN, A_SWEEP, CACHES, refuse_other_kinds
from tests.forks import ENVIRONMENT, ROOT
from tests.launchers.command import Command, configs, kill_when, line, run, values
from tests.tiny import ROW_LENGTH, VOCAB, Tiny, bytes_of


@pytest.fixture(scope="module")
def whole_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    done = run("launchers.train", *configs(tiny.train_items(10)), f"--run_dir={folder}", nproc=1)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_its_folder_as_the_readme_draws_it(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "config.txt", "attempts", "metrics.jsonl", "continuations.jsonl", "tensorboard", "checkpoints",
        "export",
    }  # fmt: skip
    assert {path.name for path in (whole_run / "export").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (whole_run / "attempts" / "001" / "log.txt").read_text().count("validation at step") == 5
    kept = {path.name for path in (whole_run / "checkpoints").iterdir()}
    assert "step_00000010" in kept
    assert len(kept) <= 3


def test_the_loss_falls_and_every_promised_number_is_there(whole_run: Path) -> None:
    lines = values(whole_run)
    assert [found["step"] for found in lines] == list(range(11))
    assert lines[-1]["val/kl"] < lines[0]["val/kl"]
    for split, found in (("train", lines[1]), ("val", lines[-1])):
        for name in ("loss", "kd_loss", "sft_loss", "teacher_mass", "student_mass", "top1_agreement", "tokens"):
            assert f"{split}/{name}" in found
    assert {"train/lr", "train/grad_norm"} <= lines[1].keys()
    assert {name for name in lines[-1] if name.startswith("val/")} == metric_names(
        Objective({"kd": Distillation(), "sft": CrossEntropy()}), CacheFacts(VOCAB, 8)
    )
    assert lines[4]["train/loss"] == pytest.approx(0.9 * lines[4]["train/kd_loss"] + 0.1 * lines[4]["train/sft_loss"])


def test_tensorboard_carries_the_same_numbers(whole_run: Path) -> None:
    events = EventAccumulator(str(whole_run / "tensorboard"))
    events.Reload()
    lines = read_metrics(whole_run / "metrics.jsonl")
    for name in {name for found in lines for name in found} - {"step"}:
        wanted = [(found["step"], np.float32(found[name])) for found in lines if name in found]
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == wanted, name


@pytest.mark.parametrize("step", [1, 3, 8])
def test_killed_and_resumed_it_has_the_same_numbers_bit_for_bit(
    tiny: Tiny, whole_run: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "run"
    flags = [*configs(tiny.train_items(10)), f"--run_dir={folder}"]

    def reached() -> bool:
        path = folder / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") > step

    assert kill_when(Command("launchers.train", *flags, nproc=1), reached)
    done = run("launchers.train", *flags, nproc=1)
    assert done.returncode == 0, done.stderr
    assert values(folder) == values(whole_run)
    assert (folder / "export" / "model.safetensors").read_bytes() == (
        whole_run / "export" / "model.safetensors"
    ).read_bytes()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))


def test_run_again_it_says_that_nothing_is_left(tiny: Tiny, whole_run: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    again = run("launchers.train", *configs(tiny.train_items(10)), f"--run_dir={whole_run}")
    assert again.returncode == 0
    assert "already complete" in again.stderr
    assert (whole_run / "metrics.jsonl").read_bytes() == before


LIST_THREADS = """import atexit, os, pathlib, threading

def list_threads():
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    names += [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
    pathlib.Path(os.environ["THREADS"], os.environ["RANK"]).write_text(str(names))

if "RANK" in os.environ:
    atexit.register(list_threads)
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_give_the_same_losses_and_leave_no_thread(
    tiny: Tiny, whole_run: Path, tmp_path: Path, ranks: int
) -> None:
    """A thread of ours or of gloo that outlives the run may abort the process while the interpreter ends.

    A forked process would skip the interpreter's end.
    """
    (tmp_path / "sitecustomize.py").write_text(LIST_THREADS)
    more = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "THREADS": str(tmp_path)}
    command = line("launchers.train", *configs(tiny.train_items(10)), f"--run_dir={tmp_path / 'run'}", nproc=ranks)
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | more, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(ranks)] == ["[]"] * ranks
    for ours, theirs in zip(values(tmp_path / "run"), values(whole_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_evaluate_gives_the_runs_last_validation_and_reads_checkpoints(tiny: Tiny, whole_run: Path) -> None:
    wanted = values(whole_run)[-1]
    for student in (whole_run, whole_run / "export", whole_run / "checkpoints" / "step_00000010"):
        done = run("launchers.evaluate", f"--student={student}", f"--cache={tiny.validation}", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["nll"] == pytest.approx(wanted["val/nll"], rel=1e-6)
        assert found["kl"] == pytest.approx(wanted["val/kl"], rel=1e-6)


def test_evaluate_says_of_a_run_without_its_end_which_checkpoint_there_is(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run / "attempts", tmp_path / "run" / "attempts")
    with pytest.raises(UsageError, match="is not finished. It has no checkpoint yet"):
        find_student(tmp_path / "run", None)
    (tmp_path / "run" / "checkpoints").symlink_to(whole_run / "checkpoints")
    with pytest.raises(UsageError, match=r"has checkpoints of the steps .*, 10: name one by --step"):
        find_student(tmp_path / "run", None)


def test_the_export_command_killed_and_run_under_two_ranks_writes_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    settings = ["quickstart_export", f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "train_tokens=none"]
    settings += [
        "validation_tokens=none",
        "selection.top_k=8",
        "row_length=32",
        "validation_share=0.2",
        "block_positions=128",
        "shard_bytes=4096",
        "dtype=float32",
    ]
    flags = [*configs([*settings, "batch_rows=3"]), f"--out={out}"]
    kill_when(Command("launchers.export_teacher", *flags), lambda: any(out.glob("train/shard-*.tar")))
    done = run("launchers.export_teacher", *flags, nproc=2)
    assert done.returncode == 0, done.stderr
    for split in ("train", "validation"):
        assert bytes_of(out / split) == bytes_of(tiny.root / "cache" / split)


def _refused(*arguments: str, nproc: int | None = None) -> str:
    """The one message of a command that must fail without a traceback of ours."""
    done = run("launchers.train", *arguments, nproc=nproc)
    assert done.returncode != 0
    messages = re.findall(r"^train: error: (.*)$", done.stderr, flags=re.MULTILINE)
    assert len(messages) == 1, done.stderr
    if nproc is None:
        assert "Traceback" not in done.stderr
    return messages[0]


def test_a_folder_of_another_experiment_is_refused(tiny: Tiny, whole_run: Path) -> None:
    message = _refused(*configs([*tiny.train_items(), "seed=1"]), f"--run_dir={whole_run}")
    assert "another experiment (seed is 0 there, 1 now)" in message


def test_nothing_is_laid_over_another_kind_of_folder(tiny: Tiny, whole_run: Path, tmp_path: Path) -> None:
    caches, before = tiny.train.parent, sorted(whole_run.rglob("*"))
    message = _refused(*configs(tiny.train_items()), f"--run_dir={caches}")
    assert f"--run_dir={caches}: holds teacher caches (train/plan.json), wanted a run or nothing." in message
    items = ["quickstart_export", f"teacher={tiny.teacher}"]
    done = run("launchers.export_teacher", *configs(items), f"--out={whole_run}")
    assert f"--out={whole_run}: holds a run (attempts), wanted teacher caches or nothing." in done.stderr
    assert sorted(whole_run.rglob("*")) == before
    for folder, kind in ((tiny.teacher, A_RUN), (tiny.teacher, CACHES), (whole_run, A_SWEEP)):
        with pytest.raises(UsageError, match="Choose another folder"):
            refuse_other_kinds(folder, kind, "out")
    for folder, kind in ((whole_run, A_RUN), (caches, CACHES), (tiny.train, CACHES), (tmp_path / "new", A_SWEEP)):
        refuse_other_kinds(folder, kind, "out")


def test_a_second_process_on_the_same_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with own_folder(tmp_path):
        assert "another process" in _refused(*configs(tiny.train_items()), f"--run_dir={tmp_path}")


@pytest.mark.parametrize("nproc", [None, 2])
def test_a_mistake_is_said_once_by_one_rank(tiny: Tiny, tmp_path: Path, nproc: int | None) -> None:
    items = [*tiny.train_items(), f"shards.path={tmp_path / 'none'}"]
    message = _refused(*configs(items), f"--run_dir={tmp_path / 'run'}", nproc=nproc)
    assert "no such folder: shards.path: " in message
    assert not (tmp_path / "run" / "config.json").exists(), "the corrected command must find the folder free"


def test_a_metric_that_nothing_measures_is_refused_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    items = [*tiny.train_items(), "checkpoint.best_metric=val/los"]
    assert "wanted one of" in _refused(*configs(items), f"--run_dir={tmp_path / 'run'}")


def test_a_temperature_that_the_cache_has_no_tail_for_is_refused_with_what_to_take(tiny: Tiny, tmp_path: Path) -> None:
    message = _refused(*configs([*tiny.train_items(), "loss.terms.kd.temperature=2"]), f"--run_dir={tmp_path / 'run'}")
    assert "loss.terms.kd" in message
    assert "renormalized" in message


def test_a_loss_of_nan_stops_before_the_optimiser_moves(tiny: Tiny, tmp_path: Path) -> None:
    items = [*tiny.train_items(8), "optimizer.lr=1e30", "optimizer.clip_norm=0", "evaluation.every=100"]
    message = _refused(*configs(items), f"--run_dir={tmp_path / 'run'}")
    step = int(re.search(r"step (\d+): loss sum", message)[1])
    failed = json.loads((tmp_path / "run" / f"failed_step_{step}_rank_0.json").read_text())
    assert failed["records"]
    assert failed["records"][0] in message
    assert "Traceback" in (tmp_path / "run" / "attempts" / "001" / "log.txt").read_text()
    saved = [int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert all(number < step for number in saved)


@pytest.mark.parametrize("module", ["train", "export_teacher", "evaluate", "quickstart", "inspect"])
def test_help_teaches_by_example_and_imports_nothing_heavy(module: str) -> None:
    probe = f"""
import runpy, sys
sys.argv = ["{module}", "--help"]
try:
    runpy.run_module("launchers.{module}", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "fiddle", "numpy", "webdataset", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"-m launchers.{module} " in done.stdout
    assert "Flags:" in done.stdout


@pytest.mark.parametrize("flag", ["--list", "--print_config", "--dry_run"])
def test_flags_that_only_show_leave_nothing_behind(tiny: Tiny, in_tmp: Path, flag: str) -> None:
    done = run("launchers.train", *configs(tiny.train_items()), flag, cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert list(in_tmp.iterdir()) == []


def test_an_unknown_flag_and_a_stray_argument_are_usage_errors(tmp_path: Path) -> None:
    for argument, message in (("--confg=x", "unknown flag --confg"), ("x", "no such experiment")):
        done = run("launchers.train", argument, cwd=tmp_path)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_is_said_and_what_was_complete_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the write fails with an OSError in the middle of a shard."""
    code = (
        "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "runpy.run_module('launchers.export_teacher', run_name='__main__')"
    )
    flags = configs(["quickstart_export", f"corpus.path={tiny.corpus}", f"teacher={tiny.teacher}", "selection.top_k=8"])
    command = [sys.executable, "-c", code, *flags, f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_damage_that_is_skipped_is_counted_in_the_metrics_of_all_ranks(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.train, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-000000.tar"
    payload = bytearray(shard.read_bytes())
    payload[700] ^= 1
    shard.write_bytes(payload)
    items = [*tiny.train_items(2), f"shards.path={tmp_path / 'cache'}", "tokens_per_step=1920", "logger.every=2"]
    stopped = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'stopped'}")
    assert stopped.returncode != 0
    assert "shard-000000.tar: damaged: block 0" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    items += ["shards.on_damage=skip", "shards.max_damaged_blocks=1", "schedule.warmup_steps=1"]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}", nproc=2)
    assert done.returncode == 0, done.stderr
    counts = [found.get("data/damaged_blocks", 0.0) for found in values(tmp_path / "run")]
    order = Shards(str(tiny.train)).order(ROW_LENGTH, 0)
    rows = [order.row(order.place(number)) for number in range(2 * 1920 // ROW_LENGTH)]
    assert sum(counts) == sum((0, 0, 0) in row.records for row in rows) > 0


def test_a_dry_run_says_what_texts_begin_and_end_with(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    items = ["quickstart_export", f"teacher={tmp_path / 'teacher'}", f"corpus.path={tiny.corpus}", "selection.top_k=8",
             f"tag:RowLength={ROW_LENGTH}"]  # fmt: skip
    for change, words in (
        ("corpus.eos=yes", "texts: each text ends with <end> (id 0), and no BOS is added (corpus.bos)\n"),
        ("corpus.eos=no", "texts: no BOS or EOS is added (corpus.bos, corpus.eos)\n"),
    ):
        done = run("launchers.export_teacher", *configs([*items, change]), f"--out={tmp_path / 'out'}", "--dry_run")
        assert words in done.stdout, done.stderr
    wrong = run("launchers.export_teacher", *configs([*items, "corpus.bos=maybe"]), f"--out={tmp_path / 'out'}")
    assert "corpus.bos" in wrong.stderr
    assert "wanted one of auto, yes, no" in wrong.stderr
