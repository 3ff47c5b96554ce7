"""The one table of promises: each name with the checks that hold a model to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from surgery.verify import cuts, edges, mixture, places, required, shape, sparsity, stacks, text, whole
from surgery.verify.report import Finding
from surgery.verify.subject import Subject

Check = Callable[[Subject], Iterator[Finding]]

PROMISES: Mapping[str, tuple[Check, ...]] = MappingProxyType(
    {
        "complete": (whole.complete, edges.edges_called, shape.as_planned),
        "identity_at_init": (
            places.identity_at_init,
            whole.attention_identity,
            edges.edge_identity,
            stacks.stack_identity,
        ),
        "experts_agree": (mixture.experts_agree,),
        "merges": (places.merges, stacks.stack_merges),
        "shrunk_equals_masked": (cuts.shrunk_equals_masked,),
        "exact_sparsity": (sparsity.exact_sparsity,),
        "exact_codes": (places.exact_codes,),
        "soft_equals_hard": (text.soft_equals_hard,),
        "off_means_off": (
            places.off_means_off,
            whole.attention_off_means_off,
            edges.edge_off_means_off,
            stacks.stack_off_means_off,
        ),
        "required": (required.required,),
        "frame": (whole.frame,),
        "round_trip": (whole.round_trip,),
    }
)
"""In the order of the report."""

ALWAYS: tuple[str, ...] = ("complete", "frame", "round_trip")
"""Promises of every program, whatever its operations declare."""
