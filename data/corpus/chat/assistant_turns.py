"""The location of an assistant's turn in the rendering of its whole conversation.

Templates write a turn in another way once more messages follow. They drop its reasoning, put tools beside the last
question, or close the conversation with a token of its own. So a turn is located by comparing four renderings:

    whole    …<user>go<end><assistant>The owl.<end><user>…
    marked   …<user>go<end><assistant>q9d4…<end><user>…     its text and the names of its calls are replaced by marks
    prompt   …<user>go<end><assistant>                      the messages before it, with the prompt for generation
    other    …<user>go<end><assistant>q9d4…<end>            nothing follows (or, behind a last turn, one more message)

The turn begins where `prompt` ends, searched for backwards from the first mark of `marked`. It ends where the texts
behind the marks of `marked` and `other` stop being the same: from there on the text belongs to another message. Both
places must be the same in `whole`, the start counted from its beginning and the end from its end.
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
NEXT_QUESTION: Message = {"role": "user", "content": "And then?"}


def make_mark(text: str) -> str:
    """Returns letters and digits that are not in the text, and that have no meaning to any template."""
    return f"q{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:20]}"


def _named_object(call: Message) -> tuple[Message, str]:
    """Returns the object within a call that holds its name, and the name."""
    function = call["function"] if isinstance(call.get("function"), dict) else call
    return function, str(function.get("name", ""))


class MarkedMessage(NamedTuple):
    """A message whose content and called names are replaced by marks.

    `meanings` maps each mark to the text that it replaces.
    """

    message: Message
    meanings: dict[str, str]

    @classmethod
    def from_message(cls, message: Message, mark: str) -> "MarkedMessage":
        """Replaces a message's content and called names.

        Args:
            mark: what each mark begins with. It must not be in the conversation.
        """
        marked, content = dict(message), message.get("content")
        meanings = {}
        if isinstance(content, str) and content.strip():
            marked["content"], meanings[f"{mark}cq"] = f"{mark}cq", content
        elif isinstance(content, list):
            marked["content"] = [{**part, "text": f"{mark}cq"} for part in content]
            meanings[f"{mark}cq"] = ""
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = []
            for i, call in enumerate(calls):
                function, meanings[f"{mark}{i}q"] = _named_object(call)
                named = {**function, "name": f"{mark}{i}q"}
                marked["tool_calls"].append(named if function is call else {**call, "function": named})
        return cls(marked, meanings)

    def check_traces(self, text: str, where: str) -> None:
        """Checks that a rendering `text` has the marks of all calls, or of the content where there are no calls.

        Raises:
            BadRowError: one is missing, so that a student would learn to write nothing there.
        """
        calls = [mark for mark in self.meanings if not mark.endswith("cq")]
        if all(mark in text for mark in calls or self.meanings):
            return
        kind = "tool call" if calls else "turn"
        raise BadRowError(
            f"{where}: the chat template writes nothing of this {kind}, so a student would learn to say nothing "
            "there. Use a template that writes it, write it into 'content', or drop the row.",
            f"{kind} that the template does not write",
        )

    def mark_range(self, text: str) -> tuple[int, int]:
        """Returns where the first mark begins in a rendering, and where the last ends. Repeated marks do not count."""
        positions = [(text.find(mark), len(mark)) for mark in self.meanings if mark in text]
        return min(positions)[0], sum(max(positions))

    def restore(self, text: str) -> str:
        """Returns a rendering with the original texts in the place of the marks.

        Marks may also be behind the turn, since some templates repeat a call's name beside its result.
        """
        for mark, meaning in self.meanings.items():
            text = text.replace(mark, meaning)
        return text


class TurnFinder:
    """Locates turns in renderings.

    Args:
        tokens: the tokenizer's special tokens, which are never divided.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(sorted(filter(None, tokens), key=len, reverse=True))
        self.token_pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        # Where a line or a special token ends.
        self.edge_pattern = re.compile(f"\n|{self.token_pattern.pattern}")

    def _common_prefix(self, one: str, other: str) -> int:
        """Returns the length of the common prefix of two texts, without a part of a special token."""
        length = _largest(min(len(one), len(other)), lambda size: one[:size] == other[:size])
        longest = len(self.tokens[0]) if self.tokens else 0
        for text in (one, other):
            for token in self.token_pattern.finditer(text, max(0, length - longest), length + longest):
                length = token.start() if token.start() < length < token.end() else length
        return length

    def _start(
        self, render: Render, messages: Sequence[Message], number: int, turn: MarkedMessage, before: str, prefix: str
    ) -> int | None:
        """Returns where the prompt for generation of a turn ends, or None where it cannot be located.

        Args:
            before: the text before the turn's first mark, in the rendering with the turn marked.
            prefix: the part of it that begins the whole rendering too. The result is an index into it.
        """
        # Render the prompt: the messages before the turn. Templates may refuse them without a question at their end.
        history = messages[:number]
        if (prompt := _try_render(render, True, history)) is None:
            history = [*history, NEXT_QUESTION]
            prompt = _try_render(render, True, history) or ""
        # The usual case: the rendering begins with the prompt.
        if prompt and prefix.startswith(prompt):
            return len(prompt)
        # Otherwise earlier messages are written in another way when nothing follows them. Find the longest suffix of
        # the prompt that ends behind the previous message. It must cover the opening of a turn.
        floor = _previous_end(render, messages, number, turn, len(before))
        opening = prompt[self._common_prefix(_try_render(render, False, history) or "", prompt) :]
        matched = _largest(len(prompt), lambda size: prefix.find(prompt[-size:], max(0, floor - size)) >= 0)
        if matched >= max(1, len(opening)):
            return prefix.rfind(prompt[-matched:], max(0, floor - matched)) + matched
        # Or the prompt goes on where this turn does not, such as one that opens the reasoning. Find the longest
        # beginning of the opening, up to the end of a line or of a special token.
        matched = _largest(len(opening), lambda size: prefix.find(opening[:size], floor) >= 0)
        written = opening[: max((edge.end() for edge in self.edge_pattern.finditer(opening[:matched])), default=0)]
        if not written or written in (_try_render(render, False, [NEXT_QUESTION]) or ""):
            return None  # a question opens with it too
        return prefix.rfind(written, floor) + len(written)

    def _end(self, suffix: str, other_suffix: str | None) -> int | None:
        """Returns where the turn ends, behind its end-of-turn token, as an index into `suffix`.

        Args:
            suffix: the text behind the turn's marks.
            other_suffix: the same with other messages behind the turn. Without it, the first special token is the end.
        """
        if other_suffix is None:
            token = self.token_pattern.search(suffix)
            return token.end() if token else None
        end = self._common_prefix(suffix, other_suffix)
        stripped = suffix[:end].rstrip()
        if stripped.endswith(self.tokens):
            return len(stripped)
        if (token := self.token_pattern.match(suffix, end)) and self.token_pattern.match(other_suffix, end):
            return token.end()  # one token ends a turn within a conversation, another the last turn
        return end

    def _locate(
        self, render: Render, messages: Sequence[Message], number: int, whole: str, marked: str, turn: MarkedMessage
    ) -> Span | None:
        """Returns the characters of `whole` that a turn takes, or None where they cannot be told apart from the rest.

        Args:
            marked: the rendering with the turn marked.
        """
        first, last = turn.mark_range(marked)
        suffix, later = marked[last:], messages[number + 1 :]
        # Render the turn with other messages behind it: none, or one more behind a last turn.
        history = [*messages[:number], turn.message]
        other = _try_render(render, False, history if later else [*history, NEXT_QUESTION])
        if later and marked[first:last] not in (other or _try_render(render, False, [*history, NEXT_QUESTION]) or ""):
            return None  # the text between the marks depends on the messages behind the turn
        # The turn ends where the two renderings part. From there on `marked` must end as `whole` does.
        _, marks, other_suffix = (other or "").partition(marked[first:last])
        end = self._end(suffix, other_suffix if marks else None)
        if end is None or not whole.endswith(rest := turn.restore(suffix[end:])):
            return None
        # The turn starts within their common prefix. A span with nothing but the text behind the marks has no content.
        prefix = marked[: self._common_prefix(marked[:first], whole)]
        start, stop = self._start(render, messages, number, turn, marked[:first], prefix), len(whole) - len(rest)
        return None if start is None or whole[start:stop].strip() in ("", suffix[:end].strip()) else (start, stop)

    def find(self, render: Render, messages: Sequence[Message], number: int, whole: str, where: str) -> Span:
        """Returns the characters of `whole` that the turn `messages[number]` takes.

        Raises:
            BadRowError: they cannot be told apart from the rest, or the template writes nothing of the turn.
        """
        turn = MarkedMessage.from_message(messages[number], make_mark(whole))
        marked = render([*messages[:number], turn.message, *messages[number + 1 :]], False)
        turn.check_traces(marked, where)
        if span := self._locate(render, messages, number, whole, marked, turn):
            return span
        raise BadRowError(
            f"{where}: what the assistant said cannot be told apart from the rest of the rendering. Put "
            "{% generation %} … {% endgeneration %} around the assistant's text in the template, or give the turn a "
            "row of its own (prompt and completion).",
            "turn that cannot be told apart from the rest",
        )


def _try_render(render: Render, prompt: bool, messages: Sequence[Message]) -> str | None:
    """Renders a conversation. Returns None where the template refuses it or writes nothing."""
    try:
        return render(messages, prompt) or None
    except BadRowError:
        return None


def _previous_end(render: Render, messages: Sequence[Message], number: int, turn: MarkedMessage, first: int) -> int:
    """Returns where the text of the message before a turn ends, or 0 where that is unknown.

    Args:
        first: where the turn's first mark begins, in the rendering with the turn marked.
    """
    if not number:
        return 0
    # Mark both messages: the distance between their marks leads from the turn's first mark back to the message before.
    previous = MarkedMessage.from_message(messages[number - 1], make_mark("".join(turn.meanings)))
    both = [*messages[: number - 1], previous.message, turn.message, *messages[number + 1 :]]
    text = _try_render(render, False, both) or ""
    if not any(mark in text for mark in previous.meanings):
        return 0
    between = turn.mark_range(text)[0] - previous.mark_range(text)[1]
    return first - between if 0 <= between <= first else 0


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest number up to `limit` for which `holds`, or 0. It must hold for all smaller numbers too."""
    return bisect_left(range(1, limit + 1), True, key=lambda size: not holds(size))
