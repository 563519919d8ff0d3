"""What is to be done at which node of a region, and what came of it. Two edits that want the same text show up here."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence

import libcst as cst

from modernizer.apply_edits.region import Region
from modernizer.edit import AddArgument, AddParameter, Delete, Edit, EditConflict, EditError, Insert, Replace


class Targets:
    """The edits of one region, each at the node it is about.

    `dirty` holds the ids of all nodes with an edit at or below them. Taking an edit by one of the methods marks it as
    made; what is not made in the end stood in text that another edit did away with.
    """

    def __init__(self, region: Region, edits: Sequence[Edit]) -> None:
        self.dirty: set[int] = set()
        self._region = region
        self._replacements: dict[int, Replace] = {}
        self._deletions: dict[int, Delete] = {}
        self._insertions: defaultdict[int, list[Insert]] = defaultdict(list)
        self._additions: defaultdict[int, list[AddArgument | AddParameter]] = defaultdict(list)
        self._nodes: list[tuple[Edit, cst.CSTNode]] = []
        self._made: set[int] = set()
        for edit in edits:
            self._register(edit)

    def replacement(self, node: cst.CSTNode) -> Replace | None:
        """What replaces `node`. Being asked is not being made: `take` says so."""
        return self._replacements.get(id(node))

    def take(self, edit: Edit) -> None:
        self._made.add(id(edit))

    def is_deleted(self, node: cst.CSTNode) -> bool:
        return id(node) in self._deletions

    def take_deletion(self, node: cst.CSTNode) -> bool:
        """Whether `node` goes."""
        edit = self._deletions.get(id(node))
        if edit is not None:
            self.take(edit)
        return edit is not None

    def take_insertions(self, node: cst.CSTNode) -> Sequence[Insert]:
        """The insertions before and after `node`, in the order given."""
        edits = self._insertions.get(id(node), [])
        self._made.update(map(id, edits))
        return edits

    def take_additions(self, node: cst.CSTNode) -> Sequence[AddArgument | AddParameter]:
        """The arguments or parameters `node` gets."""
        edits = self._additions.get(id(node), [])
        self._made.update(map(id, edits))
        return edits

    def check_all_made(self) -> None:
        """Raises EditConflict where an edit stood in text that another one did away with."""
        for edit, node in self._nodes:
            if id(edit) not in self._made:
                raise self._conflict(edit, self._blocker(node))

    def _register(self, edit: Edit) -> None:
        node = self._region.find(anchor(edit))
        match edit:
            case Replace(node=ast.Starred()):
                raise EditError(f"{self._region.source.location(edit.node)}: replace what is starred, without the star")
            case Replace():
                for place in whole_index(edit.node, node) or (node,):
                    self._claim(place, edit)
                    self._replacements[id(place)] = edit
                    node = place
            case Delete():
                node = self._removable(node, edit)
                self._claim(node, edit)
                self._deletions[id(node)] = edit
            case Insert():
                self._insertions[id(node)].append(edit)
            case AddArgument() | AddParameter():
                self._additions[id(node)].append(edit)
        self._nodes.append((edit, node))
        self._mark(node)

    def _claim(self, node: cst.CSTNode, edit: Edit) -> None:
        other = self._replacements.get(id(node)) or self._deletions.get(id(node))
        if other is not None:
            raise self._conflict(edit, other)

    def _mark(self, target: cst.CSTNode) -> None:
        node: cst.CSTNode | None = target
        while node is not None and id(node) not in self.dirty:
            self.dirty.add(id(node))
            node = self._region.parent(node)

    def _removable(self, found: cst.CSTNode, edit: Delete) -> cst.CSTNode:
        """The element that goes when `found` does: an argument with its keyword, an entry with its value."""
        if isinstance(found, cst.BaseSmallStatement | cst.BaseCompoundStatement | cst.StarredElement):
            return found
        if isinstance(found, cst.Arg | cst.Param | cst.ImportAlias):
            return found
        parent = self._region.parent(found)
        if isinstance(parent, cst.Index):
            parent = self._region.parent(parent)
        match parent:
            case cst.DictElement(key=key) if key is found:
                return parent
            case cst.Arg() | cst.Element() | cst.Decorator() | cst.AssignTarget() | cst.Del():
                return parent
            case cst.SubscriptElement():
                return parent
        raise EditError(f"{self._region.source.location(edit.node)}: nothing that could be left out")

    def _blocker(self, target: cst.CSTNode) -> Edit | None:
        """The edit that did away with `target`."""
        node: cst.CSTNode | None = target
        while node is not None:
            edit = self._replacements.get(id(node)) or self._deletions.get(id(node))
            if edit is not None and id(edit) in self._made:
                return edit
            node = self._region.parent(node)
        return None

    def _conflict(self, edit: Edit, other: Edit | None) -> EditError:
        source = self._region.source

        def described(one: Edit) -> str:
            return f"{type(one).__name__} at {source.path}:{source.location(anchor(one)).line}"

        if other is None:
            return EditError(f"{described(edit)} was not made")
        first, second = sorted((edit, other), key=lambda one: source.location(anchor(one)).line)
        return EditConflict(f"{described(first)} and {described(second)} want the same text")


def anchor(edit: Edit) -> ast.AST:
    """The node an edit is about."""
    match edit:
        case Replace() | Delete():
            return edit.node
        case Insert():
            return edit.anchor
        case AddArgument():
            return edit.call
        case AddParameter():
            return edit.function
    raise AssertionError(edit)


def whole_index(node: ast.AST, found: cst.CSTNode) -> Sequence[cst.SubscriptElement]:
    """The parts of an index `a, b`, which is one node for `ast` alone; nothing where `node` is something else."""
    return found.slice if isinstance(node, ast.Tuple) and isinstance(found, cst.Subscript) else ()
