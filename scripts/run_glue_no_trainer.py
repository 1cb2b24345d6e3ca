"""`run_glue.py` as a custom training loop with Accelerate: fine-tune, prune and condense a text classifier.

    accelerate launch scripts/run_glue_no_trainer.py --task_name mrpc --model_name_or_path bert-base-cased --output_dir runs/mrpc \\
        --do_prune --pruning_pattern 2:4 --target_sparsity 0.5 --distill_loss_weight 5

The command lines of Intel Neural Compressor's walkthrough for Hugging Face models run as they are. Pruning is three calls around
the optimizer: `observe`, `step`, `finish`. With `--checkpointing_steps`, an interrupted run resumes bit for bit with
`--resume_from_checkpoint`. Data and metrics are those of `run_glue.py`, which has to be in the same folder.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset
from run_glue import DataTrainingArguments, load_task
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, SchedulerType, get_scheduler

from hf_prune import (
    CardFacts,
    ConfigError,
    DistillationArguments,
    DistillationConfig,
    Pruner,
    PruningArguments,
    PruningConfig,
    push_to_hub,
    sparsity_report,
)
from hf_prune.distillation import hidden_loss, logits_loss
from hf_prune.hub import write_card
from hf_prune.training.arguments import ModelArguments
from hf_prune.training.stage import CONDENSED, Task, condensed_from, save_condensed

PRUNER_STATE = "pruner.safetensors"


@dataclass
class LoopArguments:
    """Training arguments, as in transformers' scripts without the Trainer."""

    output_dir: str = field(metadata={"help": "The folder for the model."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size per device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "The same for evaluation."})
    learning_rate: float = field(default=5e-5, metadata={"help": "After warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, except for biases and norms."})
    num_train_epochs: int = field(default=3, metadata={"help": "Number of epochs."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Number of optimizer steps; overrides num_train_epochs."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    lr_scheduler_type: SchedulerType = field(default=SchedulerType.LINEAR, metadata={"help": "Learning rate schedule."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Warm-up steps of the learning rate."})
    seed: int | None = field(default=None, metadata={"help": "Random seed, for reproducible runs."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no or bf16; default: accelerate's setting."})
    checkpointing_steps: str | None = field(default=None, metadata={"help": "Steps between checkpoints, or `epoch`."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "The folder of a checkpoint to resume from."})
    with_tracking: bool = field(default=False, metadata={"help": "Log to the trackers in report_to."})
    report_to: str = field(default="all", metadata={"help": "Such as tensorboard or wandb."})
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the condensed model, or the pruned one, with its card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "The repository; default: the name of output_dir."})
    hub_token: str | None = field(default=None, metadata={"help": "The Hub token; default: the stored one."})

    def __post_init__(self) -> None:
        self.lr_scheduler_type = SchedulerType(self.lr_scheduler_type)  # the parser gives its value
        if self.mixed_precision not in (None, "no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r}: must be no or bf16.")
        every = self.checkpointing_steps
        if every not in (None, "epoch") and not (every.isdigit() and int(every) > 0):
            raise ValueError(f"checkpointing_steps={every!r}: must be a number of steps, or epoch.")
        if self.resume_from_checkpoint is not None and not Path(self.resume_from_checkpoint).is_dir():
            raise ValueError(f"resume_from_checkpoint={self.resume_from_checkpoint!r}: is not a folder.")


def make_optimizer(model: nn.Module, args: LoopArguments) -> Optimizer:
    """AdamW, without decay of biases and norms."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=args.learning_rate)


def distilled_loss(outputs: Any, reference: Any, batch: dict[str, Tensor], settings: DistillationConfig) -> Tensor:
    """The weighted sum of the losses of a batch: the task's, the logits', and the last hidden state's over all but padding."""
    rows, tokens = torch.ones_like(batch["labels"], dtype=torch.bool), batch["attention_mask"].float()
    losses = {
        "task": outputs.loss,
        "logits": logits_loss(outputs.logits, reference.logits, rows, settings.temperature) / len(rows),
        "hidden": hidden_loss(outputs.hidden_states[-1], reference.hidden_states[-1], tokens) / tokens.sum(),
    }
    weights = settings.weights()
    return torch.stack([weights[name] * loss for name, loss in losses.items() if weights[name]]).sum()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, task: Task, batch_size: int) -> dict[str, float]:
    """The task's metrics on every validation split; those of MNLI's mismatched half end in `_mm`."""
    metrics: dict[str, float] = {}
    model.eval()
    for suffix, rows in task.splits("validation").items():
        loader = accelerator.prepare(DataLoader(rows, batch_size=batch_size, collate_fn=task.data_collator))
        seen = [accelerator.gather_for_metrics((model(**batch).logits, batch["labels"])) for batch in loader]
        logits, labels = (np.concatenate([part.float().cpu().numpy() for part in parts]) for parts in zip(*seen))
        scores = task.compute_metrics(EvalPrediction(logits, labels if task.names is None else labels.astype(int)))
        metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
    return metrics


