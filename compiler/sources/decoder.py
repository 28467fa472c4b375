"""Wraps a causal language model and its cache into a module whose inputs and outputs are plain tensors.

Attention is exported as one op, com.microsoft GroupQueryAttention, as ONNX Runtime GenAI's builder writes it. If past
and present share one buffer, the op appends to the cache in place, so a step copies no cache. Inputs and outputs have
the names that GenAI expects.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trimtab.compiler.decoder_cache import LOGITS, PAST, PRESENT
from trimtab.compiler.sources.torch_export import OTHER_MEANS, export_module
from trimtab.passes.errors import ModelError

log = logging.getLogger(__name__)

_ATTENTION = "trimtab_cached"


def why_uncached(model: transformers.PreTrainedModel) -> str | None:
    """Why `model` cannot be exported with its cache, or None if it can. The model runs once, on a few tokens."""
    if not getattr(model.config.get_text_config(), "num_attention_heads", None):
        return "its config has no attention heads"
    if _head_dim(model) % 8:
        return f"its heads are {_head_dim(model)} wide, and ONNX Runtime's attention takes multiples of 8"
    decoder = Decoder(model)
    try:
        with torch.no_grad(), decoder.attending():
            decoder(*decoder.examples())
    except ModelError as error:
        return error.message
    except Exception:  # any: a model's forward may not know these arguments
        log.debug("a step with a cache failed", exc_info=True)
        return "it does not run with positions and a cache of keys and values"
    return None


def _head_dim(model: transformers.PreTrainedModel) -> int:
    config = model.config.get_text_config()
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _op_attributes(arguments: Mapping[str, Any]) -> dict[str, float | int]:
    """Attributes of the op for optional `arguments` of a model's attention, such as a sliding window.

    Raises:
        ModelError: the op does not support an argument.
    """
    attributes: dict[str, float | int] = {}
    if arguments.get("s_aux") is not None or arguments.get("position_bias") is not None:
        raise ModelError("its attention has sinks or a bias by position, which ONNX Runtime's op does not have")
    if arguments.get("softcap"):
        attributes["softcap"] = float(arguments["softcap"])
    if arguments.get("sliding_window"):
        attributes["local_window_size"] = int(arguments["sliding_window"])
    return attributes


class _StepCache(transformers.Cache):
    """Returns new keys and values unchanged, since the attention op joins them with the past."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.count = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, **kwargs: Any) -> int:
        return 0


class Decoder(torch.nn.Module):
    """Maps input_ids, attention_mask, and past keys and values to logits, and present keys and values.

    The mask is [batch, past + new], 1 for real tokens. Rows may have different lengths: padding follows the prompt, and
    the next token overwrites it.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.layers = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim = _head_dim(model)
        pairs = [(f"{PAST}{i}.{part}", f"{PRESENT}{i}.{part}") for i in range(self.layers) for part in ("key", "value")]
        self.inputs = ("input_ids", "attention_mask", *(past for past, _ in pairs))
        self.outputs = (LOGITS, *(present for _, present in pairs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        lengths = attention_mask.sum(-1)
        # Summing the mask's past columns would fail: ONNX Runtime's sum over zero columns has no rows.
        before = lengths - attention_mask[:, total - tokens :].sum(-1)
        positions = before[:, None] + torch.arange(tokens, device=input_ids.device)
        self._past = past
        self._present: list[Tensor] = []
        self._last = (lengths - 1).to(torch.int32)
        self._total = torch.full((1,), total, dtype=torch.int32)
        result = self.model(
            input_ids=input_ids, position_ids=positions, past_key_values=_StepCache(self.layers), use_cache=True
        )
        if len(self._present) != 2 * self.layers:
            raise ModelError("its attention does not go through transformers' attention interface")
        return (result.logits, *self._present)

    def _attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, *,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend with the exported op, as an attention function of transformers.

        Args:
            query, key, value: [batch, heads, tokens, head_dim].

        Returns:
            Output [batch, tokens, heads, head_dim], and None in place of attention weights.
        """
        heads, width = query.shape[1], query.shape[3]
        layer = len(self._present) // 2
        flat = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
        past_key, past_value = self._past[2 * layer : 2 * layer + 2]
        batch, kv_heads, past, _ = past_key.shape
        shape = (batch, kv_heads, past + query.shape[2], width)
        out, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*flat, past_key, past_value, self._last, self._total],
            {
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": width**-0.5 if scaling is None else scaling,
                **_op_attributes(kwargs),
            },
            dtypes=[query.dtype] * 3,
            shapes=[flat[0].shape, shape, shape],
            version=1,
        )
        self._present += present
        return out.unflatten(2, (heads, width)), None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Make `_attend` the model's attention within the body."""
        transformers.AttentionInterface.register(_ATTENTION, self._attend)
        transformers.AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
        original = self.model.config._attn_implementation
        self.model.set_attn_implementation(_ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(original)

    def examples(self) -> tuple[Tensor, ...]:
        """One example per input. torch treats none of their sizes as a constant."""
        batch, tokens, past = 2, 3, 5
        # Each cache is a separate tensor, since torch treats a tensor that occurs twice as one input.
        cache = [torch.zeros(batch, self.kv_heads, past, self.head_dim) for _ in range(2 * self.layers)]
        ids = torch.ones(batch, tokens, dtype=torch.int64)
        return ids, torch.ones(batch, past + tokens, dtype=torch.int64), *cache

    def export(self, path: Path) -> None:
        """Write the ONNX file. Its dynamic dimensions are called "batch", "tokens", "past" and "total"."""
        steps = [{0: "batch", 1: "tokens"}, {0: "batch", 1: "total"}]
        with self.attending():
            export_module(
                self,
                self.examples(),
                path,
                dynamic_shapes=(*steps, tuple([{0: "batch", 2: "past"}] * (2 * self.layers))),
                input_names=self.inputs,
                output_names=self.outputs,
                name=type(self.model).__name__,
                hint=OTHER_MEANS,
            )
