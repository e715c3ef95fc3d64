# SPDX-License-Identifier: Apache-2.0
"""A tokenizer trained on the catalogue and a small Llama, to replace a pretrained pair where there is none."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ..data import ItemCatalog, PromptTemplate
from ..scripts.outputs import write_json
from ..training import differences


logger = logging.getLogger(__name__)


@dataclass
class ScratchArguments:
    """
    Sizes of a small tokenizer and model, which are made if there is no `model_name_or_path`.

    Parameters:
        scratch_tokens (`str`, *optional*, defaults to `"text"`):
            What a token is: part of a `text`, by byte pairs; or a whole `item`, which needs `item_text: id`,
            `separate_items: true`, `prompt_text: "{history}"` and no pretraining steps.
        scratch_vocab_size (`int`, *optional*, defaults to `2000`):
            Maximum vocabulary size with `text`.
        scratch_hidden_size, scratch_num_layers (`int`, *optional*, defaults to `128` and `2`):
            Sizes of the Llama.
        scratch_pretrain_steps (`int`, *optional*, defaults to `200`):
            Steps in which it first learns to write items, in random order. Not used by `pretrain.py`.
    """

    scratch_tokens: str = field(
        default="text", metadata={"help": "What a token is: part of a text, or an item.", "choices": ["text", "item"]}
    )
    scratch_vocab_size: int = field(default=2000, metadata={"help": "Maximum vocabulary size."})
    scratch_hidden_size: int = field(default=128, metadata={"help": "Hidden size of the small model."})
    scratch_num_layers: int = field(default=2, metadata={"help": "Layers of the small model."})
    scratch_pretrain_steps: int = field(default=200, metadata={"help": "Steps in which it learns to write items."})


BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|eos|>", "<|pad|>", "<|unknown|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

# Llama 3's split into words. A punctuation mark joins the word after it (`"The`), so that a trie of quoted titles has
# the shape it has with Llama 3's tokenizer: broad at the root, instead of a lone quote.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    r"""
    Train a byte-level BPE tokenizer: any text without special tokens decodes to exactly what was encoded.

    It adds a BOS token at the start, as Llama's tokenizers do, unless called with `add_special_tokens=False`. Its chat
    template is ChatML: a turn is `<|im_start|>role\ncontent<|im_end|>\n`, without BOS. So a chat turn ends with
    `<|im_end|>`, while `eos_token` is `<|eos|>`.

    Args:
        texts (`Iterable[str]`):
            Texts in the form that the model will see, such as titles with their quotes.
        vocab_size (`int`, *optional*, defaults to `2000`):
            Maximum number of tokens, at least 261: the 256 bytes and 5 special tokens. There are fewer if the texts
            have no more to merge, so size the model by `len(tokenizer)`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [BOS, EOS, PAD, TURN_START, TURN_END]
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest}, for {len(alphabet)} bytes and {len(special_tokens)} special "
            f"tokens; got {vocab_size}. Raise it: with fewer tokens some texts could not be encoded."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def item_tokenizer(items: Iterable[str]) -> PreTrainedTokenizerFast:
    """
    A tokenizer with one token for each of the `items`, equal ones together. Items are separated by `", "` in a text;
    any other text is an unknown token. BOS is added.
    """
    items = list(items)
    if ambiguous := [item for item in items if ", " in item]:
        raise ValueError(
            f"`items` holds {len(ambiguous)} with a comma, which separates items, such as {ambiguous[0]!r}: use ids."
        )
    words = {word: token for token, word in enumerate(dict.fromkeys([BOS, EOS, PAD, UNKNOWN, *items]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(", ", behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> LlamaForCausalLM:
    """
    A small Llama with random weights for a tokenizer, in fp32, with untied embeddings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer that gives the vocabulary size and the special tokens.
        hidden_size, num_layers (`int`, *optional*, defaults to `128` and `2`):
            Sizes of the model.
        num_heads (`int`, *optional*, defaults to `4`):
            Number of attention heads. Rotary embeddings need `hidden_size / num_heads` to be an even whole number.
        max_position_embeddings (`int`, *optional*, defaults to `512`):
            Longest sequence, in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global random state is left as it was.
    """
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` must be a multiple of twice `num_heads`, {2 * num_heads}, for heads of an even size; got "
            f"{hidden_size}. Choose {hidden_size - hidden_size % (2 * num_heads) + 2 * num_heads}, or other heads."
        )
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        **token_ids,
    )
    with torch.random.fork_rng(devices=[]):  # the weights are made on the CPU
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(**token_ids)
    return model


def make_base_model(
    catalog: ItemCatalog, texts: Iterable[str], args: ScratchArguments, seed: int = 0
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A tokenizer, of `texts` or of the catalogue's items, and a model with random weights for it."""
    if args.scratch_tokens == "item":
        tokenizer = item_tokenizer(catalog.completions)
    else:
        tokenizer = train_tokenizer(texts, args.scratch_vocab_size)
    num_heads = max(2, args.scratch_hidden_size // 32)
    return tokenizer, build_model(tokenizer, args.scratch_hidden_size, args.scratch_num_layers, num_heads, seed=seed)


def write_base_model(
    path: Path,
    catalog: ItemCatalog,
    template: PromptTemplate,
    args: ScratchArguments,
    seed: int = 0,
    keep: bool = False,
) -> None:
    """
    Write a base model and its tokenizer into the folder `path`.

    The model can write the catalogue's items, as a pretrained LLM could, but knows no interactions: it is trained with
    the usual language modeling loss on prompts of random items, each followed by a random item, 32 in a step. To be
    called by every process of a distributed run. With `keep`, one that is already there is used.

    Raises:
        `ValueError`: if that one was made from other items or with other options.
    """
    made_of = {
        **asdict(args),
        "seed": seed,
        "prompt_text": template.text,
        "items": hashlib.sha256(json.dumps(catalog.completions).encode()).hexdigest(),
    }
    record = path / "made_of.json"  # written last: without it the model may be half of one
    if keep and record.is_file():
        if different := differences(made_of, json.loads(record.read_text())):
            raise ValueError(
                f"`resume_from_checkpoint`: the base model in {str(path)!r} was made with {different}. Pass the same, "
                "or start over in another `output_dir`."
            )
        logger.info("Using the base model that is in %s already.", path)
        return
    record.unlink(missing_ok=True)
    PartialState().wait_for_everyone()  # all have looked
    rng = random.Random(seed)
    text_template = PromptTemplate(template.text, template.separator)

    def text() -> str:
        *history, target = rng.choices(catalog.completions, k=rng.randint(2, 5))
        return text_template.render(history) + target

    if args.scratch_tokens == "item" and (args.scratch_pretrain_steps or template.text != "{history}"):
        raise ValueError(
            "`scratch_tokens` = 'item' knows no texts: set `scratch_pretrain_steps` 0 and `prompt_text` '{history}'."
        )
    tokenizer, model = make_base_model(catalog, [*catalog.completions, *(text() for _ in range(100))], args, seed)
    logger.info(
        "No `model_name_or_path`: making a model of %s parameters from scratch, in %s.",
        f"{model.num_parameters():,}", path,
    )  # fmt: skip
    steps = args.scratch_pretrain_steps
    if steps:
        config = SFTConfig(
            str(path), max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3,
            lr_scheduler_type="cosine", gradient_checkpointing=False, bf16=False, report_to="none", save_strategy="no",
            logging_steps=max(1, steps // 4), seed=seed,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": [text() for _ in range(32 * steps)]})
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()  # also where FSDP or ZeRO-3 has sharded the model
    elif PartialState().is_main_process:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    if PartialState().is_main_process:
        write_json(record, made_of)
    PartialState().wait_for_everyone()
