"""Work beside the caller: jobs behind a bounded queue (`Background`), results ahead of whoever takes them (`Ahead`)."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Iterator[Result], Generic[Item, Result]):
    """`map(work, items)`, with threads that work up to `depth` items ahead of whoever takes the results.

    Items are taken from their iterator by the caller's thread, so any generator will do, an endless one too. What `work`
    raises is raised in the turn of its item, and ends the iteration. Threads end with the items, with `close()`, at the end
    of a `with` block, and with the iterator itself, also when the interpreter ends first.

    Args:
        depth: results that may wait to be taken; 0: the caller works, when asked.
        threads: how many work at the same time.
    """

    def __init__(self, work: Callable[[Item], Result], items: Iterable[Item], depth: int, threads: int = 1) -> None:
        self._work, self._items, self._depth = work, iter(items), depth
        self._waiting: deque[Future[Result]] = deque()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, "kdfast-cache-reader") if depth else None
        if self._pool is not None:
            # Not in __del__: that may run when the modules a shutdown needs are gone.
            self._shutdown = weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def __iter__(self) -> Ahead[Item, Result]:
        return self

    def __next__(self) -> Result:
        if self._closed:
            raise StopIteration
        try:
            return self._work(next(self._items)) if self._pool is None else self._take(self._pool)
        except BaseException:  # the end, or whatever went wrong: no thread stays behind
            self.close()
            raise

    def _take(self, pool: ThreadPoolExecutor) -> Result:
        while len(self._waiting) <= self._depth:
            try:
                item = next(self._items)
            except StopIteration:
                break
            self._waiting.append(pool.submit(self._work, item))
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the iteration: drops what was done ahead and waits for the threads."""
        self._closed = True
        self._waiting.clear()
        if self._pool is not None:
            self._shutdown()

    def __enter__(self) -> Ahead[Item, Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Background:
    """Runs what is `put`, in order; after a job fails the ones behind it are dropped, and whoever comes next is told.

    Args:
        size: jobs that may wait; `put` waits for room.
    """

    def __init__(self, size: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="kdfast-cache-writer")
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Raises what an earlier job raised."""
        self._raise()
        self._jobs.put(job)

    def wait(self) -> None:
        """Returns when every job is done; raises what one of them raised."""
        self._jobs.join()
        self._raise()

    def stop(self) -> None:
        """Drops the jobs that wait and ends the thread after the one it is at."""
        if self._error is None:
            self._error = RuntimeError("the writer was stopped")
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # whatever it is belongs to the thread that put the job
                self._error = error
            finally:
                self._jobs.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
