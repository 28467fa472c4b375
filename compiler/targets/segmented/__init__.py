"""The one executor of models in several segments: a session, TensorRT's engines, a rank's part, segments with exits.

`route` says which tensor goes where, `segment` what a segment is, `runner` runs them, and `hook` and `compaction` are
what may be done between two of them. A Triton repository carries these modules; they need numpy and nothing else.
"""
