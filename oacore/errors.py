"""The one exception that users see as a message instead of a traceback."""


class UserError(Exception):
    """Bad input: config, file, model or prompt.

    The message names the key or path, the value found and what is allowed, in that order.
    The command line and the workflow scripts print it alone and exit with status 2.
    """
