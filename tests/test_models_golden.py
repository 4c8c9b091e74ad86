"""Blocks and models against results recorded from the original implementations, outputs and all gradients: 1e-9 in
float64 relative to the largest value, 1e-5 in float32, relative where that is more than 1. All parameters are loaded
with strict=True."""

import pytest
import torch

import convkernels as ck
from convkernels import nn as cknn
from convkernels.testing import golden

pytest.importorskip("transformers")
from convkernels.interop import bert_convolutions, fairseq, huggingface
from convkernels.models import ConvSeq2SeqConfig
from convkernels.models.blocks import ConvMixer, RelativeBias, SelfAttention
from convkernels.models.cache import decoder_cache
from convkernels.models.layers import DecoderLayer, EncoderLayer

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    reasons = ck.why_not(request.param, op="attention_grad", device="cpu")
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def collect(group, op=""):
    return [pytest.param(case, id=case.id) for case in golden.cases(group) if op in case.op]


def without_quirk(cases):
    """Where T < K, fairseq's unfolded dynamic convolution takes the softmax over T taps; ours always over K."""
    return [case for case in cases if "quirk" not in case.id]


def check_close(actual, expected, name):
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual.double() - expected).abs().max().item()
    size = max(expected.abs().max().item(), 1e-3 if actual.dtype == torch.float64 else 1.0)
    assert error <= TOLERANCE[actual.dtype] * size, f"{name}: off by {error:.3g} of {size:.3g}"


class Recorded:
    """A case in one dtype: leaves to differentiate, and the comparison of everything at the end."""

    def __init__(self, case, dtype):
        self.case, self.dtype, self.inputs = case, dtype, {}

    def input(self, name):
        self.inputs[name] = self.case[f"in.{name}"].to(self.dtype, copy=True).requires_grad_()
        return self.inputs[name]

    def parameters(self):
        """Everything in the state dict, without what is no number of the model's."""
        return {
            name.removeprefix("param."): self.case[name].to(self.dtype)
            for name in sorted(self.case.names)
            if name.startswith("param.") and self.case[name].is_floating_point()
        }

    def check(self, y, name, module, renamed, transposed=False):
        """Output and gradients; renamed: parameters -> state dict of the module, linear in each."""
        expected = self.case[f"out.{name}"]
        check_close(y, expected, name)
        y.backward(self.case[f"cot.{name}"].to(self.dtype))
        self.check_gradients(module, renamed)

    def check_gradients(self, module, renamed):
        for name, leaf in self.inputs.items():
            check_close(leaf.grad, self.case[f"grad.in.{name}"], f"grad {name}")
        gradients = {
            name.removeprefix("grad.param."): self.case[name]
            for name in sorted(self.case.names)
            if name.startswith("grad.param.")
        }
        found = dict(module.named_parameters())
        expected = renamed(gradients)
        assert expected
        for name, value in expected.items():
            if name in found:  # tied parameters have one name
                check_close(found[name].grad, value, f"grad {name}")


def padding(case, name="keep_mask"):
    mask = case.get(f"in.{name}")
    return None if mask is None else mask.bool()


def fairseq_config(options, backend, stack):
    kernel = options["kernel_size"]
    return ConvSeq2SeqConfig(
        d_model=options["embed_dim"], conv_dim=options["conv_dim"], d_ff=options["ffn_dim"], dropout=0.0,
        num_heads=options["heads"], num_filters=options["heads"], encoder_kernel_size=kernel, encoder_layers=1,
        decoder_layers=1, mixer=options["conv_type"], glu=options["glu"], kernel_softmax=options["weight_softmax"],
        mask_query=True, use_bias=True, norm="layer", norm_eps=1e-5, scale_attention=True, backend=backend,
        norm_placement="pre" if options["normalize_before"] else "post",
    )  # fmt: skip


@pytest.mark.parametrize("case", collect("fairseq_block", "Encoder"))
def test_fairseq_encoder_layer(case, backend, dtype):
    run = Recorded(case, dtype)
    layer = EncoderLayer(fairseq_config(case.options, backend, "encoder"), 0).to(dtype)
    layer.load_state_dict(fairseq.layer_state(run.parameters(), "encoder"), strict=True)
    mask = padding(case, "encoder_padding_mask")
    y = layer(run.input("x").transpose(0, 1), None if mask is None else ~mask).transpose(0, 1)
    run.check(y, "y", layer, lambda state: fairseq.layer_state(state, "encoder"))


