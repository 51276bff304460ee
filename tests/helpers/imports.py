"""Which project modules a module really imports, read off the sources: imports inside functions count, those
under TYPE_CHECKING do not."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import m2f
from tests.helpers.shared import PROJECT

PACKAGES = ("m2f", "pipeline", "stages")


@cache
def modules() -> dict[str, Path]:
    """Every module of the project's packages and its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Dotted names that one module's own code imports, of the project or not."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            source = node.module or ""
            if source == "m2f":  # names that the package loads lazily
                names.update(m2f._HOME[alias.name] for alias in node.names if alias.name in m2f._HOME)
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in modules())
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(_tree(module))
    return frozenset(names)


@cache
def reached(module: str) -> frozenset[str]:
    """The module and all project modules that it imports, directly or through others; packages on the way included."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name in seen or name not in modules():
            continue
        seen.add(name)
        todo += imported(name)
        todo += [name.rpartition(".")[0]]
    return frozenset(seen)


def has_code(module: str) -> bool:
    """Whether a module holds more than a docstring."""
    body = _tree(module).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))
