"""Inference in integers alone: codes, sums that can't overflow, multiplications by m / 2^e, functions as polynomials.

Functions of tensors take ``(q, S)``, integer codes and a scale with ``x = S q``, and give ``(q', S')``. Everything
about scales is calculated before the first input comes; what then runs is integer additions, multiplications, shifts
and (softmax, sigmoid, layer norm) integer divisions. Source: HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), I-BERT (Kim
et al. 2021, arXiv:2101.01321), Q-ASR (Kim et al. 2022, arXiv:2103.16827).

Transformers go in blocks (:mod:`nybble.nn.integer.transformer`): a power of two for each strip, found while they run.
Source: BCT (Dong & Chen 2023, arXiv:2304.01483).
"""
