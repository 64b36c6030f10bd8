"""The proof that votes make a model better: cells of work that can be interrupted, and the figures that come of them.

It reaches the hidden tastes as the demo does, by programs of their own; nothing here imports them."""
