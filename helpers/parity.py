"""Do two models compute the same? Outputs compared over several inputs, padding included.

Compared is every row that has at least one key. A row that has none (it is padding altogether; or
the first rows of a causal model, padded on the left; or the window of a row holds padding alone)
has no single right value: kernels give NaN, zero, or the mean of the values. It must only be finite
where the reference is. Which rows these are is read off the graph: the scores of an attention site
(what goes into its Softmax; of a standard Attention, its fourth output) are all masked there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from helpers import files, graph
from helpers.feeds import Feed

if TYPE_CHECKING:
    import pandas as pd

# Largest absolute difference by type of output. fp32: what another order of summation gives in a
# few dozen layers stays well below. fp16 and bf16 have 11 and 8 bits of mantissa where fp32 has
# 24, of which a few dozen layers lose some more. Integers and booleans are compared exactly.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

MASKED = -5e3  # scores at most this low have been masked: by -1e4, -1e6, the smallest float, …

Model = str | Path | Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Outputs = dict[str, np.ndarray]


@dataclass
class Candidate:
    """How one model compares. `where` is the worst place: feed, output, index."""

    name: str
    held: bool = True
    max_abs_diff: float = 0.0
    tolerance: float = 0.0
    where: str = ""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "held": self.held,
            "max_abs_diff": self.max_abs_diff if np.isfinite(self.max_abs_diff) else None,
            "tolerance": self.tolerance,
            "where": self.where,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        verdict = "held" if self.held else "NOT HELD"
        return (
            f"{self.name}: parity {verdict}, largest difference {self.max_abs_diff:.1e}"
            f" (tolerance {self.tolerance:.1e}) {self.reason or self.where}".rstrip()
        )


@dataclass
class Report:
    """What `compare` found. `max_abs_diff` and `tolerance` are of the worst candidate."""

    reference: str
    candidates: list[Candidate]
    inputs: str

    @property
    def held(self) -> bool:
        return all(candidate.held for candidate in self.candidates)

    @property
    def worst(self) -> Candidate:
        return max(self.candidates, key=lambda one: (not one.held, one.max_abs_diff))

    def to_json(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "reference": self.reference,
            "held": self.held,
            "parity": {
                "max_abs_diff": worst.max_abs_diff if np.isfinite(worst.max_abs_diff) else None,
                "tolerance": worst.tolerance,
                "inputs": self.inputs,
            },
            "models": [{"file": one.name, **one.to_json()} for one in self.candidates],
        }

    def table(self) -> pd.DataFrame:
        """A row for each candidate, differences rounded to two digits."""
        import pandas as pd

        return pd.DataFrame(
            {
                "parity": "held" if one.held else "not held",
                "largest difference": f"{one.max_abs_diff:.1e}",
                "tolerance": f"{one.tolerance:.1e}",
                "where": one.reason or one.where,
            }
            for one in self.candidates
        ).set_axis([Path(one.name).name for one in self.candidates])

    def __str__(self) -> str:
        lines = [f"reference {self.reference}", f"inputs {self.inputs}"]
        return "\n".join([*lines, *map(str, self.candidates)])


class _Runner:
    """A model file or a function as one thing: `run` gives outputs by name."""

    def __init__(self, model: Model, *, optimise: bool = True) -> None:
        self.function = model if callable(model) else None
        self.name = getattr(model, "__qualname__", type(model).__name__)
        if self.function is None:
            self.name = str(model)
            self.session = files.session(model, optimise=optimise)
            self.outputs = [value.name for value in self.session.get_outputs()]
            self.inputs = {value.name: value.type for value in self.session.get_inputs()}

    def close(self) -> None:
        """Give back the memory of a session that is not needed again."""
        self.session = None
        files.give_back()

    def run(self, arrays: Outputs) -> Outputs:
        if self.function is not None:
            return self.function(arrays)
        return dict(zip(self.outputs, self.session.run(None, arrays), strict=True))


def compare(
    reference: Model, candidates: Sequence[Model], feeds: Sequence[Feed], description: str
) -> Report:
    """Compare `candidates` with `reference` on each of `feeds`; `description` says what those are.

    A model is a file, or a function from input arrays to output arrays by name (as
    `models.runner` makes of PyTorch's). A file as the reference runs without the session's own
    optimisation, a candidate as users run it, with. The tolerance is that of the output's type in
    `TOLERANCE`, or the reference's own difference between optimised and not, where that is larger.
    A candidate that fails where the reference runs has not held. Raises `files.BadInput` where the
    reference fails or gives NaN in rows that are compared, or where inputs or outputs do not match.
    """
    plain = _Runner(reference, optimise=False)
    masks = any(not keys.all() for feed in feeds for keys in feed.keys.values())
    scores = _scores([reference, *candidates]) if masks else None
    expected: list[tuple[Feed, Outputs, Outputs]] = []  # outputs, and where rows have a key
    for feed in feeds:
        outputs = _reference(plain, feed)
        kept = _kept(plain, feed, outputs, _empty(feed, outputs, scores))
        bad = [name for name, out in outputs.items() if _nan(out[kept[name]])]
        if not bad:
            expected.append((feed, outputs, kept))
        elif not feed.inferred:
            raise files.BadInput(
                f"{plain.name}: expected numbers from the reference, found NaN in {bad[0]}"
                f" ({feed.name}); give other inputs"
            )
    del scores
    plain.close()
    if not expected:
        raise files.BadInput(
            f"{plain.name}: expected numbers from the reference, found NaN on all inputs that were"
            " inferred; give --inputs FEEDS.npz"
        )
    if not any(where.any() for _, _, kept in expected for where in kept.values()):
        expected = [(feed, out, _all_finite(out)) for feed, out, _ in expected]
    passed = [feed.name for feed in feeds if not any(feed is one for one, _, _ in expected)]
    if passed:
        description += f"; passed over, since the reference gives NaN: {', '.join(passed)}"
    noise: dict[str, float] = {}
    if plain.function is None:
        optimised = _Runner(reference)
        for feed, outputs, kept in expected:
            for name, out in _reference(optimised, feed).items():
                own = _difference(outputs[name][kept[name]], out[kept[name]])
                noise[name] = max(noise.get(name, 0.0), own)
        optimised.close()
    judged = [_judge(plain, candidate, expected, noise) for candidate in candidates]
    return Report(plain.name, judged, description)


def _all_finite(outputs: Outputs) -> Outputs:
    """Where to compare if no row has a key: everywhere, since something must be."""
    return {
        name: np.isfinite(out) if out.dtype.kind == "f" else np.ones(out.shape, bool)
        for name, out in outputs.items()
    }


def _reference(model: _Runner, feed: Feed) -> Outputs:
    try:
        return model.run(feed.arrays)
    except Exception as error:  # ONNX Runtime and PyTorch raise types of their own
        raise files.BadInput(
            f"{model.name}: expected a model that runs on {feed.name}, found: {error};"
            " give other inputs"
        ) from None


def _judge(
    plain: _Runner,
    model: Model,
    expected: list[tuple[Feed, Outputs, Outputs]],
    noise: dict[str, float],
) -> Candidate:
    try:
        other = _Runner(model)
    except Exception as error:  # ONNX Runtime's own types
        reason = " ".join(f"does not load: {error}".split())[:300]
        return Candidate(str(model), False, float("inf"), reason=reason)
    if other.function is None and plain.function is None and other.inputs != plain.inputs:
        raise files.BadInput(
            f"{other.name}: expected the inputs of {plain.name} ({_listed(plain.inputs)}),"
            f" found {_listed(other.inputs)}; compare models of one signature"
        )
    candidate = Candidate(other.name)
    worst = -1.0
    for feed, outputs, kept in expected:
        try:
            found = other.run(feed.arrays)
        except Exception as error:  # as above: that it fails is the answer
            candidate.held, candidate.max_abs_diff = False, float("inf")
            candidate.reason = " ".join(f"fails on {feed.name}: {error}".split())[:300]
            return candidate
        for name, array, wanted in _pairs(other, found, plain, outputs):
            tolerance = max(TOLERANCE.get(wanted.dtype.name, 0.0), noise.get(name, 0.0))
            reason, at = None, ()
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                found_is = f"{array.dtype} {array.shape}"
                reason = f"{name} is {found_is} and not {wanted.dtype} {wanted.shape}: {feed.name}"
                difference = float("inf")
            else:
                gaps = np.where(kept[name], _gaps(wanted, array), 0.0)
                difference = float(gaps.max(initial=0.0))
                at = np.unravel_index(gaps.argmax(), gaps.shape) if gaps.size else ()
                if not np.isfinite(array[np.isfinite(wanted) & ~kept[name]]).all():
                    reason = f"{name} is not finite in a row without a key: {feed.name}"
            if reason or not difference <= tolerance:
                candidate.held = False
            candidate.reason = candidate.reason or reason
            if difference / (tolerance or 1e-30) > worst:
                worst = difference / (tolerance or 1e-30)
                candidate.max_abs_diff, candidate.tolerance = difference, tolerance
                candidate.where = f"{name}[{', '.join(str(int(i)) for i in at)}], {feed.name}"
    return candidate


def _listed(inputs: dict[str, str]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in inputs.items())


def _pairs(other: _Runner, found: Outputs, plain: _Runner, outputs: Outputs) -> list[tuple]:
    """(name, found, expected), matched by name, and else by position."""
    if set(outputs) <= set(found):
        return [(name, found[name], wanted) for name, wanted in outputs.items()]
    if len(found) != len(outputs):
        raise files.BadInput(
            f"{other.name}: expected the outputs of {plain.name} ({', '.join(outputs)}),"
            f" found {', '.join(found)}; compare models of one signature"
        )
    return [
        (name, array, wanted)
        for (name, wanted), array in zip(outputs.items(), found.values(), strict=True)
    ]


def _nan(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def _gaps(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Absolute differences, 0 between equal infinities, infinite where only one is a number."""
    if expected.dtype.kind not in "fiub":
        return np.where(expected == found, 0.0, np.inf)
    with np.errstate(invalid="ignore"):
        gaps = np.asarray(np.abs(expected.astype(np.float64) - found.astype(np.float64)))
    gaps[expected == found] = 0.0
    return np.where(np.isnan(gaps), np.inf, gaps)


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    gaps = _gaps(expected, found)
    return float(gaps[np.isfinite(gaps)].max(initial=0.0))


def _scores(models: Sequence[Model]) -> ort.InferenceSession | None:
    """A session that gives what goes into the Softmax of each attention site, from the first of
    `models` that is a file with such sites, or standard Attention; None where there is none."""
    for model in models:
        if callable(model):
            continue
        path = Path(model).absolute()
        proto = onnx.load(path, load_external_data=False)
        nodes = {name: node for node in proto.graph.node for name in node.output}
        names = [
            site.node.inputs[0].name if site.scores else _open(nodes.get(site.node.outputs[0].name))
            for site in graph.sites(graph.inline(ir.from_proto(proto)))
        ]
        if path.stat().st_size > files.SLOW:
            gc.collect()  # the model was in cycles, and holds the weights
        made = {name for node in proto.graph.node for name in node.output}
        wanted = [name for name in dict.fromkeys(names) if name in made]
        if wanted:
            del proto.graph.output[:]
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
            return files.session(proto.SerializeToString(), optimise=False, folder=path.parent)
    return None


def _open(node: onnx.NodeProto | None) -> str | None:
    """Have a standard Attention give its masked scores as its fourth output, of the name returned;
    None where the node is another, or gives scores already."""
    if node is None or node.op_type != "Attention" or node.domain not in graph.STANDARD:
        return None
    node.output.extend([""] * (4 - len(node.output)))
    if node.output[3]:
        return None
    node.output[3] = f"{node.output[0]}_scores"
    kept = [one for one in node.attribute if one.name != "qk_matmul_output_mode"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("qk_matmul_output_mode", 2)])
    return node.output[3]


