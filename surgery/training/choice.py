"""Which implementation an `optimize` statement means on a device, and whether that is all it asks for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError

if TYPE_CHECKING:
    from surgery.operations.optimize import Optimize

TITLES = {"adamw": "AdamW", "adam": "Adam", "lion": "Lion", "sgd": "SGD"}
PAGING = ("cuda", "xpu")
"""Devices on which bitsandbytes pages."""


@dataclass(frozen=True)
class Choice:
    """device: type of device. home: `torch` or `bitsandbytes`. title: the class there.

    mapped: the state lies in a memory-mapped file. missing: what is asked for and replaced by a substitute, or "".
    """

    device: str
    home: str
    title: str
    mapped: bool = False
    missing: str = ""

    @property
    def said(self) -> str:
        """The choice in words: `bitsandbytes' AdamW8bit, its state in a memory-mapped file, on a CPU`."""
        home = {"torch": "torch's", "bitsandbytes": "bitsandbytes'"}[self.home]
        state = ", its state in a memory-mapped file" if self.mapped else ""
        instead = f"; {self.missing}" if self.missing else ""
        return f"{home} {self.title}{state}, on {_named(self.device)}{instead}"

    def allowed(self, operation: Optimize) -> None:
        """Raises PlanError S116 where `strict` is said and this is a substitute."""
        if operation.strict and self.missing:
            raise PlanError.of(
                "S116",
                f"`{operation}` is strict, and {self.missing}",
                help=f"leave `strict` out to take {self.home}'s {self.title} instead, or use a CUDA or XPU device",
            )

    def make(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> Any:
        """The optimizer itself, without its state."""
        if self.home == "torch":
            import torch

            return getattr(torch.optim, self.title)(groups, **options)
        from surgery.graph.codes import register

        register()  # imports bitsandbytes without its remarks
        import bitsandbytes

        return getattr(bitsandbytes.optim, self.title)(groups, **options)


def choices(operation: Optimize, device: str) -> tuple[Choice, ...]:
    """The implementation on a device; of a model without weights, on a CPU and, where that differs, on CUDA.

    Weights are loaded on a CPU: what is strict has to be there.
    """
    if device != "meta":
        return (choose(operation, device),)
    found = [choose(operation, each) for each in (("cuda", "cpu") if operation.paged else ("cpu",))]
    return tuple(found if not operation.strict else found[-1:])


def choose(operation: Optimize, device: str) -> Choice:
    """The implementation on a type of device, `cpu`, `cuda` or another."""
    title = TITLES[operation.method]
    if operation.narrow and not _installed():
        return Choice(device, "torch", title, operation.paged, "bitsandbytes, which has it in 8 bits, is not installed")
    home = "bitsandbytes" if operation.narrow or operation.method == "lion" else "torch"
    width = "8bit" if operation.narrow else ""
    if not operation.paged:
        return Choice(device, home, title + width)
    if device in PAGING:
        return Choice(device, "bitsandbytes", f"Paged{title}{width}")
    if device == "cpu":
        return Choice(device, home, title + width, True, "bitsandbytes pages on CUDA and XPU only")
    return Choice(device, home, title + width, False, f"nothing pages on {_named(device)}")


def _named(device: str) -> str:
    return {"cpu": "a CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device, device)


def _installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
