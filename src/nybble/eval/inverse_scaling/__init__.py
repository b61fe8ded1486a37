"""Tasks on which larger language models do worse: their data, their metrics, and the shape of a trend.

Source: McKenzie et al., "Inverse Scaling: When Bigger Isn't Better", arXiv 2306.09479. A model that quantization
damaged may do *better* in such a task, so averages mislead: each task has its own direction, and its loss beside its
accuracy.
"""
