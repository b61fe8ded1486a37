"""One network that has many as its slices: they train together, and each can be scored and taken out untrained.

* :mod:`.space` which architectures there are: values of keys of a config, and formats of weights.
* :mod:`.net` the supernet: a model at its largest sizes, run as any architecture of the space.
* :mod:`.mixture` weights of a layer as a mixture of experts, chosen by the architecture (Mixture-of-Supernets).
* :mod:`.sandwich` what it is trained on: the largest, the smallest and a random architecture of each update.
"""
