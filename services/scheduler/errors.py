"""Broken invariants of the schedulers. None of these is a request's fault; all are bugs."""


class SchedulerError(Exception):
    """Base of this folder's errors."""


class PageAccountingError(SchedulerError):
    """A page was freed twice, or used while nobody holds it."""


class OutOfPages(SchedulerError):
    """`allocate` was called without asking `can_allocate` first."""


class IllegalSequenceTransition(SchedulerError):
    """A sequence was moved between states in a way the table of transitions does not list."""
