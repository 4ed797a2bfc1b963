"""One entry for the optimizer's fusions, a reader's own, and rewrite rules."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from helpers import feeds, files, fuse, graph
from helpers.errors import BadInput
from helpers.explain import optimizer, wrong_sites
from helpers.explain.reasons import Explanation
from helpers.explain.verdicts import Outcome, judged
from helpers.graph import repairs
from helpers.quiet import quiet

logger = logging.getLogger(__name__)

LEVELS = (0, 1, 2, 99)  # of `opt_level`: how far ONNX Runtime itself optimises first


def explain(
    path: str | Path | files.Opened,
    model_type: str | None = None,
    *,
    fusion: str | type | None = None,
    rules: Any = None,
    parity: bool | None = None,
    inputs: str | Path | None = None,
    write: str | Path | None = None,
    **choice: Any,
) -> Explanation:
    """Run a fusion on the model at `path`, and say why it did not fuse each attention site.

    One of three says which fusion. `model_type` is one of ONNX Runtime's optimizer ("bert", …), and
    `fusion` a reader's own, as `optimizer.applied` takes them, with more in `choice`: `num_heads`,
    `hidden_size`, `opt_level`, `options`, `save`. `rules` are rewrite rules of onnxscript, as
    `rules.applied` takes them ("onnxscript": its own). Where what these make needs a later opset
    than the file has, they are applied to the file brought to opset 23, as `fuse` does.

    With `parity`, what the fusion makes is compared with the file, on `inputs` (an .npz) or on
    inferred ones, and sites that fused and compute something else are marked `wrong`. That is the
    default for a reader's own fusion or rules, and with `write`: the file to which the result is
    written, if parity holds. Raises `BadInput` as these two do, where not exactly one of the three
    is given, and on `inputs` that do not fit.
    """
    given = {"model_type": model_type, "fusion": fusion, "rules": rules}
    own = fusion is not None or (rules is not None and rules != "onnxscript")
    compares = bool(own or write) if parity is None else parity
    _check_given(path, given, write=write, compares=compares)
    opened = files.Opened.of(path)
    if write:
        files.keep_apart(opened, write)
    to_compare = _inputs(opened, inputs) if compares else None
    with _draft(opened, write, compares) as draft, tempfile.TemporaryDirectory() as folder:
        outcome, read = _at_an_opset_that_fits(opened, given, draft, choice, Path(folder))
        answer = Explanation(outcome.optimizer, *judged(outcome), watched=outcome.watched)
        answer.notes = [
            *repairs.notes(repairs.inferred(opened.model)),
            *_converted_note(opened, read),
        ]
        model, sites, stopped = outcome.model, outcome.sites, outcome.stopped
        del outcome
        files.give_back(files.size(opened))
        if to_compare and not stopped:
            _compare(answer, opened, draft, to_compare, read, model, sites)
        if write and (answer.parity is None or not answer.parity.held):
            draft.unlink(missing_ok=True)  # so that nothing is written
        elif write:
            answer.written = str(write)
    for reason in answer.reasons:
        optimizer.locate(reason, model)
    return answer


Cases = tuple[list[feeds.Feed], str] | str  # and what was inferred, in words; or why there are none


def _inputs(opened: files.Opened, inputs: str | Path | None) -> Cases:
    """What to compare on. Raises `BadInput` on `inputs` that do not fit."""
    try:
        return feeds.read(inputs, opened)
    except files.BadInput as error:
        if inputs is not None:
            raise
        return str(error)


def _compare(
    answer: Explanation,
    opened: files.Opened,
    draft: Path,
    cases: Cases,
    read: files.Opened,
    model: ir.Model,
    sites: list[graph.Site],
) -> None:
    """Add to `answer` how what the fusion made compares with the file, or why that is not told."""
    if isinstance(cases, str):
        answer.not_compared = cases
        return
    try:
        compared = wrong_sites.find(opened, draft, *cases, model, sites, read)
    except files.BadInput as error:
        answer.not_compared = str(error)
        return
    wrong_sites.mark(answer, *compared)


@contextlib.contextmanager
def _draft(opened: files.Opened, write: str | Path | None, compares: bool) -> Iterator[Path | None]:
    """Where the fusion's result is put, if it is to be compared: where it is moved to the path to
    `write` from, if that is given."""
    if write:
        with files.writing(write, keep=opened.data) as draft:
            yield draft
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "fused.onnx" if compares else None


def _at_an_opset_that_fits(
    opened: files.Opened,
    given: dict[str, Any],
    draft: Path | None,
    choice: dict[str, Any],
    folder: Path,
) -> tuple[Outcome, files.Opened]:
    """Apply the fusion that is `given`; returns what it was applied to, too: the file, or where it
    makes operators that the file's opset does not have, the file at a later one, in `folder`."""
    outcome = _applied(opened, given, draft, choice)
    if not outcome.later:
        return outcome, opened
    logger.info(f"{', '.join(outcome.later)}: not of the file's opset, which is brought to 23 …")
    model = graph.load(opened.path)
    with quiet():
        fuse.convert(model)
    converted = folder / opened.path.name
    files.write(model, converted)
    del model
    for file in draft.parent.iterdir() if draft else ():
        file.unlink()  # data of which another would be appended to
    read = files.Opened(converted)
    return _applied(read, given, draft, choice), read


def _converted_note(opened: files.Opened, read: files.Opened) -> list[str]:
    if read is opened:
        return []
    opset = opened.model.opset_imports.get("", 1)
    return [f"brought from opset {opset} to {fuse.OPSET} first: what the fusion makes needs that"]


def _check_given(
    path: str | Path | files.Opened,
    given: dict[str, Any],
    *,
    write: str | Path | None,
    compares: bool,
) -> None:
    """Raises `BadInput` where not exactly one is `given`, or is to `write` what is not compared."""
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BadInput(
            f"{path}: expected one of {', '.join(given)}, found {' and '.join(named) or 'none'};"
            " give one"
        )
    if write and not compares:
        raise BadInput(
            f"{write}: expected parity, without which nothing is written, found that it is turned"
            " off; leave out --no-parity"
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
            told = {"tell_heads": False} | choice
            answer = explain(opened, model_type, opt_level=level, parity=True, **told)
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
