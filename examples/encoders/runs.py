"""The encoder examples' runs by name: recipes with changes, and what each of them needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kdfast.train import Recipe

HERE = Path(__file__).parent.parent
DOMAINS = ("books", "dvd", "electronics")
SMALL = {"from_teacher": {"layers": [1, 2, 4, 5], "width": 128}}
#: Of the reviews of a domain, from which a student learns.
SHARES = (0.02, 0.05, 0.1, 1.0)
NARROW = {"from_teacher": {"layers": [1, 3, 5], "width": 128}}


@dataclass(frozen=True)
class Run:
    """A recipe (a file under examples) with changes, the runs it needs, the rows it is scored on; for each seed, or once."""

    base: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    seeded: bool = True


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `changes`; what says all of something (a name, a student, shares) is replaced whole."""
    whole = ("student", "domain_shares")
    out = copy.deepcopy(dict(values))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both and "name" not in value and key not in whole else copy.deepcopy(value)
    return out


def alone(student: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The same student from the same weights, without a teacher."""
    cut = student["from_teacher"]
    return {"method": "supervised", "teacher": None, "student": {"from_teacher": {**cut, "path": path}}}


def stages() -> list[dict[str, Any]]:
    """TinyBERT's: general, intermediate, prediction."""
    return list(yaml.safe_load((HERE / "tinybert/recipe.yaml").read_text())["phases"])


def with_copies(stage: Mapping[str, Any]) -> dict[str, Any]:
    """On copies of the rows too, with other words."""
    return {**stage, "method": {**stage["method"], "augment": {"copies": 5}}}


def with_less(phases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """TinyBERT, and it without a term or a stage, in as many steps."""
    general, intermediate, prediction = phases
    together = general["steps"] + intermediate["steps"]

    def without(**weights: float) -> dict[str, Any]:
        return {"phases": [*({**stage, "method": stage["method"] | weights} for stage in phases[:2]), prediction]}

    return {
        "tinybert": {"phases": phases},
        "tinybert-without-attention": without(attention_weight=0.0),
        "tinybert-without-hidden": without(hidden_weight=0.0, embedding_weight=0.0),
        "tinybert-without-general": {"phases": [{**intermediate, "steps": together}, prediction]},
        "tinybert-prediction-only": {
            "phases": None, "steps": together + prediction["steps"], "method": {"name": "word_kd", "temperature": 1.0}
        },
    }  # fmt: skip


def sst2() -> dict[str, Run]:
    phases = stages()
    total = sum(phase["steps"] for phase in phases)
    labelled = {"data": {"train": ["data/sst2/train.tsv"]}}
    student = alone(SMALL, "runs/sst2/teacher/model")
    runs = {
        **with_less(phases),
        "tinybert-reference": {"phases": [{**p, "method": {**p["method"], "flavor": "reference"}} for p in phases]},
        # Copies of the rows with other words in the place of sentences of reviews.
        "tinybert-augmented": {**labelled, "phases": [*phases[:2], with_copies(phases[2])]},
        "alone": {"phases": None, "steps": total, **student, **labelled},
        "alone-longer": {"phases": None, "steps": 3 * total, **student, **labelled},
    }
    # What the terms are worth in other circumstances, in fewer steps: without the reviews' sentences, and from random weights.
    few, some = ([{**phase, "steps": n} for phase, n in zip(phases, steps, strict=True)]
                 for steps in ((150, 450, 300), (300, 900, 600)))  # fmt: skip
    scratch = {"student": {"model_type": "bert", "config": {
        "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}}}  # fmt: skip
    runs |= {f"labelled-{name}": {**changes, **labelled} for name, changes in with_less(few).items()}
    runs |= {f"scratch-{name}": {**changes, **scratch} for name, changes in with_less(some).items()}
    test = ("data/sst2/test.tsv",)
    found = {f"sst2/{name}": Run("tinybert/recipe.yaml", changes, ("sst2/teacher",), test) for name, changes in runs.items()}
    found["sst2/teacher"] = Run("encoders/teacher.yaml", test=test, seeded=False)
    every_other = [0, 2, 4]
    half = {"layers": every_other, "path": "encoder"}
    masked_alone = alone({"from_teacher": {"layers": every_other}}, "runs/mlm/head/model")
    task, corpus = "distilbert/task.yaml", ("data/amazon/books/test.jsonl",)
    # The fine-tuned teacher is heard once more, on the task (section 4 of the paper), on sentences without a label too.
    heard = {
        "method": {"name": "distilbert", "temperature": 2.0}, "teacher": {"path": "runs/sst2/teacher/model"}, "steps": 1200,
        "data": {"train": ["data/sst2/train.tsv", "data/amazon/sentences.tsv"]},
    }  # fmt: skip
    # What was tried: a lower rate; a third of the steps, and in as many a teacher that was trained on masked words as a whole,
    # mostly the direction of states, T = 1, a third of the text.
    tuned = {
        "student": {"path": "runs/mlm/head/model", "freeze": []},
        "optimizer": {"lr": 5.0e-4},
        "batch_size": 16,
        "steps": 250,
    }
    tries: dict[str, dict[str, Any]] = {
        "low-rate": {"optimizer": {"lr": 1.0e-4}},
        "shorter": {"steps": 200},
        "tuned": {"steps": 200, "teacher": {"path": "runs/mlm/tuned/model"}},
        "cosine": {
            "steps": 200,
            "method": {"name": "distilbert", "soft_weight": 1.0, "hard_weight": 1.0, "cosine_weight": 10.0},
        },
        "t1": {"steps": 200, "method": {"name": "distilbert", "temperature": 1.0}},
        "third": {"steps": 200, "data": {"glob": "books/train.jsonl"}},
    }
    for tried, changes in tries.items():
        masked = f"mlm/distilbert-{tried}"
        found[masked] = Run("distilbert/recipe.yaml", changes, ("mlm/tuned" if tried == "tuned" else "mlm/head",), corpus)
        found[f"sst2/distilbert-{tried}"] = Run(task, {"student": {"path": f"runs/{masked}/{{seed}}/model"}}, (masked,), test)
    return {
        **found,
        "mlm/head": Run("distilbert/head.yaml", test=corpus, seeded=False),
        "mlm/distilbert": Run("distilbert/recipe.yaml", needs=("mlm/head",), test=corpus),
        "mlm/tuned": Run("distilbert/head.yaml", tuned, ("mlm/head",), corpus, seeded=False),
        # Masked words alone, from the same start.
        "mlm/alone": Run("distilbert/recipe.yaml", masked_alone, ("mlm/head",), corpus),
        "sst2/distilbert": Run(task, {"student": {"path": "runs/mlm/distilbert/{seed}/model"}}, ("mlm/distilbert",), test),
        "sst2/distilbert-heard": Run(
            task, {**heard, "student": {"path": "runs/mlm/distilbert/{seed}/model"}}, ("mlm/distilbert", "sst2/teacher"), test
        ),
        "sst2/half-heard": Run(task, {**heard, "student": {"from_teacher": half}}, ("sst2/teacher",), test),
        "sst2/half-mlm": Run(task, {"student": {"path": "runs/mlm/alone/{seed}/model"}}, ("mlm/alone",), test),
        "sst2/half-alone": Run(task, {"student": {"from_teacher": half}}, test=test),
        "sst2/half-alone-longer": Run(task, {"student": {"from_teacher": half}, "steps": 3 * 582}, test=test),
    }  # fmt: skip


def reviews() -> dict[str, Run]:
    def files(*domains: str, part: str = "train") -> list[str]:
        return [f"data/amazon/{domain}/{part}.jsonl" for domain in domains]

    teacher, plain = "meta_kd/teacher.yaml", {"method": "supervised"}
    teachers = {
        "meta_teacher": {},
        "multi_teacher": plain,
        "meta_teacher-without-corruption": {"method": {"name": "meta_teacher", "encoder": "encoder", "domain_weight": 0.0}},
        "meta_teacher-unseen": {"data": {"domain_shares": {"electronics": 0}}},
        "multi_teacher-unseen": {**plain, "data": {"domain_shares": {"electronics": 0}}},
    }
    for domain in DOMAINS:
        own = {"train": files(domain), "validation": files(domain, part="validation")}
        # As many times over its own rows.
        teachers[f"single_teacher-{domain}"] = {**plain, "data": own, "steps": 100, "eval_every": 50}
    # Where every student begins: drawn to the encoder on text of the domains that each teacher saw.
    seen = files("books", "dvd")
    corpus = {"paths": seen, "sequence_length": 64}
    general = [{"steps": 1500, "method": {"name": "tinybert", "stage": "general", "corpus": corpus}}]
    start = {"task": {"labels": ["negative", "positive"]}, "teacher": {"path": "encoder"}, "student": NARROW, "phases": general,
             "data": {"train": seen, "validation": files("books", part="validation")}}  # fmt: skip
    found = {}
    for name, changes in teachers.items():
        known = [name.removeprefix("single_teacher-")] if "single" in name else DOMAINS
        found[f"reviews/{name}"] = Run(teacher, changes, test=tuple(files(*known, part="test")), seeded=False)
    found["reviews/start"] = Run("tinybert/recipe.yaml", start, test=tuple(files("electronics", part="test")), seeded=False)

    def student(domain: str, share: float, of: str, **method: Any) -> Run:
        data = {"validation": files(domain, part="validation"), "domain_shares": {domain: share}}
        changes: dict[str, Any] = {
            "method": {"name": "meta_kd", "domain": domain, "encoder": "encoder", **method},
            "teacher": {"path": f"runs/reviews/{of}/model"}, "data": data, "student": {"path": "runs/reviews/start/model"},
        }  # fmt: skip
        return Run("meta_kd/recipe.yaml", changes, (f"reviews/{of}", "reviews/start"), tuple(files(domain, part="test")))

    unweighed = {"instance_weights": False, "transfer_weight": 0.0}
    for domain in DOMAINS:
        found[f"reviews/{domain}-meta"] = student(domain, 1.0, "meta_teacher")
        found[f"reviews/{domain}-multi"] = student(domain, 1.0, "multi_teacher", **unweighed)
        found[f"reviews/{domain}-single"] = student(domain, 1.0, f"single_teacher-{domain}", **unweighed)
        found[f"reviews/{domain}-alone"] = _alone_of(found[f"reviews/{domain}-meta"], domain, 1.0)
    whole = found["reviews/electronics-meta"]
    found["reviews/electronics-without-weights"] = student("electronics", 1.0, "meta_teacher", instance_weights=False)
    found["reviews/electronics-without-corruption"] = student(
        "electronics", 1.0, "meta_teacher-without-corruption", transfer_weight=0.0
    )  # fmt: skip
    # What was tried for both teachers: twice the steps, a higher temperature, other weights, a student nearer to its teacher.
    tries: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "longer": ({"steps": 800}, {}), "t2": ({}, {"temperature": 2.0}), "prediction": ({}, {"prediction_weight": 3.0}),
        "half": ({"student": {"from_teacher": {"layers": [1, 3, 5]}}}, {}),
    }  # fmt: skip
    for tried, (changes, method) in tries.items():
        for of, options in (("meta", {}), ("multi", unweighed)):
            run = student("electronics", 1.0, f"{of}_teacher", **options, **method)
            found[f"reviews/electronics-{of}-{tried}"] = replace(run, changes={**run.changes, **changes})
    found["reviews/electronics-100%-multi-unseen"] = student("electronics", 1.0, "multi_teacher-unseen", **unweighed)
    for share in SHARES:
        name = f"reviews/electronics-{share:.0%}"
        found[f"{name}-meta-unseen"] = student("electronics", share, "meta_teacher-unseen")
        if share < 1:
            found[f"{name}-meta"] = student("electronics", share, "meta_teacher")
            found[f"{name}-alone"] = _alone_of(whole, "electronics", share)
    return found


def _alone_of(run: Run, domain: str, share: float) -> Run:
    data = {"train": [f"data/amazon/{domain}/train.jsonl"], "domain_shares": {domain: share},
            "validation": [f"data/amazon/{domain}/validation.jsonl"]}  # fmt: skip
    changes = {"method": "supervised", "teacher": None, "student": run.changes["student"], "data": data}
    return replace(run, changes=changes, needs=("reviews/start",))


def pairs_and_tags() -> dict[str, Run]:
    """RTE and WNUT 2017: a teacher, TinyBERT's student, the same student alone."""
    sets: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "rte": (
            {
                "task": {"name": "sequence_classification", "labels": ["entailment", "not_entailment"]},
                "data": {"train": "data/rte/train.tsv", "validation": "data/rte/validation.tsv", "text": "sentence1",
                         "text_pair": "sentence2", "max_length": 128},
            },
            ("data/rte/test.tsv",),
        ),
        "wnut17": (
            {
                "task": {"name": "token_classification"},
                "data": {"train": "data/wnut17/train.conll", "validation": "data/wnut17/validation.conll", "max_length": 64},
            },
            ("data/wnut17/test.conll",),
        ),
    }  # fmt: skip
    general, intermediate, prediction = stages()
    # Of each stage; a row of RTE is several times as long.
    lengths = {"rte": (300, 600, 400), "wnut17": (300, 1500, 800)}
    found: dict[str, Run] = {}
    for name, (changes, test) in sets.items():
        # No sentences without a label that are like these; copies of the few rows in their place.
        parts = zip((general, intermediate, with_copies(prediction)), lengths[name], strict=True)
        phases = [{**phase, "steps": n} for phase, n in parts]
        steps = sum(lengths[name])
        teacher = f"{name}/teacher"
        student = {**changes, "phases": phases, "teacher": {"path": f"runs/{teacher}/model"}}
        found[teacher] = Run("encoders/teacher.yaml", changes, test=test, seeded=False)
        found[f"{name}/tinybert"] = Run("tinybert/recipe.yaml", student, (teacher,), test)
        found[f"{name}/alone"] = Run(
            "tinybert/recipe.yaml",
            {**changes, "phases": None, "steps": steps, **alone(SMALL, f"runs/{teacher}/model")}, (teacher,), test,
        )  # fmt: skip
    return found


RUNS = {**sst2(), **reviews(), **pairs_and_tags()}


def recipe_of(name: str, seed: int, precision: str = "fp32") -> Recipe:
    run = RUNS[name]
    values = merged(yaml.safe_load((HERE / run.base).read_text()), run.changes)
    if values.get("phases") is None:
        values.pop("phases", None)
    else:
        for key in ("method", "steps"):
            values.pop(key, None)
    out = f"runs/{name}/{seed}" if run.seeded else f"runs/{name}"
    text = json.dumps({**values, "out": out, "seed": seed, "precision": precision, "tracker": "none"})
    return Recipe.build(json.loads(text.replace("{seed}", str(seed))))
