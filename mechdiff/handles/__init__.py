"""Handles that have left their run: files, and what applies them to a model that knows nothing of a pair."""
