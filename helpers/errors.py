"""The one error that a user sees, and the exit statuses of a command."""

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class BadInput(ValueError):
    """What the user gave cannot be worked on: one line with file, expected, found, what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))