@pytest.mark.parametrize("case", collect("fairseq_block", "Decoder"))
def test_fairseq_decoder_layer(case, backend, dtype):
    run, options = Recorded(case, dtype), case.options
    attends = "in.encoder_out" in case
    config = fairseq_config(options, backend, "decoder")
    layer = DecoderLayer(config, 0, cross_attention=attends).to(dtype)
    layer.load_state_dict(fairseq.layer_state(run.parameters(), "decoder"), strict=True)
    x, states = run.input("x").transpose(0, 1), None
    if attends:
        states = run.input("encoder_out").transpose(0, 1)
    mask = padding(case, "encoder_padding_mask")
    mask = None if mask is None else ~mask
    # While training and T < K fairseq takes the softmax over T taps; step by step over K, as we do always.
    quirk = options["conv_type"] == "dynamic" and options["T"] < options["kernel_size"]
    y = layer(x, states=states, states_mask=mask).transpose(0, 1)
    if not quirk:
        run.check(y, "y", layer, lambda state: fairseq.layer_state(state, "decoder"))
    with torch.no_grad():
        cache = decoder_cache(config)
        steps = [
            layer(x[:, t : t + 1], states=states, states_mask=mask, past_key_values=cache) for t in range(x.shape[1])
        ]
    check_close(torch.cat(steps, 1).transpose(0, 1), case["out.y_incremental"], "y, step by step")


LIGHT, DYNAMIC = collect("fairseq_lightconv", "TBC"), collect("fairseq_dynconv", "DynamicConv1dTBC")


@pytest.mark.parametrize("case", LIGHT + without_quirk(DYNAMIC))
def test_fairseq_modules(case, dtype):
    """The drop-in modules, made with fairseq's arguments, hold fairseq's parameters under fairseq's names."""
    options = case.options
    made = fairseq.DynamicConv1dTBC if "Dynamic" in case.op else fairseq.LightweightConv1dTBC
    same = (
        "input_size", "kernel_size", "padding_l", "num_heads", "weight_softmax", "renorm_padding", "bias", "conv_bias",
        "query_size", "in_proj",
    )  # fmt: skip
    run = Recorded(case, dtype)
    parameters = run.parameters()
    arguments = {name: options[name] for name in same if name in options and name in made.__init__.__code__.co_varnames}
    arguments.setdefault("input_size", case["in.x"].shape[2])
    arguments["bias"] = ("bias" if "weight" in parameters else "weight_linear.bias") in parameters
    module = made(**arguments, backend="reference").to(dtype)
    module.load_state_dict(parameters, strict=True)
    queries = {"query": run.input("query")} if "in.query" in case else {}
    y = module(run.input("x"), **queries)
    run.check(y, "y", module, lambda state: state)


@pytest.mark.parametrize("case", collect("bertconv_model"))
def test_bert_convolutions(case, backend, dtype):
    run = Recorded(case, dtype)
    state = {n.removeprefix("param."): case[n] for n in case.names if n.startswith("param.")}
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}
    model = bert_convolutions.load_checkpoint(state, case.options, backend=backend)
    assert model.dtype == dtype and not model.training
    output = model(case["in.input_ids"], padding(case), case["in.token_type_ids"], labels=case["in.labels"])
    logits, expected, real = output.logits, case["out.logits"], padding(case)
    if case.options["attention_kernel"] == "convbert":
        # An output whose whole window is padding attends to padding in the authors' code; nothing depends on it.
        logits, expected = logits[real], expected[real]
    check_close(logits, expected, "logits")
    check_close(output.loss.reshape(1), case["out.loss"].reshape(1), "loss")
    output.loss.backward()
    run.check_gradients(model, bert_convolutions.model_state)


def released_state(variables, kind):
    """The variables of a LocalConvAttnBlock, kernels stored input by output, one variable for each tap."""
    taps = sum(name.startswith(("lightwt", "dyn_conv")) and name.endswith("kernel") for name in variables)
    prefix = "dyn_conv_depthwise_dense" if kind == "dynamic_conv" else "lightwt_depthwise_dense"
    kernels = torch.stack([variables[f"{prefix}_{j}/kernel"] for j in range(taps)], -1)
    state = {
        "linear1.weight": torch.cat([variables[f"local_conv_inp_{i}/kernel"].T for i in (0, 1)]),
        "linear1.bias": torch.cat([variables[f"local_conv_inp_{i}/bias"] for i in (0, 1)]),
        "pointwise.weight": variables["separable_conv1d/pointwise_dense/kernel"].T,
        "pointwise.bias": variables["separable_conv1d/pointwise_dense/bias"],
        "linear2.weight": variables["local_conv_attn_op_projection/kernel"].T,
        "linear2.bias": variables["local_conv_attn_op_projection/bias"],
    }
    depthwise = variables["separable_conv1d/depthwise_conv_hack/depthwise_dense_0/bias"]
    if kind == "dynamic_conv":
        bias = torch.stack([variables[f"{prefix}_{j}/bias"] for j in range(taps)], -1)
        state |= {
            "conv.weight_linear.weight": kernels.flatten(1).T,
            "conv.weight_linear.bias": bias.flatten(),
            "conv.conv_bias": depthwise,
        }
    else:
        state |= {"conv.weight": kernels[:, None], "conv.bias": depthwise}
    return state


