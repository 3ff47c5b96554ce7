"""FSDP2 over two ranks: a transformed model gives the loss and gradients that one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests import zoo

PROGRAM = "lora rank 3 on attn.q,v + ffn; prune magnitude 50% on ffn; prefix 4 on all layers"
RANKS = 2


def transformed() -> Any:
    """A small Llama under three methods, every trained tensor random."""
    import surgery

    model = surgery.apply(surgery.parse(PROGRAM), zoo.tiny("llama", dtype=torch.float64))
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=zoo.seeded(0, name), dtype=torch.float64))
    return model.train()


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Cross entropy of the next token, summed, so that ranks add up to the whole batch."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def one_rank(rank: int, address: str, results: str) -> None:
    """Half of the batch on this rank; rank 0 writes loss and whole gradients."""
    from torch.distributed.fsdp import fully_shard

    import surgery

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        model = transformed()
        mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        ids = zoo.tokens(model.config.vocab_size, 2 * RANKS, 7).chunk(RANKS)[rank]
        loss = loss_of(model, ids)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        # FSDP averages over ranks; the loss is a sum.
        gradients = {
            name: RANKS * parameter.grad.full_tensor() for name, parameter in surgery.parameters(model).items()
        }
        others = [name for name, p in model.named_parameters() if p.grad is not None and name not in gradients]
        if rank == 0:
            torch.save({"loss": total, "gradients": gradients, "others": others}, results)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    import surgery

    model = transformed()
    loss = loss_of(model, zoo.tokens(model.config.vocab_size, 2 * RANKS, 7))
    loss.backward()
    results = tmp_path / "results.pt"
    mp.spawn(one_rank, args=(f"file://{tmp_path / 'meet'}", str(results)), nprocs=RANKS)
    found = torch.load(results)
    assert torch.allclose(found["loss"], loss.detach(), rtol=1e-12, atol=0)
    wanted = {name: parameter.grad for name, parameter in surgery.parameters(model).items()}
    assert found["gradients"].keys() == wanted.keys()
    assert not found["others"], "gradients reach what is frozen"
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient at all"
        # transformers' RMSNorm and softmax cast to float32 inside, hence not sharper.
        assert torch.allclose(found["gradients"][name], gradient, rtol=0, atol=1e-7 * gradient.abs().max()), name
