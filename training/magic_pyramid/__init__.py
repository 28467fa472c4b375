"""magic-pyramid: a classifier that prunes tokens layer by layer, and answers samples at the first sure exit."""
