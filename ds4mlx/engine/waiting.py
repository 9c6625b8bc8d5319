"""Requests that have a place and wait to begin, in the order in which they came."""

from collections import deque
from collections.abc import Callable

from ds4mlx.engine.kept import Plan
from ds4mlx.engine.running import Job


class Waiting:
    """The queue. Who waits for a prefix that another one is reading lets others pass; who waits for
    memory does not.

    plan: says how a prompt, ids, would begin now.
    """

    def __init__(self, plan: Callable[[list[int]], Plan]):
        self.jobs: deque[Job] = deque()
        self._plan = plan
        self._blocked: Job | None = None

    @property
    def blocked(self) -> bool:
        """Whether the first to begin waits for memory, so for somebody to leave."""
        return self._blocked is not None

    def somebody_left(self) -> None:
        """There may be memory now."""
        self._blocked = None

    def remove(self, job: Job) -> None:
        """Have a job leave."""
        self.jobs.remove(job)
        self._blocked = None

    def next(self, fits: Callable[[Job], bool]) -> Job | None:
        """The job that is to begin now, with its plan; it stays in the queue. None if there is none."""
        for job in self.jobs:
            if job is self._blocked:
                return None
            if job.plan is not None and job.plan.must_wait:
                continue
            job.plan = self._plan(job.ids)
            if job.plan.must_wait and job.plan.awaited is not None:
                job.plan.awaited.state.add_boundary(job.plan.until)
            elif fits(job):
                return job
            else:
                self._blocked = job
                return None
        return None
