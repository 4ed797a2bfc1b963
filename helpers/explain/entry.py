"""One entry for the optimizer's fusions, a reader's own, and rewrite rules."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers import feeds, files
from helpers.errors import BadInput
from helpers.explain import optimizer, wrong_sites
from helpers.explain.reasons import Explanation
from helpers.explain.verdicts import Outcome, judged

logger = logging.getLogger(__name__)

LEVELS = (0, 1, 2, 99)  # of `opt_level`: how far ONNX Runtime itself optimises first


def explain(
    path: str | Path | files.Opened,
    model_type: str | None = None,
    *,
    fusion: str | type | None = None,
    rules: Any = None,
    parity: bool = False,
    inputs: str | Path | None = None,
    **choice: Any,
) -> Explanation:
    """Run a fusion on the model at `path`, and say why it did not fuse each attention site.

    One of three says which fusion. `model_type` is one of ONNX Runtime's optimizer ("bert", …), and
    `fusion` a reader's own, as `optimizer.applied` takes them, with more in `choice`: `num_heads`,
    `hidden_size`, `opt_level`, `options`, `save`. `rules` are rewrite rules of onnxscript, as
    `rules.applied` takes them ("onnxscript": its own).

    With `parity`, what the fusion makes is compared with the file, on `inputs` (an .npz) or on
    inferred ones, and sites that fused and compute something else are marked `wrong`. Raises
    `BadInput` as these two do, where not exactly one of the three is given, and on inputs that do
    not fit or cannot be inferred.
    """
    given = {"model_type": model_type, "fusion": fusion, "rules": rules}
    _check_given(path, given)
    opened = files.Opened.of(path)
    cases = feeds.read(inputs, opened) if parity else None
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "fused.onnx" if parity else None
        outcome = _applied(opened, given, draft, choice)
        answer = Explanation(outcome.optimizer, *judged(outcome))
        model, sites, stopped = outcome.model, outcome.sites, outcome.stopped
        del outcome
        files.give_back(files.size(opened))
        if cases and not stopped:
            compared = wrong_sites.find(opened, draft, *cases, model, sites)
            wrong_sites.mark(answer, *compared)
    if model is not None:
        for reason in answer.reasons:
            optimizer.locate(reason, model)
    return answer


def _check_given(path: str | Path | files.Opened, given: dict[str, Any]) -> None:
    """Raises `BadInput` where not exactly one is `given`."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadInput(
            f"{path}: expected one of {', '.join(given)}, found {' and '.join(named) or 'none'};"
            " give one"
        )


def _applied(
    opened: files.Opened, given: dict[str, Any], draft: Path | None, choice: dict[str, Any]
) -> Outcome:
    """Apply the fusion that is `given`."""
    if given["rules"] is None:
        return optimizer.applied(opened, given["model_type"], given["fusion"], draft, **choice)
    from helpers.explain import rules  # onnxscript takes a second to import

    return rules.applied(opened, given["rules"], draft, **choice)


def what_if(
    paths: Mapping[str, str | Path | files.Opened] | str | Path | files.Opened,
    model_type: str | None = None,
    *,
    opt_levels: Iterable[int] = LEVELS,
    **choice: Any,
) -> list[dict[str, Any]]:
    """`explain` each of `paths` (one, or by label: other routes, say) at each of `opt_levels`.

    Rows for a table: the file's label, level, sites, how many fused, whether the result is right
    (None: there is none, or nothing fused), and the causes of the sites left. `choice` is passed to
    `explain`.
    """
    named = paths if isinstance(paths, Mapping) else {Path(paths).name: paths}
    rows = []
    for label, path in named.items():
        opened = files.Opened.of(path)
        for level in opt_levels:
            logger.info(f"{label} at opt_level {level} …")
            answer = explain(opened, model_type, opt_level=level, parity=True, **choice)
            fused = sum(site.fused for site in answer.sites)
            rows.append(
                {
                    "file": label,
                    "opt_level": level,
                    "sites": len(answer.sites),
                    "fused": fused,
                    "held": answer.parity.held if answer.parity else None,
                    "causes": ", ".join(dict.fromkeys(reason.cause for reason in answer.reasons)),
                }
            )
    return rows
