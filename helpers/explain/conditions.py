"""The conditions in a function that has returned: which of them decided, and what they came to."""

from __future__ import annotations

import ast
from typing import Any

from helpers.explain.calls import Step, assigned_from, function_of

# The syntax of an expression that can be evaluated again, and the functions that it may call.
_PLAIN = (
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.Load),
    *(ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.operator),
    *(ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop),
    *(ast.Tuple, ast.List, ast.Set, ast.Dict),
)
_HARMLESS = {"len", "hasattr"}


class Conditions:
    """The code of one `step`, with the values that its variables had when it returned."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.function = function_of(step.code)  # None where there is no source

    def value(self, node: ast.expr) -> Any:
        """The value of an expression without calls, but for `_HARMLESS` ones; raises ValueError of
        any other."""
        for part in ast.walk(node):
            called = getattr(part.func, "id", "") if isinstance(part, ast.Call) else ""
            if called not in _HARMLESS and not isinstance(part, _PLAIN):
                raise ValueError(ast.dump(part))
        names = {**self.step.names, **self.step.local}
        try:
            return eval(compile(ast.Expression(node), "<operand>", "eval"), names)
        except Exception as error:  # an operand that was not reached when the test said no
            raise ValueError(str(error)) from None

    def get(self, name: str) -> Any:
        """The value of a variable, named as in `variables_in`; of one that has none, something."""
        if name.startswith("self."):
            return getattr(self.step.local.get("self"), name[5:], "something")
        return self.step.local.get(name, "something")

    def decided(self, test: ast.expr, outcome: bool) -> list[ast.expr]:
        """Those conditions of `test` that made it come out as it did."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.decided(test.operand, not outcome)
        if not isinstance(test, ast.BoolOp):
            return [test]
        one_is_enough = isinstance(test.op, ast.Or) is outcome
        parts = test.values
        if one_is_enough:
            decisive = [part for part in parts if self._is(part, outcome)]
            unknown = [part for part in parts if self._is(part, None)]
            parts = decisive[:1] or unknown
        return [leaf for part in parts for leaf in self.decided(part, outcome)]

    def _is(self, part: ast.expr, outcome: bool | None) -> bool:
        try:
            return outcome is not None and bool(self.value(part)) is outcome
        except ValueError:
            return outcome is None

    def tests(self) -> tuple[ast.stmt | None, list[ast.expr], bool]:
        """The statement that ended the function, the conditions, and whether it was its end."""
        if self.function is None:
            return None, [], False
        statement = self.function.at(self.step.line)
        if not isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            return statement, self._at_end(statement), True
        leaves = self._around(statement)
        if leaves or self.returned(statement):
            return statement, leaves, False
        before = self._before(statement)  # at the function's top, or a loop's `else`: it decided
        return before, self._passed(before), False

    def _around(self, statement: ast.stmt) -> list[ast.expr]:
        """The conditions that led to a statement, of the `if` around it and those before its
        `elif`."""
        leaves: list[ast.expr] = []
        for around, true in self.function.around(statement):
            leaves += self.decided(around.test, true)
            outer = self.function.parent[around]
            if true and not (isinstance(outer, ast.If) and around in outer.orelse):
                break
            if not true and not isinstance(around.orelse[0], ast.If):
                continue  # the `else`, or an `elif`, of this one
            if not (isinstance(outer, ast.If) and outer.orelse == [around]):
                break
        return leaves

    def _passed(self, statement: ast.stmt) -> list[ast.expr]:
        """The conditions by which an `if` or a loop was passed; of another statement, none."""
        if isinstance(statement, ast.If):
            return self._last(statement)
        if not isinstance(statement, (ast.For, ast.While)):
            return []
        ifs = [part for part in ast.walk(statement) if isinstance(part, ast.If)]
        return [condition.test for condition in ifs] or assigned_from(statement)

    def _at_end(self, statement: ast.stmt) -> list[ast.expr]:
        """The conditions that led to a function's last statement, or by which that was passed."""
        if isinstance(statement, (ast.If, ast.For, ast.While)):
            return self._passed(statement)
        if self.only_calls(statement):  # what it called in turn
            calls = [other for other in self.function.statements if self.only_calls(other)]
            return [call.value for call in calls]
        return [condition.test for condition, _ in self.function.around(statement)]

    def only_calls(self, statement: ast.stmt | None) -> bool:
        """Whether a statement only calls a function that was recorded."""
        lines = range(statement.lineno, statement.end_lineno + 1) if statement else ()
        called = any(inner_step.called_at in lines for inner_step in self.step.inner)
        return called and isinstance(statement, ast.Expr)

    def _last(self, statement: ast.If) -> list[ast.expr]:
        leaves = []
        while True:
            leaves += self.decided(statement.test, False)
            if len(statement.orelse) != 1 or not isinstance(statement.orelse[0], ast.If):
                return leaves
            statement = statement.orelse[0]

    def _before(self, statement: ast.stmt) -> ast.stmt:
        outer = self.function.parent[statement]
        if isinstance(outer, (ast.For, ast.While)) and statement in outer.orelse:
            return outer
        body = next(
            block
            for _, block in ast.iter_fields(outer)
            if isinstance(block, list) and statement in block
        )
        earlier = [
            earlier
            for earlier in body[: body.index(statement)]
            if isinstance(earlier, (ast.If, ast.For, ast.While))
        ]
        return earlier[-1] if earlier else statement

    def returned(self, statement: ast.stmt | None) -> list[ast.expr]:
        """What a `return` gives, if that was made elsewhere."""
        value = statement.value if isinstance(statement, ast.Return) else None
        expressions = (ast.Call, ast.Name, ast.Tuple, ast.Compare, ast.BoolOp)
        return [value] if isinstance(value, expressions) else []