def _empty(feed: Feed, outputs: Outputs, scores: ort.InferenceSession | None) -> list[np.ndarray]:
    """Where rows have no key, as (batch, rows) for each number of rows there is.

    Without `scores` every row that is padding itself is taken for one, which leaves out more than
    it must.
    """
    if not feed.keys or (scores is None and all(keys.all() for keys in feed.keys.values())):
        return []
    if scores is None:
        return [~keys for keys in feed.keys.values()]
    batch = len(next(iter(feed.keys.values())))
    lengths = {a.shape[1] for a in (*feed.arrays.values(), *outputs.values()) if a.ndim in (2, 3)}
    found: dict[int, np.ndarray] = {}
    for values in scores.run(None, feed.arrays):
        masked = ~(values > MASKED).any(axis=-1)  # (batch, heads, rows) or (batch · heads, rows)
        rows = masked.shape[-1]
        if masked.size and len(masked) % batch == 0:
            masked = masked.reshape(batch, -1, rows)
            if rows in lengths:
                masked = masked.any(axis=1)
            else:  # another layout, as Longformer's (batch, rows, heads): whole samples only
                masked = np.repeat(masked.all(axis=(1, 2))[:, None], rows, axis=1)
            found[rows] = found.get(rows, False) | masked
    for keys in feed.keys.values():  # scores tell no longer where their maximum was taken off
        padding = ~keys.any(axis=1)
        for rows, masked in found.items():
            found[rows] = masked | padding[:, None]
    return [masked for masked in found.values() if masked.any()]


