"""Which special tokens stand around documents and completions, read from what a model's folder says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from kdfast.text.spec import Naming, TextData, python_name
from kdfast.text.tokenizers import SEPARATOR


class Specials(NamedTuple):
    """Token ids: in front of a document, after a text, after a completion; and all of them that are no text."""

    begin: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    known: frozenset[int] = frozenset()

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The chosen tokens by name, for people."""
        return {
            name: " ".join(str(tokenizer.id_to_token(i)) for i in ids) or None
            for name, ids in (("begin", self.begin), ("separator", self.separator), ("end", self.end))
        }


def surrounded(
    begin: Sequence[int], ids: Sequence[int], end: Sequence[int] = ()
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(begin, ids, end) of a text with special tokens around it: what the text has written there itself is not repeated."""
    n, m = len(begin), len(end)
    begins, ends = n > 0 and list(ids[:n]) == list(begin), m > 0 and list(ids[len(ids) - m :]) == list(end)
    return (() if begins else begin), ids, (() if ends else end)


def special_tokens(
    tokenizer: Tokenizer,
    folder: Path | None,
    data: TextData,
    turn_end: Callable[[], int | None] = lambda: None,
    name: Naming = python_name,
    otherwise: Mapping[str, Any] | None = None,
) -> Specials:
    """The special tokens for documents of `data`.

    With `special_tokens: auto` a document begins and ends as the tokenizer's post-processor makes a text begin and end, unless
    tokenizer_config.json says otherwise (add_bos_token, add_eos_token); a text ends with the tokenizer's eos_token where the
    post-processor adds nothing; a completion ends with what stops the model: of the eos_token_id in generation_config.json
    (else config.json) the one that ends a turn of the chat template, else the first, else the tokenizer's eos_token.

    Args:
        folder: the model's, with tokenizer_config.json, generation_config.json and config.json, as far as they are there.
        turn_end: finds the token that ends an assistant's turn in the chat template.
        otherwise: `eos_token_id` where the folder says none.

    Raises:
        ValueError: a token that is named is not in the tokenizer.
    """
    known = frozenset(tokenizer.get_added_tokens_decoder())
    begin: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    if data.special_tokens == "auto":
        config = read_json(folder, "tokenizer_config.json")
        named = {**read_json(folder, "special_tokens_map.json"), **config}
        begin, after = around(tokenizer)
        bos, eos = (_token(tokenizer, named.get(role)) for role in ("bos_token", "eos_token"))
        begin = _with(begin, bos, config.get("add_bos_token"), 0)
        after = _with(after, eos, config.get("add_eos_token"), len(after))
        stops = _stops(folder, known, otherwise or {})
        eos = eos if eos is not None else stops[0] if stops else tokenizer.token_to_id(SEPARATOR)
        separator = after or (() if eos is None else (eos,))
        stop = turn_end() if len(stops) > 1 else None
        stop = stop if stop in stops else stops[0] if stops else eos
        end = () if stop is None else (stop,)
    if data.separator is not None:
        separator = _named(tokenizer, data.separator, name("separator"))
    if data.end is not None or data.separator is not None:
        end = separator if data.end is None else _named(tokenizer, data.end, name("end"))
    return Specials(begin, separator, end, known | {*begin, *separator, *end})


def read_json(folder: Path | None, file: str) -> dict[str, Any]:
    """An object of JSON in a model's folder; empty where there is none.

    Raises:
        ValueError: the file is no JSON.
    """
    if folder is None:
        return {}
    try:
        found = json.loads((folder / file).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"teacher: expected JSON in {str(folder / file)!r}: {error}") from None
    return found if isinstance(found, dict) else {}


def padding_id(tokenizer: Tokenizer, folder: Path | None) -> int | None:
    """The id that fills a batch: the folder's pad_token, one that is called so, else what ends a text; None: there is none."""
    named = {**read_json(folder, "special_tokens_map.json"), **read_json(folder, "tokenizer_config.json")}
    said, ends = token_text(named.get("pad_token")), token_text(named.get("eos_token"))
    known = (said, "[PAD]", "<pad>", "<|pad|>", ends, SEPARATOR, "</s>")
    return next((i for i in (tokenizer.token_to_id(token) for token in known if token) if i is not None), None)


def token_text(token: Any) -> str | None:
    """A special token as a configuration writes it: text, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    text = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not text:
        return (), ()
    return tuple(probe.ids[: text[0]]), tuple(probe.ids[text[-1] + 1 :])


def _with(ids: tuple[int, ...], token: int | None, wanted: Any, at: int) -> tuple[int, ...]:
    """The ids with the token at this end, or without it; as they are where nothing is said."""
    if token is None or not isinstance(wanted, bool) or (token in ids) == wanted:
        return ids
    return (*ids[:at], token, *ids[at:]) if wanted else tuple(i for i in ids if i != token)


def _stops(folder: Path | None, known: frozenset[int], otherwise: Mapping[str, Any]) -> list[int]:
    """Ids that stop the model, as far as they are special tokens of the tokenizer: a configuration's defaults may not be."""
    config = read_json(folder, "config.json")
    for said in (read_json(folder, "generation_config.json"), config, config.get("text_config") or {}, otherwise):
        ids = said.get("eos_token_id")
        found = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i in known]
        if found:
            return found
    return []


def _token(tokenizer: Tokenizer, token: Any) -> int | None:
    text = token_text(token)
    return None if text is None else tokenizer.token_to_id(text)


def _named(tokenizer: Tokenizer, token: str, option: str) -> tuple[int, ...]:
    found = tokenizer.token_to_id(token)
    if found is None and token != "none":
        raise ValueError(f"{option}: expected a token of the tokenizer, or none, got {token!r}")
    return () if found is None else (found,)
