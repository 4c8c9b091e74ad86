"""Tools around models of transformers: replaced and replicated embeddings, adapters, quantization, offloading."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from modelling import MODELS, bert, generator, given, near, seq2seq, text


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return 2 * self.inner(ids)


def test_stacks_follow_a_replaced_embedding():
    model, ids = seq2seq("dynamic", tie_word_embeddings=False), text(2, 6)
    keys = list(model.state_dict())
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.model.shared.weight.mul_(2)
        expected = double(ids, decoder_input_ids=ids).logits
    replaced, given = copy.deepcopy(model), copy.deepcopy(model)
    replaced.model.shared = Twice(replaced.model.shared)
    given.set_input_embeddings(double.model.shared)
    for changed in (replaced, given):
        near(changed(ids, decoder_input_ids=ids).logits, expected)
        near(changed.get_encoder()(ids).last_hidden_state, double.get_encoder()(ids).last_hidden_state)
        assert changed.get_decoder().embed_tokens is changed.model.shared
    assert list(given.state_dict()) == keys and not any("encoder.embed" in key for key in keys)
    apart = seq2seq("dynamic", source_vocab_size=256).model
    apart.source = Twice(apart.source)
    assert apart.encoder.embed_tokens is apart.source and apart.decoder.embed_tokens is apart.shared


@pytest.mark.parametrize("name", ["seq2seq", "encoder", "bert"])
def test_replicas_read_their_own_embedding(name):
    """As nn.DataParallel makes them: shallow copies of the modules around other tensors."""
    model, ids = MODELS[name](), text(2, 6)
    modules = list(model.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    known = dict(zip(modules, copies, strict=True))
    for module, replica in known.items():
        for child, value in module._modules.items():
            replica._modules[child] = None if value is None else known[value]
        for parameter, value in module._parameters.items():
            setattr(replica, parameter, None if value is None else torch.zeros_like(value))
    out = known[model](ids, **(dict(decoder_input_ids=ids) if name == "seq2seq" else {}))
    assert not out.logits.any()


ADAPTED = {
    "SEQ_2_SEQ_LM": [lambda mixer=mixer: seq2seq(mixer) for mixer in ("transformer", "lightweight", "dynamic")],
    "SEQ_CLS": [MODELS["encoder"], MODELS["labels"]],
    "TOKEN_CLS": [MODELS["tokens"]],
    "QUESTION_ANS": [MODELS["answers"]],
}


@pytest.mark.parametrize("task", ADAPTED)
def test_adapters(task):
    peft = pytest.importorskip("peft")
    labels = {
        "SEQ_2_SEQ_LM": dict(labels=text(3, 5)),
        "SEQ_CLS": dict(labels=torch.tensor([0, 1, 0])),
        "TOKEN_CLS": dict(labels=text(3, 12) % 3),
        "QUESTION_ANS": dict(start_positions=torch.tensor([1, 2, 0]), end_positions=torch.tensor([3, 2, 1])),
    }[task]
    for make in ADAPTED[task]:
        linear = ["query", "dense"] if task in ("TOKEN_CLS", "QUESTION_ANS") else "all-linear"  # those train the head
        model = peft.get_peft_model(make(), peft.LoraConfig(task_type=task, target_modules=linear))
        model(**given(), **labels).loss.backward()
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
        if task == "SEQ_2_SEQ_LM":
            model.eval().generate(**given(), max_new_tokens=3)
            base = make()
            for options in (dict(target_modules=["shared"]), dict(target_modules=["wi"], modules_to_save=["shared"])):
                tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=task, **options))
                tuned(**given(), **labels).loss.backward()
                grads = {n: p.grad for n, p in tuned.named_parameters() if "shared" in n and p.requires_grad}
                assert grads and all(g is not None for g in grads.values())
                assert any(g.any() for g in grads.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixer", ["dynamic", "lightweight"])
def test_quantized_models_decode(mixer):
    model = torch.ao.quantization.quantize_dynamic(generator(mixer), {nn.Linear})
    tokens = model.generate(text(2, 6), max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, model.generate(text(2, 6), max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("name", ["lightweight paper", "dilated paper", "dynamic released", "bert absolute"])
def test_offloaded_models(name):
    """No parameter is read but in its module's own call, which accelerate hooks into."""
    accelerate = pytest.importorskip("accelerate")
    kind, style = name.split()
    model = bert(style, noise=0.1) if kind == "bert" else generator(kind, style)
    rest = given()
    with torch.no_grad():
        if kind == "bert":
            run = lambda: model(**rest).logits  # noqa: E731
        else:
            run = lambda: model.generate(**rest, max_new_tokens=4, do_sample=False)  # noqa: E731
        expected = run()
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.device.type == "meta" for p in model.parameters())
        assert torch.equal(run(), expected)
