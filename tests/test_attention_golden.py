"""Every recorded case of attention, outputs and all gradients, to 1e-10 in float64.

What the original implementations do with masks differs in three documented places: they add -10000 instead of hiding
keys, so a row whose keys are all masked attends as if nothing were masked ("fullrow"), and an output of the authors'
ConvBERT heads whose whole window is padding attends to all its padding and to everything beyond the window.
"""

import pytest
import torch
import torch.nn.functional as F

import convkernels as ck
from convkernels import nn as cknn
from convkernels.ops.attention.t5 import buckets
from convkernels.testing import golden

OP = "attention_grad"


def collect(group, op=""):
    return [pytest.param(case, id=case.id) for case in golden.cases(group) if op in case.op]


def parameters(case):
    return {
        name.removeprefix("param."): case[name].clone().requires_grad_(case[name].is_floating_point())
        for name in sorted(case.names)
        if name.startswith("param.")
    }


def check_gradients(case, x, found):
    """found: name -> tensor with the gradient of a parameter."""
    golden.check(x.grad, case["grad.in.hidden_states"], "grad hidden_states")
    expected = {name for name in case.names if name.startswith("grad.param.")}
    assert expected == {f"grad.param.{name}" for name in found if found[name].grad is not None}
    for name in expected:
        golden.check(found[name.removeprefix("grad.param.")].grad, case[name], name)


def padding(case):
    mask = case.get("in.keep_mask")
    return None if mask is None else mask.bool()


def authors_options(options):
    """The recorded module's option strings as arguments of CompositeAttention."""
    terms = options["attention_kernel"].split(" ")[0].split("_")
    light = {"convfixed", "convq", "convk"} & set(terms)
    result = dict(
        window=options["num_positions_each_dir"],
        qk=bool({"qk", "dot"} & set(terms)) or not light,
        bias="convfixed" in terms,
        query_rel="convq" in terms,
        key_rel="convk" in terms,
        value_conv="convolution" in terms,
        value_conv_scale="scaled" in terms,
        span="key" if "convbert" in terms else None,
    )
    for argument, kind in (("query_key", options["qk"]), ("value", options["value_forward"])):
        if not kind.startswith("convolution"):
            continue
        words, reach, groups = kind.split(" ")
        words = words.split("_")
        result[argument] = "mixed" if "mixed" in words else "conv"
        result["conv_kernel_size"] = 2 * int(reach) + 1
        result[f"{argument}_groups"] = None if "depth" in words else int(groups)
        if "depth" in words:
            result["activation"] = "act" not in words
    if options["remove_qk"]:
        result["query_key"] = "identity"
    return result


SPAN_NAMES = {
    "convbert_key_depthwise": "span.depthwise",
    "convbert_key_pointwise": "span.pointwise",
    "lightweight_kernel": "span.kernel",
}


def ours(name):
    """The name in this package of one of the authors' parameters."""
    stem, _, leaf = name.rpartition(".")
    return f"{SPAN_NAMES[stem]}.{leaf}" if stem in SPAN_NAMES else name


def load(case, backend):
    module = cknn.CompositeAttention(
        case.options["hidden_size"],
        case.options["num_attention_heads"],
        backend=backend,
        dtype=torch.float64,
        **authors_options(case.options),
    )
    given = {n.removeprefix("param."): case[n] for n in case.names if n.startswith("param.")}
    given.pop("relative_positions_mat", None)
    module.load_state_dict({ours(name): value for name, value in given.items()})
    return module, {name: dict(module.named_parameters())[ours(name)] for name in given}


def attend_to_padding(module, x, mask):
    """The module with x as the authors prepare it and a mask that hides nothing."""
    if module.zeroes_padding:
        x = torch.where(mask[..., None], x, 0.0)
    y = module(x)
    if module.convolution is not None:
        # Only the depthwise term still needs to know the padding.
        v = module._project("value", module.value_kind, x, None)
        lost = torch.where(mask[..., None], 0.0, v)
        reach = module.window[0]
        term = F.conv1d(lost.transpose(1, 2), module.convolution.weight, padding=reach, groups=x.shape[2])
        scale = module.convolution_scalar.view(-1).repeat_interleave(module.head_size)
        y = y - term.transpose(1, 2) * scale
    return y


