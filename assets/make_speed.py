"""Does fusing pay? Time on ONNX Runtime of what `helpers.fuse` makes, against the best of the rest.

``python assets/make_speed.py [--models bert vit] [--rounds 10] [--lengths 128] [--batches 1 8]``

Models of base size (stand-ins: published configurations with seeded weights), two lengths, batch 1
and 8. In each *cell* (model, length, batch) the others are: the exports unfused, ONNX Runtime's
optimizer at its best, onnxscript, transformers' ``ort_fusions``, and the export at opset 23. Who
does not compute what PyTorch computes takes no part. A *ratio* is the time of one contender over
that of the fastest of the others, paired by round: below 1 is faster than all of them.

It may be run in parts. A cell that is measured again replaces its rows in speed.csv, beside this
file; the summary, the picture, speed.svg, and the README's table are made of all cells there.
Export files go to a temporary folder, up to 10 GB for one model.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure

from helpers import benchmark, contenders, export, feeds, files, graph, models, parity
from helpers.contenders import Contender

ASSETS = Path(__file__).parent
LIMIT = 1.03  # the ratio to stay below in every cell
CLOSE = 1.15  # who is surely slower than this after the first rounds is not timed in the later
FIRST = 3  # rounds in which all take part
CELL = ["model", "length", "batch"]
NONE = {"ratio": "", "low": "", "high": ""}  # how it is written that there is none
TYPES = {"model": str, "length": int, "batch": int, "contender": str, "kind": str}
TYPES |= {"ratio": float, "low": float, "high": float, "rounds": int, "reason": str}
COLUMNS = list(TYPES)
LOOKS = {"torchscript": ("#D55E00", "P"), "dynamo": ("#0072B2", "o"), "opset23": ("#009E73", "D")}

Arrays = dict[str, np.ndarray]


# ── Models ──────────────────────────────────────────────────────────────────────────────────────


def _speech(batch: int, length: int) -> Arrays:
    """input_values (batch, samples), of `length` seconds."""
    return {"input_values": models.speech(length, batch).astype(np.float32)}


def _text(batch: int, length: int, types: bool = False) -> Arrays:
    """input_ids, attention_mask and with `types` token_type_ids, each (batch, length).

    The first row is full, and those after it are padded on the right, the last to about half.
    """
    ids = np.random.default_rng(0).integers(5, 30_000, (batch, length))
    full = length - np.arange(batch) * length // (2 * batch)
    mask = (np.arange(length) < full[:, None]).astype(np.int64)
    arrays = {"input_ids": ids, "attention_mask": mask}
    return arrays | ({"token_type_ids": np.zeros_like(ids)} if types else {})


def _image(batch: int, length: int) -> Arrays:
    """pixel_values (batch, 3, length, length)."""
    values = np.random.default_rng(0).normal(size=(batch, 3, length, length))
    return {"pixel_values": values.astype(np.float32)}


def _mel(batch: int, length: int) -> Arrays:
    """input_features (batch, 80, frames), 100 frames a second."""
    values = np.random.default_rng(0).normal(size=(batch, 80, 100 * length))
    return {"input_features": values.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Model:
    """One model: its published configuration, what it reads, and its two lengths in `unit`.

    `config` is where the configuration differs from the default of the class `model`. `model_type`
    is the one under which ONNX Runtime's optimizer fuses most of it. A model that takes one length
    alone is made for each, by `fixed`: what a length changes in its configuration.
    """

    repository: str
    model: str
    inputs: Callable[[int, int], Arrays]
    lengths: tuple[int, ...]
    unit: str
    model_type: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Callable[[int], Mapping[str, Any]] | None = None
    heads: int = 12
    width: int = 768


T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
WHISPER_SMALL = {  # of Whisper's sizes the one as wide and as deep as the base size of the others
    "d_model": 768,
    "encoder_layers": 12,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
}
MODELS = {
    "wav2vec2": Model(
        "facebook/wav2vec2-base-960h", "Wav2Vec2ForCTC", _speech, (5, 10), "s", "clip"
    ),
    "bert": Model(
        "google-bert/bert-base-uncased",
        "BertModel",
        functools.partial(_text, types=True),
        (128, 512),
        "tokens",
        "bert",
    ),
    "vit": Model(  # its second size is that of google/vit-base-patch16-384
        "google/vit-base-patch16-224",
        "ViTModel",
        _image,
        (224, 384),
        "pixels",
        "vit",
        fixed=lambda length: {"image_size": length},
    ),
    "whisper": Model(  # 30 s is what the published model takes; 10 s is the same, cut shorter
        "openai/whisper-small",
        "models.whisper.modeling_whisper.WhisperEncoder",
        _mel,
        (10, 30),
        "s",
        "bart",
        WHISPER_SMALL,
        fixed=lambda length: {"max_source_positions": 50 * length},
    ),
    "t5": Model("google-t5/t5-base", "T5EncoderModel", _text, (128, 512), "tokens", "t5", T5_BASE),
    "modernbert": Model(
        "answerdotai/ModernBERT-base", "ModernBertModel", _text, (128, 512), "tokens", "bert"
    ),
}


# ── Contenders ──────────────────────────────────────────────────────────────────────────────────


def prepare(
    model: Model, lengths: Sequence[int], folder: Path, ours: Sequence[str]
) -> list[Contender]:
    """All contenders for `lengths` (one alone, where those are fixed), their files in `folder`.

    `ours` are the routes whose graphs `helpers.fuse` is given. Who cannot be made or does not hold
    parity has a reason.
    """
    config = {**model.config, **(model.fixed(lengths[0]) if model.fixed else {})}
    module = models.stand_in(model.model, config)
    example = model.inputs(2, lengths[0] if model.fixed else min(lengths))
    tensors = {name: torch.from_numpy(array) for name, array in example.items()}
    paths: dict[tuple[str, str], Path] = {}
    failed: dict[Path, str] = {}
    ways = [("torchscript", "eager"), ("torchscript", "sdpa"), ("dynamo", "sdpa")]
    for route, attention in [*ways, ("opset23", "sdpa")]:
        paths[route, attention] = path = folder / f"{route}_{attention}.onnx"
        module.set_attn_implementation(attention)
        try:
            export.export(module, tensors, path, route)
        except Exception as error:  # whatever an exporter raises is the reason
            failed[path] = f"no export: {type(error).__name__}: {error}"[:240]
    exported = [path for path in paths.values() if path not in failed]
    if not exported:
        raise RuntimeError(f"{model.repository}: no export: {failed}")
    inferred, description = feeds.infer(exported[0])
    if not model.fixed:  # what is inferred is short
        longest = model.inputs(2, max(lengths))
        masks = {name: array != 0 for name, array in longest.items() if name == "attention_mask"}
        inferred.append(feeds.Feed("longest", longest, masks))
    judge = Judge(module, inferred, description, exported[0])

    def made(make: Callable[..., Contender], label: str, kind: str, way: tuple[str, str]):
        source = paths[way]
        if source in failed:
            return Contender(label, kind, reason=failed[source])
        return judge(make(label, source))

    sdpa, dynamo, opset23 = ("torchscript", "sdpa"), ("dynamo", "sdpa"), ("opset23", "sdpa")
    unfused = functools.partial(contenders.onnx, kind="unfused")
    as_exported = functools.partial(contenders.onnx, kind="opset23")
    return [
        made(unfused, "unfused (torchscript, SDPA)", "unfused", sdpa),
        made(unfused, "unfused (dynamo, SDPA)", "unfused", dynamo),
        best_stock(model, paths, failed, judge),
        made(contenders.onnxscript, "onnxscript (dynamo, SDPA)", "onnxscript", dynamo),
        made(contenders.transformers, "transformers (dynamo, SDPA)", "transformers", dynamo),
        made(as_exported, "opset 23 as exported (SDPA)", "opset23", opset23),
        *(made(contenders.fused, f"ours ({way}, SDPA)", "ours", (way, "sdpa")) for way in ours),
    ]


class Judge:
    """Keeps those who compute what the PyTorch module does, over `feeds`.

    Outputs of the module are computed once. Where there is padding, which rows have no key is read
    off the export `guide`, whose attention is not fused.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        feeds: Sequence[feeds.Feed],
        description: str,
        guide: Path,
    ):
        self.feeds, self.description = feeds, description
        self.guides = [guide] if any(feed.keys for feed in feeds) else []
        run, known = models.runner(module), {}

        @functools.wraps(run)
        def reference(arrays: Arrays) -> Arrays:
            if id(arrays) not in known:
                known[id(arrays)] = run(arrays)
            return known[id(arrays)]

        self.reference = reference

    def __call__(self, contender: Contender) -> Contender:
        """`contender`, with a reason where it does not hold."""
        if contender.reason:
            return contender
        both = [*self.guides, contender.path]
        try:
            report = parity.compare(self.reference, both, self.feeds, self.description)
        except files.BadInput as error:
            reason = str(error).replace(f"{contender.path.parent}/", "")
        else:
            found = report.candidates[-1]
            if found.held:
                return contender
            reason = found.reason or f"differs by {found.max_abs_diff:.0e}"
        return Contender(contender.label, contender.kind, reason=f"wrong: {reason}"[:240])


