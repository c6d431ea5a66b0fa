"""One thread that works jobs off in order behind a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


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
