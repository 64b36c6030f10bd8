"""One side of benchmarks/ppo_step.py: a trainer in a process of its own, told over its standard input when to do a step.

    python benchmarks/ppo_sides.py encore --batch 16 --frames 125        # then write "step" to it, and read a line of JSON

    encore        rlhf/train_ppo.py's Run: play, judge, learn, with credit by score
    encore-codes  the same with credit code by code, and so with a reward that has a slope, at its full cost (see `sloped`)
    policy-only   the same without reference and critic: what the policy's memory is compared with
    trl-delay     TRL's PPOTrainer over the same LM under its interface of a causal LM: T + K - 1 decoder steps a pass
    trl-llama     TRL's PPOTrainer over a Llama of as many parameters: K * T tokens, one after another

Every side plays and learns alike: the same clips a step, frames, epochs, minibatches, rank of the adapter, threads and number
format, and, but for encore-codes, a reward that costs nothing (the share of odd codes). TRL demands that reference, value and
reward be models: the reference is the policy with its adapter off (TRL's own way with PEFT), the value model a copy of the policy
with a linear head.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import dataclasses
import functools
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import logging
from trl.trainer import utils as trl_utils

if not hasattr(trl_utils, "FusedCausalLMOutput"):  # TRL 1.12 has no fused head yet; flat_policy names the class, PPO never asks for it
    trl_utils.FusedCausalLMOutput = CausalLMOutput

from adapters.lora import LORA_TARGETS, lora_config
from base_models.conditions import Conditions
from base_models.corpus.captions import demo_prompts
from base_models.lm import MusicLM
from base_models.policy import PRETRAINED, Policy, load_policy
from base_models.sampling import generate
from rlhf.flat_policy import IMPOSSIBLE, N_SPECIAL, FlatCausalLM, flat_order, flatten_codes, make_tokenizer, prompt_id
from rlhf.losses import masked_whiten, ppo_policy_loss
from rlhf.ppo_run import Run
from rlhf.reward_features import DESCRIPTORS, FIT, features
from rlhf.reward_heads import Head, make_lens
from rlhf.reward_model import RewardModel
from rlhf.rewards import HUMAN
from rlhf.rollout import prompt_of, sample_seed, score_steps
from rlhf.train_ppo import Config, Task

LLAMA_LORA = r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"


def share_of_odd_codes(codes: Tensor, prompts: list[str]) -> Tensor:
    """The toy reward: codes [B, K, T] -> [B]."""
    return (codes % 2).float().mean((1, 2))


def without_tempo(policy: Policy, prompts: list[str]) -> Conditions:
    """Conditions of the prompts with every tempo unknown: transformers' decoder loop does not know our beat clock."""
    return dataclasses.replace(policy.conditions(prompts), tempo_bpm=torch.full((len(prompts),), float("nan")))


# ---- ours ------------------------------------------------------------------------------------------------------------


