"""The peer: TRL's DistillationTrainer under ZeRO-3, set up as its documentation does, with katds's steps between its own.

What a library changes for the whole process must not reach the other one's turn. DeepSpeed replaces `torch.nn.functional.linear`
when it partitions a model that was loaded whole, as TRL's are; katds puts the original back. Each keeps its own here.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import DistillationConfig, DistillationTrainer

from katds.bench.workloads import Task

# "auto" is what the trainer's own settings say.
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


class Turns(TrainerCallback):
    """Times TRL's steps, and calls `between` after each. `settle`: a barrier."""

    def __init__(self, settle: Callable[[], Any], between: Callable[[int], None]) -> None:
        self._settle, self._between = settle, between
        self._linear = torch.nn.functional.linear
        self._start = 0.0
        self.seconds: list[float] = []
        self.lengths: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._settle()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._settle()
        self.seconds.append(time.perf_counter() - self._start)
        theirs, torch.nn.functional.linear = torch.nn.functional.linear, self._linear
        try:
            self._between(len(self.seconds) - 1)
        finally:
            torch.nn.functional.linear = theirs

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])
            self.losses.append(logs["loss"])


def train(task: Task, settle: Callable[[], Any], between: Callable[[int], None]) -> list[tuple[float, float, float]]:
    """Collective: seconds, mean response and loss of TRL's `task.steps` steps, with `between(step)` after each.

    `torch.nn.functional.linear` must be PyTorch's own when this is called.
    """
    transformers_logging.disable_progress_bar()
    turns = Turns(settle, between)
    half = task.precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    student = AutoModelForCausalLM.from_pretrained(task.student, dtype=dtype)
    teacher = AutoModelForCausalLM.from_pretrained(task.teacher, dtype=dtype)
    rows = [json.loads(line) for line in task.prompts.read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(
                output_dir=folder, max_steps=task.steps, per_device_train_batch_size=task.at_once,
                gradient_accumulation_steps=task.rollouts // task.at_once, max_completion_length=task.new_tokens,
                temperature=1.0, top_p=1.0, top_k=0, beta=1.0, learning_rate=task.lr, bf16=half, fp16=False,
                gradient_checkpointing=False, shuffle_dataset=False, logging_steps=1, save_strategy="no", report_to=[],
                use_cpu=not torch.cuda.is_available(), disable_tqdm=True, deepspeed=ZERO3,
            ),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(task.student, padding_side="left"),
            callbacks=[turns],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return list(zip(turns.seconds, turns.lengths, turns.losses, strict=True))
