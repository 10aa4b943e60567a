"""The quick start with a teacher and a corpus of one's own: what it measures, computes and takes from the corpus."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from data.cache.manifest import read_manifest
from data.corpus.corpus import Corpus
from experiments.config.config_items import resolve_items
from kd_core.files import read_json
from launchers import own_data
from tests.forks import ENVIRONMENT
from tests.launchers.command import line
from tests.patience import patience
from tests.tiny import Tiny, make_corpus, write_caches

ITEMS = ["quickstart", "tag:RowLength=256"]


@pytest.mark.timeout(300)
def test_a_small_corpus_is_taken_whole_measured_trained_and_compared(tiny: Tiny, tmp_path: Path) -> None:
    make_corpus(tmp_path / "texts", documents=30)
    flags = [f"--teacher={tiny.teacher}", "--corpus=texts", "--folder=mine", "--run_dir=runs/mine", "--config=steps=2",
             "--config=schedule.warmup_steps=1"]  # fmt: skip

    def quickstart() -> str:
        done = subprocess.run(
            line("launchers.quickstart", *flags), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
            timeout=patience(300), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = quickstart()
    assert "; all of the corpus" in shown
    assert "[1/4] Take your teacher and corpus\n" in shown
    assert "tensorboard --logdir=runs " in shown, "no Makefile stands in this folder"
    assert "launchers.compare runs/mine runs/renormalized" in shown
    assert "FOLDER_OF_YOUR_TEXTS" not in shown, "the corpus was the user's own already"
    kept = tuple(read_json(tmp_path / "mine" / "keep_layers.json", "layers")["keep_layers"])
    settings = (tmp_path / "runs/mine/config.txt").read_text()
    assert f"student.keep_layers = {kept}  #" in settings
    assert len(kept) == 2
    report = read_json(tmp_path / "runs/mine/report.json", "the report")
    texts = [path.read_text() for path in (tmp_path / "texts").iterdir()]
    assert any(text.startswith(report["prompt"]) for text in texts)
    assert repr(report["prompt"]) in settings, "of the run's own prompts"
    assert [found["name"] for found in report["models"]] == ["student before", "student after", "teacher"]
    before, after, teacher = (found["kl"] for found in report["models"])
    assert before > after > teacher
    again = quickstart()
    assert again.count("reused") == 4


def test_the_first_stage_says_what_is_taken_and_what_is_fetched() -> None:
    assert own_data.first_stage(None, None) == "Fetch teacher and corpus, checked by sha256"
    assert own_data.first_stage("my/model", None) == "Take your teacher, fetch the corpus, checked by sha256"
    assert own_data.first_stage(None, "texts") == "Take your corpus, fetch the teacher, checked by sha256"


def test_steps_follow_the_cache_and_a_users_step(tiny: Tiny) -> None:
    positions = read_manifest(tiny.train).positions
    assert 256 * 4 > positions > 256 * 2
    assert own_data.step_items(tiny.train, ITEMS, []) == ["tokens_per_step=1024", "steps=10", "tag:Interval=3"]
    small = own_data.step_items(tiny.train, ["quickstart", "tag:RowLength=64"], ["tokens_per_step=64", "steps=7"])
    epoch = positions // 64
    assert small == ["tokens_per_step=64", f"steps={4 * epoch}", f"tag:Interval={4 * epoch // 3}"]
    many = own_data.step_items(tiny.train, ["quickstart", "tag:RowLength=8"], ["tokens_per_step=8"])
    assert many[1] == f"steps={positions // 8}", "once is enough"
    odd = resolve_items(
        [*ITEMS, *own_data.step_items(tiny.train, ITEMS, ["tag:RowLength=48"]), "tag:RowLength=48"], "Experiment"
    )
    assert odd.config.tokens_per_step == 1008


def test_a_part_of_a_large_corpus_is_said_with_how_to_take_more(tiny: Tiny, tmp_path: Path) -> None:
    whole = read_manifest(tiny.train)
    assert own_data.corpus_share(whole) == "; all of the corpus"
    write_caches(tiny.export(train_tokens=200), tmp_path / "cache")
    part = read_manifest(tmp_path / "cache" / "train")
    assert part.made["drawn_from"] == whole.positions
    share = part.positions / whole.positions
    assert f"; {share:.1%} of the corpus's {whole.positions} training positions" in own_data.corpus_share(part)
    assert "--export_config=train_tokens=" in own_data.corpus_share(part)
    assert own_data.corpus_share(replace(whole, made={})) == "; all of the corpus", "of an earlier version"


def test_rows_are_no_longer_than_the_teachers_context(tiny: Tiny) -> None:
    assert own_data.row_length_items(str(tiny.teacher)) == ["tag:RowLength=256"]


def test_a_conversation_is_continued_from_where_the_assistant_speaks(tiny: Tiny, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in tiny.teacher.iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())
    (teacher / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}<end>{% endfor %}"
    )
    rows = [[("user", f"Who sees {n}?"), ("assistant", f"The fox {n}.")] for n in range(20)]
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) + "\n" for row in rows
        )
    )
    export = tiny.export(teacher=str(teacher), corpus=Corpus(str(tmp_path / "chats.jsonl")))
    write_caches(export, tmp_path / "cache")
    prompts = own_data.held_out_prompts(tmp_path / "cache" / "validation", str(teacher))
    assert len(prompts) == own_data.PROMPTS
    assert set(prompts) <= {f"user: Who sees {n}?<end>assistant:" for n in range(20)}, "' The' is one token"
