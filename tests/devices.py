"""The device on which the oracles' models compute: the CPU, or what MOEGLOT_DEVICE names, so that what judges a CPU judges a GPU (`make gpu-models`)."""

import os

DEVICE = os.environ.get("MOEGLOT_DEVICE", "cpu")
