"""Where a batch gets its signal: a live model or a cache; several of either are an ensemble."""

from __future__ import annotations

from kdfast.train.recipe import Teacher as Spec
from kdfast.train.teachers.cached import CachedTeacher
from kdfast.train.teachers.live import LiveTeacher

Teacher = LiveTeacher | CachedTeacher


def open_teacher(spec: Spec, key: str, kind: str, tokenizer_hash: str | None, pack: int | None = None) -> Teacher:
    """What a recipe's `teacher:` names.

    Raises:
        CacheMismatch: a cache was made with another tokenizer.
        ValueError: it is not there, or does not load.
    """
    if spec.cache:
        return CachedTeacher(spec.cache, tokenizer_hash=tokenizer_hash, weight=spec.weight, pack=pack)
    return LiveTeacher.load(spec, key, kind)
