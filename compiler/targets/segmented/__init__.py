"""The executor of models in segments: one session, TensorRT's engines, a shard's sessions, segments with exits.

`segment` defines a segment, `route` maps tensors between segments, `runner` runs the segments, and `hook` and
`compaction` act between two segments. A Triton repository carries these modules; they need numpy and nothing else.
"""
