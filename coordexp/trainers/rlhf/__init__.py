"""`swift rlhf` on our data: its rows, its rewards, and the prompt that stays with its checkpoints."""