class Loop:
    """The training loop and its state, which can be saved and resumed.

    Args:
        accelerator: the Accelerator.
        args: the training arguments.
        task: the data and its metrics.
        model: the model to train.
        pruning: what to prune; None for plain fine-tuning.
        distillation: the weights of the losses; None for the task loss alone.
        teacher: the teacher, with `distillation`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: LoopArguments,
        task: Task,
        model: PreTrainedModel,
        pruning: PruningConfig | None,
        distillation: DistillationConfig | None,
        teacher: PreTrainedModel | None,
    ) -> None:
        self.accelerator, self.args, self.task, self.distillation = accelerator, args, task, distillation
        rows: Dataset = task.data["train"]
        # A separate generator: restarting in the middle of an epoch must not draw from the one that dropout uses.
        drawn = {"shuffle": True, "generator": torch.Generator()}
        loader = DataLoader(rows, args.per_device_train_batch_size, collate_fn=task.data_collator, **drawn)
        optimizer = make_optimizer(model, args)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        processes = accelerator.num_processes  # a prepared scheduler steps once per process
        schedule = get_scheduler(
            args.lr_scheduler_type, optimizer, args.num_warmup_steps * processes, num_training_steps=self.total_steps * processes
        )
        self.scheduler = accelerator.prepare(schedule)
        self.teacher = None if teacher is None else teacher.to(accelerator.device).eval().requires_grad_(False)
        self.pruner = None if pruning is None else Pruner(self.model, pruning, self.total_steps, self.steps_per_epoch)
        if self.pruner is not None:
            accelerator.print(self.pruner.plan())
        self.step = 0

    def run(self) -> None:
        """Train from the start, or from the checkpoint in the arguments, to the end."""
        args, accelerator = self.args, self.accelerator
        if args.resume_from_checkpoint is not None:
            self.load(Path(args.resume_from_checkpoint))
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not accelerator.is_local_main_process)
        while self.step < self.total_steps:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            self.loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(self.loader, done * args.gradient_accumulation_steps)
            losses = self.epoch(batches, bar)
            metrics = evaluate(accelerator, self.model, self.task, args.per_device_eval_batch_size)
            metrics |= {} if self.pruner is None else self.pruner.metrics()
            accelerator.print(f"epoch {epoch + 1}:", metrics)
            if args.with_tracking:
                accelerator.log({**metrics, "train_loss": losses, "epoch": epoch}, step=self.step)
            if args.checkpointing_steps == "epoch":
                self.save(Path(args.output_dir, f"epoch_{epoch}"))
        if self.pruner is not None:
            self.pruner.finish()

    def epoch(self, batches: Any, bar: Any) -> float:
        """Train on the remaining batches of an epoch; return their mean loss."""
        accelerator, total, count = self.accelerator, 0.0, 0
        self.model.train()
        for batch in batches:
            with accelerator.accumulate(self.model):
                loss = self.loss(batch)
                accelerator.backward(loss)
                if self.pruner is not None and accelerator.sync_gradients:
                    self.pruner.observe()
                self.optimizer.step()
                if self.pruner is not None and accelerator.sync_gradients:
                    self.pruner.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            total, count = total + float(loss.detach()), count + 1
            if accelerator.sync_gradients:
                self.step += 1
                bar.update()
                every = self.args.checkpointing_steps
                if every is not None and every.isdigit() and self.step % int(every) == 0:
                    self.save(Path(self.args.output_dir, f"step_{self.step}"))
                if self.step == self.total_steps:
                    break
        return total / max(count, 1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, including distillation if there is a teacher."""
        if self.distillation is None or self.teacher is None:
            plain: Tensor = self.model(**batch).loss
            return plain
        with torch.no_grad(), self.accelerator.autocast():
            reference = self.teacher(**batch, output_hidden_states=True)
        return distilled_loss(self.model(**batch, output_hidden_states=True), reference, batch, self.distillation)

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.accelerator.save_state(str(folder))
        state = {"step": torch.tensor(self.step)} | ({} if self.pruner is None else self.pruner.state_dict())
        if self.accelerator.is_main_process:
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / PRUNER_STATE)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint."""
        self.accelerator.load_state(str(folder))
        state = load_file(folder / PRUNER_STATE)
        self.step = int(state.pop("step"))
        if self.pruner is not None:
            self.pruner.load_state_dict(state)


def parse_arguments(arguments: Sequence[str]) -> tuple[Any, ...]:
    """From a command line."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, LoopArguments, PruningArguments, DistillationArguments))
    return parser.parse_args_into_dataclasses(list(arguments))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, args, pruning_args, distillation_args = parsed
    pruning, distillation = pruning_args.to_config(), distillation_args.to_config()
    if pruning is not None and pruning.is_family:
        name = str(pruning.cost_target)
        raise ConfigError(name, getattr(pruning, name), "is a family, which run_glue.py makes; give one target.")
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the same order after a checkpoint
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if args.seed is not None:
        set_seed(args.seed)
    task = load_task(model_args, data_args, {"train", "validation"})
    model = model_args.load(task.load)
    named, teacher = distillation_args.teacher_model_name_or_path, None
    if distillation is not None:
        teacher = copy.deepcopy(model) if named is None else task.load(named)
    if args.with_tracking:
        accelerator.init_trackers("glue_no_trainer", {**vars(args), "lr_scheduler_type": str(args.lr_scheduler_type)})
    loop = Loop(accelerator, args, task, model, pruning, distillation, teacher)
    facts = card_facts(loop)
    loop.run()
    metrics = finish(loop, pruning, facts, model_args.pad_to_multiple_of)
    if args.push_to_hub and accelerator.is_main_process:
        publish(args)
    accelerator.end_training()
    return metrics


