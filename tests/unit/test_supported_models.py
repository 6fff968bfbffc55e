"""The page of supported models tells what the table and the files hold."""

import pytest

from scripts.supported_models import row, supported_models_page, table
from serving.models.select import ARCHITECTURES, FALLBACK


def test_the_table_is_read_as_it_is():
    assert table("ARCHITECTURES") == ARCHITECTURES
    page = supported_models_page("", 100)
    assert all(f"| `{model_type}` |" in page for model_type in ARCHITECTURES)


@pytest.mark.parametrize(
    ("model_type", "has"),
    [
        ("llama", "rotary positions"),
        ("gpt2", "learned positions"),
        ("mixtral", "rotary positions, sliding windows, experts"),
        ("gemma2", "rotary positions, sliding windows, soft caps"),
    ],
)
def test_what_an_architecture_has_comes_from_its_file_and_what_that_reaches(model_type, has):
    assert row(model_type, ARCHITECTURES[model_type]).endswith(f"| {has} |")


def test_every_file_says_which_checkpoints_it_serves():
    for model_type, architecture in ARCHITECTURES.items():
        _, _, checkpoints, _ = row(model_type, architecture).strip("|").split("|")
        assert checkpoints.strip(), model_type


def test_the_fallback_is_no_row():
    assert FALLBACK not in ARCHITECTURES.values()
