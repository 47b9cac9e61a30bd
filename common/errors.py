"""The one exception that a user is meant to read."""


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    `cli.run` prints it and exits with status 2; anything else that reaches the user is a bug.
    """


class WrongSizeError(InputError):
    """A picture is not of the size that its annotation tells."""


class NotFiniteError(InputError):
    """Training met an infinite number or none; `report` is what is known of the step, plain types."""

    def __init__(self, message: str, report: dict):
        super().__init__(message)
        self.report = report
