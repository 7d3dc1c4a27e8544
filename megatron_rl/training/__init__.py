"""What happens to a step's rollouts between the reward and the weight sync."""
