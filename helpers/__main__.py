"""The helpers from a shell, on any .onnx file: COMMAND --help says what each of them takes."""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from helpers import bounds, files, packages
from helpers.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED
from helpers.quiet import progress_on


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, found {text!r}")
    return number


def _inspect(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import graph

    notes: list[str] = []
    model = graph.load(files.check(arguments.model, notes=notes), weights=False)
    notes += graph.notes(model)
    sites, operators = graph.sites(model), graph.counts(model)
    answer = {
        "opset": dict(model.opset_imports),
        "nodes": sum(operators.values()),
        "operators": operators,
        "sites": [{"name": site.name, "fused": site.fused, "layer": site.layer} for site in sites],
        "notes": notes,
    }
    opsets = ", ".join(f"{name or 'ai.onnx'} {opset}" for name, opset in answer["opset"].items())
    fused = sum(site.fused for site in sites)
    width = max((len(site.name) for site in sites), default=0)
    states = [("fused  " if site.fused else "unfused", site) for site in sites]
    lines = [
        f"{arguments.model}: opset {opsets}; {answer['nodes']} nodes",
        f"{len(sites)} attention {'site' if len(sites) == 1 else 'sites'}, {fused} fused",
        *(
            f"  {state}  {site.name:<{width}}  {site.layer or ''}".rstrip()
            for state, site in states
        ),
        *(f"note: {note}" for note in notes),
        "operators",
        *(f"  {count:>6}  {operator}" for operator, count in operators.items()),
    ]
    return DONE, answer, "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import feeds, parity

    reference, *candidates = [files.checked(path) for path in arguments.models]
    if not candidates:
        raise files.BadInput(
            f"{reference}: expected two models or more, found one; name what to compare it with"
        )
    if arguments.generate:
        from helpers import generate

        told = generate.compare([reference, *candidates], arguments.generate, arguments.inputs)
        return DONE if told.held else FAILED, told.to_json(), str(told)
    cases, description = feeds.read(arguments.inputs, reference)
    tolerance = arguments.tolerance
    report = parity.compare(reference, candidates, cases, description, tolerance=tolerance)
    if arguments.save_inputs:
        if report.worst.feed is None:
            raise files.BadInput(
                f"{report.worst.name}: expected a model that loads, to save the inputs on which it"
                f" differs most, found that it {report.worst.reason}; leave out --save-inputs"
            )
        feeds.save(report.worst.feed, arguments.save_inputs)
    return DONE if report.held else FAILED, report.to_json(), str(report)


def _explain(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import explain

    model = files.checked(arguments.model)
    suggestion = _suggested(arguments, model) if arguments.suggest else None
    if not (arguments.model_type or arguments.fusion or arguments.rules):
        if suggestion:
            return DONE, suggestion.to_json(), suggestion.text.rstrip("\n")
        raise files.BadInput(
            f"{arguments.model}: expected one of --model-type, --fusion, --rules and --suggest,"
            " found none; give one"
        )
    if arguments.rules:
        if arguments.what_if:
            raise files.BadInput("--what-if: expected --model-type or --fusion, found --rules")
        choice = {"rules": arguments.rules, "inputs": arguments.inputs}
    else:
        names = ("model_type", "fusion", "num_heads", "hidden_size", "inputs")
        choice = {name: getattr(arguments, name) for name in names}
        choice["opt_level"] = arguments.opt_level
    comparing = {"parity": arguments.parity, "write": arguments.write}
    explanation = explain.explain(model, **comparing, **choice)
    if arguments.what_if:
        own_level = choice.pop("opt_level")
        levels = [level for level in explain.LEVELS if level != own_level]
        explanation.what_if = explain.what_if(model, opt_levels=levels, **choice)
    if arguments.save:
        _save_cut(arguments, explanation)
    status = FAILED if explanation.failed else DONE
    answer, text = explanation.to_json(), f"{arguments.model}\n{explanation}"
    if suggestion:
        print(text, file=sys.stderr)
        answer, text = answer | suggestion.to_json(), suggestion.text.rstrip("\n")
    return status, answer, text


def _suggested(arguments: argparse.Namespace, model: Any) -> Any:
    """Rules for the model's sites, whose text alone goes to standard output."""
    from helpers import explain

    for option in ("save", "what_if"):
        if getattr(arguments, option):
            found = f"--{option.replace('_', '-')}"
            raise files.BadInput(f"--suggest: expected no {found} beside it; run it apart")
    return explain.suggest(model)


def _fuse(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import fuse

    model = files.checked(arguments.model)
    if arguments.capacity is not None and arguments.cache != "in-place":
        raise files.BadInput("--capacity: expected --cache in-place beside it, found it alone")
    if arguments.cache == "in-place" and arguments.target == "openvino":
        raise files.BadInput("--cache in-place: expected --target portable or cpu, found openvino")
    names = ("target", "inputs", "cache", "capacity", "drop_unchanged", "last_logits")
    options = {name: getattr(arguments, name) for name in names}
    done = fuse.fuse(model, arguments.out, **options)
    return DONE if done.held else FAILED, done.to_json(), f"{arguments.out}\n{done}"


def _quantize(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers import quantize

    model = files.checked(arguments.model)
    options = {name: getattr(arguments, name) for name in ("target", "bits", "inputs", "bound")}
    done = quantize.quantize(model, arguments.out, **options)
    return DONE if done.held else FAILED, done.to_json(), f"{arguments.out}\n{done}"


def _run(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers.figures import notebooks

    done = notebooks.run_all(arguments.names, in_place=arguments.in_place)
    lines = [
        f"{one['notebook']}: {one['seconds']} s, {one['memory'] / 2**30:.1f} GiB\n{one['result']}"
        for one in done
    ]
    return DONE, {"notebooks": done}, "\n".join(lines)


def _save_cut(arguments: argparse.Namespace, explanation: Any) -> None:
    """Write the neighbourhood of the first reason's node, as a picture or a model."""
    from helpers import graph, view

    marks = explanation.reasons[0].marks() if explanation.reasons else {}
    if arguments.save.suffix != ".onnx":
        view.save(arguments.model, arguments.save, **marks)
        return
    shown = view.cut(arguments.model, **marks)
    model = graph.load(arguments.model)
    taken = [graph.find(model, node.outputs[0].name) for node in shown.model.graph]
    files.save(graph.cut_out(model, taken), arguments.save, keep=files.data(arguments.model))


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
    arguments.wait = view.wait  # once the address is printed
    return DONE, {}, f"{shown}\n{view.serve(arguments.model, shown)} (Ctrl-C stops it)"


def _pages(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    from helpers.figures import pages

    made = pages.build(arguments.out)
    return DONE, made.to_json(), str(made)


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="MODEL.onnx")


def _compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    command.add_argument(
        "--inputs", type=Path, metavar="FEEDS.npz", help="one array for each input"
    )
    command.add_argument(
        "--tolerance",
        type=_positive,
        metavar="X",
        help="the largest difference to allow, in place of the inferred tolerance",
    )
    command.add_argument(
        "--generate",
        type=_count,
        metavar="N",
        help="of decoders with caches: whether they give the same N tokens, by the largest logit",
    )
    command.add_argument(
        "--save-inputs",
        type=Path,
        metavar="FEED.npz",
        help="write the feed with the largest difference, for --inputs",
    )


def _explain_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    fusion = command.add_mutually_exclusive_group()
    fusion.add_argument("--model-type", metavar="TYPE", help="of ONNX Runtime's optimizer: bert, …")
    fusion.add_argument("--fusion", metavar="FILE.py:CLASS", help="a Fusion or OnnxModel of yours")
    fusion.add_argument("--rules", metavar="onnxscript", help="or FILE.py:CLASS, a rewrite rule")
    command.add_argument("--num-heads", type=int, default=0, metavar="N")
    command.add_argument("--hidden-size", type=int, default=0, metavar="N")
    command.add_argument("--opt-level", type=int, choices=(0, 1, 2, 99))
    command.add_argument(
        "--parity",
        action=argparse.BooleanOptionalAction,
        help="say which sites fused wrong, too; for a fusion or rules of yours by default",
    )
    command.add_argument("--inputs", type=Path, metavar="FEEDS.npz", help="to compare on")
    command.add_argument(
        "--write", type=Path, metavar="OUT.onnx", help="what the fusion made, if parity holds"
    )
    command.add_argument(
        "--save", type=Path, metavar="CUT.onnx", help="what is near the first break, or an .svg"
    )
    command.add_argument(
        "--what-if", action="store_true", help="the same at the other levels, each compared"
    )
    command.add_argument(
        "--suggest", action="store_true", help="print a rule for each form of site, as Python"
    )


def _fuse_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="IN.onnx")
    command.add_argument("out", type=Path, metavar="OUT.onnx")
    command.add_argument(
        "--target",
        choices=("portable", "cpu", "openvino"),
        default="portable",
        help="the standard's operators alone, com.microsoft's too, or what OpenVINO runs fastest",
    )
    command.add_argument("--inputs", type=Path, metavar="FEEDS.npz", help="to compare on")
    command.add_argument(
        "--cache",
        choices=("growing", "in-place"),
        default="growing",
        help="of a decoder: caches that come out longer than they went in, or buffers that each"
        " step writes into, with an input past_length that says how far they are filled",
    )
    command.add_argument(
        "--capacity",
        type=_count,
        metavar="N",
        help="of caches in place, how many positions they have (default: as many as they are given"
        " with)",
    )
    command.add_argument(
        "--drop-unchanged",
        action="store_true",
        help="take off the outputs what is an input as it came in, such as cross-attention caches",
    )
    command.add_argument(
        "--last-logits",
        action="store_true",
        help="give logits of the last position alone; prompts are then to be padded on the left",
    )


def _quantize_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="IN.onnx")
    command.add_argument("out", type=Path, metavar="OUT.onnx")
    command.add_argument(
        "--target",
        choices=("cpu", "openvino"),
        default="cpu",
        help="what runs it: ONNX Runtime on the CPU, or OpenVINO",
    )
    command.add_argument(
        "--bits", type=int, choices=(8, 4), default=8, help="4: weights alone, as for decoders"
    )
    command.add_argument(
        "--inputs",
        type=Path,
        metavar="FEEDS.npz",
        help="one array for each input, eight rows or more, to calibrate on",
    )
    command.add_argument(
        "--bound",
        type=_positive,
        metavar="X",
        help="the largest error to allow, in standard deviations of an output (default: 0.1; in 4"
        " bits 0.25); layers are left in float until it holds",
    )


def _view_options(command: argparse.ArgumentParser) -> None:
    _model_options(command)
    command.add_argument("--around", metavar="NODE", help="the node, or a tensor that it computes")
    command.add_argument("--up", type=int, metavar="N", help="steps against the arrows (default 3)")
    command.add_argument("--down", type=int, metavar="N", help="steps along the arrows (default 3)")
    command.add_argument(
        "--path", dest="along", nargs="+", default=(), metavar="NODE", help="nodes to be numbered"
    )
    command.add_argument(
        "--break", dest="break_at", metavar="NODE", help="the node where it breaks"
    )
    command.add_argument(
        "--save", type=Path, metavar="PICTURE.svg", help="draw it to an .svg or .png, serve nothing"
    )
    command.add_argument("--chromium", metavar="FILE", help="what draws the picture")


def _run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names", nargs="*", metavar="NN", help="beginnings of notebooks' names; all unless given"
    )
    command.add_argument(
        "--in-place", action="store_true", help="write them where they are, and the README's table"
    )


def _pages_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")


# Each command: what it runs, what it takes, and what it is for.
COMMANDS = {
    "inspect": (_inspect, _model_options, "opset, operators and attention sites of a model"),
    "compare": (_compare, _compare_options, "whether models compute what the first of them does"),
    "explain": (_explain, _explain_options, "why a fusion did not match, site by site"),
    "fuse": (_fuse, _fuse_options, "every attention site as one operator, right or not at all"),
    "quantize": (_quantize, _quantize_options, "8 or 4 bits for a provider, proven"),
    "view": (
        _view,
        _view_options,
        "Netron on the part of a model that matters, live or as a picture",
    ),
    "run": (_run, _run_options, "run notebooks of this repository, into exports/"),
    "pages": (_pages, _pages_options, "README, notebooks and results as pages, for a browser"),
}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (run, add_options, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON document")
        add_options(command)
    return parser


def main(arguments: list[str] | None = None, prog: str = "python -m helpers") -> int:
    """Run one command; returns its exit status: 0 done, 1 the answer is a failure, 2 bad input.

    `arguments` are those of the command line by default, and `prog` is what its help calls it.
    """
    parsed = _parser(prog).parse_args(arguments)
    if line := packages.unlike_pinned():
        print(line, file=sys.stderr)
    models = getattr(parsed, "models", None) or ([parsed.model] if "model" in parsed else [])
    task = models[0] if models else getattr(parsed, "out", prog)
    limits = bounds.bounded(models) if models else contextlib.nullcontext()
    try:
        with progress_on(sys.stderr), limits:
            status, answer, text = parsed.run(parsed)
    except files.BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(packages.missing(error, task), file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # a damaged model that loads can make any library raise anything
        if not models:
            raise  # it is ours
        line = f"{task}: expected a model to work on, found {type(error).__name__}: {error};"
        print(files.BadInput(f"{line} check the model"), file=sys.stderr)
        return BAD_INPUT
    wait = getattr(parsed, "wait", None)
    try:
        print(json.dumps(answer) if parsed.json else text, flush=True)
        if wait:
            wait()
    except KeyboardInterrupt:
        return status if wait else INTERRUPTED  # what waits is ended so
    except BrokenPipeError:  # as in ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def script(prog: str = "transformers-onnx") -> int:
    """`main` as a program of its own, whose streams may lack signs (Windows' code pages do)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    return main(prog=prog)


if __name__ == "__main__":
    sys.exit(script("python -m helpers"))
