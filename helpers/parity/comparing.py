"""Do two models compute the same? Outputs compared over several inputs, padding included.

Compared is every row that has at least one key (`rows`), to within what another order of summation
gives in the types that are computed in (`precision`). A row without a key must only be finite where
the reference is. Nothing compared is not parity.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers import files
from helpers.feeds import Feed
from helpers.parity.cases import cases_of
from helpers.parity.judging import Judge
from helpers.parity.reports import Report
from helpers.parity.runner import Model, Runner


def compare(
    reference: Model,
    candidates: Sequence[Model],
    feeds: Sequence[Feed],
    description: str,
    *,
    tolerance: float | None = None,
) -> Report:
    """Compare `candidates` with `reference` on each of `feeds`; `description` says what those are.

    A model is a file, or a function from input arrays to output arrays by name (as
    `models.runner` makes of PyTorch's). A file as the reference runs without the session's own
    optimisation, a candidate as users run it, with. The tolerance is that of the least precise type
    that either computes in, relative to each output's spread (`precision`), or the reference's own
    difference between optimised and not, where that is larger. 8-bit graphs that round to the same
    steps are compared without their rounding (`unrounded`); other ones without optimisation first,
    where noise counts only as far as scores 5 % off would still show. As they are run, they may
    then differ by a few times what the reference's own rounding changes. `tolerance` sets it, in
    absolute terms.

    A candidate that fails where the reference runs has not held. Raises `files.BadInput` where the
    reference fails or gives NaN in rows that are compared, where inputs or outputs do not match,
    and where there is nothing to compare.
    """
    reference, *candidates = [
        model if callable(model) else files.Opened.of(model) for model in (reference, *candidates)
    ]
    plain = Runner(reference, optimise=False)
    cases, passed = cases_of(plain, feeds, [reference, *candidates])
    if passed:
        description += f"; passed over: {'; '.join(passed)}"
    plain.close()
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(plain, cases, tolerance, Path(folder))
        judged = [judge.judged(model) for model in candidates]
        del judge  # whose sessions may read files there
    return Report(plain.name, judged, description)
