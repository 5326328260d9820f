"""A baseline without a language model: PPO of Stable-Baselines3 on hashed words and a small image."""
