"""Follow a method of an optimizer that makes attentions itself, without a class of fusions.

``BertOnnxModelTF.fuse_attention`` loops over the nodes that it starts from, and goes on to the next
where it misses something. Each turn of such a loop is what a call of `fuse` is to a class.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import onnx

from helpers.explain.calls import function_of
from helpers.explain.onnxruntime_parts import Method

Begin = Callable[[FrameType, onnx.NodeProto], None]  # of a turn that starts from a node
End = Callable[[FrameType, int, Any], None]  # of a turn that ended at a line, with what it returned


class Turns:
    """The trace of one call of a method: tells where each turn begins, and where it ends.

    A turn is one of the outermost loop over nodes; of a method that is given a node, all of it.
    """

    def __init__(self, frame: FrameType, begin: Begin, end: End) -> None:
        self._begin, self._end = begin, end
        self._loops = _loops(frame.f_code)
        self._turn: ast.For | None = None
        self._line = frame.f_lineno
        arguments = frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
        given = [frame.f_locals.get(name) for name in arguments]
        nodes = [value for value in given if isinstance(value, onnx.NodeProto)]
        self._is_whole = bool(nodes)
        if nodes:
            begin(frame, nodes[0])

    def __call__(self, frame: FrameType, event: str, value: Any) -> Turns:
        if event == "line":
            if not self._is_whole:
                self._go_to(frame, frame.f_lineno)
            self._line = frame.f_lineno
        elif event == "return" and (self._is_whole or self._turn):
            self._end(frame, self._line, value)
        return self

    def _go_to(self, frame: FrameType, line: int) -> None:
        if self._turn and not _is_in(self._turn, line):  # back at the loop's head, or past it
            self._turn = None
            self._end(frame, self._line, None)
        for loop in self._loops if self._turn is None else ():
            node = frame.f_locals.get(loop.target.id) if _is_in(loop, line) else None
            if isinstance(node, onnx.NodeProto):
                self._turn = loop
                self._begin(frame, node)
                return


def can_follow(method: Method) -> bool:
    """Whether a method asks for paths, and has source, by which it can be followed."""
    return method.matches and function_of(method.code) is not None


@functools.cache
def _loops(code: CodeType) -> list[ast.For]:
    """The loops over one variable, the outermost first."""
    function = function_of(code)
    loops = [node for node in function.statements if isinstance(node, ast.For)] if function else []
    named = [loop for loop in loops if isinstance(loop.target, ast.Name)]
    return sorted(named, key=lambda loop: (loop.lineno, -loop.end_lineno))


def _is_in(loop: ast.For, line: int) -> bool:
    return loop.body[0].lineno <= line <= loop.body[-1].end_lineno
