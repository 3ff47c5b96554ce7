"""Soft equals hard: a prefix that starts from a text gives what prompting with that text gives."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.verify.report import Finding
from surgery.verify.subject import Subject


def soft_equals_hard(subject: Subject) -> Iterator[Finding]:
    """Same output as with the text's tokens put in front of the inputs, as long as nothing was trained."""
    for step in subject.plan.steps:
        if "soft_equals_hard" in step.operation.promises():
            yield Finding("soft_equals_hard", "model", statement=str(step.statement), skipped="not written yet")
