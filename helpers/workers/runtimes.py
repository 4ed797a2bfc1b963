"""What a contender's own process loads: a model, as a function from input to output arrays by name.

A loader takes what JSON can carry. Its threads are those of ``OMP_NUM_THREADS``, which the process
is started with. The function may have attributes, known once it has run: `operators`, how often
each operator occurs in the graph that the runtime made of the file; `precision`, what the products
in it were computed in, in words; `handed_back`, those operators that the provider which was asked
for did not take.
"""

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
from onnxruntime import InferenceSession

from helpers import files
from helpers.workers import computed

Arrays = dict[str, np.ndarray]
Model = Callable[[Arrays], Arrays]

CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"


def threads() -> int:
    """How many threads this process was given for one operator."""
    return int(os.environ["OMP_NUM_THREADS"])


def onnxruntime(path: str) -> Model:
    """The file at `path` on ONNX Runtime's CPU provider."""
    recorded, events = profiled(path)

    def model(arrays: Arrays) -> Arrays:
        outputs = recorded(arrays)
        if model.operators is None:  # the profiler ends with the first run
            ran = events()
            seen = {(e["name"], e["args"]["node_index"], e["args"]["op_name"]) for e in ran}
            model.operators = Counter(operator for *_, operator in seen)
            model.precision = computed.in_words(computed.of_events(ran, path))
        return outputs

    model.operators = None
    return model


def openvino_plugin(path: str, precision: str | None = None) -> Model:
    """The file at `path` on OpenVINO's plugin for ONNX Runtime, and on the CPU for the rest.

    `precision` as in `openvino`. `operators` are those that were shared out, before ONNX Runtime
    optimised what was handed back. Raises RuntimeError where the plugin takes none.
    """
    settings = _openvino_settings(precision)
    recorded, events = profiled(path, settings)
    taken, handed_back = recorded.taken, recorded.handed_back
    if not taken:
        counts = ", ".join(f"{n} {operator}" for operator, n in _operators(handed_back).items())
        raise RuntimeError(
            f"expected nodes that OpenVINO's plugin takes, found all handed back: {counts}"
        )
    floats = computed.plugin_floats(settings)

    def model(arrays: Arrays) -> Arrays:
        outputs = recorded(arrays)
        if model.precision is None:
            counts = computed.of_plugin(path, handed_back, floats)
            model.precision = computed.in_words(counts + computed.of_events(events(), path))
        return outputs

    model.precision = None
    model.operators, model.handed_back = _operators(taken + handed_back), _operators(handed_back)
    return model


def _operators(nodes: list[tuple[str, str]]) -> Counter[str]:
    return Counter(operator for operator, _ in nodes)


def profiled(
    path: str, openvino: Mapping[str, str | int] | None = None
) -> tuple[Model, Callable[[], list[dict]]]:
    """The file at `path` on ONNX Runtime with its profiler on, and what ends that.

    What ends it gives the events of the operators that ran, as in ONNX Runtime's own profile (times
    in microseconds); a "run" added to each counts from 0. Later runs are not recorded. With
    `openvino`, on OpenVINO's plugin as `files.session` has it; operators with names of nodes that
    it has `taken` and `handed_back` are attributes of the model. Raises RuntimeError if the session
    is on another provider than these.
    """
    folder = tempfile.TemporaryDirectory()
    prefix = f"{folder.name}/profile"
    session = files.session(path, threads=threads(), profile_prefix=prefix, openvino=openvino)
    expected = [OPENVINO, CPU] if openvino is not None else [CPU]
    if session.get_providers() != expected:
        raise RuntimeError(f"expected the providers {expected}, found {session.get_providers()}")
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

    if openvino is not None:
        model.taken, model.handed_back = _shared_out(session)
    return model, events


def _shared_out(session: InferenceSession) -> list[list[tuple[str, str]]]:
    """Operators with names of nodes that another provider than the CPU's took, and the others."""
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name == CPU, node) for part in parts for node in part.get_nodes()]
    return [
        [(node.op_type, node.name) for on_cpu, node in nodes if on_cpu == wanted]
        for wanted in (False, True)
    ]


def _openvino_settings(precision: str | None) -> dict[str, str | int]:
    settings = {"INFERENCE_NUM_THREADS": threads(), "PERFORMANCE_HINT": "LATENCY"}
    return settings | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})


def nncf() -> ModuleType:
    """The package, without its telemetry and what it logs."""
    os.environ["NNCF_CI"] = "1"
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def openvino(path: str, int8: bool = False, precision: str | None = None) -> Model:
    """The file at `path` on OpenVINO's CPU plugin; with `int8`, NNCF's 8-bit weights.

    `precision` is demanded for what is not in 8 bits, in OpenVINO's own words ("f32"). Left alone,
    the plugin takes bf16 where the CPU has it.
    """
    import openvino

    core = openvino.Core()
    read = core.read_model(path)
    if int8:
        tool = nncf()
        read = tool.compress_weights(read, mode=tool.CompressWeightsMode.INT8_SYM)
    compiled = core.compile_model(read, "CPU", _openvino_settings(precision))
    request = compiled.create_infer_request()
    names = [value.get_names() for value in compiled.inputs]  # after an Identity it has two

    def model(arrays: Arrays) -> Arrays:
        # It takes zeros where an input lacks.
        given = [next(iter(known & arrays.keys()), min(known)) for known in names]
        results = request.infer({name: arrays[name] for name in given})
        return {name: array for value, array in results.items() for name in value.get_names()}

    ran = (
        node.get_rt_info()["layerType"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
    )
    model.operators = Counter(
        operator for operator in ran if operator not in ("Const", "Input", "Output")
    )
    model.precision = computed.in_words(computed.of_openvino(read, compiled))
    return model
