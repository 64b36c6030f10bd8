"""Sampling from a MusicLM with a key-value cache: the speed of every rollout, and the distribution that everyone scores.

A row's random numbers come from its own seed, so a clip does not depend on its batch mates (up to floating point). LoRA is
folded into the weights once a call (one matrix product a layer), so an adapted policy samples as fast as its base. Guidance
follows Ho and Salimans 2022 (arXiv:2207.12598): logits = null + cfg_coef * (conditional - null).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from base_models.conditions import Conditions
from base_models.errors import UserError
from base_models.lm import MusicLM, sum_by_step
from base_models.patterns import delay_mask, n_steps, undelay


@dataclass(frozen=True)
class Generation:
    """codes [B, K, T]; code_logps [B, K, T] and logps [B, S] in nats, under exactly the distribution that was sampled;
    hidden [B, S, d], the trunk states, indexed like MusicLM.hidden (of the conditional half under guidance); choice_logps [B, K, T, V] of
    every code that could have stood there (V = 0 unless they were asked for)."""

    codes: Tensor
    code_logps: Tensor
    logps: Tensor
    hidden: Tensor
    choice_logps: Tensor


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
    with_choices: bool = False,
) -> Generation:
    """Sample codes [B, K, T] for B conditions.

    Args: n_frames: T. seeds: one int a row. temperature > 0. top_k: keep the k likeliest codes of each book (0 keeps all).
    cfg_coef: guidance, 1 is none and costs one pass a step, else two. greedy: take the likeliest code (temperature unused).
    with_choices: keep the log-probs of all V choices, 4 B K T V bytes.
    Raises UserError where a policy or its settings leave no probabilities to draw by.
    """
    if len(seeds) != len(cond):
        raise ValueError(f"{len(seeds)} seeds for {len(cond)} conditions")
    if n_frames < 1 or temperature <= 0 or not 0 <= top_k <= lm.card:
        raise ValueError(f"n_frames {n_frames} >= 1, temperature {temperature} > 0 and 0 <= top_k {top_k} <= {lm.card} are needed")
    guided = cfg_coef != 1.0
    B, K, S = len(cond), lm.n_q, n_steps(lm.n_q, n_frames)
    stepper = Stepper(lm, Conditions.cat([cond, cond.null()]) if guided else cond, S)
    device = stepper.device
    uniform = _uniforms(seeds, K, S).to(device, wide(device))
    valid = delay_mask(K, n_frames, device)
    tokens = torch.full((B, K), lm.special, device=device)
    steps = torch.full((B, K, S), 0, dtype=torch.long, device=device)
    logps = torch.zeros((B, K, S), device=device)
    hidden = torch.empty((B, S, lm.config.d_model), device=device)
    choices = torch.empty((B, K, n_frames, lm.card if with_choices else 0), device=device)
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
        if with_choices:
            for k in range(max(0, s - n_frames + 1), min(K, s + 1)):
                choices[:, k, s - k] = log_probs[:, k]
    code_logps = undelay(logps)
    if not bool(torch.isfinite(code_logps).all()):
        got = f"probabilities that are no numbers at temperature {temperature:g} and guidance {cfg_coef:g}"
        raise UserError(got, "finite weights and settings near 1", "ask for others, or look at the weights of policy and adapters")
    return Generation(undelay(steps), code_logps, sum_by_step(code_logps), hidden, choices)


def filtered_log_probs(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """logits [..., V] -> log-probs after temperature and top-k: what is sampled is what is scored."""
    logits = logits.float() / temperature
    if top_k:
        floor = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits.log_softmax(-1)


def wide(device: torch.device) -> torch.dtype:
    """The widest floating point that a device has: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _uniforms(seeds: Sequence[int], K: int, S: int) -> Tensor:
    """[B, K, S] numbers in [0, 1), row b from seed b alone and, step by step, independent of the length S."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.rand((S, K), generator=generator, dtype=torch.float64).T)
    return torch.stack(rows)


def _draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function: log_probs [B, K, V], uniform [B, K] -> ids [B, K], never one of probability 0."""
    cumulative = log_probs.exp().cumsum(-1, dtype=wide(log_probs.device))
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


