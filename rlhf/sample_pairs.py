"""Sample clips for a list of prompts: what listeners will compare, and what evaluation judges.

    encore sample --policy DIR [--adapter DIR]... --prompts examples/train.txt -n 4 --seed 0 --out DIR [--campaign NAME --db URL]

    prompts -> Conditions -> codes [B, K, T] -> wav -> 000000_0.wav + 000000_0.npy, and a row in manifest.jsonl

The seed of clip k of prompt i depends on (seed, i, k) alone: the same call gives the same codes, and two policies that are
sampled with one seed share their random numbers, which makes the comparison between them sharper. A call that was interrupted
goes on where it stopped. Rows are written as clips are made; `manifest.jsonl` appears when all of them are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adapters.library import load_adapter
from base_models.atomic import atomic_file
from base_models.audio import write_audio
from base_models.checkpoint import file_sha256, read_json, read_jsonl, write_json
from base_models.conditions import TEMPO_RANGE_BPM, parse_tempo
from base_models.errors import UserError
from base_models.pipeline import check_prompt
from base_models.policy import Policy, load_policy
from base_models.sampling import generate
from rlhf.best_of_n import Best, BestOf, asked, play_best

logger = logging.getLogger(__name__)
LICENCE = "CC0-1.0"
CONSENT = "generated; no person's recording"
LABELS = ("split", "genre", "mood")
"""Of a prompt: what is said of its clips and changes none."""


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file."""

    prompt: str
    prompt_id: str
    split: str = "train"
    tempo_bpm: float | None = None
    genre: str | None = None
    mood: str | None = None


@dataclass(frozen=True)
class Settings:
    """How to sample: everything that decides the codes, beside policy, adapters and prompts."""

    n: int = 2
    """Clips a prompt."""
    seed: int = 0
    duration_s: float = 6.0
    temperature: float = 1.0
    top_k: int = 0
    cfg_coef: float = 1.0
    batch_size: int = 32


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from .jsonl (rows with `prompt` and optionally prompt_id, split, tempo_bpm, genre, mood) or .txt (one a line).

    Raises UserError with the line's number for a row without a usable prompt, and for an empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}", "a .jsonl or .txt file of prompts", "check the path")
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors write a mark before the first line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}", "a text in UTF-8", "save it as UTF-8") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(io.StringIO(content), start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line}
            if not isinstance(row["prompt"], str):
                raise TypeError(f"prompt {row['prompt']!r}")
            text = check_prompt(row["prompt"])
            tempo = row.get("tempo_bpm")
            if tempo is not None and not (type(tempo) in (int, float) and TEMPO_RANGE_BPM[0] <= tempo <= TEMPO_RANGE_BPM[1]):
                raise ValueError(f"tempo_bpm {tempo!r}, no number of {TEMPO_RANGE_BPM[0]:g} to {TEMPO_RANGE_BPM[1]:g}")
            stated = parse_tempo(text)
            if tempo is not None and stated is not None and abs(tempo - stated) > 1:
                raise UserError(f"tempo_bpm {tempo:g} of a prompt that says {stated:g} BPM", "one tempo", "correct one of them")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error.got}", error.expected, error.remedy) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error!r}", '{"prompt": "..."} on each line', "correct the line") from error
        identity = str(row.get("prompt_id") or hashlib.sha256(text.encode()).hexdigest()[:12])
        known: dict[str, Any] = {name: row.get(name) for name in ("tempo_bpm", "genre", "mood")}
        prompts.append(Prompt(text, identity, str(row.get("split") or "train"), **known))
    if not prompts:
        raise UserError(f"{path} without prompts", "at least one", "write one prompt a line")
    if len({p.prompt_id for p in prompts}) < len(prompts):
        raise UserError(f"{path} with a prompt twice", "each prompt once", "remove the copies; -n gives several clips of one prompt")
    return prompts


