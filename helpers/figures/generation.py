"""What does generation gain? A decoder's step, and its first token, by who runs it.

``python -m helpers.figures.generation [--rounds 12] [--only-show]``

GPT-2 base (a stand-in where its weights are not at hand: the published configuration with seeded
weights), one row, eight tokens after a prompt of 128 and of 896, and the first token of either.
Contenders are PyTorch with each of its caches, the export, what public tools make of it, and
`helpers.fuse` and `helpers.quantize`. All run with bound caches, so that nothing is copied between
steps but what the graph copies. The rows are kept in assets/generation.csv, from which the section
of assets/results.md is made. It takes a quarter of an hour, 6 GB of memory, and 6 GB on the disk.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers import benchmark, contenders, export, fuse, models, quantize
from helpers.contenders import AGAIN, Contender
from helpers.figures import cells, page
from helpers.figures.cells import ASSETS
from helpers.generate import timing
from helpers.quiet import progress_on

CSV = ASSETS / "generation.csv"
PROMPTS, TOKENS = (128, 896), 8
TYPES = {"case": str, "contender": str, "ours": bool, "speedup": float, "low": float}
TYPES |= {"high": float, "error": float, "rounds": int, "reason": str, "processor": str}
UNFUSED, IN_PLACE, EIGHT = "unfused", "fuse, in place", "quantize, 8 bits, in place"
# What `fuse` and `quantize` are to gain over the export, by case and contender.
WANTED = {("after 128", IN_PLACE): 1.0, ("after 896", IN_PLACE): 1 / 0.9}
WANTED |= {("after 128", EIGHT): 2.5, ("after 896", EIGHT): 2.5}
NEAR = 1.03  # how much longer than the fastest fp32 graph of others it may take


def lineup(folder: Path) -> list[Contender]:
    """All contenders; their files go to `folder`."""
    model = models.load("gpt2").model
    ids = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decode = export.for_generation(model, prompt, folder).decode
    factory = "helpers.generate.timing:pytorch"
    found = [
        contenders.pytorch("PyTorch", factory, name="gpt2"),
        contenders.pytorch("PyTorch, static cache", factory, name="gpt2", static=True),
        contenders.pytorch(
            "PyTorch, static cache, compiled", factory, name="gpt2", static=True, compiled=True
        ),
        contenders.decoder(UNFUSED, decode, "unfused"),
        contenders.again(contenders.decoder(UNFUSED, decode, "unfused")),
    ]
    for tool in (contenders.onnxscript, contenders.transformers):
        made = tool(tool.__name__, decode)
        found.append(made if made.reason else contenders.decoder(made.label, made.path, made.kind))
    for label, options in (
        ("fuse", {}),
        ("fuse, for the CPU", {"target": "cpu"}),
        (IN_PLACE, {"cache": "in-place"}),
        ("fuse, for the CPU, in place", {"target": "cpu", "cache": "in-place"}),
    ):
        path = folder / f"{label.replace(' ', '_')}.onnx"
        held(fuse.fuse(decode, path, last_logits=True, **options).held, label)
        found.append(contenders.decoder(label, path, "in-place" if "place" in label else "ours"))
    in_place = next(one.path for one in found if one.label == IN_PLACE)
    for label, bits in ((EIGHT, 8), ("quantize, 4 bits, in place", 4)):
        path = folder / f"{bits}.onnx"
        held(quantize.quantize(in_place, path, bits=bits).held, label)
        found.append(contenders.decoder(label, path, f"ours-int{bits}"))
    return found


def held(right: bool, label: str) -> None:
    if not right:
        raise ValueError(f"{label}: expected parity, found none")


def measure(folder: Path, rounds: int) -> list[dict]:
    """A row for each case and contender: its speed-up over the export, and the error of its logits
    against PyTorch's, root mean square over the standard deviation."""
    those = lineup(folder)
    words = models.load("gpt2").model.config.vocab_size
    given = {f"after {length}": (length, TOKENS) for length in PROMPTS}
    given |= {f"first token, {length}": (length, 0) for length in PROMPTS}
    arrays = {case: timing.given(1, *sizes, words) for case, sizes in given.items()}
    rows = []
    for case, result in benchmark.run(those, arrays, rounds=rounds).items():
        print(result.conditions, flush=True)
        speedups = result.against(UNFUSED).speedups()
        logits = {label: one.outputs["logits"] for label, one in result.measured.items()}
        exact = logits["PyTorch"]
        for one in those:
            median, low, high = speedups.get(one.label, (np.nan,) * 3)
            row = {"case": case, "contender": one.label, "speedup": median, "low": low}
            error = (
                (logits[one.label] - exact).std() / exact.std() if one.label in logits else np.nan
            )
            row |= {"high": high, "error": float(f"{error:.2g}")}
            row |= {"ours": one.label.startswith(("fuse", "quantize")), "rounds": rounds}
            row |= {
                "reason": result.reasons.get(one.label, ""),
                "processor": benchmark.cpu_in_words(),
            }
            rows.append(row)
    return rows