def sloped(policy: Policy, prompts: list[str]) -> RewardModel:
    """Five heads over what the demo's reward reads, descriptors and the fit of clip and prompt, with random weights: untrained, and as dear
    as a trained one to ask for its slope."""
    generator = torch.Generator().manual_seed(0)
    head = Head("linear", (DESCRIPTORS, FIT), 1.0)
    codes = torch.randint(0, policy.lm.card, (16, policy.lm.n_q, 50), generator=generator)
    table = features(policy, codes, [prompts[row % len(prompts)] for row in range(16)], head.blocks)
    width = sum(rows.shape[1] for rows in table.values())
    lens = make_lens(head, table, torch.arange(16) // 2)
    return RewardModel(policy, head, lens, torch.randn(5, width, generator=generator), torch.zeros(5), lam=0.5, temperature=1.0)


def our_run(args: argparse.Namespace, policy: Policy, prompts: list[str], credit: Literal["score", "codes"] = "score") -> Run:
    cfg = Config(
        n_frames=args.frames,
        batch_size=args.batch,
        epochs=args.epochs,
        minibatches=args.minibatches,
        precision=args.precision,
        steps=1000,
        credit=credit,
    )
    task = Task(policy.lm, prompts, without_tempo(policy, prompts), share_of_odd_codes, policy.sha256)
    if credit == "codes":
        reward = sloped(policy, prompts)
        task = dataclasses.replace(task, score=reward.score, slopes={HUMAN: reward.slope}, codebooks=policy.codec.codebooks)
    return Run(cfg, task, Accelerator(cpu=True))


def encore(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn, credit: Literal["score", "codes"] = "score") -> None:
    run = our_run(args, policy, prompts, credit)
    turn()
    while True:
        began = time.perf_counter()
        rollout = run.play()
        played = time.perf_counter()
        rollout, _ = run.judge(rollout)
        run.learn(rollout)
        run.step += 1
        turn(play=played - began, **held(run.lm, run.critic, optimizer=run.optimizer))


def policy_only(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    """Sampling and clipped updates of the policy alone: no reference, no critic, so the whitened score is the advantage."""
    run = our_run(args, policy, prompts)
    run.groups = run.groups[:1]
    optimizer = torch.optim.Adam(run.groups[0], lr=run.cfg.lr, eps=1e-5)
    turn()
    while True:
        began = time.perf_counter()
        indices = range(run.clips, run.clips + args.batch)
        rows = prompt_of(indices, len(prompts), 1, 0)
        made = generate(run.lm, run.table.index(rows), args.frames, seeds=[sample_seed(0, i) for i in indices])
        played = time.perf_counter()
        run.clips += args.batch
        mask = torch.ones_like(made.logps, dtype=torch.bool)
        score = share_of_odd_codes(made.codes, prompts)[:, None].expand_as(made.logps)
        advantages = masked_whiten(score.contiguous(), mask)
        for rows_of_update in run._minibatches(args.batch):
            optimizer.zero_grad()
            for part in rows_of_update.split(run.cfg.microbatch):
                cond = run.table.index(torch.tensor(rows)[part])
                scored = score_steps(run.lm, made.codes[part], cond, bf16=run.bf16)
                count = float(rows_of_update.numel() * mask.shape[1])
                loss, _ = ppo_policy_loss(scored.logps, made.logps[part], advantages[part], mask[part], 0.2, count)
                loss.backward()
            optimizer.step()
        run.step += 1
        turn(play=played - began, **held(run.lm, optimizer=optimizer))


def held(*models: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Megabytes that a side holds between two steps: weights, gradients and the optimiser's moments, shared ones once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    tensors += [p.grad for model in models for p in model.parameters() if p.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {"held_mb": sum(storages.values()) / 1e6}


# ---- TRL over the delay pattern --------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """FlatTrunk under the name and with the output that TRL's PPO asks a value model's backbone for."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        states = self.trunk(input_ids, attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


class FlatPolicy(FlatCausalLM):
    """FlatCausalLM that can also sample: transformers' own decoder and cache, T + K - 1 steps, scores as TRL stacks them."""

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **_: Any) -> GenerateDecoderOnlyOutput:
        lm: MusicLM = self.trunk.lm
        K, V, B = lm.n_q, lm.card, len(input_ids)
        T = generation_config.max_new_tokens // K
        memory, mask = lm.memory(self.trunk.table.index(input_ids[:, 0] - prompt_id(0, K, V)))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.full((B, K), lm.special)
        codes = torch.zeros((B, K, T), dtype=torch.long)
        book, frame = flat_order(K, T)
        place = torch.empty((K, T), dtype=torch.long)
        place[book, frame] = torch.arange(K * T)
        scores = torch.full((K * T, B, N_SPECIAL + K * V), IMPOSSIBLE)
        for s in range(T + K - 1):
            states = lm.decoder.model.decoder(
                input_ids=tokens.reshape(B * K, 1),
                encoder_hidden_states=memory,
                encoder_attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1:]
            logits = lm.heads(states)[:, :, 0] / generation_config.temperature  # [B, K, V]
            drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(B, K)
            for k in range(K):
                if 0 <= s - k < T:
                    codes[:, k, s - k] = tokens[:, k] = drawn[:, k]
                    scores[place[k, s - k], :, N_SPECIAL + k * V : N_SPECIAL + (k + 1) * V] = logits[:, k]
                else:
                    tokens[:, k] = lm.special
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, flatten_codes(codes, V)], 1), scores=scores.unbind())


class FlatValue(nn.Module):
    """A value model in TRL's sense: a backbone and a linear `score` on its states."""

    base_model_prefix = "backbone"

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(trunk)
        self.score = nn.Linear(width, 1, bias=False)


