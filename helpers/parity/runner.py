"""A model file, or a function, as one thing that can be run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from helpers import files

Model = str | Path | files.Opened | Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Outputs = dict[str, np.ndarray]


class Runner:
    """A model as one thing: `run` gives outputs by name. Raises what ONNX Runtime raises where a
    file does not load."""

    def __init__(self, model: Model, *, optimise: bool = True) -> None:
        self.function = model if callable(model) else None
        self.opened = None if self.function else files.Opened.of(model)
        self.name = getattr(model, "__qualname__", type(model).__name__)
        if self.opened is not None:
            self.name = str(model)
            self.session = self.opened.session(optimise=optimise)
            self.outputs = [value.name for value in self.session.get_outputs()]
            self.inputs = {value.name: value.type for value in self.session.get_inputs()}

    def close(self) -> None:
        """Give back the memory of a session that is not needed again."""
        self.session = None
        files.give_back()

    def run(self, arrays: Outputs) -> Outputs:
        if self.function is not None:
            return self.function(arrays)
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))
