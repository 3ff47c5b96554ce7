"""What the methods of structured pruning share: a share of units, scores, and how many of them can stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.errors import PlanError
from surgery.lazy import lazy
from surgery.operations import texts
from surgery.operations.base import (
    Count,
    File,
    Flag,
    Operation,
    Phase,
    Share,
    Variant,
    Word,
    flag,
    option,
    payload,
    quantity,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from surgery.anatomy import stacks, units
    from surgery.anatomy.groups import Group
    from surgery.anatomy.parts import Kind, Part
    from surgery.graph import calibration, cutting, shaping, sizes
    from surgery.graph.cutting import Cut
    from surgery.graph.shaping import Shaping
    from surgery.operations import unit_scores
else:
    stacks = lazy("surgery.anatomy.stacks")
    units = lazy("surgery.anatomy.units")
    calibration = lazy("surgery.graph.calibration")
    cutting = lazy("surgery.graph.cutting")
    shaping = lazy("surgery.graph.shaping")
    sizes = lazy("surgery.graph.sizes")
    unit_scores = lazy("surgery.operations.unit_scores")

CALIBRATED = ("sensitivity", "activation")


@dataclass(frozen=True, kw_only=True)
class Structured(Operation):
    """Base of what cuts units out of the model, so that its weights get smaller.

    unit: what goes, in the plural. readers: roles of the projections that read the units.
    """

    phase: ClassVar[Phase] = "shrink"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection", "experts")
    sign: ClassVar[str] = "-"
    attaches: ClassVar[bool] = False
    unit: ClassVar[Literal["neurons", "heads", "channels"]]
    readers: ClassVar[tuple[str, ...]]
    place: ClassVar[str]  # what it takes whole, for errors

    share: Share = quantity("share that goes", at_least=0, below=1)
    by: Word = option(
        "what stays: the largest sums of |w|, chance, or what matters on the texts of `using`: sums of |w dL/dw|, or"
        " the norm of what the units compute",
        choices=("magnitude", "random", *CALIBRATED),
        default="magnitude",
    )
    round_: Variant | None = option(
        "how many stay is a multiple of this", choices={"to": payload(Count, at_least=2)}, default=None
    )
    nearest: Flag = flag("take the nearest share that can be had")
    using: File | None = option("text, or JSONL with `text` or `input_ids`, to calibrate on", default=None)
    samples: Count = texts.samples()
    length: Count = texts.length()
    cuts: tuple[Cut, ...] = field(default=(), compare=False, repr=False)
    uneven: bool = field(default=False, compare=False, repr=False)  # a layer of a stack has another number of units

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.by in CALIBRATED and self.using is None:
            yield "by", f"`by {self.by}` needs texts", 'name a file: `using "calibration.jsonl"`'
        if self.by not in CALIBRATED and self.using is not None:
            yield "using", f"`by {self.by}` reads no texts", "leave `using` out"

    @property
    def multiple(self) -> int:
        """What the number of units that stay is a multiple of."""
        return int(self.round_.value) if self.round_ is not None and isinstance(self.round_.value, int) else 1

    @property
    def needs_text(self) -> bool:
        return self.using is not None and calibration.wants_text(self.using)

    def promises(self) -> tuple[str, ...]:
        return ("shrunk_equals_masked",)

    def claims(self, name: str | None) -> tuple[str, ...]:
        return (self.unit,)

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        found = tuple(part for part in parts if part.role in self.readers or part.kind == "experts")
        if not found:
            raise PlanError.of(
                "S162",
                f"`{self.verb}` takes {self.place} whole, and the selector finds none",
                help=f"write `on {self.readers[0].partition('.')[0]}`; `surgery anatomy MODEL` shows what there is",
            )
        return found

    # -- planning

    def studied(self, parts: Sequence[Part], model: Any, inputs: Any) -> Structured:
        """With the groups that these parts read, and how many units of each stay."""
        groups, refused = units.coupled(model, self.unit, inputs)
        chosen = self.grouped(parts, groups, refused)
        cuts = [cutting.Cut(group, self.left(group)) for group in chosen]
        changed = [cut for cut in cuts if len(cut.kept) < cut.group.count]
        if not changed:
            return self
        numbers = sorted({pair for cut in changed for pair in self.numbers(cut)})
        sized = sizes.with_sizes(model, changed, [shaping.Change(*pair) for pair in numbers], inputs)
        lists = stacks.Lists(model)
        around = {place.stack for cut in changed for place in map(lists.place, cut.group.places) if place is not None}
        left_out = [path for group in groups if group not in chosen for path in group.places]
        uneven = any(place is not None and place.stack in around for place in map(lists.place, left_out))
        return replace(self, cuts=tuple(sized), uneven=uneven)

    def grouped(self, parts: Sequence[Part], groups: Sequence[Group], refused: Mapping[str, str]) -> list[Group]:
        """The groups that these parts read. Errors: PlanError S162 where there is none, or only a part is selected."""
        by_place = {place: group for group in groups for place in group.places}
        for part in parts:
            if part.path not in by_place:
                reason = refused.get(part.path, f"its {self.unit} cannot be told apart")
                raise PlanError.of(
                    "S162",
                    f"`{self.verb}` cannot cut {part.path}: {reason}",
                    label="what does not come apart cannot be cut",
                    help="leave the place out with `except`",
                )
        chosen = list(dict.fromkeys(by_place[part.path] for part in parts))
        paths = {part.path for part in parts}
        for group in chosen:
            missing = [place for place in group.places if place not in paths]
            if missing:
                raise PlanError.of(
                    "S162",
                    f"`{self.verb}` cannot cut {group.places[0]} without {missing[0]}: they share a tensor",
                    help="select both, or neither",
                )
        return chosen

    def left(self, group: Group) -> tuple[int, ...]:
        """As many units as stay, whichever they will be. May raise PlanError."""
        return tuple(range(self.count_left(group.count, group)))

    def count_left(self, count: int, group: Group, exact: bool = False) -> int:
        """How many of `count` units stay. exact: the share must be so many of them, otherwise it is rounded to one.

        Errors: PlanError S160 where the share cannot be had, with what can; S161 where nothing would be left.
        """
        wanted = count * (1 - self.share)
        if not exact:
            wanted = count - round(self.share * count)
        possible = range(self.multiple, count + 1, self.multiple)
        found = min(possible, key=lambda left: (abs(left - wanted), -left), default=0)
        if not possible or (wanted < 0.5 and not self.nearest):
            raise PlanError.of(
                "S161",
                f"`{self}` would leave {group.places[0]} without {self.unit}"
                if not self.round_
                else f"{group.places[0]} has {count} {self.unit}, fewer than {self.multiple}",
                help="leave one at least",
            )
        if abs(found - wanted) > 1e-6 and not self.nearest:
            near = sorted({*sorted(possible, key=lambda left: abs(left - wanted))[:4]}, reverse=True)
            said = ", ".join(f"{100 * (1 - left / count):.4g}% ({left} stay)" for left in near)
            raise PlanError.of(
                "S160",
                f"{100 * self.share:.4g}% of the {count} {self.unit} that {group.places[0]} reads cannot be had",
                label=f"nearest that can: {said}",
                help="say one of these, or `nearest`",
            )
        return found

    def sizes(self) -> dict[str, Any]:
        return {"cuts": [cut.to_json() for cut in self.cuts], "uneven": self.uneven} if self.cuts else {}

    def resized(self, sizes: dict[str, Any]) -> Structured:
        cuts = tuple(map(cutting.Cut.from_json, sizes.get("cuts", ())))
        return replace(self, cuts=cuts, uneven=sizes.get("uneven", False))

    def notes(self) -> Iterable[str]:
        counts: dict[tuple[int, int], int] = {}
        for cut in self.cuts:
            key = (cut.group.count, len(cut.kept))
            counts[key] = counts.get(key, 0) + len(cut.group.places)
        for (was, now), places in counts.items():
            yield f"{was} -> {now} {self.unit} at {places} place{'s' * (places > 1)}"

    # -- doing

    def reshape(self, parts: Sequence[Part], shaping: Shaping) -> None:
        cuts = self.cuts if shaping.hollow else self.decided(shaping)
        cutting.cut(shaping.model, cuts, None if shaping.hollow else shaping.inputs, check=not shaping.hollow)
        self.tell(cuts, shaping)

    def decided(self, shaping: Shaping) -> tuple[Cut, ...]:
        """The cuts with the units that stay: those of the largest scores."""
        scores = unit_scores.scores(self, self.cuts, shaping)
        return tuple(replace(cut, kept=self.best(cut, *score)) for cut, score in zip(self.cuts, scores, strict=True))

    def best(self, cut: Cut, units: Tensor, shared: Tensor) -> tuple[int, ...]:
        """The units that stay. units: (count,) scores. shared: (key-value groups,) of what they share."""
        keep = unit_scores.all_but(len(units) - len(cut.kept), units)
        return tuple(keep.nonzero().flatten().tolist())

    def tell(self, cuts: Sequence[Cut], shaping: Shaping) -> None:
        """Let the configuration know: it has one number for all layers of a stack."""
        if self.uneven:
            shaping.beyond_configuration(f"other layers keep their {self.unit}")
            return
        for was, now in sorted({pair for cut in cuts for pair in self.numbers(cut)}):
            shaping.resized(was, now)

    def numbers(self, cut: Cut) -> Iterable[tuple[float, float]]:
        """Numbers that a configuration may state, before and after."""
        yield cut.group.count, len(cut.kept)
