"""What a dense model's layers say of their units, on disk: measured once, and read again for every other budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import new_folder, read_object, write_text
from ..settings.errors import ConfigError
from .sensitivity import Importance
from .walk import Rows

_INDEX = "database.json"
#: Of what is measured and how files hold it; it changes with either.
_FORMAT = "1"


@dataclass(frozen=True)
class Measured:
    """What the dense model says of the units that leave through the inputs of one weight.

    Attributes:
        costs: what it costs to take away each unit, `[units]`; see `criteria.activations.removal_costs`.
        inputs: Σ a·x·xᵀ over the calibration tokens, `[in (+ 1), in (+ 1)]`.
        tokens: how many tokens that are.
        importance: what an error of the weight's output costs.
    """

    costs: Tensor
    inputs: Tensor
    tokens: int
    importance: Importance


class Database:
    """A folder with what was [`Measured`], one file a weight.

    Args:
        folder: the folder. If it holds measurements they are read, else it is written once all are there.
        facts: what the measurements hold true for, by name.

    Raises:
        ConfigError: the folder holds other files, or measurements with other facts; names what differs.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, str]) -> None:
        self._folder, self._facts = Path(folder), dict(facts)
        #: Whether there is something to be read.
        self.is_measured = (self._folder / _INDEX).is_file()
        if not self.is_measured:
            if self._folder.exists() and not (self._folder.is_dir() and not any(self._folder.iterdir())):
                raise ConfigError("database", str(folder), "is no database of prune(); give a new folder.")
            return
        try:
            found = read_object(self._folder / _INDEX)
        except ValueError as error:
            raise ConfigError("database", str(folder), f"is damaged: {error}") from None
        other = [name for name, value in self._facts.items() if found.get(name) != value]
        if other:
            allowed = f"was measured with other {', '.join(other)}; give a new folder, or what it was measured with."
            raise ConfigError("database", str(folder), allowed)

    def load(self, name: str, device: torch.device) -> Measured:
        """What was measured of a weight, on a device.

        Raises:
            ConfigError: its file is missing or damaged.
        """
        path = self._folder / f"{name}.safetensors"
        try:
            found = load_file(path, device=str(device))
            batches = sum(key.startswith("importance.") for key in found)
            importance = Importance([found[f"importance.{index}"] for index in range(batches)], found["outputs"])
            return Measured(found["costs"], found["inputs"], int(found["tokens"]), importance)
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError("database", str(self._folder), f"is damaged ({error}); delete it.") from None

    @contextmanager
    def written(self) -> Iterator[Callable[[str, Measured], None]]:
        """Inside, what is measured is saved by name; the folder is there once all is well."""
        with new_folder(self._folder) as unfinished:

            def save(name: str, measured: Measured) -> None:
                tensors = {f"importance.{index}": part for index, part in enumerate(measured.importance.tokens)}
                tensors |= {"costs": measured.costs, "inputs": measured.inputs, "outputs": measured.importance.outputs}
                tensors["tokens"] = torch.tensor(measured.tokens)
                save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished / f"{name}.safetensors")

            yield save
            write_text(unfinished / _INDEX, json.dumps(self._facts, indent=2) + "\n")


def fingerprints(model: nn.Module, rows: Rows, units: Mapping[str, int], seed: int) -> dict[str, str]:
    """What measurements hold true for: how they are made and written, weights, calibration rows, units and seed.

    Args:
        model: the dense model.
        rows: the calibration rows.
        units: weight → how many units leave through its inputs.
        seed: of the weights of logits that are drawn.
    """
    batches = {f"{index}.{key}": value for index, batch in enumerate(rows.batches) for key, value in batch.items()}
    held_out = {f"{index}.held_out": part for index, part in enumerate(rows.held_out)}
    return {
        "format": _FORMAT,
        "weights": _digest(dict(model.state_dict())),
        "calibration rows": _digest(batches | held_out),
        "units": json.dumps(units),
        "seed": str(seed),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
