"""Settings for every test."""

import torch
from hypothesis import settings

# Tiny models are fastest on one thread, and give the same bits everywhere.
torch.set_num_threads(1)

# The machines that run the tests vary in speed, so examples are few and have no deadline.
settings.register_profile("default", max_examples=40, deadline=None)
settings.load_profile("default")
