"""Every recorded case of the convolutions, outputs and all gradients, to 1e-10 in float64.

The peers' layouts are reached by views only: T x B x C by a transpose; B x C x T with heads interleaved over the
channels (h = c mod H) by splitting the channels into C/H groups of H and moving the groups to the batch, so that every
channel of a group is its own head: x.view(B * C//H, H, T).transpose(1, 2).
"""

import pytest
import torch

import convkernels as ck
from convkernels.testing import golden


def collect(*groups):
    return [pytest.param(case, id=case.id) for case in golden.cases(*groups)]


def leaf(tensor):
    return None if tensor is None else tensor.clone().requires_grad_()


def interleaved(x, heads):
    """[B,C,T] with channel c in head c mod H, as [B*C/H, T, H] with one channel per head; a view."""
    batch, channels, length = x.shape
    return x.view(batch * channels // heads, heads, length).transpose(1, 2)


def test_the_set_is_not_empty():
    assert len(golden.cases("fairseq_lightconv")) >= 60
    assert len(golden.cases("fairseq_dynconv")) >= 40
    assert len(golden.cases("fairseq_dropconnect")) == 6
    assert len(golden.cases("mesh_paper1")) >= 16


@pytest.mark.parametrize("case", collect("fairseq_lightconv"))
def test_lightweight(case, backend):
    options = case.options
    x, weight, bias = leaf(case["in.x"]), leaf(case["param.weight"]), leaf(case.get("param.bias"))
    kernel = weight.squeeze(1)
    if case.op == "fairseq.LightweightConv1d":
        batch, channels, length = x.shape
        view = interleaved(x, options["num_heads"])
        assert view.data_ptr() == x.data_ptr()
        y = ck.lightweight_conv1d(
            view, kernel, softmax=options["weight_softmax"], padding=options["padding"], backend=backend
        )
        y = y.transpose(1, 2).reshape(batch, channels, length)
        y = y if bias is None else y + bias[:, None]
    else:
        y = ck.lightweight_conv1d(
            x.transpose(0, 1),
            kernel,
            bias,
            softmax=options["weight_softmax"],
            padding=options["padding_l"],
            backend=backend,
        ).transpose(0, 1)
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    golden.check(x.grad, case["grad.in.x"], "grad x")
    golden.check(weight.grad, case["grad.param.weight"], "grad weight")
    if bias is not None:
        golden.check(bias.grad, case["grad.param.bias"], "grad bias")


def run_steps(step, x, weight_at, state, **kwargs):
    """Feeds x [T,B,C] one position at a time."""
    return torch.stack([step(x[t], state, weight_at(t), **kwargs) for t in range(x.shape[0])])


def check_buffer(state, case):
    """fairseq keeps [1, B, C, min(T, K-1)], oldest first."""
    if "out.final_input_buffer" in case:
        expected = case["out.final_input_buffer"][0].transpose(1, 2)
        golden.check(state[:, state.shape[1] - expected.shape[1] :], expected, "final state")


@pytest.mark.parametrize("case", [p for p in collect("fairseq_lightconv") if "out.y_incremental" in p.values[0]])
def test_lightweight_incremental(case, backend):
    options = case.options
    x = case["in.x"]
    kernel = case["param.weight"].squeeze(1)
    state = x.new_zeros(x.shape[1], options["kernel_size"] - 1, x.shape[2])
    y = run_steps(
        ck.lightweight_conv1d_step,
        x,
        lambda t: kernel,
        state,
        softmax=options["weight_softmax"],
        bias=case.get("param.bias"),
        backend=backend,
    )
    golden.check(y, case["out.y_incremental"], "incremental y")
    check_buffer(state, case)


class DynamicCall:
    """The kernel predictor of a recorded dynamic convolution, run up to the convolution itself."""

    def __init__(self, case):
        options = self.options = case.options
        self.case = case
        self.parameters = {
            n.removeprefix("param."): leaf(case[n]) for n in sorted(case.names) if n.startswith("param.")
        }
        self.x = leaf(case["in.x"])
        self.query = leaf(case.get("in.query"))
        # Two separate uses of x, so that the two parts of its gradient can be compared.
        self.convolved, queried = self.x + 0, self.x + 0
        self.queried = queried if self.query is None else self.query + 0
        for part in (self.convolved, self.queried):
            part.retain_grad()
        predicted = torch.nn.functional.linear(
            self.queried, self.parameters["weight_linear.weight"], self.parameters.get("weight_linear.bias")
        )
        self.values = self.convolved
        if options["in_proj"]:
            channels = options["input_size"]
            self.values, predicted = predicted[..., :channels], predicted[..., channels:]
            self.values.retain_grad()
        self.raw = predicted.view(*predicted.shape[:2], options["num_heads"], options["kernel_size"])
        self.raw.retain_grad()
        self.bias = self.parameters.get("conv_bias") if options["conv_bias"] else None
        self.modes = {
            "softmax": options["weight_softmax"],
            # fairseq ignores renorm_padding without the softmax; here it would be an error to ask for it.
            "renormalize": options["renorm_padding"] and options["weight_softmax"],
        }

    def run(self, backend, raw=None, padding=None):
        raw = self.raw if raw is None else raw
        return ck.dynamic_conv1d(
            self.values.transpose(0, 1),
            raw.transpose(0, 1),
            None if self.bias is None else self.bias.view(-1),
            padding=self.options["padding_l"] if padding is None else padding,
            backend=backend,
            **self.modes,
        ).transpose(0, 1)

    def check_gradients(self, y):
        case = self.case
        y.backward(case["cot.y"])
        pairs = {
            "in.x": self.x,
            "in.query": self.query,
            "aux.weights_raw": self.raw,
            "in.x_conv_only": self.convolved,
            "in.x_query_only": self.queried,
            "aux.x_projected": self.values,
        }
        pairs.update({f"param.{n}": p for n, p in self.parameters.items()})
        compared = 0
        for name, tensor in pairs.items():
            if f"grad.{name}" in case:
                golden.check(tensor.grad, case[f"grad.{name}"], f"grad {name}")
                compared += 1
        assert compared == sum(n.startswith("grad.") for n in case.names)


@pytest.mark.parametrize("case", [p for p in collect("fairseq_dynconv") if not p.values[0].quirk])
def test_dynamic(case, backend):
    call = DynamicCall(case)
    y = call.run(backend)
    golden.check(y, case["out.y"], "y")
    call.check_gradients(y)


@pytest.mark.parametrize("case", [p for p in collect("fairseq_dynconv") if p.values[0].quirk])
def test_dynamic_quirk(case, backend):
    """Documented: softmax over all K taps. With T < K and causal padding fairseq's unfolded path first narrows the
    logits to the last T taps; done explicitly, that is this package's causal convolution with T taps.
    """
    call = DynamicCall(case)
    length, taps = call.raw.shape[0], call.options["kernel_size"]
    y = call.run(backend, call.raw[..., taps - length :], length - 1)
    golden.check(y, case["out.y"], "y")
    call.check_gradients(y)
    documented = call.run(backend)
    assert (documented - case["out.y"]).abs().max() > 1e-3
    if "out.y_incremental" in case:
        golden.check(documented, case["out.y_incremental"], "y over all taps")


@pytest.mark.parametrize("case", [p for p in collect("fairseq_dynconv") if "out.y_incremental" in p.values[0]])
def test_dynamic_incremental(case, backend):
    call = DynamicCall(case)
    x, raw = call.values.detach(), call.raw.detach()
    state = x.new_zeros(x.shape[1], call.options["kernel_size"] - 1, x.shape[2])
    outputs = []
    for t in range(x.shape[0]):
        position = torch.tensor([t]) if call.modes["renormalize"] else None
        outputs.append(
            ck.dynamic_conv1d_step(
                x[t],
                state,
                raw[t],
                bias=None if call.bias is None else call.bias.detach().view(-1),
                position=position,
                backend=backend,
                **call.modes,
            )
        )
    golden.check(torch.stack(outputs), case["out.y_incremental"], "incremental y")
    check_buffer(state, case)


def band_to_taps(matrix, batch, heads, taps, left):
    """A mask over (output t, input s), [B*H, T, T], read along the taps: [B, T, H, K], 0 outside the sequence."""
    length = matrix.shape[1]
    source = torch.arange(length)[:, None] + torch.arange(taps) - left
    inside = (source >= 0) & (source < length)
    rows = matrix.gather(2, source.clamp(0, length - 1).expand(batch * heads, -1, -1)) * inside
    return rows.view(batch, heads, length, taps).transpose(1, 2)


@pytest.mark.parametrize("case", collect("fairseq_dropconnect"))
def test_dropconnect(case, backend):
    """Recorded masks multiply the normalised weights, which then enter as raw weights, per position where the mask
    is.
    """
    o = case.options
    batch, length, heads, taps, left = o["B"], o["T"], o["num_heads"], o["kernel_size"], o["padding_l"]
    x, recorded = leaf(case["in.x"]), case["in.dropout_mask"]
    parameters = {n.removeprefix("param."): leaf(case[n]) for n in sorted(case.names) if n.startswith("param.")}
    if o["kind"] == "light1d":
        kernel = torch.softmax(parameters["weight"].squeeze(1), -1) * recorded.squeeze(1)
        y = ck.lightweight_conv1d(interleaved(x, heads), kernel, softmax=False, padding=left, backend=backend)
        y = y.transpose(1, 2).reshape(x.shape)
    else:
        if "weight" in parameters:
            logits = parameters["weight"].squeeze(1)
        else:
            logits = torch.nn.functional.linear(x, parameters["weight_linear.weight"], parameters["weight_linear.bias"])
            logits = logits.view(length, batch, heads, taps).transpose(0, 1)
        if o["kind"] == "dyn_renorm":
            inside = band_to_taps(torch.ones(batch * heads, length, length), batch, heads, taps, left) > 0
            logits = logits.masked_fill(~inside, float("-inf"))
        if recorded.shape[-2:] == (length, length):
            keep = band_to_taps(recorded, batch, heads, taps, left)
        else:
            keep = recorded.view(length, batch, heads, taps).transpose(0, 1)
        kernel = torch.softmax(logits, -1) * keep
        y = ck.dynamic_conv1d(x.transpose(0, 1), kernel, softmax=False, padding=left, backend=backend).transpose(0, 1)
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    golden.check(x.grad, case["grad.in.x"], "grad x")
    for name, parameter in parameters.items():
        golden.check(parameter.grad, case[f"grad.param.{name}"], f"grad {name}")


@pytest.mark.parametrize("case", collect("mesh_paper1"))
def test_mesh(case, backend):
    """Mesh's LocalConvAttnBlock and its inner layers: gate and mask of the block are this package's gate and mask;
    filter c mod (d/u) of channel c is reached by one call per group of d/u channels, each a view.
    """
    o = case.options
    p = {n.removeprefix("param."): leaf(case[n]) for n in sorted(case.names) if n.startswith("param.")}
    x, mask = leaf(case["in.x"]), case["in.input_ids"] != 0
    values, gate, inner = x, None, x
    if o["level"] == "block":
        values = x @ p["local_conv_inp_0/kernel"] + p["local_conv_inp_0/bias"]
        gate = x @ p["local_conv_inp_1/kernel"] + p["local_conv_inp_1/bias"]
        inner = values * torch.sigmoid(gate)
    dynamic = o["kind"] == "dynamic_conv"
    stem = "dyn_conv_depthwise_dense" if dynamic else "lightwt_depthwise_dense"
    kernels = [p[f"{stem}_{j}/kernel"] for j in range(o["kernel_size"])]
    if dynamic:
        kernels = [inner @ k + p[f"{stem}_{j}/bias"] for j, k in enumerate(kernels)]
    weight = torch.stack(kernels, -1)
    heads = weight.shape[-2]
    assert heads * o["effective_num_unique_depth_filters"] == o["d_model"]
    bias = p["separable_conv1d/depthwise_conv_hack/depthwise_dense_0/bias"]
    convolve = ck.dynamic_conv1d if dynamic else ck.lightweight_conv1d
    parts = []
    for first in range(0, o["d_model"], heads):
        group = slice(first, first + heads)
        parts.append(
            convolve(
                values[..., group],
                weight,
                bias[group],
                softmax=True,
                padding=o["padding_l"],
                mask=mask,
                gate=None if gate is None else gate[..., group],
                backend=backend,
            )
        )
    y = torch.cat(parts, -1) @ p["separable_conv1d/pointwise_dense/kernel"] + p["separable_conv1d/pointwise_dense/bias"]
    if o["level"] == "block":
        y = y @ p["local_conv_attn_op_projection/kernel"] + p["local_conv_attn_op_projection/bias"]
    golden.check(y, case["out.y"], "y")
    y.backward(case["cot.y"])
    golden.check(x.grad, case["grad.in.x"], "grad x")
    for name, parameter in p.items():
        golden.check(parameter.grad, case[f"grad.param.{name}"], f"grad {name}")
