"""One entry for the optimizer's fusions, a reader's own, and rewrite rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.errors import BadInput
from helpers.explain import optimizer
from helpers.explain.reasons import Explanation


def explain(
    path: str | Path,
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
    `fusion` a reader's own, as `optimizer.explain` takes them, with more in `choice`: `num_heads`,
    `hidden_size`, `opt_level`, `options`, `save`. `rules` are rewrite rules of onnxscript, as
    `rules.explain` takes them ("onnxscript": its own).

    With `parity`, what the fusion makes is compared with the file, on `inputs` (an .npz) or on
    inferred ones, and sites that fused and compute something else are marked `wrong`. Raises
    `BadInput` as these two do, and where not exactly one of the three is given.
    """
    given = {"model_type": model_type, "fusion": fusion, "rules": rules}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadInput(
            f"{path}: expected one of {', '.join(given)}, found {' and '.join(named) or 'none'};"
            " give one"
        )
    if rules is None:
        return optimizer.explain(
            path, model_type, fusion=fusion, parity=parity, inputs=inputs, **choice
        )
    from helpers.explain import rules as rewriting  # onnxscript takes a second to import

    return rewriting.explain(path, rules, parity=parity, inputs=inputs, **choice)
