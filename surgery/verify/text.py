"""Soft equals hard: a prefix that starts from a text gives what prompting with that text gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.entries import INSIDE
from surgery.compiler.plan import Step
from surgery.compiler.record import parameters, record_of
from surgery.graph.attention_text import unlike_a_prompt
from surgery.graph.fingerprint import changed
from surgery.verify.bounds import coarsest, merge_bound, relative_error
from surgery.verify.report import Finding
from surgery.verify.subject import Subject
from surgery.verify.whole import attention_steps, attention_switched


def soft_equals_hard(subject: Subject) -> Iterator[Finding]:
    """Same output as with the text's tokens in front of the inputs, where the model is causal or the text is embedded
    in front of an encoder's tokens, and until something is trained."""
    for step in subject.steps:
        if "soft_equals_hard" not in step.operation.promises():
            continue
        statement = str(step.statement)
        reason = _why_not(subject, step)
        if reason:
            yield Finding("soft_equals_hard", "model", statement=statement, skipped=reason)
            continue
        ids = _ids(subject, step)
        inputs = _tokens(subject)
        found = subject.output()
        with attention_switched(subject.model):
            prompted = torch.cat((ids.to(inputs.device).expand(len(inputs), -1), inputs), dim=1)
            wanted = _with_tokens(subject, prompted).output()
        if _inside(step) and not _decodes(subject) and found.dim() < 3:
            reason = "what the model gives is not one for each token"
            yield Finding("soft_equals_hard", "model", statement=statement, skipped=reason)
            continue
        if wanted.shape[1] == found.shape[1] + ids.numel():  # else they are a decoder's
            wanted = wanted[:, ids.numel() :]
        error, bound = relative_error(found, wanted), merge_bound(_dtype(subject), len(step.parts), 1.0)
        if error > bound and _trained(subject.model):
            reason = "what was attached has been trained, or comes from a file"
            yield Finding("soft_equals_hard", "model", statement=statement, skipped=reason)
            continue
        yield Finding("soft_equals_hard", "model", error, bound, statement, "against the text as a prompt")


def _why_not(subject: Subject, step: Step) -> str:
    if subject.tokenizer is None:
        return "no tokenizer to read the text (pass tokenizer=...)"
    if not subject.runs:
        return "there are no inputs to run the model on"
    unlike = unlike_a_prompt(subject.model, subject.plan.anatomy)
    if unlike and any(part.kind == "attention" for part in step.parts):
        return unlike
    if len(attention_steps(subject)) > 1:
        return "other statements act on the same attention calls"
    if _inside(step):
        return ""
    if not any(stack.name.startswith("decoder") for stack in subject.plan.anatomy.stacks):
        return "the model is not causal"
    if _decodes(subject):
        return "the model reads what it is told in an encoder"
    attention = [part for part in subject.plan.anatomy.parts if part.kind == "attention" and part.role == "attn"]
    mine = [part for part in step.parts if part.kind == "attention"]
    return "" if len(mine) == len(attention) else "only some layers have the prefix"


def _inside(step: Step) -> bool:
    """Whether the statement's positions are among an encoder's tokens."""
    return any(part.role == INSIDE for part in step.parts)


def _decodes(subject: Subject) -> bool:
    """Whether a decoder attends to an encoder's output."""
    return bool(getattr(getattr(subject.model, "config", None), "is_encoder_decoder", False))


def _ids(subject: Subject, step: Step) -> Tensor:
    """(n,) tokens of the text, as often as the prefix has room for them."""
    from surgery.graph.attention_text import fill_up, token_ids

    operation: Any = step.operation
    if hasattr(operation, "hard"):
        return torch.tensor(operation.hard(subject.tokenizer))
    ids = token_ids(subject.tokenizer, operation.text)
    return torch.tensor(list(fill_up(ids, operation.positions or len(ids))))


def _tokens(subject: Subject) -> Tensor:
    """(batch, length) token ids that the model is run on."""
    tokens: Tensor = (subject.kwargs or {})["input_ids"] if subject.kwargs else subject.args[0]
    return tokens


def _with_tokens(subject: Subject, tokens: Tensor) -> Subject:
    """The subject on other tokens."""
    if not subject.kwargs:
        return replace(subject, args=(tokens, *subject.args[1:]))
    kept = {name: value for name, value in subject.kwargs.items() if name not in ("attention_mask", "token_type_ids")}
    return replace(subject, kwargs={**kept, "input_ids": tokens})


def _dtype(subject: Subject) -> torch.dtype:
    """What the comparison can be as sharp as: transformers models cast to float32 inside."""
    return coarsest(subject.dtype, torch.float32) if hasattr(subject.model, "config") else subject.dtype


def _trained(model: nn.Module) -> bool:
    """Whether what was attached is not, or not known to be, as it was at the start."""
    record = record_of(model)
    known = {} if record is None else {name: record.start.get(name) for name in parameters(model)}
    prints = {name: print_ for name, print_ in known.items() if print_ is not None}
    return not prints or len(prints) < len(known) or bool(changed(prints, model))
