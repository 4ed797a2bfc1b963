"""A contender's own process, and what it loads."""

from helpers.workers.worker import Failed, Worker, memory

__all__ = ["Failed", "Worker", "memory"]
