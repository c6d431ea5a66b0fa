"""Conversations as a teacher's chat template writes them, and which of their tokens are the assistant's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdfast.cli.cache_documents import Said

try:
    from jinja2.exceptions import TemplateError
except ImportError as error:
    raise ImportError("chat templates need jinja2: pip install 'kdfast[train]'") from error

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Chat:
    """A chat template beside the tokenizer that its text is for.

    Args:
        folder: the teacher's, with tokenizer.json.
        tokenizer: the same, loaded.
        template: a file to use instead of the folder's chat_template.jinja or the one in its tokenizer_config.json.

    Raises:
        ValueError: there is no template.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, template: str | None = None) -> None:
        config = _json(folder / "tokenizer_config.json")
        self._template = _template(folder, config, template)
        # Templates write special tokens by their role ({{ bos_token }}), which tokenizer.json does not know.
        named = {**_json(folder / "special_tokens_map.json"), **config}
        special = {name: _content(named[name]) for name in _SPECIAL if named.get(name) is not None}
        self._writer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        self._tokenizer = _with_plain_offsets(tokenizer)

    def tokens(self, messages: Any, where: str) -> Said:
        """The tokens of a conversation. A token is the assistant's when the first of its characters is.

        Raises:
            ValueError: messages are no list of roles and contents, the template refuses them, or what it writes for the
                first turns changes when more turns follow; begins with `where`.
        """
        text, spans = self._spans(_checked(messages, where), where)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        said = np.zeros(len(starts), bool)
        for first, end in spans:
            said |= (starts >= first) & (starts < end)
        return Said(encoding.ids, said.tolist())

    def _spans(self, messages: list[dict[str, Any]], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from which character to which the assistant speaks.

        A turn is what the template adds between the prompt of that turn and its end.
        """
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
                    " it follow, got other text; give one that does with --chat-template, or conversations of one turn"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _text(self, messages: list[dict[str, Any]], prompt: bool, where: str) -> str:
        try:
            return str(
                self._writer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from None


def _template(folder: Path, config: dict[str, Any], file: str | None) -> str:
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"--chat-template: expected a file with a Jinja template, got {file!r}, which is none")
        return Path(file).read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"teacher: expected chat_template.jinja in {str(folder)!r} or chat_template in its tokenizer_config.json for"
            " data with messages, found neither; give one with --chat-template FILE"
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


def _with_plain_offsets(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without what it does to finished encodings.

    A post-processor may move a token's first character over its leading blanks, into a span the token does not begin in;
    what else it does, special tokens around the text, is the template's part here.
    """
    whole = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**whole, "post_processor": None}))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"teacher: expected JSON in {str(file)!r}: {error}") from None
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
