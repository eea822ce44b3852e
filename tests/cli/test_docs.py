"""What the pages in docs/ and the recipes say can be typed, and what they point to is there."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def command_lines():
    """Yield the words after `vmamba` of every command in a block of shell, and of those that the recipes name."""
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(r"(?:^|-m )vmamba (\w.*)", line):
                    yield page.name, found[1].split(" …")[0]
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        for line in re.findall(r"^#.*?\bvmamba (train --config .*)", recipe.read_text(encoding="utf-8"), re.MULTILINE):
            yield recipe.name, line.split(";")[0].replace("--config ", "--config recipes/")


LINES = list(dict.fromkeys(command_lines()))


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_the_commands_are_understood(vmamba, page, line, monkeypatch):
    words = shlex.split(line, comments=True)
    monkeypatch.chdir(ROOT)
    outcome = vmamba(*words, "--print_config")
    assert outcome.status == 0, outcome.err


def test_commands_were_found():
    assert {name for name, _ in LINES} >= {page.name for page in PAGES} - {"kernels.md", "performance.md", "scaling.md"}


def anchors(page):
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"
    for name in re.findall(r"(?:benchmarks|recipes|docs|notebooks|tests)/[\w./*]*\w\.\w+", text):
        assert any(ROOT.glob(name)), name
