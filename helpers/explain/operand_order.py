"""Whether an operator got the original's queries, keys and values, and what it got instead.

An array is held against each of the three in each order of their axes, by its numbers: a shape
alone does not tell (S, B, N·D) from (B, S, N·D).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np

from helpers.explain.got import ROLES, Got, Operand, factor, rounding
from helpers.explain.site_numbers import SiteNumbers
from helpers.graph.operators import Holds, laid

_AXES = dict(zip(ROLES, ("BNSD", "BNTD", "BNTV"), strict=True))


def told(got: Got, site: SiteNumbers) -> tuple[dict[Holds, float], list[str]]:
    """By which factor each operand is the original's, and a line for each that is not."""
    if line := _head_by_head(got, site):
        return {}, [line]
    factors, lines = {}, []
    for role, operand in got.operands().items():
        wants = _original(got, site, role, operand)
        same = wants is not None and wants.shape == operand.array.shape
        by = factor(operand.array, wants) if same else None
        if by is not None and (by == 1 or role is not Holds.VALUE):
            factors[role] = by
            continue
        axes = f"({', '.join(operand.layout.split())})"
        shape = f" = {wants.shape}" if wants is not None else ""
        found = _found(got, site, role, operand, wants)
        lines.append(f"{got.input(operand.one)}: wants the {role} as {axes}{shape}, got {found}")
    return factors, [*lines, *_past(got, site)]


def _past(got: Got, site: SiteNumbers) -> Iterator[str]:
    """A line for each input of past keys or values that is not the original's."""
    sides = {Holds.PAST_KEY: site.key, Holds.PAST_VALUE: site.value}
    sides = {role: whole[:, :, : got.past] for role, whole in sides.items()}
    if site.key.shape == site.value.shape:
        sides[Holds.PAST] = np.stack([sides[Holds.PAST_KEY], sides[Holds.PAST_VALUE]])
    for role in sides:
        one, array = got.held(role)
        if one is None:
            continue
        group = max(1, site.sizes["N"] // array.shape[-3])
        same = [
            other
            for other, whole in sides.items()
            if whole[..., ::group, :, :].shape == array.shape
            and factor(array, whole[..., ::group, :, :]) == 1
        ]
        if role not in same:
            found = f"the original's {same[0]}" if same else f"another tensor, {array.shape}"
            yield f"{got.input(one)}: wants the {role}, got {found}"


def _arrays(site: SiteNumbers) -> dict[Holds, np.ndarray]:
    return dict(zip(ROLES, (site.query, site.key, site.value), strict=True))


def _original(got: Got, site: SiteNumbers, role: Holds, operand: Operand) -> np.ndarray | None:
    """The original's operand in the layout of `operand`: of keys, the new ones, and one for each
    group of heads; None where the heads do not divide."""
    if role is Holds.QUERY:
        return laid(site.query, "B N S D", operand.layout)
    whole = _arrays(site)[role]
    shape, total = operand.array.shape, site.sizes["N"]
    own = shape[1] if len(shape) == 4 else shape[-1] // whole.shape[-1]
    if not own or total % own:
        return None
    symbols = operand.layout.replace("·", " ").split()
    axes = [next(one for one in names if one in symbols) for names in ("B", "KN", "LS", "VD")]
    return laid(whole[:, :: total // own, got.past :], " ".join(axes), operand.layout)


def _found(
    got: Got, site: SiteNumbers, role: Holds, operand: Operand, wants: np.ndarray | None
) -> str:
    """What an operand is instead of what is wanted."""
    array = operand.array
    for other in (role, *(one for one in ROLES if one is not role)):
        found, whole = "", _arrays(site)[other]
        new = whole if other is Holds.QUERY else whole[:, :, got.past :]
        for order in _orders(_AXES[other], operand.layout):
            whole = laid(new, " ".join(_AXES[other]), " ".join(order))
            by = factor(array, whole) if whole.size == array.size else None
            if by is None:
                continue
            whose = "them" if other is role else f"the original's {other}"
            times = "" if by == 1 else f" times {by:.3g}"
            axes = _merged(order, whole.shape, array.shape)
            if axes:
                return f"{whose}{times} as ({axes}) = {array.shape}{_kind(order)}"
            order = ", ".join(order)
            found = found or f"{whose}{times} as ({order}), reshaped to {array.shape}"
        if found:  # the numbers lie in another order than the shape says
            return f"{found} without a Transpose"
    if wants is not None and wants.shape == array.shape:
        rows = tuple(i for i, axis in enumerate(operand.layout.split()) if axis in ("B", "S", "L"))
        apart = array - wants
        if np.ptp(apart, axis=rows).max() <= rounding(array) * np.abs(wants).max():
            return "them with another bias of their projection, or with none"
        return "another tensor of that shape"
    return f"another tensor, {array.shape}"


def _orders(axes: str, layout: str) -> list[str]:
    """All orders of the axes: the one of the layout first, and then the usual ones."""
    wanted = re.sub("[SL]", axes[2], layout.replace("·", "").replace(" ", "").replace("K", "N"))
    wanted = re.sub("[DV]", axes[3], wanted)
    usual = [f"{axes[2]}BN{axes[3]}", f"B{axes[2]}N{axes[3]}", axes, f"BN{axes[3]}{axes[2]}"]
    return [*dict.fromkeys([wanted, *usual, *map("".join, itertools.permutations(axes))])]


def _kind(order: str) -> str:
    """What an order of axes is called."""
    if order[1] == "B":
        return ": time-major"
    if order[-1] in "ST":
        return ": transposed"
    return ": heads first" if order[1] == "N" else ""


def _merged(order: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The axes in `order`, of these sizes, as those of `shape`: "S, B, N·D"; "" where they are in
    no such way."""
    merged = []
    for cuts in itertools.combinations(range(1, 4), len(shape) - 1):
        ends = [*itertools.pairwise((0, *cuts, 4))]
        if tuple(int(np.prod(sizes[start:end])) for start, end in ends) == shape:
            merged.append(", ".join("·".join(order[start:end]) for start, end in ends))
    return next((axes for axes in merged if axes[-3:-1] == "N·"), (merged or [""])[0])


def _head_by_head(got: Got, site: SiteNumbers) -> str:
    """A line where packed weights are laid out head by head, (H, N·3·D)."""
    weights, whole = got.held(Holds.WEIGHTS)[0], got.packed()
    heads, width = site.sizes["N"], site.sizes["D"]
    if whole is None or whole.shape[-1] != 3 * heads * width or width != site.sizes["V"]:
        return ""
    parts = whole.reshape(*whole.shape[:2], heads, 3, width).transpose(3, 0, 2, 1, 4)
    for part, own in zip(parts, _arrays(site).values(), strict=True):
        if part.shape != own.shape or factor(part, own) is None:
            return ""
    return f"{got.input(weights)}: wants [Q|K|V], (H, 3·N·D), got them head by head, (H, N·3·D)"
