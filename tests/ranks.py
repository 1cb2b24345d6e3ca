"""What every process of `test_ranks.py` runs, under `accelerate launch` or `torchrun`, and the tests run alone to compare with.

    accelerate launch --multi_gpu --num_processes 2 tests/ranks.py FOLDER CASE...

(`accelerate launch --cpu` starts one process, whatever `--num_processes` says, unless it is given MPI.) Each process writes what
each case returns: tensors to `CASE.RANK.safetensors`, the rest to `CASE.RANK.json`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from distillation_cases import EVERY_LOSS, LAYERED, TASKS, WIDE, train, training_logs
from helpers import TIMED, arguments, quickly_timed, ragged_rows, snapshot
from helpers import tiny_bert as tiny_bert_of_floats
from models import ragged_batch, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.distributed import DistributedConfig

from hf_prune import DistillationConfig, DistillationTrainer, Pruner, PruningCallback, PruningConfig, last_complete_checkpoint

Result = dict[str, Any]

STEPS, BATCH = 6, 8
SCHEDULED: dict[str, Any] = {"frequency": 2, "cooldown_steps": 1, "target_sparsity": 0.5}

#: A pattern and a criterion, trained by a Trainer.
TRAINED: dict[str, dict[str, Any]] = {
    "blocks": {"pattern": "4x1", "criterion": "snip_momentum"},
    "heads": {"pattern": "head", "criterion": "taylor", "scope": "local"},
    "movement": {"pattern": "4x1", "criterion": "movement"},
    "wanda": {"pattern": "2:4", "criterion": "wanda", "scope": "local"},
    "neurons": {"pattern": "neuron", "criterion": "apoz"},
    "rows": {"pattern": "1xchannel", "criterion": "mean_activation"},
}


def tiny_bert(*args: Any, **kwargs: Any) -> PreTrainedModel:
    """In double precision, where sums in another order do not move a unit across the threshold of a mask."""
    return tiny_bert_of_floats(*args, **kwargs).double()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, shards gathered."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def error_of(run: Callable[[], object]) -> str:
    """The message of the error that `run` ends in."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# ----------------------------------------------------------------------------------------------------------------- with a Trainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def training(folder: Path, **overrides: Any) -> TrainingArguments:
    """Arguments for the same run on any number of processes.

    SGD, because Adam blows rounding up where a gradient is zero but for it, as that of a key's bias is. And BERT's loss ignores the
    number of items that the Trainer gives it for the average over processes, which then multiplies the loss by that of processes.
    """
    size = BATCH // world()
    settings = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "optim": "sgd", "learning_rate": 0.05}
    return arguments(folder, **settings | {"average_tokens_across_devices": False} | overrides)


def trainer_for(
    folder: Path, config: dict[str, Any], model: PreTrainedModel, rows: int = STEPS * BATCH, **overrides: Any
) -> Trainer:
    """A Trainer whose optimizer steps see `BATCH` rows, on however many processes."""
    return Trainer(
        model,
        training(folder, eval_strategy="epoch", **overrides),
        train_dataset=ragged_rows(rows),
        eval_dataset=ragged_rows(3 * BATCH, seed=1),
        compute_metrics=accuracy,
        callbacks=[PruningCallback(SCHEDULED | config)],
    )


def pruner_of(trainer: Trainer) -> Pruner:
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, PruningCallback))
    assert callback.pruner is not None
    return callback.pruner


def outcome(trainer: Trainer) -> Result:
    """Weights, pruner state and logs of a finished run."""
    timings = ("runtime", "per_second")
    logs = [{key: value for key, value in log.items() if not key.endswith(timings)} for log in trainer.state.log_history]
    return {
        "logs": logs,
        **whole(trainer.model.state_dict()),
        **{f"pruner/{name}": tensor for name, tensor in pruner_of(trainer).state_dict().items()},
    }


def trained(name: str) -> Callable[[Path], Result]:
    def case(folder: Path) -> Result:
        trainer = trainer_for(folder, TRAINED[name], tiny_bert())
        trainer.train()
        return outcome(trainer) | {"world": world()}

    return case


