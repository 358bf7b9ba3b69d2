"""Chat templates: messages to text, and which characters of it have loss.

Templates come with model folders and are not trusted: they run in jinja2's immutable sandbox, with limits on the size
of what they make. They see what transformers gives them: messages, tools, add_generation_prompt, the special tokens,
raise_exception, strftime_now, tojson, `{% generation %}`, break and continue.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import numpy as np
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment, SecurityError

from megatune.data.formats import RowError
from megatune.data.tokenizer import Tokenizer
from megatune.errors import ConfigError

MAX_OUTPUT = (
    16 * 2**20
)  # characters of one rendered conversation, and of any text a template makes on the way
_MAX_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{6,}|\*")
_MARKERS = (
    "data.chat_template to a template that puts {% generation %} and {% endgeneration %} around what the assistant "
    "says"
)

Span = tuple[int, int]  # characters [start, end)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what is inside was said by the assistant.

    The block's text is put between two marks that no message can contain; they are taken out after rendering. So a
    block may also be captured with `{% set %}` or stand in a macro.
    """

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        nonce = secrets.token_hex(8)
        environment.extend(
            generation_marks=(f"\ue000{nonce}\ue001", f"\ue002{nonce}\ue003"), generation_found=False
        )

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.environment.generation_found = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        start, end = self.environment.generation_marks
        return f"{start}{caller()}{end}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox lets a template multiply itself out of memory; this one stops the operators that do so. A
    guard against accidents and cheap tricks, not against everything: `~` and some filters can still make large texts,
    which only the limit on the output catches."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            size = len(left) + len(right)
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(times, int):
                    size = len(sequence) * times
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError("a number is too large")
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("a format with such a width is too large")
        if size > MAX_OUTPUT:
            raise SecurityError(f"an expression makes a value of {size} items")
        return super().call_binop(context, operator, left, right)


class _RangeBudget:
    """`range` for one rendering: all ranges together stay under jinja2's limit for one, so that nesting is no way
    around it."""

    def __init__(self) -> None:
        self.left = MAX_RANGE

    def __call__(self, *args: int) -> range:
        numbers = range(*args)
        self.left -= len(numbers)
        if self.left < 0:
            raise SecurityError(f"the template loops over ranges of more than {MAX_RANGE} numbers")
        return numbers


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: jinja2's own would escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """A compiled template. `name`: where it comes from, for errors. `variables`: special tokens by name. `today`:
    what strftime_now tells, fixed for all rows of a data set. `marked`: has `{% generation %}` blocks. `digest`:
    changes with the source and the variables. ConfigError for a syntax error."""

    def __init__(self, source: str, name: str, variables: dict[str, str], today: datetime | None = None):
        self.source, self.name, self.variables = source, name, variables
        self.today = today or datetime.now()
        self.digest = hashlib.sha256(json.dumps([source, variables], sort_keys=True).encode()).hexdigest()
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.pop("lipsum", None)  # makes texts of any length
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self.today.strftime
        start, end = environment.generation_marks
        self._marks = re.compile(f"({start}|{end})")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template {name}, line {error.lineno}: {error.message}; mend it or set data.chat_template"
            ) from error
        self.marked: bool = environment.generation_found

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: list[Any] | None = None, prompt: bool = False
    ) -> str:
        """Text of the conversation; `prompt`: with the opening of the assistant's next turn. RowError (kind
        "template") with the template's own message where it raises."""
        return self._marks.sub("", self._render(messages, tools, prompt))

    def render_marked(
        self, messages: Sequence[dict[str, Any]], *, tools: list[Any] | None
    ) -> tuple[str, list[Span]]:
        """Text, and the spans inside `{% generation %}` blocks."""
        text, spans, opened = "", [], []
        for i, piece in enumerate(self._marks.split(self._render(messages, tools, False))):
            if i % 2 == 0:
                text += piece
            elif piece.startswith("\ue000"):
                opened.append(len(text))
            else:
                start = opened.pop()
                if not opened:  # of nested blocks the outer one counts
                    spans.append((start, len(text)))
        return text, spans

    def _render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                tools=tools,
                add_generation_prompt=prompt,
                range=_RangeBudget(),
                **self.variables,
            ):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise SecurityError(f"the text is longer than {MAX_OUTPUT} characters")
                pieces.append(piece)
        except Exception as error:  # the template is foreign code: whatever it raises is about this row
            message = " ".join(str(error).split())[:300] or type(error).__name__
            raise RowError("template", f"chat template {self.name} refuses the row: {message}") from error
        return "".join(pieces)


