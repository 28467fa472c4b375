"""magic-pyramid: a classifier whose unimportant tokens leave on the way up, and whose samples leave once it is sure."""
