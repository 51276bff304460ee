"""The project's modules as syntax trees: which names each binds, and what a dotted name refers to.

Nothing is imported. What is chosen by a string (getattr, importlib) is not seen.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that holds m2f/, pipeline/ and stages/."""

PACKAGES = ("m2f", "pipeline", "stages")
"""The project's own; every other name is another package's."""


class Definition(NamedTuple):
    """What a name at the top level of a module is bound to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Module:
    """A parsed file."""

    name: str
    package: str
    """What relative imports start from."""
    bindings: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """By name, the top-level statements that define it or change it, in order."""
    imports: dict[str, str] = field(default_factory=dict)
    """By name, the dotted name that it was imported from."""
    for_hints: dict[str, str] = field(default_factory=dict)
    """The same, imported for type checkers alone."""
    loose: list[ast.stmt] = field(default_factory=list)
    """Top-level statements that do something without defining a name."""

    @classmethod
    def parsed(cls, name: str, text: str, *, package: bool) -> Module:
        """From a file's text. `package`: it is an __init__.py."""
        module = cls(name, name if package else name.rpartition(".")[0])
        for statement in ast.parse(text).body:
            module._add(statement)
        return module

    def _add(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self.imports |= imported(statement, self.package)
        elif is_for_type_checkers(statement):
            for inner in statement.body:  # type: ignore[attr-defined]
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    self.for_hints |= imported(inner, self.package)
            for inner in statement.orelse:  # type: ignore[attr-defined]
                self._add(inner)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self.bindings.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names = _changed_names(statement)
            own = [name for name in names if name in self.bindings or _is_bound_by(statement, name)]
            for name in own:
                self.bindings.setdefault(name, []).append(statement)
            if not own:
                self.loose.append(statement)
        elif not (is_docstring(statement) or isinstance(statement, ast.Pass)):
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    self.imports |= imported(inner, self.package)
                elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    self.bindings.setdefault(inner.id, []).append(statement)
                elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    self.bindings.setdefault(inner.name, []).append(statement)
            self.loose.append(statement)


class Sources:
    """The project's modules, parsed when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, Module | None] = {}
        self._resolved: dict[str, tuple[Definition | str, list[str]]] = {}

    def module(self, name: str) -> Module | None:
        """The module of a dotted name; None: it is another package's, or no module."""
        if name not in self.known:
            self.known[name] = self._parsed(name)
        return self.known[name]

    def holding(self, definition: Definition) -> Module:
        """The module that holds a definition."""
        module = self.module(definition.module)
        assert module is not None
        return module

    def _parsed(self, name: str) -> Module | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        file = source_file(name, root=self.root)
        if file is None:
            return None
        return Module.parsed(name, file.read_text(encoding="utf-8"), package=file.stem == "__init__")

    def resolve(self, dotted: str) -> tuple[Definition | str, list[str]]:
        """What a dotted name refers to: a definition of the project, the name of a module of the project or, of another
        package, the dotted name itself; and the attributes that follow a definition.

        ValueError: the project has no such name.
        """
        if dotted not in self._resolved:
            self._resolved[dotted] = self._resolve(dotted)
        return self._resolved[dotted]

    def _resolve(self, dotted: str) -> tuple[Definition | str, list[str]]:
        parts = dotted.split(".")
        if parts[0] not in PACKAGES:
            return dotted, []
        length = next((n for n in range(len(parts), 0, -1) if self.module(".".join(parts[:n]))), 0)
        if length == 0:
            raise ValueError(f"module {dotted} has no source file under {self.root}; keys need the project's sources")
        name = ".".join(parts[:length])
        if length == len(parts):
            return name, []
        module, wanted, rest = self.module(name), parts[length], parts[length + 1 :]
        assert module is not None
        if wanted in module.bindings:
            return Definition(name, wanted), rest
        origin = module.imports.get(wanted) or module.for_hints.get(wanted)  # the latter: names that load when used
        if origin is None:
            raise ValueError(f"{name} has no {wanted}, which {dotted} refers to")
        return self.resolve(".".join([origin, *rest]))


def source_file(module: str, *, root: Path = PROJECT) -> Path | None:
    """The file of a dotted module name below `root`, found without importing it; None: there is none."""
    path = root.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in files if file.is_file()), None)


def imported(statement: ast.Import | ast.ImportFrom, package: str) -> dict[str, str]:
    """The names that an import line binds, and what to."""
    if isinstance(statement, ast.Import):
        return {
            alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0]
            for alias in statement.names
        }
    origin = statement.module or ""
    if statement.level:
        parts = package.split(".")
        origin = ".".join(filter(None, [*parts[: len(parts) - statement.level + 1], origin]))
    return {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in statement.names}


def _changed_names(statement: ast.Assign | ast.AnnAssign | ast.AugAssign) -> list[str]:
    """The names at the bottom of what is assigned to: X of X, X[0] and X.a."""
    targets = list(statement.targets) if isinstance(statement, ast.Assign) else [statement.target]
    flat: list[ast.expr] = []
    while targets:
        target = targets.pop(0)
        if isinstance(target, ast.Tuple | ast.List):
            targets = [*target.elts, *targets]
        else:
            flat.append(target.value if isinstance(target, ast.Starred) else target)
    names = []
    for target in flat:
        while isinstance(target, ast.Attribute | ast.Subscript):
            target = target.value
        if isinstance(target, ast.Name):
            names.append(target.id)
    return names


def _is_bound_by(statement: ast.stmt, name: str) -> bool:
    """Whether a statement assigns to the name itself."""
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
        for node in ast.walk(statement)
    )


def is_for_type_checkers(statement: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def is_docstring(node: ast.AST) -> bool:
    """A string that stands alone: of a module, class or function, or below a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
