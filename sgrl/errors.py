"""The errors that a user can mend."""


class UserError(Exception):
    """Something that the user gave, or that the machine lacks, stands in the way.

    Its message is one line that says what to do (or several such lines, one for each mistake). The
    command prints it without a traceback and ends with exit status 2.
    """
