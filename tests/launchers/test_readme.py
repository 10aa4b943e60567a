"""The README's own experiment: a few lines that a new user writes, found, checked and built as they stand."""

import re
from pathlib import Path

import fiddle as fdl

from experiments.experiment import Experiment
from launchers import config_items
from tests.tiny import Tiny

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_readmes_own_experiment_does_what_it_says(user_folder: Path, tiny: Tiny) -> None:
    code = re.search(r"```python\n# experiments/mine\.py\n(.*?)```", README.read_text(), re.DOTALL)[1]
    assert code.count("\n") <= 12
    (user_folder / "user_mine.py").write_text(code)
    changed = config_items.differences(
        config_items.resolve(["quickstart"], "Experiment"), config_items.resolve(["skewed"], "Experiment")
    )
    assert [line.split("  (was")[0] for line in changed.splitlines()] == [
        "shards.top_k = 16",
        "loss.terms.kd.divergence = 'skew_reverse_kl'",
        "optimizer.lr = 0.0002",
    ]
    items = ["skewed", *tiny.train_items()[1:], "shards.top_k=4"]
    experiment: Experiment = fdl.build(config_items.resolve(items, "Experiment").config)
    assert "the run" in experiment.check()
