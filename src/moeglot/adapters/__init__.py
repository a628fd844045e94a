"""LoRA adapters on disk: which convention, which factors, and writing them in another one."""
