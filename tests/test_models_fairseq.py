"""fairseq: its checkpoints against its model written out, and its two modules."""

import argparse
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import convkernels as ck

pytest.importorskip("transformers")
from convkernels.interop import fairseq


def fairseq_state(args, sizes, old_names=False):
    """Random parameters under fairseq's names."""
    torch.manual_seed(2)
    C, F_, H = args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads
    state = {}

    def linear(name, outputs, inputs):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, dtype=torch.float64) * inputs**-0.5
        state[f"{name}.bias"] = torch.randn(outputs, dtype=torch.float64) * 0.1

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(C, dtype=torch.float64)
        state[f"{name}.bias"] = 0.1 * torch.randn(C, dtype=torch.float64)

    for stack, taps in (("encoder", args.encoder_kernel_size_list), ("decoder", args.decoder_kernel_size_list)):
        table = torch.randn(sizes[stack], C, dtype=torch.float64) * C**-0.5
        if args.share_all_embeddings and stack == "decoder":
            table = state["encoder.embed_tokens.weight"]
        state[f"{stack}.embed_tokens.weight"] = table
        state[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        state[f"{stack}.version"] = torch.tensor([2.0])
        for i, K in enumerate(taps):
            prefix = f"{stack}.layers.{i}."
            linear(prefix + "linear1", 2 * C if args.encoder_glu else C, C)
            linear(prefix + "linear2", C, C)
            linear(prefix + "fc1", F_, C)
            linear(prefix + "fc2", C, F_)
            if args.encoder_conv_type == "lightweight":
                state[prefix + "conv.weight"] = torch.randn(H, 1, K, dtype=torch.float64)
            else:
                state[prefix + "conv.weight_linear.weight"] = torch.randn(H * K, C, dtype=torch.float64) * 0.3
                state[prefix + "conv.conv_bias"] = torch.randn(1, 1, C, dtype=torch.float64)
            if stack == "encoder":
                for number in (1, 2):
                    norm(prefix + (f"layer_norms.{number - 1}" if old_names else f"layer_norm{number}"))
                continue
            for name in ("conv_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
                norm(prefix + name)
            if old_names:
                state[prefix + "encoder_attn.in_proj_weight"] = torch.randn(3 * C, C, dtype=torch.float64) * C**-0.5
                state[prefix + "encoder_attn.in_proj_bias"] = torch.randn(3 * C, dtype=torch.float64)
                linear(prefix + "encoder_attn.out_proj", C, C)
            else:
                for name in "qkv":
                    linear(prefix + f"encoder_attn.{name}_proj", C, C)
                linear(prefix + "encoder_attn.out_proj", C, C)
        if args.encoder_normalize_before:
            norm(f"{stack}.layer_norm")
    if not args.share_decoder_input_output_embed:
        state["decoder.embed_out"] = torch.randn(sizes["decoder"], C, dtype=torch.float64) * C**-0.5
    return state


def fairseq_forward(args, state, source, target, pad=1):
    """fairseq's model written out: one convolution tap after the other, positions as sines beside cosines."""
    C, H = args.encoder_embed_dim, args.encoder_attention_heads
    pre = args.encoder_normalize_before

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (C,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def add(name, x, branch):
        return x + branch(norm(name, x)) if pre else norm(name, x + branch(x))

    def embed(stack, ids):
        place = (ids != pad).long().cumsum(1) * (ids != pad) + pad
        rates = torch.exp(torch.arange(C // 2) * -(math.log(10000) / (C // 2 - 1)))
        angles = place[..., None].float() * rates
        positions = torch.cat([angles.sin(), angles.cos()], 2) * (ids != pad)[..., None]
        return C**0.5 * state[f"{stack}.embed_tokens.weight"][ids] + positions

    def convolve(prefix, x, K, left, padding):
        x = linear(prefix + "linear1", x)
        if args.encoder_glu:
            x = F.glu(x, -1)
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        if args.encoder_conv_type == "lightweight":
            taps = state[prefix + "conv.weight"].view(H, K).expand(*x.shape[:2], H, K)
        else:
            taps = F.linear(x, state[prefix + "conv.weight_linear.weight"]).unflatten(2, (H, K))
        taps = taps.softmax(-1)
        y = torch.zeros_like(x).unflatten(2, (H, -1))
        for t in range(x.shape[1]):
            for j in range(K):
                if 0 <= t + j - left < x.shape[1]:
                    y[:, t] += taps[:, t, :, j, None] * x[:, t + j - left].unflatten(1, (H, -1))
        return linear(prefix + "linear2", y.flatten(2))

    def feed_forward(prefix, x):
        return linear(prefix + "fc2", linear(prefix + "fc1", x).relu())

    def attend(prefix, x, states, padding):
        if prefix + "encoder_attn.in_proj_weight" in state:
            weights = state[prefix + "encoder_attn.in_proj_weight"].chunk(3)
            biases = state[prefix + "encoder_attn.in_proj_bias"].chunk(3)
            q, k, v = (F.linear(z, w, b) for z, w, b in zip((x, states, states), weights, biases, strict=True))
        else:
            q, k, v = (
                linear(f"{prefix}encoder_attn.{n}_proj", z) for n, z in zip("qkv", (x, states, states), strict=True)
            )
        q, k, v = (z.unflatten(2, (H, -1)).transpose(1, 2) for z in (q, k, v))
        scores = (q * (C // H) ** -0.5) @ k.transpose(2, 3)
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
        return linear(prefix + "encoder_attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    padding = source == pad
    x = embed("encoder", source)
    for i, K in enumerate(args.encoder_kernel_size_list):
        prefix = f"encoder.layers.{i}."
        names = [
            prefix + n
            for n in (("layer_norms.0", "layer_norms.1"), ("layer_norm1", "layer_norm2"))[
                prefix + "layer_norm1.weight" in state
            ]
        ]
        x = add(names[0], x, lambda z, p=prefix, K=K: convolve(p, z, K, K // 2, padding))
        x = add(names[1], x, lambda z, p=prefix: feed_forward(p, z))
    states = norm("encoder.layer_norm", x) if pre else x
    x = embed("decoder", target)
    for i, K in enumerate(args.decoder_kernel_size_list):
        prefix = f"decoder.layers.{i}."
        x = add(prefix + "conv_layer_norm", x, lambda z, p=prefix, K=K: convolve(p, z, K, K - 1, None))
        x = add(prefix + "encoder_attn_layer_norm", x, lambda z, p=prefix: attend(p, z, states, padding))
        x = add(prefix + "final_layer_norm", x, lambda z, p=prefix: feed_forward(p, z))
    x = norm("decoder.layer_norm", x) if pre else x
    return x @ state.get("decoder.embed_out", state["decoder.embed_tokens.weight"]).T


CHECKPOINTS = {
    "dynamic, one vocabulary": dict(),
    "lightweight, two vocabularies": dict(
        encoder_conv_type="lightweight", share_all_embeddings=False, encoder_glu=False,
        share_decoder_input_output_embed=False,
    ),
    "old names, norm first": dict(old_names=True, encoder_normalize_before=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fairseq_checkpoints(name, tmp_path):
    changes = dict(CHECKPOINTS[name])
    old_names = changes.pop("old_names", False)
    options = dict(
        encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=4, encoder_normalize_before=False,
        encoder_conv_type="dynamic", encoder_glu=True, encoder_kernel_size_list=[3, 7],
        decoder_kernel_size_list=[3, 5, 7],
        share_all_embeddings=True, share_decoder_input_output_embed=True, weight_softmax=True, dropout=0.1,
        max_source_positions=64, max_target_positions=64,
    ) | changes  # fmt: skip
    options |= {
        n.replace("encoder", "decoder"): v for n, v in options.items() if n.startswith("encoder") and "kernel" not in n
    }
    args = argparse.Namespace(**options)
    sizes = {"encoder": 50, "decoder": 50 if options["share_all_embeddings"] else 40}
    state = fairseq_state(args, sizes, old_names)
    torch.save({"args": args, "model": state}, tmp_path / "checkpoint.pt")
    model = fairseq.load_checkpoint(tmp_path / "checkpoint.pt")
    source = torch.randint(4, 50, (2, 9))
    source[1, 6:] = 1
    target = torch.randint(4, 40, (2, 8))
    target[:, 0] = 2
    expected = fairseq_forward(args, state, source, target)
    with torch.no_grad():
        actual = model(source, (source != 1).long(), target).logits
        again = fairseq.load_checkpoint({"cfg": {"model": vars(args)}, "model": state}, backend="reference")
        assert torch.allclose(again(source, source != 1, target).logits, actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # the sines are float32
    search = dict(attention_mask=(source != 1).long(), max_new_tokens=20, num_beams=3, do_sample=False)
    tokens = model.generate(source, **search)
    assert tokens[0, 0] == 2 and torch.equal(tokens, model.generate(source, use_cache=False, **search))


def test_fairseq_checkpoints_that_cannot_be_loaded():
    args = dict(encoder_embed_dim=16, encoder_attention_heads=4, adaptive_softmax_cutoff="10,20")
    with pytest.raises(ValueError, match="argument 'adaptive_softmax_cutoff': expected None, got '10,20'"):
        fairseq.config_from_args(args, {})
    args = dict(encoder_embed_dim=16, decoder_embed_dim=32)
    with pytest.raises(ValueError, match="argument 'embed_dim': expected one value for both stacks, got 16 and 32"):
        fairseq.config_from_args(args, {})
    with pytest.raises(ValueError, match="'self_attn.weight' is no parameter of a LightConv encoder layer"):
        fairseq.layer_state({"self_attn.weight": torch.zeros(1)}, "encoder")


MODULES = {
    "light": lambda **o: fairseq.LightweightConv1dTBC(16, 7, 6, 4, weight_softmax=True, bias=True, **o),
    "dynamic": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, bias=True, conv_bias=True, **o),
    "renormalized": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, renorm_padding=True, **o),
    "query": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, query_size=8, **o),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fairseq_modules_step_by_step(name, backend):
    """With incremental_state, beams reordered on the way, as with the whole sequence at once."""
    if ck.why_not(backend):
        pytest.skip("; ".join(ck.why_not(backend)))
    module = MODULES[name](backend=backend)
    x, order = torch.randn(17, 3, 16), torch.tensor([2, 0, 0])
    query = {"query": torch.randn(17, 3, 8)} if name == "query" else {}
    rows = torch.cat([x[:9, order], x[9:]])
    queries = {k: torch.cat([v[:9, order], v[9:]]) for k, v in query.items()}
    expected = module(rows, **queries)
    state, other = {}, MODULES[name](backend=backend)
    for t in range(17):
        if t == 9:
            module.reorder_incremental_state(state, order)
        y = module(x[t : t + 1], state, **{k: v[t : t + 1] for k, v in query.items()})
        if t >= 9:
            torch.testing.assert_close(y[0], expected[t], rtol=1e-5, atol=1e-5)
        other(x[t : t + 1], state, **{k: v[t : t + 1] for k, v in query.items()})  # another module's state is its own
    with pytest.raises(ValueError, match="argument 'x': expected one position, because of incremental_state, got 2"):
        module(x[:2], state)


def test_copies_of_a_fairseq_module_decode_apart():
    """Layers made by deepcopy, copy and pickle share no state, as little as layers made one by one."""
    first = MODULES["light"](backend="reference")
    layers = [first, copy.deepcopy(first), copy.copy(first), pickle.loads(pickle.dumps(first))]
    x, state = torch.randn(9, 2, 16), {}
    with torch.no_grad():
        expected = x
        for layer in layers:
            expected = layer(expected)
        rows = []
        for row in x.split(1):
            for layer in layers:
                row = layer(row, state)
            rows.append(row)
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)
    assert len(state) == len(layers)


def test_a_step_of_a_fairseq_module():
    module = MODULES["light"](backend="reference")
    x, state = torch.randn(5, 2, 16), module.init_state(2)
    with torch.no_grad():
        y = torch.stack([module.step(row, state) for row in x])
    torch.testing.assert_close(y, module(x).detach(), rtol=1e-5, atol=1e-5)


def test_other_forms_of_fairseq_modules_load():
    light = MODULES["light"]()
    state = dict(light.state_dict(), weight=torch.randn(4, 7))  # the CUDA form
    torch.nn.Sequential(light).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert torch.equal(light.weight[:, 0], state["weight"])
    plain = fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True)
    unused = dict(plain.state_dict(), conv_bias=torch.randn(1, 1, 16))  # the scriptable form, which never adds it
    plain.load_state_dict(unused)
    with pytest.raises(RuntimeError, match="conv_bias"):
        fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, conv_bias=True).load_state_dict(unused)


class Unwanted:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_fairseq_files_with_values_of_numpy(tmp_path):
    """They are read, written by numpy 1 or 2; what could run code is not."""
    np = pytest.importorskip("numpy")
    file = tmp_path / "checkpoint.pt"
    values = [np.float64(3.2), np.float32(1), np.int64(4), np.bool_(True), np.arange(3), np.ones((2, 2), np.float16)]
    keys = "expected the parameters under 'model' and fairseq's arguments under 'args' or 'cfg', got "
    torch.save({"model": {}, "extra_state": {"val_loss": values}}, file)
    with pytest.raises(ValueError, match=f"load_checkpoint: argument 'checkpoint': {keys}.'extra_state', 'model'.$"):
        fairseq.load_checkpoint(file)
    content = pickle.dumps(np.float64(2.5), 2)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    for name in (old, new):
        with torch.serialization.safe_globals(fairseq._plain_types()):
            found = torch._weights_only_unpickler.load(io.BytesIO(content.replace(new, old).replace(old, name)))
        assert found == 2.5
    for unwanted in (Unwanted(), np.array([None], dtype=object)):
        torch.save({"model": {}, "args": unwanted}, file)
        with pytest.raises(ValueError, match="argument 'checkpoint': expected a file of parameters.*, got one with"):
            fairseq.load_checkpoint(file)
    for content in ({"model": {}}, {"model": {}, "cfg": {}}, {"args": {}}):
        with pytest.raises(ValueError, match=keys):
            fairseq.load_checkpoint(content)


def test_fairseq_files_that_are_something_else(tmp_path):
    np = pytest.importorskip("numpy")
    file, args = tmp_path / "checkpoint.pt", argparse.Namespace()
    for content in (b"hello", b"", b"PK\x03\x04", pickle.dumps([1], 2)[:-3], b"\x80\x02."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="argument 'checkpoint': expected a file that torch.save wrote.*kpoint.pt"):
            fairseq.load_checkpoint(file)
    keys = "load_checkpoint: argument 'checkpoint': expected the parameters under 'model' and fairseq's arguments under"
    for content in ([1], torch.ones(2), {"model": {}, "cfg": "x"}, {"model": {}, "cfg": [1]}, {"model": {}, "args": 3}):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"{keys} 'args' or 'cfg'.*, got"):
            fairseq.load_checkpoint(file)
    torch.save({"model": {}, "args": np.datetime64("2020-01-01")}, file)
    with pytest.raises(ValueError, match="got one with numpy.dtypes.DateTime64DType in it"):
        fairseq.load_checkpoint(file)
    for state in (None, {}, [1], {"encoder.embed_tokens.weight": 3}):
        with pytest.raises(ValueError, match="argument 'checkpoint': expected tensors by name as the parameters, got"):
            fairseq.load_checkpoint({"model": state, "args": args})
    with pytest.raises(ValueError, match="'state': expected parameters of a LightConvModel with a matrix 'encoder.emb"):
        fairseq.load_checkpoint({"model": {"encoder.layers.x.weight": torch.zeros(1)}, "args": args})
    with pytest.raises(ValueError, match="argument 'checkpoint': expected a path or a dict, got 5 of type int"):
        fairseq.load_checkpoint(5)
    with pytest.raises(FileNotFoundError):
        fairseq.load_checkpoint(tmp_path / "nothing.pt")


def test_fairseq_modules_refuse_other_paddings():
    with pytest.raises(
        ValueError,
        match="LightweightConv1dTBC: argument 'padding_l': expected None or an integer from 0 to 3, got \\(1, 2\\)",
    ):
        fairseq.LightweightConv1dTBC(8, 4, (1, 2))
    assert fairseq.LightweightConv1dTBC(8, 7).padding == 3