def best_stock(
    model: Model,
    paths: Mapping[tuple[str, str], Path],
    failed: Mapping[Path, str],
    judge: Callable[[Contender], Contender],
) -> Contender:
    """ONNX Runtime's optimizer at its best setting that holds parity: the one that fuses the most
    sites, then the one with the fewest nodes. It fuses attention of eager TorchScript graphs alone,
    with dynamic axes at its default level."""
    tried: list[tuple[int, int, Contender]] = []
    reasons: list[str] = []
    sizes = {"num_heads": model.heads, "hidden_size": model.width}
    for attention, raw in (("eager", False), ("eager", True), ("sdpa", False)):
        setting = f"{model.model_type}{', raw mask' if raw else ''} (torchscript, {attention})"
        source = paths["torchscript", attention]
        if raw and tried:  # what it makes by itself of the mask is right
            continue
        if source in failed:
            reasons.append(failed[source])
            continue
        label = f"stock, {setting}"
        made = judge(contenders.stock(label, source, model.model_type, **sizes, raw_mask=raw))
        if made.reason:
            reasons.append(f"{setting}: {made.reason}")
            continue
        optimised = graph.load(made.path, weights=False)
        sites = graph.sites(optimised)
        fused = sum(site.fused for site in sites)
        tried.append((-fused, sum(graph.counts(optimised).values()), made))
        if fused == len(sites):
            break
    if not tried:
        return Contender(f"stock, {model.model_type}", "stock", reason="; ".join(reasons))
    return min(tried, key=lambda one: one[:2])[2]


