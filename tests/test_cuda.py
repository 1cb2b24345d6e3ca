"""What a GPU changes: types, scalers, kernels, and where tensors lie. `bash scripts/gpu.sh` runs all of it where there is one.

Each test also runs on the CPU, as far as torch can do the same there, so that what is run on a GPU is known to be right.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_gpu
import models
import pytest
import torch
import torch.distributed as dist
from helpers import ROWS, SCHEDULED, pruner_of, snapshot, tiny_bert, trainer_for
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel, default_data_collator

from hf_prune import DistillationTrainer, Pruner, PruningConfig, PruningRule, condense, prune, sparsity_report, to_sparse
from hf_prune.measure.sparse import SparseLinear

ABSENT = "there is no CUDA device; bash scripts/gpu.sh on a machine with one"
CUDA = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason=ABSENT))
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]

#: A bound for numbers that two devices compute in float32, in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def batches(device: str, count: int) -> Iterator[dict[str, Tensor]]:
    """Rows of the Trainer's tests, again and again."""
    loader = DataLoader(ROWS, batch_size=8, collate_fn=default_data_collator)
    for batch in itertools.islice(itertools.cycle(loader), count):
        yield on(device, batch)


def zeros(model: nn.Module) -> float:
    """The share of zeros in the encoder's matrices."""
    weights = [module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and "encoder" in name]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# --------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("pattern", ["1x1", "head"])
