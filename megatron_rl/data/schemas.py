"""The schemas of data files: which columns hold the prompt and the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.errors import UserError

Row = dict[str, Any]
Message = dict[str, str]
SchemaName = Literal["slime", "verl", "trl"]
_TRL_LABELS = ("solution", "answer", "ground_truth")
_KNOWN = """\
  slime: prompt (text or messages), label
  verl:  prompt (messages or text), reward_model.ground_truth
  trl:   prompt (text or messages), every other column free"""


@dataclass(frozen=True)
class Schema:
    """The schema of one file."""

    name: SchemaName
    label_column: str | None
    """Column of the label. None for a prompt-only file, whose verifier uses the metadata."""
    label_required: bool
    """Whether a missing label is an error."""

    def prompt(self, row: Row) -> str | list[Message]:
        """Returns the prompt as text or as chat messages. Raises ValueError with the column."""
        value = row.get("prompt")
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError(f"column prompt: expected text or a list of messages, found {kind(value)}")
        for index, message in enumerate(value):
            for part in ("role", "content"):
                if not isinstance(message, dict) or not isinstance(message.get(part), str):
                    raise ValueError(f"column prompt: message {index}: expected {{role: text, content: text}}")
        return [{"role": message["role"], "content": message["content"]} for message in value]

    def label(self, row: Row) -> Any:
        """Returns the ground truth. Raises ValueError with the column."""
        if self.label_column is None:
            return None
        value = row.get(self.label_column)
        column = self.label_column
        if self.name == "verl" and column == "reward_model":
            if not isinstance(value, dict):
                raise ValueError(f"column reward_model: expected {{ground_truth: ...}}, found {kind(value)}")
            value, column = value.get("ground_truth"), "reward_model.ground_truth"
        if value is None and self.label_required:
            raise ValueError(f"column {column}: no value")
        return value

    def metadata(self, row: Row) -> dict[str, Any]:
        """Returns the other columns."""
        return {name: value for name, value in row.items() if name not in ("prompt", self.label_column)}


def recognise(columns: list[str], *, label_field: str | None, source: str) -> Schema:
    """Returns the schema that matches a file's columns. `label_field` overrides the column of the label.

    Raises UserError with the columns and the three schemas if none matches.
    """
    if "prompt" not in columns:
        raise UserError(f"{source}: no known schema has the columns {', '.join(columns)}; expected one of\n{_KNOWN}")
    if label_field is not None and label_field not in columns:
        raise UserError(f"{source}: no column {label_field} (data.label_field) among {', '.join(columns)}")
    if "reward_model" in columns:
        return Schema("verl", label_field or "reward_model", label_required=True)
    if "label" in columns:
        return Schema("slime", label_field or "label", label_required=True)
    found = next((name for name in _TRL_LABELS if name in columns), None)
    return Schema("trl", label_field or found, label_required=label_field is not None)


def kind(value: Any) -> str:
    """Describes the type of a JSON value in words, for error messages."""
    if value is None:
        return "nothing"
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {str: "text", list: "a list", dict: "an object", bool: "a switch", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
