"""Commands with hub ids in the place of folders, from a prepared cache of the hub and without a connection."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launchers.command import configs, line
from tests.patience import patience
from tests.tiny import ROW_LENGTH, Tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _cached(home: Path, name: str, folder: Path) -> None:
    """A repository as the hub's client keeps it."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_hub_id_is_taken_wherever_a_folder_is(tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.teacher), settings).save_pretrained(tmp_path / "made")
    _cached(tmp_path / "home", "some/model", tiny.teacher)
    _cached(tmp_path / "home", "some/adapter", tmp_path / "made")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def said(module: str, *arguments: str, nproc: int | None = None) -> str:
        command = line(module, *arguments, nproc=nproc)
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patience(90), check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    items = [
        "lora", f"shards.path={tiny.train}", f"evaluation.shards.path={tiny.validation}", "student.rank=2",
        "student.base.folder=hub:some/model", "student.base.keep_layers=none", "student.adapter=hub:some/adapter",
        "student.targets=('q_proj',)", "student.alpha=4.0", f"collate.row_length={ROW_LENGTH}", "steps=1",
        f"tokens_per_step={2 * ROW_LENGTH}", "schedule.warmup_steps=0", "parallel.precision=float32",
    ]  # fmt: skip
    said("launchers.train", *configs(items), "--run_dir=run", nproc=2)
    attempt = json.loads((tmp_path / "run" / "attempts" / "001" / "attempt.json").read_text())
    assert attempt["inputs"]["student.base.folder"]["path"] == f"hub:some/model@{COMMIT}"
    assert attempt["inputs"]["student.adapter"]["path"] == f"hub:some/adapter@{COMMIT}"
    assert "student.base.folder = 'hub:some/model'" in (tmp_path / "run" / "config.txt").read_text()
    adapter = json.loads((tmp_path / "run" / "export" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("some/model", COMMIT)
    cache = f"--cache={tiny.validation}"
    named = said("launchers.evaluate", "--student=hub:some/model", cache, "--precision=float32")
    assert named == said("launchers.evaluate", f"--student={tiny.teacher}", cache, "--precision=float32")
    measured = said("launchers.importance", "--teacher=hub:some/model", cache, "--measure=influence", "--row_length=16")
    assert "student.keep_layers=" in measured
