"""Checkpoints in Microsoft's layout: where their weights are, what they are called, in and back."""
