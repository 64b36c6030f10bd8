"""Floor 0: the generator stack (codec, text encoder, token language model, mastering). Knows torch; knows no SQL, no web."""
