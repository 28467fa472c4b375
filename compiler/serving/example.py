"""The first request, which shows that a server answers, and how to ask it."""

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
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would look for its own localhost


@dataclass(frozen=True)
class Example:
    """A request that was answered.

    Attributes:
        curl: the command line that asks the same.
        answer: its beginning.
    """

    curl: str
    answer: str


def first_answer(url: str, package: Package) -> Example:
    """Ask the text model of `package` at `url`; where there is none, for the description of the engine.

    Raises:
        TargetError: the answer is an error.
    """
    where, body = f"{url}/v2/models/{package.name}/generate", json.dumps({"TEXT": "It works."})
    if package.kind == "score":  # of a reranker, whose texts are pairs
        body = json.dumps({"TEXT": "Does it work?", "TEXT_PAIR": "It works."})
    if package.kind == "text":
        body = json.dumps({"text_input": "Once", "max_tokens": 8})
    if package.kind is None:
        where, body = f"{url}/v2/models/{package.models[0]}", ""
    curl = f"curl -s {where}" + (f" -d {shlex.quote(body)}" if body else "")
    answer = ask(where, body)
    return Example(curl, answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}...")


def ask(url: str, body: str = "", timeout_s: float = _ANSWER_S) -> str:
    """The answer to a GET, or with `body`, a POST.

    Raises:
        TargetError: it is an error, or none came.
    """
    try:
        with _DIRECT.open(url, body.encode() or None, timeout=timeout_s) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        raise TargetError(f"{url}: {error.code}: {error.read().decode(errors='replace')}") from error
    except (OSError, http.client.HTTPException) as error:
        raise TargetError(f"{url}: no answer ({str(error) or type(error).__name__})") from error
