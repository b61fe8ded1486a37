"""Layers whose weight other code reads instead of calling them: nothing quantized can stand for those.

``nn.MultiheadAttention`` hands ``self.out_proj.weight`` to a function, Mamba's kernels take ``self.dt_proj.weight``.
What stands for a layer is called like it, but its weight is packed; the model would crash, on this device or on the
next. So the forwards of a model's classes are read: methods that they call on themselves too, branches that an instance
rules out (``if self.training``) not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn

Condition = tuple[ast.expr, bool]
"""A test, and what it has to be."""
Read = tuple[tuple[str, ...], tuple[Condition, ...]]
"""Path of a module from ``self``, and the conditions on ``self`` under which its weight is read."""

EVERY = "*"
_HARMLESS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta"})
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b,
}  # fmt: skip


def read_weights(model: nn.Module) -> set[str]:
    """Full names of the modules whose ``weight`` the forward of a module above them reads, in evaluation mode."""
    found: set[str] = set()
    for name, module in model.named_modules():
        for path, conditions in _reads(type(module)):  # type: ignore[arg-type]  # classes are hashable
            if all(_may_be(module, test, wanted) for test, wanted in conditions):
                found |= {".".join((name, *full) if name else full) for full in _modules_at(module, path)}
    return found


def _modules_at(module: nn.Module, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of the modules that a path leads to: none, one, or several behind ``EVERY``."""
    if not path:
        yield ()
        return
    for part in module._modules if path[0] == EVERY else path[:1]:
        child = module._modules.get(part)
        if child is not None:
            yield from ((part, *rest) for rest in _modules_at(child, path[1:]))


@cache
def _reads(kind: type[nn.Module]) -> tuple[Read, ...]:
    """What the forward of a class reads; nothing where its source isn't there."""
    found: list[Read] = []
    waiting, seen = ["forward"], set[str]()
    while waiting:
        method = waiting.pop()
        function = inspect.unwrap(getattr(kind, method, None))  # type: ignore[arg-type]
        if method in seen or not inspect.isfunction(function) or function.__module__ == "torch.nn.modules.module":
            continue
        seen.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            continue
        aliases = _loops(tree)
        for part, parent, conditions in _walk(tree, None, ()):
            path = _path(part, aliases)
            if isinstance(parent, ast.Call) and parent.func is part and len(path) == 1:
                waiting.append(path[0])
            elif len(path) > 1 and path[-1] == "weight" and not _harmless(part, parent):
                found.append((path[:-1], conditions))
    return tuple(found)


def _walk(
    node: ast.AST, parent: ast.AST | None, conditions: tuple[Condition, ...]
) -> Iterator[tuple[ast.AST, ast.AST | None, tuple[Condition, ...]]]:
    """Every node with its parent and the tests of the branches that it is in."""
    yield node, parent, conditions
    if isinstance(node, ast.If | ast.IfExp):
        yield from _walk(node.test, node, conditions)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            parts: list[ast.AST] = [*branch] if isinstance(branch, list) else [branch]
            for child in parts:
                yield from _walk(child, node, (*conditions, (node.test, wanted)))
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, node, conditions)


def _path(node: ast.AST, aliases: Mapping[str, tuple[str, ...]] | None = None) -> tuple[str, ...]:
    """``self.a.b`` as (a, b); empty for anything else. ``aliases``: paths that local names stand for."""
    if isinstance(node, ast.Attribute):
        before = _path(node.value, aliases)
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        return (*before, node.attr) if before or own else ()
    return aliases.get(node.id, ()) if aliases and isinstance(node, ast.Name) else ()


def _loops(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """What ``for block in self.blocks`` (or its ``enumerate``) gives ``block``: (blocks, *), any of them."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.For):
            continue
        over, target = node.iter, node.target
        if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "enumerate" and over.args:
            over = over.args[0]
            target = target.elts[-1] if isinstance(target, ast.Tuple) else target
        path = _path(over)
        if path and isinstance(target, ast.Name):
            found[target.id] = (*path, EVERY)
    return found


def _harmless(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether only something beside its values is asked of a weight."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS
    asked = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name)
    return (asked and parent.func.id in ("isinstance", "hasattr", "getattr")) or isinstance(parent, ast.Compare)  # type: ignore[union-attr]


def _may_be(module: nn.Module, test: ast.expr, wanted: bool) -> bool:
    """Whether a test can come out as ``wanted``; what depends on more than the module's own attributes can."""
    if isinstance(test, ast.BoolOp):
        every = isinstance(test.op, ast.And) is wanted
        outcomes = (_may_be(module, value, wanted) for value in test.values)
        return all(outcomes) if every else any(outcomes)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _may_be(module, test.operand, not wanted)
    try:
        return bool(_value(module, test)) is wanted
    except (LookupError, AttributeError, TypeError):
        return True


def _value(module: nn.Module, node: ast.expr) -> Any:
    """Of constants, attributes of ``self`` and comparisons of them; LookupError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _COMPARE[type(node.ops[0])](_value(module, node.left), _value(module, node.comparators[0]))
    path = _path(node)
    if not path:
        raise LookupError
    found: Any = module
    for part in path:
        found = False if found is module and part == "training" else getattr(found, part)
    return found
