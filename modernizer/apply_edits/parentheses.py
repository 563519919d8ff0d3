"""Where parentheses are needed: how tightly an expression binds, and what its place asks for.

The levels follow the grammar of the language reference, loosest first. A place takes every expression that binds at
least as tightly as its level, and those classes it names besides.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import libcst as cst


class Level(enum.IntEnum):
    """How tightly an expression binds, loosest first."""

    YIELD = 0
    TUPLE = 1
    NAMED = 2
    LAMBDA = 3
    TEST = 4  # a if b else c
    OR = 5
    AND = 6
    NOT = 7
    COMPARE = 8
    BIT_OR = 9
    BIT_XOR = 10
    BIT_AND = 11
    SHIFT = 12
    ARITHMETIC = 13
    TERM = 14
    FACTOR = 15
    POWER = 16
    AWAIT = 17
    ATOM = 18


class Place(NamedTuple):
    """What may stand somewhere without parentheses."""

    level: Level
    besides: frozenset[Level] = frozenset()

    def takes(self, level: Level) -> bool:
        return level >= self.level or level in self.besides


_BINARY: dict[type[cst.CSTNode], Level] = {
    cst.BitOr: Level.BIT_OR,
    cst.BitXor: Level.BIT_XOR,
    cst.BitAnd: Level.BIT_AND,
    cst.LeftShift: Level.SHIFT,
    cst.RightShift: Level.SHIFT,
    cst.Add: Level.ARITHMETIC,
    cst.Subtract: Level.ARITHMETIC,
    cst.Power: Level.POWER,
}

_CLASSES: dict[type[cst.CSTNode], Level] = {
    cst.Yield: Level.YIELD,
    cst.Tuple: Level.TUPLE,
    cst.StarredElement: Level.TUPLE,
    cst.NamedExpr: Level.NAMED,
    cst.Lambda: Level.LAMBDA,
    cst.IfExp: Level.TEST,
    cst.Comparison: Level.COMPARE,
    cst.Await: Level.AWAIT,
}

_EXPRESSION = Place(Level.LAMBDA)
_NAMED = Place(Level.NAMED)
_TUPLE = Place(Level.LAMBDA, frozenset({Level.TUPLE}))
_ANY_VALUE = Place(Level.LAMBDA, frozenset({Level.TUPLE, Level.YIELD}))

_PLACES: dict[tuple[type[cst.CSTNode], str], Place] = {
    (cst.Expr, "value"): _ANY_VALUE,
    (cst.Assign, "value"): _ANY_VALUE,
    (cst.AugAssign, "value"): _ANY_VALUE,
    (cst.AnnAssign, "value"): _ANY_VALUE,
    (cst.AssignTarget, "target"): _TUPLE,
    (cst.Return, "value"): _TUPLE,
    (cst.Yield, "value"): _TUPLE,
    (cst.For, "iter"): _TUPLE,
    (cst.For, "target"): _TUPLE,
    (cst.Del, "target"): _TUPLE,
    (cst.Index, "value"): _TUPLE,
    (cst.If, "test"): _NAMED,
    (cst.While, "test"): _NAMED,
    (cst.MatchCase, "guard"): _NAMED,
    (cst.Match, "subject"): _TUPLE,
    (cst.Decorator, "decorator"): _NAMED,
    (cst.Assert, "test"): _EXPRESSION,
    (cst.Assert, "msg"): _EXPRESSION,
    (cst.Raise, "exc"): _EXPRESSION,
    (cst.From, "item"): _EXPRESSION,
    (cst.WithItem, "item"): _EXPRESSION,
    (cst.ExceptHandler, "type"): _EXPRESSION,
    (cst.Annotation, "annotation"): _EXPRESSION,
    (cst.Param, "default"): _EXPRESSION,
    (cst.Lambda, "body"): _EXPRESSION,
    (cst.NamedExpr, "value"): _EXPRESSION,
    (cst.Slice, "lower"): _EXPRESSION,
    (cst.Slice, "upper"): _EXPRESSION,
    (cst.Slice, "step"): _EXPRESSION,
    (cst.IfExp, "body"): Place(Level.OR),
    (cst.IfExp, "test"): Place(Level.OR),
    (cst.IfExp, "orelse"): _EXPRESSION,
    (cst.DictElement, "key"): _EXPRESSION,
    (cst.DictElement, "value"): _EXPRESSION,
    (cst.StarredDictElement, "value"): Place(Level.BIT_OR),
    (cst.StarredElement, "value"): Place(Level.BIT_OR),
    (cst.Element, "value"): _EXPRESSION,
    (cst.GeneratorExp, "elt"): _EXPRESSION,
    (cst.ListComp, "elt"): _EXPRESSION,
    (cst.SetComp, "elt"): _EXPRESSION,
    (cst.DictComp, "key"): _EXPRESSION,
    (cst.DictComp, "value"): _EXPRESSION,
    (cst.CompFor, "iter"): Place(Level.OR),
    (cst.CompFor, "target"): _TUPLE,
    (cst.CompIf, "test"): Place(Level.OR),
    (cst.Comparison, "left"): Place(Level.BIT_OR),
    (cst.ComparisonTarget, "comparator"): Place(Level.BIT_OR),
    (cst.FormattedStringExpression, "expression"): Place(Level.TEST),
}


def level(node: cst.BaseExpression) -> Level:
    """How tightly `node` binds; an atom is what needs no parentheses anywhere."""
    if node.lpar:
        return Level.ATOM
    match node:
        case cst.BinaryOperation():
            return _BINARY.get(type(node.operator), Level.TERM)
        case cst.BooleanOperation():
            return Level.OR if isinstance(node.operator, cst.Or) else Level.AND
        case cst.UnaryOperation():
            return Level.NOT if isinstance(node.operator, cst.Not) else Level.FACTOR
    return _CLASSES.get(type(node), Level.ATOM)


def place(parent: cst.CSTNode, field: str) -> Place:
    """What may stand in `field` of `parent`; of places not known here, only atoms."""
    match parent:
        case cst.BinaryOperation():
            own = level(parent.with_changes(lpar=(), rpar=()))
            if own is Level.POWER:  # binds to the right, and -a ** b is -(a ** b)
                return Place(Level.AWAIT if field == "left" else Level.FACTOR)
            return Place(own if field == "left" else Level(own + 1))
        case cst.BooleanOperation():
            # One step tighter on both sides: `(a and b) and c` and `a and b and c` are two trees.
            return Place(Level(level(parent.with_changes(lpar=(), rpar=())) + 1))
        case cst.UnaryOperation():
            return Place(Level.NOT if isinstance(parent.operator, cst.Not) else Level.FACTOR)
        case cst.Arg():
            return _EXPRESSION if parent.keyword or parent.star else _NAMED
    return _PLACES.get((type(parent), field), Place(Level.ATOM))


def fits(node: cst.BaseExpression, parent: cst.CSTNode, field: str) -> bool:
    """Whether `node` means the same in `field` of `parent` as it means alone."""
    if isinstance(parent, cst.Attribute) and isinstance(node, cst.Integer):
        return False  # `1.real` is a float and a name
    return place(parent, field).takes(level(node)) and not _is_bare_generator(node)


def _is_bare_generator(node: cst.BaseExpression) -> bool:
    return isinstance(node, cst.GeneratorExp) and not node.lpar


def opens_brackets(parent: cst.CSTNode, field: str) -> bool:
    """Whether `field` of `parent` stands in brackets of `parent`, so that line breaks mean nothing there."""
    match parent:
        case cst.List() | cst.Set() | cst.Dict() | cst.ListComp() | cst.SetComp() | cst.DictComp():
            return True
        case cst.Call():
            return field == "args" or bool(parent.lpar)
        case cst.Subscript():
            return field == "slice" or bool(parent.lpar)
        case cst.FunctionDef():
            return field == "params"
        case cst.ClassDef():
            return field in ("bases", "keywords")
        case cst.BaseExpression():
            return bool(parent.lpar)
        case cst.With():
            return field == "items" and isinstance(parent.lpar, cst.LeftParen)
    return False


def runs_over_lines(node: cst.BaseExpression) -> bool:
    """Whether `node` has a line break that only brackets around it make possible."""
    code = _BLANK.code_for_node(node)
    if "\n" not in code and "\r" not in code:
        return False
    try:
        cst.parse_expression(code)
    except cst.ParserSyntaxError:
        return True
    return False


def wrap(node: cst.BaseExpression) -> cst.BaseExpression:
    """`node` in one more pair of parentheses."""
    return node.with_changes(lpar=(cst.LeftParen(), *node.lpar), rpar=(*node.rpar, cst.RightParen()))


_BLANK = cst.Module(())
