"""Which tokens of a global batch a method acts on: exact rankings, and the rules that methods state."""

from lpreg.needs import SelectionKind, SelectionRule
from lpreg.selection.ranking import Selection, select_highest, select_lowest
from lpreg.selection.rules import apply_rule

__all__ = ["Selection", "SelectionKind", "SelectionRule", "apply_rule", "select_highest", "select_lowest"]
