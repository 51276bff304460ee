"""The digest of what code computes: of definitions and what they refer to, not of files.

It starts at some definitions and takes in all that they reach by name, in the order in which they name it. Each
counts as its syntax tree, in which every name of the project's own is the place of what it refers to in that order, and
every name of another package its full dotted name. So it does not matter which file holds a definition, what the file
or the definition is called, and how a name was imported; it matters what a name refers to.

Left out are comments, docstrings, type hints, import lines, and the sentences of asserts and of raised exceptions;
calls on sinks that stand as statements, unless an argument does work; and the bodies of definitions that a Code leaves
out, which count by their own names alone. Hints are read for one purpose: they say which names are sinks and which
functions make text.

Module-level statements that bind no name, such as os.environ.setdefault(...), count for every module that holds a
definition that is reached.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pipeline.provenance.names import COMPREHENSIONS, Names, Scope, entry_of
from pipeline.provenance.sources import (
    PACKAGES,
    PROJECT,
    Definition,
    Sources,
    is_docstring,
    is_for_type_checkers,
)

_PURE = frozenset(
    f"builtins.{name}" for name in ("abs", "bool", "float", "format", "int", "isinstance", "len", "round")
)
"""What sentences are made with; none of them consumes an iterator."""

_NOT_COMPUTED = ("ctx", "kind", "type_comment", "returns", "annotation", "type_params")
"""Fields of syntax trees that decide nothing."""


@dataclass(frozen=True)
class Code:
    """Which definitions a digest is of. Names are dotted: pipeline.training.loop.train."""

    roots: tuple[str, ...]
    """Where it starts."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Definitions, or modules with all of theirs, whose bodies do not count, and why not; by the place of the
    definition, or by the name that it is imported by."""
    sinks: tuple[str, ...] = ()
    """Classes and functions to which a program only tells things; left out too."""
    settings: str = ""
    """A dataclass of settings. It and the dataclasses in its fields' hints count by their methods alone: the values
    of fields are part of a key by themselves."""


def code_digest(code: Code, *, root: Path = PROJECT) -> str:
    """SHA-256, hexadecimal. ValueError names a definition that is not there, or a name that cannot be followed."""
    return _digest(code.roots, tuple(code.left_out), code.sinks, code.settings, root)


@cache  # the sources do not change while a process runs
def _digest(
    roots: tuple[str, ...], left_out: tuple[str, ...], sinks: tuple[str, ...], settings: str, root: Path
) -> str:
    code = Code(roots=roots, left_out=dict.fromkeys(left_out, ""), sinks=sinks, settings=settings)
    return Written.of(code, root=root).digest


@dataclass(frozen=True)
class Written:
    """What a digest is of."""

    digest: str
    definitions: tuple[Definition, ...]
    """All that are taken in, in their order."""
    left_out: frozenset[str]
    """The entries of `left_out` and `sinks` that they refer to."""

    @classmethod
    def of(cls, code: Code, *, root: Path = PROJECT) -> Written:
        """The definitions of a Code, from the sources as they are now."""
        return cls.of_sources(code, Sources(root))

    @classmethod
    def of_sources(cls, code: Code, sources: Sources) -> Written:
        """The same, from sources that may be parsed already."""
        writer = _Writer(sources, code)
        digest = hashlib.sha256(writer.everything().encode()).hexdigest()
        return cls(digest, tuple(writer.places), frozenset(writer.left_out_seen | writer.names.sinks_seen))


class _Writer:
    """Writes the definitions of a Code, and those that they refer to, as text."""

    def __init__(self, sources: Sources, code: Code) -> None:
        self.sources, self.code, self.names = sources, code, Names(sources, code.sinks)
        self.settings = self.names.with_hinted(code.settings) if code.settings else []
        self.places: dict[Definition, int] = {}
        """Every definition that is reached, and its place in the order."""
        self.left_out_seen: set[str] = set()

    def everything(self) -> str:
        """All that is reached, and then the loose statements of the modules that hold it and of their packages."""
        for root in self.code.roots:
            found, rest = self.sources.resolve(root)
            if isinstance(found, str) or rest:
                raise ValueError(f"{root} is no function, class or constant of this project")
            self._place(found)
        for each in self.settings:
            self._place(each)
        texts = [self._definition(each) for each in _growing(self.places)]
        holding = dict.fromkeys(each.module for each in self.places)
        packages = {
            ".".join(parts[:length]) for parts in (m.split(".") for m in holding) for length in range(len(parts))
        }
        loose = {module: self._loose(module) for module in (*holding, *sorted(packages - {"", *holding}))}
        return "\n".join([*texts, *sorted(filter(None, loose.values()))])

    # Definitions

    def _place(self, definition: Definition) -> str:
        return f"#{self.places.setdefault(definition, len(self.places))}"

    def _definition(self, definition: Definition) -> str:
        module = self.sources.holding(definition)
        scope, texts = Scope(module), []
        for statement in module.bindings[definition.name]:
            if isinstance(statement, ast.ClassDef):
                texts.append(self._class(statement, scope, settings=definition in self.settings))
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(self._function(statement, scope))
            else:
                texts.append(self._binding(statement, definition.name, scope))
        return "; ".join(texts)

    def _binding(self, statement: ast.stmt, name: str, scope: Scope) -> str:
        """A top-level assignment, without the name if it binds no other."""
        if isinstance(statement, ast.AnnAssign):
            return f"= {self._node(statement.value, scope)}"
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            if isinstance(statement.targets[0], ast.Name):
                return f"= {self._node(statement.value, scope)}"
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            return f"{type(statement.op).__name__}= {self._node(statement.value, scope)}"
        return f"{name} of {self._node(statement, self.names.of_body([statement], scope))}"

    def _loose(self, name: str) -> str:
        """The loose statements of a module, with what they refer to, numbered by themselves."""
        module = self.sources.module(name)
        if module is None or not module.loose:
            return ""
        inner = _Writer(self.sources, Code(roots=(), left_out=self.code.left_out, sinks=self.code.sinks))
        inner.settings = self.settings
        text = inner._body(module.loose, self.names.of_body(module.loose, Scope(module)))
        return "\n".join([text, *(inner._definition(each) for each in _growing(inner.places))]) if text else ""

    def _class(self, node: ast.ClassDef, scope: Scope, *, settings: bool = False) -> str:
        """A class, without its name; of a class of settings the methods alone."""
        methods, body = self.names.of_methods(node, scope), self.names.of_body(node.body, scope)
        parts = []
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                parts.append(f"{statement.name}: {self._function(statement, methods)}")
            elif isinstance(statement, ast.AnnAssign) and not settings:
                role = _role(statement.annotation)
                parts.append(f"{self._node(statement.target, body)}:{role} {self._node(statement.value, body)}")
            elif not settings:
                parts.append(self._statement(statement, body))
        text = "; ".join(filter(None, parts))
        if settings:
            return f"settings {{{text}}}"
        heads = [self._node(each, scope) for each in (*node.decorator_list, *node.bases, *node.keywords)]
        return f"class ({', '.join(heads)}) {{{text}}}"

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> str:
        """A function, without its name."""
        decorators = ", ".join(self._node(each, scope) for each in node.decorator_list)
        body = self._body(node.body, self.names.of_function(node, scope))
        return f"{type(node).__name__} [{decorators}] ({self._arguments(node.args, scope)}) {{{body}}}"

    def _arguments(self, arguments: ast.arguments, scope: Scope) -> str:
        """Parameters by kind, with their defaults and without their hints."""
        parts = []
        for group in ("posonlyargs", "args", "vararg", "kwonlyargs", "kwarg"):
            given = getattr(arguments, group)
            if given:
                parts.append(
                    f"{group} {' '.join(each.arg for each in (given if isinstance(given, list) else [given]))}"
                )
        for defaults in (arguments.defaults, arguments.kw_defaults):
            parts.append(" ".join(self._node(each, scope) if each else "-" for each in defaults))
        return ", ".join(parts)

    # References

    def _reference(self, dotted: str) -> str:
        """A full dotted name as it counts."""
        found, rest = self.sources.resolve(dotted)
        if not isinstance(found, Definition):
            return found if found.partition(".")[0] not in PACKAGES else "a module"
        entries = (*self.code.left_out, *self.code.sinks)
        if entry := entry_of(str(found), entries) or entry_of(dotted, entries):  # a package may pass a name on
            self.left_out_seen.add(entry)
            return ".".join([f"~{found.name}", *rest])
        return ".".join([self._place(found), *rest])

    # Statements

    def _body(self, statements: Sequence[ast.stmt], scope: Scope) -> str:
        return "; ".join(text for statement in statements if (text := self._statement(statement, scope)))

    def _statement(self, node: ast.stmt, scope: Scope) -> str:
        """A statement; empty: nothing of it counts."""
        if isinstance(node, ast.Pass | ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal) or is_docstring(node):
            return ""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if self.names.is_sink(node.value.func, scope):
                return "; ".join(self._work_of_call(node.value, scope))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            return self._assignment(node, scope)
        elif isinstance(node, ast.With | ast.AsyncWith):
            return self._with(node, scope)
        elif isinstance(node, ast.If):
            return self._if(node, scope)
        elif isinstance(node, ast.Raise):
            return f"raise {self._raised(node.exc, scope)}"
        elif isinstance(node, ast.Assert):
            return f"assert {self._node(node.test, scope)}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return f"{node.name}: {self._function(node, scope)}"
        elif isinstance(node, ast.ClassDef):
            return f"{node.name}: {self._class(node, scope)}"
        return self._fields(node, scope)

    def _assignment(self, node: ast.Assign | ast.AnnAssign, scope: Scope) -> str:
        if node.value is None:
            return ""
        if self.names.makes_sink(node.value, scope):
            return "; ".join(self._work(node.value, scope))
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return " = ".join(self._node(each, scope) for each in (*targets, node.value))

    def _with(self, node: ast.With | ast.AsyncWith, scope: Scope) -> str:
        items = []
        for item in node.items:
            sink = self.names.makes_sink(item.context_expr, scope)
            items += self._work(item.context_expr, scope) if sink else [self._node(item, scope)]
        body = self._body(node.body, scope)
        return f"with {', '.join(items)} {{{body}}}" if items else body

    def _if(self, node: ast.If, scope: Scope) -> str:
        """One that would only tell something counts by the work of its test."""
        body = "" if is_for_type_checkers(node) else self._body(node.body, scope)
        otherwise = self._body(node.orelse, scope)
        if not body and not otherwise:
            return "; ".join(self._work(node.test, scope))
        return f"if {self._node(node.test, scope)} {{{body}}} else {{{otherwise}}}"

    def _raised(self, node: ast.expr | None, scope: Scope) -> str:
        """An exception without its sentence: raise ValueError and raise ValueError("...") are one thing."""
        if not isinstance(node, ast.Call):
            return self._node(node, scope)
        given = [self._node(each, scope) for each in node.args if not self.names.makes_text(each, scope)]
        given += [self._node(each, scope) for each in node.keywords if not self.names.makes_text(each.value, scope)]
        return self._node(node.func, scope) + (f"({', '.join(given)})" if given else "")

    def _work_of_call(self, call: ast.Call, scope: Scope) -> list[str]:
        """What the arguments of a call on a sink do, and those of the call that made the sink."""
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        inner = self._work_of_call(of, scope) if isinstance(of, ast.Call) else []
        return inner + [text for each in (*call.args, *call.keywords) for text in self._work(each, scope)]

    def _work(self, node: ast.AST, scope: Scope) -> list[str]:
        """The parts of what a sink is told that do something besides making text."""
        if isinstance(node, ast.Lambda):
            return []
        if isinstance(
            node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom | ast.Starred
        ):  # an iterator is used up
            return [self._node(node, scope)]
        if isinstance(node, COMPREHENSIONS):
            inner = self.names.of_comprehension(node, scope)
            works = any(self._work(each, inner) for each in ast.iter_child_nodes(node))
            return [self._node(node, scope)] if works else []
        if isinstance(node, ast.Call):
            called = self.names.resolved(node.func, scope)
            harmless = called in _PURE or self.names.makes_text(node, scope) or self.names.makes_sink(node, scope)
            if not harmless:
                return [self._node(node, scope)]
        return [text for each in ast.iter_child_nodes(node) for text in self._work(each, scope)]

    # Everything else

    def _node(self, node: object, scope: Scope) -> str:
        """Any part of a syntax tree."""
        if isinstance(node, list):
            return f"[{', '.join(self._node(each, scope) for each in node)}]" if node else ""
        if not isinstance(node, ast.AST):
            return "" if node is None else repr(node)
        if isinstance(node, ast.Name | ast.Attribute):
            dotted = self.names.dotted(node, scope) if isinstance(node.ctx, ast.Load) else None
            if dotted is not None:
                return self._reference(dotted)
            return node.id if isinstance(node, ast.Name) else f"{self._node(node.value, scope)}.{node.attr}"
        if isinstance(node, ast.Call) and self.names.resolved(node.func, scope) == "typing.cast":
            return self._node(node.args[1], scope)
        if isinstance(node, ast.Lambda):
            body = self._node(node.body, self.names.of_function(node, scope))
            return f"lambda ({self._arguments(node.args, scope)}) {body}"
        if isinstance(node, COMPREHENSIONS):
            return self._fields(node, self.names.of_comprehension(node, scope))
        return self._fields(node, scope)

    def _fields(self, node: ast.AST, scope: Scope) -> str:
        """Fields that are empty are left out, so that every Python writes the same."""
        parts = []
        for name, value in ast.iter_fields(node):
            if name in _NOT_COMPUTED:
                continue
            statements = isinstance(value, list) and value and all(isinstance(each, ast.stmt) for each in value)
            text = f"{{{self._body(value, scope)}}}" if statements else self._node(value, scope)
            if text:
                parts.append(f"{name}={text}")
        return f"{type(node).__name__}({', '.join(parts)})"


def _growing(places: Mapping[Definition, int]) -> Iterator[Definition]:
    """The keys of a mapping that grows meanwhile, in its order."""
    done = 0
    while done < len(places):
        for definition in list(places)[done:]:
            yield definition
            done += 1


def _role(hint: ast.expr) -> str:
    """What a hint tells a dataclass besides a type."""
    name = ast.unparse(hint).partition("[")[0].rpartition(".")[2]
    return name if name in ("ClassVar", "InitVar", "KW_ONLY") else ""
