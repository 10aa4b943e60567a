"""The place of an assistant's turn in the rendering of its whole conversation.

Templates write a turn another way once more messages follow: they drop its reasoning, put tools beside the last
question, close the conversation with a token of its own. So a turn is sought in the whole rendering, by four others:

    whole    …<user>go<end><assistant>The owl.<end><user>…
    marked   …<user>go<end><assistant>q9d4…<end><user>…     its text and the names of its calls are replaced by a mark
    prompt   …<user>go<end><assistant>                      the messages before it, with the prompt for generation
    other    …<user>go<end><assistant>q9d4…<end>            nothing follows (or, behind a last turn, one more message)

The turn begins where `prompt` ends, sought from the mark of `marked` backwards. It ends where what follows the mark in
`marked` and in `other` stops being the same: from there on another message is speaking. Both places must then be the
same in `whole`, counted from its two ends.
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.corpus.chat.conversations import Message
from data.text_lines import BadRowError

Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]
ANOTHER: Message = {"role": "user", "content": "And then?"}


def mark_of(text: str) -> str:
    """Returns letters and digits that the text does not hold, and that no template takes for anything."""
    return f"q{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:20]}"


def _call_name(call: Message) -> tuple[Message, str]:
    """Returns the object of a call that has its name, and the name."""
    function = call["function"] if isinstance(call.get("function"), dict) else call
    return function, str(function.get("name", ""))


class Marked(NamedTuple):
    """A message with marks in the place of its content and of the names that it calls; what each mark stands for."""

    message: Message
    meanings: dict[str, str]

    @classmethod
    def from_message(cls, message: Message, mark: str) -> "Marked":
        """Returns the message marked; `mark` is the beginning of each mark."""
        found, content = dict(message), message.get("content")
        meanings = {}
        if isinstance(content, str) and content.strip():
            found["content"], meanings[f"{mark}cq"] = f"{mark}cq", content
        elif isinstance(content, list):
            found["content"] = [{**part, "text": f"{mark}cq"} for part in content]
            meanings[f"{mark}cq"] = ""
        if calls := message.get("tool_calls"):
            found["tool_calls"] = []
            for i, call in enumerate(calls):
                function, meanings[f"{mark}{i}q"] = _call_name(call)
                named = {**function, "name": f"{mark}{i}q"}
                found["tool_calls"].append(named if function is call else {**call, "function": named})
        return cls(found, meanings)

    def check_traces(self, text: str, where: str) -> None:
        """Checks that a rendering of this message, `text`, holds its calls, or its content where it has none.

        Raises:
            BadRowError: it does not, so that a student would learn to say nothing.
        """
        calls = [mark for mark in self.meanings if not mark.endswith("cq")]
        if all(mark in text for mark in calls or self.meanings):
            return
        what = "tool call" if calls else "turn"
        raise BadRowError(
            f"{where}: the chat template writes nothing of this {what}, and a student would learn to say nothing "
            "there. Use a template that writes it, write it into 'content', or drop the row.",
            f"{what} that the template does not write",
        )

    def places(self, text: str) -> tuple[int, int]:
        """Returns where the first mark begins in a rendering, and where the last one ends, each where it first is."""
        found = [(text.find(mark), len(mark)) for mark in self.meanings if mark in text]
        return min(found)[0], sum(max(found))

    def unmarked(self, text: str) -> str:
        """Returns the text with what the marks stand for, for templates that name a call again in its result."""
        for mark, meaning in self.meanings.items():
            text = text.replace(mark, meaning)
        return text


class TurnFinder:
    """Finds turns in renderings; `tokens` are the special tokens of the tokenizer, which are never divided."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(sorted(filter(None, tokens), key=len, reverse=True))
        self.token = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        # Where a line or a special token ends.
        self.edge = re.compile(f"\n|{self.token.pattern}")

    def _shared(self, one: str, other: str) -> int:
        """Returns how many characters two texts begin with in common, in whole special tokens."""
        at = _most(min(len(one), len(other)), lambda size: one[:size] == other[:size])
        longest = len(self.tokens[0]) if self.tokens else 0
        for text in (one, other):
            for found in self.token.finditer(text, max(0, at - longest), at + longest):
                at = found.start() if found.start() < at < found.end() else at
        return at

    def _start(
        self, render: Render, messages: Sequence[Message], number: int, turn: Marked, before: str, head: str
    ) -> int | None:
        """Returns where in `head`, which stands before the turn's own text, the prompt for generation ends.

        `before` is all that stands before the turn's first mark, `head` what of it the whole rendering has too.
        """
        asked = messages[:number]
        if (prompt := _rendered(render, True, asked)) is None:
            asked = [*asked, ANOTHER]
            prompt = _rendered(render, True, asked) or ""
        if prompt and head.startswith(prompt):
            return len(prompt)
        # Messages before are written another way than with nothing behind them: compare the ends, back to those.
        floor = _floor(render, messages, number, turn, len(before))
        opening = prompt[self._shared(_rendered(render, False, asked) or "", prompt) :]
        known = _most(len(prompt), lambda size: head.find(prompt[-size:], max(0, floor - size)) >= 0)
        if known >= max(1, len(opening)):
            return head.rfind(prompt[-known:], max(0, floor - known)) + known
        # The prompt goes on where this turn does not, such as one that opens the reasoning.
        known = _most(len(opening), lambda size: head.find(opening[:size], floor) >= 0)
        written = opening[: max((found.end() for found in self.edge.finditer(opening[:known])), default=0)]
        if not written or written in (_rendered(render, False, [ANOTHER]) or ""):
            return None  # a question opens with it too
        return head.rfind(written, floor) + len(written)

    def _end(self, tail: str, other: str | None) -> int | None:
        """Returns where in `tail`, the text behind the marks, the turn ends: behind its end-of-turn token."""
        if other is None:
            found = self.token.search(tail)
            return found.end() if found else None
        end = self._shared(tail, other)
        bare = tail[:end].rstrip()
        if bare.endswith(self.tokens):
            return len(bare)
        if (token := self.token.match(tail, end)) and self.token.match(other, end):
            return token.end()  # one token ends a turn within a conversation, another the last one
        return end

    def _place(
        self, render: Render, messages: Sequence[Message], number: int, whole: str, text: str, turn: Marked
    ) -> Span | None:
        """Returns the characters of `whole` that a turn is; `text` is the rendering with the turn marked."""
        first, last = turn.places(text)
        tail, behind = text[last:], messages[number + 1 :]
        alone = [*messages[:number], turn.message]
        other = _rendered(render, False, alone if behind else [*alone, ANOTHER])
        if behind and text[first:last] not in (other or _rendered(render, False, [*alone, ANOTHER]) or ""):
            return None  # what it writes otherwise between the marks is of the messages behind
        _, seen, rest = (other or "").partition(text[first:last])
        end = self._end(tail, rest if seen else None)
        if end is None or not whole.endswith(rest := turn.unmarked(tail[end:])):
            return None
        head = text[: self._shared(text[:first], whole)]
        start, stop = self._start(render, messages, number, turn, text[:first], head), len(whole) - len(rest)
        return None if start is None or whole[start:stop].strip() in ("", tail[:end].strip()) else (start, stop)

    def find(self, render: Render, messages: Sequence[Message], number: int, whole: str, where: str) -> Span:
        """Returns the characters of `whole` that turn `number` is.

        Raises:
            BadRowError: they cannot be told from the rest, or the template writes nothing of the turn.
        """
        turn = Marked.from_message(messages[number], mark_of(whole))
        text = render([*messages[:number], turn.message, *messages[number + 1 :]], False)
        turn.check_traces(text, where)
        if span := self._place(render, messages, number, whole, text, turn):
            return span
        raise BadRowError(
            f"{where}: what the assistant said cannot be told from the rest of the rendering. Put {{% generation %}} … "
            "{% endgeneration %} around the assistant's text in the template, or give the turn a row of its own "
            "(prompt and completion).",
            "turn that cannot be told from the rest",
        )


def _rendered(render: Render, prompt: bool, messages: Sequence[Message]) -> str | None:
    """Returns a conversation rendered, or None where the template refuses it or writes nothing."""
    try:
        return render(messages, prompt) or None
    except BadRowError:
        return None


def _floor(render: Render, messages: Sequence[Message], number: int, turn: Marked, first: int) -> int:
    """Returns a place behind the text of the message before the turn, whose first mark stands at `first`, or 0."""
    if not number:
        return 0
    previous = Marked.from_message(messages[number - 1], mark_of("".join(turn.meanings)))
    both = [*messages[: number - 1], previous.message, turn.message, *messages[number + 1 :]]
    text = _rendered(render, False, both) or ""
    if not any(mark in text for mark in previous.meanings):
        return 0
    between = turn.places(text)[0] - previous.places(text)[1]
    return first - between if 0 <= between <= first else 0


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest number up to `limit` for which `holds`, which holds for all smaller ones, or 0."""
    return bisect_left(range(1, limit + 1), True, key=lambda size: not holds(size))
