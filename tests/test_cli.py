"""The command line: exit codes, one-line errors, help with an example, JSON, and life without the extension."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TEXT, make_tokenizer, recipe_values

import kdfast
from kdfast.cli import COMMANDS, main
from kdfast.cli.progress import bar
from kdfast.cli.quickstart import read_seeds


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "example" in out
    assert f"kdfast {command}" in out


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="no-command"),
        pytest.param(["trian"], id="unknown-command"),
        pytest.param(["train"], id="missing-argument"),
        pytest.param(["env", "--jsn"], id="unknown-flag"),
    ],
)
def test_wrong_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "usage: kdfast" in captured.out + captured.err


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert kdfast.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        pytest.param("stepz: 1", [], "kdfast train: stepz: unknown key", id="unknown-key"),
        pytest.param("steps: 1", ["steps=none"], "kdfast train: steps: expected a whole number", id="bad-override"),
        pytest.param("{student: {model_type: gpt2}}", [], "kdfast train: tokenizer: expected", id="missing-tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exits_2(
    text: str, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert main(["train", str(file), *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_missing_recipe_exits_2_and_debug_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.yaml")
    assert main(["train", missing]) == 2
    assert missing in capsys.readouterr().err
    for words in (["--debug", "train", missing], ["train", missing, "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(words)


def test_train_and_eval_print_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = recipe_values(make_tokenizer(tmp_path), tmp_path / "run", steps=2)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    assert main(["train", str(file), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["steps"] == 2
    assert trained["validation"]["ppl"] > 1
    words = ["eval", trained["model"], "--data", str(TEXT), "--glob", "*.py", "--sequence-length", "32", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["ppl"] < 400
    assert main(["eval", str(tmp_path / "nothing"), "--data", str(TEXT)]) == 2
    assert main([*words[:-1], "--batch-size", "0"]) == 2
    assert "--batch-size: expected a number >= 1, got 0" in capsys.readouterr().err


def test_env_tells_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [b["name"] for b in found["backends"]] == [b.name for b in kdfast.backends()]
    assert all(b["available"] or b["reason"] for b in found["backends"])
    assert main(["env"]) == 0
    assert "reference" in capsys.readouterr().out


def test_env_without_the_extension(tmp_path: Path) -> None:
    source = Path(kdfast.__file__).parent
    shutil.copytree(source, tmp_path / "kdfast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # The finder of an editable install would answer for the extension that the copy does not have.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder'];"
        "from kdfast.cli import main; sys.exit(main(['env', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["extension"].startswith("not built: install a C++ compiler")
    cpp = next(b for b in found["backends"] if b["name"] == "cpp")
    assert not cpp["available"]
    assert "compiler" in cpp["reason"]


def test_the_bar_draws_nothing_when_piped(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("work", 3, "tokens") as shown:
        shown.update(3)
    assert capfd.readouterr() == ("", "")


def test_seeds() -> None:
    assert read_seeds("1,2,3") == [1, 2, 3]
    for text in ("", "1,1", "a", "-1"):
        with pytest.raises(ValueError, match="--seeds: expected"):
            read_seeds(text)
