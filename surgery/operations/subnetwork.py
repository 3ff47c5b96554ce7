"""What methods have in common that train weights under a mask and change the mask while they are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.lazy import functions, torch
from surgery.operations.base import Granularity, Operation, Phase
from surgery.operations.train import is_narrow, whole_only

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph.site import Site

MASK, STEP, DENSE = "weight_mask", "weight_mask_step", "weight_dense_gradient"
"""Buffers beside a weight: the mask as bits; when it last changed; 255 while the gradient is wanted of all weights."""


@dataclass(frozen=True, kw_only=True)
class Subnetwork(Operation):
    """Base of methods whose weights are trained under a mask: what the mask keeps needs no `train` statement."""

    phase: ClassVar[Phase] = "mask"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    granularity: ClassVar[Granularity] = "tensor"
    attaches: ClassVar[bool] = False

    def fits(self, part: Part) -> str | None:
        if part.tied:
            return f"its weight is shared with {', '.join(part.tied)}, which would be masked as well"
        return whole_only(part)

    def promises(self) -> tuple[str, ...]:
        return ("exact_sparsity", "merges")

    @property
    def on_merge(self) -> str:
        return "the zeros stay"

    @property
    def changes_base(self) -> bool:
        return True

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("mask",)

    def trains(self, part: Part) -> bool:
        return True

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        if any(is_narrow(model, part) for part in parts):
            yield f"`{self.verb}` trains 16-bit weights as they are: steps below their precision round away"


class Scheduled(ABC):
    """What `surgery.schedule` asks of a statement whose masks change from step to step."""

    @property
    def scheduled(self) -> bool:
        """Whether there is anything for a schedule to do, or to leave as it is."""
        return True

    @property
    def asks_gradient(self) -> bool:
        """Whether masks are chosen by the gradient of every weight, those at zero included."""
        return False

    @abstractmethod
    def ending(self, steps: int | None) -> int | None:
        """The step before which all is done, None when nothing ends. steps: of the whole training, where it is known.

        Raises GraphError S373 when it must be known and is not, or when that is before the first change.
        """

    @abstractmethod
    def turns(self, step: int, length: int | None) -> bool:
        """Whether masks change at a step; the first one is 1."""

    @abstractmethod
    def masks(
        self,
        step: int,
        length: int | None,
        before: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        generators: Sequence[Generator],
    ) -> list[Tensor]:
        """The masks after a step's change: (out, in), True where a weight is kept. gradients: empty if not asked."""


def put_mask(site: Site, *, step: bool = False, dense: bool = False) -> None:
    """Let the product read the weight through a mask, all ones until it is filled.

    step: keep beside it when it changed last. dense: be able to pass on the gradient of every weight.
    """
    count = -(-site.part.shape[0] * site.part.shape[1] // 8)
    bits = torch.full((count,), 255, dtype=torch.uint8, device=site.device)
    mask = site.buffer(MASK, bits)
    if step:
        site.buffer(STEP, torch.zeros((), dtype=torch.int64, device=site.device))
    if dense:
        asked = site.buffer(DENSE, torch.zeros(1, dtype=torch.uint8, device=site.device), persistent=False)
        site.mask_weight(functions.masked_unless, mask, asked)
    else:
        site.mask_weight(functions.masked, mask)


def fill_mask(site: Site, keep: Tensor) -> None:
    """Set the mask to what is True in keep (the part's rows, in), and the weight to zero elsewhere."""
    mask = torch.ones(site.stored_shape, dtype=torch.bool, device=keep.device)
    site.set_rows(mask, keep)
    site.data(MASK).copy_(functions.pack_bits(mask))
    site.zero_out(site.data(MASK))
