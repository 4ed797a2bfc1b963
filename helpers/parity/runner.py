"""A model file, or a function, as one thing that can be run.

A file that writes its caches in place runs on what one whose caches grow runs on, and gives the
same: its buffers are filled with the past keys, and what it gives back is cut after the last new
one. So either can be compared with the other.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from helpers import files, graph

Model = str | Path | files.Opened | Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Outputs = dict[str, np.ndarray]
EMPTY = 1e4  # what stands in a buffer where no key is yet: if it were read, it would be seen


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
            self.buffers = graph.buffers(self.opened.model)
            if self.buffers:
                del self.inputs[self.buffers.length]

    def close(self) -> None:
        """Give back the memory of a session that is not needed again."""
        self.session = None
        files.give_back()

    def run(self, arrays: Outputs) -> Outputs:
        if self.function is not None:
            return self.function(arrays)
        if self.buffers and self.buffers.length not in arrays:
            return self._run_in_place(arrays, self.buffers)
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))

    def _run_in_place(self, arrays: Outputs, buffers: graph.Buffers) -> Outputs:
        """What it gives for `arrays`, in which caches have the length of the past."""
        axis, given = buffers.AXIS, buffers.given
        past = next(arrays[name].shape[axis] for name in given)
        others = [array for name, array in arrays.items() if name not in given]
        new = max((size for array in others for size in array.shape), default=1)
        capacity = buffers.capacity or past + new
        if past > capacity:
            raise ValueError(f"{past} past positions, of a capacity of {capacity}")
        filled = {}
        for name in given:
            beyond = [(0, 0)] * arrays[name].ndim
            beyond[axis] = (0, capacity - past)
            filled[name] = np.pad(arrays[name], beyond, constant_values=EMPTY)
        told = {buffers.length: np.array([past], np.int64)}
        outputs = dict(
            zip(self.outputs, self.session.run(None, arrays | filled | told), strict=True)
        )
        for name in given.values():
            written = (outputs[name] != EMPTY).any(axis=(0, 1, 3))
            end = int(np.flatnonzero(written).max(initial=-1)) + 1
            outputs[name] = outputs[name][:, :, :end]
        return outputs
