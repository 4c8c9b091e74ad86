"""Checkpoints and models of other implementations.

``fairseq``: LightConv and DynamicConv checkpoints, and drop-in modules. ``bert_convolutions``: the checkpoints of
Chang et al. 2021. ``huggingface``: T5, BERT and ConvBERT weights; this package's attention inside other models.
"""