def resumed(name: str) -> Callable[[Path], Result]:
    """Six steps, against three and three, where an update happens in the middle of what the criterion gathers."""

    def case(folder: Path) -> Result:
        saving = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
        through = trainer_for(folder, TRAINED[name], tiny_bert(), **saving)
        through.train()
        again = trainer_for(folder, TRAINED[name], tiny_bert(seed=1), **saving)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("prun*")) if rank() == 0 else []
        return {
            f"{run}/{key}": value for run, t in (("through", through), ("again", again)) for key, value in outcome(t).items()
        } | {"files": files}

    return case


def saved(folder: Path) -> Result:
    """A checkpoint, with a second process that is late with what it writes."""
    trainer = trainer_for(folder, TRAINED["blocks"], tiny_bert(), save_strategy="steps", save_steps=STEPS)
    save = trainer._save_rng_state

    def late(output_dir: str) -> None:
        time.sleep(rank())
        save(output_dir)

    trainer._save_rng_state = late
    trainer.train()
    checkpoint = folder / f"checkpoint-{STEPS}"
    recorded = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["PruningCallback"]
    before = last_complete_checkpoint(folder)
    dist.barrier()
    if rank() == 1:
        (checkpoint / "rng_state_1.pth").unlink()
    dist.barrier()
    return {
        "recorded": sorted(recorded["attributes"]["written"]["crc32"]),
        "before": before and Path(before).name,
        "after": last_complete_checkpoint(folder),
    }


def terminated(folder: Path) -> Result:
    """A run that is to save upon a signal."""
    trainer = trainer_for(folder, TRAINED["wanda"], tiny_bert(), enable_jit_checkpoint=True)
    return {"error": error_of(trainer.train), "step": trainer.state.global_step}


