"""The first request to a server: it shows that the server answers, and how to send requests."""

from __future__ import annotations

import http.client
import json
import shlex
import urllib.error
import urllib.request
from dataclasses import dataclass

from trimtab.compiler.packaging.triton import Package
from trimtab.passes.errors import TargetError

_ANSWER_S = 300.0
_SHOWN = 200  # characters of an answer
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would connect to its own localhost


@dataclass(frozen=True)
class Example:
    """A request that was answered.

    Attributes:
        curl: the command line that sends the same request.
        answer: the beginning of the answer.
    """

    curl: str
    answer: str


def first_answer(url: str, package: Package) -> Example:
    """Send a request to the text model of `package` at `url`; without a text model, get the engine's description.

    Raises:
        TargetError: the answer is an error.
    """
    where, body = f"{url}/v2/models/{package.name}/generate", json.dumps({"TEXT": "It works."})
    if package.kind == "score":  # a reranker's texts are pairs
        body = json.dumps({"TEXT": "Does it work?", "TEXT_PAIR": "It works."})
    if package.kind == "text":
        body = json.dumps({"text_input": "Once", "max_tokens": 8})
    if package.kind is None:
        where, body = f"{url}/v2/models/{package.models[0]}", ""
    curl = f"curl -s {where}" + (f" -d {shlex.quote(body)}" if body else "")
    answer = ask(where, body)
    return Example(curl, answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}...")


def ask(url: str, body: str = "", timeout_s: float = _ANSWER_S) -> str:
    """The answer to a GET, or with `body`, to a POST.

    Raises:
        TargetError: the answer is an error, or there is none.
    """
    try:
        with _DIRECT.open(url, body.encode() or None, timeout=timeout_s) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        raise TargetError(f"{url}: {error.code}: {error.read().decode(errors='replace')}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TargetError(f"{url}: no answer ({str(error) or type(error).__name__})") from error
