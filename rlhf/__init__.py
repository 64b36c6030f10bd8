"""Floor 2: from votes to a reward, from the reward to an adapter, and the proof that it is better."""
