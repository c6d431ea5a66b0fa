"""The offline teacher cache: capture a teacher once, train any number of students from compact, verified targets."""

from kdfast.cache.capture import capture
from kdfast.cache.format import AlignmentError, CacheError, CacheInfo, CacheMismatch, CorruptCache, Settings
from kdfast.cache.reader import Batch, CacheReader, Record
from kdfast.cache.verify import Alignment, check_alignment, verify
from kdfast.cache.writer import CacheWriter

__all__ = [
    "Alignment",
    "AlignmentError",
    "Batch",
    "CacheError",
    "CacheInfo",
    "CacheMismatch",
    "CacheReader",
    "CacheWriter",
    "CorruptCache",
    "Record",
    "Settings",
    "capture",
    "check_alignment",
    "verify",
]
