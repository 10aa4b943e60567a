"""What torchrun shows of a mistake that ends its ranks."""

import re
import subprocess

import pytest

from tests.forks import ENVIRONMENT
from tests.launchers.command import configs, line
from tests.patience import patience
from tests.tiny import Tiny


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.timeout(patience(180))
def test_torchrun_reports_the_message_for_every_rank_and_none_of_our_frames(begun: bool, tiny: Tiny) -> None:
    """A mistake that each rank finds on its own, and one that the first rank finds for all."""
    flags = [*configs(tiny.train_items()), f"--run_dir={tiny.train.parent}"]
    flags, message = (flags, "holds teacher caches") if begun else (["--config=quickstart", "optimiser=3"], "optimizer")
    command = line("launchers.train", *flags, nproc=2)
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(printed := re.findall(r"^train: error: .*$", done.stderr, flags=re.MULTILINE)) == 1, done.stderr
    assert message in printed[0]
    assert re.findall("traceback : (.*)", done.stderr) == printed * 2, done.stderr
    assert re.findall("exitcode  : (-?[0-9]+)", done.stderr) == ["1", "1"]
    assert not re.search("File .*/launchers/(train|cli/|kd).*, line|UsageError|RemoteError", done.stderr), done.stderr