@pytest.mark.parametrize("case", collect("mesh_paper1", "Block"))
def test_released_block(case, backend, dtype):
    options, run = case.options, Recorded(case, dtype)
    kind = options["kind"]
    stack = "decoder" if options["max_relative_pos"] == 0 else "encoder"
    config = ConvSeq2SeqConfig.preset(
        kind.removesuffix("_conv"), "base", "released", d_model=options["d_model"],
        num_heads=2, num_filters=options["d_model"], encoder_kernel_size=options["kernel_size"], dropout=0.0,
        backend=backend,
    )  # fmt: skip
    block = ConvMixer(config, stack, 0).to(dtype)
    block.load_state_dict(released_state(run.parameters(), kind), strict=True)
    y = block(run.input("x"), case["in.input_ids"] != 0)
    run.check(y, "y", block, lambda state: released_state(state, kind))


@pytest.mark.parametrize("case", collect("hf", "T5Attention"))
def test_t5_attention(case, backend, dtype):
    o, run = case.options, Recorded(case, dtype)
    config = ConvSeq2SeqConfig(
        mixer="transformer", d_model=case["in.hidden_states"].shape[2], num_heads=o["num_heads"],
        head_dim=case["param.q.weight"].shape[0] // o["num_heads"],
        relative_max_distance=o["relative_attention_max_distance"],
        relative_buckets=case["param.relative_attention_bias.weight"].shape[0], backend=backend,
    )  # fmt: skip
    causal = not o["bidirectional"]
    module = torch.nn.ModuleDict({"attention": SelfAttention(config, causal), "bias": RelativeBias(config, causal)})
    module.to(dtype)

    def renamed(state):
        return {
            "bias.weight" if name.startswith("relative") else f"attention.{name}": value
            for name, value in state.items()
        }

    module.load_state_dict(renamed(run.parameters()), strict=True)
    y = module["attention"](run.input("hidden_states"), padding(case), module["bias"]())
    run.check(y, "y", module, renamed)


@pytest.mark.parametrize("case", collect("hf", "ConvBertSelfAttention"))
def test_convbert_attention(case, backend, dtype):
    o, run = case.options, Recorded(case, dtype)
    module = cknn.CompositeAttention(
        o["hidden_size"], o["num_attention_heads"], span="output", span_kernel_size=o["conv_kernel_size"],
        backend=backend, dtype=dtype,
    )  # fmt: skip
    module.load_state_dict(huggingface.convbert_names(run.parameters()), strict=True)
    run.check(module(run.input("hidden_states"), padding(case)), "y", module, huggingface.convbert_names)


@pytest.mark.parametrize("case", collect("hf", "Wav2Vec2Bert"))
def test_shaw_attention(case, backend, dtype):
    o, run = case.options, Recorded(case, dtype)
    attention = cknn.CompositeAttention(
        o["hidden_size"], o["num_attention_heads"],
        (o["left_max_position_embeddings"], o["right_max_position_embeddings"]), query_rel=True, backend=backend,
    )  # fmt: skip
    module = torch.nn.ModuleDict({"self": attention, "out": torch.nn.Linear(o["hidden_size"], o["hidden_size"])})
    module.to(dtype)
    projections = {"linear_q": "self.query", "linear_k": "self.key", "linear_v": "self.value", "linear_out": "out"}

    def renamed(state):
        result = {}
        for name, value in state.items():
            stem, _, leaf = name.partition(".")
            if stem == "distance_embedding":
                result["self.convq_param"] = value.T
            else:
                result[f"{projections[stem]}.{leaf}"] = value
        return result

    module.load_state_dict(renamed(run.parameters()), strict=True)
    y = module["out"](module["self"](run.input("hidden_states"), padding(case)))
    run.check(y, "y", module, renamed)
