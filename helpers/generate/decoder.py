"""A decoder's file, run step by step; its caches go from step to step without a copy.

A cache that grows comes out of a step longer than it went in, and goes into the next as it is. One
that is written in place (`helpers.fuse.in_place`) is a buffer that goes in and comes out as the
same memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort

from helpers import files, graph
from helpers.graph.caches import caches

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Cache:
    """Keys and values of the positions so far, by the name of the input that takes them: (batch,
    heads, positions, width), or where they are written in place, of as many as the capacity is, of
    which `length` are filled."""

    arrays: Arrays
    length: int = 0

    def reordered(self, rows: np.ndarray) -> Cache:
        """The same with other rows: those at `rows` (batch,), as a search over beams picks them."""
        return Cache({name: array[rows] for name, array in self.arrays.items()}, self.length)


class Decoder:
    """The file of a decoder that takes caches, and gives them. Raises `files.BadInput` where it has
    none, or one does not come out again."""

    def __init__(self, model: str | Path | files.Opened, *, threads: int = 0) -> None:
        self.opened = files.Opened.of(model)
        path = self.opened.path
        own = threads > 0  # a session for these
        self.session = files.session(path, threads=threads) if own else self.opened.session()
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.buffers = graph.buffers(self.opened.model)
        self.given = self.buffers.given if self.buffers else self._growing()

    def _growing(self) -> dict[str, str]:
        """For the name of each cache that grows, the output that gives it back."""
        found = caches(self.opened.model, graph.sites(self.opened.model))
        given_out = {cache.given.name: cache.given_out() for cache in found}
        lost = [name for name, outputs in given_out.items() if not outputs]
        if lost or not given_out:
            what = f"that {lost[0]} does not come out again" if lost else "none"
            raise files.BadInput(
                f"{self.opened}: expected caches, of keys and values, that go in and come out,"
                f" found {what}; export it with its caches"
            )
        return {name: outputs[0].name for name, outputs in given_out.items()}

    def empty(self, batch: int, capacity: int) -> Cache:
        """Caches without a position, for so many rows; those written in place have room for
        `capacity`, or as many as the file says."""
        positions = 0
        if self.buffers:
            positions = self.buffers.capacity or capacity
        arrays = {}
        for name in self.given:
            _, heads, _, width = self.inputs[name].shape
            shape = (batch, int(heads), positions, int(width))
            arrays[name] = np.zeros(shape, _TYPES[self.inputs[name].type])
        return Cache(arrays)

    def step(self, arrays: Arrays, cache: Cache, new: int) -> tuple[Arrays, Cache]:
        """The outputs but for the caches, and these with `new` positions more. `arrays` has all
        inputs but the caches, and how far they are filled.

        Raises `files.BadInput`, before anything is run, where they do not fit.
        """
        binding, names = self.session.io_binding(), []
        if self.buffers:
            self._check(cache, new)
            arrays = arrays | {self.buffers.length: np.array([cache.length], np.int64)}
        for name, array in (arrays | cache.arrays).items():  # which the session reads, uncopied
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, output in self.given.items() if self.buffers else ():
            binding.bind_ortvalue_output(
                output, ort.OrtValue.ortvalue_from_numpy(cache.arrays[name])
            )
            names.append(output)
        for output in self.outputs:
            if output not in names:
                binding.bind_output(output)
                names.append(output)
        self.session.run_with_iobinding(binding)
        values = map(np.from_dlpack, binding.get_outputs())  # their memory, not a copy of it
        outputs = dict(zip(names, values, strict=True))
        grown = {name: outputs.pop(output) for name, output in self.given.items()}
        return outputs, Cache(cache.arrays if self.buffers else grown, cache.length + new)

    def _check(self, cache: Cache, new: int) -> None:
        """Raise `files.BadInput` where a step would write behind the end of a buffer."""
        room = min(array.shape[graph.Buffers.AXIS] for array in cache.arrays.values())
        if cache.length + new > room:
            raise files.BadInput(
                f"{self.opened}: expected at most {room} positions, the capacity of its caches,"
                f" found {cache.length + new}; give fewer tokens, or fuse with a larger --capacity"
            )


_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
