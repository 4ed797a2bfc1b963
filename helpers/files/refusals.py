"""What ONNX Runtime says where it refuses a model, and in words that help."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import common as passes

from helpers import graph
from helpers.errors import BadInput
from helpers.quiet import quiet

# A place in C++ source, which the signature of a function follows.
_PLACE = re.compile(r"\S+\.(?:cc|cpp|cu|cuh|h|hpp):\d+:? ")

# What ONNX Runtime says of a model that is whole, and that it cannot run, and what is said of it:
# {kind} is an operator, {at} the name of its node.
_LACKING = {
    r"Type parameter \(\w+\) of Optype \((?P<kind>\w+)\) bound to different types"
    r" \(tensor\((?P<one>\w+)\) and tensor\((?P<two>\w+)\) in node \((?P<at>.*?)\)": (
        "{kind}{at} on {one} and {two} at once, where it takes one type; convert the model to"
        " float32, or put a Cast before it"
    ),
    r"Type 'tensor\((?P<one>\w+)\)' of input parameter \((?P<tensor>.*?)\) of operator"
    r" \((?P<kind>\w+)\) in node \((?P<at>.*?)\) is invalid": (
        "{kind}{at} on {one} ({tensor}), a type that the operator does not take; convert the model"
        " to float32"
    ),
    r"Type \(tensor\((?P<one>\w+)\)\) of output arg \((?P<tensor>.*?)\) of node \(.*?\) does not"
    r" match expected type \(tensor\((?P<two>\w+)\)\)": (
        "{tensor} declared {one}, and computed in {two}; put a Cast before it"
    ),
    r"Could not find an implementation for (?P<kind>\w+)\((?P<since>\d+)\) node with name"
    r" '(?P<at>.*?)'": "{kind}{at}{types}, for which it has no kernel{remedy}",
    r"(?P<domain>\S+):(?P<kind>\w+)\(-?\d*\) is not a registered function/op": (
        "the operator {domain}.{kind}, which is of a library that is not loaded; export it with the"
        " operators of the standard"
    ),
    r"two nodes with same node name \((?P<name>.*?)\)": (
        "more than one node of the name {name}; give each a name of its own"
    ),
}
_NAMES = {"float": "float32", "double": "float64"}  # of types, where ONNX Runtime has others
_EVERYWHERE = {ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}


def refused(path: Path, error: Exception, *, named: Path | None = None) -> BadInput:
    """What is raised where ONNX Runtime does not load the model at `path`, because of `error`; a
    draft is `named` as what it was to be."""
    wanted = f"{named or path}: expected a model that ONNX Runtime {ort.__version__} can"
    if why := lacking(path, error):
        return BadInput(f"{wanted} run on the CPU, found {why}")
    message = told(error, 700)
    try:
        onnx.checker.check_model(str(path))
    except Exception as also:  # of a damaged file, onnx's checker says more
        if "symbolic link" not in str(also):  # which it does not follow
            message = told(also, 700)
    helps = "get the file again, or look at what wrote it"
    if (
        re.search(r"\b(ir|ir_)version\b|\bopset\b", message, re.IGNORECASE)
        and "import" not in message
    ):
        helps = "export it again, for this version"
    return BadInput(f"{wanted} load, found: {message}; {helps}")


def lacking(path: Path, error: Exception) -> str:
    """What ONNX Runtime lacks for the model at `path`, which is whole, and what helps; empty where
    `error` says that it is not whole."""
    message = told(error, 10_000)
    for pattern, words in _LACKING.items():
        if match := re.search(pattern, message):
            parts = match.groupdict()
            name = parts.get("at")
            types = _types(path, parts["kind"], name) if "{types}" in words else []
            parts["remedy"] = _without_kernel(types, parts) if "{remedy}" in words else ""
            parts |= {
                group: _NAMES.get(parts[group], parts[group])
                for group in ("one", "two")
                if group in parts
            }
            parts["at"] = f" ({name})" if name else ""
            return words.format(**parts, types=f" on {' and '.join(types)}" if types else "")
    return ""


def _without_kernel(types: list[str], parts: dict[str, str]) -> str:
    """Since when an operator has no kernel, where it is none of its `types` that lack one, and
    what helps: ONNX Runtime 1.32 has RandomUniformLike up to opset 21, and none of opset 22."""
    if types:
        return "; convert the model to float32"
    since = int(parts["since"])
    try:
        onnx.defs.get_schema(parts["kind"], since - 1)
    except onnx.defs.SchemaError:  # it has no earlier version
        return "; replace it with other operators"
    return f" from opset {since} on; export it at a lower one"


def _types(path: Path, kind: str, name: str) -> list[str]:
    """The types of the nodes of that operator and name, but for those that all kernels know, if
    float32 is among them.

    Those of all nodes, where it is none of the graph's: ONNX Runtime takes operators apart.
    """
    model = graph.load(path, weights=False)
    with quiet(), suppress(Exception):  # what is known without it may be enough
        passes.ShapeInferencePass()(model)
    named = [
        node for node in graph.nodes(model) if node.op_type == kind and name in (node.name, "")
    ]
    types = {
        value.dtype
        for node in named or graph.nodes(model)
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.dtype is not None
    }
    if types - _EVERYWHERE or ir.DataType.FLOAT in types:
        types -= _EVERYWHERE
    return sorted(_NAMES.get(dtype.name.lower(), dtype.name.lower()) for dtype in types)


def told(error: object, limit: int = 300) -> str:
    """What `error`, of ONNX Runtime or another library, says: one line of at most `limit`
    characters, without its codes and the places in its C++ source."""
    message = " ".join(str(error).split())
    message = re.sub(
        r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed: ?)?", "", message
    )
    while place := _PLACE.search(message):
        message = message[: place.start()] + message[_signature_end(message, place) :].lstrip()
    message = message.strip(".; ") or type(error).__name__
    return message if len(message) <= limit else f"{message[:limit].rstrip()} …"


def raised(error: Exception) -> str:
    """The kind of `error`, and what it says, as `told` does."""
    kind = type(error).__name__
    return f"{kind}: {told(error, 1000)}" if str(error) else kind


def _signature_end(message: str, place: re.Match) -> int:
    """Where the function's signature ends that stands behind `place`, as compilers write it."""
    if "\\" in place[0]:  # Microsoft's compiler writes the name alone
        return place.end() + len(message[place.end() :].split(" ")[0])
    end = start = message.find("(", place.end())
    while start >= 0:
        depth = 0
        for end in range(start, len(message)):
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(message[end], 0)
            if not depth:
                break
        rest = message[end + 1 :]
        # ``(int)::<lambda(int)>``, ``(int) const``, ``(int) const [with T = float]``
        more = re.match(r"[^\s()\[\]][^()]*(?=\()|( const\b)? (?=\[with )| const\b", rest)
        end += 1 + (more.end() if more else 0)
        start = end if message[end : end + 1] in ("(", "[") else -1
    return max(end, place.end())
