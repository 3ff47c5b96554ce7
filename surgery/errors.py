"""The one tree of errors: every failure is a diagnostic with a code, a place and a way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from surgery.language.source import Span


Error = TypeVar("Error", bound="SurgeryError")


@dataclass(frozen=True)
class Diagnostic:
    """What is wrong, where, and what would be right. `surgery explain CODE` tells the long story."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    help: str = ""

    def __str__(self) -> str:
        from surgery.language.render import render

        return render(self)


class SurgeryError(Exception):
    """Base of all errors of this package; carries one diagnostic or several."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__(*diagnostics)
        self.diagnostics = diagnostics

    @classmethod
    def of(
        cls: type[Error], code: str, message: str, span: Span | None = None, label: str = "", help: str = ""
    ) -> Error:
        """The common case, one diagnostic: `raise ModelError.of("S201", "...", span)`."""
        return cls(Diagnostic(code, message, span, label, help))

    def __str__(self) -> str:
        return "\n\n".join(str(diagnostic) for diagnostic in self.diagnostics)


@contextmanager
def standing_at(span: Span | None) -> Iterator[None]:
    """Give this place to every diagnostic raised inside that has none of its own."""
    try:
        yield
    except SurgeryError as error:
        raise type(error)(*(replace(each, span=each.span or span) for each in error.diagnostics)) from None


class ProgramError(SurgeryError):
    """The text is wrong whatever the model: syntax, vocabulary, values, includes (S001 to S099)."""


class PlanError(SurgeryError):
    """The program does not fit this model: conflicts, impossible sizes (S100 to S199)."""


class ModelError(SurgeryError):
    """The model cannot be studied, or has no such part (S200 to S299)."""


class GraphError(SurgeryError):
    """A place cannot be rewritten or folded (S300 to S399)."""


class CheckpointError(SurgeryError):
    """A file or directory cannot be read or written (S400 to S499)."""


class PromiseError(SurgeryError):
    """The result is not what was promised (S500 to S599); the command line exits with 1."""
