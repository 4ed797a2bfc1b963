"""External data: the values of a model that are in other files, and where those are.

A place is a relative name. What it leads to must be a regular file in the model's own folder or, as
in a hub's cache, whose files are links, in the folder of the file that the model is a link to. ONNX
Runtime has the same rule; onnx and onnx_ir follow no link out of the model's own folder, so the
places that `read` gives are those of the files themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo

from helpers.errors import BadInput


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose values are in other files: in branches, bodies and functions too."""
    queue: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while queue:
        inside = queue.pop(0)
        held = [*getattr(inside, "initializer", ())]
        for sparse in getattr(inside, "sparse_initializer", ()):
            held += [sparse.values, sparse.indices]
        for node in inside.node:
            for attribute in node.attribute:
                held += [attribute.t, *attribute.tensors]
                queue += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        yield from (tensor for tensor in held if tensor.data_location == onnx.TensorProto.EXTERNAL)


def read(path: str | Path) -> tuple[onnx.ModelProto, Path]:
    """The model at `path`, without the values that are in other files, and their folder.

    Each place is that of a regular file, relative to the folder: links have been followed. Raises
    `BadInput` where one leads to no file, or out of the folders where it may be.
    """
    path = Path(path).absolute()
    model = onnx.load(path, format="protobuf", load_external_data=False)
    linked, folder = [(tensor, place(path, tensor)) for tensor in tensors(model)], path.parent
    if any(file != path.parent.resolve() / location(tensor) for tensor, file in linked):
        folder = Path(os.path.commonpath([file.parent for _, file in linked]))
        for tensor, file in linked:
            set_location(tensor, file.relative_to(folder).as_posix())
    return model, folder


def load(path: str | Path) -> ir.Model:
    """The model at `path`; values that are in other files are read when they are asked for."""
    proto, folder = read(path)
    model = ir.from_proto(proto)
    for inside in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(inside, folder)
    return model


def bring_in(model: ir.Model, *, up_to: float = float("inf")) -> None:
    """Load what is in other files, in place: all, or the initializers of the main graph only up to
    a number of bytes."""
    for inside in model.graphs():
        for value in inside.initializers.values():
            large = inside is model.graph and value.const_value is not None
            if not (large and value.const_value.nbytes > up_to):
                value.const_value = _loaded(value.const_value)
    for inside in (model.graph, *model.functions.values()):
        for node in ir.traversal.RecursiveGraphIterator(inside):
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    loaded = ir.AttrTensor(attribute.name, _loaded(attribute.value))
                elif attribute.type == ir.AttributeType.TENSORS:
                    loaded = ir.AttrTensors(attribute.name, [*map(_loaded, attribute.value)])
                else:
                    continue
                node.attributes[attribute.name] = loaded


def _loaded(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.external_data.convert_tensors_from_external([tensor])[0]


def location(tensor: onnx.TensorProto) -> str:
    """The place of the values of `tensor`, as the model has it."""
    return ExternalDataInfo(tensor).location


def set_location(tensor: onnx.TensorProto, location: str) -> None:
    """Write another place."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def place(path: Path, tensor: onnx.TensorProto) -> Path:
    """The regular file, without links, that has the values of a tensor of the model at `path`."""
    wanted = f"{path}: expected the values of {tensor.name or 'a tensor'}"
    try:
        given = Path(location(tensor))
    except Exception as error:  # no number, or no location
        raise BadInput(f"{wanted} in another file, found: {error}; export it again") from None
    wanted += f" in {given}"
    if given.is_absolute() or given.drive or ".." in given.parts:
        raise BadInput(
            f"{wanted}, found that this leads out of the model's folder; put the data beside the"
            " model and export it again"
        )
    file = path.parent / given
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):  # no such file, or links in a circle
        real = None
    if real is None:
        kind = "a link to no file" if file.is_symlink() else "no such file"
        raise BadInput(f"{wanted}, found {kind}; put it beside the model")
    own = path.parent.resolve()
    if real != own / given and real.parent not in (own, path.resolve().parent):
        raise BadInput(
            f"{wanted}, found a link that leads out of the model's folder, to {real}; put a copy"
            " there instead"
        )
    if not real.is_file():
        kind = "a folder" if real.is_dir() else "no regular file"
        raise BadInput(f"{wanted}, found {kind}; put the file with the data there")
    if real.stat().st_nlink > 1:
        raise BadInput(
            f"{wanted}, found a hard link, which may be another's file; put a copy there instead"
        )
    return real
