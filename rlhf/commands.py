"""What each command of `encore` does (rlhf/cli.py has their options). Each imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from base_models.errors import UserError


def _policy_dir(args: argparse.Namespace) -> Path:
    from base_models.policy import PRETRAINED

    return args.policy or PRETRAINED


def _weights(args: argparse.Namespace) -> list[float] | None:
    """Strengths of the adapters; None where none is given. UserError unless there is one for each."""
    if args.weight is None or len(args.weight) == len(args.adapter):
        return args.weight
    told = " ".join(f"--weight {weight:g}" for weight in args.weight)
    got = f"{told} without --adapter" if not args.adapter else f"{told} for {len(args.adapter)} adapters"
    raise UserError(got, "one --weight for each --adapter, in the same order", "name the adapters' folders, or leave --weight out")


def corpus_import(args: argparse.Namespace) -> None:
    from base_models.corpus.importer import import_folder

    report = import_folder(args.folder, args.out, sample_rate=args.sample_rate, strict_genres=args.strict_genres)
    print(report.summary())


def corpus_build(args: argparse.Namespace) -> None:
    from base_models.corpus.build import build_corpus

    print(build_corpus(args.out, n_clips=args.n_clips, workers=args.workers, stems=args.stems))


def sample(args: argparse.Namespace) -> int:
    from base_models.policy import load_policy
    from rlhf.apart import write_furthest
    from rlhf.sample_pairs import Settings, sample_folder

    weights = _weights(args)
    if (args.pairs_per_prompt is not None or args.all_pairs) and not args.campaign:
        got = "--all-pairs without --campaign" if args.all_pairs else "--pairs-per-prompt without --campaign"
        raise UserError(got, "a campaign that asks about these pairs", "name one, or leave it out")
    settings = Settings(n=args.n, seed=args.seed, duration_s=args.duration)
    best = {"n_best": args.best_of, "reward_dir": args.reward, "command": args.score_command, "choose_by": args.choose_by}
    manifest = sample_folder(_policy_dir(args), args.adapter, args.prompts, args.out, settings, args.system, weights, **best)
    print(manifest)
    if args.campaign:
        wanted = ["--db", args.db, "--name", args.campaign, "--manifest", str(manifest), "--target-votes", str(args.target_votes)]
        wanted += ["--all-pairs"] if args.all_pairs else []
        if args.pairs_per_prompt is not None:
            pairs = args.out / "pairs.jsonl"
            write_furthest(load_policy(_policy_dir(args)), manifest, pairs, args.pairs_per_prompt)
            wanted += ["--pairs", str(pairs)]
        return _app_module("campaigns", *wanted)
    return 0


def app(args: argparse.Namespace) -> int:
    wanted = ["--db", args.db, "--host", args.host, "--port", str(args.port)]
    for option, value in (("--owner", args.owner), ("--state-dir", args.state_dir)):
        wanted += [f"{option}={value}"] if value is not None else []
    wanted += [f"--rater={name}" for name in args.rater]
    wanted += [f"--data-root={root}" for root in args.data_root]
    wanted += ["--consent-of-everyone"] if args.consent_of_everyone else []
    return _app_module("app", *wanted)


def owners(args: argparse.Namespace) -> int:
    return _app_module("owners", *args.arguments)


def _app_module(name: str, *arguments: str) -> int:
    """The rating app is a program of its own: it stands beside rlhf, loads no torch, and is started, never imported."""
    return subprocess.run([sys.executable, "-m", f"feedback_app.{name}", *arguments], check=False).returncode


def ratings_export(args: argparse.Namespace) -> None:
    from db.export import export_preferences, export_snapshot
    from db.store import open_store

    export = export_preferences if args.format == "trl" else export_snapshot
    with open_store(args.db) as store:
        snapshot = export(store, args.campaign, args.out, args.name)
    print(json.dumps({"folder": str(args.out / args.name), **snapshot}, indent=2, default=str))


def ratings_import(args: argparse.Namespace) -> None:
    import dataclasses

    from db.imports import import_votes
    from db.store import open_store

    with open_store(args.db) as store:
        print(json.dumps(dataclasses.asdict(import_votes(store, args.file, args.campaign)), indent=2))


def ratings_stats(args: argparse.Namespace) -> None:
    import dataclasses

    from db.store import open_store

    with open_store(args.db) as store:
        print(json.dumps(dataclasses.asdict(store.stats()), indent=2, default=str))


def generate(args: argparse.Namespace) -> None:
    from adapters.library import load_adapter
    from base_models.audio import check_suffix
    from base_models.pipeline import MusicPipeline, check_request
    from base_models.policy import load_policy
    from rlhf.best_of_n import asked, best_track

    if args.n < 1:
        raise UserError(f"-n {args.n}", "1 track or more", "raise it, or leave it out")
    for seed in (args.seed, args.seed + args.n - 1):
        check_request(args.prompt, args.duration, seed)
    check_suffix(args.out)
    weights = _weights(args)
    policy = load_policy(_policy_dir(args), _device(args.device))
    manifests = load_adapter(policy, args.adapter, weights) if args.adapter else []
    pipeline, best = MusicPipeline(policy), asked(args.best_of, args.reward, policy, args.score_command, manifests, args.choose_by)
    how: dict[str, Any] = {"temperature": args.temperature, "top_k": args.top_k, "cfg_coef": args.cfg_coef}
    how |= {"sample_rate": args.sample_rate, "stereo": not args.mono}
    for number in range(args.n):
        out, told = args.out, ""
        if args.n > 1:
            out = out.with_name(f"{out.stem}-{number}{out.suffix}")
        if best:
            track, score = best_track(pipeline, args.prompt, args.duration, args.seed + number, best, **how)
            told = f", the best of {best.n} with a score of {score:.2f} by {best.by}"
        else:
            track = pipeline.generate(args.prompt, duration_s=args.duration, seed=args.seed + number, **how)
        replaced = " (replaces the file of that name)" if out.exists() else ""
        track.save(out)
        print(f"{out}{replaced}: {track.lufs:.1f} LUFS, true peak {track.true_peak_dbfs:.1f} dBFS, seed {track.seed}{told}")


def _device(asked: str | None) -> str:
    """Where to compute: as asked, else on a GPU where there is one. UserError for one that is not there."""
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device cuda without a CUDA device", "cpu", "leave --device out")
    return asked or ("cuda" if there else "cpu")


def adapters_list(args: argparse.Namespace) -> None:
    from adapters.library import list_adapters

    found = list_adapters(args.root)
    for manifest in found:
        print(f"{manifest.name:20} {manifest.method:8} base {manifest.base_sha256[:12]}  {manifest.created_at}")
    print(f"{len(found)} adapters below {args.root}")


def adapters_show(args: argparse.Namespace) -> None:
    import dataclasses

    from adapters.library import read_adapter

    print(json.dumps(dataclasses.asdict(read_adapter(args.folder).manifest), indent=2))


def adapters_mix(args: argparse.Namespace) -> None:
    import dataclasses

    from adapters.library import save_mix

    print(json.dumps(dataclasses.asdict(save_mix(args.out, args.folder, args.weight, args.name or "")), indent=2))


def evaluate(args: argparse.Namespace) -> None:
    from adapters.library import read_adapter
    from base_models.policy import load_policy
    from rlhf.best_of_n import BestOf, asked
    from rlhf.evaluate_models import evaluate as run
    from rlhf.sample_pairs import Settings, read_prompts

    weights = _weights(args)
    policy = load_policy(_policy_dir(args))
    systems: dict[str, Path | BestOf] = {read_adapter(folder).manifest.name: folder for folder in args.adapter}
    if len(systems) < len(args.adapter):
        raise UserError("two adapters of one name", "different names", "rename one of the folders' manifests")
    settings = Settings(n=args.n, seed=args.seed, duration_s=args.duration)
    strengths = dict(zip(systems, weights or []))
    if best := asked(args.best_of, args.reward, policy, args.score_command):
        if (name := f"best-of-{args.best_of}") in systems:
            raise UserError(f"an adapter called {name!r} beside --best-of {args.best_of}", "different names", "leave one of them out")
        systems[name] = best
    figures = run(policy, systems, read_prompts(args.prompts), args.out, settings, strengths)
    print(json.dumps(figures, indent=2))


def lineage(args: argparse.Namespace) -> None:
    from db.owners import trained_on
    from db.store import open_store
    from rlhf.lineage import descendants, trace

    if args.folder is not None:
        lines = trace(args.folder, args.runs)
    elif args.rater and args.db:
        with open_store(args.db) as store:
            found = trained_on(store, args.rater)
        lines = descendants((snapshot.sha256 for snapshot in found), args.runs) or [f"no frozen snapshot holds votes of {args.rater}"]
    elif args.snapshot:
        lines = descendants(args.snapshot, args.runs)
    else:
        raise UserError("nothing to trace", "an adapter's folder, --rater NAME --db URL, or --snapshot SHA256", "name one")
    for line in lines:
        print(line)


def loop(args: argparse.Namespace) -> None:
    from rlhf.collecting import Collecting
    from rlhf.loop import NAMES, Loop, settings
    from rlhf.loop_report import status, write_report

    if args.action == "status":
        print("\n".join(status(args.out)))
        return
    cfg = settings({name: getattr(args, name) for name in NAMES})
    how = Collecting(args.serve, args.port, tuple(args.rater), args.raters, args.accounts, poll_s=args.poll)
    Loop(cfg, how).run(args.rounds)
    print("\n".join(write_report(args.out)))


def demo(args: argparse.Namespace) -> int:
    from rlhf.demo import DemoConfig
    from rlhf.demo import main as run

    return run(DemoConfig(_policy_dir(args), args.out))
