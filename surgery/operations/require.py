"""What a result must be: how much of it is trained, its size, its zeros, its perplexity; else it is not handed over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.lazy import lazy
from surgery.operations import texts
from surgery.operations.base import (
    Comparison,
    Count,
    File,
    Granularity,
    Number,
    Operation,
    Phase,
    Share,
    Size,
    comparison,
    option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph import calibration, perplexity
else:
    calibration, perplexity = lazy("surgery.graph.calibration"), lazy("surgery.graph.perplexity")


@dataclass(frozen=True)
class Shapes:
    """What shapes tell of a result. trainable, parameters: counts. before, after: bytes of all tensors.

    zeroed: how many numbers of a part the program sets to zero, at least.
    """

    trainable: int
    parameters: int
    before: int
    after: int
    zeroed: Callable[[Part], int]


@dataclass(frozen=True)
class Result:
    """A model that is there, and how it is measured. trainable, parameters: counts, as of `Shapes`.

    zeros: of a part, how many numbers are zero, and how many there are.
    """

    model: Any
    anatomy: Anatomy
    tokenizer: Any
    trainable: int
    parameters: int
    zeros: Callable[[Part], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Require(Operation):
    """Base of the statements that change nothing and say what the result must be."""

    phase: ClassVar[Phase] = "require"
    sign: ClassVar[str] = "?"
    attaches: ClassVar[bool] = False

    bound: Comparison
    base: float | None = field(default=None, compare=False, repr=False)  # what the base measures, once that is known

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ()

    def rewrites(self, part: Part) -> bool:
        return False

    def promises(self) -> tuple[str, ...]:
        return ("required",)

    def sizes(self) -> dict[str, Any]:
        return {} if self.base is None else {"base": self.base}

    def resized(self, sizes: dict[str, Any]) -> Operation:
        return replace(self, **sizes)

    @property
    def asks_base(self) -> bool:
        """Whether the base has to be measured before it is changed."""
        return False

    def foreseen(self, shapes: Shapes, parts: Sequence[Part]) -> tuple[float, bool | None]:
        """The measurement as far as shapes tell it, and whether it is as required; None: only the result shows it."""
        raise NotImplementedError

    def prepare(self, result: Result) -> None:
        """Raises what would keep the measurement from being taken, before anything is changed."""

    def measured(self, result: Result, parts: Sequence[Part]) -> float:
        """The measurement."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RequireTrainable(Require):
    """Require that so much is trained: a share of all parameters, or so many of them. Planning checks it."""

    verb: ClassVar[str] = "require trainable"

    bound: Comparison = comparison("share of the parameters, or their number", bound=Share | Count)

    def foreseen(self, shapes: Shapes, parts: Sequence[Part]) -> tuple[float, bool | None]:
        found = self._found(shapes.trainable, shapes.parameters)
        return found, self.bound.holds(found)

    def measured(self, result: Result, parts: Sequence[Part]) -> float:
        return self._found(result.trainable, result.parameters)

    def _found(self, trainable: int, parameters: int) -> float:
        return trainable / max(parameters, 1) if self.bound.unit == "%" else trainable


@dataclass(frozen=True, kw_only=True)
class RequireSize(Require):
    """Require a size of all tensors together, each counted once; 1 MB is a million bytes. Planning checks it."""

    verb: ClassVar[str] = "require size"

    bound: Comparison = comparison("in kB, MB, GB or TB, or as a part of the base's", bound=Size, of=("base",))

    def foreseen(self, shapes: Shapes, parts: Sequence[Part]) -> tuple[float, bool | None]:
        return shapes.after, self.bound.holds(shapes.after, shapes.before)

    def measured(self, result: Result, parts: Sequence[Part]) -> float:
        held = {id(tensor): tensor for tensor in (*result.model.parameters(), *result.model.buffers())}
        return float(sum(tensor.numel() * tensor.element_size() for tensor in held.values()))


@dataclass(frozen=True, kw_only=True)
class RequireZeros(Require):
    """Require a share of zeros, of all selected weights together, without what is attached to them.

    Planning knows the zeros of masks whose size is said place by place; where they do not decide it, the result does.
    """

    verb: ClassVar[str] = "require zeros"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection", "lookup")
    granularity: ClassVar[Granularity] = "tensor"

    bound: Comparison = comparison("share of the weights", bound=Share)

    def foreseen(self, shapes: Shapes, parts: Sequence[Part]) -> tuple[float, bool | None]:
        least = sum(map(shapes.zeroed, parts)) / sum(part.width * part.shape[1] for part in parts)
        growing = self.bound.relation in (">", ">=")
        if growing == self.bound.holds(least) and self.bound.relation in (">", ">=", "<", "<="):
            return least, growing  # more zeros than these change nothing
        return least, None

    def measured(self, result: Result, parts: Sequence[Part]) -> float:
        counts = [result.zeros(part) for part in parts]
        return sum(count for count, _ in counts) / sum(size for _, size in counts)


@dataclass(frozen=True, kw_only=True)
class RequirePerplexity(Require):
    """Require a perplexity on a text: e to the mean loss of every next token, or its ratio to what the base has.

    The base is measured before it is changed, and its perplexity is saved with the result.
    """

    verb: ClassVar[str] = "require perplexity"

    bound: Comparison = comparison("a number, or a multiple of the base's", bound=Number, of=("base",))
    using: File = option("text, or JSONL with `text` or `input_ids`, held out from all training")
    samples: Count = texts.samples()
    length: Count = texts.length()

    @property
    def needs_text(self) -> bool:
        return calibration.wants_text(self.using)

    @property
    def asks_base(self) -> bool:
        return bool(self.bound.of) and self.base is None

    def foreseen(self, shapes: Shapes, parts: Sequence[Part]) -> tuple[float, bool | None]:
        return float("nan"), None

    def chosen(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        if not any(part.role == "head" for part in anatomy.parts):
            raise perplexity.none(anatomy.model, "has no head that gives each token a probability")
        calibration.check_there(self.using)
        return ()

    def prepare(self, result: Result) -> None:
        perplexity.check_causal(result.model, self._sequences(result)[0])

    def measured(self, result: Result, parts: Sequence[Part]) -> float:
        return perplexity.perplexity(result.model, self._sequences(result))

    def _sequences(self, result: Result) -> list[Tensor]:
        """The texts as tokens. Errors: PlanError S130."""
        vocabulary = max(part.shape[0] for part in result.anatomy.parts if part.role == "embed")
        return calibration.batches(self.using, result.tokenizer, self.samples, self.length, vocabulary)