def ragged(folder: Path) -> Result:
    """Rows that divide into neither batches nor processes, in accumulated batches."""
    config = TRAINED["wanda"]
    trainer = trainer_for(folder, config, tiny_bert(), rows=43, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    trainer.train()
    return outcome(trainer)


FAMILY: dict[str, Any] = {
    "rules": [{"pattern": "head"}, {"pattern": "neuron"}],
    "target_sparsity": None,
    "target_parameters": [0.95, 0.9],
    "criterion": "taylor",
}


def family(folder: Path) -> Result:
    """A run to two targets: what it ends with, and what one process wrote of each."""
    trainer = trainer_for(folder, FAMILY, tiny_bert())
    trainer.train()
    members = json.loads((folder / "family.json").read_text())["members"]
    weights = {member["folder"]: load_file(folder / member["folder"] / "model.safetensors") for member in members}
    named = {f"{name}/{key}": value for name, tensors in weights.items() for key, value in tensors.items()}
    return outcome(trainer) | named | {"members": members, "files": sorted(path.name for path in folder.iterdir())}


def distilled(folder: Path) -> Result:
    """All three losses over labels that some rows have none of, in accumulated batches."""
    rows = ragged_rows(STEPS * BATCH)
    for index, row in enumerate(rows):
        row["labels"] = [-100 if index % 5 == 0 or not token or token % 3 == 0 else token % 2 for token in row["input_ids"]]
    trainer = DistillationTrainer(
        tiny_bert("token-classification"),
        training(folder, per_device_train_batch_size=BATCH // world() // 2, gradient_accumulation_steps=2),
        train_dataset=rows,
        callbacks=[PruningCallback(SCHEDULED | TRAINED["heads"])],
        teacher=tiny_bert("token-classification", seed=1),
        distillation=DistillationConfig(alpha_task=0.3, alpha_logits=0.5, alpha_hidden=0.7),
    )
    trainer.train()
    return outcome(trainer)


#: Students of one task each: the losses, and how the teacher's sizes differ.
STUDENTS: dict[str, tuple[DistillationConfig, dict[str, int]]] = {
    "sequence": (EVERY_LOSS, WIDE),
    "token": (LAYERED, {"num_hidden_layers": 6}),
    "translation": (LAYERED, {"d_model": 48}),
    "question": (DistillationConfig(), {}),
}


def student(task: str) -> Callable[[Path], Result]:
    """A student that is trained without a pruner: its weights, projections and logs."""

    def case(folder: Path) -> Result:
        losses, changes = STUDENTS[task]
        teacher, rows = TASKS[task](seed=1, count=32, **changes)
        model = TASKS[task](seed=0, count=32)[0]
        accumulated = {"per_device_train_batch_size": 4 // world(), "gradient_accumulation_steps": 2}
        trainer, _ = train(folder, model, teacher, rows, losses, optim="sgd", learning_rate=0.05, **accumulated)
        projections = trainer.accelerator.unwrap_model(trainer.projections).state_dict()
        weights = model.state_dict() | {f"projections.{name}": value for name, value in projections.items()}
        tied = model._tied_weights_keys or ()
        logs = [{name: log[name] for name in log if name.endswith("loss")} for log in training_logs(trainer)]
        return {"world": trainer.accelerator.num_processes, "logs": logs} | {
            name: value.clone() for name, value in weights.items() if name not in tied
        }

    return case


# ------------------------------------------------------------------------------------------------------------------ in loops


def accelerated(folder: Path) -> Result:
    """The loop of Accelerate, as the guide shows it."""
    accelerator = Accelerator(cpu=True)
    model = tiny_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(ragged_rows(STEPS * BATCH), batch_size=BATCH // world(), collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = Pruner(model, PruningConfig(**SCHEDULED, **TRAINED["blocks"]), total_steps=STEPS)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finish()
    bare = accelerator.unwrap_model(model)
    return {**snapshot(bare), **{f"pruner/{name}": tensor for name, tensor in pruner.state_dict().items()}}


def batches(model: PreTrainedModel, steps: int = STEPS) -> Iterator[dict[str, Tensor]]:
    """This process's share of batches of four rows."""
    for step in range(steps):
        batch = ragged_batch(model, seed=step) | {"labels": torch.tensor([0, 1, 1, 0])}
        yield {name: tensor[rank() :: world()] for name, tensor in batch.items()}


def loop(model: PreTrainedModel, config: dict[str, Any], steps: int = STEPS) -> Iterator[Pruner]:
    """The plain loop, with SGD so that the optimizer has no state; yields the pruner after each step."""
    pruner = Pruner(model, PruningConfig(**SCHEDULED | config), total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    for batch in batches(model, steps):
        model.train()(**batch).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        yield pruner
    pruner.finish()


def disagreeing(folder: Path) -> Result:
    """Nobody averages gradients."""
    return {"error": error_of(lambda: list(loop(tiny_bert(), {"pattern": "1x1"})))}


def timed(folder: Path) -> Result:
    """Each process times the model's blocks by itself."""
    model = tiny_bert(**TIMED)
    rules = [{"pattern": "head"}, {"pattern": "neuron"}]
    settings = {
        "rules": rules,
        "target_speedup": 1.02,
        "criterion": "magnitude",
        "schedule": "constant",
        "latency_length": 32,
        "latency_batch_size": 2,
    }
    with quickly_timed():
        pruner = Pruner(model, PruningConfig.from_dict(settings), total_steps=2)
    pruner.step()  # raises if the masks differ
    return {name: value for name, value in pruner.state_dict().items() if name.startswith("costs/")}


def one_sees_nothing(folder: Path) -> Result:
    """Only the first process has tokens for a layer, as may happen to an expert."""
    model = tiny_bert().train()
    pruner = Pruner(model, PruningConfig(**SCHEDULED, **TRAINED["wanda"]), total_steps=STEPS)
    if rank() == 0:
        model(**ragged_batch(model))
    rule = pruner.rules[0]
    return {group.name: rule.criterion.scores(group) for group in rule.groups}


# ----------------------------------------------------------------------------------------------------------------- in shards

#: Two processes hold 18 of 36 rows each, or 23 and 22 of 45: heads of 12 rows and blocks of 4 or 3 lie across shards.
UNEVEN: dict[str, Any] = {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 45, "num_hidden_layers": 2}

SHARDED: dict[str, dict[str, Any]] = {
    "snip_momentum": {"pattern": "3x1", "criterion": "snip_momentum"},
    "taylor heads": {"pattern": "head", "criterion": "taylor", "scope": "local", "target_sparsity": 0.67},
    "wanda": {"pattern": "2:4", "criterion": "wanda", "scope": "local"},
    "apoz neurons": {"pattern": "neuron", "criterion": "apoz"},
    "movement": {"pattern": "4x1", "criterion": "movement"},
    "fpgm rows": {"pattern": "1xchannel", "criterion": "fpgm"},
    "lottery": {"pattern": "1x1", "criterion": "magnitude", "schedule": "lottery"},
    "keep_zeros": {"pattern": "4x1", "criterion": "snip_momentum", "keep_zeros": True},
    "nested": {"rules": [{"pattern": "2:4", "scope": "local", "target_sparsity": 0.5}, {"pattern": "head"}], "criterion": "fisher"},
}


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """FSDP2, layer by layer; alone, the model as it is."""
    if world() > 1:
        layers = model.transformer.h if model.config.model_type == "gpt2" else model.base_model.encoder.layer
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def uneven(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model whose shards have no even sizes; with zeros, where they are to be kept."""
    model = tiny_bert(seed=seed, **UNEVEN)
    if config.get("keep_zeros"):
        with torch.no_grad():
            model.bert.encoder.layer[0].intermediate.dense.weight[7:20] = 0
            model.bert.encoder.layer[0].intermediate.dense.bias[7:20] = 0
            model.bert.encoder.layer[1].output.dense.weight[:, ::3] = 0
    return model


def looped(config: dict[str, Any], build: Callable[[], PreTrainedModel]) -> Result:
    """A run; the shares of zeros after each step, the weights, and the pruner's state after four steps and at the end."""
    model = shard(build())
    with torch.no_grad():
        model.eval()(**next(batches(model)))  # evaluation leaves the root gathered
    result: Result = {"sparsity": []}
    for step, pruner in enumerate(loop(model, config), start=1):
        result["sparsity"].append([pruner.reached_sparsity(), pruner.target_sparsity()])
        if step in (4, STEPS):
            result |= {f"state {step}/{name}": tensor.clone() for name, tensor in pruner.state_dict().items()}
            result |= {f"weights {step}/{name}": tensor for name, tensor in whole(model.state_dict()).items()}
    return result


def sharded(name: str) -> Callable[[Path], Result]:
    return lambda folder: looped(SHARDED[name], lambda: uneven(SHARDED[name]))


def sharded_gpt2(folder: Path) -> Result:
    """Weights stored `[in, out]`, with query, key and value packed into one."""

    def build() -> PreTrainedModel:
        sizes = {"n_embd": 36, "n_head": 3, "n_inner": 45, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return tiny("gpt2", "sequence-classification", **sizes).double()

    return looped({"rules": [{"pattern": "head", "target_sparsity": 0.5}, {"pattern": "3x1"}], "criterion": "taylor"}, build)


def reloaded(name: str) -> Callable[[Path], Result]:
    """Four steps, then the state into another model and pruner, and the rest."""

    def case(folder: Path) -> Result:
        config = PruningConfig(**SCHEDULED | SHARDED[name])
        model = shard(uneven(SHARDED[name]))
        for step, pruner in enumerate(loop(model, SHARDED[name]), start=1):
            if step == 4:
                state, weights = pruner.state_dict(), whole(model.state_dict())
                break
        other = uneven(SHARDED[name], seed=1)
        other.load_state_dict(weights)
        shard(other)
        again = Pruner(other, config, total_steps=STEPS)
        again.load_state_dict(state)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.05, weight_decay=0.1)
        for step, batch in enumerate(batches(other)):
            if step >= 4:
                other.train()(**batch).loss.backward()
                again.observe()
                optimizer.step()
                again.step()
                optimizer.zero_grad()
        return {
            **{f"weights {STEPS}/{key}": tensor for key, tensor in whole(other.state_dict()).items()},
            **{f"state {STEPS}/{key}": tensor.clone() for key, tensor in again.state_dict().items()},
        }

    return case


def too_early(folder: Path) -> Result:
    """A Pruner that was made before the parameters were sharded."""
    model = uneven({})
    pruner = Pruner(model, PruningConfig(pattern="1x1", criterion="magnitude", frequency=1), total_steps=STEPS)
    return {"error": error_of(lambda: (shard(model), pruner.observe()))}


def adapted(folder: Path) -> Result:
    """LoRA under FSDP2."""
    model = uneven({})
    adapter = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    shard(model)
    return {"error": error_of(lambda: Pruner(adapter, PruningConfig(pattern="1x1"), total_steps=STEPS))}


def flat(folder: Path) -> Result:
    """FSDP1."""
    model = FullyShardedDataParallel(uneven({}), use_orig_params=True, device_id=torch.device("cpu"))
    return {"error": error_of(lambda: Pruner(model, PruningConfig(pattern="1x1"), total_steps=STEPS))}


# --------------------------------------------------------------------------------- with a Trainer, sharded as the model is loaded


def loaded(folder: Path, **parallel: int) -> PreTrainedModel:
    """A tiny Llama, in shards where there are processes for it."""
    model = tiny("llama", "sequence-classification").double()
    if rank() == 0:
        model.save_pretrained(folder / "model")
    if world() == 1:
        return model
    dist.barrier()
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", distributed_config=DistributedConfig(**parallel))


def trained_in_shards(folder: Path) -> Result:
    config = {"pattern": "4x1", "criterion": "snip_momentum"}
    trainer = trainer_for(
        folder, config, loaded(folder, fsdp_size=2), save_strategy="steps", save_steps=STEPS, save_only_model=True
    )
    trainer.train()
    return outcome(trainer)


def family_in_shards(folder: Path) -> Result:
    trainer = trainer_for(folder, FAMILY, loaded(folder, fsdp_size=2))
    return {"error": error_of(trainer.train), "step": trainer.state.global_step}


def tensor_parallel(folder: Path) -> Result:
    """The plain loop; every process sees all rows."""
    result = {}
    for name, config in {"blocks": {"pattern": "4x1"}, "rows": {"pattern": "1xchannel", "criterion": "magnitude"}}.items():
        model = loaded(folder, tp_size=2)
        pruner = Pruner(model, PruningConfig(**SCHEDULED | config), total_steps=STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
        for step in range(STEPS):
            model.train()(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            pruner.observe()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        pruner.finish()
        result |= {f"{name}/{key}": tensor for key, tensor in whole(model.state_dict()).items()}
        result |= {f"{name}/pruner/{key}": tensor for key, tensor in pruner.state_dict().items()}
    activations = PruningConfig(pattern="neuron", criterion="apoz")
    return result | {"error": error_of(lambda: Pruner(model, activations, total_steps=STEPS))}


CASES: dict[str, Callable[[Path], Result]] = {
    **{f"trained {name}": trained(name) for name in TRAINED},
    "resumed blocks": resumed("blocks"),
    "resumed wanda": resumed("wanda"),
    "saved": saved,
    "terminated": terminated,
    "ragged": ragged,
    "family": family,
    "distilled": distilled,
    **{f"student of {task}": student(task) for task in STUDENTS},
    "accelerated": accelerated,
    "disagreeing": disagreeing,
    "timed": timed,
    "one sees nothing": one_sees_nothing,
    **{f"sharded {name}": sharded(name) for name in SHARDED},
    "sharded gpt2": sharded_gpt2,
    **{f"reloaded {name}": reloaded(name) for name in ("movement", "wanda", "lottery", "keep_zeros")},
    "too early": too_early,
    "adapted": adapted,
    "flat": flat,
    "trained in shards": trained_in_shards,
    "family in shards": family_in_shards,
    "tensor parallel": tensor_parallel,
}


def main(folder: Path, names: list[str]) -> None:
    """Run cases as one of several processes and write what they return."""
    torch.set_num_threads(1)
    gc.freeze()  # see conftest.py

    Accelerator(cpu=True)  # starts the process group
    for name in names:
        room = folder / name
        result = CASES[name](room)
        dist.barrier()
        tensors = {key: value.contiguous() for key, value in result.items() if isinstance(value, Tensor)}
        save_file(tensors, folder / f"{name}.{rank()}.safetensors")
        rest = {key: value for key, value in result.items() if key not in tensors}
        (folder / f"{name}.{rank()}.json").write_text(json.dumps(rest))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
