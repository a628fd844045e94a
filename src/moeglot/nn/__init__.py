"""Experts as a torch module that stay encoded in memory, and LoRA on them; importing this imports torch."""

from moeglot.nn.adapters import load_adapter, save_adapter
from moeglot.nn.lora import add_lora, experts_of, remove_lora
from moeglot.nn.module import Experts

__all__ = ["Experts", "add_lora", "experts_of", "load_adapter", "remove_lora", "save_adapter"]
