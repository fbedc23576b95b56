"""Adapted layers: the modules that run the op in a model."""
