"""Insert cost-counting nodes into a template's syntax tree before Jinja compiles it.

Each block counts its nodes when it is entered; comparisons and concatenations count what they read, containers and
slices what they make. The nodes are filters that need the rendering context, so Jinja does not fold expressions with
them into constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

from .budget import MAX_WHOLE, TooMuch, current

_MAX_NODES = 12_000  # per syntax tree; the largest templates of today have 4,000
BLOCK = 8  # steps per block, call or test, beside its nodes
# Names of the inserted filters; the parentheses keep templates from using them.
_PAID, _READ, _CUT, _MADE, _SHOWN = "(paid)", "(read)", "(cut)", "(made)", "(shown)"


class _Meter(NodeTransformer):
    """A transformer that inserts the counting nodes."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        # Count before inserting.
        costs = {
            name: _cost(getattr(node, name))
            for name in ("body", "else_")
            if isinstance(getattr(node, name, None), list)
        }
        test = _cost([node.test]) if isinstance(node, nodes.For) and node.test is not None else 0
        node = super().generic_visit(node, *args, **kwargs)
        for name, cost in costs.items():
            if name == "body" or getattr(node, name):  # an empty body still iterates
                getattr(node, name).insert(0, nodes.ExprStmt(_pay(BLOCK + cost), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_pay(BLOCK + test), node.test, lineno=node.lineno)
        elif isinstance(node, nodes.Output):
            node.nodes = [n if isinstance(n, nodes.TemplateData) else _filtered(_SHOWN, n) for n in node.nodes]
        elif isinstance(node, nodes.Compare):
            node.expr = _filtered(_READ, node.expr)
            for operand in node.ops:
                operand.expr = _filtered(_READ, operand.expr)
        elif isinstance(node, nodes.Concat):
            node.nodes = [_filtered(_READ, n) for n in node.nodes]
            return _filtered(_MADE, node)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node = _filtered(_CUT, node.node)
            return _filtered(_MADE, node)
        elif isinstance(node, nodes.Pair):
            node.key = _filtered(_READ, node.key)
        elif isinstance(node, nodes.Dict | nodes.List) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _filtered(_MADE, node)
        elif isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) > MAX_WHOLE:
            raise TooMuch("it has a number of more than 64 bits")
        return node


def metered(template: nodes.Template) -> nodes.Template:
    """Return the tree with counting nodes. Raises TooMuch for a tree that is too large."""
    if _cost([template], exclude=()) > _MAX_NODES:
        raise TooMuch(f"it has more than {_MAX_NODES:,} expressions")
    paying: nodes.Template = _Meter().visit(template)
    return paying


def _cost(block: Iterable[nodes.Node], exclude: tuple[str, ...] = ("body", "else_")) -> int:
    """Return a block's number of nodes, by default without its inner blocks, which count themselves."""
    total, waiting = 0, list(block)
    while waiting:
        node = waiting.pop()
        total += 1
        paid = () if isinstance(node, nodes.ScopedEvalContextModifier) else exclude
        waiting.extend(node.iter_child_nodes(exclude=paid))
    return total


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _pay(cost: int) -> nodes.Expr:
    return _filtered(_PAID, nodes.Const(cost, lineno=1))


@jinja2.pass_context
def _paid(context: Context, cost: int) -> bool:
    current().spend(cost)
    return True


@jinja2.pass_context
def _read(context: Context, value: Any) -> Any:
    current().room(current().read(value))
    return value


@jinja2.pass_context
def _cut(context: Context, value: Any) -> Any:
    current().spend(1 + (len(value) >> 4 if hasattr(value, "__len__") else 0))
    return value


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    return current().made(value)


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        current().room(current().read(value))
    return value


FILTERS_THAT_PAY: dict[str, Callable[..., Any]] = {
    _PAID: _paid,
    _READ: _read,
    _CUT: _cut,
    _MADE: _made,
    _SHOWN: _shown,
}
