"""Calibration: texts as batches of tokens, and what every map of a model reads of them, one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import GraphError, PlanError
from surgery.graph.attention_text import read_ids as read_ids
from surgery.graph.attention_text import token_ids
from surgery.graph.blank import at_hand as at_hand

See = Callable[[str, Tensor], None]  # the path of a map, and what it reads: (tokens, in)


class _Enough(Exception):
    """Ends a forward whose rest is of no interest."""


def wants_text(path: Path) -> bool:
    """Whether a tokenizer is needed: the file is no JSONL whose lines have `input_ids`."""
    try:
        with path.open("r", encoding="utf-8") as file:
            first = json.loads(file.readline())
    except OSError:
        return False  # that is said when it is read
    except ValueError:
        return True
    return not (isinstance(first, dict) and "input_ids" in first)


def check_there(path: Path) -> None:
    """Errors: PlanError S130 for a file that cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def batches(path: Path, tokenizer: Any, samples: int, length: int, vocabulary: int) -> list[Tensor]:
    """Sequences of token ids, (1, at most `length`) each and at most `samples` of them.

    A JSONL file has one in each line, as `text` or `input_ids`; any other is one text, cut into pieces of `length`.
    Errors: PlanError S130 for a file that cannot be read or has too little, with the line.
    """
    found: list[Tensor] = []
    for where, ids in _sequences(path, tokenizer, length):
        if len(ids) > 1:
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise _bad(f"{where}: token {max(ids)}, and the model knows {vocabulary}", "another model's tokens?")
            found.append(torch.tensor([ids[:length]]))
        if len(found) == samples:
            break
    if not found:
        raise _bad(f"{path} has no sequence of two tokens or more", "calibration needs text to read")
    return found


def _sequences(path: Path, tokenizer: Any, length: int) -> Iterator[tuple[str, Sequence[int]]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error.strerror if isinstance(error, OSError) else "it is not UTF-8") from None
    if path.suffix != ".jsonl":
        ids = token_ids(tokenizer, text) if text.strip() else []
        yield from ((str(path), ids[start : start + length]) for start in range(0, len(ids), length))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            entry = _entry(line, where)
            if "text" in entry:
                entry = {"input_ids": token_ids(tokenizer, entry["text"]) if entry["text"].strip() else []}
            yield where, entry["input_ids"]


def _entry(line: str, where: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{where}: no JSON ({error})") from None
    ids = entry.get("input_ids") if isinstance(entry, dict) else None
    if isinstance(ids, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        return {"input_ids": ids}
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return {"text": entry["text"]}
    raise _bad(f"{where}: neither `text` nor `input_ids`", 'a line is {"text": "..."} or {"input_ids": [5, 7, ...]}')


def _unreadable(path: Path, reason: str | None) -> PlanError:
    return _bad(f"cannot read {path}: {reason}", "give the path of a text or JSONL file")


def _bad(what: str, help: str = "") -> PlanError:
    return PlanError.of("S130", what, help=help)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients, then as it was."""
    was = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in was.items():
            module.training = training


@contextmanager
def watched(model: nn.Module, paths: Sequence[str], see: See) -> Iterator[None]:
    """Inside, `see` is told what each of these maps reads."""
    handles = []
    try:
        for path in paths:

            def hook(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                see(path, args[0].detach().reshape(-1, args[0].shape[-1]))

            handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """How a layer was called, but for the states. name: the keyword that they were given under, if any."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        if args:
            return cls(args[1:], kwargs, None)
        name = next(iter(kwargs))
        return cls((), {other: value for other, value in kwargs.items() if other != name}, name)

    def again(self, layer: nn.Module, states: Tensor) -> Any:
        """The layer's result for other states."""
        if self.name is None:
            return layer(states, *self.args, **self.kwargs)
        return layer(**{self.name: states}, **self.kwargs)


class Walk:
    """The layers of a stack one after the other: each reads what the ones before it, as they are by then, have made.

    Only the states between two layers are kept. Errors: GraphError S397 when layers do not simply follow each other.
    """

    def __init__(self, model: nn.Module, stack: str, depth: int, sequences: Sequence[Tensor]) -> None:
        self.model = model
        self.layers = [model.get_submodule(f"{stack}.{index}") for index in range(depth)]
        self.stack = stack
        # Of every sequence: what the first layer reads, and what else each layer is called with.
        self.states: list[Tensor] = []
        self.calls: list[list[Call]] = []
        for ids in sequences:
            self._record(ids)

    def _record(self, ids: Tensor) -> None:
        calls: list[Call] = []
        states: list[Tensor] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call.of(args, kwargs)
            if not states:
                states.append(args[0] if call.name is None else kwargs[call.name])
            calls.append(call)
            if len(calls) == len(self.layers):
                raise _Enough

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        try:
            read_ids(self.model, ids.to(next(self.model.parameters()).device))
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.layers):
            raise _tangled(self.stack)
        self.states.append(states[0])
        self.calls.append(calls)

    def advance(self, index: int) -> None:
        """Hand what a layer makes now to the next one."""
        self.states = self.through(index)

    def through(self, index: int) -> list[Tensor]:
        """What a layer makes of the states that came in."""
        made = []
        for state, calls in zip(self.states, self.calls, strict=True):
            out = calls[index].again(self.layers[index], state)
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or out.shape != state.shape:
                raise _tangled(self.stack)
            made.append(out)
        return made


def _tangled(stack: str) -> GraphError:
    return GraphError.of(
        "S397",
        f"the layers of {stack} do not simply follow each other, so they cannot be calibrated one at a time",
        help="`prune sensitivity` and `prune magnitude` do not need that",
    )
