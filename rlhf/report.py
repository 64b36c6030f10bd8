"""The report of a demo: one page that opens from the disk, with players, intervals, curves and spectrograms, and its figures as JSON.

report.html   works from file://, with the clips beside it and every picture inside it; it loads nothing from anywhere
report.json   the same figures for programs
"""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy import signal

from base_models.atomic import atomic_file
from base_models.audio import read_audio
from base_models.checkpoint import read_jsonl, write_json

COLOURS = {"base": "#64748b", "dpo": "#2563eb", "ppo": "#d9480f", "shuffled": "#94a3b8"}
NAMES = {"base": "Base", "dpo": "DPO", "ppo": "PPO", "shuffled": "Shuffled votes (control)"}
HEARD = ("base", "dpo", "ppo")
EXAMPLES = 12

STYLE = """
:root{--ink:#0f172a;--soft:#475569;--line:#e2e8f0;--card:#fff;--page:#f8fafc;--accent:#2563eb}
@media (prefers-color-scheme:dark){
:root{--ink:#e2e8f0;--soft:#94a3b8;--line:#334155;--card:#1e293b;--page:#0f172a;--accent:#60a5fa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.9rem;margin:.2rem 0 .3rem} h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
p{color:var(--soft);margin:.3rem 0 .8rem;max-width:72ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:.8rem;margin:1.2rem 0}
.tile,.box{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem 1rem}
.tile b{display:block;font-size:1.65rem;font-variant-numeric:tabular-nums} .tile span{color:var(--soft);font-size:.85rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums} td,th{padding:.45rem .6rem;border-bottom:1px solid var(--line);
text-align:left;vertical-align:middle} th{font-size:.8rem;color:var(--soft);font-weight:600} .wide{overflow-x:auto}
audio{width:100%;min-width:180px;height:34px} img{max-width:100%;border-radius:8px;display:block}
.figs{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:.8rem} .figs img{background:#fff}
.prompt{font-weight:600} code{font-size:.82rem;word-break:break-all;color:var(--soft)} .ok{color:#15803d} .no{color:#b91c1c}
"""


def write_report(out: Path, figures: dict[str, Any]) -> Path:
    """Write report.json and report.html into the demo's folder `out`; returns the page's path."""
    write_json(out / "report.json", _finite(figures))
    page = _page(out, figures)
    with atomic_file(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / "report.html"


def _finite(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_time(figures: dict[str, Any]) -> str:
    """The minutes of all stages; unknown where one of their starts was killed."""
    return "unknown time" if figures["seconds"] is None else f"{figures['seconds'] / 60:.1f} min"


# ---- pictures --------------------------------------------------------------------------------------------------------


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (4.6, 3.0)) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _win_rates(systems: dict[str, Any]) -> str:
    figure, axes = _axes("Gold win rate against the base, 95 % interval by prompt", "share of decided pairs won", "", (7.0, 2.4))
    for y, (name, row) in enumerate(reversed(systems.items())):
        low, high = row["ci"]
        colour = COLOURS.get(name, "#0f766e")
        axes.errorbar(row["gold_win_rate"], y, xerr=[[row["gold_win_rate"] - low], [high - row["gold_win_rate"]]], fmt="o",
                      color=colour, capsize=4, markersize=8, linewidth=2)  # fmt: skip
        axes.annotate(f"{row['gold_win_rate']:.2f}", (row["gold_win_rate"], y), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(0.5, color="#334155", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(systems)), [NAMES.get(n, n) for n in reversed(systems)])
    axes.set_ylim(-0.6, len(systems) - 0.3)
    axes.set_xlim(min(0.3, *(row["ci"][0] - 0.03 for row in systems.values())), 1.0)
    return _png(figure)


def _curves(out: Path) -> list[str]:
    pictures = []
    ppo = _metrics(out / "ppo")
    for key, title, ylabel in (
        ("score", "PPO: reward model's score of what is played", "score"),
        ("kl", "PPO: KL to the base", "nats a clip"),
    ):
        points = [(row["step"], row[key]) for row in ppo if row.get(key) is not None]
        if points:
            figure, axes = _axes(title, "round", ylabel)
            axes.plot(*zip(*points), color=COLOURS["ppo"], linewidth=1.6)
            pictures.append(_png(figure))
    figure, axes = _axes("DPO: loss", "update", "nats")
    drawn = False
    for name in ("dpo", "shuffled"):
        points = [(row["step"], row["loss"]) for row in _metrics(out / name) if row.get("loss") is not None]
        if points:
            axes.plot(*zip(*points), color=COLOURS[name], linewidth=1.4, label=NAMES[name])
            drawn = True
    if drawn:
        axes.axhline(math.log(2), color="#334155", linestyle="--", linewidth=1)
        axes.legend(fontsize=8)
        pictures.append(_png(figure))
    return pictures


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def _spectrogram(path: Path) -> str:
    wav, sample_rate = read_audio(path)
    _, _, power = signal.spectrogram(wav[0], sample_rate, nperseg=512, noverlap=384)
    figure, axes = plt.subplots(figsize=(2.6, 0.95))
    figure.subplots_adjust(0, 0, 1, 1)
    decibel = 10 * np.log10(power + 1e-12)
    axes.imshow(decibel, origin="lower", aspect="auto", cmap="magma", vmin=decibel.max() - 75, vmax=decibel.max())
    axes.axis("off")
    return _png(figure)


# ---- page ------------------------------------------------------------------------------------------------------------


def _page(out: Path, figures: dict[str, Any]) -> str:
    systems, reward = figures["systems"], figures["reward"]
    ceiling = "unknown" if reward["ceiling"] is None else f"{reward['ceiling']:.3f}"
    low, high = reward["ci"]
    told = f"of unseen votes foretold by the reward model [{low:.2f}, {high:.2f}]; raters' ceiling {ceiling}"
    won = [(f"{systems[name]['gold_win_rate']:.2f}", f"{NAMES[name]}: decided pairs won against the base") for name in ("dpo", "ppo")]
    tiles = [
        (f"{figures['votes']}", f"votes by {figures['raters']} simulated raters, over HTTP"),
        (f"{reward['accuracy']:.3f}", told),
        *won,
        (whole_time(figures), "for all of it on this machine"),
    ]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>Encore: from votes to better music</title><style>{STYLE}</style></head><body><main>",
        "<h1>From votes to better music</h1>",
        "<p>A base model played pairs of clips; raters voted in the real rating app; a reward model, a DPO adapter and a PPO adapter were "
        "trained on the frozen votes. Here they play prompts that no training run has seen. The raters are simulated: a hidden taste over "
        "the sound, in a process that no trainer can read. It stands in for ears in this demo, and says nothing of human taste.</p>",
        "<div class='tiles'>" + "".join(f"<div class='tile'><b>{b}</b><span>{html.escape(t)}</span></div>" for b, t in tiles) + "</div>",
        "<h2>Does it sound better to the taste that voted?</h2>",
        f"<div class='box'><img alt='Win rates with intervals' src='{_win_rates(systems)}'></div>",
        _system_table(systems),
        "<p>The control was trained in the same way, by a reward model of the same votes with half of each prompt's pairs turned round: it "
        "follows no taste, and should not beat the base. The "
        "reward model's own opinion is never counted as proof.</p>",
        "<h2>Listen: mastered tracks</h2>",
        _tracks(figures["tracks"]),
        "<h2>Listen: held-out prompts, base | DPO | PPO</h2>",
        _examples(out),
        "<h2>How it learnt</h2><div class='figs'>",
        *(f"<div class='box'><img alt='Training curve' src='{picture}'></div>" for picture in _curves(out)),
        "</div><h2>The base and its codec</h2>",
        _base_table(figures),
        "<h2>Where it comes from</h2>",
        f"<p>snapshot <code>{figures['snapshot_sha256']}</code><br>base <code>{figures['policy_sha256']}</code></p>",
        "<p>Rate by hand: <code>make app</code> opens the same database at <code>http://127.0.0.1:7860</code>.</p>",
        "</main></body></html>",
    ]
    return "\n".join(parts)


