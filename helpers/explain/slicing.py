"""Read the source of a fusion: which test made it return, and what that test was about.

A slice through the code, from the `return` backwards: the `if` around it, those of its conditions
that decided, the variables in them, what these were assigned from. Where that leads to a path that
did not match, the path is the reason; else the condition is, with the values of its operands.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helpers.explain.calls import (
    Step,
    assigned_from,
    assigned_to,
    file_of,
    functions_called,
    variables_in,
)
from helpers.explain.conditions import Conditions
from helpers.explain.reasons import Attempt

DEPTH = 3  # assignments that are followed back from a condition
OPERANDS = 16  # that are told of one


@dataclass
class GaveUp:
    """Where a function gave up: at `line`, by a `return` or at its `end`.

    `broken` are the paths that did not match and that this was about, `none` the variables that
    they left None. Without such, `test` is the condition and `operands` the values in it. `within`
    are the functions called, "FILE:LINE SOURCE", that gave up first; `calls` the names of functions
    that the slice leads to.
    """

    line: int
    source: str
    end: bool
    test: str = ""
    broken: list[Attempt] = field(default_factory=list)
    none: list[str] = field(default_factory=list)
    operands: dict[str, str] = field(default_factory=dict)
    within: list[str] = field(default_factory=list)
    calls: set[str] = field(default_factory=set)
    values: list[Any] = field(default_factory=list)  # of the condition's operands themselves


def _missing(value: Any) -> bool:
    """Whether a value says that nothing was found, or not all of it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple):
        return any(_missing(part) for part in value)
    if isinstance(value, list):
        return not value or any(part is None for part in value)
    return value is None or value is False or (isinstance(value, (int, str)) and value in (-1, ""))


def _new_variables(expressions: list[ast.expr], seen: set[str]) -> list[str]:
    """The variables that `expressions` read, each once, but for those `seen`."""
    read = (name for expression in expressions for name in variables_in(expression))
    return list(dict.fromkeys(name for name in read if name not in seen))


def _broke(step: Step) -> bool:
    """Whether a function gave nothing, after a path that did not match. One that gave nothing since
    it was given nothing has asked for none."""
    return _missing(step.value) and (
        any(attempt.broke for _, attempt in step.attempts) or any(map(_broke, step.inner))
    )


def _progress(step: Step) -> int:
    """How many nodes the paths that a function asked for have found."""
    return sum(len(attempt.matched) for _, attempt in step.attempts)


