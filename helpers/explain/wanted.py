"""What the operator of a wrong site wants, and what it got: told from values, not from shapes.

What an operator got is held against what the original graph has at its site: operands in the
layouts that `graph.operators` has for them, heads, scale, mask and bias. What differs is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from helpers import files
from helpers.explain import operand_order
from helpers.explain.got import Got, factor, rounding
from helpers.explain.site_numbers import SiteNumbers
from helpers.feeds import operator_masks
from helpers.graph import operators
from helpers.graph.operators import Holds, laid

_FLOATS = {"float16", "float32", "float64"}
_MASKS = (Holds.MASK, Holds.COUNT, Holds.ENDS, Holds.LAST)
_NEEDED = (Holds.QUERY, Holds.KEY, Holds.VALUE, Holds.HIDDEN, Holds.WEIGHTS)
_TYPED = {*_MASKS, Holds.BIAS, Holds.TOTAL}


def right(got: Got, site: SiteNumbers) -> bool:
    """Whether the operator gives what the original has, in rows that have a key."""
    if got.output is None:
        return False
    layout = "B N S V" if got.output.ndim == 4 else "B S N·V"
    context = laid(site.context, "B N S V", layout)
    if got.output.shape != context.shape:
        return False
    alive = ~site.hidden.all(axis=-1, keepdims=True)
    rows = laid(np.broadcast_to(alive, site.context.shape), "B N S V", layout)
    return factor(got.output[rows], context[rows]) == 1


def lines(got: Got, site: SiteNumbers) -> list[str]:
    """What differs between what the operator got and what the original has at its `site`."""
    factors, differs = operand_order.told(got, site)
    heads = [*_heads(got, site)]
    known = {Holds.QUERY, Holds.KEY} <= {*factors} and not heads
    scale = [*_scale(got, site, factors)] if known else []
    hidden = None if got.refused else _hidden(got, site)
    masks = [] if hidden is None else [*_masks(got, site, hidden), *_added(got, site, hidden)]
    return [*_refused(got, site), *heads, *differs, *scale, *masks]


def agreeing(got: Got, site: SiteNumbers) -> str:
    """What agrees, where nothing was found that differs."""
    factors, _ = operand_order.told(got, site)
    agree = [str(role) for role in factors]
    if site.scale is not None and {Holds.QUERY, Holds.KEY} <= {*factors}:
        agree.append("scale")
    if _hidden(got, site) is not None:
        agree += ["mask", "what is added to the scores"]
    what = f"{', '.join(agree)} agree with the original" if agree else "nothing could be compared"
    return f"{got.name}: {what}; what it gives does not agree"


# ── Refusals ────────────────────────────────────────────────────────────────────────────────────


def _refused(got: Got, site: SiteNumbers) -> Iterator[str]:
    """Which input the kernel refuses, with what it takes, and what it says itself."""
    if not got.refused:
        return
    sizes = _sizes(got, site)
    packs = any(one.layouts for one in got.operator.holding(Holds.PACKED))
    for one in got.operator.holding(*_NEEDED):
        if one.number not in got.given and not packs:
            yield f"{got.input(one)}: wants the {one.holds}, and is not given"
    for number, array in sorted(got.given.items()):
        inputs = [one for one in got.operator.inputs if one.number == number]
        layouts = dict.fromkeys(layout for one in inputs for layout in one.layouts)
        types = {one.type for one in inputs if one.holds in _TYPED}
        if types and array.dtype.name not in types | (_FLOATS if "float32" in types else set()):
            wants, found = " or ".join(sorted(types)), array.dtype.name
            yield f"{got.input(inputs[0])}: wants {wants}, got {found}"
        elif layouts and not any(_fits(layout, sizes, array.shape) for layout in layouts):
            wants = " or ".join(_layout(layout, sizes) for layout in layouts)
            yield f"{got.input(inputs[0])}: wants {wants}, got {array.shape}"
    yield f"{got.name} does not run: {short(got.refused)}"


def _sizes(got: Got, site: SiteNumbers) -> dict[str, int]:
    """Of each symbol of a layout, as the original has them."""
    sizes = site.sizes
    sizes |= {"P": got.past, "L": sizes["T"] - got.past, "K": got.heads(of_keys=True)}
    _, hidden = got.held(Holds.HIDDEN)
    return sizes if hidden is None else sizes | {"H": hidden.shape[-1]}


def _fits(layout: str, sizes: dict[str, int], shape: tuple[int, ...]) -> bool:
    try:
        return shape in operators.shapes(layout, sizes)
    except KeyError:  # a size that the site does not tell
        return len(layout.split()) == len(shape)


def _layout(layout: str, sizes: dict[str, int]) -> str:
    """A layout for a reader, with its shape: (B or 1, N or 1, S, T) = (2, 4, 5, 5)."""
    text = "(" + ", ".join(axis.replace("|", " or ") for axis in layout.split()) + ")"
    try:
        return f"{text} = {operators.shapes(layout, sizes)[0]}"
    except KeyError:
        return text


def short(message: str) -> str:
    """What ONNX Runtime says, in a line, without what it failed in and the condition's code."""
    text = files.told(message, 10_000)
    text = re.split(r"Status Message: |\[\w*InferenceError\] |Type Error: ", text)[-1]
    return text.split(" was false. ")[-1][:160].strip()


