"""Write a model file, or another, so that it appears whole or not at all."""

import errno
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import onnx
import onnx_ir as ir

from helpers.errors import BadInput
from helpers.files.refusals import refused
from helpers.files.sessions import session
from helpers.graph import external

ONE_FILE = 1_500_000_000  # bytes of weights up to which a model is one file; protobuf ends at 2 GB

DRAFT = ".writing-"  # how the folder begins in which a file is written before it is moved

LOCK = "lock"  # the file in it that is locked by who writes there

WRITTEN_ALONE_ABOVE = 2**16  # bytes of a weight that is written by itself
STALE = 60  # seconds after which a folder that nobody holds is taken for left over


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields a path in a temporary folder beside `path` to write to; on leaving, the file is moved
    into place. If the body raises, or removes the file again, or the process is killed, what was at
    `path` before is still there. Raises `BadInput` on a folder that is missing or cannot be written
    to, or a full disk.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise BadInput(f"{path}: expected a file to write, found a folder; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: expected an existing folder, found none; create {path.parent}")
    try:
        with scratch(path) as draft:
            yield draft
            if draft.exists():
                draft.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BadInput(
            f"{path}: expected room for the file, found: {error.strerror}; make room, or choose"
            " another folder"
        ) from None


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A path of the name of `path` in a temporary folder beside it, which is gone afterwards.

    Raises `BadInput` on a folder that cannot be written to.
    """
    _remove_left_over(path.parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=DRAFT, dir=path.parent))
    except OSError as error:
        raise BadInput(
            f"{path}: expected a folder that can be written to, found: {error.strerror}; choose"
            " another"
        ) from None
    inside = folder / "files"  # and the lock beside it: what is written may be many files
    try:
        with _lock(folder):  # until this process ends, however it does
            inside.mkdir()
            yield inside / path.name
    finally:  # once it is free: Windows removes no file that is open
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, timeout: float = -1) -> AbstractContextManager:
    with warnings.catch_warnings(action="ignore"):  # that its lock is not the system's, if so
        from filelock import FileLock
    return FileLock(folder / LOCK, timeout)


def _remove_left_over(parent: Path) -> None:
    """Remove what writes that were killed have left in `parent`."""
    for folder in parent.glob(f"{DRAFT}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE:
                with _lock(folder, timeout=0):  # raises TimeoutError while one writes there
                    pass
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: str | Path, *, keep: Collection[Path] = ()) -> Iterator[Path]:
    """Write a model file by `replacing`, its external data included.

    Yields a path to write the model to, with any external data beside it. On leaving, the model is
    checked, unless the body has removed it again: then nothing is written. Its data gets a name
    that nothing has, and is there before the model is, so that at no moment a model is beside data
    of another; the old model's data goes last, but for what another model still needs: the files to
    `keep`, without links.
    """
    path = Path(path).absolute()
    moved: list[Path] = []
    try:
        with replacing(path) as draft:
            yield draft
            if not draft.exists():
                return
            try:
                session(draft, optimise=False)
            except Exception as error:
                raise refused(draft, error, named=path) from None
            if len(list(draft.parent.iterdir())) > 1:
                _move_data(draft, path, moved)
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
    ours = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.\d+\.data")
    for file in path.parent.iterdir():
        if ours.fullmatch(file.name) and file not in moved and file.resolve() not in keep:
            file.unlink()


def _move_data(draft: Path, path: Path, moved: list[Path]) -> None:
    """Move the external data of `draft` beside `path`, under new names, added to `moved`."""
    model = onnx.load(draft, load_external_data=False)
    token, names = secrets.token_hex(4), {}
    for tensor in external.tensors(model):
        new = f"{path.name}.{token}.{len(names)}.data"
        new = names.setdefault(external.location(tensor), new)
        external.set_location(tensor, new)
    for old, new in names.items():
        moved.append(path.parent / new)
        (draft.parent / old).replace(path.parent / new)
    draft.write_bytes(model.SerializeToString())


def write(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`: one file, or above 1.5 GB with its weights in a file beside it.

    ``onnx_ir.save`` is used for the latter since ``onnx.save`` looks for an old data file in the
    working directory and appends to it. Into one file weights are written one at a time: any
    library would hold all of them three times.
    """
    weights = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    external.bring_in(model, up_to=WRITTEN_ALONE_ABOVE)  # what is larger is copied as it is written
    if weights > ONE_FILE:
        ir.save(model, path, external_data="weights.data")
    else:
        _write_one(model, path)


def _write_one(model: ir.Model, path: Path) -> None:
    """As protobuf serialises a ModelProto, with the graph's large initializers at its end."""
    initializers = model.graph.initializers
    large = [
        value
        for value in initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes > WRITTEN_ALONE_ABOVE
        and value.dtype != ir.DataType.STRING
    ]
    for value in large:
        del initializers[value.name]
    try:
        proto = ir.to_proto(model)
    finally:
        for value in large:
            initializers.add(value)
    graph = proto.graph.SerializeToString()
    before, behind = _around_graph(proto)
    heads = []
    for value in large:
        tensor = value.const_value
        dims, kind = tensor.shape.numpy(), tensor.dtype
        head = onnx.TensorProto(name=value.name, dims=dims, data_type=kind).SerializeToString()
        head += _key(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
        heads.append(
            _key(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + tensor.nbytes) + head
        )
    size = sum(
        len(head) + value.const_value.nbytes for head, value in zip(heads, large, strict=True)
    )
    with path.open("wb") as file:
        file.write(before)
        file.write(_key(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + size))
        file.write(graph)
        for head, value in zip(heads, large, strict=True):
            file.write(head)
            file.write(value.const_value.tobytes())
        file.write(behind)


def _around_graph(proto: onnx.ModelProto) -> tuple[bytes, bytes]:
    """The fields of `proto` before and behind its graph, which it loses, in order of their numbers:
    OpenVINO takes no other file for one of ONNX."""
    proto.ClearField("graph")
    behind = onnx.ModelProto.FromString(proto.SerializeToString())
    for field, _ in behind.ListFields():
        later = field.number > onnx.ModelProto.GRAPH_FIELD_NUMBER
        (proto if later else behind).ClearField(field.name)
    return proto.SerializeToString(), behind.SerializeToString()


def _key(field: int, length: int) -> bytes:
    """What comes before a field of bytes, or a message, in protobuf: its number and its length."""
    encoded = bytearray([field << 3 | 2])
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    return bytes([*encoded, length])


def save(model: ir.Model, path: str | Path, *, keep: Collection[Path] = ()) -> Path:
    """Save `model` by `writing`, as `write` does; returns the absolute path."""
    path = Path(path).absolute()
    with writing(path, keep=keep) as draft:
        write(model, draft)
    return path
