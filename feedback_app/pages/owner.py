"""The owner's page: the same Gradio shell as the rating page, around a component of its own. Every plot is SVG drawn in `owner.js`.

Whoever opens it sees a sign-in; all that it shows afterwards comes from the owner's JSON API.
"""

from __future__ import annotations

from importlib.resources import files

import gradio as gr

_FILES = files("feedback_app.pages")


def _text(name: str) -> str:
    return _FILES.joinpath(name).read_text(encoding="utf-8")


CSS = _text("owner.css")
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'


def build_page() -> gr.Blocks:
    """The page's Blocks: one gr.HTML, no events, no queue, no state on the server."""
    page: gr.Blocks = gr.Blocks(title="Encore · campaigns", analytics_enabled=False)
    with page:
        gr.HTML(value="", html_template=_text("owner.html"), js_on_load=_text("owner.js"), apply_default_css=False, elem_id="encore-owner")
    return page
