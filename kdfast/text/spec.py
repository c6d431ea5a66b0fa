"""`TextData`: which corpus, and how it is read. Command lines and recipes say the same with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: How an option is called where it was given: `paths` is `--data` on a command line, `data.train` in a recipe.
Naming = Callable[[str], str]

#: Builders of `datasets` that read the files in `paths`.
BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def python_name(option: str) -> str:
    """An option as a Python caller gives it."""
    return f"data.{option}"


@dataclass(frozen=True)
class TextData:
    """A corpus by name.

    Args:
        paths: text files, `.jsonl` and `.parquet` files, or folders; with a `dataset` that is a builder its files.
        glob: which files of a folder.
        exclude: folder or file names to leave out.
        dataset: instead of files a folder written by `save_to_disk`, a name for `load_dataset`, or one of `BUILDERS`.
        dataset_config, split: of the dataset (default split: train).
        streaming: rows of a dataset as they are downloaded, which leaves nothing on disk.
        field: field of a row that is its text (default text).
        messages_field: field with a conversation, a list of role and content (default messages). A row is read by the first
            form it has: conversation, prompt and completion, text; naming a field leaves out the other forms.
        prompt_field, completion_field: fields with a prompt and what follows it (default prompt, completion).
        source_field, target_field: an encoder's and a decoder's text.
        chat_template: file with a Jinja template to use instead of the model's.
        prompt_loss: prompts count too; otherwise completions and assistant turns only.
        unlabelled: rows may have a source or a prompt alone; nothing of them counts until a teacher writes what follows.
        sequence_length: most tokens of a document.
        special_tokens: `auto`: what the tokenizer and the model say stands around documents and completions; `none`: nothing
            but a `separator` or `end` that is named.
        separator: token after each text; None: as `special_tokens` says; `none`: none.
        end: token after each completion; None: the separator where that is named, else as `special_tokens` says; `none`: none.
        mask_token: a masked model's mask. mask_share: share of ids that are masked.
    """

    paths: tuple[str, ...] = ()
    glob: str = "**/*.txt"
    exclude: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    streaming: bool = False
    field: str | None = None
    messages_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    source_field: str = "source"
    target_field: str = "target"
    chat_template: str | None = None
    prompt_loss: bool = False
    unlabelled: bool = False
    sequence_length: int = dataclasses.field(default=512, metadata={"low": 2})
    special_tokens: str = dataclasses.field(default="auto", metadata={"choices": ("auto", "none")})
    separator: str | None = None
    end: str | None = None
    mask_token: str = "[MASK]"
    mask_share: float = dataclasses.field(default=0.15, metadata={"above": 0.0, "high": 1.0})

    def check(self, name: Naming = python_name) -> None:
        """Raises:
        ValueError: an option is out of range or does not go with another; one line that names it as `name` says.
        """
        if self.sequence_length < 2:
            raise ValueError(f"{name('sequence_length')}: expected a number >= 2, got {self.sequence_length}")
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"{name('mask_share')}: expected a share in (0, 1], got {self.mask_share}")
        if self.special_tokens not in ("auto", "none"):
            raise ValueError(f"{name('special_tokens')}: expected auto or none, got {self.special_tokens!r}")
        dataset, paths = name("dataset"), name("paths")
        if not self.dataset:
            for option in ("dataset_config", "split", "streaming"):
                if getattr(self, option):
                    raise ValueError(f"{name(option)}: expected it with {dataset}, got it without")
            if not self.paths:
                raise ValueError(f"{paths}: expected text files, .jsonl files or folders, or {dataset}, got neither")
        elif bool(self.paths) != (self.dataset in BUILDERS):
            wanted = f"{paths} with its files" if self.dataset in BUILDERS else f"it without {paths}"
            raise ValueError(
                f"{dataset}: expected {wanted} (builders that read files: {', '.join(BUILDERS)}), got {self.dataset!r}"
            )

    def forms(self, task: str) -> dict[str, tuple[str, ...]]:
        """The ways to read a row with their fields, in the order they are tried; the named ones alone when one is named."""
        if task == "seq2seq":
            return {"pair": (self.source_field, self.target_field)}
        named = {"chat": self.messages_field, "prompt": self.prompt_field or self.completion_field, "text": self.field}
        forms = {
            "chat": (self.messages_field or "messages",),
            "prompt": (self.prompt_field or "prompt", self.completion_field or "completion"),
            "text": (self.field or "text",),
        }
        if task == "masked":
            return {"text": forms["text"]}
        return {form: fields for form, fields in forms.items() if named[form]} or forms

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values, to be kept beside what was made with them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