# ── Heads and scale ─────────────────────────────────────────────────────────────────────────────


def _heads(got: Got, site: SiteNumbers) -> Iterator[str]:
    total, operator = site.sizes["N"], got.operator
    if got.heads() != total:
        yield f"{got.name}, {operator.heads}: the original has {total} heads, got {got.heads()}"
        return
    own, apart = got.heads(of_keys=True), _apart(site.key)
    if operator.key_heads != operator.heads and own < apart:
        yield f"{got.name}, {operator.key_heads}: the original's keys have {apart} heads, got {own}"


def _apart(key: np.ndarray) -> int:
    """How many heads of keys there are, each repeated for a group of heads of queries."""
    total = key.shape[1]
    for count in range(1, total):
        group = total // count
        if total % count == 0 and (key == key[:, ::group].repeat(group, axis=1)).all():
            return count
    return total


def _scale(got: Got, site: SiteNumbers, factors: dict[Holds, float]) -> Iterator[str]:
    """Whether the scores are multiplied as in the original, its own operands taken."""
    if site.scale is None:
        return
    close, before = rounding(site.query), factors[Holds.QUERY] * factors[Holds.KEY]
    if abs(got.scale * before / site.scale - 1) > close:
        own = f"{got.scale:.4g}" + ("" if got.attribute("scale") else ", its default 1/√D")
        came = f", of queries and keys that come times {before:.4g}" if before != 1 else ""
        twice = before != 1 and abs(before / site.scale - 1) < close
        yield (
            f"{got.name}, scale: the original multiplies q·kᵀ by {site.scale:.4g}, the operator by"
            f" {own}{came}{': scaled twice' if twice else ''}"
        )
    cap = got.attribute("softcap")
    if abs(cap - site.softcap) > close * max(cap, site.softcap):
        yield f"{got.name}, softcap: the original has {site.softcap:.4g}, got {cap:.4g}"


# ── Mask and bias ───────────────────────────────────────────────────────────────────────────────


def _values(got: Got) -> dict[str, np.ndarray]:
    return {got.node.input[number]: array for number, array in got.given.items()}


def _hidden(got: Got, site: SiteNumbers) -> np.ndarray | None:
    """What the operator masks, (B, N, S, T); None where it has other sizes than the site."""
    try:
        return np.broadcast_to(operator_masks.masked(got.node, _values(got)), site.hidden.shape)
    except (KeyError, ValueError):
        return None


def _masks(got: Got, site: SiteNumbers, hidden: np.ndarray) -> Iterator[str]:
    """Whether the same keys are masked, in rows that have a key in the original."""
    place = ~site.hidden.all(axis=-1, keepdims=True) & np.ones_like(hidden)
    later = operator_masks.later(hidden)
    causal = [one[place & later].all() for one in (site.hidden, hidden)]
    if later.any() and causal[0] != causal[1]:
        place = place & ~later
        one, other = ("original", "operator")[:: 1 if causal[0] else -1]
        yield (
            f"{got.name}, {got.operator.causal}: the {one} masks later keys (causal), the {other}"
            " does not"
        )
    found, wanted = hidden[place], site.hidden[place]
    if (found != wanted).any():
        name = _mask_name(got, masks=bool(found.any()))
        yield f"{name}: {_difference(got, found, wanted)}"


