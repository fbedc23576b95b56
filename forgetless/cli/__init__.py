"""The ``forgetless`` command."""
