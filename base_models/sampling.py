"""Sampling from a MusicLM with a key-value cache: the speed of every rollout, and the distribution that everyone scores.

A row's random numbers come from its own seed, so a clip does not depend on its batch mates (up to floating point). LoRA is
folded into the weights once a call (one matrix product a layer), so an adapted policy samples as fast as its base. Guidance
follows Ho and Salimans 2022 (arXiv:2207.12598): logits = null + cfg_coef * (conditional - null).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from base_models.conditions import Conditions
from base_models.lm import MusicLM, sum_by_step
from base_models.patterns import delay_mask, n_steps, undelay


@dataclass(frozen=True)
class Generation:
    """codes [B, K, T]; code_logps [B, K, T] and logps [B, S] in nats, under exactly the distribution that was sampled;
    hidden [B, S, d], the trunk states, indexed like MusicLM.hidden (of the conditional half under guidance)."""

    codes: Tensor
    code_logps: Tensor
    logps: Tensor
    hidden: Tensor


@torch.no_grad()
def generate(
    lm: MusicLM,
    cond: Conditions,
    n_frames: int,
    *,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    cfg_coef: float = 1.0,
    greedy: bool = False,
) -> Generation:
    """Sample codes [B, K, T] for B conditions.

    Args: n_frames: T. seeds: one int a row. temperature > 0. top_k: keep the k likeliest codes of each book (0 keeps all).
    cfg_coef: guidance, 1 is none and costs one pass a step, else two. greedy: take the likeliest code (temperature unused).
    """
    if len(seeds) != len(cond):
        raise ValueError(f"{len(seeds)} seeds for {len(cond)} conditions")
    if n_frames < 1 or temperature <= 0 or not 0 <= top_k <= lm.card:
        raise ValueError(f"n_frames {n_frames} >= 1, temperature {temperature} > 0 and 0 <= top_k {top_k} <= {lm.card} are needed")
    guided = cfg_coef != 1.0
    B, K, S = len(cond), lm.n_q, n_steps(lm.n_q, n_frames)
    stepper = Stepper(lm, Conditions.cat([cond, cond.null()]) if guided else cond, S)
    device = stepper.device
    uniform = _uniforms(seeds, K, S).to(device)
    valid = delay_mask(K, n_frames, device)
    tokens = torch.full((B, K), lm.special, device=device)
    steps = torch.full((B, K, S), 0, dtype=torch.long, device=device)
    logps = torch.zeros((B, K, S), device=device)
    hidden = torch.empty((B, S, lm.config.d_model), device=device)
    for s in range(S):
        state = stepper.step(torch.cat([tokens, tokens]) if guided else tokens)
        hidden[:, s] = state[:B]
        logits = stepper.logits(state)
        if guided:
            logits = logits[B:] + cfg_coef * (logits[:B] - logits[B:])
        log_probs = filtered_log_probs(logits, temperature, top_k)
        picked = log_probs.argmax(-1) if greedy else _draw(log_probs, uniform[:, :, s])
        steps[:, :, s] = picked
        logps[:, :, s] = log_probs.gather(-1, picked[..., None])[..., 0]
        tokens = torch.where(valid[:, s], picked, lm.special)
    code_logps = undelay(logps)
    return Generation(undelay(steps), code_logps, sum_by_step(code_logps), hidden)


def filtered_log_probs(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """logits [..., V] -> log-probs after temperature and top-k: what is sampled is what is scored."""
    logits = logits.float() / temperature
    if top_k:
        floor = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits.log_softmax(-1)


def _uniforms(seeds: Sequence[int], K: int, S: int) -> Tensor:
    """[B, K, S] numbers in [0, 1), row b from seed b alone and, step by step, independent of the length S."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.rand((S, K), generator=generator, dtype=torch.float64).T)
    return torch.stack(rows)


