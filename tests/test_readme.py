"""README.md and README.zh.md have the same outline, code, numbers and links, and all links resolve.

The prose is not compared. A change of one edition needs the same change in the other.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EDITIONS = {
    "README.md": "README.zh.md",
    "README.zh.md": "README.md",
}  # each with the target of its first link

NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMENT = re.compile(r"(^|\s)#.*")  # comments of shell and Python
CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Edition:
    """levels: levels of the headings. blocks: lines of the code blocks. tables: rows of cells. links: link targets."""

    levels: list[int]
    blocks: list[list[str]]
    tables: list[list[list[str]]]
    links: list[str]


def read(name: str) -> Edition:
    edition = Edition([], [], [], [])
    prose: list[str] = []
    inside = in_table = False
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if not inside:
                edition.blocks.append([])
            edition.blocks[-1].append(line)
            inside = not inside
            continue
        if inside:
            edition.blocks[-1].append(line)
            continue
        prose.append(line)
        if heading := re.match(r"(#+) ", line):
            edition.levels.append(len(heading[1]))
        if line.startswith("|"):
            if not in_table:
                edition.tables.append([])
            edition.tables[-1].append([cell.strip() for cell in CELLS.split(line.strip().strip("|"))])
        in_table = line.startswith("|")
    assert not inside, f"{name}: a code block is not closed"
    edition.links.extend(LINK.findall("\n".join(prose)))  # the text of a link may be wrapped
    return edition


@pytest.fixture(scope="module")
def english() -> Edition:
    return read("README.md")


@pytest.fixture(scope="module")
def chinese() -> Edition:
    return read("README.zh.md")


def test_headings_have_the_same_levels_in_the_same_order(english: Edition, chinese: Edition) -> None:
    assert english.levels[:2] == [1, 2]
    assert chinese.levels == english.levels


def test_code_differs_in_comments_only(english: Edition, chinese: Edition) -> None:
    """The comment mark is kept, so that a comment is in both editions or in neither."""
    code = [
        [[COMMENT.sub(r"\1#", line) for line in block] for block in edition.blocks] for edition in (english, chinese)
    ]
    assert code[0] and code[1] == code[0]


def test_tables_have_the_same_shape_and_numbers(english: Edition, chinese: Edition) -> None:
    """Compared cell by cell, so that no number moves to another row or column."""
    assert english.tables and len(chinese.tables) == len(english.tables)
    for number, (table, translation) in enumerate(zip(english.tables, chinese.tables, strict=True), start=1):
        assert [len(row) for row in translation] == [len(row) for row in table], f"table {number}: rows and columns"
        assert {len(row) for row in table} == {len(table[0])}, f"table {number}: rows of different length"
        assert translation[1] == table[1], f"table {number}: alignment"
        for row, translated_row in zip(table, translation, strict=True):
            for cell, translated in zip(row, translated_row, strict=True):
                numbers, translated_numbers = (Counter(NUMBER.findall(text)) for text in (cell, translated))
                assert translated_numbers == numbers, f"table {number}: {cell!r} became {translated!r}"


@pytest.mark.parametrize("name", EDITIONS)
def test_relative_links_name_existing_files(name: str) -> None:
    paths = [link.partition("#")[0] for link in read(name).links if not re.match(r"[a-z]+:|#", link)]
    assert paths[0] == EDITIONS[name]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_links_are_the_same(english: Edition, chinese: Edition) -> None:
    assert chinese.links[1:] == english.links[1:]  # the first link names the other edition
