"""Which nodes are made of comma-separated elements, and how each of them is taken apart and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import libcst as cst

from modernizer.apply_edits.elements import NOTHING, Element, Elements, Gap
from modernizer.apply_edits.parentheses import wrap
from modernizer.edit import EditError


def edit_elements(node: cst.CSTNode, doomed: Sequence[bool], additions: Sequence[cst.CSTNode]) -> cst.CSTNode:
    """`node` without the elements that are `doomed`, and with `additions` where the language wants them.

    `doomed` runs along `elements_of(node)`.
    """
    if isinstance(node, cst.FunctionDef | cst.Lambda):
        return _edit_parameters(node, doomed, cast("Sequence[cst.Param]", additions))
    parts = elements_of(node)
    opening, closing = _brackets(node)
    own_closing = _closing_of(parts[-1]) if parts else NOTHING
    elements = Elements(
        [Element(part, _comma(part)) for part in parts], opening, closing if own_closing.empty else own_closing
    )
    for index in reversed([index for index, goes in enumerate(doomed) if goes]):
        elements.remove(index)
    if additions:
        for element in elements.items:
            element.node = _with_own_parentheses(element.node)
    for addition in additions:
        elements.add(_place_of(addition, elements), addition)
    return _with_elements(node, elements)


def elements_of(node: cst.CSTNode) -> list[cst.CSTNode]:
    """What is separated by commas in `node`; nothing where `node` is not made of such elements."""
    match node:
        case cst.Call():
            return list(node.args)
        case cst.ClassDef():
            return [*node.bases, *node.keywords]
        case cst.List() | cst.Tuple() | cst.Set() | cst.Dict():
            return list(node.elements)
        case cst.Subscript():
            return list(node.slice)
        case cst.Import():
            return list(node.names)
        case cst.ImportFrom() if not isinstance(node.names, cst.ImportStar):
            return list(node.names)
        case cst.FunctionDef() | cst.Lambda():
            return [part for _, part in _parameters(node.params)]
    return []


def _comma(node: cst.CSTNode) -> cst.Comma | None:
    comma = getattr(node, "comma", None)
    return comma if isinstance(comma, cst.Comma) else None


def _closing_of(last: cst.CSTNode) -> Gap:
    """The white space behind the last element that is kept with it and not with a bracket."""
    comma = _comma(last)
    if comma is not None and not comma.whitespace_after.empty:
        return comma.whitespace_after
    match last:
        case cst.Arg():
            return last.whitespace_after_arg
        case cst.Param():
            return last.whitespace_after_param
    return NOTHING


def _brackets(node: cst.CSTNode) -> tuple[Gap, Gap]:
    match node:
        case cst.Call():
            return node.whitespace_before_args, NOTHING
        case cst.FunctionDef():
            return node.whitespace_before_params, NOTHING
        case cst.List() | cst.Subscript():
            return node.lbracket.whitespace_after, node.rbracket.whitespace_before
        case cst.Set() | cst.Dict():
            return node.lbrace.whitespace_after, node.rbrace.whitespace_before
        case cst.Tuple() if node.lpar:
            return node.lpar[-1].whitespace_after, node.rpar[0].whitespace_before
        case cst.ClassDef(lpar=cst.LeftParen() as left, rpar=cst.RightParen() as right):
            return left.whitespace_after, right.whitespace_before
        case cst.ImportFrom(lpar=cst.LeftParen() as left, rpar=cst.RightParen() as right):
            return left.whitespace_after, right.whitespace_before
    return NOTHING, NOTHING


def _with_own_parentheses(node: cst.CSTNode) -> cst.CSTNode:
    """A generator that is no longer the only argument cannot share the call's parentheses."""
    if isinstance(node, cst.Arg) and isinstance(node.value, cst.GeneratorExp) and not node.value.lpar:
        return node.with_changes(value=wrap(node.value))
    return node


