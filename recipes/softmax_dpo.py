# SPDX-License-Identifier: Apache-2.0
"""
Softmax DPO with several rejected items: teach a model that was trained with MSL (or the usual loss) what not to rank
high, and evaluate it.

```bash
accelerate launch recipes/softmax_dpo.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/softmax_dpo
```

As the S-DPO paper does it, over the vocabulary and with items of the whole catalogue rejected:

```bash
accelerate launch recipes/softmax_dpo.py --model_name_or_path outputs/book/lml \
    --data_dir data/Book --train_file train_10000.csv --empty_texts keep --prompt_words book books read \
    --negatives uniform --num_negatives 15 --normalize vocab --learning_rate 1e-5 --output_dir outputs/book/s-dpo
```

Rows that were made before, by `recipes/make_preferences.py` or in the form of S-DPO's data: `--preferences FOLDER`.
An adapter is trained on, with a copy of it as the reference; `--use_peft` puts a new one on a whole model. What it
leaves in `output_dir`: the model, `metrics.json`, `log_history.json`, `recommendations.txt` and `training.png`.
"""

import sys
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import AutoPeftModelForCausalLM
from preference_data import NegativeArguments, make_preferences
from recipe_data import check_template, load_recipe_data, with_quickstart_data
from recipe_outputs import describe_recommendations, format_table, plot_training, write_json, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_msl import (
    DataArguments,
    RecommendationCallback,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    evaluate_recommendations,
    is_sharded,
)


def main(args: NegativeArguments, data_args: DataArguments, config: SoftmaxDPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: pass the model to be trained further.")
    process, output_dir = PartialState(), Path(config.output_dir)
    data = load_recipe_data(data_args)
    check_template(model_args.model_name_or_path, data.template)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=config.trust_remote_code
    )
    trie = data.catalog.build_trie(tokenizer, data_args.conversational, config.chat_template_kwargs)
    model = load_policy(model_args, config)
    ranking = {
        "max_length": config.max_length,
        "prompt_template": data.template,
        "chat_template_kwargs": config.chat_template_kwargs,
    }

    started = time.time()
    if args.negatives == "model" and args.preferences is None:
        model = model.to(process.device)
    preferences = make_preferences(args, data, model, tokenizer, trie, config.seed, **ranking)
    drawn = time.time()
    trainer = SoftmaxDPOTrainer(
        model,
        args=config,
        train_dataset=preferences["train"],
        eval_dataset=preferences["validation"] if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=None if is_peft_model(model) else get_peft_config(model_args),
        trie=trie,
        prompt_template=data.template,
        catalog=data.catalog,
    )
    if config.eval_strategy != "no":
        rows = data.rows["validation"]
        trainer.add_callback(RecommendationCallback(trainer, trie, data.catalog, rows, ks=(10,), **ranking))
    is_last = config.resume_from_checkpoint == "last"
    trainer.train(resume_from_checkpoint=True if is_last else config.resume_from_checkpoint)
    trainer.save_model()
    trained = time.time()

    model = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {
        "negatives_seconds": round(drawn - started, 1),
        "train_seconds": round(trained - drawn, 1),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": config.seed,
    }
    if is_sharded(model):
        process.print(
            "The model is sharded, and decoding needs all of it in each process. Evaluate what was saved:\n"
            f"accelerate launch recipes/evaluate.py --model_name_or_path {output_dir}"
        )
    else:
        found_metrics, found = evaluate_recommendations(
            model, tokenizer, trie, data.catalog, data.rows["test"], return_recommendations=True, **ranking
        )
        metrics |= found_metrics | {"test_seconds": round(time.time() - trained, 1)}
    if process.is_main_process:
        write_json(output_dir / "log_history.json", trainer.state.log_history)
        plot_training({"softmax DPO": trainer.state.log_history}, output_dir / "training.png")
        if is_sharded(model):
            write_json(output_dir / "metrics.json", metrics)
        else:
            targets, ranking = data.rows["test"]["item_id"][:], (found.items, found.target_ranks)
            write_results(output_dir, metrics, data.catalog, targets, *ranking, data.seen_items)
            text = describe_recommendations(data.rows["test"], data.catalog, found)
            (output_dir / "recommendations.txt").write_text(text, encoding="utf-8")
            print(text)
        print(f"Test, {len(data.rows['test'])} users\n{format_table({'softmax DPO': metrics})}\n\n{output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub()
    process.wait_for_everyone()
    process.destroy_process_group()


def load_policy(model_args: ModelConfig, config: SoftmaxDPOConfig) -> PreTrainedModel:
    """The model to train: an adapter to be trained on, or a whole model."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    is_adapter = find_adapter_config_file(name, revision=revision) is not None
    return (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(
        name,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        quantization_config=get_quantization_config(model_args),
        **({"is_trainable": True} if is_adapter else {}),
    )


if __name__ == "__main__":
    parser = TrlParser((NegativeArguments, DataArguments, SoftmaxDPOConfig, ModelConfig))
    main(*parser.parse_args_and_config(with_quickstart_data(sys.argv[1:])))
