"""Inputs for a model, inferred from its graph.

Inferred are what each input holds (`inputs`), the sense of masks (`masks`), the sizes (dimensions
of one name have one size; what is open is tried until the model runs) and how long a feed must be
to pass what the graph does at a distance (`reach`). Every branch that a flag chooses gets feeds of
its own: short and long, padded on either side, with holes, without past and with it, and beyond
each window. A feed that the model refuses is passed over, and named.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helpers import files, graph
from helpers.feeds import inputs, masks, reach
from helpers.feeds.feed import Feed, listed
from helpers.feeds.sizes import BATCH, At
from helpers.feeds.trial import Flags, Trial

QUICK, BEARABLE = 1.5, 8.0  # seconds of one run: to go beyond any window, and beyond a known one
COMBINATIONS = 16  # of flags, up to which all are tried
OFFSET = 4  # rows that a table of positions may have in front of its first, or behind its last
_SCALED_TOGETHER = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
_WORDS = {  # of the description, by padding
    "no": "not at all",
    "right": "right",
    "left": "left",
    "holes": "with holes",
    "causal": "causal",
    "bias": "normal numbers in an additive mask",
    "all": "altogether",
}


def infer(model: str | Path | files.Opened) -> tuple[list[Feed], str]:
    """Feeds for `model`, a file or what has been read of it, and in one line what was inferred.

    Raises `files.BadInput` where an input cannot be inferred, or the model runs on nothing tried.
    """
    trial = Trial(files.Opened.of(model))
    try:
        making = _Making(trial)
        return making.feeds(), making.description()
    finally:
        trial.scores.close()


class Variant(NamedTuple):
    """A feed to make: its sizes, and what its masks do, or `only` the one of that name."""

    name: str
    at: At
    padding: str
    only: str = ""


class _Making:
    """The feeds for a model, as they are made."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.sizes = trial, trial.sizes
        positions = reach.positions(trial.model)
        self.windows = reach.windows(trial.model, positions)
        self.tables = reach.tables(trial.model, positions)
        self.rows = reach.table(trial.model)
        operators = {node.op_type for node in graph.nodes(trial.model)}
        self.scaled_together = not operators.isdisjoint(_SCALED_TOGETHER)
        # Ids that are compared, since they mark padding; numbers that may say how far keys go.
        self.marking = any(entry.special or entry.role == "amount" for entry in trial.inputs)
        self.all_have_keys = False
        self.reached = 0  # positions, in the longest feed
        self.passed: list[str] = []  # feeds that are passed over, and why
        self.notes: list[str] = []
        self.paddings: set[str] = set()
        self.made: list[Feed] = []

    def feeds(self) -> list[Feed]:
        """All feeds that the model runs on, every combination of flags among them."""
        trial = self.trial
        smallest: list[tuple[Flags, At]] = []
        problems: list[Exception] = []
        chosen: list[tuple[bool, ...]] = []
        for flags in self._combinations():
            at = trial.smallest(flags, problems)
            if at is None:
                self.notes.append(f"not run: {_flags(flags)}")
                continue
            choice = trial.scores.choice(trial.arrays(at, "no", flags)) if flags else ()
            if choice not in chosen:
                smallest.append((flags, at))
                chosen.append(choice)
        if not smallest:
            raise trial.refused(problems)
        for flags, at in smallest:
            trial.find_senses(flags, at)
        for flags, at in smallest:
            prefix = f"{_flags(flags)}, " if flags else ""
            for variant in self._variants(flags, at):
                self._add(variant._replace(name=prefix + variant.name), flags)
        if not self.made:
            raise trial.refused(problems) if problems else self._none()
        self._other_branches(*smallest[0])
        self._name_what_is_left()
        return self.made

    def _none(self) -> files.BadInput:
        return files.BadInput(
            f"{self.trial.path}: expected a model that runs on inputs inferred from its graph,"
            f" found that it refuses each: {'; '.join(self.passed)[:400]}; give --inputs FEEDS.npz"
        )

    def _combinations(self) -> list[Flags]:
        """Values for the flags: all combinations, or of many flags one changed at a time."""
        names = [entry.name for entry in self.trial.flags]
        values = [inputs.flag_values(self.trial.model, entry) for entry in self.trial.flags]
        if np.prod([len(choices) for choices in values]) <= COMBINATIONS:
            return [dict(zip(names, each, strict=True)) for each in product(*values)]
        first, last = ({n: v[i] for n, v in zip(names, values, strict=True)} for i in (0, -1))
        single = [
            base | {name: value}
            for base in (first, last)
            for name, each in zip(names, values, strict=True)
            for value in each
        ]
        return [first, last, *(each for each in single if each not in (first, last))]

    def _name_what_is_left(self) -> None:
        unrun = [
            f"the {'else' if seen == {True} else 'then'} branch of {name}"
            for name, seen in self.trial.scores.branches.items()
            if len(seen) == 1
        ]
        if unrun:
            more = f" and {len(unrun) - 3} more" if len(unrun) > 3 else ""
            self.notes.append(f"not run: {', '.join(unrun[:3])}{more}")
        for window in self.windows:
            if window >= self.reached:
                self.notes.append(f"a window of {window} is not reached")
        for rows in self.tables:
            if self.reached < rows - OFFSET:
                self.notes.append(f"a table of {rows} positions is not reached to its end")

    def _variants(self, flags: Flags, smallest: At) -> Iterator[Variant]:
        """The feeds to make, the shortest first."""
        short, single, more = self._lengths(flags, smallest)
        self.trial.find_scales(flags, more)
        several = [entry for entry in self.trial.masks if entry.pairs or len(entry.dims) > 1]
        pairs = any(entry.pairs for entry in several)
        padded = bool(several or self.marking)
        yield Variant("short", single, "no")
        yield Variant("long, causal" if pairs else "long", more, "causal" if pairs else "no")
        if padded:
            yield Variant("short, padded on the right", short, "right")
            yield Variant("long, padded on the left", more, "left")
            yield Variant("short, with holes", short, "holes")
        for entry in several if len(several) > 1 else ():  # what one masks, another may hide
            yield Variant(
                f"short, {entry.name} alone padded on the right", short, "right", entry.name
            )
            yield Variant(f"short, {entry.name} alone with holes", short, "holes", entry.name)
        if several:
            yield Variant("short, one sample padding altogether", short, "all")
        if any(entry.additive for entry in several):
            yield Variant("short, a bias of normal numbers", short, "bias")
        if self.sizes.past:
            padding = "left" if padded else "no"
            past = dataclasses.replace(more, past=5)
            single, seven = (self.sizes.with_queries(past, number) for number in (1, 7))
            yield Variant("without past", dataclasses.replace(more, past=0), padding)
            yield Variant("a past, one query", dataclasses.replace(single, apart=0), padding)
            yield Variant("a past, several queries", seven, padding)
        yield from self._beyond(flags, more, "left" if padded else "no")

    def _lengths(self, flags: Flags, smallest: At) -> tuple[At, At, At]:
        """Sizes of the short feeds, of one sample of these, and of the long feeds."""
        trial = self.trial

        def runs(at: At) -> bool:
            return trial.problem(at, flags) is None

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
        same = self.sizes.assign(dataclasses.replace(long, batch=short.batch))
        if kinds & {"token", "signal"} and same == self.sizes.assign(short):
            others = [{"signal": 2 * smallest.signal, "token": smallest.token + 1}]
            others.append({"signal": 3 * smallest.signal, "token": 2 * smallest.token})
            failed = [
                trial.problem(dataclasses.replace(smallest, **change), flags) for change in others
            ]
            written = all(failed) and trial.written(failed[0], trial.counted(short))
            if written:
                self.notes.append(f"{written}; export it again with dynamo=True for other lengths")
        return short, single, more

    def _beyond(self, flags: Flags, long: At, padding: str) -> Iterator[Variant]:
        """Feeds beyond each window that can be reached, as long as a run is bearable."""
        kinds = set(self.sizes.kind.values())
        if not kinds & {"token", "signal"} or self.sizes.image:
            return
        start, past = self.trial.positions(long, flags), self.sizes.before(long)
        batch = 2 if long.batch > 1 else 1
        most = reach.ENOUGH if self.rows is None else self.rows

        def longer(length: int) -> At:
            if start == long.signal + past and "token" not in kinds:  # each frame is a position
                return dataclasses.replace(long, batch=batch, signal=length - past)
            signal = -(-long.signal * length // start) if "signal" in kinds else long.signal
            token = length - past if "token" in kinds else long.token
            return dataclasses.replace(long, batch=batch, token=token, signal=signal)

        length = self._longest(longer, start, most, flags)
        if length > start:
            yield Variant(f"beyond {length - 1} positions", longer(length), padding)
        if self.sizes.past:
            single = dataclasses.replace(self.sizes.with_queries(long, 1), batch=batch, apart=0)

            def farther(length: int) -> At:
                return dataclasses.replace(single, past=length - 1)

            length = self._longest(farther, 6, most, flags)
            if length > start:
                yield Variant(f"beyond a past of {length - 2}", farther(length), padding)

    def _longest(self, sized: Callable[[int], At], start: int, most: int, flags: Flags) -> int:
        """The greatest length up to `most` that the model runs on (a table of positions may end),
        and that takes little time, or is beyond a window."""
        near = {w + max(8, w // 8) for w in self.windows}
        near = {w for w in near if start < w < most}
        steps = sorted({64, 256, most} | near)
        length, spent = start, self.trial.seconds(sized(start), flags)
        for wanted in (step for step in steps if step in near or step > 2 * start):
            if wanted <= length:
                continue
            predicted = spent * (wanted / length) ** 2
            if predicted > (BEARABLE if wanted in near else QUICK):
                continue
            spent = self.trial.seconds(sized(wanted), flags)
            if spent == float("inf"):
                return self.trial.last(sized, length, wanted, flags)
            length = wanted
        return length

    def _add(self, variant: Variant, flags: Flags) -> None:
        """Make one feed, unless the model refuses it."""
        trial, (name, at, padding, only) = self.trial, variant
        if padding == "all" and self.scaled_together:
            return  # one scale for a whole tensor: what has no key would move all others
        if any(entry.counted for entry in trial.masks) and padding in ("all", "holes"):
            return  # keys are counted there, and none is no count
        if any(feed.name == name for feed in self.made):
            return
        try:
            arrays, masked, keys = self._tried(at, padding, flags, only)
        except Exception as error:  # ONNX Runtime's own types
            self.passed.append(f"{name} ({files.told(error, 160)})")
            return
        if self.scaled_together and any(rows.any() for rows in masked or ()):
            self.passed.append(f"{name} (rows without a key would move the scale of all others)")
            return
        keys_of = {
            entry.name: arrays[entry.name] == entry.keep
            for entry in trial.masks
            if len(entry.dims) == 2 and not entry.pairs
        }
        roles = ("ids", "floats", "integers")
        fixed = frozenset(entry.name for entry in trial.inputs if entry.role not in roles)
        self.paddings.add(padding)
        settled = trial.scores.settled(arrays, masked)
        self.made.append(Feed(name, arrays, keys_of, True, masked, fixed, settled))
        self.reached = max(self.reached, keys)

    def _tried(
        self, at: At, padding: str, flags: Flags, only: str
    ) -> tuple[masks.Arrays, list[np.ndarray] | None, int]:
        """Arrays that the model runs on, of one sample where it refuses several; where queries have
        no key, or None where the graph does not tell; and how many keys there are."""
        arrays = self.trial.arrays(at, padding, flags, only)
        try:
            return arrays, *self._masked(arrays, at)
        except Exception:  # ONNX Runtime's own types
            if at.batch == 1:
                raise
            return self._tried(dataclasses.replace(at, batch=1), padding, flags, only)

    def _masked(self, arrays: masks.Arrays, at: At) -> tuple[list[np.ndarray] | None, int]:
        """Run the model for where queries have no key. Where there is nothing to mask with, the
        first feed tells for all."""
        trial = self.trial
        if self.all_have_keys or not trial.scores:
            trial.session.run(None, arrays)
            return None, trial.counted(at)
        masked = trial.scores.masked(arrays)
        keys = max([score.shape[-1] for score in masked if score.ndim], default=trial.counted(at))
        lacking = [score.all(axis=-1) for score in masked]
        if not (trial.masks or trial.flags or self.marking):
            self.all_have_keys = not any(rows.any() for rows in lacking)
        return lacking or None, keys

    def _other_branches(self, flags: Flags, at: At) -> None:
        """Feeds of the sizes that conditions ask for, where a branch has not run yet."""
        if all(len(seen) > 1 for seen in self.trial.scores.branches.values()):
            return
        near = {
            condition + more
            for condition in reach.conditions(self.trial.model)
            for more in (-1, 0, 1)
        }
        for length in sorted({at.token, at.signal, *(c for c in near if 0 < c <= reach.ENOUGH)}):
            kinds = [{"token": length, "signal": length}]
            kinds += [{"past": length}] if self.sizes.past else []
            kinds += [{"batch": length}] if length < 9 else []
            for kind in kinds:
                other = dataclasses.replace(at, **kind)
                before = sum(map(len, self.trial.scores.branches.values()))
                try:
                    self.trial.scores.choice(self.trial.arrays(other, "no", flags))
                except Exception:  # ONNX Runtime's own types: it does not run so
                    continue
                if sum(map(len, self.trial.scores.branches.values())) > before:
                    name = ", ".join(f"{dimension} {length}" for dimension in kind)
                    self._add(Variant(f"for another branch: {name}", other, "no"), flags)

    def description(self) -> str:
        """What was inferred, in words that a user can check."""
        parts = listed(
            (entry.name, entry.described()) for entry in self.trial.inputs if entry.role != "flag"
        )
        for flag in self.trial.flags:
            fed = sorted({int(feed.arrays[flag.name].ravel()[0]) for feed in self.made})
            parts.append(f"{flag} flag, {' and '.join(map(str, fed))}")
        first = self.trial.inputs[0].name if self.trial.inputs else ""
        shapes = dict.fromkeys(str(feed.arrays[first].shape) for feed in self.made if first)
        parts.append(f"{first} {', '.join(shapes)}")
        if self.trial.masks or self.marking:
            padded = [word for padding, word in _WORDS.items() if padding in self.paddings]
            parts.append(f"padded {', '.join(padded)}")
        if self.passed:
            parts.append(f"passed over: {'; '.join(self.passed)}")
        return "inferred: " + "; ".join([*parts, *dict.fromkeys(self.notes)])


def _flags(flags: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in flags.items())
