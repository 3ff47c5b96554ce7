"""4-bit storage of frozen weights: NF4, with double quantization (QLoRA, Dettmers et al. 2023), or FP4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from surgery.language.selector import Role, Selector
from surgery.lazy import codes, functions, torch
from surgery.operations.base import Count, Flag, Granularity, Operation, Phase, Start, Word, flag, kind, option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.site import Site

BLOCKS = (32, 64, 128, 256, 512, 1024)
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Quantize(Operation):
    """Keep a weight as 4-bit codes with one scale per block, and widen it when it is used.

    The codes and scales are bitsandbytes' own, byte for byte. Zero is one of the codes, so a pruned weight stays zero.
    A merge gives full-width weights; `surgery merge --requantize` encodes the sums again.
    """

    verb: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = "quantize"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    default_selector: ClassVar[Selector | None] = Role("base")
    leads: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "module"

    format: Word = kind("4-bit NormalFloat, or 4-bit float", choices=("nf4", "fp4"))
    double: Flag = flag("quantize the scales as well, to 8 bits in blocks of 256")
    block: Count = option("weights that share a scale", default=64, choices=BLOCKS)
    compute: Word = option(
        "dtype of the product; the input's own by default", default="input", choices=("input", *DTYPES)
    )

    def fits(self, part: Part) -> str | None:
        if part.channels is not None:
            return "only some rows of a fused projection are selected, and its scales run across rows: select it whole"
        if part.tied:
            return f"its weight is shared with {', '.join(part.tied)}, which would need it at full width"
        return None

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
        shape = (site.part.shape[0], site.part.shape[1])
        codes.register()
        count, device, dtype = shape[0] * shape[1], site.device, site.dtype
        blocks = -(-count // self.block)
        site.draft.wide, site.draft.encode = site.weight, partial(self._encode, site)
        packed = site.put_codes("weight_codes", torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=device))
        scale_dtype = torch.uint8 if self.double else torch.float32
        state = [site.buffer("weight_absmax", torch.empty(blocks, dtype=scale_dtype, device=device), exact=True)]
        if self.double:
            nested = {"nested_absmax": (-(-blocks // codes.NESTED_BLOCK),), "nested_map": (256,), "offset": ()}
            for name, size in nested.items():
                scales = torch.empty(size, dtype=torch.float32, device=device)
                state.append(site.buffer(f"weight_{name}", scales, exact=True))
        wide = site.call(
            codes.dequantize_4bit, packed, *state, *(None,) * (4 - len(state)), self.format, self.block, shape, dtype
        )
        site.replace_weight(wide, dtype)
        if self.compute != "input":
            site.replace_product(functions.linear_as, getattr(torch, DTYPES[self.compute]))

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        for site in sites:
            self._encode(site, site.evaluate(site.full_weight))

    def _encode(self, site: Site, weight: Tensor) -> None:
        """Codes and scales of an (out, in) weight, into the tensors that hold them."""
        packed, state = codes.encode(weight, self.format, self.block, self.double)
        site.draft.tensor("weight_codes").data.copy_(packed)
        site.data("weight_absmax").copy_(state.absmax)
        if self.double:
            site.data("weight_nested_absmax").copy_(state.state2.absmax)
            site.data("weight_nested_map").copy_(state.state2.code)
            site.data("weight_offset").copy_(state.offset)
