"""Trains students with several sets of losses and writes what came out of it. Run alone or under `accelerate launch`.

    accelerate launch --multi_gpu --num_processes 2 tests/launch_distillation.py FOLDER

(`accelerate launch --cpu` starts one process, whatever `--num_processes` says.) Writes `<case>.safetensors` (student and
projections) and `<case>.json` (logs) into FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from distillation_cases import EVERY_LOSS, TASKS, WIDE, train, training_logs
from safetensors.torch import save_file

from hf_prune import DistillationConfig

LAYERED = DistillationConfig(
    alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7, alpha_hidden_layers=0.2, alpha_attention=0.4, layer_map="dynamic"
)
CASES = {
    "sequence": (EVERY_LOSS, WIDE),
    "token": (LAYERED, {"num_hidden_layers": 6}),
    "translation": (LAYERED, {"d_model": 48}),
    "question": (DistillationConfig(), {}),
}


def main(folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for task, (settings, changes) in CASES.items():
        teacher, rows = TASKS[task](seed=1, count=32, **changes)
        student = TASKS[task](seed=0, count=32)[0]
        trainer, _ = train(
            folder / "run",
            student,
            teacher,
            rows,
            settings,
            per_device_train_batch_size=4 // processes,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.05,
        )
        assert trainer.accelerator.num_processes == processes
        if trainer.is_world_process_zero():
            plain = trainer.accelerator.unwrap_model(trainer.projections)
            tensors = dict(student.state_dict()) | {f"projections.{name}": value for name, value in plain.state_dict().items()}
            shared = student._tied_weights_keys or ()
            save_file(
                {name: value.clone() for name, value in tensors.items() if name not in shared}, folder / f"{task}.safetensors"
            )
            logs = [{name: log[name] for name in log if name.endswith("loss")} for log in training_logs(trainer)]
            (folder / f"{task}.json").write_text(json.dumps({"processes": processes, "logs": logs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
