"""The device on which the oracles' models compute: the CPU, or what MOEGLOT_DEVICE names, so that what judges a CPU judges a GPU (`make gpu-models`)."""

import os

import torch

DEVICE = os.environ.get("MOEGLOT_DEVICE", "cpu")

# torch lets cuDNN convolve float32 in TF32, unlike products of matrices: 10 bits, where the oracles agree to 16.
torch.backends.cudnn.allow_tf32 = False
