"""From conversations to a student, by the commands: export, then train on the assistant's turns alone."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

from kd_core.training.monitoring.metric_log import read_metrics
from tests.launchers.command import configs, run
from tests.tiny import ROW_LENGTH, Tiny

TEMPLATE = (
    "{% for m in messages %}{{ '## ' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}## assistant\n{% endif %}"
)


def test_conversations_are_exported_and_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    teacher, corpus = tmp_path / "teacher", tmp_path / "corpus"
    shutil.copytree(tiny.teacher, teacher)
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    corpus.mkdir()
    texts = [path.read_text() for path in sorted(tiny.corpus.iterdir())]
    rows = [{"prompt": question, "completion": answer} for question, answer in pairwise(texts)]
    (corpus / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        "chat_export",
        f"teacher={teacher}",
        f"corpus.path={corpus}",
        "selection.top_k=8",
        f"row_length={ROW_LENGTH}",
    ]
    flags = [*configs([*settings, "overlap=8", "validation_tokens=none"]), f"--out={tmp_path / 'cache'}"]

    shown = run("launchers.export_teacher", *flags, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert not (tmp_path / "cache").exists()
    done = run("launchers.export_teacher", *flags)
    assert done.returncode == 0, done.stderr
    train = tmp_path / "cache" / "train"
    records = tiny.records(train)
    positions, scored = sum(r.positions for r in records), sum(int(r.loss_mask.sum()) for r in records)
    assert f"{len(records)} records, {positions} positions ({scored} scored)" in shown.stdout

    items = [item for item in tiny.train_items(2) if not item.startswith(("shards", "evaluation.shards"))]
    items = [item.replace(str(tiny.teacher), str(teacher)) for item in items]
    items += [f"shards.path={train}", f"evaluation.shards.path={tmp_path / 'cache' / 'validation'}"]
    done = run("launchers.train", *configs(items), f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "chat_template.jinja").read_text() == TEMPLATE
    tokens = [
        line["train/tokens"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/tokens" in line
    ]
    assert all(0 < count < 4 * ROW_LENGTH for count in tokens)


def test_a_bad_row_is_one_message(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    flags = configs(["chat_export", f"teacher={tiny.teacher}", f"corpus.path={tmp_path}", "row_length=64", "overlap=0"])
    done = run("launchers.export_teacher", *flags, f"--out={tmp_path / 'cache'}")
    assert done.returncode == 1
    assert f"{tmp_path}/a.jsonl:1: messages[0]: no 'content'" in done.stderr
    assert "Traceback" not in done.stderr