@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "bf16"), *(pytest.param("cuda", kind, marks=CUDA) for kind in ("fp32", "bf16", "fp16"))]
)
def test_a_trainer_in_every_type(device: str, kind: str, pattern: str, tmp_path: Path) -> None:
    """The Trainer's scaler (fp16) skips steps now and then; the target is reached with exact zeros all the same."""
    config = {"pattern": pattern, "target_sparsity": 0.5, "target_modules": r"bert\.encoder\..*", **SCHEDULED}
    trainer = trainer_for(tmp_path, config, use_cpu=device == "cpu", **({} if kind == "fp32" else {kind: True}))
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device
    assert pruner_of(trainer).is_finished
    counted = 0.5 if pattern == "1x1" else 0.5 * attention_share(trainer.model)
    assert zeros(trainer.model) == pytest.approx(counted, abs=1e-2)
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def attention_share(model: PreTrainedModel) -> float:
    """How many of the encoder's weights are in attention."""
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sum(n for name, n in sizes.items() if ".attention." in name) / sum(n for name, n in sizes.items() if "encoder" in name)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=CUDA)])
def test_a_loop_with_a_scaler(device: str, dtype: torch.dtype) -> None:
    """A step whose gradients overflow is skipped, and is no observation."""
    model = tiny_bert().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, PruningConfig(pattern="4x1", target_modules=r"bert\.encoder\..*", **SCHEDULED), total_steps=12)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    skipped = 0
    for step, batch in enumerate(batches(device, 12), start=1):
        with torch.autocast(device, dtype):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        if step == 5:
            model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        pruner.observe(scaled_loss=True)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        pruner.step()
        optimizer.zero_grad()
    assert skipped >= 1
    assert zeros(model) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement", "wanda"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_moves_while_it_is_pruned(device: str, criterion: str) -> None:
    """From the CPU to the device after four steps and back after eight: what was pruned stays so, and pruning goes on."""
    model = tiny_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # without a state that would have to move, too
    scope = {"scope": "local"} if criterion == "wanda" else {}
    config = PruningConfig(pattern="4x1", criterion=criterion, target_modules=r"bert\.encoder\..*", **scope, **SCHEDULED)
    pruner = Pruner(model, config, total_steps=12)
    shares = []
    for step, batch in enumerate(batches("cpu", 12), start=1):
        place = device if 4 < step <= 8 else "cpu"
        model.to(place)
        model(**on(place, batch)).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        shares.append(zeros(model))
    assert shares[3] > 0
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize(
    ("device", "backend"), [pytest.param("cpu", "eager", marks=pytest.mark.slow), pytest.param("cuda", "inductor", marks=CUDA)]
)
def test_torch_compile(device: str, backend: str, tmp_path: Path) -> None:
    config = {"pattern": "4x1", "target_modules": r"bert\.encoder\..*", **SCHEDULED}
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    trainer = trainer_for(tmp_path, config, use_cpu=device == "cpu", **compiled)
    trainer.train()
    assert zeros(trainer.model) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_distillation(device: str, tmp_path: Path) -> None:
    """The teacher is moved to where the student is."""
    losses = {"alpha_logits": 0.9, "alpha_hidden": 1.0}
    kind: Any = functools.partial(DistillationTrainer, teacher=tiny_bert(seed=1), distillation=losses)
    trainer = trainer_for(tmp_path, PruningConfig(pattern="head", **SCHEDULED), kind=kind, use_cpu=device == "cpu")
    trainer.train()
    assert {parameter.device.type for parameter in trainer.teacher.parameters()} == {device}  # type: ignore[attr-defined]
    assert pruner_of(trainer).is_finished


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loop(model: PreTrainedModel, device: str) -> Pruner:
    """Twelve steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    config = PruningConfig(pattern="4x1", criterion="magnitude", target_modules=r"bert\.encoder\..*", **SCHEDULED)
    pruner = Pruner(model, config, total_steps=12)
    for batch in batches(device, 12):
        model(**batch).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return pruner


@pytest.mark.parametrize("device", DEVICES)
def test_fsdp2(device: str, alone: None) -> None:
    """Shards on one device are pruned as the model is without them."""
    plain, sharded = (tiny_bert().to(device).train() for _ in range(2))
    mesh = dist.device_mesh.init_device_mesh(device, (1,))
    for layer in sharded.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    pruners = [loop(model, device) for model in (plain, sharded)]
    assert pruners[0].reached_sparsity() == pytest.approx(pruners[1].reached_sparsity())
    for name, value in sharded.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(whole, plain.state_dict()[name], **CLOSE)


# ------------------------------------------------------------------------------------------------------- without training, smaller


@pytest.mark.parametrize("device", DEVICES)
def test_prune_without_training(device: str) -> None:
    """The same heads and neurons as on the CPU, from rows that are moved to the model."""
    rules = [PruningRule(pattern="head"), PruningRule(pattern="neuron")]
    reports, pruned = [], []
    for place in ("cpu", device):
        model = tiny_bert().to(place)
        reports.append(prune(model, PruningConfig(target_sparsity=0.5, rules=rules), list(batches("cpu", 4))))
        assert {parameter.device.type for parameter in model.parameters()} == {place}
        pruned.append(model.cpu())
    assert [module.units_left for module in reports[0].modules] == [module.units_left for module in reports[1].modules]
    for left, right in zip(*(snapshot(model).values() for model in pruned), strict=True):
        torch.testing.assert_close(left, right, **CLOSE)
    before = pruned[1].num_parameters()
    assert condense(pruned[1].to(device)).num_parameters() < before


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("device", DEVICES)
def test_condensed_equals_masked(device: str, family: str, tmp_path: Path) -> None:
    """Verified by `condense` where the model is; saved there, and loaded there again."""
    model = models.tiny(family).to(device)
    models.prune_randomly(model)
    batch = on(device, models.ragged_batch(model))
    with torch.no_grad():
        before = model(**batch)[0]
        after = condense(model)(**batch)[0]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).to(device).eval()
        torch.testing.assert_close(again(**batch)[0], after)


@pytest.mark.parametrize(("device", "attention"), [("cpu", "sdpa"), pytest.param("cuda", "flash_attention_2", marks=CUDA)])
def test_other_attention_in_half_precision(device: str, attention: str) -> None:
    """Flash attention has no float32: the smaller model computes what the masked one does, as far as bfloat16 tells."""
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    model = models.tiny("llama", "causal-lm").to(device, torch.bfloat16)
    model.set_attn_implementation(attention)
    models.prune_randomly(model)
    batch = on(device, models.ragged_batch(model))
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch).logits[seen]
        after = condense(model)(**batch).logits[seen]
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_is_loaded_onto_the_device(device: str, tmp_path: Path) -> None:
    model = tiny_bert()
    models.prune_randomly(model)
    condense(model).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map=device)
    assert {value.device.type for value in again.state_dict().values()} == {device}
    batch = models.ragged_batch(model)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**on(device, batch)).logits.cpu(), model(**batch).logits, **CLOSE)


# ------------------------------------------------------------------------------------------------------------------------- kernels


@torch.no_grad()
def two_of_four(weight: Tensor) -> None:
    """Zero the two smallest of every four weights of a row."""
    groups = weight.view(weight.shape[0], -1, 4)
    groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0)


@pytest.mark.parametrize(
    ("device", "format", "dtype"),
    [
        ("cpu", "csr", torch.float32),
        *(pytest.param("cuda", "semi_structured", dtype, marks=CUDA) for dtype in (torch.float16, torch.bfloat16)),
    ],
)
@torch.no_grad()
def test_two_of_four(device: str, format: str, dtype: torch.dtype) -> None:
    """The kernel for 2:4, by `to_sparse_semi_structured`, computes what the dense one does."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 256).to(device, dtype)
    two_of_four(dense.weight)
    batch = torch.randn(64, 256, device=device, dtype=dtype)
    torch.testing.assert_close(SparseLinear(dense, format)(batch), dense(batch), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sparse_model(device: str) -> None:
    """Whatever kernels are found to be fastest, the outputs are those of the dense ones."""
    kind = torch.float32 if device == "cpu" else torch.float16
    model = tiny_bert(hidden_size=64, intermediate_size=128, num_hidden_layers=1).to(device, kind).eval()
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            two_of_four(module.weight)
    batch = {"input_ids": torch.randint(1, 64, (8, 16), device=device)}
    with torch.no_grad():
        before = model(**batch).logits
        to_sparse(model, "csr" if device == "cpu" else "semi_structured", rows=2, tokens=8, repeats=1)
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_counts_and_reports(device: str) -> None:
    model = tiny_bert().to(device)
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.zero_()
    assert sparsity_report(model).sparsity == sparsity_report(copy.deepcopy(model).cpu()).sparsity > 0


# ---------------------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `scripts/gpu.sh`, as small as they go, on the CPU."""
    small = [
        "--device",
        "cpu",
        "--layers",
        "1",
        "--hidden_size",
        "32",
        "--tokens",
        "8",
        "--repeats",
        "1",
        "--batch_sizes",
        "1",
        "2",
    ]
    found = benchmark_gpu.main([*small, "--backend", "eager", "--output", str(tmp_path / "gpu.json")])
    assert (tmp_path / "gpu.json").is_file()
    assert {row["pattern"] for row in found["updates"]} == set(benchmark_gpu.PATTERNS)
    assert [row["batch"] for row in found["latency"]] == [1, 2]
    assert all(set(benchmark_gpu.VARIANTS) <= row.keys() for row in found["latency"])
    assert {"plain_ms", "pruned_ms", "callback_share"} <= found["step"].keys()
    assert "condensed" in capsys.readouterr().out
