"""A Python module with a rewrite rule for each form of attention that a file has.

What the operator gets is read as `helpers.fuse` reads it, in a copy of the graph. A rule's pattern
is what the graph has there, node by node, and its `rewrite` makes what `helpers.fuse` would make.
"""

from __future__ import annotations

import dataclasses
import logging
import textwrap

import onnx_ir as ir
from onnx_ir.passes import common as passes

from helpers import files, graph
from helpers.explain.rule_text import RuleText
from helpers.explain.skeleton import Skeleton, Twin
from helpers.explain.statements import WIDTH
from helpers.fuse import attention, building, pipeline
from helpers.quiet import quiet

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Form:
    """Sites of one form, and the rule that serves them all."""

    rule: RuleText
    sites: list[graph.Site]
    name: str = ""


def written(opened: files.Opened) -> tuple[str, list[str]]:
    """The module for the sites of what is `opened`, and a line for each rule that is unfinished."""
    model = graph.load(opened.path, weights=False)
    before = model.opset_imports.get("", pipeline.OPSET)
    with quiet():
        pipeline.convert(model)
    if before < pipeline.OPSET:
        logger.info(f"from opset {before} to {pipeline.OPSET}, the first that has Attention")
    copy = model.clone()
    with quiet():
        passes.ShapeInferencePass()(copy)
    own = _own(model, copy)
    sites, left = graph.sites(model), []
    forms: dict[str, _Form] = {}
    for site, its_copy in zip(sites, graph.sites(copy), strict=True):
        if site.fused:
            continue
        rule = _rule(copy, site, its_copy, own)
        if rule.left:
            left.append(f"{site.name}: {rule.left}")
        forms.setdefault(rule.body(), _Form(rule, [])).sites.append(site)
    for line in left:
        logger.info(f"left to write: {line}")
    return _module(opened.path.name, [*forms.values()], sites), left


def _own(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    """The values of `model` by those of its `copy`."""
    own: dict[ir.Value, ir.Value] = {}
    for ours, theirs in zip(model.graphs(), copy.graphs(), strict=True):
        own |= zip(theirs.inputs, ours.inputs, strict=True)
        own |= zip(theirs.initializers.values(), ours.initializers.values(), strict=True)
    for ours, theirs in zip(graph.nodes(model), graph.nodes(copy), strict=True):
        own |= zip(theirs.outputs, ours.outputs, strict=True)
    return own


def _rule(
    copy: ir.Model, site: graph.Site, its_copy: graph.Site, own: dict[ir.Value, ir.Value]
) -> RuleText:
    try:
        reading = attention.read(copy, its_copy)
    except attention.Left as why:
        return RuleText(Skeleton(Twin(site, own)), str(why))
    reading.as_rule, reading.read_elsewhere = True, False
    outputs, result = building.made(reading)
    last = reading.site.context.outputs[0]
    while last.name != site.context.outputs[0].name:  # an Einsum, read as MatMul and Transpose
        node = last.consumers()[0]
        last, result = node.outputs[0], reading.tape.repeated(node, result)
    twin = Twin(site, own, reading, (outputs, result))
    skeleton = Skeleton(twin)
    outside = twin.taken() - {*skeleton.names}
    if outside:
        names = ", ".join(sorted(value.name or "" for value in outside))
        return RuleText(
            Skeleton(Twin(site, own)), f"{names} is needed, and no input of the pattern"
        )
    return RuleText(skeleton)


def _module(file: str, forms: list[_Form], sites: list[graph.Site]) -> str:
    """The whole text."""
    if not forms:
        state = "is one operator already" if sites else "is in it"
        many = f"each of its {len(sites)} attention sites" if sites else "no attention site"
        return f'"""No rule for {file}: {many} {state}."""\n'
    forms.sort(key=lambda form: -len(form.rule.skeleton.nodes))  # the first that matches is applied
    _name(forms)
    classes = [_class(form) for form in forms]
    body = "\n\n\n".join(classes)
    chosen = forms[0].name if len(forms) == 1 else "RULES"
    if len(forms) > 1:
        listed = f"RULES = [{', '.join(form.name for form in forms)}]"
        if len(listed) > WIDTH:
            listed = "\n".join(["RULES = [", *(f"    {form.name}," for form in forms), "]"])
        body += f"\n\n\n{listed}"
    read = [name for name in ("number", "rank") if f"{name}(" in body or f"map({name}," in body]
    summary = f'"""Rules that fuse the attention of {file}, made from its graph."""'
    if len(summary) > WIDTH:
        summary = f'"""Rules that fuse the attention of a graph, made from it.\n\n{file}\n"""'
    head = [
        summary,
        "",
        *(["import onnx_ir as ir"] if "ir." in body else []),
        "from onnxscript.rewriter import pattern",
        "",
        *([f"from helpers.graph.values import {', '.join(read)}", ""] if read else []),
    ]
    command = f"# python -m helpers explain {file} --rules FILE.py:{chosen} --write OUT.onnx"
    if len(command) > WIDTH:
        command = command.replace(" --rules", " \\\n#     --rules")
    # As ruff has it, two empty lines follow a class.
    tail = [*([""] if len(forms) > 1 else ["", ""]), command]
    return "\n".join([*head, "", body, *tail, ""])


def _name(forms: list[_Form]) -> None:
    """Give each form's class a name of its own."""
    taken: list[str] = []
    for form in forms:
        name = form.rule.name()
        taken.append(name)
        form.name = name if taken.count(name) == 1 else f"{name}{taken.count(name)}"


def _class(form: _Form) -> str:
    first, count = form.sites[0], len(form.sites)
    place = f"{first.name} in {first.layer}" if first.layer else first.name
    more = f", the first of {count} sites of this form" if count > 1 else ""
    made = f"Made from the site {place}{more}."
    docstring = textwrap.wrap(made, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        [
            f"class {form.name}(pattern.RewriteRuleClassBase):",
            f'    """{form.rule.formula()}',
            "",
            *(f"    {line}" for line in docstring),
            '    """',
            "",
            form.rule.body(),
        ]
    )
