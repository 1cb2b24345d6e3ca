"""Settings for every test."""

import gc

import models
import pytest
import torch
from command_line import CommandLine
from hypothesis import settings

# Tiny models are fastest on one thread, and give the same bits everywhere.
torch.set_num_threads(1)

# The machines that run the tests vary in speed, so examples are few and have no deadline.
settings.register_profile("default", max_examples=40, deadline=None)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that runs for every family is slow for those that differ only in their record, or not even in that; but one test has
    something of every kind."""
    slow = models.MORE_FAMILIES.keys() | models.TWINS
    for item in items:
        family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        fast = models.REPRESENTATIVES if item.name.startswith("test_condensed_equals_masked[") else ()
        if family in slow and family not in fast:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported stays to the end: a million objects, through which each run of a Trainer would go to free memory."""
    gc.freeze()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`hf-prune`, and what it prints."""
    return CommandLine(capsys)
