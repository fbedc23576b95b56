"""Trainer of transformers: the penalty in its loss, checkpoints that are adapters, and a run that goes on from them.

python trainer.py MODEL FOLDER  # a folder or a name of the hub; where checkpoints and the adapter go
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import forgetless as fl

name, folder = sys.argv[1:]
texts = ["Order 17 goes to Lima.", "Order 18 goes to Oslo.", "Order 19 goes to Kyiv."]  # put yours here

tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = fl.adapt(AutoModelForCausalLM.from_pretrained(name), fl.CLoRA(rank=8, k=64))


class PenaltyTrainer(fl.training.PenaltyMixin, Trainer):
    pass


trainer = PenaltyTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=folder,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    ),  # fmt: skip
    train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))  # a stopped run goes on
fl.save(model, folder)
