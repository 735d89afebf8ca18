"""The check that runs a term on two processes: built-in terms and plugins pass, planted terms fail."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from curvalg.errors import ConformanceError
from curvalg.testing import CHECKS, check_term, default_problems, parametrize_terms
from tests.support.planted_parts import NeedsBatch, OwnRows, Refuses, Unpicklable
from tests.support.ranks import environment

pytestmark = pytest.mark.xdist_group("processes")

SMALL = [problem for problem in default_problems() if problem.size == 24][:1]
BUILT_IN = ("hessian", "ggn_mc(samples=2, seed=3)", "centered_covariance", "jacobian.T")
PLUGINS = (
    "centered_covariance_diagonal",
    "covariance_diagonal",
    "ekfac(rest='diagonal')",
    "foof(rest='diagonal')",
    "ggn_class",
    "ggn_cross",
    "ggn_diagonal",
    "ggn_same",
    "ggn_within",
    "hessian_diagonal",
    "hessian_fd",
    "kfac(rest='diagonal')",
    "ntk",
)


def outcome(term):
    """The message of the check where it fails, or says that it does not apply; None where it passes."""
    (*_, parameters) = parametrize_terms([term], processes=True).args[1]
    check = parameters.values[1]
    assert check.name == "processes"
    try:
        check(term)
    except ConformanceError as failure:
        return failure.failures["processes"]
    except pytest.skip.Exception as reason:
        return f"left out: {reason}"
    return None


@pytest.mark.parametrize("term", [*BUILT_IN, *PLUGINS])
def test_terms_give_the_matrix_of_one_process(term):
    assert outcome(term) is None


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (
            OwnRows(),
            "the matrix of one process from no batch on one of two processes and 2 batches on the other.*relative",
        ),
        (NeedsBatch(), "no batch on one of two processes.*IndexError.*planted_parts.*has seen no batch"),
        (Refuses(), "left out.*refuses data that two processes share.*please"),
        (Unpicklable(), "left out.*cannot be pickled"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_planted_terms_are_found_or_left_out(term, says):
    found = outcome(term)
    assert re.search(says, found or "", re.DOTALL), found


def test_it_is_run_on_request_alone():
    assert "processes" not in CHECKS
    with pytest.raises(ConformanceError) as caught:
        check_term(NeedsBatch(), problems=SMALL, processes=True)
    assert set(caught.value.failures) == {"processes"}
    check_term(NeedsBatch(), problems=SMALL)
    check_term(NeedsBatch(), problems=SMALL, processes=True, expected_failures={"processes": "planted"})


SCRIPT = """
from dataclasses import dataclass
from curvalg.testing import parametrize_terms
from tests.support.planted import Squares

@dataclass(frozen=True)
class Here(Squares):
    pass

def main():
    (*_, last) = parametrize_terms([{term}], processes=True).args[1]
    last.values[1]()
    print("passed")

{start}
"""


@pytest.mark.parametrize(
    ("start", "term", "code", "says"),
    [
        ("if __name__ == '__main__': main()", "Here()", 0, "passed"),
        ("main()", "'ggn'", 1, "one of the two processes ended.*if __name__ =="),
    ],
)
def test_a_script_starts_and_ends_the_processes(tmp_path, start, term, code, says):
    (tmp_path / "script.py").write_text(SCRIPT.format(term=term, start=start))
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert re.search(says, done.stdout + done.stderr, re.DOTALL), done.stderr
    assert "leaked" not in done.stderr
