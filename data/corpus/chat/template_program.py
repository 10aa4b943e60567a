"""A chat template as a program: compiled in its sandbox, with what transformers gives to templates.

These are the filter `tojson`, `raise_exception`, the blocks `{% generation %}` and, for templates that cannot do
without, `strftime_now`, which tells a date that stays the same from one day to the next.
"""

import json
from datetime import date
from typing import Any, NoReturn, cast

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Macro

from data.corpus.chat.assistant_turns import Span
from data.corpus.chat.template_sandbox import BoundedEnvironment

# Around what a generation block writes; Unicode keeps them for a program's own use, no text has them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
DATE = date(2024, 7, 26)  # what Llama 3.1 takes for today where nobody tells it


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: its text between `OPEN` and `CLOSE`."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns a call of `_mark` with the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _NotJson(StrictUndefined):
    """A value that JSON does not have, such as a time out of Parquet: it does no harm until a template reads it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _refuse(value: Any) -> NoReturn:
    raise TypeError(
        str(value)
        if isinstance(value, _NotJson)
        else f"a value of type {type(value).__name__} cannot be written as JSON"
    )


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Returns JSON as transformers has it: jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, default=_refuse, **options)


def plain(value: Any, name: str) -> Any:
    """Returns the value with `_NotJson` in the place of what JSON does not have; `name` is its key's."""
    if isinstance(value, dict):
        return {str(key): plain(item, str(key)) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [plain(item, name) for item in cast(list[Any], value)]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return _NotJson(f"{name!r} is a {type(value).__name__}, which is neither text nor JSON")


def without_marks(text: str) -> tuple[str, list[Span]]:
    """Returns the text without marks, and the spans that they stood around."""
    parts: list[str] = []
    spans: list[Span] = []
    at = begun = 0
    for piece in text.replace(CLOSE, OPEN + CLOSE).split(OPEN):
        if piece.startswith(CLOSE):
            spans.append((begun, at))
        begun = at
        parts.append(piece.removeprefix(CLOSE))
        at += len(parts[-1])
    return "".join(parts), spans


def _asks_for_the_date(tree: nodes.Template) -> bool:
    """Checks for a call of `strftime_now` in a template that has no default for where there is none."""
    calls = (call.node for call in tree.find_all(nodes.Call))
    tests = (test.node for test in tree.find_all(nodes.Test) if test.name == "defined")
    called, tested = (
        [n for n in found if isinstance(n, nodes.Name) and n.name == "strftime_now"] for found in (calls, tests)
    )
    return bool(called) and not tested


def compile_template(source: str) -> tuple[Template, bool]:
    """Returns the template, and whether it has generation blocks.

    Raises:
        TemplateError: it is no template, as jinja2 says it; and whatever else its parser raises.
    """
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
    environment.filters["tojson"] = _to_json
    names = cast(dict[str, Any], environment.globals)
    names["raise_exception"] = _raise_exception
    tree = environment.parse(source)
    if _asks_for_the_date(tree):
        names["strftime_now"] = DATE.strftime
    has_blocks = any(isinstance(call.node, nodes.ExtensionAttribute) for call in tree.find_all(nodes.Call))
    return environment.from_string(source), has_blocks