def _place_of(addition: cst.CSTNode, elements: Elements) -> int:
    """Before `**kwargs`; a positional argument before all keywords."""
    assert isinstance(addition, cst.Arg)
    for index, element in enumerate(elements.items):
        assert isinstance(element.node, cst.Arg)
        if element.node.star == "**" or (element.node.keyword and not addition.keyword):
            return index
    return len(elements.items)


def _with_elements(node: cst.CSTNode, elements: Elements) -> cst.CSTNode:
    match node:
        case cst.Call():
            return node.with_changes(args=_nodes(elements), whitespace_before_args=elements.opening)
        case cst.ClassDef():
            return _with_bases(node, elements)
        case cst.List():
            return node.with_changes(elements=_bracketed(elements), **_square(node, elements))
        case cst.Subscript():
            if not elements.items:
                raise EditError("nothing would be left in the brackets of a subscript")
            return node.with_changes(slice=_bracketed(elements), **_square(node, elements))
        case cst.Set() if not elements.items:
            return cst.parse_expression("set()").with_changes(lpar=node.lpar, rpar=node.rpar)
        case cst.Set() | cst.Dict():
            return node.with_changes(
                elements=_bracketed(elements),
                lbrace=node.lbrace.with_changes(whitespace_after=elements.opening),
                rbrace=node.rbrace.with_changes(whitespace_before=elements.closing),
            )
        case cst.Tuple():
            return _with_tuple_elements(node, elements)
        case cst.Import():
            return node.with_changes(names=_bracketed(elements))
        case cst.ImportFrom():
            return node.with_changes(names=_bracketed(elements), **_round(node, elements))
    raise AssertionError(type(node))


def _square(node: cst.List | cst.Subscript, elements: Elements) -> dict[str, cst.CSTNode]:
    return {
        "lbracket": node.lbracket.with_changes(whitespace_after=elements.opening),
        "rbracket": node.rbracket.with_changes(whitespace_before=elements.closing),
    }


def _round(node: cst.ClassDef | cst.ImportFrom, elements: Elements) -> dict[str, cst.CSTNode]:
    if not isinstance(node.lpar, cst.LeftParen) or not isinstance(node.rpar, cst.RightParen):
        return {}
    return {
        "lpar": node.lpar.with_changes(whitespace_after=elements.opening),
        "rpar": node.rpar.with_changes(whitespace_before=elements.closing),
    }


def _with_bases(node: cst.ClassDef, elements: Elements) -> cst.ClassDef:
    if not elements.items:
        return node.with_changes(bases=(), keywords=(), lpar=cst.MaybeSentinel.DEFAULT, rpar=cst.MaybeSentinel.DEFAULT)
    parts = [cst.ensure_type(part, cst.Arg) for part in _bracketed(elements)]
    keywords = [part for part in parts if part.keyword or part.star == "**"]
    bases = [part for part in parts if part not in keywords]
    return node.with_changes(bases=bases, keywords=keywords, **_round(node, elements))


def _with_tuple_elements(node: cst.Tuple, elements: Elements) -> cst.Tuple:
    if len(elements.items) == 1 and elements.items[0].comma is None:
        elements.items[0].comma = cst.Comma()
    if not node.lpar:
        if not elements.items:
            return cst.Tuple((), lpar=(cst.LeftParen(),), rpar=(cst.RightParen(),))
        return node.with_changes(elements=_bracketed(elements))
    left = node.lpar[-1].with_changes(whitespace_after=elements.opening)
    right = node.rpar[0].with_changes(whitespace_before=elements.closing)
    return node.with_changes(elements=_bracketed(elements), lpar=(*node.lpar[:-1], left), rpar=(right, *node.rpar[1:]))


def _bracketed(elements: Elements) -> list[cst.CSTNode]:
    """The elements with their commas, where the closing bracket holds the white space before it."""
    closing, elements.closing = elements.closing, NOTHING
    nodes = _nodes(elements)
    elements.closing = closing
    return nodes


