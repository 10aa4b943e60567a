"""From a teacher's chat template over a cache into the export of a base student."""

import dataclasses
import json
import shutil
from pathlib import Path

import fiddle as fdl
import pytest
import torch
import transformers

from data.cache.manifest import read_manifest
from data.corpus.corpus import Corpus
from data.storage.storage import storage_at
from data.stream.source import Mixture, Shards
from experiments.base.chat_formats import chat_format
from experiments.config.config_items import resolve_items
from experiments.config.saved_students import recorded_chat_format
from kd_core.errors import UsageError
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, build_student
from tests.launchers.test_saved_students import train
from tests.tiny import CHATML, ROW_LENGTH, Tiny, make_chat_folder, write_caches

MESSAGES = [{"role": "user", "content": "The old fox."}, {"role": "assistant", "content": "It sees a river."}]


def _corpus(tiny: Tiny, folder: Path) -> Path:
    """Conversations of several turns, and plain texts beside them, which end no turn."""
    folder.mkdir()
    texts = [path.read_text() for path in sorted(tiny.corpus.iterdir())]
    rows = [{"messages": [*MESSAGES, {**MESSAGES[0], "content": text[:60]}, MESSAGES[1]]} for text in texts]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plain.txt").write_text(texts[0] + "<end>")
    return folder


@pytest.fixture(scope="module")
def chats(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that chats, its caches, and a base model of the same tokenizer."""
    root = tmp_path_factory.mktemp("chats")
    make_chat_folder(tiny, root / "base")
    teacher = make_chat_folder(tiny, root / "teacher", chat_template=CHATML, **{"eos_token": "<|im_end|>"})
    corpus = Corpus(str(_corpus(tiny, root / "corpus")))
    write_caches(tiny.export(teacher=str(teacher), corpus=corpus, validation_share=0.3), root / "cache")
    return root


def test_a_manifest_states_how_conversations_were_written_and_keeps_its_identity(tiny: Tiny, chats: Path) -> None:
    manifest = read_manifest(chats / "cache" / "train")
    assert manifest.made["chat"] == {"template": CHATML, "special_tokens": {}, "turn_ends": {"<|im_end|>": 5}}
    assert manifest.identity() == dataclasses.replace(manifest, made={}).identity()
    assert "chat" not in read_manifest(tiny.train).made


def test_a_template_that_writes_white_space_behind_the_end_of_its_turns(tiny: Tiny, tmp_path: Path) -> None:
    """As generation blocks may hold it; the template names a special token, and another end of another role."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
        "{% endgeneration %}{% else %}{{ bos_token + m.content }}<end>{% endif %}{% endfor %}"
    )
    teacher = make_chat_folder(tiny, tmp_path / "teacher", chat_template=template, **{"bos_token": "<|im_start|>"})
    corpus = Corpus(str(_corpus(tiny, tmp_path / "corpus")))
    write_caches(tiny.export(teacher=str(teacher), corpus=corpus, validation_share=0.3), tmp_path / "cache")
    found = chat_format(Shards(str(tmp_path / "cache" / "train")))
    assert found is not None
    assert (found.special_tokens, found.turn_ends) == ({"bos_token": "<|im_start|>"}, {"<|im_end|>": 5})


def test_a_base_student_trained_on_chat_speaks_as_the_teacher_does(tiny: Tiny, chats: Path, tmp_path: Path) -> None:
    caches = shutil.copytree(chats / "cache", tmp_path / "cache")
    items = [item.replace(f"{tiny.root}/cache", str(caches)) for item in tiny.train_items(2)]
    more = [f"student.folder={chats / 'base'}", f"collate.row_length={2 * ROW_LENGTH}"]
    run = train(tmp_path / "run", [*items, *more])
    load = transformers.AutoTokenizer.from_pretrained
    ours, teachers = load(run.export), load(chats / "teacher")
    assert load(chats / "base").chat_template is None
    assert ours.apply_chat_template(MESSAGES, tokenize=False) == teachers.apply_chat_template(MESSAGES, tokenize=False)
    assert ours.eos_token == teachers.eos_token == "<|im_end|>"
    assert transformers.GenerationConfig.from_pretrained(run.export).eos_token_id == [5, 0]

    checkpoint = run.checkpoints / "step_00000002"
    found = recorded_chat_format(checkpoint)
    assert found is not None
    assert found.turn_ends == {"<|im_end|>": 5}
    shutil.rmtree(caches)
    assert recorded_chat_format(checkpoint) is None, "said, and the weights are exported nevertheless"


