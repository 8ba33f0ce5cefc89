"""Step time and memory of training Qwen3-VL by formula, and the runs that hold the formulas to account."""