# ── Times ───────────────────────────────────────────────────────────────────────────────────────


def measure(
    those: Sequence[Contender], arrays: Arrays, name: str, rounds: int, at_once: int
) -> list[dict[str, Any]]:
    """A row for each contender on `arrays`: its ratio, with a 95 % interval, or its reason.

    All take part in the first rounds, `at_once` models in memory; ours and the others that may be
    the fastest are then timed in `rounds` more, together if memory allows. Who was too slow keeps
    the ratio of the first rounds.
    """
    able_first = sorted(those, key=lambda c: bool(c.reason))  # groups are compared by the first
    first = benchmark.run(able_first, {name: arrays}, rounds=FIRST, at_once=at_once)[name]
    print(first.conditions, flush=True)
    best, slow = ratios(first)
    rows = {label: (*ratio, FIRST) for label, ratio in slow.items()}
    reasons = dict(first.reasons)
    kept = [c for c in those if c.label in slow and (c.kind == "ours" or slow[c.label].low < CLOSE)]
    kept.sort(key=lambda c: c.label != best)  # the first is in each group, if they need several
    if kept:
        peak = max(first.measured[c.label].peak for c in kept)
        size = int(max(2, min(len(kept), 0.8 * psutil.virtual_memory().available // peak)))
        later = benchmark.run(kept, {name: arrays}, rounds=rounds, at_once=size)[name]
        rows = {label: row for label, row in rows.items() if label not in later.reasons}
        rows |= {label: (*ratio, rounds) for label, ratio in ratios(later)[1].items()}
        reasons |= later.reasons
    empty = (np.nan, np.nan, np.nan, 0)
    return [
        {"contender": c.label, "kind": c.kind}
        | dict(zip(("ratio", "low", "high", "rounds"), rows.get(c.label, empty), strict=True))
        | {"reason": reasons.get(c.label, "")}
        for c in those
    ]


def ratios(result: benchmark.Result) -> tuple[str, dict[str, benchmark.Speedup]]:
    """The fastest of the others, and by label each one's time over that one's."""
    kinds = {c.label: c.kind for c in result.contenders}
    found = {
        label: one.relative
        for label, one in result.measured.items()
        if np.isfinite(one.relative).all()
    }
    others = [label for label in found if kinds[label] != "ours"]
    if not others:
        return "", {}
    best = min(others, key=lambda label: float(np.median(found[label])))
    return best, {label: benchmark.speedup(one, found[best]) for label, one in found.items()}


# ── Results ─────────────────────────────────────────────────────────────────────────────────────


def merge(path: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Put `rows` into the table at `path`, where they replace those of the same cells."""
    table = pd.DataFrame(rows, columns=COLUMNS).astype(TYPES)
    if path.is_file():
        old = pd.read_csv(path, keep_default_na=False, na_values=NONE).astype(TYPES)
        again = set(table[CELL].itertuples(index=False, name=None))
        keep = [cell not in again for cell in old[CELL].itertuples(index=False, name=None)]
        table = pd.concat([old[keep], table])
    order = {name: place for place, name in enumerate(MODELS)}
    places = [table["batch"], table["length"], table["model"].map(order)]  # the last one first
    table = table.iloc[np.lexsort(places)].reset_index(drop=True)
    table = table.round({"ratio": 4, "low": 4, "high": 4})
    with files.replacing(path) as draft:
        table.to_csv(draft, index=False)
    return table


def cells(table: pd.DataFrame) -> dict[tuple[str, int, int], str]:
    """Each cell of `table` in words."""
    found = table[CELL].drop_duplicates().itertuples(index=False, name=None)
    return {
        (name, length, batch): f"{name}, {length} {MODELS[name].unit}, batch {batch}"
        for name, length, batch in found
    }


def by_model(table: pd.DataFrame) -> str:
    """For each model a table of ratios, contenders by cells, with the reasons of those without."""
    parts = []
    for name, rows in table.groupby("model", sort=False):
        shown = rows.assign(
            cell=[
                f"{length} {MODELS[name].unit} × {batch}"
                for length, batch in rows[["length", "batch"]].itertuples(index=False)
            ],
            text=[
                "none" if np.isnan(ratio) else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                for ratio, low, high in rows[["ratio", "low", "high"]].itertuples(index=False)
            ],
        )
        wide = shown.pivot(index="contender", columns="cell", values="text").fillna("")
        wide = wide.loc[shown["contender"].unique(), shown["cell"].unique()]
        wide.index.name = wide.columns.name = None
        parts.append(f"{name} ({MODELS[name].repository}), time over the fastest of the others")
        parts.append(wide.to_string())
        why = shown[shown["reason"] != ""].drop_duplicates(["contender", "reason"])
        parts += [f"  {row.contender}: {row.reason}" for row in why.itertuples()]
        parts.append("")
    return "\n".join(parts)


def mean(ratios: Sequence[float] | np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def summary(table: pd.DataFrame) -> str:
    """For each of ours the geometric mean of its ratios over all cells, and the cells it misses."""
    names, lines = cells(table), []
    ours = table[table["kind"] == "ours"]
    for label, rows in ours.groupby("contender", sort=False):
        timed = rows.dropna(subset="ratio")
        missed = [
            f"  misses {LIMIT}: {names[tuple(row[key] for key in CELL)]}: {row['ratio']:.3f}"
            f" ({row['low']:.3f} to {row['high']:.3f})"
            for row in timed[timed["ratio"] > LIMIT].to_dict("records")
        ]
        none = rows[rows["ratio"].isna()].to_dict("records")
        missed += [
            f"  no result: {names[tuple(row[key] for key in CELL)]}: {row['reason']}"
            for row in none
        ]
        if len(timed):
            total = f"geometric mean {mean(timed['ratio']):.3f} over {len(timed)} cells"
            within = int((timed["ratio"] <= LIMIT).sum())
            lines.append(f"{label}: {total}, {within} of {len(rows)} at most {LIMIT}")
        else:
            lines.append(f"{label}: no result")
        lines += missed
    best = ours.groupby(CELL, sort=False)["ratio"].min().dropna()
    if len(best):
        within = int((best <= LIMIT).sum())
        lines.append(
            f"the faster of ours: geometric mean {mean(best):.3f} over {len(best)} cells,"
            f" {within} of {len(names)} at most {LIMIT}"
        )
    return "\n".join(lines)


def markdown(table: pd.DataFrame) -> str:
    """A row for each cell: the ratios of ours, by their label, and who was the fastest other."""
    names = cells(table)
    ours = list(table[table["kind"] == "ours"]["contender"].unique())
    lines = [f"| {' | '.join(['cell', *ours, 'the fastest of the others'])} |"]
    lines.append("| --- " * (len(ours) + 2) + "|")
    for cell, rows in table.groupby(CELL, sort=False):
        found = {
            row["contender"]: f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            for row in rows.dropna(subset="ratio").to_dict("records")
        }
        others = rows[(rows["kind"] != "ours") & rows["ratio"].notna()]
        fastest = "" if others.empty else others.loc[others["ratio"].idxmin(), "contender"]
        lines.append(
            f"| {names[cell]} | {' | '.join(found.get(o, '') for o in ours)} | {fastest} |"
        )
    return "\n".join(lines)


def page(table: pd.DataFrame) -> str:
    """What the README shows: the summary, and the table."""
    return f"```\n{summary(table)}\n```\n\n{markdown(table)}"


def draw(table: pd.DataFrame, path: Path) -> Figure:
    """Ours in each cell, as dots with their intervals; the same bytes for the same table."""
    names = cells(table)
    places = {cell: row for row, cell in enumerate(names)}
    ours = table[(table["kind"] == "ours") & table["ratio"].notna()]
    with matplotlib.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 1.4 + 0.28 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color="black", linewidth=1)
        axes.axvline(LIMIT, color="grey", linewidth=1, linestyle="--")
        labels = list(ours["contender"].unique())
        for number, label in enumerate(labels):
            rows = ours[ours["contender"] == label]
            route = next(one for one in LOOKS if one in label)
            colour, marker = LOOKS[route]
            shift = 0.2 * (number - (len(labels) - 1) / 2)
            y = [places[cell] + shift for cell in rows[CELL].itertuples(index=False, name=None)]
            axes.hlines(y, rows["low"], rows["high"], color=colour, linewidth=2)
            axes.plot(rows["ratio"], y, marker, color=colour, markersize=6, label=label)
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.set_ylim(len(names) - 0.4, -0.6)
        figure.supxlabel(
            "time over that of the fastest of the others, median and 95 % interval\n"
            f"(below 1 is faster; the dashed line is at {LIMIT})",
            fontsize="medium",
        )
        axes.spines[["top", "right"]].set_visible(False)
        if labels:
            figure.legend(loc="outside upper center", ncols=len(labels), frameon=False)
        with files.replacing(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})
    return figure


# ── The command ─────────────────────────────────────────────────────────────────────────────────


def speed(
    name: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    rounds: int,
    ours: Sequence[str],
    at_once: int,
    path: Path,
) -> None:
    """Measure the cells of one model, each put into the table at `path` when it is done."""
    model = MODELS[name]
    for some in [[length] for length in lengths] if model.fixed else [list(lengths)]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"preparing {name}, {', '.join(map(str, some))} {model.unit} …", flush=True)
            those = prepare(model, some, Path(folder), ours)
            for one in those:
                print(f"  {one.label}: {one.reason or 'ready'}", flush=True)
            for length in some:
                for batch in batches:
                    cell = {"model": name, "length": length, "batch": batch}
                    case = f"{name}, {length} {model.unit}, batch {batch}"
                    found = measure(those, model.inputs(batch, length), case, rounds, at_once)
                    merge(path, [cell | row for row in found])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "metavar": "N", "type": int}
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--lengths", **several, help="in the model's unit; default: its own two")
    parser.add_argument("--batches", **several, default=[1, 8])
    parser.add_argument(
        "--ours",
        nargs="+",
        choices=list(LOOKS),
        default=["torchscript", "dynamo"],
        help="routes whose graphs are fused; default: torchscript dynamo",
    )
    parser.add_argument(
        "--at-once", type=int, default=3, metavar="N", help="models in memory in the first rounds"
    )
    parser.add_argument("--csv", type=Path, default=ASSETS / "speed.csv")
    parser.add_argument("--only-show", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    for name in () if given.only_show else given.models:
        speed(
            name,
            given.lengths or MODELS[name].lengths,
            given.batches,
            rounds=given.rounds,
            ours=given.ours,
            at_once=given.at_once,
            path=given.csv,
        )
    table = merge(given.csv, [])
    print(by_model(table))
    print(summary(table))
    draw(table, given.csv.with_suffix(".svg"))
    if given.csv == ASSETS / "speed.csv":
        files.put(ASSETS.parent / "README.md", "speed", page(table))


if __name__ == "__main__":
    main()
