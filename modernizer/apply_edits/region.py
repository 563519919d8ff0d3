"""The part of a file that changes: its LibCST tree, and the way from an `ast` node to the node that stands for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager

import libcst as cst
from libcst._nodes.internal import CodegenState

from modernizer.edit import EditError
from modernizer.source import SourceFile

# What a node is looked up by: kind, start and end. Statements, parameters, arguments and the like are told apart by
# their start alone; the end is 0 for them.
Key = tuple[str, int, int]


class _Recorder(CodegenState):
    """Notes where each node stands in the generated text, and below which node."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__(module.default_indent, module.default_newline)
        self.offset = 0
        self.spans: dict[int, tuple[int, int]] = {}
        self.parents: dict[int, cst.CSTNode] = {}
        self.nodes: list[cst.CSTNode] = []
        self._open: list[tuple[cst.CSTNode, int]] = []

    def add_indent_tokens(self) -> None:
        for token in self.indent_tokens:
            self.add_token(token)

    def add_token(self, value: str) -> None:
        self.tokens.append(value)
        self.offset += len(value)

    def before_codegen(self, node: cst.CSTNode) -> None:
        if self._open:
            self.parents[id(node)] = self._open[-1][0]
        self._open.append((node, self.offset))

    def after_codegen(self, node: cst.CSTNode) -> None:
        _, start = self._open.pop()
        self.spans.setdefault(id(node), (start, self.offset))
        self.nodes.append(node)

    @contextmanager
    def record_syntactic_position(
        self, node: cst.CSTNode, *, start_node: cst.CSTNode | None = None, end_node: cst.CSTNode | None = None
    ) -> Iterator[None]:
        start = self.offset
        yield
        self.spans[id(node)] = (
            start if start_node is None else self.spans[id(start_node)][0],
            self.offset if end_node is None else self.spans[id(end_node)][1],
        )


class Region:
    """`source.text[start:end]`, whole top-level statements with the blank lines and comments above them, as a module.

    The blank lines and comments count as the first statement's own: `module.header` is empty.
    """

    def __init__(self, source: SourceFile, start: int, end: int) -> None:
        self.source = source
        self.start = start
        self.end = end
        text = source.text[start:end]
        try:
            parsed = cst.parse_module(text)
        except cst.ParserSyntaxError as error:
            raise EditError(f"{source.path}: LibCST cannot read what Python can: {error}") from error
        recorder = _Recorder(parsed)
        parsed._codegen(recorder)
        if "".join(recorder.tokens) != text:
            raise EditError(f"{source.path}: LibCST does not give back the text at offset {start}")
        self.module = _header_as_leading_lines(parsed, source)
        self.spans = recorder.spans
        self._recorder = recorder  # its nodes must live as long as they are looked up by id
        self.parents = recorder.parents
        # The first statement is another object now.
        first_old, first_new = parsed.body[0], self.module.body[0]
        self._adopt(first_old, first_new)
        self._index: dict[Key, cst.CSTNode] = {}
        for node in recorder.nodes:
            replaced = first_new if node is first_old else node
            for key in self._keys(replaced):
                self._index.setdefault(key, replaced)

    def _adopt(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        self.spans[id(new)] = self.spans[id(old)]
        self.parents[id(new)] = self.module
        for child in new.children:
            self.parents[id(child)] = new

    def find(self, node: ast.AST) -> cst.CSTNode:
        """The LibCST node that stands for `node`. For a whole index of several parts that is the subscript itself."""
        for key in self._keys_of(node):
            found = self._index.get(key)
            if found is not None:
                if not _same_code(node, found):
                    break
                return found
        raise EditError(f"{self.source.location(node)}: there is no {type(node).__name__} that could be edited")

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return self.parents.get(id(node))

    def around(self, node: cst.CSTNode) -> tuple[str, str]:
        """The characters directly before and after an expression, without its parentheses."""
        start, end = self.spans[id(node)]
        text = self.source.text
        return text[self.start + start - 1 : self.start + start], text[self.start + end : self.start + end + 1]

    def _keys_of(self, node: ast.AST) -> list[Key]:
        start, end = (offset - self.start for offset in self.source.span(node))
        match node:
            case ast.stmt():
                return [("statement", start, 0)]
            case ast.Slice():
                return [("slice", start, 0)]
            case ast.Starred():
                return [("expression", start, end), ("argument", start, 0)]
            case ast.Tuple():
                return [("expression", start, end), ("index", start, end)]
            case ast.expr():
                return [("expression", start, end)]
            case ast.arg():
                return [("parameter", start, 0)]
            case ast.keyword():
                return [("argument", start, 0)]
            case ast.alias():
                return [("alias", start, 0)]
        return []

    def _keys(self, node: cst.CSTNode) -> list[Key]:
        start, end = self.spans[id(node)]
        match node:
            case cst.Subscript() if len(node.slice) > 1 or node.slice[0].comma != cst.MaybeSentinel.DEFAULT:
                index_start = self.spans[id(node.slice[0])][0]
                index_end = self.spans[id(node.slice[-1])][1]
                last_comma = node.slice[-1].comma
                if isinstance(last_comma, cst.Comma):  # `x[a,]`: the tuple ends behind its comma
                    index_end = self.spans[id(last_comma)][1]
                return [("expression", start, end), ("index", index_start, index_end)]
            case cst.Tuple() | cst.GeneratorExp() if node.lpar:
                # `ast` counts a tuple's parentheses as part of it.
                return [("expression", self.spans[id(node.lpar[-1])][0], self.spans[id(node.rpar[0])][1])]
            case cst.GeneratorExp():
                return [("expression", *self._call_parentheses(node))]
            case cst.BaseExpression():
                return [("expression", start, end)]
            case cst.BaseSmallStatement() | cst.BaseCompoundStatement():
                return [("statement", start, 0)]
            case cst.Slice():
                return [("slice", start, 0)]
            case cst.Param():
                return [("parameter", self.spans[id(node.name)][0], 0)]
            case cst.Arg():
                return [("argument", start, 0)]
            case cst.ImportAlias():
                return [("alias", start, 0)]
        return []

    def _call_parentheses(self, node: cst.GeneratorExp) -> tuple[int, int]:
        """Where the parentheses of `f(x for x in y)` start and end: `ast` counts them as the generator's."""
        argument = self.parents[id(node)]
        call = self.parents[id(argument)]
        assert isinstance(call, cst.Call)
        return self.spans[id(call.whitespace_before_args)][0] - 1, self.spans[id(call)][1]


def _header_as_leading_lines(module: cst.Module, source: SourceFile) -> cst.Module:
    first = module.body[0]
    assert isinstance(first, cst.SimpleStatementLine | cst.BaseCompoundStatement)
    return module.with_changes(
        header=(),
        body=(first.with_changes(leading_lines=(*module.header, *first.leading_lines)), *module.body[1:]),
        default_newline=source.newline,
        default_indent=module.default_indent if _has_block(module) else source.indentation,
    )


def _has_block(module: cst.Module) -> bool:
    return any(not isinstance(statement, cst.SimpleStatementLine) for statement in module.body)


def _same_code(node: ast.AST, found: cst.CSTNode) -> bool:
    """Positions inside f-strings are not to be relied on before Python 3.12, so names and constants are compared."""
    match node, found:
        case ast.Name(), cst.Name():
            return node.id == found.value
        case ast.Attribute(), cst.Attribute():
            return node.attr == found.attr.value
        case (ast.Name() | ast.Attribute(), _) | (_, cst.Attribute()):
            return False
    return True
