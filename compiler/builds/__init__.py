"""The build directory: written whole or not at all, described by its manifest, verified when it is opened."""
