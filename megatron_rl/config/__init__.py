"""Configuration: the schema, loading with overrides, and the checks that run before anything starts."""

from .effective import EffectiveValue, effective, expand, read_effective
from .load import load_config
from .schema import Config
from .validate import check_inputs

__all__ = ["Config", "EffectiveValue", "check_inputs", "effective", "expand", "load_config", "read_effective"]
