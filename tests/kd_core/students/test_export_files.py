"""What lies beside an exported student's weights, as transformers reads it."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from kd_core.students.huggingface.config_json import parse_architecture
from kd_core.students.huggingface.export_files import ChatFormat, write_export_files
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, build_student
from tests.kd_core.students.models import their_config
from tests.tiny import CHATML, Tiny, make_chat_folder

FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "spiece.model",
        "tekken.json",
    ),
    *("qwen.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json"),
    *("LICENSE", "LICENSE.txt", "licence.md", "NOTICE", "Notice.txt", "COPYING", "USE_POLICY.md"),
)
OTHERS = ("README.md", "pytorch_model.bin", "modeling_own.py", "training_args.bin", "model.gguf", ".gitattributes")
OWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Who sees a river?"}, {"role": "assistant", "content": "The old fox."}]


def _export(folder: Path, out: Path, chat: ChatFormat | None = None) -> Path:
    save_pretrained(build_student(Pretrained(str(folder)), torch.device("cpu"), seed=0), out, folder, chat=chat)
    return out


def _chat(template: str = CHATML, **special: str) -> ChatFormat:
    return ChatFormat(template, special, {"<|im_end|>": 5})


def _new_tokens(model: transformers.PreTrainedModel, ids: list[int]) -> int:
    """How many of at most 7 tokens are generated where the model says nothing but the end of its turn."""

    def say_the_end(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(scores.shape[-1]) == 5, 0.0, -torch.inf).expand_as(scores)

    said = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=7, do_sample=False,
        pad_token_id=0, logits_processor=transformers.LogitsProcessorList([say_the_end]),
    )  # fmt: skip
    return said.shape[1] - len(ids)


def test_every_file_of_the_tokenizer_and_the_licence_go_along(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_chat_folder(tiny, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    for number, name in enumerate((*FILES[1:], *OTHERS)):
        (folder / name).write_text(json.dumps({"file": number}))
    (folder / "tokenizer_extra").mkdir()
    os.mkfifo(folder / "NOTICE.pipe")  # would be waited for
    out = _export(folder, tmp_path / "out")
    for name in FILES:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*FILES, "config.json", "model.safetensors"}


def test_a_link_is_copied_as_what_it_points_at(tiny: Tiny, tmp_path: Path) -> None:
    """As a hub's cache of snapshots has them."""
    folder = make_chat_folder(tiny, tmp_path / "model")
    (tmp_path / "blob").write_text("terms")
    (folder / "LICENSE").symlink_to(tmp_path / "blob")
    (folder / "NOTICE").symlink_to(tmp_path / "nowhere")
    out = _export(folder, tmp_path / "out")
    assert (out / "LICENSE").read_text() == "terms"
    assert not (out / "LICENSE").is_symlink()
    assert not (out / "NOTICE").exists()


def test_ids_of_special_tokens_are_those_of_the_source(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_chat_folder(tiny, tmp_path / "model")
    known = json.loads((folder / "config.json").read_text())
    known |= {"pad_token_id": 6, "bos_token_id": None, "eos_token_id": [0, 5], "sep_token_id": 7}
    (folder / "config.json").write_text(json.dumps(known))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "top_k": 7, "pad_token_id": 6}))
    out = _export(folder, tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, theirs = load(out), load(folder)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.get_input_embeddings().padding_idx == 6
    assert json.loads((out / "config.json").read_text())["sep_token_id"] == 7


def test_families_without_a_padding_token_keep_that_of_the_source(tmp_path: Path) -> None:
    config = their_config("phi3").to_dict()
    (tmp_path / "out").mkdir()
    for pad in (5, None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        write_export_files(tmp_path / "out", parse_architecture(tmp_path, config), tmp_path, "float32")
        written = tmp_path / "out" / "config.json"
        assert json.loads(written.read_text())["pad_token_id"] == pad
        written.unlink()


def test_a_base_student_trained_on_chat_gets_template_and_end_of_turn(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_chat_folder(tiny, tmp_path / "model")
    out = _export(folder, tmp_path / "out", _chat())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    text = "<|im_start|>user\nWho sees a river?<|im_end|>\n<|im_start|>assistant\nThe old fox.<|im_end|>\n"
    assert tokenizer.decode(ids) == text + "<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [5, 0]
    bare = transformers.AutoModelForCausalLM.from_pretrained(_export(folder, tmp_path / "bare"))
    assert bare.generation_config.eos_token_id == 0
    assert [_new_tokens(model, ids), _new_tokens(bare, ids)] == [1, 7], "the end of a turn ends what is generated"


def test_the_template_of_the_cache_goes_before_the_students_own(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = {
        "settings": {"chat_template": OWN},
        "names": {"chat_template": [{"name": "default", "template": OWN}, {"name": "rag", "template": "r"}]},
        "file": {},
    }
    for name, settings in places.items():
        folder = make_chat_folder(tiny, tmp_path / name, **settings)
        if name == "file":
            (folder / "chat_template.jinja").write_text(OWN)
        caplog.clear()
        with caplog.at_level("INFO", "kd"):
            out = _export(folder, tmp_path / f"{name}_out", _chat())
        assert f"{folder} has another chat template" in caplog.text
        assert transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML


def test_the_template_of_tools_goes_with_the_default_that_it_belongs_to(tiny: Tiny, tmp_path: Path) -> None:
    """The student's own goes where the cache has another default and no template of tools."""
    folder = make_chat_folder(tiny, tmp_path / "model", chat_template=OWN)
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(OWN)
    load = transformers.AutoTokenizer.from_pretrained
    assert load(_export(folder, tmp_path / "other", _chat())).chat_template == {"default": CHATML, "rag": OWN}
    (folder / "chat_template.jinja").write_text(CHATML)
    kept = {"default": CHATML, "tool_use": OWN, "rag": OWN}
    assert load(_export(folder, tmp_path / "same", _chat())).chat_template == kept


def test_its_own_template_stays_where_it_is_the_same(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Qwen2.5's base models have it: the template of the instruct model, and another end."""
    folder = make_chat_folder(tiny, tmp_path / "model", chat_template=CHATML)
    with caplog.at_level("INFO", "kd"):
        out = _export(folder, tmp_path / "out", _chat())
    assert "chat template" not in caplog.text
    assert not (out / "chat_template.jinja").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")


def test_what_the_template_calls_its_special_tokens_is_what_it_was_trained_with(tiny: Tiny, tmp_path: Path) -> None:
    """The template names `eos_token`: were it renamed to the end of the turn, the text would be another one."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = make_chat_folder(
        tiny, tmp_path / "model", bos_token={"__type": "AddedToken", "content": "<end>", "special": True}
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    chat = ChatFormat(template, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {"<|im_end|>": 5})
    out = _export(folder, tmp_path / "out", chat)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<|im_start|>Who sees a river?<|im_end|>The old fox.<|im_end|>"
    assert json.loads((out / "special_tokens_map.json").read_text())["eos_token"] == "<|im_end|>"


def test_without_a_special_token_at_the_end_of_a_turn_the_ends_stay(tiny: Tiny, tmp_path: Path) -> None:
    folder = make_chat_folder(tiny, tmp_path / "model")
    out = _export(folder, tmp_path / "out", ChatFormat(OWN, {}, {}))
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<end>"
    assert transformers.AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == 0
