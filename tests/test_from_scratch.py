# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trl_msl.experiments.from_scratch import build_model, train_tokenizer


TEXTS = ['"The Silent River"', '"The Silent River: Book 2"', '"A History of Salt"']
UNICODE = [
    "",
    " ",
    "  two  spaces ",
    "a , b . c 's",
    "naïve — “Œuvre”\t№ 7\r\n",
    "東京 🚆🏽",
    "e\u0301 \u200b\x00",
    "\ufffd",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, hidden_size=32).eval()


class TestTrainTokenizer:
    def test_vocabulary(self, tokenizer):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert 261 < len(tokenizer) <= 2000
        assert len(train_tokenizer(TEXTS, vocab_size=270)) == 270

    def test_same_texts_give_the_same_tokenizer(self, tokenizer):
        assert train_tokenizer(iter(TEXTS)).get_vocab() == tokenizer.get_vocab()

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
        specials = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
        assert sorted(tokenizer.all_special_tokens) == sorted(specials)
        for token in specials:
            assert len(tokenizer.encode(token, add_special_tokens=False)) == 1

    def test_quote_joins_the_first_word(self, tokenizer):
        assert tokenizer.tokenize(TEXTS[0])[0] == '"The'

    @pytest.mark.parametrize("text", UNICODE)
    def test_round_trip(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_bos_comes_once_and_by_default(self, tokenizer):
        with_bos, without = tokenizer.encode("Salt"), tokenizer.encode("Salt", add_special_tokens=False)
        assert with_bos == [tokenizer.bos_token_id, *without]
        assert tokenizer.bos_token_id not in without and tokenizer.eos_token_id not in with_bos
        assert tokenizer.encode("A", "B").count(tokenizer.bos_token_id) == 1

    def test_chat_template(self, tokenizer):
        messages = [{"role": "system", "content": "Recommend."}, {"role": "user", "content": "I read\nSalt."}]
        turns = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\nI read\nSalt.<|im_end|>\n"
        assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == turns + "<|im_start|>assistant\n"
        messages.append({"role": "assistant", "content": "Silk"})
        assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "Silk<|im_end|>\n"

    def test_vocabulary_too_small(self):
        with pytest.raises(ValueError, match="`vocab_size` must be at least 261.*got 260"):
            train_tokenizer(TEXTS, vocab_size=260)


class TestBuildModel:
    def test_config_follows_the_tokenizer(self, tokenizer, model):
        assert model.config.vocab_size == len(tokenizer)
        for config in (model.config, model.generation_config):
            assert config.bos_token_id == tokenizer.bos_token_id
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id

    def test_embeddings_are_not_tied(self, model):
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        assert model.dtype == torch.float32

    def test_seed(self, tokenizer, model):
        state = torch.get_rng_state()
        same, other = (build_model(tokenizer, hidden_size=32, seed=seed) for seed in (0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert not torch.equal(other.lm_head.weight, model.lm_head.weight)

    def test_save_and_reload(self, tokenizer, model, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

        for text in TEXTS + UNICODE:
            assert loaded_tokenizer.encode(text) == tokenizer.encode(text)
            assert loaded_tokenizer.decode(loaded_tokenizer.encode(text), skip_special_tokens=True) == text
        assert loaded_tokenizer.chat_template == tokenizer.chat_template
        assert loaded_tokenizer.special_tokens_map == tokenizer.special_tokens_map
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(loaded_model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)

    def test_heads_do_not_divide(self, tokenizer):
        with pytest.raises(ValueError, match="`hidden_size` must be a multiple of .* 8, .* got 100. Choose 104"):
            build_model(tokenizer, hidden_size=100, num_heads=4)
