"""The laws as one table: what each says, which programs it is tried on, and how it is checked.

A check takes one case and asserts. The suite draws cases by Hypothesis; the table of planted bugs runs the same checks
on one case each, and every bug must make the law that it names fail. A law stands in the file of its family.
"""

from __future__ import annotations

from tests.properties.case import Law
from tests.properties.laws import (
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

FAMILIES = (writing, planning, adapting, training, masking, dynamic, keeping, prompting, reshaping, cutting, requiring)
LAWS: tuple[Law, ...] = tuple(law for family in FAMILIES for law in family.LAWS)
BY_NAME: dict[str, Law] = {law.name: law for law in LAWS}
