"""Compilation of a chat template in its sandbox, with the names that transformers gives to templates.

These are the filter `tojson`, `raise_exception` and the blocks `{% generation %}`. Templates that need it also get
`strftime_now`, which always returns the same date, so that a cache does not change from one day to the next.
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

# Marks around the output of a generation block. Unicode reserves them for internal use, so no text has them.
BLOCK_OPEN, BLOCK_CLOSE = "\ufdd0", "\ufdd1"
DATE = date(2024, 7, 26)  # the default date of Llama 3.1


class _GenerationBlock(Extension):
    """The block `{% generation %}` … `{% endgeneration %}`, which writes its text between `OPEN` and `BLOCK_CLOSE`."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parses the block into a call of `_mark` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{BLOCK_OPEN}{caller()}{BLOCK_CLOSE}"


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _NotJson(StrictUndefined):
    """A value without a form in JSON, such as a time out of Parquet. It raises only once a template reads it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _refuse_value(value: Any) -> NoReturn:
    raise TypeError(
        str(value)
        if isinstance(value, _NotJson)
        else f"a value of type {type(value).__name__} cannot be written as JSON"
    )


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Returns JSON as transformers writes it. The filter of jinja2 would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, default=_refuse_value, **options)


def json_values(value: Any, name: str) -> Any:
    """Replaces values without a form in JSON by `_NotJson`, also in nested lists and objects.

    Args:
        name: the key of the value, for the error message.
    """
    if isinstance(value, dict):
        return {str(key): json_values(item, str(key)) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [json_values(item, name) for item in cast(list[Any], value)]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return _NotJson(f"{name!r} is a {type(value).__name__}, which is neither text nor JSON")


def strip_marks(text: str) -> tuple[str, list[Span]]:
    """Returns the text without marks, and the spans that were between them."""
    parts: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for piece in text.replace(BLOCK_CLOSE, BLOCK_OPEN + BLOCK_CLOSE).split(BLOCK_OPEN):
        if piece.startswith(BLOCK_CLOSE):
            spans.append((start, length))
        start = length
        parts.append(piece.removeprefix(BLOCK_CLOSE))
        length += len(parts[-1])
    return "".join(parts), spans


def _needs_date(tree: nodes.Template) -> bool:
    """Returns True where a template calls `strftime_now` without a test that it is defined."""
    calls = (call.node for call in tree.find_all(nodes.Call))
    tests = (test.node for test in tree.find_all(nodes.Test) if test.name == "defined")
    called, tested = (
        [n for n in named_nodes if isinstance(n, nodes.Name) and n.name == "strftime_now"]
        for named_nodes in (calls, tests)
    )
    return bool(called) and not tested


def compile_template(source: str) -> tuple[Template, bool]:
    """Returns the compiled template, and whether it has generation blocks.

    Raises:
        TemplateError: it is not a template. The parser of jinja2 may raise other errors too.
    """
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControls])
    environment.filters["tojson"] = _to_json
    names = cast(dict[str, Any], environment.globals)
    names["raise_exception"] = _raise_exception
    tree = environment.parse(source)
    if _needs_date(tree):
        names["strftime_now"] = DATE.strftime
    has_blocks = any(isinstance(call.node, nodes.ExtensionAttribute) for call in tree.find_all(nodes.Call))
    return environment.from_string(source), has_blocks
