"""Audio and its metadata: import anyone's folder, build the demo corpus, split by group."""
