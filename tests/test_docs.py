"""Pages that show the code or are made from it say what it says."""

import re
from pathlib import Path

import pytest

from luthier.commands import keys as keys_command
from luthier.config import COMMANDS
from tiny import ROOT


def test_the_page_of_a_new_family_shows_a_family_as_it_is():
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-family.md").read_text(), re.DOTALL)
    assert shown == (ROOT / "luthier" / "model" / "families" / "smollm3.py").read_text()


def test_the_page_of_keys_is_todays():
    page = "\n".join(map(keys_command.markdown, COMMANDS))
    assert (ROOT / "docs" / "keys.md").read_text() == page, "make docs"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
