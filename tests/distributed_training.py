# SPDX-License-Identifier: Apache-2.0
"""
Train small models in `folder` with the rows that lie there, 8 a step over all processes: all weights, the same from a
checkpoint on, the same by the weighted loss over the vocabulary and with negatives from some of the items, and an
adapter. Launched by `test_distributed.py` on one process and on several.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_msl import ItemCatalog, MSLConfig, MSLTrainer, PromptTemplate, RankingTask, masked_softmax_loss, tokenize_rows
from trl_msl.data import supervised_items
from trl_msl.model import is_sharded
from trl_msl.training import add_sparse_lm_head


folder, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder / "base")
template = PromptTemplate("The user has read: {history}\nNext: ")
task = RankingTask(ItemCatalog.from_pretrained(folder / "base"), tokenizer, template)
rows = Dataset.from_parquet(str(folder / "rows.parquet"))
rows = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"task": task})
# In the second step, the second of two ranks has nothing to learn from: no title at all
rows = rows.map(
    lambda row, index: {"labels": [-100] * len(row["labels"])} if 12 <= index < 16 else row, with_indices=True
)


def train(name: str, resume: bool = False, loss: dict | None = None, **kwargs) -> None:
    set_seed(0)
    num_processes = PartialState(cpu=True).num_processes
    config = MSLConfig(
        out / name, max_steps=4, save_steps=2, logging_steps=1, report_to="none", bf16=False, use_cpu=True,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, train_sampling_strategy="sequential",
        per_device_train_batch_size=8 // num_processes, temperature_min=0.1, temperature_ema=0.3,
        per_device_eval_batch_size=2, dataloader_pin_memory=False,
        adam_epsilon=1.0,  # or a gradient of nearly 0 would count by its sign alone
        **(loss or {}),
    )  # fmt: skip
    trainer = MSLTrainer(str(folder / "base"), config, task=task, **{"train_dataset": rows, **kwargs})
    save = RankingTask.save_pretrained
    with mock.patch.object(RankingTask, "save_pretrained", autospec=True, side_effect=save) as saved:
        trainer.train(resume_from_checkpoint=str(out / "full" / "checkpoint-2") if resume else None)
        trainer.save_model()
    report = {
        "num_saved": saved.call_count,
        "temperature": trainer.temperature,
        "sharded": is_sharded(trainer.model),
        "num_head_values": trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight.numel(),
        "eval_loss": trainer.evaluate(rows.select(range(7)))["eval_loss"],  # 2 processes, 2 rows each: one is repeated
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    (out / name / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


def compare_gradients_of_a_sharded_head() -> None:
    """
    An LM head that is sharded by itself is gathered by the sparse head: no hook does it, as `lm_head` isn't called.
    """
    process = PartialState()
    gradients = []
    for sharded in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder / "base").train()
        add_sparse_lm_head(model, task.trie)
        if sharded:
            for module in (*model.model.layers, model.lm_head, model):
                fully_shard(module, mesh=init_device_mesh("cpu", (process.num_processes,)))
        for rank in [process.process_index] if sharded else range(process.num_processes):
            batch = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in rows]
            output = model(**batch[rank], sparse_lm_head=True)
            loss = masked_softmax_loss(output.logits, output.valid_mask, output.targets).sum()
            (loss if sharded else loss / process.num_processes).backward()
        whole = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
        gradients.append(dict(zip((name for name, _ in model.named_parameters()), whole)))
    errors = {name: float((gradients[0][name] - gradients[1][name]).abs().max()) for name in gradients[0]}
    (out / f"errors{process.process_index}.json").write_text(json.dumps(errors))


train("full")
train("resumed", resume=True)
train("vocab", loss={"normalize": "vocab", "temperature": 1.0, "position_weights": "igd"})
some = rows.filter(lambda row: row["labels"][-1] > 0 and row["labels"][-1] % 3)
assert len(supervised_items(some, task.trie)) < len(task.catalog)
train("seen", loss={"negatives": "seen"}, train_dataset=some.select(index % len(some) for index in range(32)))
train("lora", peft_config=LoraConfig(task_type="CAUSAL_LM"))
process = PartialState()
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    compare_gradients_of_a_sharded_head()
process.wait_for_everyone()
process.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # without tidying up: DeepSpeed's threads over gloo, still alive then, now and again abort the interpreter
