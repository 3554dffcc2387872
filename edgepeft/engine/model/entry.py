"""The decoder's entry: what adapters put before every sample is there before the first token, outside of packed rows.

Keys and values begin the cache, and embeddings are read in front of the tokens; positions are counted from behind both,
and the mask of a padded batch sees them. A caller need not know of them: it hands in its own tokens, and gets their
hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgepeft.engine.model.prefix import PACKED, PrefixSite
from edgepeft.engine.model.prompt import PromptSite


class DecoderEntry:
    """Runs a decoder with what active adapters put first.

    Args:
        decoder: the inner model; its forward is replaced on the instance.
        embed: from ids to embeddings, as the decoder does it.
        prefixes: by path, one for each layer, in order.
        prompt: embeddings, behind the keys of the prefixes.
        dtype: of keys, values and embeddings.
    """

    def __init__(
        self,
        decoder: nn.Module,
        embed: Any,
        prefixes: Mapping[str, PrefixSite],
        prompt: PromptSite,
        dtype: torch.dtype,
    ) -> None:
        self._config: Any = getattr(decoder, "config", None)
        self._embed = embed
        self._prefixes = list(prefixes.values())
        self._prompt = prompt
        self._dtype = dtype
        self._forward: Any = decoder.forward
        decoder.__dict__["forward"] = self._run

    @property
    def prefix_tokens(self) -> int:
        """Places that active prefixes take."""
        return self._prefixes[0].tokens if self._prefixes else 0

    def _run(self, *arguments: Any, **options: Any) -> Any:
        keys, rows = self.prefix_tokens, self._prompt.tokens
        if not keys + rows or self._config._attn_implementation == PACKED:
            return self._forward(*arguments, **options)
        if arguments:
            options["input_ids"], *rest = arguments
            if rest:
                raise TypeError("with what stands before a sample, everything but input_ids is given by name")
        cache = options.get("past_key_values")
        begins = cache is None or not cache.get_seq_length()
        if begins and keys:
            cache = DynamicCache() if cache is None else cache
            given = options.get("input_ids")
            self._fill(cache, len(options["inputs_embeds"] if given is None else given))
            options["past_key_values"] = cache
        mask, positions = options.get("attention_mask"), options.get("position_ids")
        if mask is not None:
            options["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], keys + rows), mask], dim=1)
        if positions is not None:
            positions = positions + (keys + rows)
            if begins and rows:
                first = torch.arange(keys, keys + rows, device=positions.device)
                positions = torch.cat([first.expand(*positions.shape[:-1], -1), positions], dim=-1)
            options["position_ids"] = positions
        if not (begins and rows):
            return self._forward(**options)
        options["inputs_embeds"] = self._with_prompt(options.pop("input_ids", None), options.get("inputs_embeds"))
        out = self._forward(**options)
        out.last_hidden_state = out.last_hidden_state[:, rows:]
        return out

    def _fill(self, cache: Any, count: int) -> None:
        for layer, site in enumerate(self._prefixes):
            keys, values = (x.to(self._dtype).transpose(0, 1).expand(count, -1, -1, -1) for x in site.keys_and_values())
            cache.update(keys, values, layer)

    def _with_prompt(self, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        own: Tensor = self._embed(ids) if embeddings is None else embeddings
        return torch.cat([self._prompt.rows().to(own.dtype).expand(own.shape[0], -1, -1), own], dim=1)
