"""Why a command of `dat-serve` ends with one line instead of its work."""


class CommandError(Exception):
    """The command cannot do its work; the message says what to change."""


class StartupError(CommandError):
    """The server cannot start."""
