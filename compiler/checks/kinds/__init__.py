"""What quality is, for each kind of task."""
