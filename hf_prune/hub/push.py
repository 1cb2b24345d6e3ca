"""Upload a model to the Hub: weights, config, modelling file, pruning config, card and plots in one commit."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..settings.config import PruningConfig
from .card import CARD_NAME, CardFacts, write_card
from .files import Kind, files_to_publish

logger = logging.getLogger(__name__)


def push_to_hub(
    model: Any,
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
    """Upload a pruned or condensed model with everything that belongs to it.

    Args:
        model: a model (or what holds it, and has `save_pretrained`), whose card is made on the spot; or the path of a folder that
            holds a model with its card. Of a folder, only the files in [`files_to_publish`] are uploaded.
        repo_id: where to; the repository is made if needed.
        config, facts: for the card of a model; see [`model_card`].
        processing_class: tokenizer or processor that is saved with a model.
        private: whether a new repository is private; with True, an old one has to be.
        revision: branch, made if needed.
        token: access token; by default the stored one.
        commit_message: by default says that the model was uploaded.

    Returns:
        The commit; `commit_url` and `repo_url` say where.

    Raises:
        ValueError: the folder has no card or links to elsewhere, the Hub does not accept the card's metadata, or a repository that
            is to be private is public already.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
    """
    if not isinstance(model, (str, os.PathLike)):
        with tempfile.TemporaryDirectory() as made:
            model.save_pretrained(made)
            if processing_class is not None:
                processing_class.save_pretrained(made)
            write_card(made, model, config, facts, repo_id)
            return push_to_hub(made, repo_id, private=private, revision=revision, token=token, commit_message=commit_message)
    folder = Path(model)
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}; write_card or `hf-prune card` makes one.")
    names, left = files_to_publish(folder)
    if unknown := [name for name, reason in left.items() if reason == Kind.UNKNOWN.value]:
        logger.warning("Not uploaded, since nothing says that they belong to the model: %s.", ", ".join(unknown))
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ValueError(f"private=True: {repo} exists already and is public.")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.create_commit(
        repo,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names],
        revision=revision,
        commit_message=commit_message or "Upload pruned model",
    )
