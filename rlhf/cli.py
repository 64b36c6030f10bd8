"""`encore ...`: one door to what is not training.

    encore corpus import|build   encore sample   encore app   encore owners   encore ratings export|import|stats
    encore generate   encore adapters list|show|mix   encore evaluate   encore lineage   encore loop
    encore demo

Training is launched with `accelerate launch <folder>/train_*.py`. Bad input ends with one line on stderr (got, expected, remedy)
and exit code 2; nothing half-written is left. Each command imports what it needs only when it runs.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base_models.errors import UserError
from db.errors import StoreError
from rlhf import commands

DEMO_DB = "sqlite:///runs/demo/encore.db"
SEED = "0 to 2^63 - 1; the same seed, prompt and settings play the same clip"
LOOP = """Online rounds; each is

  samples -> votes -> snapshot (-> reward) -> train -> held-out clips of champion and challenger -> blind votes -> verdict

The challenger is promoted when the lower end of the 95 % interval of its win rate over the champion, by prompt and rater, lies
above .5, on at least --min-decided decided votes of at least --min-prompts prompts. Otherwise the champion stays.

  encore loop --prompts examples/train.txt --heldout examples/heldout.txt --out runs/loop --serve --rater ada --rater bo
  encore loop --out runs/loop --serve            # goes on where it was stopped or killed: settings are kept
  encore loop status --out runs/loop             # who was champion when, win rates, KL, diversity, gates; also in report.md

