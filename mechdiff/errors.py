"""What a user can get wrong, one class per kind.

Every message is one line that names the value, the allowed range and the configuration key. The command line
prints that line and exits with code 2.
"""


class UsageError(ValueError):
    """A mistake in what the user asked for; never a fault of this library."""


class ConfigError(UsageError):
    """A value in the configuration is out of range or contradicts another."""


class PairError(UsageError):
    """The two models cannot be loaded, or cannot be compared as asked."""


class PromptError(UsageError):
    """A prompt file is missing, malformed or does not hold what is needed."""


class SiteError(UsageError):
    """An activation site does not exist in the model."""


class StoreError(UsageError):
    """An activation store is missing, belongs to something else, or holds too little."""


class ActivationError(UsageError):
    """An activation is NaN or infinite."""


class FitError(UsageError):
    """A map cannot be fitted to what it was given."""


class FewPromptsError(FitError):
    """Too few prompts for what is to be estimated."""


class CheckpointError(UsageError):
    """A checkpoint is missing or belongs to another pair, layer or class."""


class HandleError(UsageError):
    """A handle cannot be exported, or its file is missing, malformed or made for another model."""
