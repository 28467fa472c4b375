"""recover: distil a rewritten model from its dense self, and keep the learned initializers in the Profile."""
