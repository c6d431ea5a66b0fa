"""Conversations as a model's chat template writes them, and which of their characters are the assistant's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from kdfast.text.spec import Naming, python_name
from kdfast.text.specials import read_json, token_text
from kdfast.text.tokenizers import without_post_processor

try:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise ImportError("chat templates need jinja2: pip install 'kdfast[train]'") from error


#: What templates ask for and a conversation does not have.
_ABSENT = {"tools": None, "documents": None}


class Written(NamedTuple):
    """A conversation's text, and from which character to which the assistant speaks."""

    text: str
    spans: list[tuple[int, int]]


class Chat:
    """A chat template.

    Args:
        folder: the model's, with its configuration.
        template: a file to use instead of the folder's chat_template.jinja or the one in its tokenizer_config.json.

    Raises:
        ValueError: there is no template.
    """

    def __init__(self, folder: Path | None, template: str | None = None, name: Naming = python_name) -> None:
        config = read_json(folder, "tokenizer_config.json")
        self._source = _template(folder, config, template, name)
        self._compiled: Any = None
        self._name = name
        # Templates write special tokens by their role ({{ bos_token }}), which tokenizer.json does not know.
        named = {**read_json(folder, "special_tokens_map.json"), **config}
        self._special = {
            role: text for role, token in named.items() if role.endswith("_token") and (text := token_text(token)) is not None
        }

    def write(self, messages: Any, where: str) -> Written:
        """The text of a conversation. A turn is what the template adds between the prompt of that turn and its end.

        Raises:
            ValueError: messages are no list of roles and contents, the template refuses them, or what it writes for the
                first turns changes when more turns follow; begins with `where`.
        """
        messages = _checked(messages, where)
        whole, spans = self._text(messages, False, where), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise ValueError(f"{where}: expected a message before the assistant's first, got none")
            before = self._text(messages[:i], True, where)
            after = self._text(messages[: i + 1], False, where)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"{where}: expected a chat template that keeps what it wrote when message {i} (assistant) and those after"
                    f" it follow, got other text; give one that does with {self._name('chat_template')}, or conversations of"
                    " one turn"
                )
            spans.append((len(before), len(after)))
        return Written(whole, spans)

    def turn_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token that ends an assistant's turn; None where it is followed by text, or there is none."""
        try:
            said = self.write([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], "chat template")
        except ValueError:  # a template that wants more than this says so when it meets a conversation
            return None
        encoding = without_post_processor(tokenizer).encode(said.text[said.spans[0][0] :], add_special_tokens=False)
        known = tokenizer.get_added_tokens_decoder()
        return next((i for i in encoding.ids if i in known), None)

    def _text(self, messages: list[dict[str, Any]], prompt: bool, where: str) -> str:
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._source)
            given = {**_ABSENT, **self._special, "messages": messages, "add_generation_prompt": prompt}
            return str(self._compiled.render(given))
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from None


def learned(ids: list[int], offsets: list[tuple[int, int]], said: Written, special: frozenset[int]) -> list[bool]:
    """For each token whether it is to be learned: whether its first character is the assistant's.

    The blanks that a template writes after the token that ends a turn are the next turn's: no model is asked for them.
    """
    out = [False] * len(ids)
    for first, end in said.spans:
        turn = [t for t, (start, _) in enumerate(offsets) if first <= start < end]
        last = next((n for n in range(len(turn) - 1, -1, -1) if ids[turn[n]] in special), None)
        if last is not None and not said.text[offsets[turn[last]][1] : end].strip():
            turn = turn[: last + 1]
        for t in turn:
            out[t] = True
    return out


class _Generation(Extension):
    """The block {% generation %} around what the assistant says: here its content as it stands."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Any:
    """Jinja as chat templates expect it: blocks leave no blank lines, and a few functions are there."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _template(folder: Path | None, config: dict[str, Any], file: str | None, name: Naming) -> str:
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"{name('chat_template')}: expected a file with a Jinja template, got {file!r}, which is none")
        return Path(file).read_text(encoding="utf-8")
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"teacher: expected chat_template.jinja in {str(folder)!r} or chat_template in its tokenizer_config.json for"
            f" data with messages, found neither; give one with {name('chat_template')} FILE"
        )
    return found


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    right = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not right or not messages:
        raise ValueError(f"{where}: expected a list of messages, each with role and content as text")
    # A dataset gives every message every field; templates ask whether a field is there.
    return [{name: value for name, value in m.items() if value is not None} for m in messages]
