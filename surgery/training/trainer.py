"""The schedule of a program as a callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from surgery.training.schedule import Schedule, schedule


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Moves masks while a Trainer trains: `Trainer(model, ..., callbacks=[ScheduleCallback()])`.

    The length of the training is the Trainer's `max_steps`, and where it resumes a checkpoint the schedule does so too.
    Errors: those of `surgery.schedule`.
    """

    def __init__(self) -> None:
        self.schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule = schedule(kwargs["model"], kwargs["optimizer"], steps=state.max_steps)
        self.schedule.load_state_dict({"step": state.global_step})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.schedule is not None, "training has begun"
        self.schedule.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule = None
