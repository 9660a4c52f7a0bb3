"""The training loop, the learner, the learning-rate schedule and the monitor."""
