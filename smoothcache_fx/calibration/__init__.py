"""What was measured while a model ran, and the schedules that are planned from it: numpy only."""
