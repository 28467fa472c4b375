"""Checks of a build against its dense model: the numbers of its outputs, its task quality, its time and its cost."""
