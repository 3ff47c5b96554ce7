"""From a program and a model to the transformed model: plan, apply, merge, switch off."""

from __future__ import annotations

from surgery.compiler.apply import apply, perform
from surgery.compiler.combine import combine
from surgery.compiler.merge import merge
from surgery.compiler.plan import Plan, Step, plan
from surgery.compiler.record import Record, parameters, record_of
from surgery.compiler.route import route
from surgery.compiler.switch import activate, active, disabled
from surgery.compiler.unmerge import unmerge

__all__ = [
    "Plan",
    "Record",
    "Step",
    "activate",
    "active",
    "apply",
    "combine",
    "disabled",
    "merge",
    "parameters",
    "perform",
    "plan",
    "record_of",
    "route",
    "unmerge",
]
