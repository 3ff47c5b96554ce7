"""How many attention calls a transformers module makes in one forward: differential attention makes two."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any


@cache
def calls(kind: type[Any]) -> int:
    """The most calls through transformers' attention interface on any path through the class's forward.

    1 where the source is not to be had.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return 1
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _asks(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    function = tree.body[0]
    return _most(function.body, names) if isinstance(function, ast.FunctionDef) else 1


def _asks(value: ast.expr) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "get_interface" for node in ast.walk(value))


def _most(statements: list[ast.stmt], names: set[str]) -> int:
    """Calls of these names, branches that exclude each other counted as the larger of them."""
    if not statements:
        return 0
    first, rest = statements[0], _most(statements[1:], names)
    if not isinstance(first, ast.If):
        return rest + sum(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
            for node in ast.walk(first)
        )
    ways = [
        (_most(body, names), bool(body) and isinstance(body[-1], ast.Return)) for body in (first.body, first.orelse)
    ]
    return max(count + (0 if leaves else rest) for count, leaves in ways)
