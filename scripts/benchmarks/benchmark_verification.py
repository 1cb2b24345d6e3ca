"""What condensing costs, and what the proof costs that nothing changed: CPU time, and memory in units of the model.

    python scripts/benchmarks/benchmark_verification.py --output runs/benchmark_verification.json
    python scripts/benchmarks/benchmark_verification.py --against COMMIT

Random models of BERT-base's size (110 M parameters) and a Llama of 551 M lose 30, 50 and 70 % of the heads (with their key and
value head) or neurons of one block after the other. Each is condensed without and with verification in turn, on one thread, in a
process of its own: medians of the CPU time, and the largest peak of resident memory (`VmHWM` of Linux, reset before) above what the
process had. `--against` measures the package of another commit beside this one.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import rich
import torch
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_prune import condense

ROOT = Path(__file__).parents[2]
SHARES = (0.3, 0.5, 0.7)

#: The projection out of each block, and how many features of it live and die together.
OUTPUTS = {
    "bert": {r"attention\.output\.dense$": 64, r"\d\.output\.dense$": 1},
    "llama": {r"o_proj$": 3 * 64, r"down_proj$": 1},
}
MODELS = [f"{family} {dtype}" for family in OUTPUTS for dtype in ("float32", "bfloat16")]


def build(family: str, dtype: torch.dtype, layers: int | None) -> nn.Module:
    """A random model with dead heads and neurons, unevenly many in each block."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    if family == "bert":
        model: nn.Module = BertModel(BertConfig(num_hidden_layers=layers or 12))
    else:
        sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers or 18, **sizes))
    torch.set_default_dtype(torch.float32)
    found = [
        (module, width) for name, module in model.named_modules() for end, width in OUTPUTS[family].items() if re.search(end, name)
    ]
    for number, (module, width) in enumerate(found):
        weight = module.get_parameter("weight").detach()
        units = weight.shape[1] // width
        weight.unflatten(1, (units, width))[:, torch.randperm(units)[: int(SHARES[number % 3] * units)]] = 0
    return model.eval()


def resident(name: str) -> int:
    """A line of this process's `/proc/self/status`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measure(name: str, layers: int | None, repeats: int) -> dict[str, float]:
    """CPU seconds of condensing, and of verifying beside it, and the peak of extra memory of both in units of the model."""
    torch.set_num_threads(1)
    family, dtype = name.split()
    masked = build(family, getattr(torch, dtype), layers)
    size = sum(parameter.nbytes for parameter in masked.parameters())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    extra: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for verify in seconds:
            model = copy.deepcopy(masked)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before, start = resident("VmRSS"), time.process_time()
            condense(model, verify=verify)
            seconds[verify].append(time.process_time() - start)
            extra[verify].append((resident("VmHWM") - before) / size)
            del model
    cut, both = (statistics.median(seconds[verify]) for verify in (False, True))
    figures = {"parameters": sum(parameter.numel() for parameter in masked.parameters()), "condense_s": cut, "verify_s": both - cut}
    return figures | {"ratio": (both - cut) / cut, "extra_condense": max(extra[False]), "extra_verify": max(extra[True])}


def package_of(commit: str, folder: Path) -> Path:
    """The package of a commit, in a folder to import it from."""
    archive = subprocess.run(["git", "archive", commit, "hf_prune"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--layers", type=int, help="of each model, instead of 12 and 18")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="COMMIT", help="measure the package of another commit, too")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_verification.json"), help="where the JSON goes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.layers, arguments.repeats)))
        return

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        packages = {arguments.against: package_of(arguments.against, Path(folder))} if arguments.against else {}
        for name in arguments.models:
            for package, path in (packages | {"now": ROOT}).items():
                command = [sys.executable, __file__, "--measure", name, "--repeats", str(arguments.repeats)]
                command += ["--layers", str(arguments.layers)] if arguments.layers else []
                environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
                printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                rows.append({"model": name, "package": package, **json.loads(printed.splitlines()[-1])})

    table = Table(title=f"{arguments.repeats} runs each, one thread; memory in units of the model")
    for column in ("model", "package", "condense, s", "verify, s", "ratio", "memory", "verifying"):
        table.add_column(column, justify="left" if column in ("model", "package") else "right")
    for row in rows:
        figures = (f"{row[key]:.2f}" for key in ("condense_s", "verify_s", "ratio", "extra_condense", "extra_verify"))
        table.add_row(row["model"], row["package"], *figures)
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
