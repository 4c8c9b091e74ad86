"""What the training scripts share: reading files, collating batches, running transformers' Trainer."""
