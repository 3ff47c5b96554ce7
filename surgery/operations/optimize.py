"""Which optimizer trains what the program trains: torch's, bitsandbytes' 8-bit ones, paged (QLoRA, Dettmers et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.operations.base import Flag, Number, Operation, Phase, Word, flag, kind, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from surgery.anatomy.parts import Anatomy, Part

NAMES = ("adamw", "adamw8bit", "adam", "adam8bit", "lion", "lion8bit", "sgd", "sgd8bit")


@dataclass(frozen=True, kw_only=True)
class Optimize(Operation):
    """Choose the optimizer that `surgery.optimizer(model)` gives, over exactly what the program trains.

    `adamw`, `adam` and `sgd` are torch's own, the 8-bit ones (8 bits for each number of their state, Dettmers et al.
    2022) and `lion` (Chen et al. 2023) bitsandbytes', on every device. `paged` is bitsandbytes' paging on CUDA and XPU;
    on a CPU the same optimizer keeps its state in a memory-mapped temporary file, with the same bits as unpaged. The
    plan says which it is. Decay is for matrices: vectors (biases, norms, factors) have none.
    """

    verb: ClassVar[str] = "optimize"
    phase: ClassVar[Phase] = "schedule"
    attaches: ClassVar[bool] = False

    name: Word = kind("the method, with `8bit` if its state is kept in 8 bits", choices=NAMES)
    lr: Number = option("learning rate", above=0)
    decay: Number | None = option(
        "weight decay of matrices; unsaid 0.01 of adamw, 0 of others", default=None, at_least=0
    )
    beta1: Number | None = option("decay of the mean of gradients; unsaid 0.9", default=None, at_least=0, below=1)
    beta2: Number | None = option(
        "decay of the mean of squares; unsaid 0.999, 0.99 of lion", default=None, at_least=0, below=1
    )
    eps: Number | None = option("added to the root of the squares; unsaid 1e-8", default=None, above=0)
    momentum: Number | None = option("of sgd; unsaid 0, of sgd8bit 0.9", default=None, at_least=0, below=1)
    paged: Flag = flag("let the state lie outside of the device's memory, and be fetched when it is used")
    strict: Flag = flag("make it an error where this device has a substitute only")

    @property
    def method(self) -> str:
        """The name without its width."""
        return self.name.removesuffix("8bit")

    @property
    def narrow(self) -> bool:
        """Whether the state is kept in 8 bits."""
        return self.name.endswith("8bit")

    def validate(self) -> Iterable[tuple[str, str, str]]:
        adaptive = self.method in ("adam", "adamw")
        for field, takes in (
            ("beta1", adaptive or self.method == "lion"),
            ("beta2", adaptive or self.method == "lion"),
            ("eps", adaptive),
            ("momentum", self.method == "sgd"),
        ):
            if getattr(self, field) is not None and not takes:
                yield field, f"{self.name} has no {field}", "leave it out, or choose another optimizer"
        if self.name == "sgd8bit" and self.momentum == 0:
            yield "momentum", "without momentum there is no state to keep in 8 bits", "write `sgd`"
        if self.paged and self.method == "sgd":
            yield "paged", f"{self.name} is paged nowhere", "take adamw, adam or lion, or leave `paged` out"

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("optimizer",)

    def chosen(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        from surgery.training.choice import choices

        for choice in choices(self, next((tensor.device.type for tensor in model.parameters()), "cpu")):
            choice.allowed(self)
            yield f"the optimizer is {choice.said}"
