"""Loading models from folders; incomplete checkpoints are errors."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

_NAMED = 10


def load_model(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load the model in a folder, of the class that its config names.

    Raises:
        ValueError: the config names no class of transformers; and see [`load_whole`].
    """
    names = AutoConfig.from_pretrained(folder).architectures or ["(none)"]
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        close = difflib.get_close_matches(names[0], dir(transformers), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"architectures={names[0]!r} in {Path(folder, 'config.json')}: must name a model class of transformers.{hint}"
        )
    return load_whole(cls, folder)


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors about truncated or damaged weight files into a ValueError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"PATH={os.fspath(path)}: a file of weights cannot be read ({error}).") from None


def load_whole(cls: Any, path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """`cls.from_pretrained(path, **kwargs)` that refuses a checkpoint without some of the model's tensors.

    transformers initialises those randomly, with a warning: right for a head that will be trained, but not for a model that will be
    measured, saved or published. Tensors that need not be saved, such as tied weights, do not count.

    Raises:
        ValueError: tensors are missing, which the message names, or a file of weights cannot be read.
    """
    model: PreTrainedModel
    with readable(path):
        model, seen = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(seen["missing_keys"]):
        named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
        raise ValueError(
            f"PATH={os.fspath(path)}: the checkpoint lacks {named}, which {type(model).__name__} would start from random numbers. "
            "Take a checkpoint that holds them, or write the class that it was saved from into `architectures` in config.json."
        )
    return model
