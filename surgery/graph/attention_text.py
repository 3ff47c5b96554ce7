"""Keys and values of a text at every attention call, as the model computes them when it reads the text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.anatomy.parts import Anatomy
from surgery.errors import GraphError
from surgery.graph.attention import AttentionSite
from surgery.graph.module import Rewritten, switched, without


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text as it stands, without special tokens.

    tokenizer: one of transformers or of tokenizers, or a callable from text to ids.
    Raises GraphError S348 when the text has no tokens.
    """
    if hasattr(tokenizer, "encode"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        ids = list(getattr(encoded, "ids", encoded))
    else:
        ids = [int(each) for each in tokenizer(text)]
    if not ids:
        raise GraphError.of("S348", f"the tokenizer makes no tokens of {text!r}", help="write a text with words in it")
    return ids


def check_known(ids: Sequence[int], anatomy: Anatomy) -> None:
    """Raises GraphError S352 when the model has no embedding for some of the ids."""
    vocabulary = max((part.shape[0] for part in anatomy.parts if part.role == "embed"), default=None)
    strange = [each for each in ids if vocabulary is not None and not 0 <= each < vocabulary]
    if strange:
        raise GraphError.of(
            "S352",
            f"the tokenizer gives token {strange[0]}, and the model knows {vocabulary}",
            help="take the tokenizer that belongs to the model",
        )


def fill_up(ids: Sequence[int], positions: int) -> list[int]:
    """The ids repeated, or cut, to fill so many positions."""
    return [ids[place % len(ids)] for place in range(positions)]


def by_head(states: Tensor, heads: int) -> Tensor:
    """(n, heads * width) -> (heads, n, width)."""
    return states.view(states.shape[0], heads, -1).transpose(0, 1)


def unlike_a_prompt(model: nn.Module, anatomy: Anatomy) -> str:
    """Why keys and values of a text are not all that a prompt with it is to this model; empty where they are."""
    having = {(part.stack, part.layer) for part in anatomy.parts if part.kind == "attention" and part.role == "attn"}
    for stack in anatomy.stacks:
        layers = sum(name == stack.name for name, _ in having)
        if 0 < layers < stack.depth:
            return f"{stack.depth - layers} of {stack.depth} layers have no attention to see the text in"
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chunk = getattr(config, "attention_chunk_size", None)
    return f"attention sees chunks of {chunk} tokens, counted without the text" if chunk else ""


def keys_and_values(
    model: nn.Module, ids: Sequence[int], sites: Sequence[AttentionSite], name: str
) -> list[tuple[Tensor, Tensor]]:
    """(key-value heads, n, width) of each site when the model reads these ids without the branch of that name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for site in sites:
        module = model.get_submodule(site.installed_path)
        assert isinstance(module, Rewritten)
        handles.append(module.register_forward_pre_hook(_Capture(site, seen), with_kwargs=True))
    was = {module: module.training for module in model.modules()}
    device = next(iter(model.parameters())).device
    try:
        with torch.no_grad(), switched(model, {name}):
            model.eval()
            read_ids(model, torch.tensor([list(ids)], device=device))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was.items():
            module.training = training
    silent = next((site.path for site in sites if site.path not in seen), None)
    if silent is not None:
        raise GraphError.of("S349", f"the attention at {silent} is not reached when the model reads a text")
    return [seen[site.path] for site in sites]


def read_ids(model: nn.Module, ids: Tensor) -> Any:
    """What a model gives for token ids, without a cache."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        return model(ids)
    if getattr(config, "is_encoder_decoder", False):
        return model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    return model(input_ids=ids, use_cache=False)


class _Capture:
    """A pre-hook that evaluates a site's graph up to its keys and values."""

    def __init__(self, site: AttentionSite, seen: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.site, self.seen = site, seen

    def __call__(self, module: Rewritten, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.site.path in self.seen:
            return
        graph = without(module.full, {self.site.name})
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        known = dict(zip(inputs, args, strict=False))
        known.update({node: kwargs[node.name] for node in inputs if node.name in kwargs})
        marks = {mark: node for node in graph.nodes for mark in node.meta.get("landmarks", ())}
        values = _Values(module, graph, known)
        key = values.of(marks["key"]) if "key" in marks else values.of(marks["transposed_key"]).transpose(-2, -1)
        heads = self.site.heads
        self.seen[self.site.path] = (_alone(key, heads.key_value), _alone(values.of(marks["value"]), heads.key_value))


class _Values:
    """Values of a graph's nodes, computed when asked for."""

    def __init__(self, module: nn.Module, graph: fx.Graph, known: dict[fx.Node, Any]) -> None:
        self.interpreter, self.known = fx.Interpreter(module, graph=graph), known

    def of(self, node: fx.Node) -> Any:
        if node not in self.known:
            if node.op == "placeholder":
                self.known[node] = node.args[0] if node.args else None
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
                self.known[node] = getattr(self.interpreter, node.op)(node.target, args, kwargs)
        return self.known[node]


def _alone(states: Tensor, heads: int) -> Tensor:
    """The key-value heads of the one row in a batch; repeated heads are taken once."""
    states = states[0] if states.dim() == 4 else states
    return states[:: states.shape[0] // heads].detach()
