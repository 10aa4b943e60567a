"""Runs side by side: what differs and nothing else, in the terminal and on a page, whatever state the runs are in."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launchers.reports.plots import round_ticks, sparkline, svg_plot
from launchers.reports.runs import Run, metric_rows, provenance_rows, read_run, settings_rows
from tests.launchers.command import configs, run
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one experiment, at two learning rates."""
    root = tmp_path_factory.mktemp("runs")
    for name, more in (("slow", []), ("fast", ["optimizer.lr=2e-3"])):
        done = run("launchers.train", *configs([*tiny.train_items(6), *more]), f"--run_dir={root / name}")
        assert done.returncode == 0, done.stderr
    return [root / "slow", root / "fast"]


class _Page(HTMLParser):
    """Texts by tag, attributes that load something, and tags that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.lines: list[list[tuple[float, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "onload")]
        self.seen.setdefault(tag, [])
        if points := dict(attrs).get("points"):
            self.lines.append([tuple(map(float, point.split(","))) for point in points.split()])
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.seen[self.open[-1]].append(data)


def test_the_terminal_shows_what_differs_and_the_numbers(two: list[Path]) -> None:
    done = run("launchers.compare", *map(str, two))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["optimizer.lr", "0.0004", "0.002"] in lines
    assert not any(line[:1] == ["seed"] for line in lines)
    last = [read_run(folder).lines[-1]["val/kl"] for folder in two]
    assert ["val/kl", f"{last[0]:.4f}", f"{last[1]:.4f}", f"({last[1] - last[0]:+.4f})"] in lines
    everything = run("launchers.compare", *map(str, two), "--all").stdout
    assert ["seed", "0", "0"] in [line.split() for line in everything.splitlines()]


def test_the_page_stands_alone_and_draws_every_curve(two: list[Path], tmp_path: Path) -> None:
    done = run("launchers.compare", *map(str, two), f"--html={tmp_path / 'new' / 'runs.html'}", "--x=tokens")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "new" / "runs.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert page.loads == []
    assert "script" not in page.seen
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    names = {name for line in read_run(two[0]).lines for name in line if name.startswith(("val/", "train/"))}
    assert names <= set(page.seen["text"])
    assert len(page.lines) == 2 * len(names)
    assert all(0 <= x <= 420 and 0 <= y <= 250 for line in page.lines for x, y in line)
    assert "optimizer.lr" in page.seen["td"]
    assert "positions read" in page.seen["text"]


def test_a_run_in_progress_one_of_another_experiment_and_one_without_numbers(two: list[Path], tmp_path: Path) -> None:
    for name in ("going", "new"):
        shutil.copytree(two[0], tmp_path / name)
    metrics = tmp_path / "going" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:3]) + '{"step": 3, "tra')
    (tmp_path / "new" / "metrics.jsonl").unlink()
    settings = tmp_path / "new" / "config.txt"
    settings.write_text(settings.read_text() + "student.rank = 8  # lora.py:3\n")
    folders = [two[0], tmp_path / "going", tmp_path / "new"]
    done = run("launchers.compare", *map(str, folders), f"--html={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert "step 2 of 6" in done.stdout
    assert f"{tmp_path / 'new'}, step 0 of 6  (no number logged yet)" in done.stdout
    assert ["student.rank", "–", "–", "8"] in [line.split() for line in done.stdout.splitlines()]
    assert _Page((tmp_path / "page.html").read_text()).open == []
    alone = run("launchers.compare", str(tmp_path / "new"))
    assert alone.returncode == 0, alone.stderr
    assert "no run has logged any yet" in alone.stdout


def test_the_best_is_shown_where_it_is_not_the_last(two: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for step, kl, agreement in ((0, 0.2, 0.9), (3, 0.1, 0.2), (6, 0.3, 0.1)):
        lines[step] |= {"val/kl": kl, "val/top1_agreement": agreement}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = dict(metric_rows([read_run(tmp_path / "run")], everything=False))
    assert rows["  best val/kl"] == ["0.1000 at 3"]
    assert rows["  best val/top1_agreement"] == ["0.9000 at 0"]


def test_provenance_names_code_ranks_and_data_that_differ(two: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "run")
    path = tmp_path / "run" / "attempts" / "001" / "attempt.json"
    facts = json.loads(path.read_text())
    facts["commit"], facts["world"]["size"] = "0123456789abcdef-dirty", 4
    facts["inputs"]["shards.path"]["sha256"] = "f" * 64
    path.write_text(json.dumps(facts))
    runs = [read_run(two[0]), read_run(tmp_path / "run")]
    rows = dict(provenance_rows(runs, everything=False))
    assert rows["code"][1] == "0123456789ab-dirty"
    assert "size=4" in rows["ranks"][1]
    assert rows["shards.path"][1] == "ffffffffffff…"
    assert "python" not in rows
    assert settings_rows(runs, everything=False) == []


def test_defaults_of_a_part_that_a_run_lacks_are_left_out() -> None:
    shared = {"seed": ("0", "default of Experiment"), "steps": ("4", "half_depth.py:9")}
    mixed = {
        "shards.caches.a.path": ("'a'", "mine.py:3"),
        "shards.caches.a.prefetch": ("2", "default of Shards, tag:X"),
    }
    runs = [Run(Path(name), settings, {}, 1, []) for name, settings in (("one", shared), ("mix", shared | mixed))]
    runs[1].settings["seed"] = ("1", "--config=seed=1")
    assert settings_rows(runs, everything=False) == [("seed", ["0", "1"]), ("shards.caches.a.path", ["–", "'a'"])]
    assert ("shards.caches.a.prefetch", ["–", "2"]) in settings_rows(runs, everything=True)


def test_what_is_no_run_is_named(two: list[Path], tmp_path: Path) -> None:
    for arguments, message in (((str(two[0]), str(tmp_path)), "no run there"), ((), "no RUN given")):
        done = run("launchers.compare", *arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_names_of_folders_are_text_on_the_page(two: list[Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "<b>bold")
    assert run("launchers.compare", str(tmp_path / "<b>bold"), f"--html={tmp_path / 'p.html'}").returncode == 0
    assert "b" not in _Page((tmp_path / "p.html").read_text()).seen


def test_ticks_are_round_and_inside() -> None:
    assert round_ticks(0, 60) == [0, 20, 40, 60]
    assert round_ticks(0.13, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert round_ticks(-3e9, 4e9) == [-2e9, 0, 2e9, 4e9]


@pytest.mark.parametrize(
    "points", [[(0, 1.0)], [(0, 2.0), (5, 2.0)], [(0, float("nan")), (1, 1.0)], [(0, float("inf"))], []]
)
def test_odd_curves_are_drawn(points: list[tuple[float, float]]) -> None:
    page = _Page(svg_plot("val/<x>", "step", [("A", points), ("B", [(0, 1.0), (3, -1.0)])]))
    assert "val/<x>" in page.seen["text"]
    assert all(0 <= x <= 420 and 0 <= y <= 250 for line in page.lines for x, y in line)
    _Page(svg_plot("val/x", "step", [("A", points)]))


def test_a_sparkline_is_lowest_where_the_curve_is() -> None:
    assert sparkline([(0, 3.0), (1, 1.0), (2, 2.0)]) == "█▁▅"
    assert len(sparkline([(i, float(i)) for i in range(100)])) == 24
    assert sparkline([(0, float("nan"))]) == ""


def test_numbers_of_different_quantities_are_not_subtracted() -> None:
    lines = [{"step": 1, "val/loss": 1.0, "val/kd_loss": 0.5, "val/sft_loss": 2.0, "val/nll": 2.0, "val/kl": 0.5}]
    settings = {"loss.terms.kd.divergence": ("'forward_kl'", ""), "loss.terms.kd.weight": ("0.9", "")}
    first = Run(Path("first"), settings, {}, 1, lines)

    def cells(inputs: dict[str, dict[str, str]], **changes: str) -> dict[str, str]:
        changed = settings | {name.replace("__", "."): (value, "") for name, value in changes.items()}
        rows = metric_rows([first, Run(Path("other"), changed, {"inputs": inputs}, 1, lines)], everything=False)
        return {name.removeprefix("val/"): row[1].split()[1] for name, row in rows}

    same, other = "(+0.0000)", "(≠)"
    assert set(cells({}).values()) == {same}
    assert cells({}, loss__terms__kd__weight="0.5") == dict.fromkeys(("kd_loss", "sft_loss", "nll", "kl"), same) | {
        "loss": other
    }
    divergence = cells({}, loss__terms__kd__divergence="'jsd'")
    assert {name for name, cell in divergence.items() if cell == other} == {"loss", "kd_loss"}
    contents = cells({"evaluation.shards.path": {"path": "x", "sha256": "f" * 64}})
    assert set(contents.values()) == {other}
    read = cells({}, evaluation__shards__top_k="4")
    assert read["nll"] == same
    assert read["kl"] == other
