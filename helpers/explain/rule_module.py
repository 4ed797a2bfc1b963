"""A Python module with a rewrite rule for each form of attention that a file has.

What the operator gets is read as `helpers.fuse` reads it, in a copy of the graph. A rule's pattern
is what the graph has there, node by node, and its `rewrite` makes what `helpers.fuse` would make.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import textwrap

from helpers import files, graph
from helpers.explain import twins
from helpers.explain.rule_text import RuleText
from helpers.explain.skeleton import Skeleton
from helpers.explain.statements import WIDTH, printable
from helpers.fuse import pipeline
from helpers.quiet import quiet

_LEGEND = (
    f"opset {pipeline.OPSET}, the first that has Attention. Shapes: B batch, N heads, S queries, T"
    " keys, D width of a head; 1, one for all; ?, not known; …, any number or product."
)
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Form:
    """Sites of one form, and the rule that serves them all."""

    rule: RuleText
    sites: list[graph.Site]
    name: str = ""


def written(opened: files.Opened) -> tuple[str, list[str]]:
    """The module for the sites of what is `opened`, and a line for each rule that is unfinished."""
    model = graph.load(opened.path)
    before = model.opset_imports.get("", pipeline.OPSET)
    with quiet():
        pipeline.convert(model)
    if before < pipeline.OPSET:
        logger.info(f"the rules match the graph at opset {pipeline.OPSET}; it has {before}")
    forms: dict[str, _Form] = {}
    left = []
    for twin in twins.read(model):
        rule = _rule(twin)
        forms.setdefault(rule.form(), _Form(rule, [])).sites.append(twin.site)
        if rule.left:
            left.append(f"{printable(twin.site.name)}: {rule.left}")
    for line in left:
        logger.info(f"left to write: {line}")
    if not forms:
        state = "its attention is one operator already" if graph.sites(model) else "it has none"
        return (
            f'"""No rule for the attention of {printable(opened.path.name)}: {state}."""\n',
            left,
        )
    return _module(printable(opened.path.name), [*forms.values()]), left


def _rule(twin: twins.Twin) -> RuleText:
    skeleton = Skeleton(twin)
    if twin.left is None and (missing := skeleton.missing()):
        why = f"{', '.join(missing)} is needed, and no input of the pattern"
        skeleton = Skeleton(twin.unread(why))
    elif twin.left is None and (unsure := twin.unsure()):
        why = f"to know {unsure} for what masks the scores takes shapes, and none are stated"
        skeleton = Skeleton(twin.unread(why))
    return RuleText(skeleton)


def _module(file: str, forms: list[_Form]) -> str:
    """The whole text."""
    # The first that matches is applied: the longest patterns, and the most tests, come first.
    forms.sort(key=lambda form: (-len(form.rule.skeleton.nodes), -len(form.rule.tests())))
    _name(forms)
    classes = [_class(form) for form in forms]
    body = "\n\n\n".join(classes)
    chosen = forms[0].name if len(forms) == 1 else "RULES"
    if len(forms) > 1:
        listed = f"RULES = [{', '.join(form.name for form in forms)}]"
        if len(listed) > WIDTH:
            listed = "\n".join(["RULES = [", *(f"    {form.name}," for form in forms), "]"])
        body += f"\n\n\n{listed}"
    read = [name for name in ("dim", "number", "rank") if re.search(rf"\b{name}[(,]", body)]
    head = [
        '"""Rules that fuse the attention of a model, made from its graph.',
        "",
        *textwrap.wrap(f"The model is {file}, at {_LEGEND}", WIDTH, break_on_hyphens=False),
        '"""',
        "",
        *(["import onnx_ir as ir"] if "ir." in body else []),
        "from onnxscript.rewriter import pattern",
        "",
        *(["from helpers.fuse.masks import once_more"] if "once_more(" in body else []),
        *([f"from helpers.graph.values import {', '.join(read)}"] if read else []),
        *([""] if read or "once_more(" in body else []),
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
    place = printable(f"{first.name} in {first.layer}" if first.layer else first.name)
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
