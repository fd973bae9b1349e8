"""The error of the commands that do without Lightning."""


class UserError(Exception):
    """A user's mistake, told in one line that says what, where and what to do.

    Commands that import Lightning raise its `MisconfigurationException`, as Lightning itself does; its import takes
    seconds, which `study` and `compare` have no other use for.
    """
