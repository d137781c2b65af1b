"""Released checkpoints of other code bases, turned into folders that `from_pretrained` reads."""
