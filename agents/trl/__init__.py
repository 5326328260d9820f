"""The environment for TRL's GRPOTrainer: as a tool, or as whole episodes from this project's loop."""
