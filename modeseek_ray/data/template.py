"""Chat templates: text as transformers renders it, and where in it the assistant speaks.

The environment is transformers' own (`apply_chat_template`): jinja2's immutable sandbox, loop
controls, `tojson`, `raise_exception`, `strftime_now`, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modeseek_ray.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end)

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template may raise on rows it was not written for.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: remembers where the assistant's text lies."""

    tags = {"generation"}  # noqa: RUF012  jinja's own way to say it
    blocks: list[str] | None = None
    spans: list[Span]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: jinja2.runtime.Macro) -> str:
        text = caller()
        if self.blocks is not None:
            start = sum(map(len, self.blocks))
            self.spans.append((start, start + len(text)))
        return text


class ChatTemplate:
    """A compiled chat template.

    `special_tokens` are the texts of the tokenizer's special tokens (a turn ends with one of them),
    `variables` what the template may refer to besides the messages (`bos_token`, …). Raises
    jinja2.TemplateSyntaxError.

    >>> source = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    >>> messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    >>> text, spans = ChatTemplate(source, special_tokens=["<end>"]).locate(messages)
    >>> [text[start:end] for start, end in spans]
    ['yes<end>']
    """

    def __init__(
        self, source: str, special_tokens: Sequence[str] = (), variables: Mapping[str, Any] | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self.has_generation_blocks = _GENERATION_TAG.search(source) is not None
        self._generation = cast(_GenerationBlocks, environment.extensions[_GenerationBlocks.identifier])
        self._template = environment.from_string(source)
        self._variables = dict(variables or {})
        alternatives = "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True) if t)
        self._end_of_turn = re.compile(rf"\s*(?:{alternatives})") if alternatives else None
        self._generation_prompt = self._find_generation_prompt()

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises DataError if the template refuses it."""
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _TEMPLATE_FAILURES as error:
            raise DataError(
                f"the model's chat template refuses these messages: {error}.",
                mend="Mend the order and the fields of the messages.",
                code="refused_by_template",
            ) from None

    def locate(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """The text, and for each assistant message the characters the model has to write.

        That is what follows the generation prompt, up to and including the end-of-turn token.
        Templates with `{% generation %}` blocks say it themselves. For others three ways are tried,
        each accepted only where it is certain: look for the generation prompt; render a second time
        with marks around the contents; render the conversation up to each message. Raises DataError
        where none works.
        """
        if self.has_generation_blocks:
            return self._locate_blocks(messages, tools)
        text = self.render(messages, tools=tools)
        spans = self._locate_prompts(messages, text)
        if spans is None:
            spans = self._locate_marks(messages, tools, text)
        return text, spans if spans is not None else self._locate_prefixes(messages, tools, text)

    def _locate_prompts(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        """The usual case: each answer stands between a generation prompt and its turn's end, no prompt elsewhere."""
        answers = [m.get("content") for m in messages if m["role"] == "assistant"]
        prompt = self._generation_prompt
        if not prompt or text.count(prompt) != len(answers):
            return None
        spans, end = [], 0
        for answer in answers:
            start = text.index(prompt, end) + len(prompt)
            if not isinstance(answer, str) or not answer or not text.startswith(answer, start):
                return None
            end = self._turn_end(text, start + len(answer))
            if end == start + len(answer):  # the answer "<" also begins a template's own "<think>"
                return None
            spans.append((start, end))
        return spans

    def _locate_blocks(self, messages: Sequence[Message], tools: Any) -> tuple[str, list[Span]]:
        blocks: list[str] = []
        self._generation.blocks, self._generation.spans = blocks, []
        try:
            stream = self._template.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self._variables
            )
            for block in stream:  # one at a time: a span starts at the length of what came before it
                blocks += [block]
        except _TEMPLATE_FAILURES as error:
            raise DataError(
                f"the model's chat template refuses these messages: {error}.",
                mend="Mend the order and the fields of the messages.",
                code="refused_by_template",
            ) from None
        finally:
            self._generation.blocks = None
        spans = self._generation.spans
        num_assistant = sum(m["role"] == "assistant" for m in messages)
        if len(spans) != num_assistant:
            raise DataError(
                f"the chat template marks {len(spans)} parts of {num_assistant} assistant messages.",
                mend="Use one {% generation %} block per assistant message.",
                code="refused_by_template",
            )
        return "".join(blocks), spans

    def _locate_marks(self, messages: Sequence[Message], tools: Any, text: str) -> list[Span] | None:
        """Spans of the assistants' contents, or None where marks would change the rendering."""
        num_assistant = sum(m["role"] == "assistant" for m in messages)
        private_use = (chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in text)
        before, after = next(private_use), next(private_use)
        for strip in (False, True):  # some templates trim contents
            marked = self._render_marked(messages, tools, strip, before, after)
            if marked is None or marked.replace(before, "").replace(after, "") != text:
                continue
            starts = [at - 2 * i for i, at in enumerate(_positions(marked, before))]
            ends = [at - 2 * i - 1 for i, at in enumerate(_positions(marked, after))]
            if not len(starts) == len(ends) == num_assistant:
                continue  # a template that drops or repeats contents
            spans: list[Span] = []
            for start, end in zip(starts, ends, strict=True):
                previous_end = spans[-1][1] if spans else 0
                spans.append((self._turn_start(text, previous_end, start), self._turn_end(text, end)))
            return spans
        return None

    def _render_marked(
        self, messages: Sequence[Message], tools: Any, strip: bool, before: str, after: str
    ) -> str | None:
        marked = []
        for message in messages:
            content = message.get("content")
            if message["role"] == "assistant":
                if not isinstance(content, str):
                    return None
                content = f"{before}{content.strip() if strip else content}{after}"
                message = {**message, "content": content}
            marked.append(message)
        try:
            return self.render(marked, tools=tools)
        except DataError:
            return None

    def _locate_prefixes(self, messages: Sequence[Message], tools: Any, text: str) -> list[Span]:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], tools=tools, add_generation_prompt=True)
            after = self.render(messages[: i + 1], tools=tools)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"the text of messages[{i}] cannot be found in what the chat template renders.",
                    mend="Put {% generation %} blocks into the template, or simplify the message.",
                    code="refused_by_template",
                )
            # the last special token of the turn ends it; what follows (a line break) is the template's
            end = len(after.rstrip()) if self._end_of_turn else len(after)
            spans.append((len(before), end))
        return spans

    def _turn_start(self, text: str, previous_end: int, content_start: int) -> int:
        """Right after the generation prompt: what a template writes before the content is generated, too."""
        if not self._generation_prompt:
            return content_start
        found = text.rfind(self._generation_prompt, previous_end, content_start)
        return content_start if found < 0 else found + len(self._generation_prompt)

    def _turn_end(self, text: str, content_end: int) -> int:
        match = self._end_of_turn.match(text, content_end) if self._end_of_turn else None
        return match.end() if match else content_end

    def _find_generation_prompt(self) -> str:
        probe = [{"role": "user", "content": "hello"}]
        try:
            without = self.render(probe)
            with_prompt = self.render(probe, add_generation_prompt=True)
        except DataError:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""


def _positions(text: str, mark: str) -> list[int]:
    return [i for i, character in enumerate(text) if character == mark]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like transformers' filter: jinja's own escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
