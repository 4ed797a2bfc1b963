"""Time of one attention in each of its forms, against the standard's Attention on (B, S, N·D).

``python -m helpers.figures.attention_forms.measuring [--widths 64] [--lengths 128] [--rounds 12]``

Each is timed with its three products by weights, on ONNX Runtime with these in dynamic 8 bits
(there attention is a third of a model's time), and on OpenVINO's plugin as it comes. What is told
is the standard's time over that of a form, paired by round: above 1 is faster than it.

It may be run in parts: cells that are measured again replace their rows in
assets/attention_forms.csv, from which the picture beside it and the section of assets/results.md
are made.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers import benchmark, contenders, quantize
from helpers.contenders import Contender
from helpers.figures import page
from helpers.figures.attention_forms import forms, table
from helpers.figures.attention_forms.table import PROVIDERS
from helpers.figures.cells import ASSETS
from helpers.quiet import progress_on, quiet

HEADS = 12
WIDTHS, LENGTHS, BATCHES = (32, 64, 80, 128), (32, 128, 512, 1024), (1, 8)
QUICK = 0.01  # seconds that a turn takes at the least, of as many runs as it needs
FLOATS_A_SECOND = 5e10  # about what a small machine computes, to tell how many runs that is


def prepare(provider: str, width: int, masked: bool, folder: Path) -> list[Contender]:
    """The forms as contenders on that provider, their files in `folder`."""
    made = []
    for number, form in enumerate(forms.FORMS):
        if form in forms.ONLY_MASKED and not masked:
            continue
        path = forms.save(form, HEADS, width, masked, folder / f"{number}.onnx")
        if provider == "plugin":
            kind = "opset23" if form == forms.STANDARD else "plugin-default"
            made.append(contenders.openvino_plugin(form, path, precision=None, kind=kind))
            continue
        rounded = folder / f"{number}_int8.onnx"
        with quiet():
            quantize.dynamic(path, rounded)
        made.append(contenders.onnx(form, rounded, "ours-int8"))
    return made


def arrays(width: int, length: int, batch: int, masked: bool) -> dict[str, np.ndarray]:
    """x (batch, length, N·D), and the mask (batch, length): rows are padded to half at the most."""
    random = np.random.default_rng(0)
    given = {"x": random.normal(size=(batch, length, HEADS * width)).astype(np.float32)}
    if masked:
        full = length - np.arange(batch) * length // (2 * batch)
        given["attention_mask"] = (np.arange(length) < full[:, None]).astype(np.int64)
    return given


def measure(
    provider: str, width: int, masked: bool, cells: Sequence[tuple[int, int]], rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """For each of the `cells` (length, batch), a row for each form: its ratio, or its reason."""
    with tempfile.TemporaryDirectory() as folder:
        taking_part = prepare(provider, width, masked, Path(folder))
        for length, batch in cells:
            size = HEADS * width
            operations = batch * length * (6 * size**2 + 4 * length * size)
            repeats = int(np.clip(QUICK * FLOATS_A_SECOND / operations, 1, 50))
            name = f"{PROVIDERS[provider]}, D = {width}, {batch} × {length}"
            case = {name: arrays(width, length, batch, masked)}
            answer = benchmark.run(
                taking_part, case, rounds=rounds, repeats=repeats, at_once=len(taking_part)
            )[name]
            ratios = {label: speedup._asdict() for label, speedup in answer.speedups().items()}
            none = dict.fromkeys(("median", "low", "high"), np.nan)
            machine = f"{benchmark.processor()} ({benchmark.instruction_sets()})"
            cell = {"provider": provider, "width": width, "masked": masked}
            cell |= {"length": length, "batch": batch, "rounds": rounds, "processor": machine}
            yield [
                cell
                | {"form": contender.label}
                | ratios.get(contender.label, none)
                | {"reason": answer.reasons.get(contender.label, "")}
                for contender in taking_part
            ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "metavar": "N", "type": int}
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--widths", **several, default=WIDTHS, help="of a head")
    parser.add_argument("--lengths", **several, default=LENGTHS)
    parser.add_argument("--batches", **several, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=12, metavar="N")
    parser.add_argument("--csv", type=Path, default=ASSETS / "attention_forms.csv")
    parser.add_argument("--only-show", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    groups = itertools.product(given.providers, given.widths, (False, True))
    cells = [*itertools.product(given.lengths, given.batches)]
    for provider, width, masked in [] if given.only_show else groups:
        for rows in measure(provider, width, masked, cells, given.rounds):
            table.merge(given.csv, rows)
    rows = table.merge(given.csv, [])
    print(table.text(rows))
    table.draw(rows, given.csv.with_suffix(".svg"))
    if given.csv == ASSETS / "attention_forms.csv":
        page.put(ASSETS / "results.md", "attention_forms", table.page(rows))


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
