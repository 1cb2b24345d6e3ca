"""Every kind of pattern, every criterion and every schedule, once: what the tests are parametrised over."""

from __future__ import annotations

from hf_prune.settings.checks import SCHEDULES as NAMED_SCHEDULES
from hf_prune.settings.config import CRITERIA as NAMED_CRITERIA
from hf_prune.settings.config import DECLARED
from hf_prune.settings.patterns import STRUCTURAL_PATTERNS

#: Single weights, blocks that are tall, wide and square, N:M of several sizes, rows, columns, and parts of the architecture.
PATTERNS = ("1x1", "4x1", "1x8", "8x8", "2:4", "1:4", "5:8", "1xchannel", "channelx1", *STRUCTURAL_PATTERNS)
#: Those whose units are rows of a projection, as criteria of whole outputs need.
ROW_PATTERNS = ("1xchannel", "head", "neuron")
#: Those that can choose while a model trains; without those that a test registers.
CRITERIA = tuple(sorted(NAMED_CRITERIA - DECLARED["scores_absences"] - {"auto"}))
SCHEDULES = tuple("polynomial(2)" if name == "polynomial(k)" else name for name in NAMED_SCHEDULES)
