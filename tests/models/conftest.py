"""A checkpoint that transformers saved and our model from it, once a case; and the matrix of what was held to what."""

import pytest
from models.cases import EVERY_CASE, randomized
from models.hand_fed import Ours

COLUMNS = {
    "test_prefill": "prefill", "test_chunks": "chunks", "test_decode": "decode", "test_prefix": "prefix",
    "test_mixed_batches": "mixed", "test_ranks_equal_transformers": "ranks",
}  # fmt: skip


@pytest.fixture(scope="module", params=EVERY_CASE)
def checkpoint(request, tmp_path_factory):
    """transformers' model, and the directory where it is saved."""
    directory = tmp_path_factory.mktemp("checkpoint")
    theirs = randomized(EVERY_CASE[request.param])
    theirs.save_pretrained(directory)
    return theirs, directory


@pytest.fixture(scope="module")
def pair(checkpoint):
    """transformers' model and ours."""
    theirs, directory = checkpoint
    return theirs, Ours(directory)


def pytest_terminal_summary(terminalreporter, config):
    """Under `make test-models`: a line a case, with what failed of how many."""
    if config.option.markexpr != "models":
        return
    cells = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            test, _, case = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
            if test in COLUMNS and (outcome != "passed" or report.when == "call"):
                case = next((name for name in sorted(EVERY_CASE, key=len, reverse=True) if name in case), case)
                cells.setdefault(case, {}).setdefault(COLUMNS[test], []).append(outcome)
    terminalreporter.section("held to transformers")
    width = max(map(len, cells), default=0)
    terminalreporter.write_line(" " * width + "".join(f"{column:>9}" for column in COLUMNS.values()))
    for case, row in sorted(cells.items()):
        found = (row.get(column) for column in COLUMNS.values())
        marks = ("-" if cell is None else "ok" if set(cell) == {"passed"} else "FAILED" for cell in found)
        terminalreporter.write_line(case.ljust(width) + "".join(f"{mark:>9}" for mark in marks))
