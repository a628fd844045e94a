"""Checkpoints of torch.distributed.checkpoint as Megatron-Core keeps them, read and written without Megatron and without a process group."""