class OddShare(nn.Module):
    """The toy reward as TRL wants it: a backbone whose states count the odd ids so far, and a `score` that passes them on."""

    base_model_prefix = "backbone"

    class Counter(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
            odd = ((input_ids % 2).float().cumsum(1) / input_ids.shape[1])[..., None]
            return BaseModelOutput(last_hidden_state=odd, hidden_states=(odd,))

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.score = self.Counter(), nn.Identity()


def trl_delay(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    conditions = without_tempo(policy, prompts)
    value_lm = copy.deepcopy(policy.lm)
    model = FlatPolicy(policy.lm, conditions)
    width = policy.lm.config.d_model + policy.lm.n_q + 1
    value = FlatValue(FlatCausalLM(value_lm, conditions).trunk, width)
    if args.critic == "frozen":
        value.backbone.requires_grad_(False)
    trl_steps(args, policy, prompts, model, value, LORA_TARGETS, turn)


# ---- TRL over a flat Llama -------------------------------------------------------------------------------------------


def trl_llama(args: argparse.Namespace, policy: Policy, prompts: list[str], turn: Turn) -> None:
    """Layers of our width with as many heads; the feed-forward width makes a layer as large as ours with its cross-attention."""
    shape, lm = policy.lm.config, policy.lm
    wanted = sum(p.numel() for p in lm.parameters())
    config = LlamaConfig(
        vocab_size=N_SPECIAL + lm.n_q * lm.card + len(prompts),
        hidden_size=shape.d_model,
        intermediate_size=(4 * shape.d_model**2 + 2 * shape.d_model * shape.d_ff) // (3 * shape.d_model),
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=lm.n_q * args.frames + 8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1,
    )
    torch.manual_seed(0)
    model, value = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    found = sum(p.numel() for p in model.parameters())
    assert abs(found / wanted - 1) < 0.02, f"a Llama of {found} parameters beside our {wanted}"
    model.generation_config.eos_token_id = None  # a clip has a fixed length
    if args.critic == "frozen":
        value.model.requires_grad_(False)
    trl_steps(args, policy, prompts, model, value, LLAMA_LORA, turn)


def trl_steps(args: argparse.Namespace, policy: Policy, prompts: list[str], model: Any, value: Any, targets: str, turn: Turn) -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lm = policy.lm
    K, V = lm.n_q, lm.card
    play = {"seconds": 0.0}
    sample = model.generate

    def timed_sample(**kwargs: Any) -> Any:
        began = time.perf_counter()
        made = sample(**kwargs)
        play["seconds"] = time.perf_counter() - began
        return made

    model.generate = timed_sample

    class Hands(TrainerCallback):
        """Hands over to the benchmark at the beginning and after every step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn(play=play["seconds"], **held(trainer.model, optimizer=trainer.optimizer))

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=args.precision == "bf16",
            gradient_checkpointing=False,  # it would save memory by computing twice
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=args.minibatches,
            num_ppo_epochs=args.epochs,
            total_episodes=args.batch * 10_000,
            response_length=K * args.frames,
            local_rollout_forward_batch_size=args.batch,
            num_sample_generations=0,
            temperature=1.0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": [[prompt_id(row, K, V)] for row in range(len(prompts))]})
        trainer = PPOTrainer(
            args=config,
            processing_class=make_tokenizer(K, V, len(prompts)),
            model=model,
            ref_model=None,
            reward_model=OddShare(),
            value_model=value,
            train_dataset=data,
            peft_config=lora_config(Config.r, Config.alpha, targets),
            callbacks=[Hands()],
        )
        trainer.train()


# ---- whose turn it is ------------------------------------------------------------------------------------------------


class Turn:
    """Called after each step: writes its figures as a line of JSON and waits for the next word; ends the process without one."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed must not stand between the lines of JSON
        self.began: tuple[float, float] | None = None

    def __call__(self, **figures: float) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        if self.began:
            figures |= {"seconds": time.perf_counter() - self.began[0], "cpu_seconds": cpu - self.began[1]}
        self.out.write(json.dumps({**figures, "peak_mb": usage.ru_maxrss / 1e3}) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            sys.exit()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.began = (time.perf_counter(), usage.ru_utime + usage.ru_stime)


SIDES: dict[str, Callable[[argparse.Namespace, Policy, list[str], Turn], None]] = {
    "encore": encore,
    "encore-codes": functools.partial(encore, credit="codes"),
    "policy-only": policy_only,
    "trl-delay": trl_delay,
    "trl-llama": trl_llama,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--policy", type=Path, default=PRETRAINED)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=125)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--critic", choices=("trained", "frozen"), default="trained")
    args = parser.parse_args()
    turn = Turn()
    os.environ["ACCELERATE_MIXED_PRECISION"] = (
        "bf16" if args.precision == "bf16" and args.side.startswith("trl") else "no"
    )  # TRL's flag alone does nothing
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    prompts = [row["prompt"] for row in demo_prompts(args.batch, "heldout")]
    SIDES[args.side](args, load_policy(args.policy), prompts, turn)


if __name__ == "__main__":
    main()
