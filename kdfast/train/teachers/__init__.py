"""Where a batch gets its signal: a live model or a cache; several of either are an ensemble."""

from __future__ import annotations

from kdfast.train.recipe import Teacher as Spec
from kdfast.train.teachers.cached import CachedTeacher
from kdfast.train.teachers.live import LiveTeacher

Teacher = LiveTeacher | CachedTeacher


def teacher_keys(n: int) -> list[str]:
    """What a recipe calls its `n` teachers."""
    return ["teacher"] if n == 1 else [f"teachers[{i}]" for i in range(n)]


def open_teacher(spec: Spec, key: str, kind: str, tokenizer_hash: str | None, pack: int | None = None) -> Teacher:
    """What a recipe's `teacher:` names.

    Raises:
        CacheMismatch: a cache was made with another tokenizer.
        ValueError: it is not there, or does not load.
    """
    if spec.cache:
        return CachedTeacher(spec.cache, tokenizer_hash=tokenizer_hash, weight=spec.weight, pack=pack)
    return LiveTeacher.load(spec, key, kind)
