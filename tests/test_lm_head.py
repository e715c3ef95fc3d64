# SPDX-License-Identifier: Apache-2.0
import contextlib
import copy
import pickle
import types

import pytest
import torch
import transformers
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from helpers import dense_positions, make_model, make_windows
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from trl_msl import ItemTrie, build_rows, masked_softmax_loss, tokenize_rows
from trl_msl.model import backbone, check_head
from trl_msl.training import SparseHeadOptions, add_sparse_lm_head


@pytest.fixture(scope="module")
def batch(catalog, tokenizer, task):
    rows = build_rows(make_windows(catalog.ids, num_rows=5), task)
    encoded = tokenize_rows(rows[:], task)
    longest = max(map(len, encoded["input_ids"]))
    return {
        "input_ids": torch.tensor(
            [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in encoded["input_ids"]]
        ),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded["input_ids"]]),
        "labels": torch.tensor([ids + [-100] * (longest - len(ids)) for ids in encoded["labels"]]),
    }


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FALCON_H1 = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16, "lm_head_multiplier": 0.3,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 256}
RECURRENT_GEMMA = {"lru_width": 32, "logits_soft_cap": 3.0, "num_hidden_layers": 3}
MODELS = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gpt2": (GPT2Config, GPT2),
    "gemma2-softcap": (Gemma2Config, GEMMA),
    "recurrent-gemma-cap": (RecurrentGemmaConfig, RECURRENT_GEMMA),
    "llama4": (Llama4TextConfig, LLAMA4),
    "opt": (OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "cohere-logit-scale": (CohereConfig, {"logit_scale": 0.2}),
    "granite-logits-scaling": (GraniteConfig, {"logits_scaling": 7.0}),
    "falcon-h1-lm-head-multiplier": (FalconH1Config, FALCON_H1),
    "phi-bias": (PhiConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_those_of_the_models_own_forward(name, batch, tokenizer, trie):
    config_class, kwargs = MODELS[name]
    model = make_model(tokenizer, config_class, **kwargs)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    rows, masks, targets = dense_positions(trie, own, batch["labels"])
    add_sparse_lm_head(model, trie)
    output = model(**batch, sparse_lm_head=True)
    assert output.logits.dtype == torch.float32
    assert output.logits.shape[1] < own.shape[-1] / 4  # not the vocabulary
    assert torch.equal(output.valid_mask.sum(dim=1), masks.sum(dim=1))
    torch.testing.assert_close(output.logits[output.valid_mask], rows[masks], rtol=1e-4, atol=1e-4)
    chosen = output.logits.gather(1, output.targets[:, None])[:, 0]
    torch.testing.assert_close(chosen, rows[torch.arange(len(targets)), targets], rtol=1e-4, atol=1e-4)

    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(int(masks.sum()))
    sparse_gradients = torch.autograd.grad(
        (output.logits[output.valid_mask] * weights).sum(), parameters, allow_unused=True
    )
    dense_gradients = torch.autograd.grad((rows[masks] * weights).sum(), parameters, allow_unused=True)
    for sparse, dense in zip(sparse_gradients, dense_gradients):
        if dense is not None:
            torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-4)


def test_without_the_flag_the_forward_is_the_models_own(batch, tokenizer, trie):
    model = make_model(tokenizer)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    before = model(**inputs, labels=batch["input_ids"])
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    add_sparse_lm_head(model, trie)
    after = model(**inputs, labels=batch["input_ids"])
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), generated)


def test_shifted_labels_and_vocabulary_losses(batch, tokenizer, trie):
    model = make_model(tokenizer)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model(**inputs).logits[:, :-1]
    supervised = batch["labels"][:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(
        logits[supervised], batch["input_ids"][:, 1:][supervised], reduction="none"
    )
    add_sparse_lm_head(model, trie)
    output = model(**batch, sparse_lm_head=SparseHeadOptions(vocab_losses=True))
    torch.testing.assert_close(output.vocab_losses, expected)
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((len(logits), 1), -100)], dim=1)
    again = model(**inputs, shift_labels=shifted, sparse_lm_head=True)
    assert torch.equal(again.logits, output.logits)
    assert torch.equal(again.targets, output.targets)


