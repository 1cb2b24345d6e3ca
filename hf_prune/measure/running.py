"""How a model is run to be timed: as it is, compiled by `torch.compile`, or as a graph by ONNX Runtime; where its weights lie."""

from __future__ import annotations

import copy
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..condense.snapshot import configs_of, unchanged
from ..settings.checks import check_installed, check_name
from ..settings.errors import ConfigError

RUNTIMES = ("torch", "compile", "onnx")
#: Those that build something of each model before it runs, which takes seconds.
BUILDING = ("compile", "onnx")
#: What writes a graph, and what runs it.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Bytes of weights that are written to one file.
_FILE = 256 << 20


def check_runtime(runtime: str, dtype: str, device: torch.device) -> None:
    """Raise unless models of a dtype on a device can be run so.

    Raises:
        ConfigError: the runtime is unknown, or does not have the dtype or the device.
        ImportError: its packages are not installed; says what to install.
    """
    check_name("runtime", runtime, RUNTIMES)
    if runtime != "onnx":
        return
    if dtype != "float32":
        raise ConfigError("dtype", dtype, "must be 'float32' in ONNX Runtime.")
    if device.type != "cpu":
        raise ConfigError("runtime", runtime, f"runs on the CPU, and the model is on {device.type}.")
    check_installed(f"runtime={runtime!r}", ONNX_PACKAGES, "onnx")


def still(runtime: str) -> AbstractContextManager[None]:
    """A context in which nothing is noted for backward, as far as what a runtime builds allows: tensors that were made in inference
    mode cannot be traced."""
    return torch.no_grad() if runtime == "onnx" else torch.inference_mode()


def tensors_in(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]


@contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """The weights of a model on the CPU lie in pages of files, where `from_pretrained` leaves them; afterwards, where they were.

    From there some systems read them faster than from other memory. So what was trained, copied or cut in this process is slower
    than it will be where it is loaded, and a large model more than a small one.
    """
    tensors = tensors_in(model)
    before = [tensor.data for tensor in tensors]
    try:
        put_in_files(tensors)
        yield
    finally:
        for tensor, data in zip(tensors, before):
            tensor.data = data


def put_in_files(tensors: Iterable[Tensor]) -> None:
    """Move weights on the CPU into pages of files, if the disk has room; nobody sees these, and they go with the last weight."""
    plain = [one for one in tensors if type(one.data) is Tensor and one.device.type == "cpu" and one.is_floating_point()]
    strided = [one for one in plain if one.layout == torch.strided and one.is_contiguous() and one.numel()]
    files: list[dict[str, Tensor]] = [{}]
    for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in strided}.values():  # of those that share one
        if sum(other.nbytes for other in files[-1].values()) >= _FILE:
            files.append({})
        files[-1][str(len(files[-1]))] = tensor
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are in use
        if shutil.disk_usage(folder).free < 2 * sum(tensor.nbytes for members in files for tensor in members.values()):
            return
        for number, members in enumerate(files):
            file = Path(folder, f"{number}.safetensors")
            save_file({name: tensor.data for name, tensor in members.items()}, file)
            for name, data in load_file(file).items():
                members[name].data = data


def prepared(model: Any, inputs: Mapping[str, Tensor], runtime: str) -> Callable[[], object]:
    """What runs a model on a batch, on as many threads of the CPU as torch has now."""
    if runtime == "onnx":
        return _in_onnx_runtime(model, inputs)
    if runtime == "torch":
        return partial(model, **inputs)
    torch._dynamo.reset()
    compiled = partial(torch.compile(model), **inputs)
    compiled()
    return compiled


def _in_onnx_runtime(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    with as_exported(model) as plain, quietly(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        program: Any = torch.onnx.export(plain, (), kwargs=dict(inputs), dynamo=True, verbose=False)
        program.save(file)
        opened = session(file, torch.get_num_threads())
    return partial(opened.run, None, {entry.name: inputs[entry.name].numpy() for entry in opened.get_inputs()})


def session(file: Path, threads: int = 0) -> Any:
    """A file in ONNX Runtime, on the CPU; 0 threads: as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@contextmanager
def as_exported(model: PreTrainedModel) -> Iterator[Any]:
    """The model as files have it: in evaluation mode, in float32, with eager attention and without a cache; then as it was.

    Eager attention is what the exporter carries for every family, and what the runtimes know and fuse; of the ways to compute
    experts it carries the one that gathers the weights of each token's.
    """
    plain: Any = model if model.dtype == torch.float32 else copy.deepcopy(model).float()  # type: ignore[no-untyped-call]
    with unchanged(plain), torch.no_grad():
        plain.eval()
        plain.set_attn_implementation("eager")
        plain.set_experts_implementation("batched_mm")
        for config in configs_of(plain):
            config.return_dict = True
            if hasattr(config, "use_cache"):
                config.use_cache = False
        yield plain


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings and progress bars of exporters and quantizers: what comes of them is compared with PyTorch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "gguf", "nncf")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
