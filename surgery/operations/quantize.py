"""Frozen weights in few bits: NF4, double quantized (QLoRA, Dettmers et al. 2023), FP4, int8 (LLM.int8, 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from surgery.language.selector import Role, Selector
from surgery.lazy import codes, functions, torch
from surgery.operations.base import Count, Flag, Granularity, Operation, Phase, Start, Word, flag, kind, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Tensor

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph.site import Site

BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024)
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Quantize(Operation):
    """Keep a weight as 4-bit codes with one scale per block, or 8-bit codes with one per row, and widen it when used.

    The codes and scales are bitsandbytes' own, byte for byte. Zero is one of the codes, so a pruned weight stays zero.
    `int8` stores what LLM.int8 does; inputs are not rounded here, as bitsandbytes rounds them where it does not train.
    Others read a directory of 4-bit formats or of `int8`; one that has both loads here alone.
    A merge gives full-width weights; `surgery merge --requantize` encodes the sums again.
    """

    verb: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = "quantize"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    default_selector: ClassVar[Selector | None] = Role("base")
    leads: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "module"

    format: Word = kind("4-bit NormalFloat, 4-bit float, or 8-bit whole numbers", choices=("nf4", "fp4", "int8"))
    double: Flag = flag("quantize the scales as well, to 8 bits in blocks of 256; of 4-bit formats")
    block: Count = option("weights that share a scale; of 4-bit formats", default=BLOCK, choices=BLOCKS)
    compute: Word = option(
        "dtype of the product; the input's own by default", default="input", choices=("input", *DTYPES)
    )

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.format == "int8" and self.double:
            yield "double", "`int8` has one scale for each row, in float32", "leave `double` out"
        if self.format == "int8" and self.block != BLOCK:
            yield "block", "`int8` has one scale for each row", "leave `block` out"

    def fits(self, part: Part) -> str | None:
        if part.channels is not None:
            return "only some rows of a fused projection are selected, and its scales run across rows: select it whole"
        if part.tied:
            return f"its weight is shared with {', '.join(part.tied)}, which would need it at full width"
        return None

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        torn = [part for part in parts if part.shape[1] % self.block and part.shape[1] % 2 == 0]
        if self.format != "int8" and torn and hasattr(model, "config"):
            yield (
                f"rows of {len(torn)} matrices are not whole blocks of {self.block} ({torn[0].path} has "
                f"{torn[0].shape[1]}): where others load them on a CPU, bitsandbytes widens some such codes wrongly"
            )

    def promises(self) -> tuple[str, ...]:
        return ("exact_codes",)

    @property
    def on_merge(self) -> str:
        return "comes back at full width"

    @property
    def starts_from(self) -> Start:
        return "full weight"

    @property
    def changes_base(self) -> bool:
        return True

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("codes",)

    def rewrite(self, site: Site) -> None:
        dtype = site.dtype
        site.draft.wide, site.draft.encode = site.weight, partial(self._encode, site)
        site.replace_weight(self._in_8_bits(site) if self.format == "int8" else self._in_4_bits(site), dtype)
        if self.compute != "input":
            site.replace_product(functions.linear_as, getattr(torch, DTYPES[self.compute]))

    def _in_8_bits(self, site: Site) -> Any:
        rows, columns, dtype = site.part.shape[0], site.part.shape[1], site.dtype
        packed = site.put_codes("weight_codes", torch.empty((rows, columns), dtype=torch.int8, device=site.device))
        scales = torch.empty(rows, dtype=torch.float32, device=site.device)
        return site.call(codes.dequantize_8bit, packed, site.buffer("weight_absmax", scales, exact=True), dtype)

    def _in_4_bits(self, site: Site) -> Any:
        shape = (site.part.shape[0], site.part.shape[1])
        codes.register()
        count, device, dtype = shape[0] * shape[1], site.device, site.dtype
        blocks = -(-count // self.block)
        packed = site.put_codes("weight_codes", torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=device))
        scale_dtype = torch.uint8 if self.double else torch.float32
        state = [site.buffer("weight_absmax", torch.empty(blocks, dtype=scale_dtype, device=device), exact=True)]
        if self.double:
            nested = {"nested_absmax": (-(-blocks // codes.NESTED_BLOCK),), "nested_map": (256,), "offset": ()}
            for name, size in nested.items():
                scales = torch.empty(size, dtype=torch.float32, device=device)
                state.append(site.buffer(f"weight_{name}", scales, exact=True))
        return site.call(
            codes.dequantize_4bit, packed, *state, *(None,) * (4 - len(state)), self.format, self.block, shape, dtype
        )

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        for site in sites:
            self._encode(site, site.evaluate(site.full_weight))

    def _encode(self, site: Site, weight: Tensor) -> None:
        """Codes and scales of an (out, in) weight, into the tensors that hold them."""
        if self.format == "int8":
            packed, absmax = codes.encode_8bit(weight)
            site.draft.tensor("weight_codes").data.copy_(packed)
            site.data("weight_absmax").copy_(absmax)
            return
        packed, state = codes.encode(weight, self.format, self.block, self.double)
        site.draft.tensor("weight_codes").data.copy_(packed)
        site.data("weight_absmax").copy_(state.absmax)
        if self.double:
            site.data("weight_nested_absmax").copy_(state.state2.absmax)
            site.data("weight_nested_map").copy_(state.state2.code)
            site.data("weight_offset").copy_(state.offset)