class _Reader(Conditions):
    """Reads one `step`: `write` renders a value."""

    def __init__(self, step: Step, write: Callable[[Any], str | None]) -> None:
        super().__init__(step)
        self.write = write

    def gave_up(self) -> GaveUp:
        """Why the function returned: what its last condition leads back to."""
        statement, leaves, end = self.tests()
        tests = dict.fromkeys(map(ast.unparse, leaves))
        answer = GaveUp(self.step.line, source_line(self.step), end, test="; ".join(tests))
        if self.function is None:
            self._last_group(answer)
            return answer
        returned = self.returned(self.function.at(self.step.line))
        self._slice([*returned, *leaves], answer, end and self.only_calls(statement))
        if not answer.broken and not answer.operands:
            self._last_group(answer)
        if answer.broken:
            self._add_tried_before(answer)
        self._sort(answer)
        return answer

    def _add_tried_before(self, answer: GaveUp) -> None:
        """Add the paths that were tried before those that it gave up at: where these were matched
        in the `else` of an `if` that asked for others."""
        statement = self.function.at(self.step.line)
        tests = [condition.test for condition, true in self.function.around(statement) if not true]
        known = {id(attempt) for attempt in answer.broken}
        for name in _new_variables(tests, set()):
            tried = [attempt for attempt in self._broken(name) if id(attempt) not in known]
            answer.broken += tried
            answer.none += [name] if tried and self.get(name) is None else []

    def _slice(self, leaves: list[ast.expr], answer: GaveUp, only_called: bool) -> None:
        """Go back from the conditions `leaves` through what their variables were made from, until
        that leads to paths that did not match; add to `answer` what is met."""
        level = [(expression, True) for expression in leaves]
        seen: set[str] = set()
        called: list[Step] = []  # the first functions that gave nothing, and what was met till then
        met: tuple[dict[str, str], set[str], list[Any]] = ({}, set(), [])
        for _ in range(DEPTH + 1):
            for expression, is_empty in level:
                answer.calls |= functions_called(expression)
                self._operands(expression, answer, is_empty)
            empty = [expression for expression, is_empty in level if is_empty]
            names = _new_variables(empty, seen)
            asked = self._asked(empty)
            if self._paths(names, answer, asked):
                return
            inner = self._called(names, empty)
            broke = list(filter(_broke, inner))
            if broke or any(step.value is False for step in inner):  # a check said no
                self._go_on(broke or inner, answer, only_called)
                return
            if inner and not called:
                called, met = inner, ({**answer.operands}, {*answer.calls}, [*answer.values])
            names = _new_variables([expression for expression, _ in level], seen)
            seen.update(names)
            level = [
                (expression, _missing(self.get(name)))
                for name in names
                for expression in self._sources(name)
            ]
        if called:
            answer.operands, answer.calls, answer.values = met
            self._go_on(called, answer, only_called)

    def _sort(self, answer: GaveUp) -> None:
        """Put the paths of the function itself, and their variables, as its code has them."""
        asked = [id(attempt) for _, attempt in self.step.attempts]
        if answer.broken and id(answer.broken[0]) in asked:
            answer.broken.sort(key=lambda attempt: asked.index(id(attempt)))
            variables = [attempt.variable for attempt in answer.broken]
            answer.none.sort(key=lambda name: variables.index(name) if name in variables else -1)

    def _sources(self, name: str) -> list[ast.expr]:
        """What the variable `name` was made from; where it stayed empty, what that depended on."""
        value, statements = self.get(name), self.function.assigned(name, self.step.line)
        sources = assigned_from(statements[0]) if statements else []
        condition = sources[0] if sources else None
        if isinstance(value, bool) and isinstance(
            condition, (ast.BoolOp, ast.Compare, ast.UnaryOp)
        ):
            return self.decided(condition, value)
        expressions = [
            expression for statement in statements for expression in assigned_from(statement)
        ]
        if _missing(value):
            ifs = [
                condition
                for statement in statements
                for condition, _ in self.function.around(statement)
            ]
            expressions += [condition.test for condition in ifs]
        return expressions

    def _broken(self, name: str) -> list[Attempt]:
        """The attempts for the variable `name` since it last was found, if it was not then."""
        if not _missing(self.get(name)):
            return []
        attempts: list[Attempt] = []
        for line, attempt in self.step.attempts:
            if self.variable(line) == name:
                attempt.variable = name
                attempts = [*attempts, attempt] if attempt.broke else []
        return attempts

    def variable(self, line: int) -> str | None:
        """The variable that the statement at `line` assigns a match to."""
        if self.function is None:
            return None
        statement = self.function.at(line)
        for part in ast.walk(statement):
            if isinstance(part, ast.NamedExpr) and part.lineno <= line <= part.end_lineno:
                return part.target.id
        targets = [] if isinstance(statement, (ast.For, ast.While)) else assigned_to(statement)
        target = targets[0] if targets else None
        if isinstance(target, ast.Tuple) and len(target.elts) == 3:
            target = target.elts[1]  # match_parent_paths returns which, the nodes, the inputs
        while isinstance(target, ast.Subscript):
            target = target.value
        names = variables_in(target) if isinstance(target, (ast.Name, ast.Attribute)) else []
        return names[0] if names else None

    def _asked(self, expressions: list[ast.expr]) -> list[Attempt]:
        """The attempts that `expressions` themselves made, and that broke."""
        spans = [range(expression.lineno, expression.end_lineno + 1) for expression in expressions]
        asked = [
            attempt for line, attempt in self.step.attempts if any(line in span for span in spans)
        ]
        return [attempt for attempt in asked if attempt.broke]

    def _paths(self, names: list[str], answer: GaveUp, asked: list[Attempt]) -> bool:
        """Add the attempts that left `names` empty, and those for what these would be made from;
        or else those that were `asked` where nothing was kept."""
        seen: set[str] = set()
        while names:
            for name in names:
                broken = self._broken(name)
                answer.broken += broken
                answer.none += [name] if broken and self.get(name) is None else []
            seen.update(names)
            if not answer.broken:
                break
            below = [
                variable
                for name in names
                if _missing(self.get(name))
                for expression in self._sources(name)
                for variable in variables_in(expression)
            ]
            names = list(dict.fromkeys(variable for variable in below if variable not in seen))
        answer.broken = answer.broken or asked
        return bool(answer.broken)

    def _called(self, names: list[str], level: list[ast.expr]) -> list[Step]:
        """The functions that were called for one of `names`, or in a condition."""
        lines = [range(expression.lineno, expression.end_lineno + 1) for expression in level]
        for name in names:
            if _missing(self.get(name)):
                lines += [
                    range(assignment.lineno, assignment.end_lineno + 1)
                    for assignment in self.function.assigned(name, self.step.line)
                    if not isinstance(assignment, ast.For)
                ]
        return [
            inner_step
            for inner_step in self.step.inner
            if any(inner_step.called_at in span for span in lines)
        ]

    def _go_on(self, called: list[Step], answer: GaveUp, only_called: bool) -> None:
        """Go on in that of the functions `called` which came furthest."""
        step = max(reversed(called), key=_progress)
        inner = _Reader(step, self.write).gave_up()
        file = file_of(step.code)
        if only_called:  # `fuse` but passed it on
            answer.line, answer.source, answer.end = inner.line, inner.source, inner.end
            answer.within += inner.within
        else:
            answer.within += [f"{file}:{inner.line} {inner.source}", *inner.within]
        answer.broken, answer.none = inner.broken, answer.none + inner.none
        answer.operands |= inner.operands
        answer.values += inner.values
        answer.calls |= inner.calls
        answer.test = f"{answer.test}; {inner.test}" if inner.test else answer.test

    def _last_group(self, answer: GaveUp) -> None:
        """Without source: the attempts that failed last, all from one node."""
        for _, attempt in reversed(self.step.attempts):
            if not attempt.broke:
                break
            if answer.broken and attempt.start != answer.broken[0].start:
                break
            answer.broken.insert(0, attempt)

    def _operands(self, expression: ast.expr, answer: GaveUp, decided: bool) -> None:
        """Add the values of the parts of `expression` that name something in the graph."""

        def visit(node: ast.AST) -> None:
            if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
                try:
                    value = self.value(node)
                except ValueError:
                    value = self
                text = self.write(value) if value is not self else None
                if text is not None:
                    if len(answer.operands) < OPERANDS:
                        answer.operands.setdefault(ast.unparse(node), text)
                    if decided:
                        answer.values.append(value)
            for child in ast.iter_child_nodes(node):
                visit(child)

        visit(expression)


def gave_up(step: Step, write: Callable[[Any], str | None]) -> GaveUp:
    """Why the function of `step` returned without a result."""
    reader = _Reader(step, write)
    answer = reader.gave_up()
    steps = [step]
    while steps:  # the variables of all attempts, for who reads them
        inner_step = steps.pop()
        inner = _Reader(inner_step, write)
        for line, attempt in inner_step.attempts:
            attempt.variable = attempt.variable or inner.variable(line)
        steps += inner_step.inner
    return answer


def source_line(step: Step) -> str:
    """The line at which `step` stands."""
    return linecache.getline(step.code.co_filename, step.line).strip()


def statement(step: Step, write: Callable[[Any], str | None]) -> tuple[str, dict[str, str]]:
    """The line at which `step` stands, and the values of what it reads."""
    text = source_line(step)
    reader, answer = _Reader(step, write), GaveUp(step.line, text, False)
    if reader.function is not None:
        for part in ast.iter_child_nodes(reader.function.at(step.line)):
            if isinstance(part, ast.expr):
                reader._operands(part, answer, True)
    return text, answer.operands