def write_prompts(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a prompts file (.jsonl)."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def clip_seed(seed: int, prompt_index: int, k: int) -> int:
    """The seed of clip `k` of prompt `prompt_index`: a hash, so that neighbours have nothing in common."""
    digest = hashlib.sha256(f"{seed}|{prompt_index}|{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    out: str | Path,
    settings: Settings,
    system: str,
    adapters: Sequence[str] = (),
    best: BestOf | None = None,
    weights: Sequence[float] | None = None,
) -> Path:
    """Sample into `out` and return the path of its manifest.

    Args: system: the name under which the clips stand in the database. adapters: hashes of the adapters that `policy` carries.
    best: keep the best of several candidates for each clip; a row then says which it was. weights: of the adapters, which a row says
        where they are not all 1.
    Raises UserError when `out` holds samples that were made otherwise.
    """
    if settings.n < 1 or settings.batch_size < 1 or not (0 < settings.duration_s < math.inf):
        got = f"-n {settings.n}, --duration {settings.duration_s:g}, --batch-size {settings.batch_size}"
        raise UserError(got, "1 clip or more of more than 0 s", "correct the settings")
    out = Path(out)
    weighed = {"adapter_weights": list(weights)} if weights is not None and any(weight != 1 for weight in weights) else {}
    plan = {
        "policy_sha256": policy.sha256,
        "adapters": list(adapters),
        "system": system,
        "prompts": [[p.prompt, p.prompt_id, p.tempo_bpm] for p in prompts],
        **{k: v for k, v in vars(settings).items() if k != "batch_size"},
        **({"best_of": best.n, **best.chooser} if best else {}),
        **weighed,
    }
    manifest, partial = out / "manifest.jsonl", out / "manifest.partial.jsonl"
    if (out / "sample.json").is_file():
        if read_json(out / "sample.json") != plan:
            raise UserError(f"{out}, which holds other samples", "an empty folder, or the same call", "choose another --out")
        if manifest.is_file():
            there = read_jsonl(manifest)
            if (told := _labelled(there, prompts, settings.n)) != there:
                logger.warning("%s: %s follow the prompts file, in which some have changed", manifest, ", ".join(LABELS))
                write_prompts(manifest, told)
            return manifest
    else:
        out.mkdir(parents=True, exist_ok=True)
        if any(not left.name.startswith(".tmp-") for left in out.iterdir()):  # what a kill leaves of a file is no sample
            raise UserError(f"{out}, which is not empty", "an empty or new folder", "choose another --out")
        write_json(out / "sample.json", plan)

    done = _read_done(partial, out)
    jobs = [(i, k) for i in range(len(prompts)) for k in range(settings.n) if f"{i:06d}_{k}.wav" not in done]
    frames = policy.n_frames(settings.duration_s)
    how: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "cfg_coef": settings.cfg_coef}
    bar = tqdm(total=len(prompts) * settings.n, initial=len(done), desc=f"sampling {system}", unit="clip", dynamic_ncols=True)
    with open(partial, "a", encoding="utf-8") as rows, bar:  # a trouble is told on a line of its own
        for start in range(0, len(jobs), settings.batch_size):
            part = jobs[start : start + settings.batch_size]
            chosen = [prompts[i] for i, _ in part]
            cond = policy.conditions([p.prompt for p in chosen], [p.tempo_bpm for p in chosen])
            seeds = [clip_seed(settings.seed, i, k) for i, k in part]
            found: list[dict[str, Any]] = [{}] * len(part)
            if best is None:
                codes = generate(policy.lm, cond, frames, seeds=seeds, **how).codes
            else:
                won = play_best(policy.lm, cond, frames, seeds, [p.prompt for p in chosen], best, **how)
                codes, found = won.codes, _won(won, best)
            for (i, k), prompt, seed, clip_codes, more in zip(part, chosen, seeds, codes, found):
                wav = policy.decode(clip_codes[None])[0].float().cpu().numpy()
                row = _write_clip(out, f"{i:06d}_{k}", wav, clip_codes.cpu().numpy(), policy.codec.sample_rate)
                row |= {
                    "prompt": prompt.prompt, "prompt_id": prompt.prompt_id, "split": prompt.split, "tempo_bpm": prompt.tempo_bpm,
                    "genre": prompt.genre, "mood": prompt.mood, "seed": seed, "system": system, "policy_sha256": policy.sha256,
                    "adapters": list(adapters), "gen": how | more | weighed, "licence": LICENCE, "consent": CONSENT,
                }  # fmt: skip
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows.flush()
                done[row["file"]] = row
                bar.update()
    ordered = [done[f"{i:06d}_{k}.wav"] for i in range(len(prompts)) for k in range(settings.n)]
    write_prompts(manifest, _labelled(ordered, prompts, settings.n))
    partial.unlink()
    return manifest


