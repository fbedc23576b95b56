"""PEFT models on the op."""
