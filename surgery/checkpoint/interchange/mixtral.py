"""A llama- or mistral-shaped model whose feed-forward blocks are mixtures, as a Mixtral checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.inputs import example
from surgery.checkpoint import huggingface
from surgery.checkpoint.staging import staged
from surgery.errors import CheckpointError
from surgery.graph.experts import MixtureOfExperts, mixtures
from surgery.verify.bounds import merge_bound, relative_error


def export(model: nn.Module, path: Path, *, source: Path | None = None, force: bool = False) -> None:
    """Write `config.json` and weights that `MixtralForCausalLM.from_pretrained` loads, with the same logits.

    model: nothing attached, every layer a mixture of as many experts. source: where tokenizer files are copied from.
    Errors: S451 where the model is not shaped like that, or Mixtral's own code gives other logits for its tensors.
    """
    made = converted(model)
    with staged(path, force) as partial:
        with huggingface.quiet():
            made.save_pretrained(partial)
        if source is not None:
            from surgery.checkpoint.save import copy_tokenizer

            copy_tokenizer(source, partial)


def converted(model: nn.Module) -> Any:
    """The same model as a MixtralForCausalLM, on tensors of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = getattr(model, "config", None)
    found = dict(mixtures(model))
    if not hasattr(config, "to_dict") or not found:
        raise _unlike("it has no mixture that `moe` made, or is no transformers model")
    if len({module.routing.experts for module in found.values()} | {0}) > 2 or len(found) != config.num_hidden_layers:
        raise _unlike("Mixtral has as many experts in every layer")
    if len({module.routing.top for module in found.values()}) > 1:
        raise _unlike("Mixtral takes as many experts of every layer")
    routing = next(iter(found.values())).routing
    said = {name: value for name, value in config.to_dict().items() if name in MixtralConfig().to_dict()}
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        said.pop(name, None)
    settings = MixtralConfig(
        **said,
        num_local_experts=routing.experts,
        num_experts_per_tok=routing.top,
        router_aux_loss_coef=routing.balance,
        attn_implementation=config._attn_implementation,
    )
    tensors = _tensors(model, found)
    with huggingface.quiet(), torch.device("meta"):
        _check(MixtralForCausalLM(settings), tensors)
    with huggingface.quiet():
        made = MixtralForCausalLM(settings).to(next(model.parameters()).dtype).eval()
    made.load_state_dict(tensors)
    _same_logits(made, model)
    return made


def _tensors(model: nn.Module, found: dict[str, MixtureOfExperts]) -> dict[str, Tensor]:
    """Every tensor under the name that Mixtral has for it."""
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in found)
    }
    for path, module in found.items():
        gate, up, down = _maps(module)
        tensors |= {
            f"{path}.gate.weight": module.router.weight.detach(),
            f"{path}.experts.gate_up_proj": torch.cat((gate, up), dim=1),
            f"{path}.experts.down_proj": down,
        }
    return tensors


def _maps(module: MixtureOfExperts) -> tuple[Tensor, Tensor, Tensor]:
    """The stacks of gate, up and down, (experts, out, in), told apart by what they do to one expert's output."""
    stacks = {name: stack.detach() for name, stack in module.stacks()}
    if len(stacks) != 3 or any(stack.dim() != 3 for stack in stacks.values()):
        raise _unlike("an expert of Mixtral is three matrices without biases")
    width = module.router.in_features
    down = [name for name, stack in stacks.items() if stack.shape[1] == width and _reads_products(module, name)]
    inner = [name for name in stacks if name not in down]
    if len(down) != 1 or any(stacks[name].shape[2] != width for name in inner):
        raise _unlike("an expert of Mixtral is a gate, an up and a down map")
    up = [name for name in inner if _linear_in(module, name)]
    if len(up) != 1:
        raise _unlike("an expert of Mixtral has one map behind its activation")
    (gate,) = (name for name in inner if name not in up)
    return stacks[gate], stacks[up[0]], stacks[down[0]]


def _linear_in(module: MixtureOfExperts, name: str) -> bool:
    """Whether twice a map's weight gives twice the expert's output; true of up and down, and not of gate."""
    stacks = {key: stack[0].detach().double() for key, stack in module.stacks()}
    x = torch.randn(1, 3, module.router.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = module.with_tensors(stacks, x)
    twice = module.with_tensors({**stacks, name: 2 * stacks[name]}, x)
    return relative_error(twice, 2 * once) < 1e-6


def _reads_products(module: MixtureOfExperts, name: str) -> bool:
    """Whether a map is the last one: rows of it that are zero make the same outputs zero."""
    stacks = {key: stack[0].detach().double() for key, stack in module.stacks()}
    cut = stacks[name].clone()
    cut[0] = 0
    x = torch.randn(1, 3, module.router.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, whole = module.with_tensors({**stacks, name: cut}, x), module.with_tensors(stacks, x)
    return bool((found[..., 0] == 0).all()) and torch.equal(found[..., 1:], whole[..., 1:])


def _check(made: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = made.state_dict()
    other = sorted(wanted.keys() ^ tensors.keys())
    if other:
        raise _unlike(f"Mixtral and this model differ in {len(other)} tensors, such as {other[0]}")
    for name, tensor in tensors.items():
        if wanted[name].shape != tensor.shape:
            raise _unlike(f"{name} is {tuple(tensor.shape)} here, and {tuple(wanted[name].shape)} in Mixtral")


def _same_logits(made: Any, model: nn.Module) -> None:
    mode = model.training
    made.config._experts_implementation = "eager"  # grouped products want rows of 16 bytes
    with torch.no_grad():
        inputs = example(model)
        found, wanted = made(**inputs).logits, model.eval()(**inputs).logits
    model.train(mode)
    made.config._experts_implementation = None
    error, bound = relative_error(found, wanted), merge_bound(wanted.dtype, model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    if error > bound:
        raise _unlike(f"Mixtral gives other logits for the same tensors (error {error:.1e}, bound {bound:.1e})")


def _unlike(reason: str) -> CheckpointError:
    return CheckpointError.of(
        "S451", f"Mixtral cannot hold this model: {reason}", help="`surgery.load` reads OUT as it is"
    )
