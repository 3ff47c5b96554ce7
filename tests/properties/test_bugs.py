"""Prove the tests: every planted bug is killed by the law that it names, which holds where the bug is not."""

from __future__ import annotations

import pytest

from tests.properties.bugs import BUGS
from tests.properties.bugs.bug import Bug
from tests.properties.laws import BY_NAME


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_bug_is_killed(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    law = BY_NAME[bug.law]
    law.check(bug.case())
    bug.plant(monkeypatch)
    # An assertion of the law, a refusal that did not come, or an error on the way.
    with pytest.raises((Exception, pytest.fail.Exception)) as killed:
        law.check(bug.case())
    assert not isinstance(killed.value, NameError | AttributeError | ImportError | TypeError), (
        "the bug itself is broken"
    )


def test_there_are_enough_and_every_one_is_another() -> None:
    assert len(BUGS) >= 25
    assert len({bug.what for bug in BUGS}) == len({bug.plant for bug in BUGS}) == len(BUGS)
