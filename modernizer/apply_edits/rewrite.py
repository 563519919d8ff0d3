"""Makes the edits in one region: rebuilds the nodes on the way to what changes, from the leaves up, and no others."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import libcst as cst

from modernizer.apply_edits import parentheses, snippet
from modernizer.apply_edits.blocks import Block, Piece, Statement, one_line
from modernizer.apply_edits.comma_lists import edit_elements, elements_of
from modernizer.apply_edits.region import Region
from modernizer.apply_edits.targets import Targets, whole_index
from modernizer.edit import AddParameter, Edit, EditError, Replace


@dataclasses.dataclass(frozen=True)
class _Hole:
    """What a hole stands for; `is_element` where that is more than an expression: `*a`, `a:b` or `a:b, c`."""

    node: cst.CSTNode
    is_element: bool
    owner: Replace

    def expression(self) -> cst.BaseExpression:
        if self.is_element or not isinstance(self.node, cst.BaseExpression):
            raise EditError(f"{type(self.node).__name__} in a hole where an expression should stand")
        return self.node


class Rewriter:
    """Makes the edits of one region."""

    def __init__(self, region: Region, edits: Sequence[Edit]) -> None:
        self.region = region
        self.source = region.source
        self._targets = Targets(region, edits)
        self._dirty = self._targets.dirty
        self._holes: dict[int, _Hole] = {}
        self._alive: list[cst.CSTNode] = []  # nodes of snippets: what is looked up by id must not be collected

    def rewrite(self) -> cst.Module:
        """The region's module with all edits made; raises EditConflict where one edit does away with another."""
        try:
            block = self._block(self.region.module.body, top_level=True)
        except cst.CSTValidationError as error:
            raise EditError(f"{self.source.path}: internal error, the edits do not lead to Python: {error}") from error
        self._targets.check_all_made()
        return self.region.module.with_changes(body=block.body, footer=block.footer() or self.region.module.footer)

    # Any node

    def _visit(self, node: cst.CSTNode, enclosed: bool) -> cst.CSTNode:
        """`node` with the edits below it made, and with elements taken out and added; not replaced itself."""
        if id(node) not in self._dirty:
            return node
        parts = elements_of(node)
        doomed = [self._targets.take_deletion(part) for part in parts]
        additions = self._additions_to(node, enclosed)
        changed = self._with_changed_children(node, enclosed)
        if any(doomed) or additions:
            changed = edit_elements(changed, doomed, additions)
        return changed

    def _with_changed_children(self, node: cst.CSTNode, enclosed: bool) -> cst.CSTNode:
        changes: dict[str, object] = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if isinstance(value, cst.CSTNode):
                if id(value) in self._dirty:
                    changes[field.name] = self._child(value, node, field.name, enclosed)
            elif isinstance(value, list | tuple) and any(id(item) in self._dirty for item in value):
                changes[field.name] = self._children(value, node, field.name, enclosed)
        return node.with_changes(**changes) if changes else node

    def _children(
        self, values: Iterable[cst.CSTNode], parent: cst.CSTNode, field: str, enclosed: bool
    ) -> list[cst.CSTNode]:
        children: list[cst.CSTNode] = []
        for value in values:
            if isinstance(value, cst.SubscriptElement) and (edit := self._targets.replacement(value)) is not None:
                return self._index(edit)
            if isinstance(value, cst.Decorator | cst.AssignTarget) and self._targets.take_deletion(value):
                continue
            if id(value) not in self._dirty or self._targets.is_deleted(value):
                children.append(value)  # what goes is taken out later, and edits in it are conflicts
            elif (hole := self._element_hole(value)) is not None:
                children += self._element_of_hole(value, hole)
            else:
                child = self._child(value, parent, field, enclosed)
                assert child is not None
                children.append(child)
        return children

    def _child(self, child: cst.CSTNode, parent: cst.CSTNode, field: str, enclosed: bool) -> cst.CSTNode | None:
        match child:
            case cst.IndentedBlock():
                block = self._block(cast(Sequence[Statement], child.body))
                return child.with_changes(body=block.or_pass(), footer=(*block.footer(), *child.footer))
            case cst.SimpleStatementSuite():
                return self._suite(child)
            case cst.If() if field == "orelse":
                return self._elif(child)
            case cst.BaseExpression():
                inside = enclosed or parentheses.opens_brackets(parent, field)
                return self._expression(child, parent, field, inside)
            case cst.BaseSlice() if (edit := self._targets.replacement(child)) is not None:
                return self._slice(edit)
            case cst.SubscriptElement() if _is_one_of_several(child, parent):
                return _with_own_tuple(cast(cst.SubscriptElement, self._visit(child, enclosed=True)))
        return self._visit(child, enclosed or parentheses.opens_brackets(parent, field))

    # Expressions

    def _expression(self, old: cst.BaseExpression, parent: cst.CSTNode, field: str, enclosed: bool) -> cst.CSTNode:
        hole = self._holes.get(id(old))
        if hole is not None:
            new = self._filled(hole, enclosed or bool(old.lpar))
            return self._fitted(new, old, parent, field, enclosed)
        edit = self._targets.replacement(old)
        if edit is None:
            return self._visit(old, enclosed or bool(old.lpar))
        new = self._replacement(old, edit, enclosed)
        new = self._fitted(new, old, parent, field, enclosed)
        return parentheses.wrap(new) if not new.lpar and self._touches(new, old) else new

    def _replacement(self, old: cst.BaseExpression, edit: Replace, enclosed: bool) -> cst.BaseExpression:
        self._targets.take(edit)
        # Parsed below a statement, so that a hole which is the whole code has a parent as well.
        code = cst.Expr(snippet.expression(edit.code, self.source))
        self._open_holes(code, edit)
        if id(code.value) in self._holes and not code.value.lpar:
            return self._filled(self._holes[id(code.value)], enclosed or bool(old.lpar))
        return cast(cst.BaseExpression, self._visit(code.value, enclosed or bool(old.lpar)))

    def _open_holes(self, code: cst.CSTNode, edit: Replace) -> None:
        """Tells the names in `code` that stand for holes from others, and marks the way to them."""
        self._alive.append(code)
        holes = [self._hole_for(hole, edit) for hole in edit.holes]

        def search(node: cst.CSTNode) -> bool:
            number = snippet.hole_number(node)
            found = number is not None
            if number is not None:
                if number >= len(holes):
                    raise EditError(f"{self.source.location(edit.node)}: no hole ${number} for {edit.code!r}")
                self._holes[id(node)] = holes[number]
            for child in node.children:
                found |= search(child)
            if found:
                self._dirty.add(id(node))
            return found

        search(code)

    def _hole_for(self, node: ast.expr, owner: Replace) -> _Hole:
        found = self.region.find(node)
        is_element = isinstance(node, ast.Slice | ast.Starred) or bool(whole_index(node, found))
        return _Hole(found, is_element, owner)

    def _filled(self, hole: _Hole, enclosed: bool) -> cst.BaseExpression:
        """What has become of the expression in a hole, which is the replaced node itself where an edit wraps one."""
        old = hole.expression()
        edit = self._targets.replacement(old)
        if edit is not None and edit is not hole.owner:
            return self._replacement(old, edit, enclosed)
        new = cast(cst.BaseExpression, self._visit(old, enclosed or bool(old.lpar)))
        if isinstance(new, cst.GeneratorExp):
            return new if new.lpar else parentheses.wrap(new)
        return new

    def _fitted(
        self, new: cst.BaseExpression, old: cst.BaseExpression, parent: cst.CSTNode, field: str, enclosed: bool
    ) -> cst.BaseExpression:
        """`new` in the parentheses `old` stood in, or in as few as it needs."""
        left, right = _outer_parentheses(old)
        bare = _without_parentheses(new)
        if left:
            return bare.with_changes(lpar=(*left, *bare.lpar), rpar=(*bare.rpar, *right))
        sole = isinstance(old, cst.GeneratorExp) and not old.lpar
        fits = parentheses.fits(bare, parent, field) or (sole and isinstance(bare, cst.GeneratorExp))
        if fits and (enclosed or not parentheses.runs_over_lines(bare)):
            return bare
        return new if new.lpar else parentheses.wrap(new)

    def _touches(self, new: cst.BaseExpression, old: cst.BaseExpression) -> bool:
        """Whether `new` would grow together with a word beside it: `not(x)`, `1if(x)else 2`."""
        if old.lpar:
            return False
        before, after = self.region.around(old)
        code = self.region.module.code_for_node(new)
        words = _joins(before, code[:1]) or _joins(code[-1:], after) or (_is_word(before) and code[:1] in "'\"")
        return words or (before == "{" and code.startswith("{"))

    # Holes and edits that are parts of an index, or starred

    def _slice(self, edit: Replace) -> cst.CSTNode:
        elements = self._index(edit)
        if len(elements) != 1:
            raise EditError(f"{self.source.location(edit.node)}: one slice cannot become several")
        return cst.ensure_type(elements[0], cst.SubscriptElement).slice

    def _index(self, edit: Replace) -> list[cst.CSTNode]:
        self._targets.take(edit)
        code = snippet.subscript(edit.code, self.source)
        self._open_holes(code, edit)
        return list(cast(cst.Subscript, self._visit(code, enclosed=True)).slice)

    def _element_hole(self, element: cst.CSTNode) -> _Hole | None:
        """The hole that stands for a whole element: no expression, but `*a`, `a:b` or `a:b, c`."""
        value = element.slice if isinstance(element, cst.SubscriptElement) else element
        value = getattr(value, "value", value)
        hole = self._holes.get(id(value))
        return hole if hole is not None and hole.is_element else None

    def _element_of_hole(self, old: cst.CSTNode, hole: _Hole) -> list[cst.CSTNode]:
        if isinstance(hole.node, cst.Slice) and isinstance(old, cst.SubscriptElement):
            return [old.with_changes(slice=self._visit(hole.node, enclosed=True))]
        if isinstance(hole.node, cst.Subscript) and isinstance(old, cst.SubscriptElement):
            *most, last = cast(cst.Subscript, self._visit(hole.node, enclosed=True)).slice
            return [*most, last.with_changes(comma=old.comma)]
        if isinstance(hole.node, cst.Arg | cst.StarredElement):
            value = self._visit(hole.node, enclosed=True)
            starred = cst.ensure_type(value, type(hole.node)).value
            if isinstance(old, cst.Arg):
                return [old.with_changes(value=starred, star="*")]
            if isinstance(old, cst.Element):
                return [cst.StarredElement(starred, comma=old.comma)]
        raise EditError(f"{self.source.path}: a hole stands where {type(hole.node).__name__} cannot")

    def _additions_to(self, node: cst.CSTNode, enclosed: bool) -> list[cst.CSTNode]:
        new: list[cst.CSTNode] = []
        for edit in self._targets.take_additions(node):
            if isinstance(edit, AddParameter):
                new.append(snippet.parameter(edit.code, self.source))
                continue
            argument = cst.Arg(
                snippet.expression(edit.code, self.source),
                keyword=cst.Name(edit.name) if edit.name else None,
                equal=_EQUAL if edit.name else cst.MaybeSentinel.DEFAULT,
            )
            if not parentheses.fits(argument.value, argument, "value"):
                argument = argument.with_changes(value=parentheses.wrap(argument.value))
            new.append(argument)
        return new

    # Statements

    def _block(self, statements: Sequence[Statement], top_level: bool = False) -> Block:
        block = Block(top_level)
        for statement in statements:
            if id(statement) not in self._dirty:
                block.keep(statement)
            elif isinstance(statement, cst.SimpleStatementLine):
                block.place(self._line(statement), statement.leading_lines)
            else:
                block.place(self._pieces(statement), statement.leading_lines)
        return block

    def _line(self, line: cst.SimpleStatementLine | cst.SimpleStatementSuite) -> list[Piece]:
        pieces = [piece for small in line.body for piece in self._pieces(small)]
        return one_line(pieces, line)

    def _pieces(self, statement: cst.BaseSmallStatement | cst.BaseCompoundStatement) -> list[Piece]:
        """What has become of one statement, between what is inserted before and after it."""
        inserted: dict[str, list[Piece]] = {"before": [], "after": []}
        for edit in self._targets.take_insertions(statement):
            body, comments = snippet.statements(edit.code, self.source)
            inserted[edit.where].append(Piece(body, inserted=True, trailing_comments=comments))
        return [*inserted["before"], *self._own_piece(statement), *inserted["after"]]

    def _own_piece(self, statement: cst.BaseSmallStatement | cst.BaseCompoundStatement) -> list[Piece]:
        replacement = self._targets.replacement(statement)
        if replacement is not None:
            self._targets.take(replacement)
            body, comments = snippet.statements(replacement.code, self.source)
            for new in body:
                self._open_holes(new, replacement)
            changed = [cast(Statement, self._visit(new, enclosed=False)) for new in body]
            return [Piece(changed, trailing_comments=comments)]
        if self._targets.take_deletion(statement):
            return []
        if self._loses_all_names(statement):
            return []
        new_statement = self._visit(statement, enclosed=False)
        if isinstance(new_statement, cst.BaseSmallStatement):
            return [Piece.of_small(new_statement)]
        # Its leading lines are given back to it by the block.
        return [Piece([cast(Statement, new_statement.with_changes(leading_lines=()))])]

    def _loses_all_names(self, statement: cst.CSTNode) -> bool:
        parts = elements_of(statement) if isinstance(statement, cst.Import | cst.ImportFrom) else []
        return bool(parts) and all(self._targets.take_deletion(part) for part in parts)

    def _suite(self, suite: cst.SimpleStatementSuite) -> cst.BaseSuite:
        """A suite on the line of its header stays there while it can."""
        pieces = self._line(suite)
        if not pieces:
            return suite.with_changes(body=(cst.Pass(),))
        only = pieces[0].statements[0] if len(pieces) == 1 and len(pieces[0].statements) == 1 else None
        if isinstance(only, cst.SimpleStatementLine) and not pieces[0].inserted and not only.leading_lines:
            return suite.with_changes(body=only.body, trailing_whitespace=only.trailing_whitespace)
        block = Block(top_level=False)
        block.place(pieces, ())
        return cst.IndentedBlock(body=block.or_pass(), footer=block.footer())

    def _elif(self, branch: cst.If) -> cst.If | cst.Else | None:
        """`elif` is an `if` alone in its `else`; with company it becomes that."""
        pieces = self._pieces(branch)
        statements = [statement for piece in pieces for statement in piece.statements]
        if not statements:
            return None
        if len(statements) == 1 and isinstance(statements[0], cst.If) and not pieces[0].inserted:
            return statements[0].with_changes(leading_lines=branch.leading_lines)
        block = Block(top_level=False)
        block.place(pieces, ())
        return cst.Else(
            body=cst.IndentedBlock(body=block.or_pass(), footer=block.footer()), leading_lines=branch.leading_lines
        )


