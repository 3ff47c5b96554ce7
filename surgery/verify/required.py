"""What the program requires of its result, measured again."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.compiler import required as compiled
from surgery.verify.report import Finding
from surgery.verify.subject import Subject, undisturbed


def required(subject: Subject) -> Iterator[Finding]:
    """Every `require` statement holds of the model as it is now; error 1 where one does not, and 0 is asked for."""
    for step in compiled.requiring(subject.plan.steps):
        statement = str(step.statement)
        numbers = step.operation.verb in ("require zeros", "require perplexity")
        if numbers and any(tensor.is_meta for tensor in subject.model.parameters()):
            yield Finding("required", "model", statement=statement, skipped="there are no weights")
            continue
        if step.operation.needs_text and subject.tokenizer is None:
            yield Finding("required", "model", statement=statement, skipped="there is no tokenizer to read its text")
            continue
        with undisturbed(subject.model):
            (answer,) = compiled.measure(subject.plan, subject.model, subject.tokenizer, [step])
        yield Finding("required", "model", float(not answer.holds), 0.0, statement, f"found {answer.said}")
