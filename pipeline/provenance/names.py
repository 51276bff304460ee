"""What names mean inside functions and classes, and which expressions only say something.

A sink is something to which a program only tells things: print, a logger, a progress line, a curve.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.provenance.sources import Definition, Module, Sources, imported

SINKS = ("builtins.print", "logging", "warnings.warn")
"""Of other packages. A module stands for all that is in it."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
"""What binds its `name`, if it has one."""


@dataclass(frozen=True)
class Scope:
    """The names to which a function, lambda, comprehension or class body gives a meaning of its own."""

    module: Module
    locals: frozenset[str] = frozenset()
    imports: Mapping[str, str] = field(default_factory=dict)
    """What is imported in a function, by name."""
    sinks: frozenset[str] = frozenset()
    """Local names that hold sinks."""
    own_sinks: frozenset[str] = frozenset()
    """In methods: attributes of self that do."""
    outer: Scope | None = None

    def chain(self) -> Iterator[Scope]:
        """This scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def lookup(self, name: str) -> str | None:
        """The dotted name that a name was imported from in a function; "": it is local; None: neither."""
        for scope in self.chain():
            if name in scope.imports:
                return scope.imports[name]
            if name in scope.locals:
                return ""
        return None

    def holds_sink(self, name: str) -> bool:
        """Whether a local name holds a sink."""
        for scope in self.chain():
            if name in scope.locals or name in scope.imports:
                return name in scope.sinks
        return False


class Names:
    """Finds what names mean. `sinks`: the project's own, dotted."""

    def __init__(self, sources: Sources, sinks: Sequence[str]) -> None:
        self.sources, self.sinks = sources, sinks
        self.sinks_seen: set[str] = set()
        self._scopes: dict[int, Scope] = {}

    # References

    def dotted(self, node: ast.expr, scope: Scope) -> str | None:
        """The full dotted name of a name or chain of attributes; None where it begins with something local, or is
        another expression. ValueError: it begins with a name that nothing binds."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        origin, module = scope.lookup(node.id), scope.module
        if origin == "":
            return None
        if origin is None and node.id in module.bindings:
            origin = f"{module.name}.{node.id}"
        origin = origin or module.imports.get(node.id) or module.for_hints.get(node.id)
        if origin is None:
            if not (hasattr(builtins, node.id) or node.id == "__file__"):
                raise ValueError(f"{module.name} uses the name {node.id!r}, whose meaning cannot be followed")
            origin = f"builtins.{node.id}"
        return ".".join([origin, *attributes])

    def resolved(self, node: ast.expr, scope: Scope) -> Definition | str | None:
        """What a name or chain of attributes refers to, if that is all that it is: a definition, a module of the
        project or another package's dotted name; None: something local, or a part of one."""
        dotted = self.dotted(node, scope)
        if dotted is None:
            return None
        found, rest = self.sources.resolve(dotted)
        return None if rest else found

    def in_hint(self, hint: ast.expr, scope: Scope) -> list[Definition]:
        """The project's definitions that a type hint names."""
        quoted = isinstance(hint, ast.Constant) and isinstance(hint.value, str)
        tree: ast.AST = ast.parse(hint.value, mode="eval") if quoted else hint  # type: ignore[attr-defined]
        found = [self.resolved(node, scope) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
        return [each for each in found if isinstance(each, Definition)]

    def with_hinted(self, dotted: str) -> list[Definition]:
        """A dataclass and the classes in the hints of its fields, and in those of theirs, in their order."""
        start, _ = self.sources.resolve(dotted)
        found: dict[Definition, None] = {}
        waiting = [start] if isinstance(start, Definition) else []
        while waiting:
            definition = waiting.pop(0)
            module = self.sources.holding(definition)
            classes = [each for each in module.bindings[definition.name] if isinstance(each, ast.ClassDef)]
            if definition in found or not classes:
                continue
            found[definition] = None
            fields = [each for each in classes[0].body if isinstance(each, ast.AnnAssign)]
            waiting += [each for entry in fields for each in self.in_hint(entry.annotation, Scope(module))]
        return list(found)

    # Scopes

    def of_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, scope: Scope) -> Scope:
        """Inside a function that stands in `scope`."""
        if id(node) not in self._scopes:
            body = list(_own_nodes([node.body] if isinstance(node, ast.Lambda) else node.body))
            parameters = _parameters(node.args)
            imports: dict[str, str] = {}
            for inner in body:
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    imports |= imported(inner, scope.module.package)
            names = frozenset({each.arg for each in parameters} | _stored(body)) - imports.keys()
            local = Scope(scope.module, names, imports, outer=scope)
            sinks = self._sink_names(parameters, body, local)
            self._scopes[id(node)] = Scope(scope.module, names, imports, sinks, outer=scope)
        return self._scopes[id(node)]

    def of_comprehension(self, node: ast.AST, scope: Scope) -> Scope:
        """Inside a comprehension."""
        targets = [part.target for part in node.generators]  # type: ignore[attr-defined]
        return Scope(scope.module, frozenset(_stored(_own_nodes(targets))), outer=scope)

    def of_body(self, statements: Sequence[ast.stmt], scope: Scope) -> Scope:
        """Inside statements whose names are no function's: of a class, or at the top level."""
        return Scope(scope.module, frozenset(_stored(_own_nodes(statements))), outer=scope)

    def of_methods(self, node: ast.ClassDef, scope: Scope) -> Scope:
        """Around the methods of a class: attributes of self that hold nothing but sinks are known."""
        sinks, others = set[str](), set[str]()
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                (sinks if self._hints_at_sink(statement.annotation, scope) else others).add(statement.target.id)
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            inner = self.of_function(statement, scope)
            for target, value in _assigned(_own_nodes(statement.body)):
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    (sinks if self.makes_sink(value, inner) else others).add(target.attr)
        return Scope(scope.module, own_sinks=frozenset(sinks - others), outer=scope)

    # Sinks and text

    def makes_sink(self, node: ast.expr, scope: Scope) -> bool:
        """Whether an expression makes an object of a sink's class, or names one. What a sink's methods return is
        none: the program may depend on it."""
        if isinstance(node, ast.IfExp):
            return self.makes_sink(node.body, scope) and self.makes_sink(node.orelse, scope)
        if isinstance(node, ast.Call):
            return self.dotted(node.func, scope) is not None and self.is_sink(node.func, scope)
        return self.is_sink(node, scope)

    def is_sink(self, node: ast.expr, scope: Scope) -> bool:
        """Whether an expression is a sink, an object of its class, or an attribute of either."""
        if isinstance(node, ast.Call):
            return self.makes_sink(node, scope)
        if isinstance(node, ast.Name) and scope.holds_sink(node.id):
            return True
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if of_self and any(node.attr in each.own_sinks for each in scope.chain()):
                return True
            if self.is_sink(node.value, scope):
                return True
        dotted = self.dotted(node, scope) if isinstance(node, ast.Name | ast.Attribute) else None
        if dotted is None:
            return False
        found, _ = self.sources.resolve(dotted)
        if isinstance(found, str):
            return bool(entry_of(found, SINKS))
        if entry := entry_of(str(found), self.sinks):
            self.sinks_seen.add(entry)
            return True
        module = self.sources.holding(found)  # a logger of the module's own
        bound = module.bindings[found.name]
        return all(isinstance(each, ast.Assign) and self.makes_sink(each.value, Scope(module)) for each in bound)

    def makes_text(self, node: ast.expr, scope: Scope) -> bool:
        """Whether an expression is a text, by its form or the hint of the function that it calls."""
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
            return self.makes_text(node.left, scope) or self.makes_text(node.right, scope)
        if isinstance(node, ast.IfExp):
            return self.makes_text(node.body, scope) and self.makes_text(node.orelse, scope)
        if not isinstance(node, ast.Call):
            return False
        if isinstance(node.func, ast.Attribute) and self.makes_text(node.func.value, scope):
            return True
        found = self.resolved(node.func, scope)
        if not isinstance(found, Definition):
            return found in ("builtins.str", "builtins.repr")
        bound = self.sources.holding(found).bindings[found.name]
        return all(isinstance(each, ast.FunctionDef) and _hint(each.returns) == "str" for each in bound)

    def _hints_at_sink(self, hint: ast.expr | None, scope: Scope) -> bool:
        """Whether a hint names a sink's class, or that or None."""
        if isinstance(hint, ast.BinOp):
            sides = [side for side in (hint.left, hint.right) if _hint(side) != "None"]
            return all(self._hints_at_sink(side, scope) for side in sides)
        return isinstance(hint, ast.Name | ast.Attribute) and self.is_sink(hint, scope)

    def _sink_names(self, parameters: Sequence[ast.arg], body: Sequence[ast.AST], scope: Scope) -> frozenset[str]:
        """Parameters and local names that hold nothing but sinks."""
        sinks = {each.arg for each in parameters if self._hints_at_sink(each.annotation, scope)}
        others = {each.arg for each in parameters} - sinks
        for target, value in _assigned(body):
            if isinstance(target, ast.Name):
                (sinks if self.makes_sink(value, scope) else others).add(target.id)
        return frozenset(sinks - others)


def entry_of(name: str, entries: Iterable[str]) -> str:
    """The entry that is the name, or a module or class that holds it; empty: none."""
    return next((entry for entry in entries if name == entry or name.startswith(f"{entry}.")), "")


def _own_nodes(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes of a body but those inside functions, classes and comprehensions, whose names are another scope's; an
    assignment expression in a comprehension is the body's."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            waiting += node.decorator_list
        elif isinstance(node, COMPREHENSIONS):
            waiting += [each for each in ast.walk(node) if isinstance(each, ast.NamedExpr)]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*given, *(each for each in (arguments.vararg, arguments.kwarg) if each is not None)]


def _stored(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that nodes bind."""
    names: set[str] = set()
    elsewhere: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, _NAMED):
            names.update([node.name] if node.name else [])
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere.update(node.names)
    return names - elsewhere


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Every target and what is assigned to it, `with ... as` included; of tuples on both sides part by part."""
    for node in nodes:
        if isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield node.optional_vars, node.context_expr
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value
        elif isinstance(node, ast.AugAssign | ast.NamedExpr):
            yield node.target, node.value
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            yield node.target, node.iter


def _hint(node: ast.expr | None) -> str:
    return ast.unparse(node) if node is not None else ""
