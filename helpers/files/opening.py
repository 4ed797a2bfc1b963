"""A model file that is read once, and handed on to all that ask something of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import graph
from helpers.errors import BadInput
from helpers.files.sessions import give_back, session
from helpers.graph import external

KEPT_UP_TO = 2**29  # bytes of a model whose sessions are kept: what is larger fills the memory


class Contents(NamedTuple):
    """A graph without weights, and the files that hold its external data.

    `nodes` and `tensors` are all names in the file, those in its functions too, of which the graph
    has none left once they are inlined; `has_functions` is whether it had any.
    """

    model: ir.Model
    data: set[Path]
    nodes: set[str]
    tensors: set[str]
    has_functions: bool

    @classmethod
    def of(cls, proto: onnx.ModelProto, data: set[Path]) -> Contents:
        """What `proto` holds, which loses its large weights; its functions are not inlined yet."""
        nodes, tensors = graph.names_in(proto)
        model = ir.from_proto(graph.without_weights(proto))
        return cls(model, data, nodes, tensors, bool(proto.functions))


class Opened:
    """The model at `path`, with what has been read of it. It can be used wherever a path can.

    Each part is read when it is first asked for. Who wants to change `model` clones it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._given = str(path)
        self._sessions: dict[bool, ort.InferenceSession] = {}

    @classmethod
    def of(cls, model: str | Path | Opened) -> Opened:
        """`model` itself, if it is opened already."""
        return model if isinstance(model, cls) else cls(model)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        """The path as it was given, for messages."""
        return self._given

    @functools.cached_property
    def contents(self) -> Contents:
        """What one reading of the file gives. Raises what `graph.load` raises."""
        proto, folder = external.read(self.path)
        files = {folder / external.location(tensor) for tensor in external.tensors(proto)}
        contents = Contents.of(proto, files)
        graph.inline(contents.model)
        return contents

    @property
    def model(self) -> ir.Model:
        """The graph, as `graph.load` gives it without weights."""
        return self.contents.model

    @property
    def data(self) -> set[Path]:
        """The files that hold its external data, without links."""
        return self.contents.data

    def session(self, *, optimise: bool = True) -> ort.InferenceSession:
        """A session as `files.session` makes it; of a model up to 512 MB, the same one each time.

        Raises what ONNX Runtime raises.
        """
        if optimise in self._sessions:
            return self._sessions[optimise]
        opened = session(self.path, optimise=optimise)
        if size(self) <= KEPT_UP_TO:
            self._sessions[optimise] = opened
        return opened

    def close(self) -> None:
        """Give back the memory of its sessions."""
        self._sessions.clear()
        give_back()


def size(path: str | Path | Opened) -> int:
    """Bytes on disk of the model at `path`, its external data included."""
    files = path.data if isinstance(path, Opened) else data(path)
    return sum(file.stat().st_size for file in {Path(path).absolute(), *files})


def data(path: str | Path) -> set[Path]:
    """The files that hold the external data of the model at `path`; links are followed."""
    model, folder = external.read(path)
    return {folder / external.location(tensor) for tensor in external.tensors(model)}


def keep_apart(opened: Opened, out: str | Path) -> None:
    """Raise `BadInput` where to write `out` would replace the model that is `opened`, or its data.

    A link is replaced, which leaves alone what it leads to, unless the input leads there too.
    """
    path, out = opened.path, Path(out).absolute()
    for file, what in ((path, "the input"), *((of_data, "its data") for of_data in opened.data)):
        if not out.exists() or not out.samefile(file):
            continue
        if not out.is_symlink() or path.is_symlink():
            raise BadInput(
                f"{out}: expected another file than the input, found {what}; choose another name"
            )
