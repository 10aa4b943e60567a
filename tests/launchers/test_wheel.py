"""What a user does without a checkout: a wheel, an experiment file of one's own, a folder with names that clash."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.launchers.command import configs, values
from tests.patience import patience
from tests.tiny import Tiny

ROOT = Path(__file__).parents[2]
FILE = """import math

import fiddle as fdl

from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart
from experiments.base.sweep_definition import Sweep, grid


def surer(view):
    return view.student_label > math.log(0.5)


def mine() -> fdl.Config[Experiment]:
    config = quickstart()
    config.evaluation.metrics = (surer,)
    return config


def rates() -> Sweep:
    return Sweep(mine) * grid("optimizer.lr", [1e-3, 2e-3])
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which a wheel of this project is installed beside what it depends on."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("kd_core", "data", "experiments", "launchers"):
        shutil.copytree(ROOT / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "source" / name)
    pip, quiet = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    line = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(root), str(root / "source")]
    subprocess.run(line, check=True)
    venv.create(root / "venv", symlinks=True)
    python = root / "venv/bin/python"
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", *quiet, str(wheel)], check=True)
    found = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = Path(subprocess.run(found, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "rest.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return root / "venv/bin"


def _kd(programs: Path, *arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    ranks = [str(programs / "python"), "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*(ranks if torchrun else []), *(["--no-python"] if torchrun else []), str(programs / "kd"), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=patience(200))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_sweep_compare_and_run_again_an_edited_file(programs: Path, tiny: Tiny, in_tmp: Path) -> None:
    (in_tmp / "data.py").write_text("raise RuntimeError('not ours')")
    (in_tmp / "experiments").mkdir()
    (in_tmp / "experiments/__init__.py").write_text("raise RuntimeError('not ours')")
    file = in_tmp / "study.py"
    file.write_text(FILE)
    assert "export-teacher" in _kd(programs).stdout
    items = configs([*tiny.train_items(2)[1:], "schedule.warmup_steps=1"])

    done = _kd(programs, "train", "study.py:mine", *items, "--run_dir=first")
    assert done.returncode == 0, done.stderr
    ranks = _kd(programs, "train", "study.py:mine", *items, "--run_dir=ranks", torchrun=True)
    assert ranks.returncode == 0, ranks.stderr
    swept = _kd(programs, "sweep", "--sweep=study.py:rates", *items, "--backend=local", "--out=swept")
    assert swept.returncode == 0, swept.stderr
    assert "2 of 2 points are finished" in swept.stdout
    compared = _kd(programs, "compare", "first", "ranks")
    assert "val/surer" in compared.stdout, compared.stderr

    file.write_text(FILE.replace("0.5", "0.25"))
    again = _kd(programs, "train", "--config=run:first", "--run_dir=again")
    assert again.returncode == 0, again.stderr
    assert f"{file} was edited" in again.stderr
    assert values(in_tmp / "again") == values(in_tmp / "first")
    file.unlink()
    point = next((in_tmp / "swept/points").iterdir())
    again = _kd(programs, "train", f"--config=run:{point}", "--run_dir=point_again")
    assert again.returncode == 0, again.stderr
    assert values(in_tmp / "point_again") == values(point)
