"""The dialect: the few ops that ONNX lacks, one folder per op.

An op's folder holds its schema, its reference body in standard ONNX ops, and its kernels; one op is one kernel launch.
"""

DOMAIN = "trimtab"
"""The ONNX operator-set domain of every op declared here."""

__all__ = ["DOMAIN"]