def test_no_supervised_position_gives_a_zero_that_can_be_differentiated(batch, tokenizer, trie):
    model = make_model(tokenizer)
    add_sparse_lm_head(model, trie)
    labels = torch.full_like(batch["labels"], -100)
    output = model(**{**batch, "labels": labels}, sparse_lm_head=SparseHeadOptions(vocab_losses=True))
    assert output.logits.shape[0] == output.vocab_losses.numel() == 0
    output.logits.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_bfloat16_model_is_projected_in_fp32(batch, tokenizer, trie):
    """The error of a bf16 model stays within that of its own bf16 logits."""
    exact, low = make_model(tokenizer), make_model(tokenizer).bfloat16()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    reference, _, _ = dense_positions(trie, exact(**inputs).logits, batch["labels"])
    own, masks, _ = dense_positions(trie, low(**inputs).logits.float(), batch["labels"])
    add_sparse_lm_head(low, trie)
    output = low(**batch, sparse_lm_head=True)
    error = (output.logits[output.valid_mask] - reference[masks]).abs().max()
    assert error <= (own - reference)[masks].abs().max() + 1e-2


def test_load_balancing_loss_of_a_mixture_of_experts(batch, tokenizer, trie):
    model = make_model(tokenizer, MixtralConfig, num_local_experts=4)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = model(**inputs, output_router_logits=True).aux_loss
    add_sparse_lm_head(model, trie)
    output = model(**batch, sparse_lm_head=True, output_router_logits=True)
    torch.testing.assert_close(output.aux_loss, expected)


def test_trie_of_another_tokenizer_and_quantised_heads_are_errors(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="token 5000, but the model's LM head has"):
        add_sparse_lm_head(model, ItemTrie.from_sequences([[1], [5000]]))
    weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    model.lm_head.weight = weight
    with pytest.raises(ValueError, match="LM head of torch.int8"):
        add_sparse_lm_head(model, ItemTrie.from_sequences([[1], [2]]))


# ---------------------------------------------------------------------- what is more than rows, scale and cap


class UnknownCapForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def make_unknown_cap(tokenizer):
    model = make_model(tokenizer)
    for parameter in model.parameters():
        parameter.data.mul_(0.2)  # as initialised: its own logits are too small for the cap to show
    return UnknownCapForCausalLM(model.config).train(model.training)


INKLING = {
    "logits_mup_width_multiplier": 4.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "head_dim": 8,
    "swa_head_dim": 8, "d_rel": 8, "dense_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
REFUSED = {
    "ModernBertDecoderForCausalLM": lambda tokenizer: make_model(tokenizer, ModernBertDecoderConfig),
    "InklingForCausalLM": lambda tokenizer: make_model(tokenizer, transformers.InklingTextConfig, **INKLING),
    "UnknownCapForCausalLM": make_unknown_cap,
}


@pytest.mark.parametrize("name", REFUSED)
def test_logits_of_more_than_rows_scale_and_cap_are_refused(name, tokenizer, trie):
    if name.startswith("Inkling") and not hasattr(transformers, "InklingTextConfig"):
        pytest.skip("this version of transformers has no Inkling")
    model = REFUSED[name](tokenizer)
    with pytest.raises(ValueError, match=f"a {name}, computes its logits from more than .* and cap.*`SFTTrainer`"):
        add_sparse_lm_head(model, trie)
    assert "forward" not in vars(model)


def test_models_without_a_head_or_a_backbone_are_refused(tokenizer, trie):
    with pytest.raises(ValueError, match="a LlamaModel, has no LM head with a weight"):
        add_sparse_lm_head(make_model(tokenizer).model, trie)
    with pytest.raises(ValueError, match="a LlamaModel, has no single module for its hidden states"):
        backbone(make_model(tokenizer).model)


def as_it_is(model):
    return model


def split(model):
    return dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


def with_lora(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5)).get_base_model()


def with_trained_head(model):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(model, config).get_base_model()


def on_meta(model):
    return model.to("meta")


STATES = {
    "plain": as_it_is, "bf16": torch.nn.Module.bfloat16, "fp16": torch.nn.Module.half, "meta": on_meta, "split": split,
    "lora": with_lora, "trained-head": with_trained_head,
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_the_check_neither_runs_nor_changes_the_model(state, autocast, tokenizer, trie, monkeypatch):
    model = STATES[state](make_model(tokenizer, attention_dropout=0.5)).train()
    model.model.norm.eval()
    monkeypatch.setattr(type(model.model), "forward", lambda *args, **kwargs: pytest.fail("the backbone was run"))
    before = [module.training for module in model.modules()], copy.deepcopy(model.config.to_dict())
    attributes = [dict(vars(module)) for module in model.modules()]
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        check_head(model, trie)
    assert torch.equal(torch.get_rng_state(), generator)
    assert ([module.training for module in model.modules()], model.config.to_dict()) == before
    for module, names in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == names.keys() and all(vars(module)[name] is names[name] for name in names)


# ---------------------------------------------------------------------- copies


def wrapped_by_accelerate(model):
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision, which stays set for good
    return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)


