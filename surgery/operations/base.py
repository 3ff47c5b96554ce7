"""What a method is: a frozen dataclass whose fields are its options, with the place, phase and promises of its edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from surgery.language.selector import Selector
from surgery.operations.options import (
    Comparison,
    Count,
    Counts,
    File,
    Flag,
    Number,
    Numbers,
    Payload,
    Ratio,
    SameAs,
    Selection,
    Share,
    Size,
    Text,
    Variant,
    Word,
    comparison,
    flag,
    kind,
    option,
    payload,
    quantity,
    same_as,
    schema,
)

if TYPE_CHECKING:
    from surgery.anatomy.parts import Anatomy, Kind, Part

Phase = Literal["shrink", "route", "depth", "mask", "quantize", "attach", "train", "schedule", "require"]
Start = Literal["chance", "weight", "full weight", "model"]
Granularity = Literal["part", "tensor", "module"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Base of all methods.

    verb: the word that starts its statements. phase: when the compiler runs it.
    acts_on: kinds of parts it takes. default_selector: what it acts on when nothing is said; None: must be said.
    leads: the selector may come right after the verb, `quantize base nf4`.
    selecting: options that say what it acts on, in place of `on`: `after attn, ffn`.
    granularity: "part" one site per role; "tensor" the parts of one path are one site; "module" one site per module.
    """

    verb: ClassVar[str]
    phase: ClassVar[Phase]
    acts_on: ClassVar[tuple[Kind, ...]] = ()
    default_selector: ClassVar[Selector | None] = None
    leads: ClassVar[bool] = False
    selecting: ClassVar[tuple[str, ...]] = ()
    granularity: ClassVar[Granularity] = "part"
    keeps_zeros: ClassVar[bool] = False  # merged into a pruned weight, it leaves the zeros
    one_of: ClassVar[tuple[str, ...]] = ()  # options of which one has to be said
    freezes: ClassVar[bool] = False  # its parts are taken out of what others train
    attaches: ClassVar[bool] = True  # it leaves something that a name switches and a merge folds or keeps
    sign: ClassVar[str] = "~"  # in a plan: `+` adds, `-` takes away

    def __post_init__(self) -> None:
        for declared in schema(type(self)):
            value = getattr(self, declared.name)
            if isinstance(value, SameAs):
                copied = getattr(self, value.field)
                object.__setattr__(self, declared.name, _floats(copied) if "number" in declared.forms else copied)

    def __str__(self) -> str:
        """The verb and every option that is not at its default, as written in a program."""
        from surgery.language.write import operation_text

        return operation_text(self)

    @property
    def needs_text(self) -> bool:
        """Whether a tokenizer is required."""
        return False

    def validate(self) -> Iterable[tuple[str, str, str]]:
        """Faults between options, as (field name, message, help); the fields' own ranges hold already."""
        return ()

    def fits(self, part: Part) -> str | None:
        """Why this part cannot take the operation, None when it can. Runs while planning, on shapes alone."""
        return None

    def sized(self, parts: Sequence[Part], parameters: int) -> Operation:
        """The operation with what all its parts decide together filled in, such as ranks from a budget.

        Runs while planning, on shapes alone. parameters: numbers in the model. May raise PlanError.
        """
        return self

    def sizes(self) -> dict[str, Any]:
        """What `sized` has decided, as JSON, for a plan that is written down."""
        return {}

    def resized(self, sizes: dict[str, Any]) -> Operation:
        """The operation with what was decided before, read from such JSON."""
        return self

    def at(self, part: Part) -> Operation:
        """The operation as it is at one part, where parts differ in it."""
        return self

    def notes(self) -> Iterable[str]:
        """What the plan says of the statement besides counts and sizes."""
        return ()

    def promises(self) -> tuple[str, ...]:
        """Names of the promises that hold with these options."""
        return ()

    @property
    def on_merge(self) -> str:
        """What a merge does with it, in a few words for the plan: `folds into the weight`."""
        if not self.attaches:
            return ""
        return "folds into the weight" if "merges" in self.promises() else "stays"

    @property
    def nameable(self) -> bool:
        """Whether `as NAME` means something: it attaches what a name switches."""
        return self.attaches

    def place_in_front(self, name: str | None) -> tuple[int, str]:
        """Of what comes in front of the tokens under this name: lower ones stand further off."""
        return 0, ""

    @property
    def shared_by_rows(self) -> str | None:
        """Why all rows of a batch must have it or none, None where `surgery.route` may choose it row by row."""
        return None

    @property
    def starts_from(self) -> Start:
        """What its tensors are at the start: drawn; from the weight as the place reads it, masked or widened; from the
        weight before it became codes; from what the whole model computes."""
        return "chance"

    @property
    def changes_base(self) -> bool:
        """Whether applying it changes the weight that the base reads where it acts."""
        return False

    @property
    def collective(self) -> bool:
        """Whether `fill` needs all sites at once; otherwise each is filled as soon as it is rewritten."""
        return False

    @property
    def layerwise(self) -> bool:
        """Whether a collective `fill` needs the numbers of one layer at a time only, which it asks for by `at_hand`."""
        return False

    def claims(self, name: str | None) -> tuple[str, ...]:
        """What the statement takes for itself where it acts; two that claim the same there are a conflict."""
        return (f"{self.verb} {name or 'default'}",)

    @property
    def follower(self) -> str | None:
        """Name of the statement of this verb that comes next where both act; None when it is the last one."""
        return None

    @property
    def beside_another(self) -> str:
        """What to write where two statements of this verb claim the same."""
        return "give one of them a name with `as NAME`"

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        """What a plan's reader should know, though nothing is wrong. Runs while planning, on shapes alone.

        May raise PlanError where the parts together do not fit the model.
        """
        return ()

    def chosen(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        """What was chosen where the statement leaves a choice, one sentence each. May raise PlanError."""
        return ()

    def read(self, tokenizer: Any) -> Operation:
        """The operation with what its texts decide filled in. Runs first of all where there is a tokenizer."""
        return self

    def ids(self, tokenizer: Any) -> Sequence[int]:
        """The token numbers that its own text has, where it has one."""
        return ()

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of its buffers that change while the model is trained."""
        return ()

    def rewrites(self, part: Part) -> bool:
        """Whether the graph of this part is rewritten; False where only the tensors there are concerned."""
        return not self.reshapes()

    @classmethod
    def reshapes(cls) -> bool:
        """Whether it changes the model itself, its widths, experts or layers, before all other statements act on it."""
        return cls.phase in ("shrink", "route", "depth")

    def studied(self, parts: Sequence[Part], model: Any, inputs: Any) -> Operation:
        """The operation with what it has to know of the model that it reshapes, and shapes alone tell.

        Runs while planning; the model stays as it is. inputs: as of `surgery.study`. May raise any of our errors.
        """
        return self

    def reshape(self, parts: Sequence[Part], shaping: Any) -> None:
        """Changes the model in place, on shapes alone as well, and tells `shaping` what its configuration should say.

        Tensors are replaced and never written into, so that a failure later on can put everything back.
        """

    def sees(self, anatomy: Anatomy, model: Any) -> Anatomy:
        """What its selector is resolved on, where that is more than the parts of the study."""
        return anatomy

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """What it takes of the parts that its selector finds."""
        return parts

    def trains(self, part: Part) -> bool:
        """Whether the base's own tensor at this part is trained."""
        return False

    def untrained(self, part: Part) -> int:
        """How many numbers of a tensor that it trains stay at zero, for the count of what is trained."""
        return 0

    def zeroed(self, part: Part) -> int | None:
        """How many numbers of a weight are zero once it is applied, at least; None where shapes do not tell."""
        return 0

    def rewrite(self, site: Any) -> None:
        """Edits the structure of one site; works on the meta device."""

    def fill(self, sites: Any, context: Any) -> None:
        """Computes data for the sites, with weights present: masks from scores, codes from weights."""

    def folded(self) -> Operation:
        """What the statement is after a merge, where its places keep a graph."""
        return self

    def finish(self, sites: Any, context: Any) -> None:
        """Computes what needs the transformed model to run: keys and values of a text."""


def _floats(value: Any) -> Any:
    """A number, every entry of a table, or nothing, as floats."""
    return tuple(map(float, value)) if isinstance(value, tuple) else value if value is None else float(value)


__all__ = [
    "Comparison",
    "Count",
    "Counts",
    "File",
    "Flag",
    "Granularity",
    "Number",
    "Numbers",
    "Operation",
    "Payload",
    "Phase",
    "Ratio",
    "Selection",
    "Share",
    "Size",
    "Start",
    "Text",
    "Variant",
    "Word",
    "comparison",
    "flag",
    "kind",
    "option",
    "payload",
    "quantity",
    "same_as",
    "schema",
]
