"""The condition in a rule's own Python code that said no, and the values of its operands.

A trace function (`sys.settrace`) keeps the frames of the code as `Call`s; when it has returned,
`decided` reads in its source which test was around the line where it gave up.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any


@dataclass
class Call:
    """A call of a rule's own code, or of a function that it called in its line `called`."""

    frame: FrameType
    called: int
    line: int = 0  # where it returned or raised
    calls: list[Call] = field(default_factory=list)


@functools.cache
def syntax(code: CodeType) -> ast.Module | None:
    """The source of a function, with the line numbers of its file; None where there is none."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):  # written in a shell; a lambda within an expression
        return None
    return ast.increment_lineno(tree, start - 1)


def decided(call: Call) -> tuple[str, dict[str, Any], list[str]]:
    """The condition that made a rule's code give up, its operands by their expressions, and where
    functions that it called had said no before."""
    frame, tree = call.frame, syntax(call.frame.f_code)
    around = [
        one
        for one in (ast.walk(tree) if tree else ())
        if isinstance(one, ast.stmt) and one.lineno <= call.line <= one.end_lineno
    ]
    if not around:
        source = linecache.getline(frame.f_code.co_filename, call.line).strip()
        return source, dict(frame.f_locals), []
    statement = condition = around[-1]  # the innermost, since ast.walk goes by depth
    if isinstance(statement, ast.If | ast.While):
        condition = statement.test
    elif isinstance(statement, ast.Raise) or _says_no(statement):
        tests = [one.test for one in around if isinstance(one, ast.If | ast.While)]
        condition = tests[-1] if tests else statement
    targets = [one.target for one in around if isinstance(one, ast.For)]
    parts = [condition, *targets]
    if not isinstance(statement, ast.If | ast.While):
        parts.append(statement)
    operands = {text: value for part in parts for text, value in _operands(part, frame) if text}
    within: list[str] = []
    lines = range(condition.lineno, condition.end_lineno + 1)
    inner = [one for one in call.calls if one.called in lines]
    if inner:
        source, more, deeper = decided(inner[-1])
        code = inner[-1].frame.f_code
        within = [f"{file_of(code)}:{inner[-1].line} in {code.co_name}: {source}", *deeper]
        operands |= {text: value for text, value in more.items() if text not in operands}
    return ast.unparse(condition), operands, within


def _says_no(statement: ast.stmt) -> bool:
    """Whether it returns a constant, or what `MatchResult.fail` does: the test is around it."""
    if not isinstance(statement, ast.Return):
        return False
    value = statement.value
    fails = isinstance(value, ast.Call) and getattr(value.func, "attr", None) == "fail"
    return value is None or fails or isinstance(value, ast.Constant)


def _operands(part: ast.AST, frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Names, attributes and items that `part` reads, with their values; nothing is called."""
    if isinstance(part, ast.Call):
        inner = [part.func.value] if isinstance(part.func, ast.Attribute) else []
        inner += [*part.args, *(word.value for word in part.keywords)]
    elif isinstance(part, ast.Name | ast.Attribute | ast.Subscript):
        text, inner = ast.unparse(part), []
        expression = ast.parse(text, mode="eval")
        if any(isinstance(one, ast.Call) for one in ast.walk(expression)):
            inner = list(ast.iter_child_nodes(part))
        else:
            try:
                value = eval(compile(expression, "", "eval"), frame.f_globals, frame.f_locals)
            except Exception:  # a name without a value yet, an item that is not there
                return
            tools = callable(value) or inspect.ismodule(value)
            if text != "self" and not tools and type(value).__name__ != "MatchResult":
                yield text, value
    else:
        inner = list(ast.iter_child_nodes(part))
    for one in inner:
        yield from _operands(one, frame)


def file_of(code: CodeType) -> str:
    return "notebook cell" if "ipykernel" in code.co_filename else PurePath(code.co_filename).name
