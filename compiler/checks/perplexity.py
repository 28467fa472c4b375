"""How well a compiled language model predicts text beside its dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from scipy.special import log_softmax

from trimtab.compiler.checks.kinds.result import Result
from trimtab.compiler.feeds import Run
from trimtab.passes.errors import DataError


class Perplexity(Result):
    """Perplexity on held-out text, and how near the two distributions are.

    Attributes:
        samples: texts; tokens: predicted tokens in them, all but the first of each.
        dense, compiled: exp of the mean negative log-likelihood of a token.
        agreement: share of tokens at which both models predict the same likeliest token.
        divergence: mean KL(dense ‖ compiled) of the predicted distributions, in nats.
    """

    kind: Literal["perplexity"] = "perplexity"
    tokens: int
    dense: float
    compiled: float
    agreement: float
    divergence: float

    @property
    def measured(self) -> str:
        return "dense by compiled perplexity"

    @property
    def score(self) -> float:
        """1 for a model as good as the dense one, below for a worse one."""
        return self.dense / self.compiled

    def lines(self) -> list[str]:
        return [
            f"perplexity on {self.tokens} tokens of {self.samples} texts: "
            f"dense {self.dense:.3f}, compiled {self.compiled:.3f} ({self.compiled / self.dense - 1:+.2%})",
            f"same likeliest token at {self.agreement:.2%}; divergence {self.divergence:.4g} nats",
        ]


def measure_perplexity(feeds: Iterable[Mapping[str, np.ndarray]], dense: Run, compiled: Run) -> Perplexity:
    """Run both models on whole texts, each in one call, and compare the predicted distributions at each token.

    Args:
        feeds: batches with `input_ids` and `attention_mask`, [samples, tokens].

    Raises:
        DataError: no text has two tokens.
    """
    samples, totals = 0, np.zeros(5)  # tokens, nll of dense and of compiled, same token, divergence
    worst, max_loss = None, -math.inf  # sample with the largest loss of log-probability per token, and that loss
    for feed in feeds:
        following = feed["input_ids"][:, 1:]
        real = feed["attention_mask"][:, 1:] != 0
        theirs, ours = (_log_probabilities(run(feed)["logits"], real) for run in (dense, compiled))
        at = (np.arange(len(theirs)), following[real])
        same = theirs.argmax(-1) == ours.argmax(-1)
        divergences = (np.exp(theirs) * (theirs - ours)).sum()
        totals += len(theirs), -theirs[at].sum(), -ours[at].sum(), same.sum(), divergences
        lost = np.bincount(np.nonzero(real)[0], theirs[at] - ours[at], len(real)) / np.maximum(real.sum(1), 1)
        if len(theirs) and lost.max() > max_loss:
            worst, max_loss = samples + int(lost.argmax()), float(lost.max())
        samples += len(feed["input_ids"])
    tokens = int(totals[0])
    if not tokens:
        raise DataError("no text of the data has two tokens, so there is none to predict", hint="give longer texts")
    nll_dense, nll_compiled, agreement, divergence = (float(total) / tokens for total in totals[1:])
    return Perplexity(
        samples=samples, tokens=tokens, dense=_exp(nll_dense), compiled=_exp(nll_compiled),
        agreement=agreement, divergence=divergence, worst=worst,
    )  # fmt: skip


def _exp(nll: float) -> float:
    """exp, limited to what double precision can hold."""
    return math.exp(min(nll, 700.0))


def _log_probabilities(logits: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Log-probabilities of the next token at each token that has one: [real tokens, vocabulary], float64."""
    log_probabilities: np.ndarray = log_softmax(logits[:, :-1][real].astype(np.float64), axis=-1)
    return log_probabilities
