"""What was called: one call of a function of a fusion, and the function's syntax."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from helpers import graph
from helpers.explain.reasons import Attempt


@dataclass
class Step:
    """One call of a function of a fusion: `fuse` itself, or what it called in turn.

    `line` is where it returned, `local` its variables then, `called_at` the line of its caller.
    """

    code: CodeType
    called_at: int
    line: int = 0
    local: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict, repr=False)  # its module's
    value: Any = None
    attempts: list[tuple[int, Attempt]] = field(default_factory=list)  # by the line that asked
    inner: list[Step] = field(default_factory=list)


def is_generator(code: CodeType) -> bool:
    """Whether calls of a function cannot be followed, since it is left and entered again, or
    closed, at any time."""
    return bool(code.co_flags & inspect.CO_GENERATOR)


def file_of(code: CodeType) -> str:
    """The name of the file that a function is in."""
    return graph.file_name(code.co_filename)


@functools.cache
def syntax(code: CodeType) -> ast.Module:
    """The source of a function, with the line numbers of its file; empty where there is none."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, IndexError, TypeError):  # of ``exec``; a lambda in an expression
        return ast.Module([], [])
    return ast.increment_lineno(tree, max(start, 1) - 1)


class Function:
    """The syntax tree of a function, with each node's parent."""

    def __init__(self, tree: ast.Module) -> None:
        self.parent = {
            child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        self.statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]

    def at(self, line: int) -> ast.stmt:
        """The innermost statement that holds `line`."""
        return min(
            (
                statement
                for statement in self.statements
                if statement.lineno <= line <= statement.end_lineno
            ),
            key=lambda statement: (statement.end_lineno - statement.lineno, -statement.col_offset),
        )

    def around(self, node: ast.AST) -> Iterator[tuple[ast.If, bool]]:
        """The `if`s around `node`, innermost first, and whether it is in the branch of True."""
        while node in self.parent:
            node, inner = self.parent[node], node
            if isinstance(node, ast.If):
                yield node, inner in node.body

    def assigned(self, name: str, line: int) -> list[ast.stmt]:
        """The statements that give the variable `name` its value, up to `line`, last first."""

        def assigned(statement: ast.stmt) -> set[str]:
            return {read for target in assigned_to(statement) for read in variables_in(target)}

        statements = [
            statement
            for statement in self.statements
            if statement.lineno <= line and name in assigned(statement)
        ]
        return sorted(statements, key=lambda statement: -statement.lineno)


@functools.cache
def function_of(code: CodeType) -> Function | None:
    tree = syntax(code)
    return Function(tree) if tree.body else None


def variables_in(node: ast.AST) -> list[str]:
    """The variables that `node` reads, those of `self` as "self.NAME"."""
    variables = []
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self":
            variables.append(f"self.{part.attr}")
        elif isinstance(part, ast.Name) and part.id != "self":
            variables.append(part.id)
    return variables


def assigned_to(statement: ast.stmt) -> list[ast.expr]:
    """What a statement gives values to: by assignment, in a loop, or by growing it."""
    if isinstance(statement, ast.Assign):
        return statement.targets
    call = statement.value if isinstance(statement, ast.Expr) else None
    grows = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    if grows and call.func.attr in ("append", "extend", "add", "update"):
        return [call.func.value]
    return [statement.target] if hasattr(statement, "target") else []


def functions_called(node: ast.AST) -> set[str]:
    functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def assigned_from(statement: ast.stmt) -> list[ast.expr]:
    """The expressions that an assignment, a loop or a call to grow a list takes its values from."""
    if isinstance(statement, ast.For):
        return [statement.iter]
    if isinstance(statement, ast.Expr):
        return statement.value.args if isinstance(statement.value, ast.Call) else []
    return [statement.value] if getattr(statement, "value", None) else []
