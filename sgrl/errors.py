"""The errors that a user can mend, and any error in one line."""


class UserError(Exception):
    """Something that the user gave, or that the machine lacks, stands in the way.

    Its message is one line that says what to do (or several such lines, one for each mistake). The
    command prints it without a traceback and ends with exit status 2.
    """


def one_line(error: BaseException) -> str:
    """Return what an exception says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