def _difference(got: Got, found: np.ndarray, wanted: np.ndarray) -> str:
    """How what is masked is not what is `wanted`: True where a score is."""
    if (found == ~wanted).all():
        return "in the opposite sense: masks the keys that the original keeps"
    if found.any():
        if not wanted.any():
            return f"masks {found.sum()} of {found.size} scores, the original none"
        apart = f"in {(found != wanted).sum()} of {found.size} scores{_means(got)}"
        return f"masks other keys than the original {apart}"
    if _zeros_and_ones(got):
        return (
            "numbers 1 and 0 are added to the scores, and mask nothing; it wants 0 and a very low"
            " number, or in the standard Attention bool, True where a key is kept"
        )
    given = "is given no mask" if got.held(*_MASKS)[0] is None else "none"
    return f"the original masks {wanted.sum()} of {wanted.size} scores, the operator {given}"


def _mask_name(got: Got, *, masks: bool) -> str:
    """The input that masks, or that would."""
    mask, _ = got.held(*_MASKS)
    bias, _ = got.held(Holds.BIAS)
    if mask is None and masks and bias is not None:
        return got.input(bias)
    return got.input(mask or got.operator.holding(*_MASKS, Holds.BIAS)[0])


def _means(got: Got) -> str:
    """What a mask of one axis is by the operator's definition, which holes in it do not fit."""
    one, _ = got.held(*_MASKS)
    return f"; it is {one.holds}" if one is not None and one.holds is not Holds.MASK else ""


def _zeros_and_ones(got: Got) -> bool:
    """Whether what is added to the scores looks like a mask of 1 and 0."""
    added = operator_masks.added(got.node, _values(got))
    return added is not None and {*np.unique(added)} == {0, 1}


def _added(got: Got, site: SiteNumbers, hidden: np.ndarray) -> Iterator[str]:
    """Whether the same is added to the scores that neither masks, up to a number for each row."""
    seen = ~(hidden | site.hidden)
    added = operator_masks.added(got.node, _values(got))
    one = got.operator.holding(Holds.BIAS)[0]
    wants = _level(site.added, seen)
    found = _level(np.zeros(1) if added is None else added, seen)
    most = rounding(site.query) * max(1.0, np.abs(wants).max(), np.abs(found).max())
    told = _zeros_and_ones(got) and site.hidden.any()  # of a mask that is added
    if np.abs(found - wants).max() <= most or told:
        return
    if np.abs(found).max() <= most:
        yield f"{got.input(one)}: the original adds a bias to the scores, the operator none"
    elif np.abs(wants).max() <= most:
        yield f"{got.input(one)}: adds a bias to the scores, the original none"
    elif (by := factor(found, wants)) is not None:
        times = {2.0: "twice", -1.0: "with the other sign"}.get(round(by, 2), f"times {by:.3g}")
        yield f"{got.input(one)}: the original's bias is added {times}"
    elif found.shape[-1] == found.shape[-2] and factor(_turned(added, seen), wants) == 1:
        yield f"{got.input(one)}: wants the bias as (…, S, T), got it transposed, (…, T, S)"
    else:
        apart = np.abs(found - wants).max()
        yield f"{got.input(one)}: another bias than the original's, by up to {apart:.2g}"


def _turned(added: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return _level(added.swapaxes(-1, -2), seen)


def _level(added: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """`added` where it is `seen`, 0 elsewhere, less the mean of each row, which changes nothing."""
    added = np.where(seen, added, 0.0).astype(np.float64)
    counts = np.maximum(seen.sum(axis=-1, keepdims=True), 1)
    return np.where(seen, added - added.sum(axis=-1, keepdims=True) / counts, 0.0)
