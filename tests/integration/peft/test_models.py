"""What PEFT and transformers do with whole models: adapters, targets, heads, generation, checkpointing, compiling."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

from lmoe_kernels.peft import LMoEConfig, LMoEModel, LMoETunerLinear
from tests.integration.peft.tuned import (
    NAMES,
    TARGETS,
    config,
    fill,
    logits,
    state,
    steps,
    trained,
    tuned,
    tuner_layers,
    twin,
)
from tests.models import IDS, llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def of(adapter: str, names: dict) -> set[str]:
    return {name for name in names if name.endswith(f".{adapter}")}


def test_adapters_are_added_switched_disabled_and_deleted() -> None:
    plain = llama()
    expected = logits(plain)
    model = tuned(copy.deepcopy(plain), adapter="a")
    of_a = logits(model)
    before = trained(model)
    model.add_adapter("b", config(num_experts=2, r=4, top_k=1, renormalize=False, target_modules=["q_proj", "v_proj"]))
    fill(model, "b")
    assert trained(model).keys() == before.keys() == of("a", before)
    assert torch.equal(logits(model), of_a)
    model.set_adapter("b")
    of_b = logits(model)
    assert not torch.equal(of_b, of_a)
    assert trained(model).keys() == of("b", trained(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert not trained(model)
    assert torch.equal(logits(model), of_b)
    assert trained(model).keys() == of("b", trained(model))
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    assert not torch.equal(both, of_a)
    assert not torch.equal(both, of_b)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(logits(model), of_a)
    assert not [name for name in model.state_dict() if name.endswith(".b")]
    assert all(set(layer.mixtures()) <= {"a"} for layer in tuner_layers(model).values())
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model.unload()), expected)
    assert not any(isinstance(module, LMoETunerLinear) for module in model.modules())


def test_a_deleted_active_adapter_leaves_the_other_one() -> None:
    model = tuned(adapter="a", top_k=2, choice_bias=True)
    model.add_adapter("b", config(top_k=2, choice_bias=True))
    with pytest.warns(UserWarning, match="Adapter a was active"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert trained(model).keys() == of("b", trained(model))
    assert not [name for name, _ in model.named_buffers() if "lmoe_load.a" in name]


CHOSEN = {
    "exclude_modules": ({"exclude_modules": ["1.mlp.down_proj"]}, NAMES[:3]),
    "layers_to_transform": ({"layers_to_transform": [1]}, NAMES[2:]),
    "layers_pattern": ({"layers_to_transform": 0, "layers_pattern": "layers"}, NAMES[:2]),
    "all-linear": (
        {"target_modules": "all-linear"},
        [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
        + [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")],
    ),
    "by PEFT": (
        {"target_modules": None},
        [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"],
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_targets_are_chosen_as_by_lora(name: str) -> None:
    options, expected = CHOSEN[name]
    assert sorted(tuner_layers(tuned(**options))) == sorted(expected)


def test_ranks_and_alphas_by_pattern() -> None:
    model = tuned(rank_pattern={"1.mlp.down_proj": 5}, alpha_pattern={"q_proj": 7}, lora_alpha=6)
    found = {name: layer.mixtures()["default"] for name, layer in tuner_layers(model).items()}
    assert [mixture.config.rank for mixture in found.values()] == [2, 2, 2, 5]
    assert [mixture.config.alpha for mixture in found.values()] == [7, 6, 7, 6]
    assert [mixture.tensors["lora_a"].shape[1] for mixture in found.values()] == [2, 2, 2, 5]


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    plain = llama()
    model = tuned(copy.deepcopy(plain), r=4, lora_alpha=6, use_rslora=True)
    for layer in tuner_layers(model).values():
        options = layer.mixtures()["default"].config
        assert options.alpha / options.rank == 6 / 4**0.5


def test_modules_to_save_are_trained_and_saved(tmp_path) -> None:
    plain = llama()
    model = tuned(copy.deepcopy(plain), modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trained(model)
    steps(model, 1)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)), expected)


def test_injection_without_a_peft_model() -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    expected = plain(x)
    model = inject_adapter_in_model(LMoEConfig(num_experts=2, r=2, target_modules=["0", "2"]), plain)
    assert model is plain
    assert [type(module) for module in model] == [LMoETunerLinear, nn.ReLU, LMoETunerLinear]
    assert torch.equal(model(x), expected)
    assert not model[0].base_layer.weight.requires_grad


def test_transformers_adds_saves_and_loads_adapters(tmp_path) -> None:
    pytest.importorskip("peft", minversion="0.20")  # transformers asks for it
    plain = llama()
    model = copy.deepcopy(plain)
    model.add_adapter(config(top_k=2, choice_bias=True, gate_bias=True), "a")
    fill(model, "a")
    expected = logits(model)
    assert not torch.equal(expected, logits(plain))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(plain))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(str(tmp_path), "b")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    plain = llama()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(5)  # of the dropout
        model = tuned(copy.deepcopy(plain), lora_dropout=0.2).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def test_generation_with_a_cache_is_that_without() -> None:
    model = tuned(top_k=2, gate_bias=True)
    ids = IDS[:, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = model.generate(input_ids=ids, **options)
    without = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits))
    torch.testing.assert_close(with_cache.logits[-1], logits(model, with_cache.sequences)[:, -2].float())


def test_a_new_head_of_a_classifier_is_trained() -> None:
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = LlamaForSequenceClassification(LlamaConfig(**size, num_labels=3, pad_token_id=0)).double()
    model = tuned(plain, task_type="SEQ_CLS")
    before = trained(model)
    assert any("score.modules_to_save" in name for name in before)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    steps_of_all = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    steps_of_all.step()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


def test_encoder_decoder() -> None:
    pytest.importorskip("peft", minversion="0.21")  # older ones need a method that transformers 5 lacks
    size = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    plain = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0)).double().eval()
    model = tuned(copy.deepcopy(plain), target_modules=["q", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    with torch.no_grad():
        got = model(input_ids=IDS, labels=IDS).logits
        assert torch.equal(got, twin(model, plain)(input_ids=IDS, labels=IDS).logits)
        assert not torch.equal(got, plain(input_ids=IDS, labels=IDS).logits)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape[0] == len(IDS)


@pytest.mark.parametrize("adapters", [["a"], ["a", "b"]])
def test_compiled_as_one_graph(adapters: list[str]) -> None:
    model = tuned(adapter="a", output_router_logits=True)
    model.add_adapter("b", config(top_k=2, choice_bias=True))
    fill(model, "b")
    model.base_model.set_adapter(adapters)
    eager = model(input_ids=IDS, labels=IDS)
    eager.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(input_ids=IDS, labels=IDS)
    output.loss.backward()
    torch.testing.assert_close(output.logits, eager.logits)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    assert set(tuner_layers(model)[NAMES[0]].kept_router_logits()) == {"a"}


def test_training_is_compiled_as_one_graph() -> None:
    """With dropout, and with the counters of a choice_bias."""
    model = tuned(top_k=2, choice_bias=True, lora_dropout=0.3).train()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=IDS, labels=IDS).loss.backward()
    for layer in tuner_layers(model).values():
        assert layer.lmoe_load.get_buffer("default").sum() == 2 * IDS.numel()
        assert layer.lmoe_gate["default"].grad.any()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_adapters_by_sequence_are_refused(call: str) -> None:
    model = tuned()
    method = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"^LMoEModel: adapter_names must be None: [^\n]*, got list$"):
        method(input_ids=IDS, adapter_names=["default", "default"])


FAILS = {
    "no linear layer": ({"target_modules": ["q_proj", "embed_tokens"]}, TypeError, "name layers with in_features and"),
    "after others": ({"target_modules": ["q_proj", "model.norm"]}, TypeError, "name layers with in_features and"),
    "no layer": ({"target_modules": ["nothing"]}, ValueError, "nothing"),
    "an option changed": ({"num_experts": 0}, ValueError, r"^LMoEConfig: num_experts must be at least 1, got 0$"),
}


ADD = {
    "first": get_peft_model,
    "second": lambda model, given: model.add_adapter("b", given),
    "injected": lambda model, given: inject_adapter_in_model(given, model),
}


@pytest.mark.parametrize("name", FAILS)
@pytest.mark.parametrize("how", ADD)
def test_an_error_leaves_the_model_as_it_was(name: str, how: str) -> None:
    options, error, text = FAILS[name]
    model = tuned() if how == "second" else llama()
    given = config()
    for option, value in options.items():
        setattr(given, option, value)
    before, expected = state(model), logits(model)
    with pytest.raises(error, match=text):
        ADD[how](model, given)
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    if how == "second":
        assert list(model.peft_config) == ["default"]
        model.add_adapter("b", config())
    else:
        assert isinstance(get_peft_model(model, config()).base_model, LMoEModel)


def test_a_second_injection_that_fails_leaves_no_configuration() -> None:
    model = inject_adapter_in_model(config(), llama(), "a")
    before = state(model)
    with pytest.raises(TypeError, match="name layers with in_features and out_features"):
        inject_adapter_in_model(config(target_modules=["q_proj", "model.norm"]), model, "b")
    assert list(model.peft_config) == ["a"]
    assert state(model) == before


def test_an_adapter_on_an_evaluated_model_does_not_drop_out() -> None:
    model = tuned(llama().eval(), lora_dropout=0.9)
    assert torch.equal(logits(model), logits(model))
    layer = next(iter(tuner_layers(model).values()))
    assert not layer.training
    assert not torch.equal(logits(model.train()), logits(model))


def test_layers_that_are_not_called_are_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8)
    before = state(model)
    text = (
        r"^LMoEModel: target_modules must name layers that are called, got 'linear1', whose weight TransformerEncoderLayer"
    )
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, LMoEConfig(target_modules=["linear1"]))
    assert state(model) == before


def test_one_expert_without_competition_warns() -> None:
    with pytest.warns(UserWarning, match="^LMoEConfig: top_k=1 with renormalize=True"):
        get_peft_model(llama(), config(top_k=1, target_modules=TARGETS))
