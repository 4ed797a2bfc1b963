"""What a contender's own process loads: a model, as a function from input to output arrays by name.

A loader takes what JSON can carry. Its threads are those of ``OMP_NUM_THREADS``, which the process
is started with. The function may have an attribute `operators`: how often each operator occurs in
the graph that the runtime made of the file, known once it has run.
"""

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from helpers import files

Arrays = dict[str, np.ndarray]
Model = Callable[[Arrays], Arrays]


def threads() -> int:
    """How many threads this process was given for one operator."""
    return int(os.environ["OMP_NUM_THREADS"])


def onnxruntime(path: str) -> Model:
    """The file at `path` on ONNX Runtime's CPU provider."""
    recorded, events = profiled(path)

    def model(arrays: Arrays) -> Arrays:
        outputs = recorded(arrays)
        if model.operators is None:  # the profiler ends with the first run
            seen = {(e["name"], e["args"]["node_index"], e["args"]["op_name"]) for e in events()}
            model.operators = Counter(operator for *_, operator in seen)
        return outputs

    model.operators = None
    return model


def profiled(path: str) -> tuple[Model, Callable[[], list[dict]]]:
    """The file at `path` on ONNX Runtime with its profiler on, and what ends that.

    What ends it gives the events of the operators that ran, as in ONNX Runtime's own profile (times
    in microseconds); a "run" added to each counts from 0. Later runs are not recorded. Raises
    RuntimeError if the session is on another provider than the CPU's.
    """
    folder = tempfile.TemporaryDirectory()
    session = files.session(path, threads=threads(), profile_prefix=f"{folder.name}/profile")
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise RuntimeError(f"expected the CPU provider alone, found {session.get_providers()}")
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def model(arrays: Arrays) -> Arrays:
        results = session.run(outputs, {name: arrays[name] for name in inputs if name in arrays})
        return dict(zip(outputs, results, strict=True))

    def events() -> list[dict]:
        recorded = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        folder.cleanup()
        starts = sorted(event["ts"] for event in recorded if event["name"] == "model_run")
        return [
            event | {"run": int(np.searchsorted(starts, event["ts"], side="right")) - 1}
            for event in recorded
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        ]

    return model, events


def openvino(path: str, int8: bool) -> Model:
    """The file at `path` on OpenVINO's CPU plugin; with `int8`, NNCF's 8-bit weights.

    Computes in fp32 where it is not int8: left alone, the plugin takes bf16 where the CPU has it.
    """
    import openvino

    core = openvino.Core()
    read = core.read_model(path)
    if int8:
        os.environ["NNCF_CI"] = "1"  # turns off its telemetry
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        read = nncf.compress_weights(read, mode=nncf.CompressWeightsMode.INT8_SYM)
    settings = {
        "INFERENCE_NUM_THREADS": threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(read, "CPU", settings)
    request = compiled.create_infer_request()
    names = [value.get_any_name() for value in compiled.inputs]

    def model(arrays: Arrays) -> Arrays:
        results = request.infer(
            {name: arrays[name] for name in names}
        )  # it takes zeros if one lacks
        return {value.get_any_name(): array for value, array in results.items()}

    ran = (
        node.get_rt_info()["layerType"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
    )
    model.operators = Counter(
        operator for operator in ran if operator not in ("Const", "Input", "Output")
    )
    return model
