"""Changes to the project's own source, made in memory, and the digests that they give.

`python -m tests.helpers.mutations` prints the table of all of them with their digests.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.provenance.code import Code, Written
from pipeline.provenance.names import SINKS
from pipeline.provenance.run_key import TRAINING
from pipeline.provenance.sources import PROJECT, Definition, Module, Sources, is_docstring, source_file

Texts = Mapping[str, str]
"""Changed files, as texts by the dotted names of their modules."""


class Project:
    """The project's source as it is, and with some files changed."""

    def __init__(self, code: Code = TRAINING) -> None:
        self.code, self.sources = code, Sources(PROJECT)
        self.written = Written.of_sources(code, self.sources)
        self.definitions: dict[str, list[str]] = {}
        """By module, the names of the definitions that are reached."""
        for definition in self.written.definitions:
            self.definitions.setdefault(definition.module, []).append(definition.name)

    def text(self, module: str) -> str:
        file = source_file(module)
        assert file is not None
        return file.read_text(encoding="utf-8")

    def digest(self, changed: Texts, code: Code | None = None) -> str:
        """The digest with other texts of some modules; the rest is not read again."""
        sources = Sources(PROJECT)
        sources.known = dict(self.sources.known)
        for name, text in changed.items():
            file = source_file(name)
            sources.known[name] = Module.parsed(name, text, package=file is not None and file.stem == "__init__")
        return Written.of_sources(code or self.code, sources).digest

    def reached(self, module: str) -> list[ast.stmt]:
        """The statements that define what is reached of a module, parsed anew: hints and settings' fields left out."""
        settings = {each.name for each in self._settings() if each.module == module}
        found = []
        for statement in ast.parse(self.text(module)).body:
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            name = getattr(statement, "name", "")
            bound = isinstance(statement, ast.Assign | ast.AnnAssign) and names & set(self.definitions[module])
            if (name in self.definitions[module] and name not in settings) or bound:
                found.append(statement)
        return found

    def _settings(self) -> list[Definition]:
        from pipeline.provenance.names import Names

        return Names(self.sources, ()).with_hinted(self.code.settings) if self.code.settings else []


@dataclass(frozen=True)
class Change:
    """One change of a module."""

    what: str
    texts: Texts
    code: Code | None = None
    """Where files are renamed: the same definitions under their new names."""


# Changes that compute the same


def reworded(project: Project, module: str) -> Change | None:
    """The first sentence of a raised exception."""
    for node in _inside(project, module):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for part in node.exc.args:
                if isinstance(part, ast.JoinedStr | ast.Constant) and '"' in ast.unparse(part) + '"':
                    return _replaced(project, module, part, 'f"other words {1 + 1}"', "reworded error")
    return None


def more_lines(project: Project, module: str) -> Change | None:
    """A printed line, a logged one and one of progress, in the first function."""
    for node in _inside(project, module):
        if isinstance(node, ast.FunctionDef):
            first = next(each for each in node.body if not is_docstring(each))
            space = " " * first.col_offset
            lines = (
                "from pipeline.storage.progress import Progress",
                "import logging",
                'progress = Progress("what", 0, unit="steps")',
                "progress.add()",
                'print(f"here {len(str(1))}", flush=True)',
                'logging.getLogger(__name__).info("there")',
                'if 1 > 0: print("also here")',
            )
            text = "".join(f"{line}\n{space}" for line in lines)
            return _inserted(project, module, first, text, "added lines to print, log and progress")
    return None


def other_hint(project: Project, module: str) -> Change | None:
    """The hint of the first parameter that is not told to."""
    for node in _inside(project, module):
        if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation)[0].islower():
            return _replaced(project, module, node.annotation, "object", "changed hint")
    return None


