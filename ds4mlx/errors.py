"""The one exception of expected failures; the command line prints it as a single line."""


class DataError(ValueError):
    """The data, the model or the environment is at fault.

    The message is one sentence that names the file, the tensor and the cause.
    """
