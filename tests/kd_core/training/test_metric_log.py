"""A run's lines and TensorBoard, read back; also after a resume."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from torch import tensor

from kd_core.losses.objective import CacheFacts, CrossEntropy, Distillation, Objective
from kd_core.parallel.world import World
from kd_core.training.evaluation import metric_names
from kd_core.training.monitoring.histograms import histograms
from kd_core.training.monitoring.metric_log import MetricLog, read_metrics
from kd_core.training.monitoring.tensorboard import PAGES, parse_hparams, write_session

CONFIG = """student = Pretrained  # experiments/x.py:1
student.folder = 'a | b'  # --config=student.folder=a
optimizer.lr = 0.0004  # experiments/x.py:2
loss.terms.kd.keep = None  # default of Distillation
collate.eod_mask_loss = False  # default of Collate
parallel.precision = 'float32'  # --config
seed = 3  # experiments/x.py:3
"""


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0, "scalars": 0})
    found.Reload()
    return found


def texts(found: EventAccumulator, tag: str) -> dict[int, str]:
    return {each.step: each.tensor_proto.string_val[0].decode() for each in found.Tensors(f"{tag}/text_summary")}


def report(log: MetricLog, step: int) -> None:
    log.add(step, {"train/loss": 1.0 / step})
    if step % 2 == 0:
        log.add_continuations(step, {"The old": f" fox, {step}|\nsteps"})
        log.add_histograms(step, histograms({"parameters/x": tensor([1.0, -2.0, float(step)])}, World()))


def test_what_is_written_is_read_back_also_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text(CONFIG)
    with MetricLog(tmp_path, None) as log:
        for step in range(1, 6):
            report(log, step)
    with MetricLog(tmp_path, 3) as log:  # the checkpoint is of step 3: 4 and 5 are taken again
        for step in range(4, 7):
            report(log, step)
        log.end()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    said = texts(found, "continuations")
    assert list(said) == [2, 4, 6]
    assert said[4].splitlines()[-1] == r"| The old |  fox, 4\|<br>steps |"
    assert [(event.step, event.histogram_value.max) for event in found.Histograms("parameters/x")] == [
        (2, 2.0), (4, 4.0), (6, 6.0)
    ]  # fmt: skip
    settings = texts(found, "settings")[0]
    assert "| optimizer.lr | 0.0004 |" in settings
    assert r"'a \| b'" in settings
    assert "parallel.precision" in settings


def test_a_run_is_a_row_of_hparams_with_its_values_and_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text(CONFIG)
    with MetricLog(tmp_path, None) as log:
        log.end()
    contents = events(tmp_path).PluginTagToContent("hparams")
    started = plugin_data_pb2.HParamsPluginData.FromString(contents["_hparams_/session_start_info"])
    values = started.session_start_info.hparams
    assert values["optimizer.lr"].number_value == 0.0004
    assert values["seed"].number_value == 3
    assert values["student"].string_value == "Pretrained"
    assert values["collate.eod_mask_loss"].bool_value is False
    assert "parallel.precision" not in values
    ended = plugin_data_pb2.HParamsPluginData.FromString(contents["_hparams_/session_end_info"])
    assert ended.session_end_info.status == 1  # api_pb2.STATUS_SUCCESS


def name_among_hparams(folder: Path) -> str:
    """What the page shows of a run in front of its values, as TensorBoard reads it."""
    found = EventAccumulator(str(folder))
    found.Reload()
    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    return metadata.parse_session_start_info_plugin_data(content).group_name


def test_the_hparams_page_names_runs_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        (folder / "config.txt").write_text(CONFIG)
        for resume_step in (None, 1):  # by a resume it is written anew
            with MetricLog(folder, resume_step) as log:
                report(log, 1 + (resume_step or 0))
        assert name_among_hparams(folder / "tensorboard") == f"runs/{name}"
    monkeypatch.chdir(tmp_path / "runs")
    with MetricLog(Path("one"), None):
        pass
    assert name_among_hparams(Path("one/tensorboard")) == "runs/one"
    write_session(tmp_path / "sweep", "lr=0.1,0123456789ab", {"lr": 0.1}, [{"step": 1, "val/kl": 0.5}])
    assert name_among_hparams(tmp_path / "sweep") == "lr=0.1,0123456789ab"


def test_a_run_that_was_stopped_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text(CONFIG)
    with MetricLog(tmp_path, None):
        pass
    assert set(events(tmp_path).PluginTagToContent("hparams")) == {"_hparams_/session_start_info"}
    assert not (tmp_path / "continuations.jsonl").exists()


def test_the_pages_show_every_number_of_a_run(tmp_path: Path) -> None:
    with MetricLog(tmp_path, None):
        pass
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert {page.title: [chart.title for chart in page.chart] for page in layout.category} == {
        page: list(charts) for page, charts in PAGES.items()
    }
    shown = [re_ for page in layout.category for chart in page.chart for re_ in chart.multiline.tag]
    objective = Objective({"kd": Distillation(), "my_term": CrossEntropy()})
    wanted = metric_names(objective, CacheFacts(50, 8)) - {"val/tokens"}
    wanted |= {name.replace("val/", "val/wiki/") for name in wanted if name != "val/loss"}
    wanted |= {"train/loss", "train/my_term_loss", "train/lr", "train/grad_norm", "train/teacher_mass"}
    wanted |= {"speed/tokens_per_second", "speed/data_wait_share", "speed/memory_gib", "data/damaged_blocks"}
    assert not {name for name in wanted if not any(matches(tag, name) for tag in shown)}
    assert not [tag for tag in shown if not any(matches(tag, name) for name in wanted | OTHERS)]


OTHERS = {"train/skipped_steps", "speed/step_seconds", "train/tokens"}


def matches(tag: str, name: str) -> Any:
    """As TensorBoard's own plugin finds the tags of a chart."""
    return re.compile(tag).match(name)


@pytest.mark.parametrize(
    ("text", "value"), [("4e-4", 4e-4), ("True", True), ("'x'", "x"), ("None", "None"), ("(1, 2)", "(1, 2)")]
)
def test_values_of_settings(text: str, value: object) -> None:
    assert parse_hparams({"loss.x": text, "checkpoint.every": "3"}) == {"loss.x": value}
