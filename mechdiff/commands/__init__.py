"""The verbs of the `mechdiff` command, one module each."""
