"""A model that is run to find out what it takes: the smallest sizes, and what its masks mean."""

import dataclasses
import re
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort

from helpers import files, graph
from helpers.feeds import inputs, masks, reach
from helpers.feeds.feed import listed
from helpers.feeds.inputs import Input
from helpers.feeds.scores import Scores
from helpers.feeds.sizes import At, Sizes, evaluated

PATIENCE = 60  # seconds in which sizes are tried that fail
AMOUNTS = {"right": 2 / 3, "left": 1 / 3, "holes": 0}  # of the positions, by padding
ROUND = (16, 64)  # lengths may have to be multiples of these

# A score that is so far from the others of its row, in standard deviations over keys, is the only
# one that counts; then what rounding changes grows from layer to layer. A trained T5's are at 3.
APART = 6
HALVINGS = 6  # of normal numbers, at most, to come below that

Flags = dict[str, int]


class Trial:
    """A model with what its inputs hold, a session, and the scores of its sites.

    Raises `files.BadInput` where an input is none that can be inferred, or the model does not load.
    """

    def __init__(self, opened: files.Opened) -> None:
        self.path = opened.path
        self.model = opened.model.clone()  # whose shapes are inferred
        sites = graph.sites(self.model)
        self.inputs = inputs.read(self.model, self.path, sites)
        for entry in self.inputs:
            if entry.indexes or (entry.dtype.kind not in "fiub" and not entry.is_float):
                raise files.BadInput(
                    f"{self.path}: expected inputs that can be inferred (ids, masks, floats), found"
                    f" {entry}; give --inputs FEEDS.npz"
                )
        self.order = {node.name: i for i, node in enumerate(graph.nodes(self.model))}
        self.sizes = Sizes(self.inputs)
        self.session = _session(opened)
        self.scores = Scores(opened, sites)
        self.masks = [entry for entry in self.inputs if entry.is_mask]
        self.flags = [entry for entry in self.inputs if entry.role == "flag"]

    def arrays(
        self, at: At, padding: str = "no", flags: Flags | None = None, only: str = ""
    ) -> masks.Arrays:
        """Seeded values for every input, of the sizes `at`; masks have `padding`, or of several
        `only` the one of that name."""
        sizes, random = self.sizes.assign(at), np.random.default_rng(0)
        queries, past = self.sizes.queries(at), self.sizes.before(at)
        arrays = {}
        for entry in self.inputs:
            shape = tuple(evaluated(dim, sizes) for dim in entry.dims)
            own = padding if only in ("", entry.name) else "no"
            if entry.is_mask:
                values = masks.filled(entry, shape, own, past)
            elif entry.role == "flag":
                values = np.full(shape, (flags or {}).get(entry.name, 0))
            elif entry.role == "ids":
                values = masks.ids(entry, shape, own, random)
            elif entry.role == "amount":
                values = np.full(shape, max(1, int((queries + past) * AMOUNTS.get(own, 1))))
            else:
                values = _values(entry, shape, queries, past, random)
            arrays[entry.name] = np.asarray(values).astype(entry.dtype)
        return arrays

    def problem(self, at: At, flags: Flags, padding: str = "no") -> Exception | None:
        """Why the model does not run on sizes `at`, or None."""
        try:
            self.session.run(None, self.arrays(at, padding, flags))
        except Exception as error:  # ONNX Runtime's own types, or a size that cannot be
            return error
        return None

    def seconds(self, at: At, flags: Flags) -> float:
        """How long a run takes; infinite where the model does not run."""
        start = time.perf_counter()
        failed = self.problem(at, flags)
        return float("inf") if failed else time.perf_counter() - start

    def counted(self, at: At) -> int:
        """How many keys there are at sizes `at`, as far as sizes tell."""
        kinds = set(self.sizes.kind.values())
        frames = "signal" in kinds and "token" not in kinds
        return (at.signal if frames else self.sizes.queries(at)) + self.sizes.before(at)

    def positions(self, at: At, flags: Flags) -> int:
        """How many keys there are at sizes `at`, in the site that has most."""
        try:
            masked = self.scores.masked(self.arrays(at, "no", flags)) if self.scores else []
        except Exception:  # ONNX Runtime's own types
            masked = []
        return max([score.shape[-1] for score in masked if score.ndim], default=self.counted(at))

    def smallest(self, flags: Flags, problems: list[Exception]) -> At | None:
        """The first sizes that the model runs on."""
        constants = [
            size_written for size_written in reach.written(self.model) if size_written <= 4096
        ][:40]
        constants += [
            size_written - 1 for size_written in constants if size_written > 2
        ]  # without what a class token adds
        start = time.monotonic()
        for at in self.sizes.tries(constants):
            failed = self.problem(at, flags)
            if failed is None:
                return self._with_heads(at, flags)
            problems.append(failed)
            if time.monotonic() - start > PATIENCE:
                break
        return None

    def _with_heads(self, at: At, flags: Flags) -> At:
        """The same with as many heads as the scores have: with fewer, a mask of (batch · heads, …)
        may be taken for one that all samples share."""
        if "folded" not in self.sizes.kind.values() or not self.scores:
            return at
        for masked in self.scores.masked(self.arrays(at, "no", flags)):
            if masked.ndim == 4:
                other = dataclasses.replace(at, heads=masked.shape[1])
                if self.problem(other, flags) is None:
                    return other
        return at

    def last(self, sized: Callable[[int], At], low: int, high: int, flags: Flags) -> int:
        """The last length up to `high` that the model runs on, as it does on `low`."""
        for step in ROUND:
            if self.problem(sized(high - high % step), flags) is None:
                return high - high % step
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.problem(sized(middle), flags) is None
            low, high = (middle, high) if fits else (low, middle)
        return low

    def refused(self, problems: list[Exception]) -> files.BadInput:
        """What is raised where nothing runs: the try that came furthest, or what `fuse` repairs."""
        from helpers.graph import repairs

        told = "; ".join(listed((entry.name, str(entry)) for entry in self.inputs))
        furthest = max(problems, key=lambda error: self.order.get(_node(error), -1))
        needed = repairs.needed(self.model)
        if needed:
            return files.BadInput(
                f"{self.path}: expected a model that ONNX Runtime runs, found that it refuses"
                f" {needed[0]} on any input: {files.told(furthest)}; `python -m helpers fuse`"
                " repairs that: compare what it writes"
            )
        if written := self.written(furthest):
            return files.BadInput(
                f"{self.path}: expected a model that runs on inputs inferred from its graph"
                f" ({told}), found {written}; export it again with dynamo=True, or give --inputs"
                " FEEDS.npz of the size that was exported"
            )
        return files.BadInput(
            f"{self.path}: expected a model that runs on inputs inferred from its graph ({told}),"
            f" found: {files.told(furthest)}; give --inputs FEEDS.npz"
        )

    def written(self, error: Exception, length: int = 0) -> str:
        """What is said of a Reshape or Expand that fits one size alone: the one that raised
        `error`, or one with `length` in its shape. Empty where there is none."""
        sizes = re.search(r"requested shape: ?\{([^}]*)\}", str(error))
        raised = re.search(r"running (Reshape|Expand) node", str(error)) and _node(error)
        holding = reach.written(self.model).get(length, ())  # (batch, length, …), or length alone
        fitting = [node for node in holding if length in [*reach.sizes(node.inputs[1])][:2]]
        if not raised and not fitting:
            return ""
        named = raised or graph.name(fitting[0])
        given = (sizes[1] if sizes else files.told(error, 100)) if raised else ""
        if fitting and not raised:
            given = ",".join(map(str, reach.sizes(fitting[0].inputs[1])))
        more = f" and {len(fitting) - 1} more" if not raised and len(fitting) > 1 else ""
        return (
            f"sizes that the exporter wrote into node {named}{more} ({given}), so that it fits one"
            " length only"
        )

    def find_scales(self, flags: Flags, at: At) -> None:
        """Make the normal numbers smaller where those of 1 put scores too far `APART`."""
        numbers = [entry for entry in self.inputs if entry.is_normal]
        for step in range(HALVINGS + 1) if numbers else ():
            for entry in numbers:
                entry.scale = 0.5**step
            if self._apart(flags, at) <= APART:
                return
        for entry in numbers:  # they are far apart whatever is given
            entry.scale = 1.0

    def _apart(self, flags: Flags, at: At) -> float:
        """How far scores are apart; 0 where that cannot be told."""
        try:
            return self.scores.spread(self.arrays(at, "no", flags)) if self.scores else 0.0
        except Exception:  # ONNX Runtime's own types, or a branch that cannot be put in its place
            return 0.0

    def find_senses(self, flags: Flags, at: At) -> None:
        """What the masks mean, as far as it shows with these flags."""
        unknown = [entry for entry in self.masks if entry.is_mask and not entry.in_scores]
        if not unknown:
            return

        def build() -> masks.Arrays:
            return self.arrays(at, "no", flags)

        def outputs(arrays: masks.Arrays) -> list[np.ndarray]:
            return self.session.run(None, arrays)

        masks.find_senses(unknown, self.scores, build, outputs)
        self.masks = [entry for entry in self.masks if entry.is_mask]


