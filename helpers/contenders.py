"""Contenders of a benchmark, each ready to name in one line, and the look that each keeps.

What makes a graph (onnxscript, transformers, quantisation) writes a file beside the one that it is
made from. What cannot be made is a contender with a reason, a row of the table like the others.
"""

import dataclasses
import logging
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from helpers import files, graph
from helpers.quiet import quiet
from helpers.workers import runtimes

logger = logging.getLogger(__name__)

Feeds = Sequence[Mapping[str, np.ndarray]]

AGAIN = ", again"  # how the label of a contender ends that runs a second time


class Look(NamedTuple):
    """How a kind of contender is drawn: `filled` markers are fp32 as it comes, hollow ones what may
    be less precise, or is compiled."""

    colour: str
    marker: str
    filled: bool = True


# By kind of contender, the same in every notebook: Okabe and Ito's colours, told apart by the
# colour-blind, and markers, told apart in black and white.
LOOKS = {
    "pytorch": Look("#000000", "o"),
    "compiled": Look("#000000", "o", filled=False),
    "pytorch-bf16": Look("#000000", "p", filled=False),
    "compiled-bf16": Look("#000000", "*", filled=False),
    "unfused": Look("#E69F00", "s"),
    "stock": Look("#56B4E9", "^"),
    "static-int8": Look("#56B4E9", "^", filled=False),
    "dynamic-int8": Look("#56B4E9", ">", filled=False),
    "onnxscript": Look("#0072B2", "v"),
    "transformers": Look("#0072B2", "<"),
    "opset23": Look("#009E73", "D"),
    "openvino": Look("#CC79A7", "X"),
    "openvino-int8": Look("#CC79A7", "X", filled=False),
    "openvino-default": Look("#CC79A7", "h", filled=False),
    "openvino-static-int8": Look("#CC79A7", "v", filled=False),
    "plugin": Look("#CC79A7", "d"),
    "plugin-default": Look("#CC79A7", "s", filled=False),
    "ours": Look("#D55E00", "P"),
    "lifted": Look("#D55E00", "*"),
    "lifted-shared": Look("#D55E00", ">"),
    "part": Look("#999999", "."),  # computes something else, to see what the rest costs
    "ours-int8": Look("#D55E00", "P", filled=False),
    "in-place": Look("#D55E00", "h"),
    "ours-int4": Look("#D55E00", "x", filled=False),
    "ours-int8-tensor": Look("#D55E00", "d", filled=False),
    "ours-openvino": Look("#D55E00", "D", filled=False),
    "ours-plugin": Look("#D55E00", "<", filled=False),
    "ours-openvino-int8": Look("#D55E00", "8", filled=False),
    "ours-plugin-int8": Look("#D55E00", "H", filled=False),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """What takes part: what `factory` makes, in a process of its own.

    `factory` is ``"module:function"``; it is called with `arguments` (values that JSON can carry)
    and returns a function from input arrays to output arrays, both dicts by name. `path` is the
    file that is run, if there is one. `kind` is a key of `LOOKS`, else ValueError. With `reason`
    there is nothing to run: it says why.
    """

    label: str
    kind: str
    factory: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in LOOKS:
            raise ValueError(f"kind: expected one of {', '.join(LOOKS)}, found {self.kind}")


def again(contender: Contender) -> Contender:
    """The same once more: what two runs of it differ by is no difference."""
    return dataclasses.replace(contender, label=contender.label + AGAIN)


def pytorch(label: str, factory: str, /, **arguments: Any) -> Contender:
    """PyTorch, as `factory` makes it: ``pytorch("eager", "helpers.models:pytorch", name=…)``.

    With ``compiled=True`` among the arguments, that factory applies ``torch.compile``, and with
    ``bf16="autocast"`` or ``"weights"`` it computes in bf16.
    """
    kind = "compiled" if arguments.get("compiled") else "pytorch"
    kind += "-bf16" if arguments.get("bf16") else ""
    return Contender(label, kind, factory, arguments)


def onnx(label: str, path: str | Path, kind: str = "ours") -> Contender:
    """The model file at `path`, on ONNX Runtime's CPU provider."""
    path = Path(path).absolute()
    return Contender(label, kind, "helpers.workers.runtimes:onnxruntime", {"path": str(path)}, path)


def decoder(label: str, path: str | Path, kind: str = "ours") -> Contender:
    """The decoder at `path`, with its caches: it is timed on what `helpers.generate.timing` has."""
    path = Path(path).absolute()
    return Contender(label, kind, "helpers.generate.timing:onnx", {"path": str(path)}, path)


def generating(
    label: str, name: str, kind: str, options: Mapping[str, Any] | None = None, **paths: str | Path
) -> Contender:
    """`generate`, with `options`, of the model `name` of `helpers.models`, in PyTorch, or by its
    files: `decode`, and of an encoder-decoder `prefill` and `encoder`."""
    files_ = {part: str(Path(path).absolute()) for part, path in paths.items()}
    arguments = {"name": name, **files_, **(options or {})}
    return Contender(label, kind, "helpers.generate.timing:generating", arguments)


def openvino(
    label: str,
    path: str | Path,
    *,
    precision: str | None = "f32",
    int8: bool = False,
    kind: str = "",
) -> Contender:
    """The model file at `path` on OpenVINO's CPU plugin, computing in `precision`.

    That is in OpenVINO's words ("f32", "bf16"); None is OpenVINO as it comes, which takes bf16
    where the CPU has it. With `int8`, NNCF makes the weights 8-bit (symmetric, per channel) when it
    is loaded, and the plugin may quantise the inputs of products as it runs; the table says what
    was computed in. Both packages are optional; where they are not installed, the row says so.
    """
    path = Path(path).absolute()
    kind = kind or ("openvino-int8" if int8 else _by_precision("openvino", precision))
    arguments = {"path": str(path), "int8": int8, "precision": precision}
    return Contender(label, kind, "helpers.workers.runtimes:openvino", arguments, path)


def openvino_plugin(
    label: str, path: str | Path, *, precision: str | None = "f32", kind: str = ""
) -> Contender:
    """The model file at `path` on ONNX Runtime with OpenVINO's plugin, `precision` as `openvino`'s.

    What the plugin does not take, the CPU provider computes: the column "handed back" of the table
    has it. The package onnxruntime-ep-openvino is optional; where it is missing, the row says so.
    """
    path = Path(path).absolute()
    arguments = {"path": str(path), "precision": precision}
    factory = "helpers.workers.runtimes:openvino_plugin"
    return Contender(label, kind or _by_precision("plugin", precision), factory, arguments, path)


def _by_precision(kind: str, precision: str | None) -> str:
    return kind if precision == "f32" else f"{kind}-default"


def stock(
    label: str,
    path: str | Path,
    model_type: str,
    *,
    num_heads: int = 0,
    hidden_size: int = 0,
    opt_level: int | None = None,
    raw_mask: bool = False,
) -> Contender:
    """What ONNX Runtime's own transformers optimizer makes of the graph at `path`.

    With `raw_mask`, its Attention takes the mask as it is. BERT's becomes the number of keys of
    each sample by default, which is wrong where padding is on the left.
    """

    def make(target: Path) -> None:
        from onnxruntime.transformers import optimizer

        options = optimizer.FusionOptions(model_type)
        if raw_mask:
            options.use_raw_attention_mask()
        optimised = optimizer.optimize_model(
            str(path), model_type, num_heads, hidden_size, options, opt_level
        )
        with files.writing(target) as draft:
            optimised.save_model_to_file(str(draft))

    return _made(label, "stock", path, make, "_raw" if raw_mask else "")


def onnxscript(label: str, path: str | Path) -> Contender:
    """What onnxscript's ``optimize_for_ort`` makes of the graph at `path`."""

    def make(target: Path) -> None:
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        model = ir.load(Path(path).absolute())
        optimize_for_ort(model)
        files.save(model, target)

    return _made(label, "onnxscript", path, make)


def transformers(label: str, path: str | Path) -> Contender:
    """What transformers' exporter makes with ``ort_fusions="cpu"``, of its own export at `path`.

    The exporter applies these fusions last, to the graph that it would give without them.
    """

    def make(target: Path) -> None:
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

        model = ir.load(Path(path).absolute())
        fuse_for_onnxruntime(model, "cpu")
        files.save(model, target)

    return _made(label, "transformers", path, make)


def fused(label: str, path: str | Path, *, target: str = "cpu") -> Contender:
    """What `helpers.fuse` makes of the graph at `path` for `target`, on ONNX Runtime."""

    def make(draft: Path) -> None:
        from helpers import fuse

        result = fuse.fuse(path, draft, target=target)
        if not result.held:
            raise ValueError(f"expected parity, found {result}")

    return _made(label, "ours", path, make, "" if target == "cpu" else f"_{target}")


def quantized(
    label: str,
    path: str | Path,
    *,
    target: str = "cpu",
    inputs: str | Path | None = None,
    bound: float | None = None,
) -> Contender:
    """The graph at `path` in 8 bits, as `helpers.quantize` makes it for `target`, on ONNX Runtime.

    `inputs` is the file of samples to calibrate on, if there is one, and `bound` the error up to
    which it is taken, if that is not the default.
    """

    def make(out: Path) -> None:
        from helpers import quantize

        result = quantize.quantize(path, out, target=target, inputs=inputs, bound=bound)
        logger.info(f"{label}: {result}")
        if not result.held:
            chosen = result.chosen
            raise ValueError(
                f"expected an error of {result.bound:g} or less, found {chosen.error:.2f} at the"
                f" least ({chosen.method})"
            )

    setting = f"_{target}_{'calibrated' if inputs else 'alone'}{bound or ''}"
    return _made(label, "ours-int8", path, make, setting)


def int8(label: str, path: str | Path, *, per_channel: bool = True) -> Contender:
    """The graph at `path` with its products by weights in 8 bits, on ONNX Runtime.

    ONNX Runtime's dynamic quantisation, by `helpers.quantize`: weights have a scale for each
    column, or one for all of them without `per_channel`; inputs are quantised as it runs.
    """

    def make(target: Path) -> None:
        from helpers import quantize

        with files.writing(target) as draft:
            quantize.dynamic(path, draft, per_channel=per_channel)

    return _made(label, "ours-int8" if per_channel else "ours-int8-tensor", path, make)


def dynamic_int8(label: str, path: str | Path, **options: Any) -> Contender:
    """The graph at `path` in dynamic 8 bits, on ONNX Runtime: what a plain call of its own
    ``quantize_dynamic`` gives, whose defaults hold but for the `options`."""

    def make(target: Path) -> None:
        from onnxruntime import quantization

        with files.writing(target) as draft:
            quantization.quantize_dynamic(str(path), str(draft), **options)

    return _made(label, "dynamic-int8", path, make, "".join(f"_{name}" for name in options))


def static_int8(label: str, path: str | Path, feeds: Feeds, **options: Any) -> Contender:
    """The graph at `path` in 8 bits, calibrated on `feeds`, on ONNX Runtime.

    ONNX Runtime's static quantisation after its own preparation, in the form of QuantizeLinear and
    DequantizeLinear. `feeds` are inputs by name, one run each; `options` those of its
    ``quantize_static``, whose defaults hold.
    """

    def make(target: Path) -> None:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(known)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.left, None)

        known = _known(path, feeds)
        with tempfile.TemporaryDirectory() as folder, files.writing(target) as draft:
            prepared = str(Path(folder) / "prepared.onnx")
            # Its symbolic shape inference raises on most graphs with dynamic axes.
            quant_pre_process(str(path), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(prepared, str(draft), Reader(), **options)

    return _made(label, "static-int8", path, make, "".join(f"_{name}" for name in options))


def openvino_static_int8(
    label: str, path: str | Path, feeds: Feeds, *, precision: str | None = "f32", **options: Any
) -> Contender:
    """The graph at `path` in 8 bits, calibrated on `feeds`, on OpenVINO's CPU plugin.

    What NNCF's ``quantize`` makes of it as of a Transformer, in OpenVINO's own format; `options`
    are that function's. `precision` is for what is not in 8 bits, as `openvino`'s.
    """

    def make(target: Path) -> None:
        nncf = runtimes.nncf()
        import openvino

        known = _known(path, feeds)
        asked = {"model_type": nncf.ModelType.TRANSFORMER} | options
        model = nncf.quantize(openvino.Core().read_model(path), nncf.Dataset(known), **asked)
        with files.replacing(target) as draft:
            openvino.save_model(model, draft, compress_to_fp16=False)
            draft.with_suffix(".bin").replace(target.with_suffix(".bin"))

    setting = "".join(f"_{name}" for name in options)
    return _made(label, "openvino-static-int8", path, make, setting, precision=precision)


def _known(path: str | Path, feeds: Feeds) -> list[dict[str, np.ndarray]]:
    """The inputs that the graph at `path` knows, of each of the `feeds`."""
    names = [value.name for value in graph.load(path, weights=False).graph.inputs]
    return [{name: feed[name] for name in names if name in feed} for feed in feeds]


def _made(
    label: str,
    kind: str,
    source: str | Path,
    make: Callable[[Path], None],
    setting: str = "",
    **openvino_options: Any,
) -> Contender:
    """The file that `make` writes, as a contender; or the reason why there is none.

    With `openvino_options`, the file is in OpenVINO's format, and runs there.
    """
    source = Path(source).absolute()
    target = source.with_stem(f"{source.stem}_{kind}{setting}")
    if openvino_options:
        target = target.with_suffix(".xml")
    logger.info(f"making {target.name} …")
    try:
        with quiet():
            make(target)
    except Exception as error:  # whatever a tool raises is the reason why there is no file
        folder = rf"{re.escape(str(source.parent))}[/\\](\.writing-[^/\\]+[/\\]files[/\\])?"
        message = re.sub(folder, "", files.told(error, 10_000))
        message = textwrap.shorten(f"{type(error).__name__}: {message}", 240, placeholder=" …")
        return Contender(label, kind, reason=message)
    if openvino_options:
        return openvino(label, target, kind=kind, **openvino_options)
    return onnx(label, target, kind)
