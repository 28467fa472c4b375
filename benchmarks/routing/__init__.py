"""What lte.py measures: routed FFNs of encoders, of decoders, and of the shapes of a model of 7 B."""
