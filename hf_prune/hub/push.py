"""From a model or its folder to the Hub: weights, config, modelling file, pruning config, card and pictures in one commit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel

from ..config import PruningConfig
from .card import CARD_NAME, CardFacts, write_card

#: What a Trainer leaves in its output folder that is not part of a model.
LEFT_OUT = (
    "_*",
    "checkpoint-*",
    "condensed/*",
    "optimizer.*",
    "scheduler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "pruner.safetensors",
    "predict_results*",
)


def push_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    config: PruningConfig | None = None,
    facts: CardFacts | None = None,
    processing_class: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publish a pruned or condensed model with everything that belongs to it.

    Args:
        model: a model, whose card is made on the spot, or a folder that holds a model with its card.
        repo_id: where to; the repository is made if needed.
        config, facts: for the card of a model; see [`model_card`].
        processing_class: tokenizer or processor that is saved with a model.
        private: whether a new repository is private.
        revision: branch, made if needed.
        token: access token; by default the one that is stored.
        commit_message: by default says that the model was uploaded.

    Returns:
        The commit; `commit_url` and `repo_url` say where.

    Raises:
        ValueError: the folder has no card, or the Hub does not accept its metadata.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    if isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if processing_class is not None:
                processing_class.save_pretrained(folder)
            write_card(folder, model, config, facts, repo_id)
            return push_to_hub(folder, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)
    if not Path(model, CARD_NAME).is_file():
        raise ValueError(f"{os.fspath(model)} has no {CARD_NAME}; write_card or `hf-prune card` makes one.")
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo,
        folder_path=Path(model),
        revision=revision,
        commit_message=commit_message or "Upload pruned model",
        ignore_patterns=list(LEFT_OUT),
    )
