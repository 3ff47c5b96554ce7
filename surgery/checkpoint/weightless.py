"""Build a model of any size without its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def weightless() -> Iterator[None]:
    """Parameters become shapes on the meta device as soon as a module takes them: memory that nobody has written to.

    Buffers keep their values, which may say what a model is: one that is causal by a triangle that it carries. Other
    threads make models with weights meanwhile.
    """
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.utils.weak import WeakIdKeyDictionary

    here = threading.get_ident()
    made = WeakIdKeyDictionary()  # a parameter that two modules take stays one

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return parameter
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return made[parameter]  # type: ignore[no-any-return]

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # says it gives None
    try:
        yield
    finally:
        handle.remove()
