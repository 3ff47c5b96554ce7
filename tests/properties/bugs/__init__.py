"""Planted bugs: small changes to the code that somebody could make, each with the law that must notice.

A bug is a function that patches, a case, and the name of the law that kills it. A law that holds without the patch and
fails with it guards against that mistake; one that holds with it guards against nothing.
"""

from __future__ import annotations

from tests.properties.bugs import (
    adapting,
    cutting,
    dynamic,
    keeping,
    masking,
    planning,
    prompting,
    requiring,
    reshaping,
    training,
    writing,
)
from tests.properties.bugs.bug import Bug

FAMILIES = (writing, planning, adapting, training, masking, dynamic, keeping, prompting, reshaping, cutting, requiring)
BUGS: tuple[Bug, ...] = tuple(bug for family in FAMILIES for bug in family.BUGS)