def span_ties(module, x, mask):
    """The authors' ConvBERT heads for outputs whose whole window is padding: kernel - 10000 inside the window, -10000
    for every key beyond it that is real, -20000 for the others."""
    x = torch.where(mask[..., None], x, 0.0)
    span, (_, T, C), H = module.span, x.shape, module.heads // 2
    kernels = span.kernel(module.query(x) * span.pointwise(span.depthwise(x))).unflatten(2, (H, -1))
    offset = torch.arange(T) - torch.arange(T)[:, None]
    reach = span.kernel_size // 2
    inside = offset.abs() <= reach
    index = (offset.clamp(-reach, reach) + reach).T.expand(x.shape[0], H, T, T)
    scores = kernels.transpose(1, 2).gather(3, index).transpose(2, 3)
    scores = torch.where(inside, scores, -10000.0) + torch.where(mask[:, None, None], 0.0, -10000.0)
    v = module.value(x)[..., C // 2 :].unflatten(2, (H, -1))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(3), v).flatten(2)


@pytest.mark.parametrize("case", collect("bertconv_attention"))
def test_authors(case, backend):
    module, found = load(case, backend)
    x, mask = case["in.hidden_states"].clone().requires_grad_(), padding(case)
    y = module(x, mask)
    assert y.isfinite().all()
    if mask is not None:
        empty = ~mask.any(1)
        if empty.any():
            documented = y
            y = torch.where(empty[:, None, None], attend_to_padding(module, x, mask), y)
            if module.convolution is None and module.span is None:
                assert not documented[empty].any(), "a query that sees no key gets 0"
        if module.span is not None:
            near_real = F.max_pool1d(mask.double()[:, None], module.span.kernel_size, 1, module.span.kernel_size // 2)
            lonely = near_real[:, 0] == 0
            half = module.channels // 2
            tied = span_ties(module, x, mask)
            y = torch.cat([y[..., :half], torch.where(lonely[..., None], tied, y[..., half:])], 2)
    golden.check(y, case["out.context"], "context")
    y.backward(case["cot.context"])
    check_gradients(case, x, found)


def test_the_authors_variants_are_complete():
    assert len({case.op for case in golden.cases("bertconv_attention")}) == 28


def split(x, heads):
    return x.unflatten(2, (heads, -1))


def clipped_shaw(case, p, x, mask, backend):
    o = case.options
    H = o["num_attention_heads"]
    q, k, v = (split(F.linear(x, p[f"linear_{n}.weight"], p[f"linear_{n}.bias"]), H) for n in "qkv")
    y = ck.composite_attention(
        q, k, v, query_rel=p["distance_embedding.weight"].T, key_mask=mask, backend=backend,
        window=(o["left_max_position_embeddings"], o["right_max_position_embeddings"]),
    )  # fmt: skip
    return F.linear(y.flatten(2), p["linear_out.weight"], p["linear_out.bias"])


@pytest.mark.parametrize("case", collect("hf", "Wav2Vec2Bert"))
def test_shaw(case, backend):
    x, p = case["in.hidden_states"].clone().requires_grad_(), parameters(case)
    y = clipped_shaw(case, p, x, padding(case), backend)
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    check_gradients(case, x, p)


@pytest.mark.parametrize("case", collect("hf", "T5_relative_position_bucket"))
def test_t5_buckets(case):
    o = case.options
    found = buckets(case["in.relative_position"], o["bidirectional"], o["num_buckets"], o["max_distance"])
    assert torch.equal(found, case["out.bucket"])


@pytest.mark.parametrize("case", collect("hf", "T5Attention"))
@pytest.mark.parametrize("whole", [False, True], ids=["window", "whole_length"])
def test_t5(case, whole, backend):
    """With a table for every offset of the sequence, and with the shorter one that clipping continues."""
    o, p = case.options, parameters(case)
    x = case["in.hidden_states"].clone().requires_grad_()
    q, k, v = (split(F.linear(x, p[f"{n}.weight"]), o["num_heads"]) for n in "qkv")
    reach = o["relative_attention_max_distance"]
    window = (reach, reach if o["bidirectional"] else 0)
    if whole:
        window = (o["S"] - 1, o["S"] - 1)
    bias = ck.t5_relative_bias(
        p["relative_attention_bias.weight"],
        o["S"] if whole else None,
        bidirectional=o["bidirectional"],
        max_distance=reach,
    )
    y = ck.composite_attention(
        q, k, v, bias=bias, window=window, scale=1.0, causal=not o["bidirectional"], key_mask=padding(case),
        backend=backend,
    )  # fmt: skip
    y = F.linear(y.flatten(2), p["o.weight"])
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    check_gradients(case, x, p)


HF_NAMES = {
    "query.weight": "query.weight",
    "query.bias": "query.bias",
    "key.weight": "key.weight",
    "key.bias": "key.bias",
    "value.weight": "value.weight",
    "value.bias": "value.bias",
    "key_conv_attn_layer.bias": "span.pointwise.bias",
    "key_conv_attn_layer.depthwise.weight": "span.depthwise.weight",
    "key_conv_attn_layer.pointwise.weight": "span.pointwise.weight",
    "conv_kernel_layer.weight": "span.kernel.weight",
    "conv_kernel_layer.bias": "span.kernel.bias",
    "conv_out_layer.weight": "span.value.weight",
    "conv_out_layer.bias": "span.value.bias",
}


@pytest.mark.parametrize("case", collect("hf", "ConvBertSelfAttention"))
def test_convbert(case, backend):
    o = case.options
    module = cknn.CompositeAttention(
        o["hidden_size"],
        o["num_attention_heads"],
        span="output",
        span_kernel_size=o["conv_kernel_size"],
        backend=backend,
        dtype=torch.float64,
    )
    own = dict(module.named_parameters())
    state = {name: case[f"param.{theirs}"].reshape(own[name].shape) for theirs, name in HF_NAMES.items()}
    module.load_state_dict(state)
    x = case["in.hidden_states"].clone().requires_grad_()
    y = module(x, padding(case))
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    golden.check(x.grad, case["grad.in.hidden_states"], "grad hidden_states")
    for theirs, name in HF_NAMES.items():
        expected = case[f"grad.param.{theirs}"]
        golden.check(own[name].grad.reshape(expected.shape), expected, f"grad {theirs}")