@pytest.mark.parametrize("place", ["settings", "files"])
def test_the_template_of_tools_reaches_the_export_of_a_student_that_has_another(
    tiny: Tiny, tmp_path: Path, place: str
) -> None:
    """It names a special token of its own, and the default of the student is the teacher's already."""
    for_tools = "{{ bos_token }}{{ tools | length }} tools\n" + CHATML
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": for_tools}]
    settings = {"bos_token": "<|im_start|>", **({"chat_template": named} if place == "settings" else {})}
    teacher = make_chat_folder(tiny, tmp_path / "teacher", **settings)
    base = make_chat_folder(tiny, tmp_path / "base", chat_template=CHATML)
    if place == "files":
        for folder, template in ((teacher, for_tools), (base, "{{ messages }}")):
            (folder / "chat_template.jinja").write_text(CHATML)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rows = [{"messages": [{**MESSAGES[0], "content": f"The fox {i}."}, MESSAGES[1]], "tools": tools} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export = tiny.export(teacher=str(teacher), corpus=Corpus(str(tmp_path / "chats.jsonl")), validation_share=0.3)
    write_caches(export, tmp_path / "cache")
    stated = read_manifest(tmp_path / "cache" / "train").made["chat"]
    assert (stated["tool_use"], stated["special_tokens"]) == (for_tools, {"bos_token": "<|im_start|>"})

    found = chat_format(Shards(str(tmp_path / "cache" / "train")))
    student = build_student(Pretrained(str(base)), torch.device("cpu"), seed=0)
    save_pretrained(student, tmp_path / "out", base, chat=found)
    ours, teachers = (transformers.AutoTokenizer.from_pretrained(each) for each in (tmp_path / "out", teacher))
    assert ours.chat_template == teachers.chat_template == {"default": CHATML, "tool_use": for_tools}
    for given in (None, tools):
        text = teachers.apply_chat_template(MESSAGES, tools=given, tokenize=False)
        assert ours.apply_chat_template(MESSAGES, tools=given, tokenize=False) == text


def test_a_format_that_cannot_be_read_is_said_before_anything_is_trained(
    tiny: Tiny, chats: Path, tmp_path: Path
) -> None:
    caches = shutil.copytree(chats / "cache", tmp_path / "cache")
    manifest = read_manifest(caches / "train")
    dataclasses.replace(manifest, made={**manifest.made, "chat": 3}).write(storage_at(caches / "train"))
    items = [item.replace(f"{tiny.root}/cache", str(caches)) for item in tiny.train_items(2)]
    more = [f"student.folder={chats / 'base'}", f"collate.row_length={2 * ROW_LENGTH}"]
    experiment = fdl.build(resolve_items([*items, *more], "Experiment").config)
    with pytest.raises(UsageError, match="how conversations were written"):
        experiment.check()


def test_caches_that_were_written_differently_are_said(
    tiny: Tiny, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(chats / "cache" / "train", tmp_path / "other")
    manifest = read_manifest(tmp_path / "other")

    def stated(chat: object) -> Shards:
        dataclasses.replace(manifest, made={**manifest.made, "chat": chat}).write(storage_at(tmp_path / "other"))
        return Shards(str(tmp_path / "other"))

    def mixed(other: Shards) -> Mixture:
        caches = {"chat": Shards(str(chats / "cache" / "train")), "other": other, "plain": Shards(str(tiny.train))}
        return Mixture(caches, dict.fromkeys(caches, 1.0))

    known = manifest.made["chat"]
    assert chat_format(mixed(stated(known))) == chat_format(mixed(Shards(str(tiny.train)))) is not None
    assert not caplog.records
    assert chat_format(mixed(stated({**known, "template": "{{ messages }}"}))) is None
    assert "were written by different chat templates" in caplog.text
    for chat in (3, {}, {**known, "template": 7}, {**known, "turn_ends": {"a": -1}}, {**known, "special_tokens": []},
                 {**known, "tool_use": None}, {**known, "rag": ""}):  # fmt: skip
        with pytest.raises(UsageError, match=r"manifest\.json: damaged .*wanted how conversations were written"):
            chat_format(stated(chat))