class Matrix:
    """y = x W^T for a weight [out, in] that many small batches of `rows` rows pass through.

    On a CPU in float32 the weight is laid out once for oneDNN, whose kernels take 16 rows 2.2 times as fast as the general
    product that F.linear calls (AMD Zen 5, one core), and which applies GELU or adds the residual without another pass.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = weight.detach()
        packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows) if packs and rows > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        if self.packed is None:
            return F.linear(x, self.weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T."""
        if self.packed is None:
            return residual + F.linear(x, self.weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, None, "add")
        return y

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(x W^T), exact (not its tanh approximation)."""
        if self.packed is None:
            return F.gelu(F.linear(x, self.weight))
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "gelu", [], "none")
        return y


@dataclass
class Layer:
    """A decoder layer as the stepper wants it. Caches: keys [B * H, d / H, S], values [B * H, S, d / H], cross_* likewise."""

    qkv: Matrix
    out: Matrix
    cross_q: Matrix
    cross_out: Matrix
    fc1: Matrix
    fc2: Matrix
    feed: Callable[[Matrix, Tensor], Tensor]
    norms: tuple[Any, Any, Any]
    keys: Tensor
    values: Tensor
    cross_keys: Tensor
    cross_values: Tensor


class Stepper:
    """One decoder step at a time with preallocated caches; numerically the same network as `MusicLM.hidden`.

    It reads the weights when made: make a new one after every update of the policy.
    """

    def __init__(self, lm: MusicLM, cond: Conditions, max_steps: int) -> None:
        decoder: Any = lm.decoder.model.decoder
        self.device = decoder.layer_norm.weight.device
        self.n_heads, self.n_q, self.time = lm.config.n_heads, lm.n_q, 0
        cond = cond.to(self.device)
        memory, mask = lm.memory(cond)
        B, M, D = memory.shape
        H, W = self.n_heads, D // self.n_heads
        self.hidden_places = torch.where(mask, 0.0, -torch.inf).to(memory.dtype).repeat_interleave(H, 0)[:, None]  # [B * H, 1, M]
        self.embedding = torch.cat([table.weight for table in decoder.embed_tokens])  # [K * (V + 1), D]
        self.first_rows = torch.arange(lm.n_q, device=self.device) * (lm.card + 1)
        self.head = Matrix(torch.cat([effective_weight(head) for head in lm.decoder.lm_heads]), B)  # [K * V, D]
        self.norm = decoder.layer_norm
        self.positions = lm.positions(cond, max_steps)  # [1 or B, S, D]

        def heads_of(weight: Tensor) -> Tensor:
            """Keys or values of the memory, [B * H, M, d / H]."""
            return F.linear(memory, weight).view(B, M, H, W).transpose(1, 2).reshape(B * H, M, W)

        self.layers = []
        for layer in decoder.layers:
            own, cross = layer.self_attn, layer.encoder_attn
            q, k, v = (effective_weight(p) for p in (own.q_proj, own.k_proj, own.v_proj))
            self.layers.append(
                Layer(
                    qkv=Matrix(torch.cat([q * W**-0.5, k, v]), B),
                    out=Matrix(effective_weight(own.out_proj), B),
                    cross_q=Matrix(effective_weight(cross.q_proj) * W**-0.5, B),
                    cross_out=Matrix(effective_weight(cross.out_proj), B),
                    fc1=Matrix(effective_weight(layer.fc1), B),
                    fc2=Matrix(effective_weight(layer.fc2), B),
                    feed=_feed(layer.activation_fn),
                    norms=(layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm),
                    keys=memory.new_empty((B * H, W, max_steps)),
                    values=memory.new_empty((B * H, max_steps, W)),
                    cross_keys=heads_of(effective_weight(cross.k_proj)).transpose(1, 2).contiguous(),
                    cross_values=heads_of(effective_weight(cross.v_proj)),
                )
            )

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [B, K] of the step before (the special token at first) -> trunk state [B, d] that predicts the next."""
        now, D = self.time, self.embedding.shape[1]
        rows, width = len(tokens) * self.n_heads, D // self.n_heads
        x = F.embedding_bag(tokens + self.first_rows, self.embedding, mode="sum") + self.positions[:, now]
        for layer in self.layers:
            norm_self, norm_cross, norm_feed = layer.norms
            q, k, v = layer.qkv(norm_self(x)).view(-1, 3, D).unbind(1)
            layer.keys[:, :, now], layer.values[:, now] = k.reshape(rows, width), v.reshape(rows, width)
            attention = torch.bmm(q.reshape(rows, 1, width), layer.keys[:, :, : now + 1]).softmax(-1)
            x = layer.out.plus(torch.bmm(attention, layer.values[:, : now + 1]).view(-1, D), x)
            q = layer.cross_q(norm_cross(x)).view(rows, 1, width)
            attention = torch.baddbmm(self.hidden_places, q, layer.cross_keys).softmax(-1)
            x = layer.cross_out.plus(torch.bmm(attention, layer.cross_values).view(-1, D), x)
            x = layer.fc2.plus(layer.feed(layer.fc1, norm_feed(x)), x)
        self.time += 1
        state: Tensor = self.norm(x)
        return state

    def logits(self, state: Tensor) -> Tensor:
        """Trunk state [B, d] -> logits [B, K, V]."""
        return self.head(state).view(len(state), self.n_q, -1)


def _feed(activation: Any) -> Callable[[Matrix, Tensor], Tensor]:
    """How the first matrix of a feed-forward block and its activation are applied: as one, where it is the exact GELU."""
    probe = torch.linspace(-4, 4, 9)
    if torch.equal(activation(probe), F.gelu(probe)):
        return Matrix.gelu
    return lambda matrix, x: activation(matrix(x))