def other_comments(project: Project, module: str) -> Change | None:
    """Docstrings, comments and blank lines."""
    text = re.sub(r'^("""|    """)(?=\S)', r"\1Said anew. ", project.text(module), flags=re.MULTILINE)
    text = re.sub(r"\n\n\n", "\n\n\n\n# a comment\n\n", text)
    return Change("other comments and docstrings", {module: text})


def moved(project: Project, module: str) -> Change | None:
    """The first function or class to a file of its own."""
    text, package = project.text(module), module.rpartition(".")[0]
    tree = ast.parse(text)
    for node in project.reached(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
            lines = text.splitlines(keepends=True)
            cut, rest = lines[start : node.end_lineno], [*lines[:start], *lines[node.end_lineno :]]
            imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom | ast.If)]
            own = [each for each in project.sources.known[module].bindings if each != node.name]  # type: ignore[union-attr]
            heads = [ast.unparse(each) for each in imports]
            there = "\n".join([*heads, f"from {module} import {', '.join(own)}" if own else "", "", "".join(cut)])
            here = f"from {package}.elsewhere import {node.name}\n"
            first = next(each for each in tree.body if not is_docstring(each) and "__future__" not in ast.unparse(each))
            rest.insert(first.lineno - 1, here)
            return Change(f"moved {node.name}", {module: "".join(rest), f"{package}.elsewhere": there})
    return None


def renamed(project: Project, module: str) -> Change | None:
    """The file itself, with every import of it."""
    if source_file(module).stem == "__init__":  # type: ignore[union-attr]
        return None
    other = f"{module}_anew"
    pattern = re.compile(rf"\b{re.escape(module)}\b")
    texts = {
        name: pattern.sub(other, project.text(name))
        for name, known in project.sources.known.items()
        if known is not None and pattern.search(project.text(name))
    }
    texts[other] = pattern.sub(other, project.text(module))
    texts.pop(module, None)

    def there(name: str) -> str:
        return pattern.sub(other, name)

    code = dataclasses.replace(
        project.code,
        roots=tuple(map(there, project.code.roots)),
        left_out={there(name): why for name, why in project.code.left_out.items()},
        sinks=tuple(map(there, project.code.sinks)),
        settings=there(project.code.settings),
    )
    return Change("renamed file", texts, code)


# Changes that compute something else


def other_constant(project: Project, module: str) -> Change | None:
    """The first number."""
    for node in _computing(project, module):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return _replaced(project, module, node, repr(node.value + 1), f"{node.value} is {node.value + 1}")
    return None


def other_operator(project: Project, module: str) -> Change | None:
    """The first operator between two values."""
    others = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "//", ast.BitOr: "&"}
    for node in _computing(project, module):
        if isinstance(node, ast.BinOp) and type(node.op) in others:
            text = f"({ast.unparse(node.left)} {others[type(node.op)]} {ast.unparse(node.right)})"
            return _replaced(project, module, node, text, "another operator")
        if isinstance(node, ast.Compare) and isinstance(
            node.ops[0], ast.In | ast.Is | ast.Eq | ast.Lt | ast.Gt | ast.LtE
        ):
            return _replaced(project, module, node, f"(not {ast.unparse(node)})", "a negated comparison")
    return None


def other_argument(project: Project, module: str) -> Change | None:
    """The first call's arguments, the other way round or one more."""
    for node in _computing(project, module):
        if isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            return _replaced(project, module, first, f"({ast.unparse(first)}, 0)", "another argument")
    return None


def less_done(project: Project, module: str) -> Change | None:
    """The first call that stands as a statement is gone."""
    for node in _computing(project, module):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return _replaced(project, module, node, "pass", f"without {ast.unparse(node)[:50]}")
    return None


def other_order(project: Project, module: str) -> Change | None:
    """The first two neighbouring assignments swapped."""
    for node in _computing(project, module):
        body = getattr(node, "body", None)
        for one, two in itertools.pairwise(body if isinstance(body, list) else []):
            if isinstance(one, ast.Assign) and isinstance(two, ast.Assign) and ast.dump(one) != ast.dump(two):
                text = f"{ast.unparse(two)}; {ast.unparse(one)}"
                lines = _replaced(project, module, two, "pass", "").texts[module]
                return Change("swapped assignments", {module: _replace(lines, one, text)})
    return None


