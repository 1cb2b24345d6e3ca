"""Prints the scalars in a folder of TensorBoard's events: one JSON object of tag → values. Argument: the folder."""

from __future__ import annotations

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
