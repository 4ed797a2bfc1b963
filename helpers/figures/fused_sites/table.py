"""Which fuser fuses which attention: fused_sites.csv, fused_sites.svg, and the table in results.md.

``python -m helpers.figures.fused_sites.table [--architectures BERT T5]``

Fifteen architectures of two layers by four routes of export, about 25 minutes. With
`--architectures`, the others keep what the csv has.
"""

import argparse
import csv
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from helpers import files
from helpers.figures import page
from helpers.figures.fused_sites import coverage
from helpers.figures.fused_sites.coverage import FUSERS, NONE, ROUTES, Result
from helpers.models.small import ARCHITECTURES
from helpers.quiet import progress_on

ASSETS = Path(__file__).parents[3] / "assets"
CSV, PICTURE = ASSETS / "fused_sites.csv", ASSETS / "fused_sites.svg"
COLOURS = {"all": "#009E73", "some": "#F0E442", "none": "#FFFFFF", "wrong": "#D55E00"}


def read() -> list[Result]:
    """The results in the csv, in the order of architectures, routes and fusers."""
    if not CSV.is_file():
        return []
    with CSV.open(newline="", encoding="utf-8") as file:
        rows = [
            Result(**{**row, "sites": int(row["sites"]), "fused": int(row["fused"])})
            for row in csv.DictReader(file)
        ]
    names = list(ARCHITECTURES), list(ROUTES), FUSERS
    place = [{name: i for i, name in enumerate(sequence)} for sequence in names]
    return sorted(
        rows, key=lambda row: (place[0][row.architecture], place[1][row.route], place[2][row.fuser])
    )


def save(results: Sequence[Result]) -> None:
    """Write the csv; a reason is one line."""
    with files.replacing(CSV) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)])
        writer.writeheader()
        writer.writerows(
            {**dataclasses.asdict(result), "reason": " ".join(result.reason.split())}
            for result in results
        )


def text(result: Result) -> str:
    """One cell in words: "2 of 2", or the mark."""
    return result.mark or f"{result.fused} of {result.sites}"


def markdown(results: Sequence[Result]) -> str:
    """A row for each route and fuser: sites fused of all, and how many results were wrong."""
    lines = ["| route | sites | " + " | ".join(FUSERS) + " |", "| --- " * (len(FUSERS) + 2) + "|"]
    for route in (*ROUTES, "all"):
        rows = [
            result for result in results if route in (result.route, "all") and result.mark != NONE
        ]
        sites = sum(row.sites for row in rows if row.fuser == FUSERS[0])
        cells = []
        for fuser in FUSERS:
            mine = [row for row in rows if row.fuser == fuser]
            bad = sum(bool(result.mark) for result in mine)
            cells.append(f"{sum(result.fused for result in mine)}" + (f" ({bad} ✗)" if bad else ""))
        lines.append(f"| {route} | {sites} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Sequence[Result]) -> None:
    """The picture: architectures by routes, and in each the fusers."""
    by_cell = {(result.architecture, result.route, result.fuser): result for result in results}
    wide = len(FUSERS)
    with matplotlib.rc_context({"svg.hashsalt": "fused_sites", "font.size": 8}):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        axes = figure.subplots()
        for y, architecture in enumerate(ARCHITECTURES):
            for r, route in enumerate(ROUTES):
                for f, fuser in enumerate(FUSERS):
                    result = by_cell.get((architecture, route, fuser))
                    if result is None:
                        continue
                    full = result.fused == result.sites
                    kind = "all" if full else "some" if result.fused else "none"
                    kind = "wrong" if result.mark else kind
                    x = r * (wide + 0.4) + f
                    axes.add_patch(
                        matplotlib.patches.Rectangle(
                            (x, y), 1, 1, facecolor=COLOURS[kind], edgecolor="#888888"
                        )
                    )
                    shown = "✗" if result.mark else f"{result.fused}/{result.sites}"
                    axes.text(x + 0.5, y + 0.5, shown, ha="center", va="center")
        middles = [r * (wide + 0.4) + f + 0.5 for r in range(len(ROUTES)) for f in range(wide)]
        axes.set_xticks(middles, FUSERS * len(ROUTES), rotation=90)
        axes.set_yticks([y + 0.5 for y in range(len(ARCHITECTURES))], ARCHITECTURES)
        for r, route in enumerate(ROUTES):
            axes.text(r * (wide + 0.4) + wide / 2, -0.3, route, ha="center", weight="bold")
        axes.set_xlim(-0.1, len(ROUTES) * (wide + 0.4))
        axes.set_ylim(len(ARCHITECTURES), -1)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_xlabel("sites fused and right; ✗: the result is wrong, or does not load or run")
        with files.replacing(PICTURE) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only-show", action="store_true", help="measure nothing; draw what is")
    chosen = parser.parse_args()
    results = read()
    for architecture in () if chosen.only_show else chosen.architectures:
        results = [result for result in results if result.architecture != architecture]
        with tempfile.TemporaryDirectory() as folder:
            for route in ROUTES:
                for result in coverage.run(architecture, route, Path(folder)):
                    results.append(result)
                    print(f"{architecture}, {route}, {result.fuser}: {text(result)}", flush=True)
        save(results)
    results = read()
    save(results)
    draw(results)
    table = markdown(results)
    page.put(ASSETS / "results.md", "fused_sites", table)
    print(table)


if __name__ == "__main__":
    with progress_on(sys.stderr):
        main()
