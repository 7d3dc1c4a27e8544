"""The check of the warm start's files, before anything starts. Their rows are read when the warm start begins."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.errors import UserError

COLUMNS = ("prompt", "response")


def trace_files(config: Config) -> list[Path]:
    """Returns the files of all phases."""
    return [phase.data for phase in config.warm_start.phases] if config.warm_start else []


def check_traces(config: Config) -> None:
    """Raises UserError for a file that is no parquet file with rows of the text columns prompt and response."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in trace_files(config):
        try:
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: a parquet file with the columns prompt and response is expected: {error}"
            ) from error
        types = {field.name: field.type for field in schema}
        for name in COLUMNS:
            if name not in types or not (pa.types.is_string(types[name]) or pa.types.is_large_string(types[name])):
                found = f"is {types[name]}" if name in types else "is missing"
                raise UserError(f"{path}: the column {name} {found}; text columns {' and '.join(COLUMNS)} are expected")
        if not rows:
            raise UserError(f"{path} contains no traces")
