"""What the command line ends with when the user must change something."""


class UserError(Exception):
    """One clear line naming the flag, variable, key or path and what is allowed. Exit code 2."""
