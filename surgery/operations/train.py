"""Train tensors of the base: all biases (BitFit, Ben Zaken et al. 2021), norms, a head, whole layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.operations.base import Flag, Granularity, Operation, Phase, flag

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph.site import Site

TENSORS: tuple[Kind, ...] = ("projection", "lookup", "norm", "experts", "bias", "tensor")
NEW = "bias.new"


@dataclass(frozen=True, kw_only=True)
class Train(Operation):
    """Let tensors of the model itself be trained: `train bias` is BitFit (Ben Zaken et al. 2021).

    A role means weights and biases; `bias` means every bias, of linear maps and norms; layers and paths mean whatever
    lies there. Exactly what the program says is trained, less what `freeze` takes out. A tensor in two places is
    trained in both. The trained values are the model's own: switching off, and a merge, leave them as they are. A
    pruned weight keeps its zeros; a quantized weight cannot be trained.
    """

    verb: ClassVar[str] = "train"
    phase: ClassVar[Phase] = "train"
    acts_on: ClassVar[tuple[Kind, ...]] = TENSORS
    leads: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "tensor"

    add: Flag = flag(
        "where a selected linear map (no router) has no bias, add one that starts at zero; a merge folds it"
    )

    def sees(self, anatomy: Anatomy, model: Any) -> Anatomy:
        from surgery.anatomy.tensors import tensors

        return tensors(anatomy, model, self.add)

    def fits(self, part: Part) -> str | None:
        return whole_only(part)

    def promises(self) -> tuple[str, ...]:
        return ("identity_at_init", "merges", "off_means_off") if self.add else ()

    @property
    def nameable(self) -> bool:
        return self.add

    @property
    def on_merge(self) -> str:
        stays = "trained values stay, as they do when switched off"
        return f"added biases fold in; {stays}" if self.add else stays

    def claims(self, name: str | None) -> tuple[str, ...]:
        return (f"added bias {name or 'default'}",) if self.add else ()

    def rewrites(self, part: Part) -> bool:
        return part.role == NEW

    def trains(self, part: Part) -> bool:
        return part.role != NEW

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        new = [part for part in parts if self.rewrites(part)]
        if self.add and not new:
            yield "`train ... add` adds nothing: every linear map that it selects has a bias"
        if new and hasattr(model, "config"):
            yield "transformers' own classes do not read the biases that `train ... add` adds, once merged"
        seen = {(part.path, part.parameter) for part in parts}
        for part in parts:
            for path in part.tied if self.trains(part) else ():
                if (path, part.parameter) not in seen:
                    yield f"training {part.path} trains {path} too: they share one {part.parameter}"
        if any(is_narrow(model, part) for part in parts if self.trains(part)):
            yield "`train` trains 16-bit tensors as they are: steps below their precision round away"

    def rewrite(self, site: Site) -> None:
        site.add_to_output(site.parameter("added_bias", (site.out_features,)))


def whole_only(part: Part) -> str | None:
    """Why a part cannot be trained or frozen on its own."""
    if part.channels is not None:
        return "only some rows of a fused tensor are selected, and gradients are asked for by tensor: select it whole"
    return None


def is_narrow(model: Any, part: Part) -> bool:
    """Whether the tensor at a part has 16 bits or fewer."""
    tensor = model.get_submodule(part.path)._parameters.get(part.parameter)
    return tensor is not None and tensor.dtype.itemsize < 4
