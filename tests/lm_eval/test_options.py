"""Options of lm-eval's model that depend on what a method can do."""

import pytest

from eval import cells
from wildcat_kv.compressors.registry import Method
from wildcat_kv.lm_eval import options
from wildcat_kv.lm_eval.options import EXACT, check, check_rolling, reads_twice


@pytest.fixture
def early(monkeypatch):
    """A method of somebody else's that compresses prompts alone, and reads them once."""
    method = Method("early", "", needs_queries=False, decodes=False, reads_twice=False, summary="")
    for module in (options, cells):
        monkeypatch.setattr(module, "available", lambda: [method])
    return method.name


def test_methods_that_read_twice_are_known():
    assert reads_twice("kvzip") and not reads_twice("wildcat") and not reads_twice(EXACT)


def test_a_method_for_prompts_alone_does_not_read_twice(early):
    assert not reads_twice(early)
    check(early, "full-prompt", 64, 8, {})


def test_a_method_for_prompts_alone_has_no_likelihood_of_a_whole_text(early):
    with pytest.raises(ValueError, match="method='early' compresses nothing after a prompt"):
        check_rolling(early)
    check_rolling(EXACT)


def test_a_method_for_prompts_alone_is_not_measured_while_it_reads_on(early):
    cell = cells.Cell(early, early, ratio=0.5)
    cell.check_tasks(streams=False)
    with pytest.raises(ValueError, match="methods='early' compresses nothing later; leave it out"):
        cell.check_tasks(streams=True)