def _draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function: log_probs [B, K, V], uniform [B, K] -> ids [B, K], never one of probability 0."""
    cumulative = log_probs.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0].clamp(max=log_probs.shape[-1] - 1)


def effective_weight(linear: Any) -> Tensor:
    """The matrix that a linear map applies now: its own, plus the active adapters' deltas unless they are switched off."""
    if not isinstance(linear, LoraLayer):
        weight: Tensor = linear.weight
        return weight
    layer: Any = linear
    base: Tensor = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return base
    deltas = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return base + sum(deltas) if deltas else base


class Stepper:
    """One decoder step at a time with preallocated caches; numerically the same network as `MusicLM.hidden`.

    It reads the weights when made: make a new one after every update of the policy.
    """

    def __init__(self, lm: MusicLM, cond: Conditions, max_steps: int) -> None:
        decoder: Any = lm.decoder.model.decoder
        self.device = decoder.layer_norm.weight.device
        self.n_heads = lm.config.n_heads
        cond = cond.to(self.device)
        memory, mask = lm.memory(cond)
        B, M, D = memory.shape
        self.width, self.head_width = D, D // self.n_heads
        self.mask = mask[:, None, None, :]
        self.embedding = torch.stack([table.weight for table in decoder.embed_tokens])  # [K, V + 1, D]
        self.head = torch.cat([effective_weight(head) for head in lm.decoder.lm_heads])  # [K * V, D]
        self.n_q, self.norm, self.time = lm.n_q, decoder.layer_norm, 0
        self.books = torch.arange(lm.n_q, device=self.device)
        self.positions = lm.positions(cond, max_steps)  # [1 or B, S, D]
        self.layers = []
        for layer in decoder.layers:
            own, cross = layer.self_attn, layer.encoder_attn
            split = (B, M, self.n_heads, self.head_width)
            self.layers.append(
                {
                    "qkv": torch.cat([effective_weight(p) for p in (own.q_proj, own.k_proj, own.v_proj)]),
                    "out": effective_weight(own.out_proj),
                    "cross_q": effective_weight(cross.q_proj),
                    "cross_out": effective_weight(cross.out_proj),
                    "cross_k": F.linear(memory, effective_weight(cross.k_proj)).view(split).transpose(1, 2).contiguous(),
                    "cross_v": F.linear(memory, effective_weight(cross.v_proj)).view(split).transpose(1, 2).contiguous(),
                    "fc1": effective_weight(layer.fc1),
                    "fc2": effective_weight(layer.fc2),
                    "norms": (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm),
                    "activation": layer.activation_fn,
                    "keys": memory.new_zeros((B, self.n_heads, max_steps, self.head_width)),
                    "values": memory.new_zeros((B, self.n_heads, max_steps, self.head_width)),
                }
            )

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [B, K] of the step before (the special token at first) -> trunk state [B, d] that predicts the next."""
        B, now = len(tokens), self.time
        x = self.embedding[self.books, tokens].sum(1) + self.positions[:, now]
        for layer in self.layers:
            norm_self, norm_cross, norm_ff = layer["norms"]
            q, k, v = F.linear(norm_self(x), layer["qkv"]).view(B, 3, self.n_heads, self.head_width).unbind(1)
            layer["keys"][:, :, now], layer["values"][:, :, now] = k, v
            past = slice(0, now + 1)
            y = F.scaled_dot_product_attention(q[:, :, None], layer["keys"][:, :, past], layer["values"][:, :, past])
            x = x + F.linear(y.reshape(B, self.width), layer["out"])
            q = F.linear(norm_cross(x), layer["cross_q"]).view(B, self.n_heads, 1, self.head_width)
            y = F.scaled_dot_product_attention(q, layer["cross_k"], layer["cross_v"], attn_mask=self.mask)
            x = x + F.linear(y.reshape(B, self.width), layer["cross_out"])
            x = x + F.linear(layer["activation"](F.linear(norm_ff(x), layer["fc1"])), layer["fc2"])
        self.time += 1
        return self.norm(x)

    def logits(self, state: Tensor) -> Tensor:
        """Trunk state [B, d] -> logits [B, K, V]."""
        return F.linear(state, self.head).view(len(state), self.n_q, -1)
