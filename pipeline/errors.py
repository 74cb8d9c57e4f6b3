"""What can go wrong for a reason outside the code, by what the caller of a command should do about it.

Each module raises its own subclass. A message says what, where, and what to do; the command line turns it into one
line and the exit code, without a traceback.
"""


class InputError(Exception):
    """Bad arguments or bad input: trying again changes nothing. Exit 2."""


class RetryableError(Exception):
    """The run failed but what it committed stands: the same command again goes on from there. Exit 1."""
