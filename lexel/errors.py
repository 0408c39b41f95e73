"""Errors that are the user's to mend: commands print them as one sentence and exit with code 2."""


class LexelError(Exception):
    """A wrong input, path, name or combination; the message names the value and the fix."""