def card_facts(loop: Loop) -> CardFacts:
    """What the model card says about the data and the model before training; a resumed run reads it from disk."""
    folder = loop.args.output_dir
    if loop.args.resume_from_checkpoint is not None:
        return CardFacts.load(folder)
    before = evaluate(loop.accelerator, loop.model, loop.task, loop.args.per_device_eval_batch_size)
    listed = ("num_train_epochs", "learning_rate", "num_warmup_steps", "weight_decay", "per_device_train_batch_size", "seed")
    training = loop.task.size | {name: getattr(loop.args, name) for name in listed}
    training |= {"lr_scheduler_type": loop.args.lr_scheduler_type.value, "steps": loop.total_steps}
    facts = CardFacts(**loop.task.card, metrics_before=before, training=training)
    if loop.accelerator.is_main_process:
        facts.save(folder)
    return facts


def finish(loop: Loop, pruning: PruningConfig | None, facts: CardFacts, pad_to_multiple_of: int | None) -> dict[str, float]:
    """Save the model with its card, condense it if anything can be removed; return the metrics of both."""
    accelerator, args, task = loop.accelerator, loop.args, loop.task
    facts.metrics = evaluate(accelerator, loop.model, task, args.per_device_eval_batch_size)
    found = {"eval": facts.metrics}
    folder, model = Path(args.output_dir), accelerator.unwrap_model(loop.model)
    if accelerator.is_main_process:
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        if pruning is not None:
            write_card(folder, model, pruning, facts)
            print(sparsity_report(model))
    accelerator.wait_for_everyone()
    small = None if pruning is None else condensed_from(folder, task.load, pad_to_multiple_of)
    if small is not None:
        found["condensed"] = evaluate(accelerator, small.to(accelerator.device), task, args.per_device_eval_batch_size)
        if accelerator.is_main_process:
            save_condensed(small, folder)
        accelerator.wait_for_everyone()
        again = task.load(folder / CONDENSED).to(accelerator.device)
        found["reloaded"] = evaluate(accelerator, again, task, args.per_device_eval_batch_size)
    metrics = {f"{kind}_{name}": value for kind, scores in found.items() for name, value in scores.items()}
    if accelerator.is_main_process:
        (folder / "all_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
    accelerator.print(metrics)
    return metrics


def publish(args: LoopArguments) -> None:
    """Push the condensed model, if there is one, or else the trained model to the Hub."""
    folder = Path(args.output_dir)
    source = folder / CONDENSED if (folder / CONDENSED).is_dir() else folder
    push_to_hub(source, args.hub_model_id or folder.resolve().name, token=args.hub_token)


if __name__ == "__main__":
    main()
