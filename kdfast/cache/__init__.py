"""The offline teacher cache: capture a teacher once, train any number of students from compact, verified targets."""

from kdfast.cache.batch import Batch
from kdfast.cache.build import BuildOptions, Built, build, estimate, load_teacher
from kdfast.cache.capture import Example, capture, nucleus, share_of
from kdfast.cache.capture_file import read_capture
from kdfast.cache.dataset import CacheDataset, CacheStream
from kdfast.cache.format import AlignmentError, CacheError, CacheFull, CacheMismatch, CorruptCache, Settings
from kdfast.cache.manifest import CacheInfo
from kdfast.cache.merge import merge, part_path
from kdfast.cache.reader import CacheReader, Record
from kdfast.cache.repair import Repaired, repair
from kdfast.cache.verify import Alignment, TeacherCheck, check_alignment, compare_with_teacher, verify
from kdfast.cache.writer import CacheWriter

__all__ = [
    "Alignment",
    "AlignmentError",
    "Batch",
    "BuildOptions",
    "Built",
    "CacheDataset",
    "CacheError",
    "CacheFull",
    "CacheInfo",
    "CacheMismatch",
    "CacheReader",
    "CacheStream",
    "CacheWriter",
    "CorruptCache",
    "Example",
    "Record",
    "Repaired",
    "Settings",
    "TeacherCheck",
    "build",
    "capture",
    "check_alignment",
    "compare_with_teacher",
    "estimate",
    "load_teacher",
    "merge",
    "nucleus",
    "part_path",
    "read_capture",
    "repair",
    "share_of",
    "verify",
]
