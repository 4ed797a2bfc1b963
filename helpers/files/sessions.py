"""Sessions of ONNX Runtime, and the memory that they leave."""

import ctypes
import functools
import gc
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import onnxruntime as ort

from helpers.graph import external

WORTH_COLLECTING = 2**24  # bytes that are worth looking for: it takes a third of a second

FOLDER = "session.model_external_initializers_file_folder_path"  # of the data, for ONNX Runtime


def session(
    model: str | Path | bytes,
    *,
    optimise: bool = True,
    threads: int = 0,
    spin: bool = False,
    profile_prefix: str = "",
    folder: Path | None = None,
    write_to: Path | None = None,
    openvino: Mapping[str, str | int] | None = None,
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
    if openvino is not None:
        _put_on_openvino(options, openvino)
        del choice["providers"]  # they are in the options
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


def _put_on_openvino(options: ort.SessionOptions, properties: Mapping[str, str | int]) -> None:
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    config = {"load_config": json.dumps({"CPU": dict(properties)})}
    options.add_provider_for_devices([_openvino_device()], config)


def _openvino_device() -> ort.OrtEpDevice:
    """The CPU, as OpenVINO's plugin for ONNX Runtime offers it (its package's own example)."""
    import onnxruntime_ep_openvino as plugin

    def offered() -> list[ort.OrtEpDevice]:
        return [one for one in ort.get_ep_devices() if one.ep_name == plugin.get_ep_name()]

    if not offered():
        _register(plugin.get_library_path())
    found = {one.ep_metadata.get("ov_device"): one for one in offered()}
    if "CPU" not in found:
        raise RuntimeError(f"OpenVINO's plugin: expected a CPU that it runs on, found {[*found]}")
    return found["CPU"]


@functools.cache
def _register(library: str) -> None:
    """Once in a process: ONNX Runtime refuses it a second time, also where it offers no device."""
    ort.register_execution_provider_library("openvino", library)


def give_back(dropped: float = 0) -> None:
    """Give the memory of a model of `dropped` bytes, which nothing refers to any more, back to the
    system, where the C library can. Models are in cycles; of a small one, these are left to Python.
    """
    if dropped > WORTH_COLLECTING:
        gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
