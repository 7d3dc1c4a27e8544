"""Training on a step's rollouts, between the reward and the weight sync: advantages, scores, selection, updates."""
