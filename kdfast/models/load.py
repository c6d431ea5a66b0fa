"""Models from a folder, a hub name, a configuration or a function, in the dtype asked for; weights as safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from kdfast.files import read_json
from kdfast.strict import unknown_key
from kdfast.tensors import load_tensors, reading_tensors

#: Kind of model -> the class of `transformers` that makes it.
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
    "encoder": "AutoModel",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKEN_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip


def auto_class(kind: str) -> Any:
    """The `transformers` class for a kind of `AUTO_CLASSES`."""
    return getattr(importlib.import_module("transformers"), AUTO_CLASSES[kind])


def torch_dtype(name: str, folder: str | Path | None = None) -> torch.dtype:
    """`auto`: what the folder's config says its weights are, float32 where it says nothing."""
    if name == "auto":
        values = read_config(Path(folder)) if folder is not None and (Path(folder) / "config.json").is_file() else {}
        name = values.get("dtype") or values.get("torch_dtype") or "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's `config.json` says.

    Raises:
        ValueError: it is no object of JSON; names the file.
    """
    found = read_json(folder / "config.json")
    if not isinstance(found, dict):
        raise ValueError(f"{folder / 'config.json'}: expected an object of JSON, got {type(found).__name__}")
    return found


def resolve_folder(name: str | Path, key: str) -> Path:
    """A local folder, or the model in that of a finished run; otherwise the hub's copy of that name, from local files offline.

    Raises:
        ValueError: neither is there; one line that names `key`.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if (path / "recipe.yaml").is_file() and (path / "model/config.json").is_file():
        return path / "model"
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        line = f"{key}: expected a folder with config.json and safetensors weights, got {str(name)!r}"
        if (path / "recipe.yaml").is_file():
            raise ValueError(
                f"{line}, a run without a model of transformers: it is not finished, or its student is a function's"
            )
        if (path / "model.safetensors").is_file():
            raise ValueError(f"{line}, weights of a function's module: name the function, and the folder as its weights")
        raise ValueError(line)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        try:
            return Path(snapshot_download(str(name), allow_patterns=wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(str(name), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = textwrap.shorten(" ".join(str(error).split()), 120, placeholder=" ...")
        raise ValueError(
            f"{key}: expected a folder with config.json and safetensors weights, got {str(name)!r}: there is no such folder,"
            f" and the model hub has none of that name ({reason})"
        ) from None


def load_folder(
    path: str | Path, key: str, *, kind: str = "causal_lm", dtype: str = "float32", missing: list[str] | None = None,
    **config: Any,
) -> nn.Module:  # fmt: skip
    """The model in a local folder or of a hub name.

    Args:
        path: the folder or name. key: what an error calls it. kind: one of `AUTO_CLASSES`.
        dtype: one of `DTYPES`; weights are never widened unless asked for.
        missing: takes the names of weights that the folder lacks, which are random then: the head of a model that was not
            trained for `kind`. None: it may lack none.
        config: fields of the model's configuration to set, such as `num_labels`.

    Raises:
        ValueError: it does not load, or lacks weights.
    """
    folder = resolve_folder(path, key)
    with quiet():
        try:
            with reading_tensors(folder):
                model, found = auto_class(kind).from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch_dtype(dtype, folder),
                    output_loading_info=True, **config,
                )  # fmt: skip
        except (ValueError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            if "ignore_mismatched_sizes" in reason:  # which points at a report that is not shown here
                reason = _other_sizes(folder, kind, config)
            raise ValueError(f"{key}: {folder} does not load as a model for {kind}: {reason}") from None
    lacking = sorted(found["missing_keys"])
    if missing is None and lacking:
        raise ValueError(
            f"{key}: {folder} {lacks(lacking)}, which would be random; it was trained for something else than {kind}"
        )
    if missing is not None:
        missing += lacking
    return model


def _other_sizes(folder: Path, kind: str, config: Mapping[str, Any]) -> str:
    """Why weights do not have the sizes of the model, and the remedy."""
    its = read_config(folder)
    if "id2label" not in config or kind_in(its) == kind:
        return "its weights have other sizes than config.json says; take both from one model"
    return (
        f"it is a {(its.get('architectures') or ['model'])[0]} of {len(its.get('id2label') or (0, 1))} classes, expected"
        f" {len(config['id2label'])} or no head; take the encoder it was trained from"
    )


def check_fields(path: str | Path, fields: dict[str, Any], key: str) -> None:
    """Raises where `fields` of the configuration in a folder are unknown, or part of what its weights were trained as.

    Args:
        path: the folder or name. key: what an error calls the fields.
    """
    if not fields:
        return
    known = read_config(resolve_folder(path, key))
    known = (
        {**AutoConfig.for_model(known["model_type"]).to_dict(), **known} if known.get("model_type") in CONFIG_MAPPING else known
    )
    for name in fields:
        if name not in known:
            raise ValueError(unknown_key(f"{key}.{name}", name, [k for k in known if _is_free(k)]))
        if not _is_free(name):
            raise ValueError(
                f"{key}.{name}: expected dropout or token ids alone beside path and from_teacher, as the weights in {path}"
                " were trained with the others; leave it out (fewer layers, narrower: from_teacher; more, wider: init_from)"
            )


def _is_free(name: str) -> bool:
    return "drop" in name or name.endswith("_token_id")


def lacks(missing: Sequence[str]) -> str:
    """Which weights a folder has not, in words."""
    return f"has no weights {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"


def from_config(model_type: str, fields: dict[str, Any], key: str, *, kind: str = "causal_lm", **defaults: Any) -> nn.Module:
    """A `transformers` architecture with random weights from torch's global generator, in float32.

    Args:
        model_type: such as "llama". fields: of its configuration; `defaults` (`vocab_size`, `num_labels`) give way to them.
        key: the recipe's key, for errors.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(unknown_key(f"{key}.model_type {model_type!r}", model_type, list(CONFIG_MAPPING.keys())))
    its = CONFIG_MAPPING[model_type]()
    known = {**its.to_dict(), "num_labels": 2}
    if its.is_encoder_decoder:  # what `generate` needs to know, which not every architecture has a default for
        known |= {"decoder_start_token_id": None, "eos_token_id": None}
    for name in fields:
        if name not in known:
            raise ValueError(unknown_key(f"{key}.config.{name}", name, known))
    # Token ids of the architecture's own tokenizer mean nothing here and may lie outside the vocabulary.
    ids = {k: None for k in _TOKEN_IDS if k in known and k != "decoder_start_token_id"}  # Marian has to have one
    given = {**ids, **{k: v for k, v in defaults.items() if v is not None and (k in known or k not in _TOKEN_IDS)}, **fields}
    try:
        config = AutoConfig.for_model(model_type, **given)
        return auto_class(kind).from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{key}: {model_type} does not make a model for {kind}: {reason}") from None


def from_function(name: str, arguments: dict[str, Any], key: str) -> nn.Module:
    """What `module:function` returns when it is called with `arguments`.

    Raises:
        ValueError: it cannot be imported, does not take the arguments, or what it returns is no module.
    """
    module_name, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{key}: expected module:function, got {name!r}")
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        # A module that it imports itself may be what is missing; then the path is not at fault.
        lost = isinstance(error, ModuleNotFoundError) and error.name == module_name
        remedy = "; put the folder of its module on PYTHONPATH" if lost else ""
        raise ValueError(f"{key}: {name!r} cannot be imported: {error}{remedy}") from None
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{key}: {name} does not take the arguments {arguments}: {error}") from None
    try:
        model = make(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {name}: {error}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{key}: expected {name!r} to return an nn.Module, got {type(model).__name__}")
    return model


def device_named(name: str | None, key: str) -> torch.device:
    """The device that is asked for, by default a GPU where there is one.

    Raises:
        ValueError: there is none of that name, or this machine has none of its kind.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"{key}: expected cpu, cuda, cuda:1 or the like, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{key}: expected a device of this machine, which has {torch.cuda.device_count()} GPUs, got {name!r}")
    return device


def check_ids(model: nn.Module, ids: int, key: str) -> None:
    """Raises where a model has fewer ids than the tokenizer whose texts it is to read: one outside is an index error."""
    its = vocab_of(model)
    if its is not None and its < ids:
        raise ValueError(
            f"{key}: its vocabulary has {its} ids, expected at least the tokenizer's {ids}; are they of one model?"
        )


def vocab_of(model: nn.Module) -> int | None:
    """The model's vocabulary size where it says so."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return int(size) if size is not None else None


def kind_of(folder: Path) -> str:
    """Kind of the model in a folder, by the architecture its config names; `causal_lm` where that says nothing."""
    return kind_in(read_config(folder))


def kind_in(config: Mapping[str, Any]) -> str:
    """The same of what a config says."""
    names = config.get("architectures") or [""]
    tables: dict[str, Any] = {
        "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "sequence_classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token_classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "image_classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for kind, table in tables.items():
        if names[0] in table.values() and names[0] not in causal:
            return kind
    return "causal_lm"


def weight_files(path: str | Path, key: str) -> list[Path]:
    """The safetensors files of a folder, sharded or not, or the one file named.

    Raises:
        ValueError: there are none, or a shard that the index names is missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{key}: expected a safetensors file or a folder with {missing[0]}, got {str(path)!r}")
    return [path / name for name in names]


def weights_hash(path: str | Path) -> str:
    """sha256 over the safetensors files of a folder in the order of their names: a teacher's identity."""
    digest = hashlib.sha256()
    for file in weight_files(path, "teacher"):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load_weights(model: nn.Module, path: str | Path, key: str = "init_from") -> None:
    """Puts the weights of a folder (sharded or not) or a safetensors file into `model`; every one must fit, tied ones once."""
    tensors = {name: tensor for file in weight_files(path, key) for name, tensor in load_tensors(file).items()}
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(
                f"{key}: the weights in {path} do not fit the model: {name} is {list(tensor.shape)},"
                f" expected {list(own[name].shape)}"
            )
    found = model.load_state_dict(tensors, strict=False)
    groups = {**tied(model)}
    given = {name for name in (*groups, *groups.values()) if name in tensors}
    reached = {copy for copy, name in groups.items() if name in given} | {
        name for copy, name in groups.items() if copy in given
    }
    missing, surplus = set(found.missing_keys) - reached, found.unexpected_keys
    if missing or surplus:
        what = f"missing {', '.join(sorted(missing)[:4])}" if missing else f"not in the model: {', '.join(surplus[:4])}"
        raise ValueError(f"{key}: the weights in {path} do not fit the model: {what}")


def tied(module: nn.Module) -> dict[str, str]:
    """Name of each parameter that is another one's too -> the name it is met under first."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    return {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if first[id(p)] != name}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar for every file it touches and reports what it loaded, even when the output is piped."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
