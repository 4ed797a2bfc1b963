"""A contender's own process."""

from helpers.workers.worker import work

work()
