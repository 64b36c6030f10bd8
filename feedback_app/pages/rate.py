"""The rating page: a Gradio shell around one static component. The prompt and the votes never pass through a template.

`player.js` is the audio engine, `rate.js` the page's conduct, `page.css` its looks. Nothing is fetched from elsewhere.
"""

from __future__ import annotations

from importlib.resources import files

import gradio as gr

_FILES = files("feedback_app.pages")


def _text(name: str) -> str:
    return _FILES.joinpath(name).read_text(encoding="utf-8")


CSS = _text("page.css")
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def build_page() -> gr.Blocks:
    """The page's Blocks: one gr.HTML, no events, no queue, no state on the server."""
    page: gr.Blocks = gr.Blocks(title="Encore · rate music", analytics_enabled=False)
    with page:
        gr.HTML(
            value="",
            html_template=_text("page.html"),
            js_on_load=_text("player.js") + _text("rate.js"),
            apply_default_css=False,
            elem_id="encore",
        )
    return page