def _labelled(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], n: int) -> list[dict[str, Any]]:
    """The rows, `n` a prompt, with split, genre and mood as the prompts file has them, where it has some: no sound depends on them, and a
    call with others samples nothing anew."""
    if not any(prompt.genre or prompt.mood or prompt.split != "train" for prompt in prompts):
        return list(rows)
    labels = [{name: value for name in LABELS if (value := getattr(prompt, name)) is not None} for prompt in prompts]
    return [row | labels[place // n] for place, row in enumerate(rows)]


def _won(won: Best, best: BestOf) -> list[dict[str, Any]]:
    """What the rows of a best of n say beside the settings: `seed` stays the row's place, `sampled_seed` gives the codes again."""
    return [
        {"best_of": best.n, "candidate": int(number), "sampled_seed": seed, "score": float(score), **best.chooser}
        for number, seed, score in zip(won.candidate, won.seeds, won.score)
    ]


def _write_clip(out: Path, name: str, wav: np.ndarray, codes: np.ndarray, sample_rate: int) -> dict[str, Any]:
    """Codes first, then the sound: a row is written only when both are whole."""
    with atomic_file(out / f"{name}.npy") as temporary, open(temporary, "wb") as handle:
        np.save(handle, codes.astype(np.int16), allow_pickle=False)
    peak = float(np.abs(wav).max(initial=0.0))
    write_audio(out / f"{name}.wav", wav / max(1.0, peak / 0.99), sample_rate)
    return {
        "file": f"{name}.wav",
        "sha256": file_sha256(out / f"{name}.wav"),
        "codes_file": f"{name}.npy",
        "duration_s": wav.shape[-1] / sample_rate,
        "sample_rate": sample_rate,
    }


def _read_done(partial: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted call whose files are there; a last line that was cut is left out, and so made again."""
    done: dict[str, dict[str, Any]] = {}
    if not partial.is_file():
        return done
    for line in io.StringIO(partial.read_text(encoding="utf-8", errors="replace")):  # it may end in half a letter
        try:
            row = json.loads(line)
        except ValueError:
            logger.warning("%s ends in half a row; its clip is made again", partial)
            continue
        if (out / row["file"]).is_file() and (out / row["codes_file"]).is_file():
            done[row["file"]] = row
    write_prompts(partial, list(done.values()))
    return done


def sample_folder(
    policy_dir: str | Path,
    adapter_dirs: Sequence[str | Path],
    prompts_file: str | Path,
    out: str | Path,
    settings: Settings,
    system: str | None = None,
    weights: Sequence[float] | None = None,
    n_best: int = 1,
    reward_dir: str | Path | None = None,
    command: str | None = None,
    choose_by: str | None = None,
) -> Path:
    """The command line's work: load, adapt, sample; the best of `n_best` where that is more than 1."""
    prompts = read_prompts(prompts_file)
    policy = load_policy(policy_dir)
    manifests = load_adapter(policy, list(adapter_dirs), weights) if adapter_dirs else []
    hashes = [m.adapter_sha256 for m in manifests]
    name = system or "+".join(m.name for m in manifests) or "base"
    best = asked(n_best, reward_dir, policy, command, manifests, choose_by)
    if best is not None and system is None:
        name = f"{name}-best-of-{n_best}"
    return sample(policy, prompts, out, settings, name, hashes, best, weights)
