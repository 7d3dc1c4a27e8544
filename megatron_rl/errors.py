"""The exception whose message is shown to the user."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do; no traceback is shown."""

    status = 2
    """Exit status of the command. A batch job that ends with 2 is not queued again, since it would fail again."""