Without --serve and --rater-command it waits for votes that come in through an app elsewhere on the same --db."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "alembic", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        # A full or read-only disk, a folder without rights: the system's words, and what to do.
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: got {error.strerror or error}{where}; expected a place that can be written; remedy: free space, or "
              "choose another folder", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    """All options; rlhf/commands.py has what each command does."""
    parser = argparse.ArgumentParser(prog="encore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top = parser.add_subparsers(required=True, metavar="COMMAND")

    corpus = top.add_parser("corpus", help="import or build a corpus").add_subparsers(required=True, metavar="ACTION")
    p = _command(corpus, "import", commands.corpus_import, "check and import a folder of audio (HF audiofolder layout)")
    p.add_argument("folder", type=Path, help="the folder: audio files and a metadata.jsonl with file_name and caption")
    p.add_argument(
        "--out", type=Path, default=Path(".cache/imported"), help="its folder; an earlier import there is replaced; default %(default)s"
    )
    p.add_argument("--sample-rate", type=int, default=16000, metavar="HZ", help="clips are resampled to it, Hz; default %(default)s")
    p.add_argument("--strict-genres", action="store_true", help="leave out clips whose genre is not a known one")
    p = _command(corpus, "build", commands.corpus_build, "build the demo corpus from public-domain melodies")
    p.add_argument(
        "--out", type=Path, default=Path(".cache/corpus"), help="its folder; another demo corpus there is replaced; default %(default)s"
    )
    p.add_argument("--n-clips", type=int, default=6000, metavar="N", help="clips of 6 s, over all splits; default %(default)s")
    p.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that render, at any number the same clips; default %(default)s"
    )
    p.add_argument("--stems", action="store_true", help="write lead, backing, bass and drums of each clip too")

    p = _command(top, "sample", commands.sample, "sample clips for prompts, and put them up for rating")
    _policy_arguments(p)
    p.add_argument("--prompts", type=Path, required=True, help=".jsonl with {prompt, ...} or .txt, one a line")
    p.add_argument("-n", type=int, default=2, metavar="N", help="clips a prompt; default %(default)s")
    p.add_argument("--seed", type=int, default=0, help=f"{SEED}; default %(default)s")
    p.add_argument("--duration", type=float, default=6.0, metavar="S", help="seconds a clip; default %(default)s")
    p.add_argument(
        "--out", type=Path, required=True, help="folder of the clips and their manifest.jsonl; the same call again goes on in it"
    )
    p.add_argument(
        "--system",
        metavar="NAME",
        help="the name under which the clips are kept (raters never see it); default: the adapters' names, or base",
    )
    _best_arguments(p)
    p.add_argument("--campaign", metavar="NAME", help="register the clips as pairs of this campaign")
    p.add_argument("--db", default=DEMO_DB, metavar="URL", help="database of the campaign; default %(default)s")
    p.add_argument(
        "--target-votes", type=int, default=3, metavar="N", help="votes wanted for each pair, each by another person; default %(default)s"
    )
    meet = p.add_mutually_exclusive_group()
    apart = "ask about the N pairs of each prompt whose clips sound least alike; default: floor(n/2) disjoint pairs, each clip in one"
    meet.add_argument("--pairs-per-prompt", type=int, metavar="N", help=apart)
    meet.add_argument("--all-pairs", action="store_true", help="ask about all n(n-1)/2 pairs of each prompt's clips")

    p = _command(top, "app", commands.app, "serve the rating page")
    p.add_argument("--db", default=DEMO_DB, metavar="URL", help="database, SQLite or PostgreSQL; default %(default)s")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; default %(default)s")
    p.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one; default %(default)s")
    fresh = "make sure this rater exists and print a fresh access code, which ends an old one; repeatable"
    p.add_argument("--rater", metavar="NAME", action="append", default=[], help=fresh)
    p.add_argument("--owner", metavar="NAME", help="make sure this owner exists and print a fresh access code; sign in at /owner")
    p.add_argument("--data-root", metavar="DIR", action="append", default=[], help="where owners may find clips; repeatable")
    p.add_argument("--state-dir", type=Path, help="where snapshots and gold clips go; default: beside the SQLite file")
    p.add_argument("--consent-of-everyone", action="store_true", help="ask raters added by hand for consent too")

    # Whatever follows is the rating app's to understand, its options and --help too.
    p = top.add_parser("owners", help="invite, pause, rules, leaderboard, audit ...", prefix_chars="\0", add_help=False)
    p.set_defaults(run=commands.owners)
    p.add_argument("arguments", nargs="*", help="a command and its options; `encore owners --help` lists them")

    ratings = top.add_parser("ratings", help="export, import or count votes").add_subparsers(required=True, metavar="ACTION")
    p = _command(ratings, "export", commands.ratings_export, "freeze a campaign's votes as a hashed snapshot")
    kinds = "snapshot: rows that our training scripts read; trl: a TRL preference dataset; default %(default)s"
    p.add_argument("--format", choices=["snapshot", "trl"], default="snapshot", help=kinds)
    p.add_argument("--db", default=DEMO_DB, metavar="URL", help="database of the votes; default %(default)s")
    p.add_argument("--campaign", required=True, metavar="NAME", help="the campaign whose votes are frozen")
    p.add_argument("--out", type=Path, default=Path("runs/snapshots"), help="folder of snapshots; default %(default)s")
    p.add_argument("--name", required=True, help="name of the snapshot, and of its folder in --out: letters, digits, '.', '-' and '_'")
    p = _command(
        ratings, "import", commands.ratings_import, "take in votes given elsewhere: a snapshot, CSV, JSON lines, Music Arena's logs"
    )
    p.add_argument("file", type=Path, help="a .csv, .jsonl or .json file, or a snapshot's folder")
    p.add_argument("--db", default=DEMO_DB, metavar="URL", help="database that takes them in; default %(default)s")
    p.add_argument("--campaign", required=True, metavar="NAME", help="the campaign that they join; made if need be")
    p = _command(ratings, "stats", commands.ratings_stats, "count pairs, raters and votes")
    p.add_argument("--db", default=DEMO_DB, metavar="URL", help="database of the votes; default %(default)s")

    p = _command(top, "generate", commands.generate, "a prompt becomes a mastered track")
    p.add_argument("prompt", help='words about the music, at most 1,000 characters: "sad piano, slow, 70 BPM"')
    _policy_arguments(p)
    p.add_argument("-n", type=int, default=1, metavar="N", help="tracks, of seeds --seed to --seed + N - 1; default %(default)s")
    p.add_argument("--seed", type=int, default=0, help=f"{SEED}; default %(default)s")
    p.add_argument("--duration", type=float, default=6.0, metavar="S", help="seconds, 1 to 30; default %(default)s")
    p.add_argument("--temperature", type=float, default=1.0, help="above 0; lower is safer, higher more varied; default %(default)s")
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest codes of a codebook; default %(default)s: all"
    )
    guidance = "classifier-free guidance: how far the prompt is followed; default %(default)s: none; any other doubles the time"
    p.add_argument("--cfg-coef", type=float, default=1.0, metavar="G", help=guidance)
    p.add_argument("--sample-rate", type=int, choices=[16000, 44100], default=44100, help="of the file, Hz; default %(default)s")
    p.add_argument("--mono", action="store_true", help="one channel; default: stereo")
    _best_arguments(p)
    p.add_argument("--device", choices=["cpu", "cuda"], help="where it is computed; default: cuda where there is one, else cpu")
    formats = "the file: .wav or .flac (16 bit), .ogg or .mp3; one that exists is replaced, and told; with -n track-0.wav, track-1.wav ..."
    p.add_argument("--out", type=Path, default=Path("track.wav"), metavar="FILE", help=f"{formats}; default %(default)s")

    adapters = top.add_parser("adapters", help="look into a library of adapters").add_subparsers(required=True, metavar="ACTION")
    p = _command(adapters, "list", commands.adapters_list, "every adapter below a folder")
    p.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="the folder; default %(default)s")
    p = _command(adapters, "show", commands.adapters_show, "one adapter's manifest")
    p.add_argument("folder", type=Path, help="the adapter's folder")
    p = _command(adapters, "mix", commands.adapters_mix, "the mean of several adapters, or any weighted sum, as one of its own")
    p.add_argument("folder", type=Path, nargs="+", help="the adapters' folders, all of one base")
    strengths = "weight of each adapter, in the same order, any real number; repeatable; default: one over their number"
    p.add_argument("--weight", type=float, action="append", metavar="W", help=strengths)
    p.add_argument("--name", help="its name; default: that of its folder")
    p.add_argument("--out", type=Path, required=True, help="folder of the new adapter")

    p = _command(top, "evaluate", commands.evaluate, "play held-out prompts with a base and its adapters; KL and diversity")
    _policy_arguments(p)
    p.add_argument("--prompts", type=Path, required=True, help="held-out prompts: .jsonl with {prompt, ...} or .txt, one a line")
    p.add_argument(
        "-n",
        type=int,
        default=2,
        metavar="N",
        help="clips a prompt and system, 2 or more (diversity is within a prompt); default %(default)s",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the clips, the same for all systems; default %(default)s")
    p.add_argument("--duration", type=float, default=6.0, metavar="S", help="seconds a clip; default %(default)s")
    _best_arguments(p, chooses=False)
    p.add_argument(
        "--out", type=Path, required=True, help="folder of evaluation.json and, for each system, its clips; the same call goes on in it"
    )

    p = _command(top, "lineage", commands.lineage, "what an adapter was made from: reward, snapshot, base, votes")
    p.add_argument("folder", type=Path, nargs="?", help="an adapter's folder")
    p.add_argument("--rater", metavar="NAME", help="list what was trained on this person's votes instead; needs --db")
    p.add_argument("--snapshot", metavar="SHA256", action="append", default=[], help="list what was trained on this snapshot; repeatable")
    p.add_argument("--db", metavar="URL", help="database of the votes, for --rater")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where parents and children are looked for; default %(default)s")

    p = _command(top, "loop", commands.loop, "rounds of sampling, votes, learning, blind verdict; `loop status` tells how far", LOOP)
    p.add_argument("action", nargs="?", choices=["run", "status"], default="run", help="run (default), or tell how far it is and who won")
    p.add_argument(
        "--out", type=Path, default=Path("runs/loop"), help="the loop's folder; a later call needs nothing else; default %(default)s"
    )
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds in all, those that are done included; default %(default)s")
    g = p.add_argument_group("what is played and learnt (kept in loop.json)")
    g.add_argument("--prompts", type=Path, help="prompts to sample, vote and train on")
    g.add_argument("--heldout", type=Path, help="prompts on which champion and challenger are compared; none of --prompts")
    g.add_argument("--policy", type=Path, help="policy folder; default: the base that ships with Encore")
    g.add_argument("--champion", type=Path, help="folder of the adapter to begin with; default: none, the base")
    methods = "ppo (default), grpo, dpo_own: by a reward model, on clips of its own; dpo, sft: by the rated clips alone"
    g.add_argument("--method", choices=["ppo", "grpo", "dpo_own", "dpo", "sft"], help=f"how the challenger is trained: {methods}")
    g.add_argument("-n", dest="clips_per_prompt", type=int, metavar="N", help="clips a prompt; default 2")
    apart = "ask about the N pairs of each prompt whose clips sound least alike; default: all n(n-1)/2 pairs of a prompt"
    g.add_argument("--pairs-per-prompt", type=int, metavar="N", help=apart)
    g.add_argument("--duration", dest="duration_s", type=float, metavar="S", help="seconds a clip; default 6")
    more = 'more options for the training script, quoted: --train-args "--steps 30"; may change between rounds; --train is the old name'
    g.add_argument("--train-args", "--train", dest="train", metavar="OPTIONS", help=more)
    more = "more options for train_reward.py, quoted: by --reward-args=--strict nothing is learnt from a reward model that fails a gate"
    more = f"{more}; the round ends, and the next one collects more votes; --reward is the old name"
    g.add_argument("--reward-args", "--reward", dest="reward", metavar="OPTIONS", help=more)
    g.add_argument("--licence", help="licence of the adapters, for their cards; default unspecified")
    g.add_argument("--seed", type=int, help="seed of clips and training, another one each round from it; default 0")
    g = p.add_argument_group("votes and verdict (kept in loop.json)")
    g.add_argument("--db", metavar="URL", help="database of the votes; default: encore.db in --out")
    g.add_argument("--campaign", metavar="NAME", help="name of the campaign; default loop")
    g.add_argument("--target-votes", type=int, metavar="N", help="votes a pair, each by another person; default 2")
    g.add_argument(
        "--ab-votes", type=int, metavar="N", help="votes a comparison of champion and challenger, each by another person; default 2"
    )
    g.add_argument("--ab-clips", type=int, metavar="N", help="clips of each of the two for a held-out prompt; default 1")
    g.add_argument("--min-decided", type=int, metavar="N", help="decided votes without which nobody is promoted; default 20")
    g.add_argument("--min-prompts", type=int, metavar="N", help="held-out prompts on which these votes have to lie; default 6")
    g.add_argument("--min-listen-ms", type=int, metavar="MS", help="listening asked for on each side, milliseconds; default 3000")
    g = p.add_argument_group("how votes come in, this time")
    g.add_argument("--serve", action="store_true", help="serve the rating page while waiting for votes")
    g.add_argument("--port", type=int, default=7860, help="of the rating page; 0 takes a free one; default %(default)s")
    g.add_argument("--rater", metavar="NAME", action="append", default=[], help="with --serve: let this person sign in; repeatable")
    program = "a program that votes over HTTP: {url}, {campaign}, {db}, {accounts} are filled in; --raters is the old name"
    g.add_argument("--rater-command", "--raters", dest="raters", metavar="COMMAND", help=program)
    g.add_argument("--accounts", type=int, default=12, metavar="N", help="how many accounts {accounts} holds; default %(default)s")
    g.add_argument("--poll", type=float, default=5.0, metavar="S", help="seconds between two looks for votes; default %(default)s")

    p = _command(top, "demo", commands.demo, "the whole loop, from prompts to a report")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="the demo's folder, with report.html; default %(default)s")
    p.add_argument("--policy", type=Path, help="policy folder; default: the base that ships with Encore")
    return parser


