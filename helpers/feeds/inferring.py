"""Inputs for a model, inferred from its graph.

Inferred are what each input holds (`inputs`), the sense of masks (`masks`), the sizes (dimensions
of one name have one size; what is open is tried until the model runs) and how long a feed must be
to pass what the graph does at a distance (`reach`). Every branch that a flag chooses gets feeds of
its own: short and long, padded on either side, with holes, without past and with it, and beyond
each window. A feed that the model refuses is passed over, and named.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime as ort

from helpers import files, graph
from helpers.feeds import inputs, masks, reach
from helpers.feeds.feed import Feed
from helpers.feeds.inputs import Input
from helpers.feeds.scores import Scores
from helpers.feeds.sizes import BATCH, At, Sizes, size

PATIENCE = 60  # seconds in which sizes are tried that fail
QUICK, BEARABLE = 1.5, 8.0  # seconds of one run: to go beyond any window, and beyond a known one
_SCALED_TOGETHER = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}

Flags = dict[str, int]


def infer(path: str | Path) -> tuple[list[Feed], str]:
    """Feeds for the model at `path`, and in one line what was inferred.

    Raises `files.BadInput` where an input cannot be inferred, or the model runs on nothing tried.
    """
    trial = _Trial(Path(path).absolute())
    try:
        return trial.feeds(), trial.description()
    finally:
        trial.scores.close()


class _Trial:
    """The model at `path`, and what was found out by running it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = graph.load(path, weights=False)
        self.inputs = inputs.read(self.model, path)
        for one in self.inputs:
            if one.indexes or (one.dtype.kind not in "fiub" and not one.is_float):
                raise files.BadInput(
                    f"{path}: expected inputs that can be inferred (ids, masks, floats), found"
                    f" {one}; give --inputs FEEDS.npz"
                )
        self.order = {node.name: i for i, node in enumerate(graph.nodes(self.model))}
        self.sizes = Sizes(self.inputs)
        self.session = _session(path)
        self.scores = Scores(path)
        self.masks = [one for one in self.inputs if one.is_mask]
        self.flags = [one for one in self.inputs if one.role == "flag"]
        self.windows = reach.windows(self.model)
        self.rows = reach.table(self.model)
        operators = {node.op_type for node in graph.nodes(self.model)}
        self.scaled_together = not operators.isdisjoint(_SCALED_TOGETHER)
        self.reached = 0  # positions, in the longest feed
        self.passed: list[str] = []  # feeds that are passed over, and why
        self.notes: list[str] = []
        self.made: list[Feed] = []
        self.all_have_keys = False
        self.paddings: set[str] = set()  # that these have

    # ── Running ─────────────────────────────────────────────────────────────────────────────────

    def arrays(self, at: At, padding: str = "no", flags: Flags | None = None) -> masks.Arrays:
        """Seeded values for every input, of the sizes `at`; masks have `padding`."""
        sizes, random = self.sizes.assign(at), np.random.default_rng(0)
        arrays = {}
        for one in self.inputs:
            shape = tuple(size(dim, sizes) for dim in one.dims)
            past = self.sizes.before(at)
            values = _values(one, shape, self.sizes.queries(at), past, random)
            if one.is_mask:
                values = masks.filled(one, shape, padding, past)
            elif one.role == "flag":
                values = np.full(shape, (flags or {}).get(one.name, 0))
            arrays[one.name] = np.asarray(values).astype(one.dtype)
        return arrays

    def problem(self, at: At, flags: Flags, padding: str = "no") -> Exception | None:
        """Why the model does not run on sizes `at`, or None."""
        try:
            self.session.run(None, self.arrays(at, padding, flags))
        except Exception as error:  # ONNX Runtime's own types, or a size that cannot be
            return error
        return None

    def seconds(self, at: At, flags: Flags) -> float:
        start = time.perf_counter()
        failed = self.problem(at, flags)
        return float("inf") if failed else time.perf_counter() - start

    # ── Feeds ───────────────────────────────────────────────────────────────────────────────────

    def feeds(self) -> list[Feed]:
        """All feeds that the model runs on, every combination of flags among them."""
        smallest: list[tuple[Flags, At]] = []
        problems: list[Exception] = []
        chosen: list[tuple[bool, ...]] = []
        values = [inputs.flag_values(self.model, one) for one in self.flags]
        for combination in product(*values[:3]):
            flags = dict(zip([one.name for one in self.flags], combination, strict=False))
            at = self._smallest(flags, problems)
            if at is None:
                self.notes.append(f"not run: {_flags(flags)}")
                continue
            choice = self.scores.choice(self.arrays(at, "no", flags)) if flags else ()
            if choice not in chosen:
                smallest.append((flags, at))
                chosen.append(choice)
        if not smallest:
            raise self._refused(problems)
        for flags, at in smallest:
            self._find_senses(flags, at)
        for flags, at in smallest:
            prefix = f"{_flags(flags)}, " if flags else ""
            for name, sizes, padding in self._variants(flags, at):
                self._add(prefix + name, sizes, padding, flags)
        if not self.made:
            raise self._refused(problems)
        self._other_branches(*smallest[0])
        unrun = [
            f"the {'else' if seen == {True} else 'then'} branch of {name}"
            for name, seen in self.scores.branches.items()
            if len(seen) == 1
        ]
        if unrun:
            more = f" and {len(unrun) - 3} more" if len(unrun) > 3 else ""
            self.notes.append(f"not run: {', '.join(unrun[:3])}{more}")
        for window in self.windows:
            if window >= self.reached:
                self.notes.append(f"a window of {window} is not reached")
        return self.made

    def _smallest(self, flags: Flags, problems: list[Exception]) -> At | None:
        """The first sizes that the model runs on."""
        constants = [one for one in reach.written(self.model) if one <= 4096][:40]
        constants += [one - 1 for one in constants if one > 2]  # without what a class token adds
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

    def _refused(self, problems: list[Exception]) -> files.BadInput:
        """What is raised where nothing runs: the try that came furthest, or what `fuse` repairs."""
        from helpers.fusions import repairs

        listed = "; ".join(map(str, self.inputs))
        furthest = max(problems, key=lambda error: self.order.get(_node(error), -1))
        needed = repairs.needed(self.model)
        if needed:
            return files.BadInput(
                f"{self.path}: expected a model that ONNX Runtime runs, found that it refuses"
                f" {needed[0]} on any input: {files.told(furthest)}; `python -m helpers fuse`"
                " repairs that: compare what it writes"
            )
        if written := self._written(furthest):
            return files.BadInput(
                f"{self.path}: expected a model that runs on inputs inferred from its graph"
                f" ({listed}), found {written}; export it again with dynamo=True, or give --inputs"
                " FEEDS.npz of the size that was exported"
            )
        return files.BadInput(
            f"{self.path}: expected a model that runs on inputs inferred from its graph ({listed}),"
            f" found: {files.told(furthest)}; give --inputs FEEDS.npz"
        )

    def _written(self, error: Exception) -> str:
        """What is said of a Reshape or Expand that fits one size alone; empty for another error."""
        text = str(error)
        if not re.search(r"running (Reshape|Expand) node", text) or not _node(error):
            return ""
        sizes = re.search(r"requested shape: ?\{([^}]*)\}", text)
        return (
            f"sizes that the exporter wrote into node {_node(error)}"
            f" ({sizes[1] if sizes else files.told(error, 100)}), so that it fits one length only"
        )

    def _fits_one(self, at: At) -> str:
        """What is said of a Reshape whose length is that of `at`; for a model that refuses others,
        where another node stops, since a batch of -1 takes in what is left over."""
        length = at.token if "token" in self.sizes.kind.values() else at.signal
        for node in reach.written(self.model).get(length, []):
            sizes = [*reach.sizes(node.inputs[1])]
            if length in sizes[:2]:  # (batch, length, …), or without a batch that is computed
                return (
                    f"sizes that the exporter wrote into node {node.name}"
                    f" ({','.join(map(str, sizes))}), so that it fits one length only"
                )
        return ""

    def _find_senses(self, flags: Flags, at: At) -> None:
        """What the masks mean, as far as it shows with these flags."""
        unknown = [one for one in self.masks if one.is_mask and not one.in_scores]
        if not unknown:
            return

        def build() -> masks.Arrays:
            return self.arrays(at, "no", flags)

        def outputs(arrays: masks.Arrays) -> list[np.ndarray]:
            return self.session.run(None, arrays)

        masks.find_senses(unknown, self.scores, build, outputs)
        self.masks = [one for one in self.masks if one.is_mask]

    def _variants(self, flags: Flags, smallest: At) -> Iterator[tuple[str, At, str]]:
        """The feeds to make, by name: sizes, and what the masks do."""

        def runs(at: At) -> bool:
            return self.problem(at, flags) is None

        # The smallest signal proves little: convolutions may leave one frame of it: one key.
        factors = (40 if self.sizes.waveform else 16 if self.sizes.image else 4, 4, 2, 1)
        grown = [(f * smallest.signal, token) for f in factors for token in (17, smallest.token)]
        larger = (dataclasses.replace(smallest, signal=s, token=t) for s, t in grown)
        long = next((at for at in larger if runs(at)), smallest)
        half = dataclasses.replace(smallest, signal=long.signal // 2)
        short = half if runs(half) else smallest
        single, more = dataclasses.replace(short, batch=1), dataclasses.replace(long, batch=3)
        single = single if runs(single) else short
        more = more if long.batch > 1 and runs(more) else long
        kinds = set(self.sizes.kind.values())
        if smallest.batch == 1 and BATCH in kinds:
            self.notes.append("batch 1, since the model refuses a batch of 2")
        same_batch = dataclasses.replace(long, batch=short.batch)
        if kinds & {"token", "signal"} and self.sizes.assign(same_batch) == self.sizes.assign(
            short
        ):
            signal, token = 2 * smallest.signal, smallest.token + 1
            failed = self.problem(dataclasses.replace(smallest, signal=signal, token=token), flags)
            written = failed and (self._written(failed) or self._fits_one(smallest))
            if written:
                self.notes.append(f"{written}; export it again with dynamo=True for other lengths")
        pairs = any(one.pairs for one in self.masks)
        yield "short", single, "no"
        yield ("long, causal" if pairs else "long"), more, "causal" if pairs else "no"
        if self.masks:
            yield "short, padded on the right", short, "right"
            yield "long, padded on the left", more, "left"
            yield "short, with holes", short, "holes"
            yield "short, one sample padding altogether", short, "all"
        if self.sizes.past:
            padding = "left" if self.masks else "no"
            yield "without past", dataclasses.replace(more, past=0), padding
            past = dataclasses.replace(more, past=5)
            one = dataclasses.replace(self.sizes.with_queries(past, 1), apart=0)
            yield "a past, one query", one, padding
            yield "a past, several queries", self.sizes.with_queries(past, 7), padding
        yield from self._beyond(flags, more)

    def _beyond(self, flags: Flags, long: At) -> Iterator[tuple[str, At, str]]:
        """Feeds beyond each window that can be reached, as long as a run is bearable."""
        kinds = set(self.sizes.kind.values())
        if not kinds & {"token", "signal"} or self.sizes.image:
            return
        start = self._positions(long, flags)
        batch = 2 if long.batch > 1 else 1
        padding = "left" if self.masks else "no"
        past = self.sizes.before(long)
        most = reach.ENOUGH if self.rows is None else self.rows

        def longer(length: int) -> At:
            if start == long.signal + past and "token" not in kinds:  # each frame is a position
                return dataclasses.replace(long, batch=batch, signal=length - past)
            signal = -(-long.signal * length // start) if "signal" in kinds else long.signal
            token = length - past if "token" in kinds else long.token
            return dataclasses.replace(long, batch=batch, token=token, signal=signal)

        length = self._longest(longer, start, most, flags)
        if length > start:
            yield f"beyond {length - 1} positions", longer(length), padding
        if self.sizes.past:
            single = dataclasses.replace(self.sizes.with_queries(long, 1), batch=batch, apart=0)

            def farther(length: int) -> At:
                return dataclasses.replace(single, past=length - 1)

            length = self._longest(farther, 6, most, flags)
            if length > start:
                yield f"beyond a past of {length - 2}", farther(length), padding

    def _longest(self, sized: Callable[[int], At], start: int, most: int, flags: Flags) -> int:
        """The greatest length up to `most` that the model runs on (a table of positions may end),
        and that takes little time, or is beyond a window."""
        near = {w + max(8, w // 8) for w in self.windows}
        steps = sorted({64, 256, most} | {w for w in near if w < most})
        length, spent = start, self.seconds(sized(start), flags)
        for wanted in (step for step in steps if step > start):
            predicted = spent * (wanted / length) ** 2
            if predicted > (BEARABLE if wanted in near else QUICK):
                continue
            spent = self.seconds(sized(wanted), flags)
            if spent == float("inf"):
                return self._last(sized, length, wanted, flags)
            length = wanted
        return length

    def _last(self, sized: Callable[[int], At], low: int, high: int, flags: Flags) -> int:
        """The last length that the model runs on: it does on `low`, and does not on `high`."""
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.problem(sized(middle), flags) is None
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _positions(self, at: At, flags: Flags) -> int:
        """How many keys there are at sizes `at`, in the site that has most."""
        try:
            masked = self.scores.masked(self.arrays(at, "no", flags)) if self.scores else []
        except Exception:  # ONNX Runtime's own types
            masked = []
        kinds = set(self.sizes.kind.values())
        frames = "signal" in kinds and "token" not in kinds
        counted = at.signal if frames else self.sizes.queries(at)
        counted += self.sizes.before(at)
        return max([one.shape[-1] for one in masked if one.ndim], default=counted)

    def _add(self, name: str, at: At, padding: str, flags: Flags) -> None:
        """Make one feed, unless the model refuses it."""
        if padding == "all" and self.scaled_together:
            return  # one scale for a whole tensor: what has no key would move all others
        if any(one.counted for one in self.masks) and padding in ("all", "holes"):
            return  # keys are counted there, and none is no count
        if any(feed.name == name for feed in self.made):
            return
        if at.batch > 1 and self.problem(at, flags, padding) is not None:
            at = dataclasses.replace(at, batch=1)
        arrays = self.arrays(at, padding, flags)
        try:
            self.session.run(None, arrays)
            masked = self._masked(arrays)
        except Exception as error:  # ONNX Runtime's own types
            self.passed.append(f"{name} ({files.told(error, 160)})")
            return
        lacking = masked is not None and any(one.any() for one in masked)
        if lacking and self.scaled_together:
            self.passed.append(f"{name} (rows without a key would move the scale of all others)")
            return
        keys = {
            one.name: arrays[one.name] == one.keep
            for one in self.masks
            if len(one.dims) == 2 and not one.pairs
        }
        roles = ("ids", "floats", "integers")
        fixed = frozenset(one.name for one in self.inputs if one.role not in roles)
        self.paddings.add(padding)
        self.made.append(Feed(name, arrays, keys, True, masked, fixed))
        self.reached = max(self.reached, self._positions(at, flags))

    def _masked(self, arrays: masks.Arrays) -> list[np.ndarray] | None:
        """Where queries have no key; None where the graph does not tell. Where there is no mask to
        feed, the first feed tells for all."""
        if self.all_have_keys or not self.scores:
            return None
        masked = self.scores.masked(arrays)
        self.keys = max([one.shape[-1] for one in masked if one.ndim], default=0)
        lacking = [one.all(axis=-1) for one in masked]
        if not self.masks and not self.flags:
            self.all_have_keys = not any(one.any() for one in lacking)
        return lacking or None

    def _other_branches(self, flags: Flags, at: At) -> None:
        """Feeds of the sizes that conditions ask for, where a branch has not run yet."""
        if all(len(seen) > 1 for seen in self.scores.branches.values()):
            return
        near = {c + more for c in reach.conditions(self.model) for more in (-1, 0, 1)}
        for length in sorted({at.token, at.signal, *(c for c in near if 0 < c <= reach.ENOUGH)}):
            kinds = [{"token": length, "signal": length}]
            kinds += [{"past": length}] if self.sizes.past else []
            kinds += [{"batch": length}] if length < 9 else []
            for kind in kinds:
                other = dataclasses.replace(at, **kind)
                before = sum(map(len, self.scores.branches.values()))
                try:
                    self.scores.choice(self.arrays(other, "no", flags))
                except Exception:  # ONNX Runtime's own types: it does not run so
                    continue
                if sum(map(len, self.scores.branches.values())) > before:
                    name = ", ".join(f"{one} {length}" for one in kind)
                    self._add(f"for another branch: {name}", other, "no", flags)

    def description(self) -> str:
        """What was inferred, in words that a user can check."""
        parts = [one.described() for one in self.inputs]
        first = self.inputs[0].name if self.inputs else ""
        shapes = dict.fromkeys(str(feed.arrays[first].shape) for feed in self.made if first)
        parts.append(f"{first} {', '.join(shapes)}")
        if self.masks:
            words = {"no": "not at all", "right": "right", "left": "left", "holes": "with holes"}
            words |= {"causal": "causal", "all": "altogether"}
            parts.append("padded " + ", ".join(words[one] for one in words if one in self.paddings))
        if self.passed:
            parts.append(f"passed over: {'; '.join(self.passed)}")
        return "inferred: " + "; ".join([*parts, *dict.fromkeys(self.notes)])


def _session(path: Path) -> ort.InferenceSession:
    """A session as users make it, or where what it optimises cannot be loaded, as it is."""
    try:
        return files.session(path)
    except Exception:  # ONNX Runtime's own types
        try:
            return files.session(path, optimise=False)
        except Exception as error:
            raise files.refused(path, error) from None


def _flags(flags: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in flags.items())


def _node(error: Exception) -> str:
    """The name of the node at which ONNX Runtime stopped, or nothing."""
    found = re.search(r"Name: ?'([^']*)'", str(error))
    return found[1] if found else ""


def _values(
    one: Input, shape: tuple[int, ...], token: int, past: int, random: np.random.Generator
) -> np.ndarray:
    """Seeded values for an input that is no mask and no flag."""
    if one.role in ("floats", "cache", "cross"):
        return random.normal(size=shape)
    if one.role == "ids":
        return random.integers(one.low, one.bound, size=shape)
    if one.role == "integers":
        return random.integers(0, 2, size=shape)
    if one.role == "positions":
        return np.broadcast_to(np.arange(shape[-1]) + past, shape) if shape else np.array(past)
    length = token + (past if one.role in ("last", "total") else 0)
    if one.role == "total":
        return np.full(shape, length)
    # The first sample is as long as all positions, the others are shorter.
    lengths = np.maximum(length - np.arange(int(np.prod(shape))) * max(length // 3, 1), 1)
    return lengths.reshape(shape) - (one.role == "last")
