"""Small pieces of HTML that several parts of the page are made of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from pipeline.report.rows import Facts

SIGNS = {"reproduced": "=", "above": "▲", "below": "▼", "undecided": "?", "no verdict": "–", "not run": "○"}
"""A verdict's sign, so that nothing is said by colour alone."""


def escaped(value: object) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def chip(facts: Facts) -> str:
    """A row's verdict as a coloured label."""
    kind = facts.verdict.kind
    return f'<span class="chip {style_of(kind)}"><span aria-hidden="true">{SIGNS[kind]}</span> {kind}</span>'


def style_of(kind: str) -> str:
    """The class of a verdict in style.css."""
    return kind.replace(" ", "-")


def row_link(name: str, text: str = "") -> str:
    """A link to a row's section; `text` is HTML, default: the name."""
    return f'<a href="#{escaped(name)}">{text or escaped(name)}</a>'


def small(text: str) -> str:
    """Small print after something; empty for nothing."""
    return f" <small>{escaped(text)}</small>" if text else ""


def paragraphs(texts: Iterable[str], kind: str = "") -> str:
    """A paragraph for every text that is not empty."""
    mark = f" class={kind}" if kind else ""
    return "".join(f"<p{mark}>{escaped(text)}</p>" for text in texts if text)


def items(texts: Iterable[str]) -> str:
    """A list's points."""
    return "".join(f"<li>{escaped(text)}</li>" for text in texts)


def cells(texts: Iterable[str]) -> str:
    """A table's cells."""
    return "".join(f"<td>{escaped(text)}</td>" for text in texts)


def definitions(lines: Iterable[tuple[str, str]]) -> str:
    """Terms and what is said of them; the latter is HTML."""
    return f"<dl>{''.join(f'<dt>{escaped(term)}</dt><dd>{said}</dd>' for term, said in lines)}</dl>"


def table(headings: Sequence[str], lines: Iterable[str], kind: str) -> str:
    """A table of ready lines, which scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escaped(heading)}</th>' for heading in headings)
    body = "".join(lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
