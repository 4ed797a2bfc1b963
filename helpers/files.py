"""Model files: refuse a bad one before anything works on it, write a good one whole or not at all.

Nothing else catches every bad file (an empty file passes ``onnx.load``, truncated external data
passes ``onnx.checker``), so `check` asks each in turn and ends with the runtime itself.
"""

import ctypes
import errno
import gc
import re
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.external_data_helper import ExternalDataInfo

from helpers import external
from helpers.errors import BadInput
from helpers.refusals import lacking, refused
from helpers.refusals import raised as raised
from helpers.refusals import told as told

ONE_FILE = 1_500_000_000  # bytes of weights up to which a model is one file; protobuf ends at 2 GB
FOLDER = "session.model_external_initializers_file_folder_path"  # of the data, for ONNX Runtime
LARGE = 2**16  # bytes of a weight that is written by itself
SLOW = 2**26  # bytes of a file whose memory is worth the time to look for what is free
PROTOBUF = 2**31 - 1  # bytes of a file that protobuf reads
DRAFT = ".writing-"  # how the folder begins in which a file is written before it is moved
LOCK = "lock"  # the file in it that is locked by who writes there
STALE = 60  # seconds after which a folder that nobody holds is taken for left over


def session(
    model: str | Path | bytes,
    *,
    optimise: bool = True,
    threads: int = 0,
    spin: bool = False,
    profile_prefix: str = "",
    folder: Path | None = None,
    write_to: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU for a model: a file, or bytes with `folder` for its data.

    `optimise=False` turns off the fusions that a session makes by itself, so that what runs is what
    is in the file. `threads` is for one operator; 0 lets the runtime choose. Unless they `spin`,
    they rest after a run, so that a session does not slow down whatever runs next. With
    `profile_prefix`, the session writes ONNX Runtime's own profile (JSON, microseconds) there, and
    with `write_to`, the graph that it runs, which is for this machine alone.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised: printing them as well only makes noise
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if write_to is not None:
        options.optimized_model_filepath = str(write_to)
    if folder is not None:
        options.add_session_config_entry(FOLDER, str(folder))
    # With its "fallback" it prints errors that it does not know, and tries the same once more.
    choice = {"providers": ["CPUExecutionProvider"], "enable_fallback": False}
    if isinstance(model, bytes):
        return ort.InferenceSession(model, options, **choice)
    try:
        return ort.InferenceSession(str(model), options, **choice)
    except Exception as error:  # in branches and attributes it follows no link to a file of data
        if "symbolic link" not in str(error):
            raise
    proto, folder = external.read(model)
    options.add_session_config_entry(FOLDER, str(folder))
    return ort.InferenceSession(proto.SerializeToString(), options, **choice)


def give_back() -> None:
    """Give the memory that this process has freed back to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


def check(path: str | Path, *, notes: list[str] | None = None) -> Path:
    """Return `path`, absolute, if ONNX Runtime can run the model there; else raise `BadInput`.

    With `notes`, a model that is valid ONNX and that ONNX Runtime cannot run on the CPU is no
    error: the reason is added there. ONNX Runtime decides, and not onnx's checker, which refuses
    some of what it runs (nodes that are not sorted, an output without a shape).
    """
    path = Path(path).absolute()
    model = _parsed(path)
    _check_external(path, model)
    try:
        ir.from_proto(model)
        del model  # the session reads the file again
        if path.stat().st_size > SLOW:
            gc.collect()  # models are in cycles
            give_back()
        session(path, optimise=False)
    except Exception as error:  # each library raises its own types; all mean that it does not load
        why = lacking(path, error)
        if notes is None or not why:
            raise refused(path, error) from None
        notes.append(f"ONNX Runtime {ort.__version__} does not run it on the CPU: {why}")
    return path


def _parsed(path: Path) -> onnx.ModelProto:
    """The model at `path` without its external data, or `BadInput`."""
    wanted = f"{path}: expected an ONNX model, found"
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadInput(f"{wanted} a folder; name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{wanted} no regular file; copy it to one")
        if status.st_size == 0:
            raise BadInput(f"{wanted} an empty file; export it again")
        with path.open("rb") as file:
            start = file.read(1024)
        if kind := _other(start):
            raise BadInput(f"{wanted} {kind}")
        if status.st_size > PROTOBUF:
            raise BadInput(
                f"{wanted} {status.st_size} bytes, more than protobuf reads (2 GB); export it"
                " again, with its weights as external data"
            )
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: expected a model file, found none; check the path") from None
    except OSError as error:
        raise BadInput(f"{wanted} a file that cannot be read: {error}; check it") from None
    except Exception as error:  # DecodeError, RuntimeError, ValueError, …
        raise BadInput(
            f"{wanted} a file that is truncated or damaged ({type(error).__name__}); get it or"
            " export it again"
        ) from None
    if not model.opset_import or not model.graph.output:
        raise BadInput(f"{wanted} a file without an opset or without outputs; export it again")
    return model


def _other(start: bytes) -> str:
    """What a file is that begins with `start`, and what to do, if it is no protobuf; else empty."""
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself: git lfs pull"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive (as PyTorch saves); unpack it, or export the model to ONNX"
    if start[8:10] == b'{"':
        return "a safetensors file; export the model to ONNX"
    if start[4:8] == b"ORTM":
        return (
            "a model in ONNX Runtime's own format (ORT), which holds no ONNX graph; name the .onnx"
            " file that it was made from"
        )
    if b"\0" not in start and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        return "a text file; name the .onnx file, or download it again"
    return ""


def _check_external(path: Path, model: onnx.ModelProto) -> None:
    """Raise `BadInput` where the external data of the model at `path` is not whole, or elsewhere
    than `external.place` allows."""
    for tensor in external.tensors(model):
        file = external.place(path, tensor)
        wanted = f"{path}: expected the values of {tensor.name or 'a tensor'}"
        try:
            data = ExternalDataInfo(tensor)
            offset, length = data.offset or 0, data.length
            count = ir.from_proto(tensor).nbytes
        except Exception as error:  # no number, or a type that is none
            raise BadInput(f"{wanted} in another file, found: {error}; export it again") from None
        size = file.stat().st_size
        if length not in (None, count) or not 0 <= offset <= offset + count <= size:
            raise BadInput(
                f"{wanted} in {data.location}, {count} bytes from {offset}, found {size} bytes and"
                f" a length of {length if length is not None else 'none'}: truncated, or not this"
                " model's; get the file again, or export it again"
            )


def size(path: str | Path) -> int:
    """Bytes on disk of the model at `path`, its external data included."""
    return sum(file.stat().st_size for file in {Path(path).absolute(), *data(path)})


def data(path: str | Path) -> set[Path]:
    """The files that hold the external data of the model at `path`; links are followed."""
    model, folder = external.read(path)
    return {folder / external.location(tensor) for tensor in external.tensors(model)}


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields a path in a temporary folder beside `path` to write to; on leaving, the file is moved
    into place. If the body raises or the process is killed, what was at `path` before is still
    there. Raises `BadInput` on a folder that is missing or cannot be written to, or a full disk.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise BadInput(f"{path}: expected a file to write, found a folder; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: expected an existing folder, found none; create {path.parent}")
    try:
        with scratch(path) as draft:
            yield draft
            draft.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BadInput(
            f"{path}: expected room for the file, found: {error.strerror}; make room, or choose"
            " another folder"
        ) from None


def put(path: Path, name: str, text: str) -> None:
    """Put `text` into the page at `path`, between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = path.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    with replacing(path) as draft:
        draft.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


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
    checked. Its data gets a name that nothing has, and is there before the model is, so that at no
    moment a model is beside data of another; the old model's data goes last, but for what another
    model still needs: the files to `keep`, without links.
    """
    path = Path(path).absolute()
    moved: list[Path] = []
    try:
        with replacing(path) as draft:
            yield draft
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
    external.bring_in(model, up_to=LARGE)  # what is larger is copied as it is written
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
        and value.const_value.nbytes > LARGE
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
    proto.ClearField("graph")
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
        file.write(proto.SerializeToString())
        file.write(_key(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + size))
        file.write(graph)
        for head, value in zip(heads, large, strict=True):
            file.write(head)
            file.write(value.const_value.tobytes())


def _key(field: int, length: int) -> bytes:
    """What comes before a field of bytes, or a message, in protobuf: its number and its length."""
    found = bytearray([field << 3 | 2])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length])


def save(model: ir.Model, path: str | Path, *, keep: Collection[Path] = ()) -> Path:
    """Save `model` by `writing`, as `write` does; returns the absolute path."""
    path = Path(path).absolute()
    with writing(path, keep=keep) as draft:
        write(model, draft)
    return path
