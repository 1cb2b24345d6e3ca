"""Settings for every test."""

from hypothesis import settings

# The machines that run the tests vary in speed, so examples are few and have no deadline.
settings.register_profile("default", max_examples=40, deadline=None)
settings.load_profile("default")
