"""Networks that the reference trainers build."""
