"""The page that tells how to add a model shows what is in the tree."""

import re
from pathlib import Path

import pytest

from serving.layers.builder import LayerBuilder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("diff", re.findall(r"```diff\n.*?```", PAGE, re.DOTALL))
def test_its_diffs_are_of_lines_that_are_there(diff):
    file = ROOT / re.search(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)[1]
    added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert "\n".join(added) in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", [name for name in vars(LayerBuilder) if not name.startswith("_")])
def test_every_word_of_the_builder_is_explained(word):
    assert re.search(rf"`(build\.)?{word}\b", PAGE)
