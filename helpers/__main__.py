"""The helpers from a shell: ``python -m helpers inspect MODEL.onnx`` and the like."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from helpers import files

DONE, FAILED, BAD_INPUT = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def _inspect(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import graph

    model = graph.load(files.check(arguments.model), weights=False)
    sites, operators = graph.sites(model), graph.counts(model)
    answer = {
        "opset": dict(model.opset_imports),
        "nodes": sum(operators.values()),
        "operators": operators,
        "sites": [{"name": s.name, "fused": s.fused, "layer": s.layer} for s in sites],
    }
    opsets = ", ".join(f"{name or 'ai.onnx'} {opset}" for name, opset in answer["opset"].items())
    fused = sum(site.fused for site in sites)
    width = max((len(site.name) for site in sites), default=0)
    lines = [
        f"{arguments.model}: opset {opsets}; {answer['nodes']} nodes",
        f"{len(sites)} attention {'site' if len(sites) == 1 else 'sites'}, {fused} fused",
        *(
            f"  {'fused  ' if s.fused else 'unfused'}  {s.name:<{width}}  {s.layer or ''}".rstrip()
            for s in sites
        ),
        "operators",
        *(f"  {count:>6}  {operator}" for operator, count in operators.items()),
    ]
    return DONE, answer, "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import feeds, parity

    reference, *candidates = [files.check(path) for path in arguments.models]
    if not candidates:
        raise files.BadInput(
            f"{reference}: expected two models or more, found one; name what to compare it with"
        )
    if arguments.inputs:
        cases, description = feeds.load(arguments.inputs, reference)
    else:
        cases, description = feeds.infer(reference)
    report = parity.compare(reference, candidates, cases, description)
    return DONE if report.held else FAILED, report.to_json(), str(report)


def _view(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import view

    names = ("around", "along", "break_at", "up", "down")
    choice = {name: getattr(arguments, name) for name in names}
    if arguments.save:
        shown = view.save(arguments.model, arguments.save, chromium=arguments.chromium, **choice)
        answer = {"picture": str(arguments.save), **shown.to_json()}
        return DONE, answer, f"{arguments.save}: {shown}"
    shown = view.cut(arguments.model, **choice)
    if arguments.json:
        return DONE, shown.to_json(), ""
    import netron

    print(shown)
    print(f"{view.serve(arguments.model, shown)} (Ctrl-C stops it)", flush=True)
    netron.wait()
    return DONE, {}, "stopped"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        return command

    inspect = add("inspect", _inspect, "opset, operators and attention sites of a model")
    inspect.add_argument("model", type=Path, metavar="MODEL.onnx")
    compare = add("compare", _compare, "whether models compute what the first of them does")
    compare.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    compare.add_argument(
        "--inputs", type=Path, metavar="FEEDS.npz", help="one array for each input"
    )
    view = add("view", _view, "Netron on the part of a model that matters, live or as a picture")
    view.add_argument("model", type=Path, metavar="MODEL.onnx")
    view.add_argument("--around", metavar="NODE", help="the node, or a tensor that it computes")
    view.add_argument("--up", type=int, metavar="N", help="steps against the arrows (default 3)")
    view.add_argument("--down", type=int, metavar="N", help="steps along the arrows (default 3)")
    view.add_argument(
        "--path", dest="along", nargs="+", default=(), metavar="NODE", help="nodes to be numbered"
    )
    view.add_argument("--break", dest="break_at", metavar="NODE", help="the node where it breaks")
    view.add_argument(
        "--save", type=Path, metavar="PICTURE.svg", help="draw it to an .svg or .png, serve nothing"
    )
    view.add_argument("--chromium", metavar="FILE", help="what draws the picture")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 the answer is a failure, 2 bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        status, answer, text = parsed.run(parsed)
    except files.BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(answer) if parsed.json else text)
    return status


if __name__ == "__main__":
    sys.exit(main())
