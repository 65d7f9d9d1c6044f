"""The two exceptions that end a command with a message in place of a traceback.

Everything else is left to raise: a traceback is for our own bugs.
"""


class UserError(Exception):
    """A wrong command, key, file or row: one message that names the value, the place and the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A run that cannot go on through no wrong key: a loss that is not a number, a disk that is full.

    The command line prints the message without a traceback and exits with code 1.
    """


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `` Did you mean `x`?`` for the name in ``known`` closest to ``name``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""
