"""The schedule as a callback of transformers' Trainer: the same bits as by hand, and as without a pause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import surgery
from tests import studied, zoo

TEXT = "sparse rigl 70% swap 40% every 2 steps on ffn\ntrain norm"
STEPS = 8


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sequences of nine tokens, which are their own labels."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = zoo.tokens(61, 1, 9, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def sparse() -> Any:
    model = zoo.tiny("llama")
    return surgery.apply(surgery.plan(surgery.parse(TEXT), model, anatomy=studied.anatomy("llama")), model)


def trained(directory: Path, resume: str | None = None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from surgery.training.trainer import ScheduleCallback

    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **more,
    )
    model = sparse()
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[ScheduleCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_moves_masks_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Resumed from its own checkpoint in front of a swap: the bits of training in one go; counts are exact."""
    start = sparse()
    through = trained(tmp_path / "through")
    names = [name for name in through.state_dict() if name.endswith("weight_mask")]
    assert names
    assert any(not torch.equal(through.state_dict()[name], start.state_dict()[name]) for name in names)
    again = trained(tmp_path / "again", str(tmp_path / "through" / "checkpoint-3"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in through.state_dict().items())
    for model in (through, again):
        report = surgery.verify(model)
        assert report, str(report)
