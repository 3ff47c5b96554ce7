"""From a model to its coupled groups: which rows and columns make up its neurons, or its heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.anatomy.groups import Group, Kind
from surgery.anatomy.roles import Roles
from surgery.anatomy.streams import Streams
from surgery.anatomy.study import studied


def coupled(model: nn.Module, kind: Kind, example_inputs: Any = None) -> tuple[list[Group], dict[str, str]]:
    """The groups of one kind in all layers, and why other projections have none, by their path.

    Arguments and errors as of `study`, and ModelError S208 where layers share a tensor and divide it differently.
    """
    with studied(model, example_inputs) as roles:
        return groups_of(roles, kind)


def groups_of(roles: Roles, kind: Kind) -> tuple[list[Group], dict[str, str]]:
    """The same of a model that is studied already."""
    coupling = Streams(roles)
    return coupling.channels() if kind == "channels" else coupling.find(kind), coupling.refused