def _nodes(elements: Elements) -> list[cst.CSTNode]:
    """The elements with their commas; the last one holds the white space before the closing bracket."""
    nodes = []
    for element in elements.items:
        is_last = element is elements.items[-1]
        comma = element.comma
        if comma is not None and is_last:
            comma = comma.with_changes(whitespace_after=elements.closing)
        changes: dict[str, object] = {"comma": comma or cst.MaybeSentinel.DEFAULT}
        if isinstance(element.node, cst.ParamSlash | cst.ParamStar) and comma is None:
            changes = {}
        gap = elements.closing if is_last and comma is None else NOTHING
        if isinstance(element.node, cst.Arg):
            changes["whitespace_after_arg"] = gap
        elif isinstance(element.node, cst.Param):
            changes["whitespace_after_param"] = gap
        nodes.append(element.node.with_changes(**changes))
    return nodes


def _parameters(parameters: cst.Parameters) -> list[tuple[str, cst.CSTNode]]:
    """All parameters and markers in order, each with the field of `Parameters` it comes from."""
    parts: list[tuple[str, cst.CSTNode]] = [("posonly_params", part) for part in parameters.posonly_params]
    if isinstance(parameters.posonly_ind, cst.ParamSlash):
        parts.append(("posonly_ind", parameters.posonly_ind))
    parts += [("params", part) for part in parameters.params]
    if isinstance(parameters.star_arg, cst.CSTNode):
        parts.append(("star_arg", parameters.star_arg))
    parts += [("kwonly_params", part) for part in parameters.kwonly_params]
    if parameters.star_kwarg is not None:
        parts.append(("star_kwarg", parameters.star_kwarg))
    return parts


def _edit_parameters(
    node: cst.FunctionDef | cst.Lambda, doomed: Sequence[bool], additions: Sequence[cst.Param]
) -> cst.CSTNode:
    parts = _parameters(node.params)
    fields = [field for field, _ in parts]
    goes = list(doomed)
    star_replaced = _settle_markers(parts, fields, goes)
    elements = Elements(
        [Element(part, _comma(part)) for _, part in parts],
        _brackets(node)[0],
        _closing_of(parts[-1][1]) if parts else NOTHING,
    )
    if star_replaced is not None:
        elements.items[star_replaced].node = cst.ParamStar()
    for index in reversed([index for index, is_doomed in enumerate(goes) if is_doomed]):
        elements.remove(index)
        del fields[index]
    for addition in additions:
        index = len(fields) - ("star_kwarg" in fields)
        elements.add(index, addition)
        fields.insert(index, "kwonly_params" if "star_arg" in fields else "params")
    changed = node.with_changes(params=_from_fields(fields, _nodes(elements)))
    if isinstance(changed, cst.FunctionDef):
        return changed.with_changes(whitespace_before_params=elements.opening)
    return changed if fields else changed.with_changes(whitespace_after_lambda=NOTHING)


def _settle_markers(parts: list[tuple[str, cst.CSTNode]], fields: list[str], goes: list[bool]) -> int | None:
    """A `/` or `*` goes when nothing is left that it marks; `*args` leaves a `*` while something is. Where it does."""

    def stays(wanted: str) -> bool:
        return any(field == wanted and not doomed for field, doomed in zip(fields, goes, strict=True))

    for index, (field, part) in enumerate(parts):
        if field == "posonly_ind":
            goes[index] = not stays("posonly_params")
        elif isinstance(part, cst.ParamStar):
            goes[index] = not stays("kwonly_params")
        elif field == "star_arg" and goes[index] and stays("kwonly_params"):
            goes[index] = False
            return index
    return None


def _from_fields(fields: Sequence[str], nodes: Sequence[cst.CSTNode]) -> cst.Parameters:
    many: dict[str, list[cst.CSTNode]] = {"posonly_params": [], "params": [], "kwonly_params": []}
    single: dict[str, cst.CSTNode] = {}
    for field, node in zip(fields, nodes, strict=True):
        if field in many:
            many[field].append(node)
        else:
            single[field] = node
    return cst.Parameters(**many, **single)  # type: ignore[arg-type]
