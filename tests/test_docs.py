"""Links of the documents lead somewhere, and the commands that they show are there with their options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.shared import PROJECT

DOCUMENTS = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    *sorted((PROJECT / "docs").glob("*.md")),
    *sorted((PROJECT / "studies").glob("*.md")),
]
CODE = re.compile(r"```.*?```", re.DOTALL)


def name(document: Path) -> str:
    return str(document.relative_to(PROJECT))


def anchors(document: Path) -> set[str]:
    """Names by which a page's headings are linked: as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", document.read_text()), re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def commands(document: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules of this project that a page calls, with the options that follow on the line."""
    text = document.read_text().replace("\\\n", " ")
    for module, rest in re.findall(r"python -m ((?:stages|studies|benchmarks|pipeline)\.\w+)([^`\n]*)", text):
        yield module, re.findall(r"(?<=\s)--[a-z][\w-]*", rest.partition(" #")[0].partition(" -- ")[0])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", document.read_text())):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_command_that_a_document_shows_has_its_options(document: Path) -> None:
    for module, options in commands(document):
        folder = PROJECT / module.replace(".", "/")
        file = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert file.is_file(), module
        assert not [option for option in options if f'"{option}"' not in file.read_text()], module
