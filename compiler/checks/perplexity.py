"""How well a compiled language model predicts text beside its dense self."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import log_softmax

from trimtab.compiler.feeds import Run
from trimtab.passes.errors import DataError


class Perplexity(BaseModel):
    """Perplexity on held-out text, and how near the two distributions are.

    Attributes:
        samples: texts; tokens: predicted tokens in them, all but the first of each.
        dense, compiled: exp of the mean negative log-likelihood of a token.
        agreement: share of tokens for which both find the same one likeliest.
        divergence: mean KL(dense ‖ compiled) of the predicted distributions, in nats.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["perplexity"] = "perplexity"
    samples: int
    tokens: int
    dense: float
    compiled: float
    agreement: float
    divergence: float

    @property
    def score(self) -> float:
        """1 for a model as good as the dense one, below for a worse one."""
        return self.dense / self.compiled


def measure_perplexity(feeds: Iterable[Mapping[str, np.ndarray]], dense: Run, compiled: Run) -> Perplexity:
    """Run both models over texts that are read at once, and compare what they expect at each token.

    Args:
        feeds: batches with `input_ids` and `attention_mask`, [samples, tokens].

    Raises:
        DataError: no text has two tokens.
    """
    samples, totals = 0, np.zeros(5)  # tokens, nll of dense and of compiled, same token, divergence
    for feed in feeds:
        samples += len(feed["input_ids"])
        following = feed["input_ids"][:, 1:]
        real = feed["attention_mask"][:, 1:] != 0
        theirs, ours = (_expected(run(feed)["logits"], real) for run in (dense, compiled))
        at = (np.arange(len(theirs)), following[real])
        same = theirs.argmax(-1) == ours.argmax(-1)
        apart = (np.exp(theirs) * (theirs - ours)).sum()
        totals += len(theirs), -theirs[at].sum(), -ours[at].sum(), same.sum(), apart
    tokens = int(totals[0])
    if not tokens:
        raise DataError("no text of the data has two tokens, so there is none to predict")
    nll_dense, nll_compiled, agreement, divergence = (float(total) / tokens for total in totals[1:])
    return Perplexity(
        samples=samples, tokens=tokens, dense=math.exp(nll_dense), compiled=math.exp(nll_compiled),
        agreement=agreement, divergence=divergence,
    )  # fmt: skip


def _expected(logits: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Log-probabilities of the token that follows each, where there is one: [real tokens, vocabulary], float64."""
    found: np.ndarray = log_softmax(logits[:, :-1][real].astype(np.float64), axis=-1)
    return found