def other_import(project: Project, module: str) -> Change | None:
    """The first imported name that is used, bound to another package's."""
    text = project.text(module)
    used = {each.id for each in _inside(project, module) if isinstance(each, ast.Name)}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom | ast.Import) and "__future__" not in ast.unparse(node):
            for alias in node.names:
                name = alias.asname or alias.name
                computing = {each.id for each in _computing(project, module) if isinstance(each, ast.Name)}
                if name in used & computing:
                    others = [ast.unparse(each) for each in [_without(node, alias)] if each is not None]
                    text = _replace(text, node, "; ".join([*others, f"from elsewhere import {name}"]))
                    return Change(f"{name} of another package", {module: text})
    return None


SAME: tuple[Callable[[Project, str], Change | None], ...] = (
    reworded, more_lines, other_hint, other_comments, moved, renamed,
)  # fmt: skip
"""Changes that keep every key."""
OTHER: tuple[Callable[[Project, str], Change | None], ...] = (
    other_constant, other_operator, other_argument, less_done, other_order, other_import,
)  # fmt: skip
"""Changes that give other keys."""


# How


def _inside(project: Project, module: str) -> Iterator[ast.AST]:
    """All nodes of the definitions that are reached, in the order of the text."""
    nodes = [node for statement in project.reached(module) for node in ast.walk(statement)]
    return iter(sorted(nodes, key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))))


def _computing(project: Project, module: str) -> Iterator[ast.AST]:
    """Those that are no hints, docstrings, raised exceptions or parts of what is told to a sink."""
    for statement in project.reached(module):
        yield from _walk_computing(statement)


def _walk_computing(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.stmt) and is_docstring(node)
    ):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = ast.unparse(node.value.func)
        if name.split(".")[0] in ("print", "progress", "logging", "curve", "warnings") or f"builtins.{name}" in SINKS:
            return
        if name.startswith(("self.curve.", "self.progress.")):
            return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield from _walk_computing(each)


def _replaced(project: Project, module: str, node: ast.AST, text: str, what: str) -> Change:
    return Change(what, {module: _replace(project.text(module), node, text)})


def _inserted(project: Project, module: str, node: ast.stmt, text: str, what: str) -> Change:
    lines = project.text(module).splitlines(keepends=True)
    at = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
    lines[at] = lines[at][: node.col_offset] + text + lines[at][node.col_offset :]
    return Change(what, {module: "".join(lines)})


def _replace(text: str, node: ast.AST, new: str) -> str:
    """A node's text, given that columns count bytes."""
    lines = text.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    before = lines[first].encode()[: node.col_offset].decode()  # type: ignore[attr-defined]
    after = lines[last].encode()[node.end_col_offset :].decode()  # type: ignore[attr-defined]
    return "".join([*lines[:first], before, new, after, *lines[last + 1 :]])


def _without(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt | None:
    """An import line without one of its names; None: it has no other."""
    names = [each for each in node.names if each is not alias]
    if not names:
        return None
    if isinstance(node, ast.Import):
        return ast.Import(names)
    return ast.ImportFrom(node.module, names, node.level)


def main() -> None:
    """Print the table."""
    project = Project()
    print(f"unchanged: {project.written.digest[:16]}\n\n| module | change | key | |\n| --- | --- | --- | --- |")
    for module in sorted(project.definitions):
        for make in (*SAME, *OTHER):
            change = make(project, module)
            if change is not None:
                digest = project.digest(change.texts, change.code)
                kept = "same" if digest == project.written.digest else "new"
                print(f"| {module} | {change.what} | {digest[:16]} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
