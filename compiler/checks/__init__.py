"""What is looked at before a build may be believed: its numbers, its task, its time, all against the dense model."""
