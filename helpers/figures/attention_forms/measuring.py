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
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
LONG = 5e9  # operations of a run that is long enough by itself, a tenth of a second or less
MOST = 4096  # batch · length: above, a form is measured for minutes and tells nothing new


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
    provider: str, width: int, masked: bool, sizes: Sequence[tuple[int, int]], rounds: int
) -> Iterator[dict[str, Any]]:
    """For each of the `sizes` (length, batch), a row for each form: its ratio, or its reason.

    Short runs are repeated within a turn: they differ from themselves by more than long ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        taking_part = prepare(provider, width, masked, Path(folder))
        for repeats, some in itertools.groupby(sizes, lambda size: _repeats(width, *size)):
            cases = {
                f"{PROVIDERS[provider]}, D = {width}, {batch} × {length}": (length, batch)
                for length, batch in some
            }
            given = {name: arrays(width, *size, masked) for name, size in cases.items()}
            options = {"rounds": rounds, "repeats": repeats, "at_once": len(taking_part)}
            for name, answer in benchmark.run(taking_part, given, **options).items():
                length, batch = cases[name]
                cell = {"provider": provider, "masked": masked, "width": width}
                cell |= {"length": length, "batch": batch}
                yield from rows(cell, answer, rounds)


def _repeats(width: int, length: int, batch: int) -> int:
    """How many runs there are in a turn, of which the median counts."""
    size = HEADS * width
    operations = batch * length * (6 * size**2 + 4 * length * size)
    return 1 if operations > LONG else 9


def rows(cell: Mapping[str, Any], answer: benchmark.Result, rounds: int) -> list[dict[str, Any]]:
    """The rows of a cell: what `answer` has of each form."""
    speedups = answer.speedups()
    none = dict.fromkeys(table.FIGURES, np.nan)
    return [
        {
            **cell,
            "form": one.label,
            **(speedups[one.label]._asdict() if one.label in speedups else none),
            "rounds": rounds,
            "processor": benchmark.cpu_in_words(),
            "reason": answer.reasons.get(one.label, ""),
        }
        for one in answer.contenders
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
    sizes = [*itertools.product(given.lengths, given.batches)]
    sizes = [size for size in sizes if math.prod(size) <= MOST]
    for provider, width, masked in [] if given.only_show else groups:
        table.merge(given.csv, [*measure(provider, width, masked, sizes, given.rounds)])
    measured = table.merge(given.csv, [])
    print(table.text(measured))
    table.draw(measured, given.csv.with_suffix(".svg"))
    if given.csv == ASSETS / "attention_forms.csv":
        page.put(ASSETS / "results.md", "attention_forms", table.page(measured))


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
