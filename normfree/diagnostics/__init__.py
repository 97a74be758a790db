"""What is measured inside the model while it trains."""

from normfree.diagnostics.entropy import attention_entropy
from normfree.diagnostics.hooks import Recorder
from normfree.diagnostics.parameters import ParameterStatistic
from normfree.diagnostics.statistics import Observation, Statistic
from normfree.tables import STATISTICS

__all__ = ["STATISTICS", "Observation", "ParameterStatistic", "Recorder", "Statistic", "attention_entropy"]