def _system_table(systems: dict[str, Any]) -> str:
    rows = []
    for name, row in systems.items():
        low, high = row["ci"]
        wins = low > 0.5
        holds = wins != (name == "shuffled")
        verdict = "beats the base" if wins else ("holds one half" if high >= 0.5 else "loses to the base")
        rows.append(
            f"<tr><td>{NAMES.get(name, html.escape(name))}</td><td>{row['gold_win_rate']:.3f}</td><td>[{low:.3f}, {high:.3f}]</td>"
            f"<td>{row['n']}</td><td>{row['kl']:.1f}</td><td>{row['diversity_ratio']:.2f}</td>"
            f"<td class='{'ok' if holds else 'no'}'>{verdict}</td></tr>"
        )
    head = "".join(f"<th>{t}</th>" for t in ("System", "Win rate", "95 % CI", "Pairs", "KL, nats a clip", "Diversity / base", "Verdict"))
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _player(path: str) -> str:
    return f"<audio controls preload='none' src='{html.escape(path, quote=True)}'></audio>"


def _tracks(tracks: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{NAMES[t['system']]}</td><td>{_player(t['file'])}</td><td>{t['lufs']:.1f} LUFS, {t['true_peak_dbfs']:.1f} dBTP</td></tr>"
        for t in tracks["tracks"]
    )
    return f"<p class='prompt'>{html.escape(tracks['prompt'])}</p><div class='wide'><table>{cells}</table></div>"


def _examples(out: Path) -> str:
    manifests = {name: read_jsonl(out / "heldout" / name / "manifest.jsonl") for name in HEARD}
    first: dict[str, list[dict[str, Any]]] = {}
    for name in HEARD:
        for row in manifests[name]:
            rows = first.setdefault(row["prompt_id"], [])
            if len(rows) < len(HEARD) and all(r["system"] != row["system"] for r in rows):
                rows.append(row)
    body = []
    for rows in list(first.values())[:EXAMPLES]:
        cells = []
        for row in rows:
            path = f"heldout/{row['system']}/{row['file']}"
            cells.append(f"<td><img alt='Spectrogram' src='{_spectrogram(out / path)}'>{_player(path)}</td>")
        body.append(f"<tr><td class='prompt'>{html.escape(rows[0]['prompt'])}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{NAMES[name]}</th>" for name in HEARD)
    return f"<div class='wide'><table><tr><th>Prompt</th>{head}</tr>{''.join(body)}</table></div>"


def _base_table(figures: dict[str, Any]) -> str:
    rows = []
    for part, content in (("Codec", figures["codec"]), ("Base", figures["base"])):
        for key, value in content.items():
            if isinstance(value, dict):
                continue
            rows.append(f"<tr><td>{part}</td><td>{html.escape(key)}</td><td>{html.escape(_shown(value))}</td></tr>")
    note = "<p>These were measured when the base was made; <em>measured</em> names the command.</p>"
    return f"{note}<div class='wide'><table>{''.join(rows)}</table></div>"


def _shown(value: Any) -> str:
    """Three places of a float, alone or in a list; all else as it is written."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
