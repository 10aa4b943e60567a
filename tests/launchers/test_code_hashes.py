"""The code of a run by file: what differs is named, and a patch leads from the commit to what ran."""

import hashlib
import subprocess
from functools import partial
from pathlib import Path

import pytest

from experiments.config import code_hashes, record_diff
from kd_core.parallel.world import World
from kd_core.training.run_folder import attempt_facts
from tests.launchers.command import configs, look_in, run
from tests.tiny import Tiny

MINE = """import fiddle as fdl
import torch
from experiments.base.experiment import Experiment
from experiments.half_depth import quickstart


def number(view: object) -> torch.Tensor:
    return view.student_label * 0 + 1


def mine() -> fdl.Config[Experiment]:
    config = quickstart()
    config.evaluation.metrics = (number,)
    return config
"""


@pytest.mark.usefixtures("in_tmp")
def test_an_edited_file_of_experiments_is_named(tiny: Tiny, user_folder: Path) -> None:
    (user_folder / "user_mine.py").write_text(MINE)
    ours = partial(look_in, user_folder)
    items = ["mine", *tiny.train_items(2)[1:], "schedule.warmup_steps=1"]
    done = run("launchers.train", *configs(items), "--run_dir=run", before=ours)
    assert done.returncode == 0, done.stderr
    again = ("launchers.train", "--config=run:run", "--dry_run")
    assert "the same bits are expected" in run(*again, before=ours).stdout
    (user_folder / "user_mine.py").write_text(MINE.replace("+ 1", "+ 2"))
    said = run(*again, before=ours).stdout
    assert "the same bits" not in said
    assert "code experiments/user_mine.py: sha256 " in said


def test_every_file_of_our_packages_is_hashed() -> None:
    hashes, root = code_hashes.source_hashes(), Path(__file__).parents[2]
    packages = [root / name for name in code_hashes.PACKAGES]
    wanted = {path.relative_to(root).as_posix() for folder in packages for path in folder.rglob("*.py")}
    assert wanted <= set(hashes)
    assert hashes["kd_core/errors.py"] == hashlib.sha256((root / "kd_core/errors.py").read_bytes()).hexdigest()


def test_hashes_tell_what_commits_do_not() -> None:
    facts = {**attempt_facts(World(), {}), "commit": "c0ffee-dirty", "sources": {"data/a.py": "a" * 64}}
    assert record_diff.code_differences(facts, facts) == []
    assert record_diff.code_differences(facts, {**facts, "commit": "badcab"}) == []
    files = {f"data/{number}.py": "b" * 64 for number in range(30)}
    said = record_diff.code_differences(facts, {**facts, "sources": files})
    assert said[0] == f"code data/0.py: not recorded there, sha256 {'b' * 12}… now"
    assert said[-1] == "code: 21 more files"
    old = {name: value for name, value in facts.items() if name != "sources"}
    assert "not committed" in record_diff.code_differences(old, facts)[0]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a commit, in which a file is changed, one is new, one is new but ignored, one is gone."""
    root = tmp_path / "checkout"
    for package in code_hashes.PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(f"# {package}\n")
    (root / ".gitignore").write_text("ignored.py\n")
    for line in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "c"]):
        subprocess.run(["git", *line], cwd=root, check=True)
    (root / "data/__init__.py").write_text("# data\nX = 'ü'\n")
    (root / "experiments/new.py").write_text("Y = 1\n")
    (root / "experiments/ignored.py").write_text("Z = 1\n")
    (root / "launchers/__init__.py").unlink()
    monkeypatch.setattr(code_hashes, "ROOT", root)
    return root


def test_the_patch_leads_from_the_commit_to_what_ran(checkout: Path, tmp_path: Path) -> None:
    status = ["git", "status", "--porcelain"]
    before = subprocess.run(status, cwd=checkout, check=True, capture_output=True).stdout
    code_hashes.write_code(tmp_path)
    assert subprocess.run(status, cwd=checkout, check=True, capture_output=True).stdout == before
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    subprocess.run(["git", "apply", str(tmp_path / "changes.diff")], cwd=clone, check=True)
    found, wanted = (
        {path.relative_to(root): path.read_text() for path in root.glob("*/*.py")} for root in (clone, checkout)
    )
    del wanted[Path("experiments/ignored.py")]
    assert found == wanted


@pytest.mark.usefixtures("checkout")
def test_a_large_patch_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_hashes, "MOST_PATCH", 100)
    code_hashes.write_code(tmp_path)
    assert "Cut here: the patch has " in (tmp_path / "changes.diff").read_text(errors="replace")


def test_without_a_checkout_there_is_no_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_hashes, "ROOT", tmp_path)
    code_hashes.write_code(tmp_path)
    assert not (tmp_path / "changes.diff").exists()
