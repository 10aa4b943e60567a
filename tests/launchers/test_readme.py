"""The README's own experiment and sweep: a few lines that a new user writes, found, checked and run as they stand."""

import json
import re
from pathlib import Path

import fiddle as fdl
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from data.cache.selection import Selection
from experiments.base.experiment import Experiment
from experiments.config import config_items, find_sweep
from experiments.config.sweep_points import resolve_points
from kd_core.training.monitoring.metric_log import read_metrics
from launchers.sweeps.cost_plan import check, plan
from launchers.sweeps.sweep_folder import SweepFolder
from tests.forks import ROOT
from tests.launchers.command import configs, run, table
from tests.tiny import Tiny, write_caches

STEPS = 4
WEIGHT, WEIGHTS = "loss.terms.kd.weight", (0.5, 0.7, 0.9)


def _check_experiment(items: list[str]) -> None:
    changed = config_items.differences(
        config_items.resolve_items(["quickstart"], "Experiment"), config_items.resolve_items(["skewed"], "Experiment")
    )
    assert [line.split("  (was")[0] for line in changed.splitlines()] == [
        "shards.top_k = 16",
        "loss.terms.kd.divergence = 'skew_reverse_kl'",
        "optimizer.lr = 0.0002",
    ]
    experiment: Experiment = fdl.build(config_items.resolve_items(["skewed", *items], "Experiment").config)
    assert "the run" in experiment.check()


def _check_tables(out: Path) -> None:
    rows = table(out / "results.csv")
    assert [(float(row[WEIGHT]), row["seed"]) for row in rows] == [(w, seed) for w in WEIGHTS for seed in ("0", "1")]
    for row in rows:
        last = read_metrics(out / "points" / row["id"] / "metrics.jsonl")[-1]
        assert last["step"] == STEPS
        assert {name: float(row[name]) for name in row if name.startswith("val/")} == {
            name: value for name, value in last.items() if name.startswith("val/")
        }
        record = json.loads((out / "points" / row["id"] / "config.json").read_text())
        assert "skew_reverse_kl" in json.dumps(record)
    names = [name for name in rows[0] if name.startswith("val/")]
    for row in rows:
        curve = [found for found in table(out / "curves.csv") if found["id"] == row["id"]]
        assert (curve[0]["step"], curve[-1]["step"], curve[-1]["seed"]) == ("0", str(STEPS), row["seed"])
        assert [curve[-1][name] for name in names] == [row[name] for name in names]
    for group, pair in zip(table(out / "summary.csv"), zip(rows[::2], rows[1::2], strict=True), strict=True):
        one, other = (float(row["val/kl"]) for row in pair)
        assert float(group["val/kl"]) == pytest.approx((one + other) / 2, rel=1e-12)
        # Of two values, the interval is half their distance times t(1) = 12.706.
        assert float(group["val/kl ±"]) == pytest.approx(abs(one - other) / 2 * 12.7062, rel=1e-4)
        assert group["n"] == "2"
    text = (out / "results.md").read_text()
    assert text.startswith("6 of 6 points are finished.")
    assert "| weight | n | val/kl | val/nll |" in text  # the weight makes another loss, which comes last


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def _check_tensorboard(out: Path) -> None:
    root = out / "tensorboard"
    content = _events(root).SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert {info.name: [v.number_value for v in info.domain_discrete.values] for info in experiment.hparam_infos} == {
        "weight": list(WEIGHTS),
        "seed": [0, 1],
    }
    rows = table(out / "results.csv")
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {name for name in rows[0] if name.startswith("val/")}
    for row in rows:
        (folder,) = root.glob(f"*{row['id']}")
        events = _events(folder)
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        values = metadata.parse_session_start_info_plugin_data(content).hparams
        assert values["weight"].number_value == float(row[WEIGHT])
        assert values["seed"].number_value == float(row["seed"])
        for name in metrics:
            last = events.Scalars(name)[-1]
            assert (last.step, last.value) == (STEPS, pytest.approx(float(row[name]), rel=1e-6))


@pytest.mark.timeout(300)
def test_the_readmes_own_experiment_and_sweep_do_what_they_say(user_folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("\n## Your own experiment and sweep\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n# experiments/mine\.py\n(.*?)```", section, re.DOTALL)
    assert len([text for text in code.splitlines() if text.strip()]) <= 12
    file, out = user_folder / "user_mine.py", tmp_path / "out"
    file.write_text(code)
    write_caches(tiny.export(selection=Selection(top_k=64)), tmp_path / "cache")
    items = [*tiny.train_items(STEPS)[1:], f"shards.path={tmp_path / 'cache' / 'train'}"]
    _check_experiment(items)
    name, sweep = find_sweep.find_sweep("weights")
    points = resolve_points(sweep(), items, name)
    assert check(points) == []
    # A process of its own looks for names in our own folder, so it is given the file.
    flags = [
        f"--sweep={file}:weights",
        f"--out={out}",
        "--backend=local",
        "--jobs=2",
        "--nokeep_checkpoints",
        *configs(items),
    ]
    done = run("launchers.sweep", *flags)
    assert done.returncode == 0, done.stderr
    _check_tables(out)
    _check_tensorboard(out)
    assert not list(out.glob("points/*/checkpoints"))
    text = plan(SweepFolder(out), points, None)
    assert len(re.findall(r"^[0-9a-f]{12} .* 512 .* finished$", text, flags=re.MULTILINE)) == 6
    assert "as the finished points ran" in text
