"""The command line: exit codes, one-line errors, help with an example, JSON, and life without the extension."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import TEXT, make_tokenizer, recipe_values

import kdfast
from bench import commands as bench_commands
from kdfast.cli import COMMANDS, main
from kdfast.cli.progress import bar
from kdfast.cli.quickstart import read_seeds
from kdfast.cli.quickstart_job import llama
from kdfast.cli.train_keys import sections
from kdfast.extras import has, need
from kdfast.models.load import load_folder
from kdfast.text.tokenizers import SEPARATOR, load_tokenizer
from kdfast.train import Recipe, distill
from kdfast.train.recipes.word_kd import WordKDOptions


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
        pytest.param(["eval"], id="missing-argument"),
        pytest.param(["env", "--jsn"], id="unknown-flag"),
    ],
)
def test_wrong_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    if words:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("kdfast")
        assert "--help" in captured.err
    else:
        assert "usage: kdfast" in captured.out


@pytest.mark.parametrize(("word", "near"), [("trian", "'train'"), ("benhc", "'bench'"), ("xyzzy", "env, quickstart")])
def test_an_unknown_command_names_the_nearest(word: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS), ["plan", "--tokens", "1B"]])
@pytest.mark.parametrize("script", [False, True], ids=["python -m", "script"])
def test_help_needs_no_torch(words: list[str], script: bool, tmp_path: Path) -> None:
    command = ["-m", "kdfast"]
    if script:
        (tmp_path / "kdfast").write_text("import sys\nfrom kdfast.cli import main\nsys.exit(main())\n")
        command = [str(tmp_path / "kdfast")]
    root = str(Path(kdfast.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, *words], env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "kdfast" in imported
    assert not imported & {"torch", "numpy", "rich", "transformers"}


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        pytest.param("import sys, kdfast; print('torch' in sys.modules)", "True", id="import"),
        pytest.param("import kdfast, torch; print(hasattr(torch.ops.kdfast, 'scale_'))", "True", id="ops registered"),
        pytest.param("import kdfast.cli, kdfast; print(len(kdfast.backends()) > 1)", "True", id="command line first"),
    ],
)
def test_an_import_elsewhere_registers_the_kernels(code: str, answer: str) -> None:
    root = Path(kdfast.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer


def test_a_command_has_everything_when_it_runs(tmp_path: Path) -> None:
    """A script called kdfast, and what it starts, see the whole package at first use."""
    (tmp_path / "kdfast").write_text(
        "import sys, kdfast\n"
        "assert 'torch' not in sys.modules\n"
        "from kdfast import kd_loss\n"
        "assert callable(kd_loss) and set(kdfast.__all__) <= set(vars(kdfast))\n"
        "assert kdfast.backends() and 'torch' in sys.modules\n"
        "try:\n    kdfast.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    root = str(Path(kdfast.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "kdfast")], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'kdfast' has no attribute 'nothing'"


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    for name in COMMANDS:
        module = importlib.import_module(f"kdfast.cli.{name}")
        monkeypatch.setattr(module, "run", interrupted)
        needed = {"train": ["recipe.yaml"], "plan": ["--tokens", "1B"], "eval": ["model", "--data", "x"]}
        words = {"cache": ["info", "x"]} | needed
        assert main([name, *words.get(name, [])]) == 130
        assert capsys.readouterr().err == "kdfast: interrupted\n"


@pytest.mark.parametrize("name", [*bench_commands.COMMANDS])
def test_every_benchmark_is_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = bench_commands.spelled(name).split()[1:]
    assert main([*words, "--help"]) == 0
    assert f"usage: {bench_commands.spelled(name)} " in capsys.readouterr().out


def test_a_benchmark_without_a_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "full"]) == 2
    assert capsys.readouterr().err.startswith("kdfast bench: full: expected one of logits, ")


def test_a_missing_package_is_named_with_its_extra() -> None:
    assert need("json", extra="train", what="a test") is json
    with pytest.raises(
        ImportError, match=r"^a recipe needs no_such_package, which is not installed: pip install 'kdfast\[train\]'$"
    ):
        need("no_such_package.part", extra="train", what="a recipe")
    assert has("json")
    assert not has("no_such_package")


def test_without_rich_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kdfast.cli.progress.has", lambda package: False)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with bar("work", 3, "tokens") as shown:
        shown.update(3)
    assert capfd.readouterr() == ("", "")


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
    of_model = json.loads(capsys.readouterr().out)
    assert of_model["ppl"] < 400
    # A run's folder: its recipe has the length and the glob.
    assert main(["eval", trained["out"], "--data", str(TEXT), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == of_model
    assert main(["eval", trained["out"], "--data", str(TEXT), "--sequence-length", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] < of_model["tokens"]
    for folder in (trained["out"], trained["model"]):  # what is held out of the training data has no files
        assert main(["eval", folder]) == 2
        assert "--data: expected files or folders, got none; " in capsys.readouterr().err
    assert main(["eval", trained["out"], "--data", str(TEXT), "--best"]) == 2
    assert "--best: expected a run with keep_best: true, got" in capsys.readouterr().err
    assert main(["eval", trained["model"], "--data", str(TEXT), "--best"]) == 2
    assert "--best: expected a run's folder, got" in capsys.readouterr().err
    (tmp_path / "run" / "model").rename(tmp_path / "run" / "best")
    assert main(["eval", trained["out"], "--data", str(TEXT), "--best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == of_model
    (tmp_path / "run" / "best").rename(tmp_path / "moved")
    assert main(["eval", trained["out"], "--data", str(TEXT)]) == 2
    assert "model: expected a run that is done, got" in capsys.readouterr().err
    (tmp_path / "moved").rename(tmp_path / "run" / "model")
    assert main(["eval", str(tmp_path / "nothing"), "--data", str(TEXT)]) == 2
    capsys.readouterr()
    for more, message in (
        (["--batch-size", "0"], "--batch-size: expected a number >= 1, got 0"),
        (["--data", str(tmp_path / "none")], "--data: expected a file or a folder, got "),
        (["--glob", "*.zz"], "set --glob or another folder"),
        (["--task", "causal"], "--task 'causal': unknown task; expected one of causal_lm, "),
        (["--separator", "<none>"], "--separator: expected a token of the tokenizer, or none, got '<none>'"),
        (["--set", "sequence_lenght=4"], "--set sequence_lenght: unknown key; did you mean 'sequence_length'?"),
    ):
        assert main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_eval_is_the_perplexity_of_plain_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Special tokens as the folder says, through the head, against logits formed whole in float64."""
    tokenizer = make_tokenizer(tmp_path)
    result = distill(Recipe.build(recipe_values(tokenizer, tmp_path / "run", steps=1)), say=lambda line: None)
    text = tmp_path / "held.txt"
    text.write_text("import json\n\nprint(json.dumps([1, 2, 3]))\n" * 20)
    written = f"{text.read_text()}{SEPARATOR}"
    ids = load_tokenizer(tokenizer)[0].encode(written).ids
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    model = load_folder(result.model, "model").double().eval()
    with torch.no_grad():
        logp = model(rows).logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, rows[:, 1:, None]).mean().item()
    words = ["eval", str(result.model), "--data", str(text), "--sequence-length", "32", "--device", "cpu", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == rows.shape[0] * 31
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["top1"] == pytest.approx((logp.argmax(-1) == rows[:, 1:]).double().mean().item(), abs=0.01)


def test_train_keys_say_a_line_about_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("recipe", "method", "task"):
        for title, about, keys in sections(name):
            assert about, title
            assert keys, title
            silent = [key.name for key in keys if not key.meaning or not key.type or not key.default]
            assert not silent, f"{title}: {', '.join(silent)}: say a line in the docstring"
    assert main(["train", "--keys"]) == 0
    out = capsys.readouterr().out
    assert "  optimizer.lr  (number > 0; 0.001)\n" in out
    assert "  student.from_teacher.layers  (list or null; null)\n" in out
    assert main(["train", "--keys", "word_kd", "--json"]) == 0
    (keys,) = json.loads(capsys.readouterr().out).values()
    assert {key["name"] for key in keys} == {f"method.{name}" for name in WordKDOptions.__dataclass_fields__}
    assert main(["train", "--keys", "wrd_kd"]) == 2
    assert "--keys: expected one of method, task, " in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "recipe: expected a YAML file, got none" in capsys.readouterr().err


def test_the_method_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md: `hint.py` and `hint.yaml`, as they stand there."""
    page = (Path(kdfast.__file__).parent.parent / "docs" / "training.md").read_text()
    own = page[page.index("## A method of your own") :]
    code, recipe = (re.search(rf"```{kind}\n(.*?)```", own, re.DOTALL) for kind in ("python", "yaml"))
    assert code is not None
    assert recipe is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("hint.py").write_text(code[1])
    Path("hint.yaml").write_text(recipe[1])
    Path("text").symlink_to(TEXT)
    values = recipe_values(make_tokenizer(tmp_path), tmp_path / "run", steps=1)
    values["student"] = {"model_type": "llama", "config": {**llama(64, 1)}}
    distill(Recipe.build(values), say=lambda line: None)
    Path("teacher").symlink_to("run/model")
    assert main(["train", "hint.yaml", "alignment=false", "tracker=none", "steps=3"]) == 0
    row = json.loads(Path("runs/hint/metrics.jsonl").read_text().splitlines()[0])
    assert row["hint"] > 0
    assert "kl_at_T" in row


def test_ctrl_c_of_a_training_exits_130_and_it_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    values = recipe_values(make_tokenizer(tmp_path), tmp_path / "run", steps=100000, log_every=1, eval_sequences=2)
    file.write_text(json.dumps(values))
    command = [sys.executable, "-m", "kdfast.cli", "train", str(file)]
    root = str(Path(kdfast.__file__).parent.parent)
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and not metrics.is_file():
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert re.search(r"^kdfast: interrupted: stopped after step \d+; run the same again to go on\n\Z", err, re.MULTILINE), err
    stopped = int(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1].name.removeprefix("step-"))
    assert stopped >= 1
    assert main(["train", str(file), f"steps={stopped + 1}"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == stopped + 1


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
