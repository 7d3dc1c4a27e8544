"""The schemas of data files: which columns hold the prompt and the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.errors import UserError

Row = dict[str, Any]
Message = dict[str, str]
SchemaName = Literal["slime", "verl", "trl"]
_TRL_LABELS = ("solution", "answer", "ground_truth")
_MEDIA = ("image", "images", "picture", "pictures", "video", "videos", "audio", "audios", "decoded_image")
"""Columns that hold media in published data sets."""
_PARTS = ("image", "image_url", "video", "video_url", "audio", "input_audio", "input_image")
"""Types of a message's parts that are no text."""
_WHOLE = "responses_create_params"
"""A column that rows of NeMo Gym have. Gym's servers read the rest of the row, its label included."""
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
        """Returns the prompt as text or as chat messages. Raises ValueError with the column, also for a row with
        pictures or other media, which no supported model sees."""
        _refuse_media(row)
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
        """Returns the other columns, and for a row of NeMo Gym the label too."""
        left_out = ("prompt",) if _WHOLE in row else ("prompt", self.label_column)
        return {name: value for name, value in row.items() if name not in left_out}


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


def _refuse_media(row: Row) -> None:
    for name, value in row.items():
        if name == "prompt" and isinstance(value, list):
            parts = [message.get("content") for message in value if isinstance(message, dict)]
            found = any(_is_medium(part) for content in parts if isinstance(content, list) for part in content)
        else:
            first = value[0] if isinstance(value, list) and value else value
            found = (name in _MEDIA and value not in (None, "", [], {})) or _is_medium(first)
        if found:
            raise ValueError(
                f"column {name}: the row has a picture or another medium, and only text is trained on. Remove such "
                "rows; if the text alone makes sense, remove the column"
            )


def _is_medium(value: Any) -> bool:
    """Whether a value is a file as the library datasets stores it, or a part of a message that is no text."""
    if not isinstance(value, dict):
        return False
    if set(value) >= {"bytes", "path"} and (value["bytes"] or value["path"]):
        return True
    return value.get("type") in _PARTS and value.get(value["type"], True) is not None


def kind(value: Any) -> str:
    """Describes the type of a JSON value in words, for error messages."""
    if value is None:
        return "nothing"
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {str: "text", list: "a list", dict: "an object", bool: "a switch", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
