"""The rating page: a Gradio shell around one static component. The prompt and the votes never pass through a template.

`player.js` is the audio engine, `sounds.js` what the page plays of its own, `steps.js` the way to the first pair, `lane.js`
what a side looks like, `rate.js` the page's conduct, `page.css` its looks. Nothing is fetched from elsewhere.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

import gradio as gr

_FILES = files("feedback_app.pages")


def _text(name: str) -> str:
    return _FILES.joinpath(name).read_text(encoding="utf-8")


CSS = _text("page.css")
SCRIPT = "".join(map(_text, ("player.js", "sounds.js", "lane.js", "steps.js", "rate.js")))
UI_VERSION = hashlib.sha256((CSS + SCRIPT + _text("page.html")).encode()).hexdigest()[:12]
"""Stored with each vote: the page as it was."""
HIDE_INVITATION = (
    "<script>{const u=new URL(location),t=new URLSearchParams(u.hash.slice(1)).get('invite')||u.searchParams.get('invite');"
    "if(t){sessionStorage.setItem('encore.invite',t);u.searchParams.delete('invite');u.hash='';history.replaceState(null,'',u)}}</script>"
)
"""Takes the token out of the address bar and the history before anything else loads."""
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">' + HIDE_INVITATION
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def build_page() -> gr.Blocks:
    """The page's Blocks: one gr.HTML, no events, no queue, no state on the server."""
    page: gr.Blocks = gr.Blocks(title="Encore · rate music", analytics_enabled=False)
    with page:
        gr.HTML(
            value="",
            html_template=_text("page.html").replace("$ui_version", UI_VERSION),
            js_on_load=SCRIPT,
            apply_default_css=False,
            elem_id="encore",
        )
    return page
