"""What the README says of the code is made from the code."""

from pathlib import Path

import pytest

from model.families import table

pytestmark = pytest.mark.fast

README = Path(__file__).parent.parent / "README.md"


def test_the_table_of_families_is_the_one_that_the_code_gives():
    _, after = README.read_text().split("<!-- families: python -m model.families -->\n")
    shown, _ = after.split("\n<!-- end of families -->")
    assert shown == table(), "put the output of `python -m model.families` between the markers of README.md"
