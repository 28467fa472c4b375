"""The engine in process: runs batches for as long as a line of its input says (see ../serve.py)."""

from __future__ import annotations

import json
import sys
import time

from samples import tensors, texts

from trimtab.compiler import load


def main() -> None:
    build, batch, kind, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    engine, given = load(build), (texts(tokens) * batch)[:batch]
    feeds = tensors(batch, tokens)
    print("{}", flush=True)
    for line in sys.stdin:
        cpu, start, samples, seconds = time.process_time(), time.perf_counter(), 0, float(line)
        while (now := time.perf_counter()) - start < seconds:
            engine.run(engine.tokenize(given) if kind == "text" else feeds)
            samples += batch
        now = time.perf_counter()
        told = {"samples": samples, "seconds": now - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(told), flush=True)


main()
