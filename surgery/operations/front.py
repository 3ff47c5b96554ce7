"""What hard and soft prompts have in common: n positions come first, in front of every input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import PlanError
from surgery.language.selector import Role, Selector
from surgery.lazy import lazy
from surgery.operations.base import Operation, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch.fx import Node

    from surgery.anatomy import entries
    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph import attention_text, entry, insertion_entrance, site, soft_entry
    from surgery.graph.soft_entry import EntrySite
else:
    entries, entry = lazy("surgery.anatomy.entries"), lazy("surgery.graph.entry")
    attention_text, soft_entry = lazy("surgery.graph.attention_text"), lazy("surgery.graph.soft_entry")
    insertion_entrance, site = lazy("surgery.graph.insertion_entrance"), lazy("surgery.graph.site")


@dataclass(frozen=True, kw_only=True)
class Front(Operation):
    """A method that puts positions in front of a stack's input: all its attention calls have a part in it."""

    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("entry", "attention")
    default_selector: ClassVar[Selector | None] = Role("layers")
    order: ClassVar[int] = 1  # of several, those with the lower number come first

    @property
    def length(self) -> int | None:
        """Positions in front; None while nobody has counted them."""
        raise NotImplementedError

    @property
    def stored(self) -> bool:
        """Whether keys and values are computed once and kept."""
        return False

    @property
    def rank(self) -> int:
        """Of several, those of lower rank come first; what is kept comes before what may be trained."""
        return self.order - 10 * self.stored

    def place_in_front(self, name: str | None) -> tuple[int, str]:
        return self.rank, site.owned(self.verb, name)  # as `soft.order` reads them

    @property
    def shared_by_rows(self) -> str | None:
        return "it comes in front of the tokens of every row"

    def rows(self, site: EntrySite) -> Node:
        """What comes in front: (n, width) as embeddings are, or (n,) token numbers."""
        raise NotImplementedError

    def sees(self, anatomy: Anatomy, model: Any) -> Anatomy:
        return entries.with_entries(anatomy, model)

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Of a model with two stacks the encoder's parts, unless the decoder's alone are selected."""
        inside = tuple(part.stack for part in parts if part.role == entries.INSIDE)
        if not inside:
            return parts
        return tuple(part for part in parts if part.role == entries.INSIDE)

    def fits(self, part: Part) -> str | None:
        if part.role == entries.INSIDE and self.stored:
            return "an encoder's keys and values depend on the tokens behind them, so `cached` cannot keep them"
        if part.kind == "attention" and part.heads is None:
            return "its number of heads is not known"
        return None

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        places = [part for part in parts if part.kind == "entry"]
        if not places:
            raise PlanError.of(
                "S111",
                f"`{self.verb}` acts on the entry of a stack, which the selector leaves out",
                help="leave the selector out, or say `in encoder` or `in decoder`; `prefix` takes single layers",
            )
        for place in places:
            yield from self._at(place, parts, anatomy, model)

    def _at(self, place: Part, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        n = self.length or 0
        self._fits_in(n, model)
        if place.role == entries.INSIDE:
            (stack,) = (stack for stack in anatomy.stacks if stack.name == place.stack)
            yield from insertion_entrance.Entrance.find(model, anatomy, stack).check(n)
            return
        calls = [part for part in parts if part.role == entries.CALL and part.stack == place.stack]
        wanted = [part for part in anatomy.parts if part.role == "attn" and part.kind == "attention"]
        missing = {part.path for part in wanted if part.stack == place.stack} - {part.path for part in calls}
        if missing:
            raise PlanError.of(
                "S111",
                f"`{self.verb}` comes before the first layer and is read by all: {min(missing)} is left out",
                help="leave the selector out; `prefix` takes single layers",
            )
        depth = next(stack.depth for stack in anatomy.stacks if stack.name == place.stack)
        without = depth - len({part.layer for part in calls})
        if without or entries.without_attention(anatomy, place.path):
            where = entries.without_attention(anatomy, place.path) or f"{without} of {depth} layers"
            raise PlanError.of(
                "S112",
                f"`{self.verb}` comes in as keys and values, and tokens are mixed without attention ({where})",
                help="adapt this model with lora, or take `prefix` for the layers that have attention",
            )
        unlike = attention_text.unlike_a_prompt(model, anatomy)
        if unlike:
            yield f"`{self.verb}` is not read as tokens in its place would be: {unlike}"
        yield from entry.check(model, anatomy.parts, {part.path: n for part in calls})

    def _fits_in(self, n: int, model: Any) -> None:
        room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(room, int) and n >= room > 0:
            raise PlanError.of(
                "S346",
                f"{n} positions in front leave no room for tokens: the model was made for {room}",
                help=f"take fewer than {room}",
            )

    def rewrite(self, site: Any) -> None:
        n = self.length
        if n is None:
            raise PlanError.of(
                "S347",
                f"`{self}` takes as many positions as its text has tokens, and there is no tokenizer to count them",
                help="give a tokenizer" if "positions" not in vars(self) else "give the number, or a tokenizer",
            )
        if site.part.kind == "entry":
            site.give(self.rows(site), self.rank)
        else:
            soft_entry.put_states(site, n, self.stored)

    def promises(self) -> tuple[str, ...]:
        return ("off_means_off",)