def _command(group: Any, name: str, run: Any, text: str, more: str = "") -> argparse.ArgumentParser:
    """`more`: what --help says beyond the one line, as it stands."""
    shape = argparse.RawDescriptionHelpFormatter if more else argparse.HelpFormatter
    parser: argparse.ArgumentParser = group.add_parser(name, help=text, description=more or text, formatter_class=shape)
    parser.set_defaults(run=run)
    return parser


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, help="policy folder; default: the base that ships with Encore")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="adapter folder; repeatable")
    strength = "strength of each --adapter, in the same order: 0 is the base, 1 as trained (default)"
    parser.add_argument("--weight", type=float, action="append", metavar="W", help=strength)


def _best_arguments(parser: argparse.ArgumentParser, chooses: bool = True) -> None:
    """chooses: whether the best of what the command plays is kept, which an adapter may say by what to choose; else it is one more system
    beside the others."""
    best = (
        "keep the best of N candidates for each clip" if chooses else "add a system best-of-N: the best of N clips of the base, no adapter"
    )
    parser.add_argument(
        "--best-of", type=int, default=1, metavar="N", help=f"{best}; needs a judge: --reward or --score-command; default %(default)s"
    )
    parser.add_argument("--reward", type=Path, help="folder of the reward model that says which is best")
    parser.add_argument(
        "--score-command",
        metavar="PROGRAM",
        help="a program that says it instead: JSON lines of wav files in, scores out (rlhf/outside_judge.py)",
    )
    if chooses:
        more = "default: those that the adapter's run was told, if this reward trained it; else the reward alone"
        parser.add_argument("--choose-by", metavar="WEIGHTS", help=f"weights of the parts that choose, such as human=1,genre=0.5; {more}")


if __name__ == "__main__":
    sys.exit(main())
