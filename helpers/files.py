"""Model files: refuse a bad one before anything works on it, write a good one whole or not at all.

Nothing else catches every bad file (an empty file passes ``onnx.load``, truncated external data
passes ``onnx.checker``), so `check` asks each in turn and ends with the runtime itself.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

ONE_FILE = 1_500_000_000  # bytes of weights up to which a model is one file; protobuf ends at 2 GB


class BadInput(ValueError):
    """What the user gave cannot be worked on: one line with file, expected, found, what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


def session(
    model: str | Path | bytes,
    *,
    optimise: bool = True,
    threads: int = 0,
    profile_prefix: str = "",
    folder: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU for a model: a file, or bytes with `folder` for its data.

    `optimise=False` turns off the fusions that a session makes by itself, so that what runs is what
    is in the file. `threads` is for one operator; 0 lets the runtime choose. Threads never spin
    after a run, so that a session does not slow down whatever runs next. With `profile_prefix`,
    the session writes ONNX Runtime's own profile (JSON, microseconds) under that prefix.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised: printing them as well only makes noise
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def check(path: str | Path) -> Path:
    """Return `path`, absolute, if ONNX Runtime can run the model there; else raise `BadInput`."""
    path = Path(path).absolute()
    if not path.is_file():
        raise BadInput(f"{path}: expected a model file, found none; check the path")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: expected an ONNX model, found an empty file; export it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the parser raises DecodeError, RuntimeError or ValueError
        raise BadInput(
            f"{path}: expected an ONNX model, found a file that does not parse as one"
            f" ({type(error).__name__}); export it again"
        ) from None
    if not model.opset_import or not model.graph.output:
        raise BadInput(
            f"{path}: expected an ONNX model, found a file without an opset or without outputs;"
            " export it again"
        )
    del model
    try:
        onnx.checker.check_model(str(path))
        session(path, optimise=False)
    except Exception as error:  # each library raises its own types; all mean that the file is bad
        raise BadInput(
            f"{path}: expected a model that ONNX Runtime {ort.__version__} can load,"
            f" found: {error}; export it again"
        ) from None
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Write a model file so that it appears whole or not at all.

    Yields a path in a temporary folder beside `path`: write the model there, with any external data
    beside it. On leaving, the model is checked and moved into place, its data first; if the body or
    the check raises, or the process is killed, what was at `path` before is still there.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise BadInput(f"{path}: expected an existing folder, found none; create {path.parent}")
    try:
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    except OSError as error:
        raise BadInput(
            f"{path}: expected a folder that can be written to, found: {error}; choose another"
        ) from None
    try:
        draft = folder / path.name
        yield draft
        check(draft)
        for file in sorted(folder.iterdir(), key=lambda file: file == draft):  # the model last
            file.replace(path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: ir.Model, path: str | Path) -> Path:
    """Save `model` by `writing`: one file, or above 1.5 GB with its weights in `NAME.onnx.data`.

    Returns the absolute path. ``onnx_ir.save`` is used since ``onnx.save`` looks for an old data
    file in the working directory and appends to it.
    """
    path = Path(path).absolute()
    weights = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    with writing(path) as draft:
        ir.save(model, draft, external_data=f"{path.name}.data" if weights > ONE_FILE else None)
    return path


def size(path: str | Path) -> int:
    """Bytes on disk of the model at `path`, its external data included."""
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
