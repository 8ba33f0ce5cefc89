"""The model in training is asked: the session of its answers, evaluation by them, a few of them shown to people."""
