"""Concurrent clients over HTTP in one loop: each sends a sample, waits for its answer, and sends the next.

Requests are made before, by tritonclient, and sent as they are, so that the loop costs little (see ../serve.py).
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

import numpy as np
import tritonclient.http as triton
from samples import COUNT, tensors, texts


def requests(model: str, kind: str, tokens: int) -> list[bytes]:
    """`COUNT` requests of one sample each, with headers."""
    made = []
    feeds, said = tensors(COUNT, tokens), texts(tokens)
    for i in range(COUNT):
        if kind == "text":
            arrays = {"TEXT": np.array([[said[i].encode()]], object)}
        else:
            arrays = {name: value[i : i + 1] for name, value in feeds.items()}
        inputs = []
        for name, array in arrays.items():
            inputs.append(triton.InferInput(name, array.shape, "BYTES" if kind == "text" else "INT64"))
            inputs[-1].set_data_from_numpy(array)
        output = triton.InferRequestedOutput("EMBEDDING" if kind == "text" else "sentence_embedding")
        body, size = triton.InferenceServerClient.generate_request_body(inputs, outputs=[output])
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += f"Inference-Header-Content-Length: {size}\r\nContent-Type: application/octet-stream\r\n\r\n"
        made.append(head.encode() + body)
    return made


class Connection:
    """One client."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received, self.wanted = b"", 0

    def answered(self) -> bool:
        """Read what has come; True where it completes an answer.

        Raises:
            RuntimeError: the answer is an error.
        """
        self.received += self.socket.recv(1 << 16)
        if not self.wanted:
            head, end, _ = self.received.partition(b"\r\n\r\n")
            if not end:
                return False
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(self.received.decode(errors="replace"))
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self.wanted = len(head) + len(end) + int(length)
        if len(self.received) < self.wanted:
            return False
        self.received, self.wanted = b"", 0
        return True


def main() -> None:
    port, model, kind, count, tokens = int(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:6])
    made = requests(model, kind, tokens)
    waiting = selectors.DefaultSelector()
    connections = [Connection(port) for _ in range(count)]
    for connection in connections:
        waiting.register(connection.socket, selectors.EVENT_READ, connection)
    print("{}", flush=True)
    for line in sys.stdin:
        cpu, start, seconds, sent, samples = time.process_time(), time.perf_counter(), float(line), 0, 0
        for connection in connections:
            connection.socket.sendall(made[sent % COUNT])
            sent += 1
        while samples < sent:
            for key, _ in waiting.select():
                if not key.data.answered():
                    continue
                samples += 1
                if time.perf_counter() - start < seconds:
                    key.data.socket.sendall(made[sent % COUNT])
                    sent += 1
        now = time.perf_counter()
        told = {"samples": samples, "seconds": now - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(told), flush=True)


main()
