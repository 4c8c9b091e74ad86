"""Convolutional attention in a stock BERT, in three lines; needs `pip install 'transformers>=5.17'`.

Makes a small BERT from transformers with random weights (put ``from_pretrained`` there for real ones), adds the terms
of Chang et al. 2021 to its self-attention in place, shows that its outputs stay the same, trains the new terms for a
few steps on a real sentence, and compares speed. It downloads nothing.
"""

import time

import torch
from transformers import BertConfig, BertForMaskedLM

from convkernels.interop.huggingface import register, replace_attention

TEXT = "In Xanadu did Kubla Khan a stately pleasure-dome decree, where Alph, the sacred river, ran."


def milliseconds(model, inputs):
    """The fastest of five forward passes."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            model(**inputs)
            times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def main():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    model = BertForMaskedLM(config).eval()
    ids = torch.tensor([list(TEXT.encode()) + [0] * 38])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    real = inputs["attention_mask"].bool()
    before = model(**inputs).logits[real]
    print(f"stock attention            {milliseconds(model, inputs):6.1f} ms")

    # 1. This package's attention under the model's own modules: nothing but the implementation changes.
    register()
    model.set_attn_implementation("convkernels")
    print(f"convkernels                {milliseconds(model, inputs):6.1f} ms")
    torch.testing.assert_close(model(**inputs).logits[real], before, rtol=1e-4, atol=1e-4)

    # 2. Composite attention: biases per distance, filters predicted by the query, a depthwise convolution of values.
    replace_attention(model, "composite", window=8, bias=True, query_rel=True, value_conv=True)
    print(f"composite attention        {milliseconds(model, inputs):6.1f} ms")
    torch.testing.assert_close(model(**inputs).logits[real], before, rtol=1e-4, atol=1e-4)
    print("the outputs are the same; now the new terms learn")

    new = [
        p for n, p in model.named_parameters() if n.endswith(("convfixed_param", "convq_param", "convolution.weight"))
    ]
    optimizer = torch.optim.AdamW(new, lr=1e-2)
    hidden = torch.rand(ids.shape) < 0.15
    labels = torch.where(hidden & real, ids, -100)
    for step in range(1, 21):
        loss = model(torch.where(hidden, 1, ids), inputs["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, 20):
            print(f"step {step:2}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
