"""Model files: refuse a bad one before anything works on it, write a good one whole or not at all.

Nothing else catches every bad file (an empty file passes ``onnx.load``, truncated external data
passes ``onnx.checker``), so `check` asks each in turn and ends with the runtime itself.
"""

import stat
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.external_data_helper import ExternalDataInfo

from helpers import graph
from helpers.errors import BadInput
from helpers.files.opening import Contents, Opened
from helpers.files.refusals import lacking, refused
from helpers.files.sessions import give_back
from helpers.graph import external

PROTOBUF = 2**31 - 1  # bytes of a file that protobuf reads


def check(path: str | Path, *, notes: list[str] | None = None) -> Path:
    """Return `path`, absolute, if ONNX Runtime can run the model there; else raise `BadInput`.

    With `notes`, a model that is valid ONNX and that ONNX Runtime cannot run on the CPU is no
    error: the reason is added there. ONNX Runtime decides, and not onnx's checker, which refuses
    some of what it runs (nodes that are not sorted, an output without a shape).
    """
    return checked(path, notes=notes).path


def checked(path: str | Path, *, notes: list[str] | None = None) -> Opened:
    """What `check` has read of the model at `path`, to be handed on."""
    opened = Opened(path)
    proto = _parsed(opened.path)
    data = _checked_data(opened.path, proto)
    try:
        opened.contents = Contents.of(proto, data)
        del proto  # the session reads the file again
        give_back(opened.path.stat().st_size)
        opened.session(optimise=False)
    except Exception as error:  # each library raises its own types; all mean that it does not load
        why = lacking(opened.path, error)
        if notes is None or not why:
            raise refused(opened.path, error) from None
        notes.append(f"ONNX Runtime {ort.__version__} does not run it on the CPU: {why}")
    graph.inline(opened.model)
    return opened


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


def _checked_data(path: Path, model: onnx.ModelProto) -> set[Path]:
    """The files with the external data of the model at `path`, without links.

    Raises `BadInput` where it is not whole, or elsewhere than `external.place` allows.
    """
    locations = set()
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
        locations.add(file)
    return locations