def summary(table: pd.DataFrame) -> list[str]:
    """Whether each of `WANTED` is gained, and whether ours is as fast as the fastest of others."""
    lines = []
    for case, rows in table.groupby("case", sort=False):
        of = rows.set_index("contender")
        for (where, label), least in WANTED.items():
            if where == case:
                told = f"{case}: {label}: {shown(of.loc[label])} over unfused"
                lines.append(f"{told}; wanted {least:.2f}: {verdict(of.loc[label], least)}")
        others = rows[~rows["ours"] & ~rows["contender"].str.endswith(AGAIN)].dropna(subset="low")
        best = others.loc[others["speedup"].idxmax()]
        ratio = of.loc[IN_PLACE, "speedup"] / best["speedup"]
        within = "as wanted" if ratio * NEAR >= 1 else "missed"
        lines.append(
            f"{case}: {IN_PLACE}: {ratio:.2f} over {best['contender']}, the fastest of others;"
            f" wanted {1 / NEAR:.2f}: {within}"
        )
    return lines


def verdict(row: pd.Series, least: float) -> str:
    return "as wanted" if row["speedup"] >= least else "missed"


def shown(row: pd.Series) -> str:
    if np.isnan(row["speedup"]):
        return row["reason"]
    return f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def by_case(table: pd.DataFrame) -> pd.DataFrame:
    """The speed-ups over the export, in words, contenders by cases."""
    told = table.assign(told=[shown(row) for _, row in table.iterrows()])
    wide = told.pivot(index="contender", columns="case", values="told")
    wide = wide.loc[table["contender"].unique(), table["case"].unique()]
    return wide.rename_axis(index=None, columns=None)


def markdown(table: pd.DataFrame) -> str:
    """What the page of results shows: the summary, and a row for each contender."""
    wide, errors = by_case(table), table.groupby("contender")["error"].max()
    lines = ["```", *summary(table), "```", ""]
    told = "error of the last logits, root mean square, in their spread (the largest of all cases)"
    lines.append(f"Measured on {table['processor'].iloc[0]}; {told}.")
    heads = ["contender", *wide.columns, "error"]
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for label, row in wide.iterrows():
        error = "" if np.isnan(errors[label]) else f"{errors[label]:.0e}"
        lines.append(f"| {' | '.join([label, *row, error])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, metavar="N")
    parser.add_argument("--only-show", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    rows = []
    if not given.only_show:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), given.rounds)
    for row in rows:
        row |= {name: round(row[name], 4) for name in ("speedup", "low", "high")}
    table = cells.merge(CSV, rows, TYPES, cell=["case"])
    print("\n".join(summary(table)))
    page.put(ASSETS / "results.md", "generation", markdown(table))


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