def _session(opened: files.Opened) -> ort.InferenceSession:
    """A session as users make it, or where what it optimises cannot be loaded, as it is."""
    try:
        return opened.session()
    except Exception:  # ONNX Runtime's own types
        try:
            return opened.session(optimise=False)
        except Exception as error:
            raise files.refused(opened.path, error) from None


def _node(error: Exception) -> str:
    """The name of the node at which ONNX Runtime stopped, or nothing."""
    place = re.search(r"Name: ?'([^']*)'", str(error))
    return place[1] if place else ""


def _values(
    entry: Input, shape: tuple[int, ...], token: int, past: int, random: np.random.Generator
) -> np.ndarray:
    """Seeded values for an input that is no mask, no flag and no ids."""
    if entry.is_normal:
        return random.normal(size=shape, scale=entry.scale)
    if entry.role == "integers":
        return random.integers(0, 256 if entry.dtype == np.uint8 else 2, size=shape)
    if entry.role == "positions":
        return np.broadcast_to(np.arange(shape[-1]) + past, shape) if shape else np.array(past)
    if entry.role == "filled":
        return np.full(shape, past)
    length = token + (past if entry.role in ("last", "total") else 0)
    if entry.role == "total":
        return np.full(shape, length)
    # The first sample is as long as all positions, the others are shorter.
    lengths = np.maximum(length - np.arange(int(np.prod(shape))) * max(length // 3, 1), 1)
    return lengths.reshape(shape) - (entry.role == "last")