_EQUAL = cst.AssignEqual(whitespace_before=cst.SimpleWhitespace(""), whitespace_after=cst.SimpleWhitespace(""))


def _is_one_of_several(element: cst.SubscriptElement, parent: cst.CSTNode) -> bool:
    return isinstance(element.comma, cst.Comma) or (isinstance(parent, cst.Subscript) and len(parent.slice) > 1)


def _with_own_tuple(element: cst.SubscriptElement) -> cst.SubscriptElement:
    """A tuple that is one part of an index has parentheses; where it is the whole index it needs none."""
    index = element.slice
    if isinstance(index, cst.Index) and isinstance(index.value, cst.Tuple) and not index.value.lpar:
        return element.with_changes(slice=index.with_changes(value=parentheses.wrap(index.value)))
    return element


def _outer_parentheses(
    node: cst.BaseExpression,
) -> tuple[Sequence[cst.LeftParen], Sequence[cst.RightParen]]:
    """The parentheses around a node, without those that make it what it is."""
    if isinstance(node, cst.Tuple | cst.GeneratorExp):
        return node.lpar[:-1], node.rpar[1:]
    return node.lpar, node.rpar


def _without_parentheses(node: cst.BaseExpression) -> cst.BaseExpression:
    """`node` without parentheses that hold nothing but itself; those with comments or line breaks stay."""
    left, right = _outer_parentheses(node)
    gaps = [*(paren.whitespace_after for paren in left), *(paren.whitespace_before for paren in right)]
    if not left or any(isinstance(gap, cst.ParenthesizedWhitespace) for gap in gaps):
        return node
    return node.with_changes(lpar=node.lpar[len(left) :], rpar=node.rpar[: len(node.rpar) - len(right)])


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _joins(left: str, right: str) -> bool:
    return _is_word(left) and _is_word(right)