def _kept(model: _Runner, feed: Feed, outputs: Outputs, empty: list[np.ndarray]) -> Outputs:
    """For each output, True where it is compared.

    Left out are the rows that are `empty` in outputs (batch, rows, …), in keys and values that are
    kept (batch, heads, rows, …), samples that are empty altogether, and in any other output what
    changes with the inputs there. An output that does not depend on inputs of that length at all,
    such as the image's beside a padded text, is compared in full.
    """
    kept = {name: np.ones(out.shape, bool) for name, out in outputs.items()}
    for rows in empty:
        arrays = feed.changed(rows)
        changed = model.run(arrays) if arrays else outputs
        others = feed.changed(np.ones_like(rows))
        known = any(others[name] is not feed.arrays[name] for name in others)
        moved = model.run(others) if known else {}
        for name, out in outputs.items():
            batch, number = rows.shape
            if known and np.array_equal(out, moved[name]):
                continue
            if out.ndim and len(out) == batch:
                kept[name][rows.all(axis=1)] = False
            if out.shape[:2] == rows.shape and out.ndim > 2:
                kept[name][rows] = False
            elif out.ndim == 4 and len(out) == batch and out.shape[2] >= number:
                kept[name][:, :, -number:] &= ~rows[:, None, :, None]
            elif number in (array.shape[1] for array in arrays.values() if array.ndim > 1):
                kept[name] &= (out == changed[name]) | ~np.isfinite(changed[name])
    return kept
