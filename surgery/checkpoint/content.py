"""What a transformed model's directory will hold: every tensor with its file, known from the structure alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import eightbit, fourbit
from surgery.checkpoint.fourbit import Packing
from surgery.checkpoint.inventory import Held, inventory
from surgery.checkpoint.layout import FileLayout, Slot, layout, shard_size, shards
from surgery.checkpoint.manifest import ADDED, WITH_BASE, Entry
from surgery.checkpoint.tensors import slot_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Content:
    """held: the model's tensors by their first name. packed: what differs for codes.

    weights: the files that `from_pretrained` reads. added: what the program added; None of a plain model.
    elsewhere: tensors that stay where the base lies, with their names there; then there are no `weights`.
    """

    held: Mapping[str, Held]
    packed: Packing
    weights: tuple[FileLayout, ...]
    added: FileLayout | None
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[FileLayout, ...]:
        return self.weights if self.added is None else (*self.weights, self.added)

    @property
    def size(self) -> int:
        """Bytes of all files, at most."""
        return sum(file.size for file in self.files)

    def key(self, name: str) -> str:
        """The name in its file of a tensor of the model."""
        return self.packed.keys.get(name, name)

    def values(self, name: str, tensor: Tensor) -> dict[str, Tensor | bytes]:
        """What is to be written where a tensor of the model is known: itself, and what follows from it."""
        written: dict[str, Tensor | bytes] = {self.key(name): tensor}
        for key in self._following.get(name, ()):
            state = self.packed.states[key]
            written[key] = state.text(None if state.offset is None else tensor.item())
        return written

    def constants(self) -> dict[str, Tensor | bytes]:
        """What is to be written whatever the weights are."""
        plain = {key: state.text() for key, state in self.packed.states.items() if state.offset is None}
        return {**self.packed.maps, **plain}

    @cached_property
    def _following(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, state in self.packed.states.items():
            if state.offset is not None:
                found.setdefault(state.offset, []).append(key)
        return found

    def entries(self, digests: Mapping[str, str]) -> dict[str, Entry]:
        """The manifest's account of the model's tensors. digests: by their names in the files."""
        home = {slot.name: file.name for file in self.files for slot in file.slots}
        found = {}
        for name, one in self.held.items():
            written = self.key(name)
            file, key = (WITH_BASE, self.elsewhere[name]) if name in self.elsewhere else (home[written], written)
            slot = slot_of(key, one.tensor)
            found[name] = Entry(file, digests[written], None if key == name else key, slot.dtype, slot.shape)
        return found


def content(model: nn.Module, source: Path | None, elsewhere: Mapping[str, str] | None = None) -> Content:
    """What `save` will write of a transformed model, or of one that is hollow. source: whose shards are a measure.

    elsewhere: the base's tensors with their names where they lie, where none of them is written.
    Errors: S420 for dtypes that safetensors lacks.
    """
    held, packed = inventory(model), fourbit.layout(model)
    if packed.config is None:  # other readers take 4 bits or 8 from a directory, and not both
        packed = eightbit.layout(model)
    base: list[Slot] = []
    added: list[Slot] = []
    for name, one in held.items():
        if elsewhere and name in elsewhere:
            continue
        ours = (one.added or not one.persistent) and name not in packed.keys
        key = packed.keys.get(name, name)
        (added if ours else base).append(slot_of(key, one.tensor, name.rpartition(".")[0]))
    base += [slot_of(key, tensor, _owner(key)) for key, tensor in packed.maps.items()]
    base += [Slot(key, "U8", (state.longest,), _owner(key), late=True) for key, state in packed.states.items()]
    if elsewhere:
        assert not base, "a result refers to all of its base or to nothing"
        return Content(held, packed, (), layout(ADDED, added), elsewhere)
    return Content(held, packed, shards(base, shard_size(source)), layout(ADDED, added))


def plain(model: nn.Module, source: Path | None) -> Content:
    """What will be written of a model that has nothing of ours, as its library has it. source: as of `content`."""
    held = {name: one for name, one in inventory(model).items() if one.persistent}
    slots = [slot_of(name, one.tensor, name.rpartition(".")[0]) for name, one in held.items()]
    return Content(held, Packing(), shards(slots, shard_size(source)), None)


def _owner(key: str) -> str:
    """The module whose weight `module.weight.quant_map` belongs to."""
    return key.partition(".quant_")[0].rpartition(".")[0]
