"""The Gradio pages of the rating room."""
