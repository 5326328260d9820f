"""What both learners share: run folders and checkpoints, sharding over processes, trackers."""
