"""Model files: refuse a bad one at once, write a good one whole or not at all; sessions."""

from helpers.errors import BadInput
from helpers.files.checking import check, checked
from helpers.files.opening import Opened, data, keep_apart, size
from helpers.files.refusals import raised, refused, told
from helpers.files.saving import ONE_FILE, replacing, save, scratch, write, writing
from helpers.files.sessions import give_back, session

__all__ = [
    "ONE_FILE",
    "BadInput",
    "Opened",
    "check",
    "checked",
    "data",
    "give_back",
    "keep_apart",
    "raised",
    "refused",
    "replacing",
    "save",
    "scratch",
    "session",
    "size",
    "told",
    "write",
    "writing",
]
