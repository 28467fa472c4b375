"""Packages of a build in the formats of other programs."""
