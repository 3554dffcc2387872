"""The Jinja environment that chat templates are written for, as transformers sets it up.

Templates come from strangers: they run in Jinja's immutable sandbox and see nothing but plain data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

GENERATION_BEGIN = "\ufdd0"
GENERATION_END = "\ufdd1"
"""Noncharacters, which no text interchanges: they enclose what a template marks as generated."""


class GenerationMarks(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what the assistant writes. Marked only when `marking` is true."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.marking = False

    def parse(self, parser: Parser) -> nodes.Node:
        """Reads the block into a call that may enclose its output."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Macro) -> str:
        text = str(caller())
        return f"{GENERATION_BEGIN}{text}{GENERATION_END}" if self.marking else text


def compile_template(text: str, strftime_now: Callable[[str], str]) -> tuple[jinja2.Template, GenerationMarks]:
    """Compiles a chat template.

    Raises:
        jinja2.TemplateSyntaxError: the text is no Jinja template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    marks = next(found for found in environment.extensions.values() if isinstance(found, GenerationMarks))
    return environment.from_string(text), marks


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which models have never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
