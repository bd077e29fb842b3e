"""Pages that point at code point at what is there: files exist, and a quoted line is the line that is linked."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>[^)#:\s]+)(?:#L(?P<line>\d+))?\)")
NAMED = re.compile(r"`((?!\w+\.py`)[A-Za-z_][\w.]*)`")


def links(page: Path) -> list[tuple[str, Path, int | None]]:
    """(text, file, line) of each link of a page to a file of the repository."""
    found = LINK.finditer(page.read_text())
    return [(m["text"], page.parent / m["path"], int(m["line"]) if m["line"] else None) for m in found]


def names_in(file: Path) -> set[str]:
    """Functions and classes that a file defines; methods as `Class.method`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path):
    assert [str(file) for _, file, _ in links(page) if not file.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_function_that_a_link_names_is_defined_in_the_linked_file(page: Path):
    for text, file, line in links(page):
        if line is None and file.suffix == ".py" and (named := NAMED.fullmatch(text)):
            assert named[1] in names_in(file), f"{page.name} says that {file} defines {named[1]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_that_a_link_quotes_is_the_line_that_it_leads_to(page: Path):
    for text, file, line in links(page):
        if line is not None:
            lines, quoted = file.read_text().splitlines(), text.strip("`")
            now = [number for number, content in enumerate(lines, 1) if quoted in content]
            assert line in now, f"{page.name}: `{quoted}` is not in line {line} of {file.name}, but in {now}"


def test_the_page_on_attention_leads_from_equations_to_lines():
    quoted = [file.name for _, file, line in links(ROOT / "docs" / "attention" / "README.md") if line is not None]
    assert {"decoder.py", "scores.py"} <= set(quoted)
    assert len(quoted) >= 8


def test_the_tables_of_the_page_on_attention_are_those_that_the_comparison_wrote():
    directory = ROOT / "docs" / "attention"
    section = (directory / "README.md").read_text().split("## What was measured")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 19  # two tables with their heads
    assert set(rows) <= set((directory / "comparison.md").read_text().splitlines())
