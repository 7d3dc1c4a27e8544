"""Configuration: the schema, loading with overrides, and the checks that run before anything starts."""

from .load import expand, load_config
from .schema import Config
from .validate import check_inputs

__all__ = ["Config", "check_inputs", "expand", "load_config"]