def patched(model):
    """As Liger patches the forward of a model that exists already."""
    original = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: original(self, *args, **kwargs), model)
    return model


@pytest.mark.parametrize("after", [as_it_is, wrapped_by_accelerate])
@pytest.mark.parametrize("before", [as_it_is, wrapped_by_accelerate, split, patched])
def test_a_copy_runs_its_own_weights(before, after, batch, tokenizer, trie):
    model = before(make_model(tokenizer))
    add_sparse_lm_head(model, ItemTrie.from_sequences([[1], [2]]))  # the head that counts is the last
    add_sparse_lm_head(model, trie)
    model = after(model)

    def run(model):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return [model(**batch, sparse_lm_head=True).logits, model(**inputs).logits]

    expected = run(model)
    snapshot = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    for found, own, changed in zip(run(snapshot), expected, run(model), strict=True):
        assert torch.equal(found, own)
        assert not torch.allclose(changed, own, atol=0.1)


def test_a_pickled_model_runs_its_own_weights(batch, tokenizer, trie):
    model = make_model(tokenizer)
    add_sparse_lm_head(model, trie)
    expected = model(batch["input_ids"]).logits
    loaded = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(loaded(batch["input_ids"]).logits, expected)


# ---------------------------------------------------------------------- fewer negatives, and temperature


def test_negatives_are_drawn_where_there_are_many(batch, tokenizer, trie):
    model = make_model(tokenizer)
    add_sparse_lm_head(model, trie)
    whole = model(**batch, sparse_lm_head=True)
    num_valid = whole.valid_mask.sum(dim=1)
    drawn = torch.zeros(int(num_valid.max()) - 1)
    torch.manual_seed(0)
    for _ in range(300):
        few = model(**batch, sparse_lm_head=SparseHeadOptions(num_negatives=2))
        assert torch.equal(few.is_sampled, num_valid > 3)
        assert torch.equal(few.parents, whole.parents)
        assert torch.equal(few.valid_mask.sum(dim=1)[~few.is_sampled], num_valid[~few.is_sampled])
        assert (few.valid_mask.sum(dim=1)[few.is_sampled] <= 3).all()
        losses = masked_softmax_loss(few.logits, few.valid_mask, few.targets)
        at_most = masked_softmax_loss(whole.logits, whole.valid_mask, whole.targets)
        assert (losses <= at_most + 1e-5).all()  # so they are valid tokens, and the target is one of them
        torch.testing.assert_close(losses[~few.is_sampled], at_most[~few.is_sampled])
        target_logits = few.logits.gather(1, few.targets.unsqueeze(1))
        torch.testing.assert_close(target_logits, whole.logits.gather(1, whole.targets.unsqueeze(1)))
        # which of the wrong tokens of the first position, the root's: each as often as the others
        wrong = few.valid_mask[0].clone()
        wrong[few.targets[0]] = False
        others = whole.valid_mask[0].clone()
        others[whole.targets[0]] = False
        drawn += torch.isin(whole.logits[0][others], few.logits[0][wrong]).float()
    # two draws with replacement from n: each is among them with probability 1 - (1 - 1/n)^2
    expected = 300 * (1 - (1 - 1 / len(drawn)) ** 2)
    assert (drawn - expected).abs().max() < 5 * expected**0.5


def test_vocabulary_losses_are_those_of_the_models_own_logits_in_its_dtype(batch, tokenizer, trie):
    model = make_model(tokenizer).to(torch.bfloat16)
    add_sparse_lm_head(model, trie)
    nodes = batch["labels"][:, 1:]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][nodes != -100]
    expected = torch.nn.functional.cross_entropy(logits.float(), trie.tokens(nodes[nodes != -100]), reduction="none")
    output = model(**batch, sparse_lm_head=SparseHeadOptions(valid_logits=False, vocab_losses=True))
    torch.testing.assert_close(output.vocab_losses, expected)


def test_temperature_over_the_vocabulary(batch, tokenizer, trie):
    model = make_model(tokenizer)
    add_sparse_lm_head(model, trie)
    options = SparseHeadOptions(valid_logits=False, vocab_losses=True, vocab_temperature=2.5)
    output = model(**batch, sparse_lm_head=options)
    assert output.logits is None
    nodes = batch["labels"][:, 1:]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][nodes != -100]
    expected = torch.nn.functional.cross_entropy(logits / 2.5, trie.tokens(nodes[nodes != -100]), reduction="none")
    torch.testing.assert_close(output.vocab_losses, 2.5 * expected)
    gradients = [
        torch.autograd.grad(losses.sum(), list(model.parameters())) for losses in (output.vocab_losses, 2.5 * expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
