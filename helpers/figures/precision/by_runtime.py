"""One cell of what was measured: the fastest on each runtime and in each precision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.contenders import AGAIN
from helpers.figures.cells import CELL
from helpers.figures.precision.table import Row

RUNTIMES = ("PyTorch", "ONNX Runtime", "ONNX Runtime with OpenVINO", "OpenVINO")
PRECISIONS = ("fp32", "bf16", "8 bits", "8 bits, calibrated")
SIDES = {"yes": "ours", "no": "theirs"}


def read(path: str | Path, model: str, length: int, batch: int) -> pd.DataFrame:
    """The rows of one cell of the table at `path`. Raises ValueError where it was not measured."""
    table = pd.read_csv(path)
    rows = table[(table[CELL] == [model, length, batch]).all(axis=1)]
    if rows.empty:
        raise ValueError(f"{path}: expected {model}, {length}, batch {batch}, found no row of it")
    return rows


def fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """The fastest of theirs and of ours in one cell, on each runtime and in each precision, with
    the speed-up against PyTorch eager in fp32, and the quality."""
    timed = rows[rows["ratio"].notna() & ~rows["contender"].str.endswith(AGAIN)]
    found: dict[tuple[str, str], dict[tuple[str, str], Any]] = {}
    for row in timed.sort_values("ratio").to_dict("records"):
        cells_of = found.setdefault((runtime(row), computed_in(row)), {})
        side = SIDES[row["ours"]]
        if (side, "speed-up") not in cells_of:
            cells_of[side, "speed-up"] = f"{1 / row['ratio']:.2f}"
            cells_of[side, row["measure"]] = f"{row['quality']:.3g}"
    table = pd.DataFrame(found).T.fillna("")
    columns = [(s, name) for s in SIDES.values() for name in ("speed-up", timed["measure"].iloc[0])]
    columns = pd.MultiIndex.from_tuples(columns)
    return table.reindex(index=_in_order(found), columns=columns, fill_value="")


def _in_order(found: Mapping[tuple[str, str], Any]) -> pd.MultiIndex:
    every = [(runtime, precision) for runtime in RUNTIMES for precision in PRECISIONS]
    return pd.MultiIndex.from_tuples([one for one in every if one in found])


def runtime(row: Row) -> str:
    """What runs it, by its kind."""
    kind = row["kind"].removesuffix("-int8")
    if kind in ("pytorch", "pytorch-bf16", "compiled", "compiled-bf16"):
        return RUNTIMES[0]
    if "plugin" in kind:
        return RUNTIMES[2]
    return RUNTIMES[3 if "openvino" in kind else 1]


def computed_in(row: Row) -> str:
    """Its precision: that of the file where this is in 8 bits, else that of the products."""
    if "int8" in row["kind"]:
        calibrated = "static" in row["kind"] or row["contender"].endswith(" calibrated")
        return PRECISIONS[3 if calibrated else 2]
    return PRECISIONS["bf16" in row["precision"]]
