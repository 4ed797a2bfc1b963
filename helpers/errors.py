"""The one error that a user sees."""


class BadInput(ValueError):
    """What the user gave cannot be worked on: one line with file, expected, found, what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))
