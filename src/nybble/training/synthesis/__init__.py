"""Images that are made of a classifier with BatchNorms alone, to calibrate, distil or search on.

Liu et al. 2022, "Data-Free Neural Architecture Search via Recursive Label Calibration", arXiv:2112.02086; the terms are
those of Yin et al. 2020, "Dreaming to Distill", arXiv:1912.08795 (DeepInversion).
"""
