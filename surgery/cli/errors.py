"""Show a failure to the user, as diagnostics on stderr, and turn it into an exit status."""

from __future__ import annotations

import os
import sys

import click

from surgery.errors import CheckpointError, Diagnostic, PromiseError, SurgeryError

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE, TERMINATED = 1, 2, 130, 141, 143


class Terminated(KeyboardInterrupt):
    """The system asked us to stop; what Ctrl-C cleans up is cleaned up."""


def show(error: BaseException) -> int:
    """Print what went wrong; 1 a promise failed, 2 bad input, 130 or 143 interrupted, 141 nobody reads our output."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt | click.Abort):
        status = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return _print(status, Diagnostic("S498", "interrupted; nothing was written"))
    if os.environ.get("SURGERY_DEBUG"):
        raise error
    if isinstance(error, PromiseError):
        return _print(FAILED, *error.diagnostics)
    if isinstance(error, SurgeryError):
        return _print(BAD_INPUT, *error.diagnostics)
    return _print(BAD_INPUT, _diagnostic(error))


def _diagnostic(error: BaseException) -> Diagnostic:
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "surgery"
        return Diagnostic("S400", error.format_message().rstrip("."), help=f"`{path} --help`")
    if isinstance(error, click.ClickException):
        return Diagnostic("S400", error.format_message())
    if isinstance(error, OSError):
        return unreadable(error).diagnostics[0]
    if isinstance(error, MemoryError):
        return Diagnostic("S497", "out of memory")
    text = (str(error).strip().splitlines() or [""])[0]
    return Diagnostic(
        "S499",
        f"internal error: {type(error).__name__}: {text}",
        help="this is a fault of surgery, not yours: rerun with SURGERY_DEBUG=1 for the traceback and report it",
    )


def unreadable(error: OSError) -> CheckpointError:
    """A file the system refuses, by name and reason (S415)."""
    name = f"`{error.filename}`: " if error.filename else ""
    return CheckpointError.of("S415", f"{name}{error.strerror or error}")


def _print(status: int, *diagnostics: Diagnostic) -> int:
    from surgery.language.render import render

    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    text = "\n\n".join(render(diagnostic, color=color) for diagnostic in diagnostics)
    # A name that the terminal's encoding lacks must not hide the message.
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
    return status
