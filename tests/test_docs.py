"""The documentation: commands parse, the tutorial runs, the tables name every key of a recipe, and links resolve."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from command import command
from pydantic import BaseModel

from msmodelslim_omni.recipe import Recipe
from msmodelslim_omni.recipe.schema import SAVER_CONFIGS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"], key=lambda path: path.name)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def command_lines(page: Path, language: str | None = None) -> list[list[str]]:
    """The words of every `msmodelslim` command in the code blocks of a page, without comments."""
    found = []
    for kind, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("msmodelslim ") and language in (None, kind):
                words = shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True)
                found.append([word.strip("[]") for word in words[1:]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documentation_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With models that do not exist, a command with wrong flags ends with 2, and a right one with 1."""
    monkeypatch.chdir(tmp_path)
    for words in command_lines(page):
        if words[0] in ("recipes", "env") or page.name == "tutorial.md":
            continue
        result = command(*words)
        assert result.code == 1 and "does not exist" in result.err, (words, result.err)


def test_readme_is_short() -> None:
    for name in ("README.md", "README.zh.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize(
    ("part", "count"), [("Without samples", 8), pytest.param("With samples", 4, marks=pytest.mark.full)]
)
def test_tutorial_runs(part: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the tutorial, one after another in one folder. The part with samples takes a minute."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").split(f"## {part}\n")[1].split("\n## ")[0]
    (tmp_path / "part.md").write_text(text, encoding="utf-8")
    results = [(words, command(*words)) for words in command_lines(tmp_path / "part.md", "bash")]
    assert len(results) == count
    for words, result in results:
        assert result.code == 0, (words, result.out + result.err)
    assert sum("finished already" in result.err for _, result in results) == (part == "Without samples")


def keys_of(block: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Names and defaults of all fields of a block and of the blocks inside it."""
    for name, field in block.model_fields.items():
        yield field.alias or name, field.default
        for inner in blocks_in(field.annotation):
            yield from keys_of(inner)


def blocks_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from blocks_in(part)


def test_every_key_of_a_recipe_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text[text.index("## Every key") :]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for name, default in keys_of(Recipe):
        assert re.search(rf"\b{name}\b", table), name
        if isinstance(default, bool):
            shown = str(default).lower()
        elif isinstance(default, (int, float)) and default != 1e-5:
            shown = f"{default:g}"
        else:
            continue
        assert any(name in row and shown in row for row in rows if name in row), (name, shown)
    assert all(f"`{saver}`" in table for saver in SAVER_CONFIGS)


def test_links_between_pages_resolve() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert re.match(r"[a-z]+:", target) or (page.parent / target).is_file(), (page.name, target)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([a-z_]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
