"""The one exception that a user of the recipes is meant to read."""


class UserError(Exception):
    """Something in the user's hands is wrong: a config key, a file, a row, a command line.

    The message is one line that says what is wrong, where (file, line, config key) and what
    to do. Recipes print it without a traceback and exit with code 2.
    """
