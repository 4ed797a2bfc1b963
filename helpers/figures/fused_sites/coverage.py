"""Which fuser fuses which attention: sites by architecture and route, wrong results counting 0.

A cell is one architecture exported by one route. Each fuser gets the exported file; what it makes
is loaded and compared with that file, padding and several shapes included (`helpers.parity`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers import contenders, export, feeds, files, fuse, graph, parity
from helpers.models.small import ARCHITECTURES
from helpers.quiet import quiet

# How a cell is exported: the route, and the attention implementation.
ROUTES = {
    "TorchScript, eager": ("torchscript", "eager"),
    "TorchScript, SDPA": ("torchscript", "sdpa"),
    "dynamo": ("dynamo", "sdpa"),
    "opset 23": ("opset23", "sdpa"),
}
# ONNX Runtime's optimizer: a model type for each of its classes that fuses attention, and levels.
MODEL_TYPES = ("bert", "bart", "clip", "t5", "gpt2", "vit", "conformer")
LEVELS = (0, 1, 2)
FUSERS = ("ONNX Runtime", "onnxscript", "transformers", "helpers.fuse")
WRONG, FAILED, NONE = "wrong", "fails", "no export"  # marks; none of them counts a site


@dataclasses.dataclass(frozen=True)
class Result:
    """What a fuser makes of one cell: `fused` of `sites` sites, 0 with a `mark`, for a `reason`."""

    architecture: str
    route: str
    sites: int
    fuser: str
    fused: int
    mark: str = ""
    reason: str = ""


def run(architecture: str, route: str, folder: Path) -> Iterator[Result]:
    """Export one cell into `folder`, and give what each of `FUSERS` makes of it."""
    small = ARCHITECTURES[architecture]
    exporter, attention = ROUTES[route]
    path = folder / f"{architecture}-{exporter}-{attention}.onnx".replace(" ", "-")
    try:
        with quiet():
            export.export(small.make(attention), small.inputs(), path, exporter)
    except Exception as error:  # whatever an exporter raises
        reason = f"{type(error).__name__}: {files.told(error, 200)}"
        for fuser in FUSERS:
            yield Result(architecture, route, small.sites, fuser, 0, NONE, reason)
        return
    makers: dict[str, Callable[[Path], tuple[int, str, str]]] = {
        "ONNX Runtime": _best_stock,
        "onnxscript": _onnxscript,
        "transformers": _transformers,
        "helpers.fuse": _ours,
    }
    for fuser, make in makers.items():
        yield Result(architecture, route, small.sites, fuser, *make(path))


def judge(path: Path, fused_path: Path) -> tuple[int, str, str]:
    """How many sites `fused_path` has fused of those at `path`; 0 with a mark where it is wrong.

    A graph that ONNX Runtime refuses on some inputs, as it does rotary models at opset 23, is
    compared row by row where one row runs.
    """
    try:
        files.check(fused_path)
        with quiet():
            cases, description = feeds.infer(path)
            candidate = parity.compare(path, [fused_path], cases, description).candidates[0]
        fused = sum(site.fused for site in graph.sites(graph.load(fused_path, weights=False)))
    except Exception as error:
        return 0, FAILED, files.told(error, 200)
    if not candidate.held:
        reason = candidate.reason or f"off by {candidate.max_abs_diff:.0e}"
        failed = candidate.reason and ("fails on" in reason or "load" in reason)
        return 0, FAILED if failed else WRONG, reason[:200]
    return fused, "", ""


def _judged(path: Path, contender: contenders.Contender) -> tuple[int, str, str]:
    if contender.reason:
        return 0, FAILED, contender.reason[:200]
    return judge(path, contender.path)


def _best_stock(path: Path) -> tuple[int, str, str]:
    """The best over model types and levels; with raw masks too, where a result was wrong without.

    A wrong result is told where no setting fuses anything right.
    """
    sites = len(graph.sites(graph.load(path, weights=False)))
    best, wrong = (0, "", ""), (0, "", "")
    for raw in (False, True):
        for model_type, level in itertools.product(MODEL_TYPES, LEVELS):
            with quiet():
                stock = contenders.stock(
                    model_type,
                    path,
                    model_type,
                    num_heads=4,
                    hidden_size=64,
                    opt_level=level,
                    raw_mask=raw,
                )
            outcome = _judged(path, stock)
            best = max(best, outcome, key=lambda outcome: outcome[0])
            wrong = outcome if outcome[1] == WRONG else wrong
            if best[0] == sites:
                return best
        if not wrong[1]:
            break
    return best if best[0] else wrong


def _onnxscript(path: Path) -> tuple[int, str, str]:
    with quiet():
        contender = contenders.onnxscript("onnxscript", path)
    return _judged(path, contender)


def _transformers(path: Path) -> tuple[int, str, str]:
    with quiet():
        contender = contenders.transformers("transformers", path)
    return _judged(path, contender)


def _ours(path: Path) -> tuple[int, str, str]:
    """The lesser of the targets that fuse."""
    outcomes = []
    for target in fuse.FUSING:
        with quiet():
            done = fuse.fuse(path, path.with_suffix(f".{target}.onnx"), target=target)
        if not done.held:
            return 0, WRONG, str(done.at_fault)
        outcomes.append((done.fused, "", "; ".join(done.left)))
    return min(outcomes)
