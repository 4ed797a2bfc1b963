"""Tables of what was measured cell by cell (model, length, batch, say), kept in a CSV; what the
commands that measure models take."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import files
from helpers.figures.speed.models import Model

ASSETS = Path(__file__).parents[2] / "assets"
CELL = ["model", "length", "batch"]
BATCHES = [1, 8]

Types = Mapping[str, type]  # of each column, by name
Models = Mapping[str, Model]


def merge(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    types: Types,
    models: Models | None = None,
    cell: Sequence[str] = CELL,
) -> pd.DataFrame:
    """Put `rows` into the table at `path`, where they replace those of the same cells, which are
    the same in the columns of `cell`.

    The cells are in the order of these, and of `models`.
    """
    table = pd.DataFrame(rows, columns=list(types)).astype(types)
    floats = [name for name, kind in types.items() if kind is float]
    if path.is_file():
        none = dict.fromkeys(floats, "")  # how it is written that there is no number
        old = pd.read_csv(path, keep_default_na=False, na_values=none).astype(types)
        again = set(table[[*cell]].itertuples(index=False, name=None))
        keep = [one not in again for one in old[[*cell]].itertuples(index=False, name=None)]
        table = pd.concat([old[keep], table])
    order = {name: place for place, name in enumerate(models or ())}

    def places(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name == "model" else column

    table = table.sort_values([*cell], key=places, kind="stable").reset_index(drop=True)
    with files.replacing(path) as draft:
        table.to_csv(draft, index=False)
    return table


def names(table: pd.DataFrame, models: Models) -> dict[tuple[str, int, int], str]:
    """Each cell of `table` in words."""
    rows = table[CELL].drop_duplicates().itertuples(index=False, name=None)
    return {
        (name, length, batch): f"{name}, {length} {models[name].unit}, batch {batch}"
        for name, length, batch in rows
    }


def mean(ratios: Sequence[float] | np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def parser(description: str, models: Models, csv: Path, *, at_once: int) -> argparse.ArgumentParser:
    """What a command takes that measures cells of `models` into the table at `csv`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "metavar": "N", "type": int}
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--lengths", **several, help="in the model's unit; default: its own two")
    parser.add_argument("--batches", **several, default=BATCHES)
    parser.add_argument(
        "--at-once",
        type=int,
        default=at_once,
        metavar="N",
        help="models in memory in the first rounds",
    )
    parser.add_argument("--csv", type=Path, default=csv)
    parser.add_argument("--only-show", action="store_true", help="measure nothing")
    return parser
