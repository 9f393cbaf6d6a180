"""Errors that end a command of `dat-serve` with one line that says what to change."""


class CommandError(Exception):
    """The command cannot do its work; the message says what to change."""


class StartupError(CommandError):
    """The server cannot start."""
