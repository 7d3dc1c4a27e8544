"""The one exception that reaches a user as plain words."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do; it is printed bare."""
