"""`surgery show`: the generated code of one place, before and after."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from surgery.cli.arguments import model_argument, program_argument, read_program, set_option, tokenizer_for
from surgery.cli.progress import progress
from surgery.errors import GraphError, ModelError

if TYPE_CHECKING:
    from torch import fx, nn

    from surgery.graph.module import Rewritten


@click.command()
@program_argument
@model_argument
@click.argument("path", metavar="PATH")
@set_option
def command(program: str, model: str, path: str, settings: dict[str, str]) -> None:
    """Show the generated code of the module at PATH, before and after PROGRAM, and the tensors it then holds.

    Reads shapes, not weights. `surgery plan` lists the paths.
    """
    from surgery.checkpoint import models

    parsed = read_program(program, settings)
    with progress(f"studying {model}"):
        loaded = models.load_meta(model)
        from surgery.compiler import perform, plan
        from surgery.graph.attention_interface import CHILD
        from surgery.graph.edge import CHILD as EDGE
        from surgery.graph.module import rewritten

        made = plan(parsed, loaded.model, example_inputs=loaded.example_inputs, tokenizer=tokenizer_for(parsed, loaded))
        places = {
            place if place.endswith(f".{EDGE}") else place.removesuffix(f".{CHILD}"): module
            for place, module in rewritten(perform(made, loaded.model, hollow=True))
        }
    if path not in places and f"{path}.{EDGE}" in places:
        path = f"{path}.{EDGE}"
    if path not in places:
        from surgery.language.suggest import did_you_mean

        raise ModelError.of(
            "S450",
            f"the program does not touch `{path}`",
            label=did_you_mean(path, list(places)),
            help=f"it touches {len(places)} places, {', '.join(list(places)[:4])}{', ...' if len(places) > 4 else ''}",
        )
    place = places[path]
    click.echo(f"# {path}, before\n{_before(place, path)}\n# {path}, after\n{source(place.graph)}")
    click.echo("# its tensors\n" + "\n".join(f"#   {line}" for line in _tensors(place)))


def source(graph: fx.Graph) -> str:
    """The code of a graph with functions by their own names, without the notes that free its variables."""
    generated = graph.python_code("self")
    code = re.sub(r";  (\w+ = )+None", "", generated.src.strip())
    for name, value in generated.globals.items():
        if name.startswith("surgery_"):
            code = code.replace(f"{name}(", f"{value.__name__}(")
    return code.replace("torch._C._nn.", "F.") + "\n"


def _before(place: Rewritten, path: str) -> str:
    from surgery.graph import attention_interface
    from surgery.graph.capture import capture
    from surgery.graph.edge import Edge, untouched

    if isinstance(place, Edge):
        return source(untouched())
    try:
        return source(capture(place.original, path).graph)
    except GraphError:
        if dict(place.named_children()).get("core") is not None:
            return source(attention_interface.graph()[0])
        return f"# {type(place.original).__name__}.forward, as it is written\n"


def _tensors(module: nn.Module) -> list[str]:
    from surgery.graph.module import Rewritten

    added = module.added if isinstance(module, Rewritten) else ()
    lines = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        kind = "trained" if tensor.requires_grad else "frozen"
        shape = " x ".join(map(str, tensor.shape)) or "one number"
        new = "added" if name.partition(".")[0] in added else "base"
        lines.append(f"{name}: {shape} {str(tensor.dtype).removeprefix('torch.')}, {kind}, {new}")
    return lines
