"""Prompts and completions of plain text without a chat template: one text, of which the completion alone is scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from data.corpus.corpus import Corpus
from data.corpus.encoding import Encoder
from kd_core.errors import UsageError
from tests.tiny import Tiny


def _corpus(path: Path, *rows: dict[str, object]) -> Corpus:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(str(path))


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Who sees the fox?", " The old owl."),
        ("The old f", "ox sees a river."),  # a token straddles the boundary
        ("Q: naïve 🦉?\nA:", " 東京 ö"),
        ("", "The old owl sees."),
    ],
)
def test_the_completion_is_scored_to_the_token(tiny: Tiny, tmp_path: Path, prompt: str, completion: str) -> None:
    corpus = _corpus(tmp_path / "a.jsonl", {"prompt": prompt, "completion": completion})
    encoder = Encoder(tiny.teacher)
    [found] = encoder.encode(corpus.documents())
    assert encoder.template is None
    # The tokenizer itself, by bytes: a token is scored when it holds a byte of the completion.
    fast = FastTokenizer.from_file(str(tiny.teacher / "tokenizer.json"))
    encoding = fast.encode(prompt + completion, add_special_tokens=False)
    assert found.token_ids.tolist() == encoding.ids
    ends = np.cumsum([len(fast.id_to_token(i)) for i in encoding.ids])  # a character of the vocabulary is a byte
    assert ends[-1] == len((prompt + completion).encode())
    wanted = (ends > len(prompt.encode())).astype(int)
    assert found.loss_mask.tolist() == wanted[1:].tolist()
    assert wanted.any()
    assert (wanted.sum() < len(wanted)) == bool(prompt)


def test_conversations_still_want_a_template(tiny: Tiny, tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "Who?"}]
    for row in (
        {"prompt": ask, "completion": [{"role": "assistant", "content": "The owl."}]},
        {"instruction": "Who?", "output": "The owl."},
    ):
        corpus = _corpus(tmp_path / "a.jsonl", {"prompt": "Who?", "completion": "The owl."}, row)
        with pytest.raises(UsageError, match="no chat template, and the corpus has conversations"):
            list(Encoder(tiny.teacher).encode(corpus.documents()))


def test_with_a_template_they_are_a_conversation(tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny.teacher.iterdir():
        (tmp_path / file.name).symlink_to(file)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    encoder = Encoder(tmp_path)
    corpus = _corpus(tmp_path / "a.jsonl", {"prompt": "Who?", "completion": "The owl."})
    [found] = encoder.encode(corpus.documents())
    assert encoder.tokenizer.decode(found.token_ids.tolist()) == "<user>Who?<end><assistant>The owl.<end>"
    assert encoder.tokenizer.decode(found.token_ids[1:][found.loss_mask > 0].tolist()) == "The owl.<end>"