def read_template(path: str | Path) -> str:
    """Source of a template file. ConfigError where it cannot be read."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {path} cannot be read ({error})") from error


def load_template(
    tokenizer: Tokenizer, path: str | Path | None = None, today: datetime | None = None
) -> ChatTemplate:
    """The template in a file, or the tokenizer's own. ConfigError where there is none."""
    if path is not None:
        return ChatTemplate(read_template(path), str(path), tokenizer.special_tokens, today)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in {tokenizer.folder} has no chat template: set data.chat_template to a Jinja file"
        )
    return ChatTemplate(tokenizer.chat_template, f"of {tokenizer.folder}", tokenizer.special_tokens, today)


def encode_prompt(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> list[int]:
    """Token ids of a conversation with the opening of the assistant's answer: what a model continues."""
    template = template or load_template(tokenizer)
    return tokenizer.encode(template.render(messages, prompt=True))


def encode_chat(
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    train_on: str = "assistant",
    template: ChatTemplate | None = None,
    tools: list[Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether it is learnt.

    `messages`: role, content, ...; a `weight` of 0 takes an assistant turn out. `train_on`: "assistant", "last" or
    "all". RowError where the template refuses the row or its turns cannot be told apart.
    """
    template = template or load_template(tokenizer)
    weights = [int(message.get("weight", 1)) for message in messages]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text, spans = chat_spans(template, plain, weights, tools, train_on, tokenizer.special_texts)
    encoded = tokenizer.encode_batch([text])[0]
    return encoded.ids, token_mask(encoded.starts, spans).tolist()


def token_mask(starts: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
    """bool [tokens]: True for tokens that begin inside a span. (A token that begins before it holds characters of the
    prompt: the model is never asked to write it.)"""
    first = np.asarray(starts, dtype=np.int64)
    mask = np.zeros(len(first), dtype=bool)
    for begin, end in spans:
        mask |= (begin <= first) & (first < end)
    return mask


def chat_spans(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    weights: Sequence[int],
    tools: list[Any] | None,
    train_on: str,
    special_texts: frozenset[str],
) -> tuple[str, list[Span]]:
    """Text of a conversation and the spans of it that are learnt: what the assistant says, with the token that ends
    its turn, without white space after that token.

    What follows the last learnt turn is left out: nothing is learnt from it. RowError where there is no assistant
    turn or no way to tell the turns apart.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RowError("no_assistant", "no assistant turn: nothing to learn from")
    if train_on == "all":
        text = template.render(messages, tools=tools)
        return text, [(0, len(text))]
    learnt = [i for i in (turns[-1:] if train_on == "last" else turns) if weights[i]]
    if not learnt:
        return template.render(messages, tools=tools), []
    if template.marked:
        return _marked_spans(template, messages, tools, turns, learnt)
    return _difference_spans(template, messages, tools, learnt, special_texts)


def _marked_spans(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    turns: list[int],
    learnt: list[int],
) -> tuple[str, list[Span]]:
    text, spans = template.render_marked(messages, tools=tools)
    if len(learnt) == len(turns):
        return text, spans
    if len(spans) != len(turns):
        raise RowError(
            "template",
            f"chat template {template.name} marks {len(spans)} stretches for {len(turns)} assistant turns, so that "
            "single turns cannot be chosen; use data.train_on: assistant and no weights of 0",
        )
    return text, [span for turn, span in zip(turns, spans, strict=True) if turn in learnt]


def _difference_spans(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    learnt: list[int],
    special_texts: frozenset[str],
) -> tuple[str, list[Span]]:
    """A turn is what the text gains between the conversation before it, with the answer's opening, and after it.

    Right where each of these texts is the beginning of the whole text; a template that writes earlier turns in
    another way once they are past (Qwen3 drops their thoughts) is refused.
    """
    if learnt[0] == 0:
        raise RowError(
            "no_prompt",
            "the conversation begins with what the assistant says; put a message before it or give it weight 0",
        )
    text = template.render(messages[: learnt[-1] + 1], tools=tools)
    spans = []
    for turn in learnt:
        before = template.render(messages[:turn], tools=tools, prompt=True)
        after = text if turn == learnt[-1] else template.render(messages[: turn + 1], tools=tools)
        if not text.startswith(after):
            raise RowError(
                "template_prefix",
                f"chat template {template.name} writes message {turn + 1} in another way once others follow it, so "
                f"its tokens are not what the model would say at that point; set data.train_on: last, or {_MARKERS}",
            )
        if not after.startswith(before):
            raise RowError(
                "template_prefix",
                f"chat template {template.name} opens the answer of message {turn + 1} with text that is not in the "
                f"answer itself; set {_MARKERS}",
            )
        spans.append((len(before), len(before) + len(_without_tail(after[len(before) :], special_texts))))
    return text, spans


def _without_tail(answer: str, special_texts: frozenset[str]) -> str:
    """White space after the token that ends the turn is the template's, not the model's."""
    stripped = answer.rstrip()
    return stripped if any(stripped.endswith(token) for token in special_texts) else answer
