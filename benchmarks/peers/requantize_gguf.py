"""A GGUF file in other types: requantize_gguf.py IN.gguf OUT.gguf Q8_0|Q4_0

Runs in an interpreter that has llama-cpp-python. Every matrix gets the one type, as `llama-quantize --pure` has it.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as api

TYPES = {"Q4_0": 2, "Q8_0": 7}


def main(source: str, out: str, form: str) -> None:
    options = api.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.pure = TYPES[form], True, True
    code = api.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options))
    if code:
        sys.exit(f"llama_model_quantize: {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
