"""Where an assistant's turn stands in the rendering of its whole conversation.

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

from data.export.chat import Message
from data.export.rows import BadRowError

Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]
ANOTHER: Message = {"role": "user", "content": "And then?"}


def mark_of(text: str) -> str:
    """Returns letters and digits that the text does not hold, and that no template takes for anything."""
    return f"q{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:20]}q"


def marked(message: Message, mark: str) -> Message:
    """Returns the message with `mark` in the place of its content and, numbered, of the functions that it calls."""
    found = dict(message)
    if isinstance(content := message.get("content"), str) and content.strip():
        found["content"] = mark
    elif isinstance(content, list):
        found["content"] = [{**part, "text": mark} for part in content]
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_marked_call(call, f"{mark}{i}q") for i, call in enumerate(calls)]
    return found


def _marked_call(call: Message, mark: str) -> Message:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": {**function, "name": mark}}
    return {**call, "name": mark}


def check_traces(message: Message, text: str, mark: str, where: str) -> None:
    """Checks that the rendering `text` of a marked message holds its calls, or its content where it has none.

    Raises:
        BadRowError: it does not, so that a student would learn to say nothing.
    """
    calls = [f"{mark}{i}q" for i in range(len(message.get("tool_calls", ())))]
    if all(each in text for each in calls or [mark]):
        return
    what = "tool call" if calls else "turn"
    raise BadRowError(
        f"{where}: the chat template writes nothing of this {what}, and a student would learn to say nothing there. "
        "Use a template that writes it, write it into 'content', or drop the row.",
        f"{what} that the template does not write",
    )


class TurnFinder:
    """Finds turns in renderings; `tokens` are the special tokens of the tokenizer, which are never divided."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(token for token in tokens if token)
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.longest = len(longest_first[0]) if longest_first else 0

    def _whole_tokens(self, text: str, at: int) -> int:
        """Returns the place `at`, or the beginning of the special token that it lies within."""
        for found in self.token.finditer(text, max(0, at - self.longest), at + self.longest):
            if found.start() < at < found.end():
                return found.start()
        return at

    def _shared(self, one: str, other: str) -> int:
        """Returns how many characters two texts begin with in common, in whole tokens."""
        at = _most(min(len(one), len(other)), lambda size: one[:size] == other[:size])
        return min(self._whole_tokens(one, at), self._whole_tokens(other, at))

    def _start(self, head: str, plain: str, prompt: str, floor: int) -> int | None:
        """Returns where in `head`, the text before the mark, the prompt for generation ends."""
        if prompt and head.startswith(prompt):
            return len(prompt)
        shared = self._shared(plain, prompt)
        known = _longest_suffix(prompt, head, floor)
        if known >= max(1, len(prompt) - shared):
            return head.rfind(prompt[-known:], floor) + known
        # The prompt goes on where this turn does not, as with a prompt that opens the reasoning.
        known = _longest_suffix(prompt[:shared], head, floor)
        if not known:
            return None
        at = head.rfind(prompt[shared - known : shared], floor) + known
        return at + self._shared(head[at:], prompt[shared:]) if head[at:] else None

    def _end(self, tail: str, other: str) -> int:
        """Returns where in `tail`, the text behind the mark, the turn ends: behind its end-of-turn token."""
        end = self._shared(tail, other)
        bare = tail[:end].rstrip()
        if bare.endswith(self.tokens):
            return len(bare)
        if (token := self.token.match(tail, end)) and self.token.match(other, end):
            return token.end()  # one token ends a turn within a conversation, another the last one
        return end

    def find(
        self, render: Render, messages: Sequence[Message], number: int, whole: str, floor: int, where: str
    ) -> Span:
        """Returns the characters of `whole` that turn `number` is; none lies before `floor`.

        Raises:
            BadRowError: they cannot be told from the rest, or the template writes nothing of the turn.
        """
        mark, before = mark_of(whole), messages[:number]
        turn = marked(messages[number], mark)
        text = render([*before, turn, *messages[number + 1 :]], False)
        check_traces(messages[number], text, mark, where)
        prompts = _first(render, before, [*before, ANOTHER], prompt=True)
        first, last = text.find(mark), text.rfind(mark) + len(mark)
        start = self._start(text[:first], *prompts, floor) if prompts else None
        tail, follows = text[last:], number + 1 < len(messages)
        others = _first(render, [*before, turn] if follows else [*before, turn, ANOTHER])
        found, _, other = others[0].rpartition(mark) if others else ("", "", "")
        if not found:
            other = "" if follows else tail
        end = self._end(tail, other)
        behind = len(tail) - end
        stop = len(whole) - behind
        if start is None or not _same_around(whole, text, start, behind) or not floor <= start < stop:
            raise BadRowError(
                f"{where}: what the assistant said cannot be told from the rest of the rendering. Put "
                "{% generation %} … {% endgeneration %} around the assistant's text in the template, or give the turn "
                "a row of its own (prompt and completion).",
                "turn that cannot be told from the rest",
            )
        if whole[start:stop].strip() == tail[:end].strip():
            check_traces(messages[number], "", mark, where)
        return start, stop


def _first(render: Render, *tries: Sequence[Message], prompt: bool = False) -> tuple[str, ...] | None:
    """Returns the first of some conversations that the template takes, rendered; with a prompt, both ways."""
    for messages in tries:
        try:
            texts = tuple(render(messages, each) for each in ((False, True) if prompt else (False,)))
        except BadRowError:
            continue
        if texts[-1]:
            return texts
    return None


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest number up to `limit` for which `holds`, which holds for all smaller ones, or 0."""
    return bisect_left(range(1, limit + 1), True, key=lambda size: not holds(size))


def _longest_suffix(text: str, within: str, floor: int) -> int:
    """Returns the length of the longest end of `text` that `within` holds from `floor` on."""
    return _most(len(text), lambda size: within.find(text[-size:], floor) >= 0)


def _same_around(one: str, other: str, start: int, behind: int) -> bool:
    """Checks that two texts agree before `start`, and in their last `behind` characters."""
    return one[:start] == other[:start] and one[len(one) - behind :] == other[len(other) - behind :]
