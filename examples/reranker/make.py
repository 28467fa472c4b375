"""A small reranker and its data: python examples/reranker/make.py MODEL TEXTS OUT [STEPS]

MODEL, an encoder, becomes a cross-encoder with one logit, trained to tell the sentence that some keywords come from.
TEXTS is a folder with texts.txt and unseen.txt, as ../texts.py writes it. OUT gets model/, pairs.jsonl and
held_out.jsonl.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STEPS, BATCH, TOKENS = 120, 16, 40
PASSAGES = 8  # for each query; one of them is the sentence that its keywords come from

Pair = dict[str, Any]


def main(model: str, texts: Path, out: Path, steps: int) -> None:
    """Write the model and both files of pairs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rng = random.Random(0)
    learned, unseen = ((texts / name).read_text(encoding="utf-8").splitlines() for name in ("texts.txt", "unseen.txt"))
    pairs = ranked(rng.sample(learned, min(4000, len(learned))), rng)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "pairs.jsonl", pairs)
    write(out / "held_out.jsonl", ranked(unseen, rng)[: 100 * PASSAGES])
    tokenizer = AutoTokenizer.from_pretrained(model)
    reranker = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    train(reranker, tokenizer, pairs, steps, rng)
    reranker.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def ranked(sentences: list[str], rng: random.Random) -> list[Pair]:
    """Queries of three rare words, each with its sentence (score 1) and others (score 0), some near it."""
    counts = Counter(word for text in sentences for word in words(text))
    having = defaultdict(list)
    for text in sentences:
        for word in words(text):
            having[word].append(text)
    pairs = []
    for text in sentences:
        rare = sorted(words(text), key=lambda word: (counts[word], word))[:8]
        keywords = rng.sample(rare, min(3, len(rare)))
        near = [other for word in keywords for other in having[word] if other != text]
        others = {*rng.sample(near, min(PASSAGES // 2, len(near)))}
        while len(others) < PASSAGES - 1:
            others.add(rng.choice(sentences))
        others.discard(text)
        query = " ".join(keywords)
        pairs.append({"query": query, "passage": text, "score": 1.0})
        pairs += [{"query": query, "passage": other, "score": 0.0} for other in sorted(others)]
    return pairs


def words(text: str) -> set[str]:
    """Words of four letters and more."""
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def train(model: Any, tokenizer: Any, pairs: list[Pair], steps: int, rng: random.Random) -> None:
    """Binary cross entropy of the logit; as many pairs of score 1 as of score 0."""
    torch.manual_seed(0)
    model.base_model.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    by_score = [[pair for pair in pairs if pair["score"] == score] for score in (0.0, 1.0)]
    model.train()
    for step in range(steps):
        batch = [pair for same in by_score for pair in rng.sample(same, min(BATCH // 2, len(same)))]
        texts = [[pair[key] for pair in batch] for key in ("query", "passage")]
        inputs = tokenizer(*texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        scores = torch.tensor([pair["score"] for pair in batch])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits[:, 0], scores)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 30 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def write(path: Path, pairs: list[Pair]) -> None:
    """One JSON object a line."""
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], Path(given[1]), Path(given[2]), int(given[3]) if len(given) > 3 else STEPS)
