"""Where bytes lie and how they are read and written: folders, stores and the Hub, safetensors and torch_dist."""
