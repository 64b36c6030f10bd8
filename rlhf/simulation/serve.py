"""A taste as a program that answers line by line: the upper bound "gold as reward", and controls that hear nothing.

    python -m rlhf.simulation.serve --taste drive        # or: --constant 0

{"files": ["a.wav", ...]} on stdin, one line -> {"scores": [...]} on stdout, one line, until stdin ends. Whoever asks gets numbers and
nothing else; what is liked stays in here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlhf.simulation import taste


def answer(line: str, name: str, constant: float | None = None) -> str:
    """One question -> one line of scores."""
    files = json.loads(line)["files"]
    scores = [taste.score_file(Path(file), name) if constant is None else constant for file in files]
    return json.dumps({"scores": scores})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taste", choices=sorted(taste.TASTES), default=taste.DEFAULT)
    parser.add_argument("--constant", type=float, help="say this of every clip, unheard")
    args = parser.parse_args(argv)
    for line in sys.stdin:
        try:
            print(answer(line, args.taste, args.constant), flush=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            print(f'got {error!r}; expected {{"files": [...]}} of audio; remedy: check the paths', file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
