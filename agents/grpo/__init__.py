"""Multi-turn GRPO: advantages and losses as pure functions, rollouts, and the trainer."""
