"""A mixture of experts made of one feed-forward block: every expert a copy of it, of which a router picks a few."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgery.errors import GraphError

STD = 0.02  # of a router's weights at the start (Komatsuzaki et al. 2023)


@dataclass(frozen=True)
class Routing:
    """experts: how many. top: how many of them each token takes. balance, z: what the two losses are multiplied with.

    noise: in training the router reads its input times a number between 1 - noise and 1 + noise (Fedus et al. 2022).
    """

    experts: int
    top: int
    balance: float = 0.0
    z: float = 0.0
    noise: float = 0.0


class MixtureOfExperts(nn.Module):
    """y = sum over the top experts e of w_e f_e(x), the w the softmax of their logits, so that they sum to one.

    experts: the block, whose parameters are stacks (experts, ...) under their names. router: the logits of a token.
    Tokens are sorted by expert, and each expert runs once, on its own. A trace has every expert on all tokens instead.
    """

    def __init__(self, block: nn.Module, width: int, routing: Routing) -> None:
        """width: features of a token. The router's weights are unwritten memory."""
        super().__init__()
        self.routing = routing
        first = next(block.parameters())
        self.router = nn.Linear(width, routing.experts, bias=False, device=first.device, dtype=first.dtype)
        self.experts = copy.deepcopy(block)
        self.__dict__["_block"] = copy.deepcopy(block).to("meta")
        for module in self.experts.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    stack = parameter.detach().unsqueeze(0).repeat(routing.experts, *[1] * parameter.dim())
                    module._parameters[name] = nn.Parameter(stack, parameter.requires_grad)
        self.loss: Tensor | None = None
        self.train(block.training)

    @property
    def block(self) -> nn.Module:
        """What computes one expert, given its tensors; its own have shapes only."""
        block: nn.Module = self.__dict__["_block"]
        return block

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # a result, with a history that no copy has

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) tokens. Returns the same shape and dtype."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        if torch.compiler.is_compiling():
            return self._dense(tokens, weights, chosen).view(x.shape)
        return self._sorted(tokens, weights, chosen).view(x.shape)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices (tokens, top) of the experts that each token takes; sets `loss` in training."""
        routing, read = self.routing, tokens
        if self.training and routing.noise:
            read = tokens * torch.empty_like(tokens).uniform_(1 - routing.noise, 1 + routing.noise)
        logits = self.router(read)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        top, chosen = torch.topk(logits, routing.top, dim=-1)
        self.loss = self._loss(logits, chosen) if self.training and torch.is_grad_enabled() else None
        return torch.softmax(top, dim=-1), chosen

    def _loss(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """balance * E sum_e f_e P_e, f_e the share of choices that fall on expert e and P_e its mean probability, least
        where all are alike; and z * mean of the squared log of the partition function (Zoph et al. 2022)."""
        count = self.routing.experts
        share = nn.functional.one_hot(chosen, count).to(logits.dtype).mean((0, 1))
        balance = count * (share * torch.softmax(logits, dim=-1).mean(0)).sum()
        return self.routing.balance * balance + self.routing.z * torch.logsumexp(logits, dim=-1).square().mean()

    def _sorted(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        top = self.routing.top
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.routing.experts).tolist()
        groups = tokens[order // top].split(counts)
        # Taken apart once, so that the backward pass puts each stack's gradient together once.
        stacks = {name: stack.unbind(0) for name, stack in self.stacks()}
        found = [
            self._expert({name: parts[index] for name, parts in stacks.items()}, group)
            for index, group in enumerate(groups)
            if len(group)
        ]
        scaled = torch.cat(found) * weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return scaled[back].view(-1, top, tokens.shape[-1]).sum(1).to(tokens.dtype)

    def _dense(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        sum_ = torch.zeros_like(tokens, dtype=weights.dtype)
        stacks = dict(self.stacks())
        for index in range(self.routing.experts):
            weight = (weights * (chosen == index)).sum(1, keepdim=True)
            sum_ = sum_ + weight * self._expert(
                {name: stack.select(0, index) for name, stack in stacks.items()}, tokens
            )
        return sum_.to(tokens.dtype)

    def one(self, index: int, x: Tensor) -> Tensor:
        """What a single expert gives for x: (1, tokens, width)."""
        return self.with_tensors({name: stack[index] for name, stack in self.stacks()}, x)

    def with_tensors(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """What an expert of these tensors gives for x: (1, tokens, width)."""
        if self.block.training != self.training:
            self.block.train(self.training)
        buffers = {name: _read(self.experts, name) for name, _ in self.block.named_buffers()}
        result: Tensor = functional_call(self.block, {**tensors, **buffers}, (x,))
        return result

    def stacks(self) -> Iterator[tuple[str, Tensor]]:
        """Every stack as it is to be read, by its name in the block: adapters on experts change what is read."""
        for name, _ in self.block.named_parameters():
            yield name, _read(self.experts, name)

    def _expert(self, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """One expert on (tokens, width); a block is used to a batch of them."""
        return self.with_tensors(tensors, tokens.unsqueeze(0)).squeeze(0)


def _read(module: nn.Module, name: str) -> Tensor:
    """A tensor by its full name, as the module that has it gives it."""
    path, _, local = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), local)
    return value


def mixtures(model: nn.Module) -> Iterator[tuple[str, MixtureOfExperts]]:
    """Every mixture that a statement made, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            yield path, module


def auxiliary_loss(model: nn.Module) -> Tensor:
    """What the last forward pass in training adds to the loss, of all mixtures; zero outside of training."""
    losses = [module.loss for _, module in mixtures(model) if module.loss is not None]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def add_loss(model: nn.Module, args: Any, output: Any) -> Any:
    """A hook on a transformers model's forward: in training its loss has the auxiliary one in it."""
    loss = getattr(output, "loss", None)
    if not model.training or not isinstance(loss, Tensor) or not torch.is_grad_enabled():
        return None
    extra = auxiliary_loss(model)
    trained = [module for _, module in mixtures(model) if module.router.weight.requires_grad]
    if trained and not extra.requires_grad:
        raise GraphError.of(
            "S333",
            "a reentrant checkpoint hides the mixture's router from the balancing loss",
            help='gradient_checkpointing_enable({"use_reentrant": False})',
        )
    output.loss = loss + extra.to(loss)
    return output


def fault_of(block: nn.Module, width: int) -> str:
    """Why a block cannot be an expert, found on shapes alone; empty where it can."""
    shape = copy.deepcopy(block).to("meta")
    try:
        found = shape(torch.empty(1, 3, width, device="meta", dtype=next(shape.parameters()).dtype))
    except Exception as error:
        return f"it takes more than the tokens it reads ({str(error).splitlines()[0]})"
    if not isinstance(found, Tensor) or found.shape != (1, 3, width):
        return "it does not give one tensor of the width that it reads"
    return ""
